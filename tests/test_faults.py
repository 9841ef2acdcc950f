"""Whatever happens to a run: nothing corrupt has the output's name, the message says why, the same command ends the same.

The commands run in forks of a process that has PyTorch loaded (`faults/server.py`), where a fault strikes at a given
disk operation. Between two of these nothing changes on disk, so they are all the moments there are.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import random_model, tokenizer
from rosaq.checkpoint_writer import CheckpointWriter
from rosaq.distributed import Ranks
from rosaq.engines.loading import verify_checkpoint
from rosaq.learned import Learned
from rosaq.workfolder import WorkFolder, tensors_hash

SERVER = Path(__file__).parent / "faults" / "server.py"
KILLS = 20


class Commands:
    """Runs the command line in the server's forks."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def __call__(self, *arguments, **fault):
        self.process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], **fault}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def rosaq():
    commands = Commands()
    yield commands
    commands.process.stdin.close()
    commands.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "model"
    random_model("llama", num_hidden_layers=3).save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    letters = random.Random(7)
    documents = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz    .,", k=500)) for _ in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return folder


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the model that a test may damage, with the files' times."""
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def command(model, output, *more, recipe="rosaq-paper"):
    sizes = ["--samples", 70, "--seq-len", 64]  # three batches of tokens
    if recipe == "rosaq-paper":
        sizes += ["--salient", 16, "--salient-per-head", 4, "--group-size", 16]
    return ["quantize", model, "-o", output, "--calibration", model / "text.jsonl", "--recipe", recipe, "--device", "cpu", "--quiet", *sizes, *more]


GPTQ = dict(bits=3, group_size=16, salient=16, salient_per_head=4, salient_down=16, rounding="gptq")
FULL = dict(clipping="mse", refinement=2, token_weights="gradient")
NONE_SALIENT = dict(bits=3, group_size=16, salient=0, salient_per_head=0)
LEARNED = dict(rotation="learned", head_rotation="learned", learning_steps=2, learning_rate=1.5, clipping="awq", down_scaling="none")
ONLINE = dict(down_rotation="hadamard", rounding="gptq", act_order="true")


def toml(folder, name, **fields):
    """A recipe file."""
    file = folder / f"{name}.toml"
    values = {key: value if isinstance(value, int | float) or value == "true" else f'"{value}"' for key, value in fields.items()}
    file.write_text(f'name = "{name}"\n' + "".join(f"{key} = {value}\n" for key, value in values.items()))
    return file


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def work(output):
    return output.parent / f".{output.name}.partial"


