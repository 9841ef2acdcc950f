"""Where activations are kept, that it changes nothing, and that the bound on the memory is one."""

import pytest
import torch

from rosaq import Means, load_recipe, open_source, quantize
from rosaq.activations import PLACES, Activations
from rosaq.architecture import FAMILIES, Architecture
from rosaq.distributed import Ranks
from rosaq.memory import Work, available_bytes, estimate, parse_size, place_activations, resident_bytes
from rosaq.moments import Flow, collect, own_windows


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5KiB", 1536), ("1024", 1024), ("3B", 3)])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_a_size_without_its_unit_is_said_in_bytes():
    with pytest.raises(ValueError, match=r"max-memory is 3 bytes, but this model takes about \d+\.\d\d GiB"):
        place_activations(Work(2**30, 0), "cpu", parse_size("3"))
    with pytest.raises(ValueError, match=r"max-memory is 0\.02 GiB"):
        place_activations(Work(2**30, 0), "cpu", parse_size("20MB"))


@pytest.mark.parametrize("text", ["", "GiB", "2 gigabytes", "-1GB", "0", "1e9", "2GiB extra"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="allowed is a number above 0 with a unit"):
        parse_size(text)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_as_they_were(place, dtype, tmp_path):
    states = torch.randn(7, 5, 6).to(dtype)
    with Activations((7, 5, 6), dtype, "cpu", place, tmp_path) as kept:
        for rows in (slice(4, 7), slice(0, 4)):
            kept.write(rows, states[rows])
        assert torch.equal(kept.read(slice(2, 6)), states[2:6])
        kept.write(slice(1, 2), states[:1])
        assert torch.equal(kept.read(slice(0, 2)), states[:1].expand(2, 5, 6))
        assert list(tmp_path.iterdir()) == []  # nothing that a killed run would leave


def test_places_give_the_same_sums(saved, tmp_path):
    source, windows = open_source(str(saved("llama"))), torch.arange(160).remainder(90).view(5, 32)
    sums = {}
    for place in PLACES:
        flow = Flow(place=place, folder=tmp_path)
        sums[place] = [kept for block in collect(source, windows, "cpu", torch.float32, lambda *_: None, flow) for kept in block.values()]
    for place in PLACES[1:]:
        for one, other in zip(sums[PLACES[0]], sums[place], strict=True):
            assert torch.equal(one.magnitude, other.magnitude)
            assert all(a is b is None or torch.equal(a, b) for a, b in ((one.moment, other.moment), (one.sample, other.sample)))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_places_give_the_same_checkpoint(saved, tmp_path, monkeypatch, rounding):
    source, ids = open_source(str(saved("llama"))), torch.arange(160).remainder(90).view(5, 32)
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4, rounding=rounding)
    for place in PLACES:
        monkeypatch.setattr("rosaq.run.place_activations", lambda *_, place=place: place)
        assert quantize(source, tmp_path / place, recipe, ids, "cpu").activations == place
    assert len({(tmp_path / place / "model.safetensors").read_bytes() for place in PLACES}) == 1


def test_activations_on_a_full_disk_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with Activations((2, 3, 4), torch.float32, "cpu", "disk", tmp_path) as kept, pytest.raises(ValueError, match="No space left on device"):
        kept.write(slice(0, 2), torch.zeros(2, 3, 4))


def test_places_follow_the_bound():
    work = Work(host=2**30, activations=2**30)
    have = resident_bytes()
    assert available_bytes() > 0
    assert place_activations(work, "cpu", have + 3 * 2**30) == "host"
    assert place_activations(work, "cpu", have + int(1.5 * 2**30)) == "disk"
    with pytest.raises(ValueError, match=r"max-memory is .* GiB, but this model takes about .* GiB even with its activations on disk"):
        place_activations(work, "cpu", have + 2**29)


def test_the_estimate_grows_with_what_it_is_made_of():
    a = Architecture(FAMILIES["llama"], 4096, 11008, 32, 32, 32, 128, 32000, False, 4096)
    usual = estimate(a, "cpu", 4, (128 * 2048, 2048), False)
    assert usual.activations == 128 * 2048 * 4096 * 4
    learning = estimate(a, "cpu", 4, (128 * 2048, 2048), False, (8 * 2048, 2048))
    assert learning.host > 2 * 6.7e9 and learning.host > estimate(a, "cpu", 4, (128 * 2048, 2048), False, (2 * 2048, 2048)).host
    assert estimate(a, "cpu", 4, (128 * 2048, 2048), True).host > usual.host > estimate(a, "cuda", 2, (128 * 2048, 16384), False).host > 2 * 4 * 10**8


def test_a_bound_that_is_too_small_is_refused_before_any_work(saved, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    with pytest.raises(ValueError, match="max-memory is"):
        quantize(str(saved("llama")), tmp_path / "out", recipe, torch.arange(64).view(2, 32), "cpu", means=Means(max_memory=2**20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-original"]


def test_a_bound_on_a_gpus_memory_needs_a_gpu(saved, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    with pytest.raises(ValueError, match=r"max-device-memory is 1.00 GiB, but the device is cpu"):
        quantize(str(saved("llama")), tmp_path / "out", recipe, torch.arange(64).view(2, 32), "cpu", means=Means(max_device_memory=2**30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-original"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_ranks_share_whole_batches_in_order(count):
    windows = torch.zeros(70, 64, dtype=torch.long)
    shares = [own_windows(windows, 2048, Ranks(rank, count)) for rank in range(count)]
    rows = [row for share in shares for row in range(share.start, share.stop)]
    assert rows == list(range(70)) and all(share.start % 32 == 0 for share in shares)