@pytest.fixture(scope="module")
def whole(rosaq, model, tmp_path_factory):
    """What an uninterrupted run gives, and how many disk operations it takes: by recipe."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    awq = toml(model, "awq", **NONE_SALIENT, rotation="none", head_rotation="none", scaling="awq", clipping="awq")
    for recipe in ("rosaq-paper", toml(model, "small", **GPTQ, **FULL), toml(model, "learned", **NONE_SALIENT, **LEARNED, **ONLINE), awq):
        done = rosaq(*command(model, folder / f"{recipe}".replace("/", "-"), recipe=recipe))
        assert done["codes"] == [0], done["errors"]
        output = folder / f"{recipe}".replace("/", "-")
        assert not work(output).exists()
        found[str(recipe)] = (content(output), done["operations"][0])
    return found


def ended(done, *words, code=1):
    """One sentence, with these words."""
    assert done["codes"] == [code], done
    error = done["errors"][0]
    assert error.count("\n") == 1 and error.startswith("rosaq: ") and "Traceback" not in error, error
    for word in words:
        assert str(word) in error, error


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment_the_same_command_goes_on(rosaq, model, whole, tmp_path, number):
    chance = random.Random(number)
    recipe = chance.choice(list(whole))
    wanted, operations = whole[recipe]
    output, codes = tmp_path / "out", []
    for at in (chance.randint(1, operations), chance.choice([0, chance.randint(1, operations)]), 0):  # some are killed again when they go on
        if codes != [-9, 0]:
            codes += rosaq(*command(model, output, recipe=recipe), at=at, fault="SIGKILL")["codes"]
        if output.exists():
            verify_checkpoint(output)
    assert codes in ([-9, 0], [-9, -9, 0])
    assert content(output) == wanted and not work(output).exists()


@pytest.mark.parametrize("number", range(4))
def test_killed_by_the_clock(rosaq, model, whole, tmp_path, number):
    recipe = list(whole)[number]
    first = rosaq(*command(model, tmp_path / "out", recipe=recipe), after=random.Random(number).uniform(0.05, 0.8))
    if first["codes"] != [0]:  # on a fast machine it may be done by then
        done = rosaq(*command(model, tmp_path / "out", recipe=recipe))
        assert done["codes"] == [0], done["errors"]
    assert content(tmp_path / "out") == whole[recipe][0]


def test_a_learned_rotation_is_learned_once(rosaq, model, whole, tmp_path):
    """Killed once it is on disk, a run goes on with the record: it is given other losses, which the checkpoint then tells."""
    recipe = list(whole)[2]
    wanted, operations = whole[recipe]
    output = tmp_path / "out"
    assert rosaq(*command(model, output, recipe=recipe), at=int(0.6 * operations), fault="SIGKILL")["codes"] == [-9]
    file = work(output) / "rotations-learned.safetensors"
    learned = Learned.from_tensors(load_file(file))
    losses = learned.record["losses"]
    assert json.loads(wanted["rosaq.json"])["report"]["learning"] == learned.record and len(losses) == 2
    learned.record["losses"] = [loss + 1 for loss in losses]
    save_file(learned.tensors(), file, {"sha256": tensors_hash(learned.tensors())})
    assert rosaq(*command(model, output, recipe=recipe))["codes"] == [0]
    assert json.loads((output / "rosaq.json").read_text())["report"]["learning"]["losses"] == [loss + 1 for loss in losses]
    assert (output / "model.safetensors").read_bytes() == wanted["model.safetensors"]


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_interrupted(rosaq, model, whole, tmp_path, signal, code, share):
    wanted, operations = whole["rosaq-paper"]
    done = rosaq(*command(model, tmp_path / "out"), at=int(share * operations), fault=signal)
    word = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[signal]
    ended(done, word, f"what is done is kept in {work(tmp_path / 'out')}", "--force", code=code)
    assert not (tmp_path / "out").exists()
    assert rosaq(*command(model, tmp_path / "out"))["codes"] == [0] and content(tmp_path / "out") == wanted


def test_interrupted_before_anything_is_done_nothing_is_left(rosaq, model, tmp_path):
    ended(rosaq(*command(model, tmp_path / "out"), at=6, fault="SIGINT"), "interrupted", code=130)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_bytes", [40_000, 130_000])
def test_full_disk(rosaq, model, whole, tmp_path, file_bytes):
    """A limit on file size stands for the full disk: the first is too small for the shard, the second for a record."""
    wanted = whole["rosaq-paper"][0]
    assert 40_000 < len(wanted["model.safetensors"]) < 130_000
    done = rosaq(*command(model, tmp_path / "out"), file_bytes=file_bytes)
    ended(done, "cannot be written", "File too large", tmp_path)
    assert not (tmp_path / "out").exists()
    assert rosaq(*command(model, tmp_path / "out"))["codes"] == [0] and content(tmp_path / "out") == wanted


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_source_cut_short_while_it_is_read(rosaq, copied, model, whole, tmp_path, share):
    """The last shard is cut short half way; put back as it was, the run goes on; changed, it is refused."""
    shard = sorted(copied.glob("*.safetensors"))[-1]
    wanted, operations = whole["rosaq-paper"]
    done = rosaq(*command(copied, tmp_path / "out"), at=int(share * operations), fault=["truncate", str(shard), shard.stat().st_size // 2])
    ended(done, shard, "cannot be read", "the file ends")
    assert not (tmp_path / "out").exists()
    ended(rosaq(*command(copied, tmp_path / "out")), shard, "truncated or corrupt")
    shutil.copy(model / shard.name, shard)  # with a time of its own
    ended(rosaq(*command(copied, tmp_path / "out")), "belongs to another run", f"model files {shard.name} was", "--force")
    shutil.copy2(model / shard.name, shard)
    assert rosaq(*command(copied, tmp_path / "out"))["codes"] == [0] and content(tmp_path / "out").keys() == wanted.keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted["model.safetensors"]


def test_unreadable_source(rosaq, copied, tmp_path):
    shard = sorted(copied.glob("*.safetensors"))[0]
    shard.unlink()
    ended(rosaq(*command(copied, tmp_path / "out")), shard, "file is missing")
    shard.mkdir()  # what root cannot read either
    ended(rosaq(*command(copied, tmp_path / "out")), shard, "file is missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_flipped_byte_in_what_is_kept(rosaq, model, whole, tmp_path, share):
    wanted, operations = whole["rosaq-paper"]
    output = tmp_path / "out"
    assert rosaq(*command(model, output), at=int(share * operations), fault="SIGKILL")["codes"] == [-9]
    damaged = work(output) / "checkpoint" / "model.safetensors" if share > 0.5 else sorted(work(output).glob("inputs-*"))[0]
    data = bytearray(damaged.read_bytes())
    places = range(0, len(data), 500) if share > 0.5 else [len(data) - 9]
    for place in places:
        data[place] ^= 1
    damaged.write_bytes(data)
    ended(rosaq(*command(model, output)), work(output), "damaged", "--force")
    assert rosaq(*command(model, output, "--force"))["codes"] == [0] and content(output) == wanted


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_folder_removed_under_it(rosaq, model, whole, tmp_path, share):
    wanted, operations = whole["rosaq-paper"]
    done = rosaq(*command(model, tmp_path / "out"), at=int(share * operations), fault=["remove", str(work(tmp_path / "out"))])
    ended(done, "cannot be written", "No such file or directory", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert rosaq(*command(model, tmp_path / "out"))["codes"] == [0] and content(tmp_path / "out") == wanted


def test_destination_that_cannot_be_written(rosaq, model, tmp_path):
    (tmp_path / "file").write_text("")
    ended(rosaq(*command(model, tmp_path / "file" / "out")), tmp_path / "file", "cannot be written")
    ended(rosaq(*command(model, Path("/proc/out"))), "/proc/", "cannot be written")  # no folder can be made there, by root neither


def test_destination_on_another_file_system(rosaq, model, whole, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system at /dev/shm")
    output = memory / f"rosaq-test-{os.getpid()}" / "deep" / "out"
    try:
        assert rosaq(*command(model, output))["codes"] == [0] and content(output) == whole["rosaq-paper"][0]
    finally:
        shutil.rmtree(output.parents[1])


@pytest.mark.parametrize("recipe", range(4))
def test_the_bound_on_memory_is_kept(rosaq, tmp_path_factory, model, whole, recipe):
    """What it says it needs at least is enough, and the operating system counts no more."""
    name, folder = list(whole)[recipe], tmp_path_factory.mktemp("bound")
    large = folder / "model"
    random_model("llama", num_hidden_layers=3, hidden_size=256, intermediate_size=704, vocab_size=2000, head_dim=64).save_pretrained(large)
    for file in (*model.glob("tokenizer*"), model / "text.jsonl"):
        shutil.copy(file, large)
    refused = rosaq(*command(large, folder / "out", "--max-memory", "1MiB", recipe=name))
    ended(refused, "max-memory is 1.00 MiB", "even with its activations on disk")
    least = float(re.search(r"takes about ([\d.]+) GiB", refused["errors"][0])[1]) + 0.01  # the process itself differs a little
    done = rosaq(*command(large, folder / "out", "--max-memory", f"{least:.2f}GiB", recipe=name))
    assert done["codes"] == [0], done["errors"]
    assert done["peak_bytes"][0] <= least * 2**30


def test_another_run_is_refused_by_what_differs(rosaq, model, copied, whole, tmp_path):
    wanted, operations = whole["rosaq-paper"]
    output = tmp_path / "out"
    assert rosaq(*command(model, output), at=operations // 2, fault="SIGKILL")["codes"] == [-9]
    refused = "belongs to another run"
    ended(rosaq(*command(model, output, "--bits", 3)), work(output), refused, "recipe bits was 4, is 3", "--force")
    ended(rosaq(*command(model, output, "--seed", 3)), refused, "calibration seed was 0, is 3", "calibration windows_sha256 was")
    os.utime(next(copied.glob("*.safetensors")))
    ended(rosaq(*command(copied, output)), refused, "model files")
    done = rosaq(*command(model, output), ranks=2)
    assert done["codes"][0] == 1 and "ranks was 1, is 2" in done["errors"][0]
    assert rosaq(*command(model, output))["codes"] == [0] and content(output) == wanted
    ended(rosaq(*command(model, output)), output, "output folder is not empty")


def test_two_runs_do_not_share_an_output(rosaq, model, tmp_path):
    import fcntl

    work(tmp_path / "out").mkdir()
    with (work(tmp_path / "out") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended(rosaq(*command(model, tmp_path / "out")), "another run is at work on this output")


@pytest.mark.parametrize("recipe", range(4))
@pytest.mark.parametrize("ranks", [2, 3, 5])  # of three batches of tokens and three blocks: with 5, some have nothing to do
def test_ranks_make_what_one_makes(rosaq, model, whole, tmp_path, ranks, recipe):
    name = list(whole)[recipe]
    done = rosaq(*command(model, tmp_path / "out", recipe=name), ranks=ranks)
    assert done["codes"] == [0] * ranks, done["errors"]
    assert content(tmp_path / "out") == whole[name][0] and not work(tmp_path / "out").exists()


@pytest.mark.parametrize("at", [1, 4])
def test_a_rank_that_dies_ends_the_run_which_goes_on(rosaq, model, whole, tmp_path, at):
    """Rank 1 dies at its first or fourth disk operation, which are those of its block."""
    recipe = list(whole)[1]
    done = rosaq(*command(model, tmp_path / "out", recipe=recipe), ranks=2, rank=1, at=at, fault="SIGKILL")
    assert done["codes"] == [1, -9]
    assert "rank 0 of 2: another rank has ended" in done["errors"][0] and "--force" in done["errors"][0] and not (tmp_path / "out").exists()
    done = rosaq(*command(model, tmp_path / "out", recipe=recipe), ranks=2)
    assert done["codes"] == [0, 0] and content(tmp_path / "out") == whole[recipe][0]


def test_a_rank_that_cannot_go_on_says_why(rosaq, copied, tmp_path):
    shard = sorted(copied.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-200:] = b"\xff" * 200  # NaN in float32
    shard.write_bytes(data)
    done = rosaq(*command(copied, tmp_path / "out"), ranks=2)
    assert done["codes"] == [1, 1] and all("holds NaN or Inf" in error for error in done["errors"])


def test_a_failed_run_leaves_no_folders_above_its_output(rosaq, model, whole, tmp_path):
    """None that it made, and those that were there before; what is done keeps them."""
    (tmp_path / "old").mkdir()
    for above in (tmp_path / "new", tmp_path / "old"):
        ended(rosaq(*command(model, above / "deep" / "out"), at=9, fault="SIGINT"), "interrupted", code=130)
        assert not (above / "deep").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "new" / "deep" / "out"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


class Lost(Ranks):
    """The first rank of two, interrupted while it waits for the other."""

    def agree(self, value):
        raise KeyboardInterrupt


def test_an_interrupt_before_all_ranks_are_there_leaves_nothing(tmp_path):
    """Neither the folder, nor those made for it, nor the lock: the next run begins at once."""
    output = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt), WorkFolder(output, {"model": "a"}, Lost(0, 2)):
        raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())
    with WorkFolder(output, {"model": "b"}, Ranks()) as folder:
        assert folder.path.is_dir()
