"""Recipes: shipped ones load, unknown keys and impossible values do not, plans count every stored bit."""

import dataclasses
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosaq.architecture import LLAMA2_7B
from rosaq.engines.shards import input_parts
from rosaq.plan import make_plan
from rosaq.recipe import Recipe, load_recipe, shipped_recipes


def test_shipped_recipes_load_and_describe_themselves():
    assert {"rosaq-int4", "rosaq-int3", "rosaq-paper", "rosaq-paper-per-layer", "rtn", "mixed"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description.endswith(".")
        assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=5), r"bits is 5; allowed are \(2, 3, 4\)"),
        (dict(bits="4"), "bits is '4'; it must be of type int"),
        (dict(bits=True), "bits is True; it must be of type int"),
        (dict(rotation="wild"), "rotation is 'wild'; allowed are"),
        (dict(salient=-1), "salient is -1; it must be 0 or more"),
        (dict(group_size=100), "group_size is 100; it must be a multiple of 16"),
        (dict(rotation="none"), "selection by eigenvalue needs a rotation"),
        (dict(rotation="none", selection="bottom"), "selection by bottom needs a rotation"),
        (dict(rotation="per-layer", scaling="awq"), "a rotation at run time keeps from it"),
        (dict(head_rotation="concatenated", scaling="awq"), "a rotation at run time keeps from it"),
        (dict(act_order=True), "it needs rounding 'gptq'"),
        (dict(sink_weight=0, rounding="gptq"), "sink_weight is 0; it must be 1 or more"),
        (dict(sink_weight=16), "sink_weight is 16; it needs rounding 'gptq'"),
        (dict(token_weights="gradient"), "token_weights 'gradient' needs rounding 'gptq'"),
        (dict(token_weights="gradient", rounding="gptq", sink_weight=4), "and sink_weight 1"),
        (dict(refinement=-1), "refinement is -1; it must be 0 or more"),
        (dict(refinement=2), "refinement is 2; it goes over GPTQ's codes, so it needs rounding 'gptq'"),
        (dict(act_order=1), "act_order is 1; it must be of type bool"),
        (dict(seed=-1), "seed is -1; it must be 0 or more"),
        (dict(selection="magnitude"), "selection by magnitude is made in the model's own basis"),
        (dict(rotation="random"), "selection by eigenvalue needs a rotation 'global' or 'per-layer'; rotation is 'random'"),
        (dict(head_rotation="hadamard"), "no channel of head_rotation 'hadamard' is salient"),
        (dict(head_rotation="learned", salient_per_head=0), "head_rotation 'learned' needs rotation 'learned'"),
        (dict(rotation="learned", salient=0), "salient channels must be 0"),
        (dict(rotation="learned", salient=0, salient_per_head=0), "not 'head-wise'"),
        (
            dict(rotation="learned", head_rotation="none", salient=0, salient_per_head=0),
            "learning_steps is 0 and learning_rate 0.0; both must be above 0",
        ),
        (dict(learning_steps=10), "both must be above 0 for rotation 'learned'"),
        (dict(learning_rate=1), "learning_rate is 1; it must be of type float"),
        (dict(distillation_windows=400), "distillation_windows is 400 and distillation_epochs 0; both must be above 0"),
        (dict(distillation_epochs=-1), "distillation_epochs is -1; it must be 0 or more"),
        (dict(rotation="per-layer", distillation_windows=8, distillation_epochs=1), "distillation does not go with rotation 'per-layer'"),
        (dict(down_rotation="hadamard"), "down_rotation 'hadamard' mixes all channels"),
        (dict(down_rotation="hadamard", down_scaling="none", salient_down=16), "down_rotation 'hadamard' mixes all channels"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"name": "x", **change})


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nbits = 3\nsalient = 32\nsalient_bits = 8\n')
    assert load_recipe(str(tmp_path / "mine.toml")) == Recipe("mine", bits=3, salient=32, salient_bits=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "mine"\nbits = 5\n', "{file}: recipe 'mine': bits is 5; allowed are (2, 3, 4)"),
        ('name = "mine"\nact_order = true\n', "{file}: recipe 'mine': act_order is an order of GPTQ's rounding; it needs rounding 'gptq'"),
        ("name = 3\n", "{file}: recipe 3: name is 3; it must be of type str"),
        ("bits = 4\n", "{file}: the key 'name' is missing"),
        ('name = "mine"\nbit = 4\n', f"{{file}}: unknown key 'bit'; known are {', '.join(field.name for field in dataclasses.fields(Recipe))}"),
    ],
)
def test_a_recipe_file_that_is_refused_is_named(text, message, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_recipe(str(file))
    assert str(refused.value) == message.format(file=file)


def test_a_refused_mapping_is_named_only_where_it_has_a_name():
    for origin, at, key in (("config.json", "config.json: ", "config.json"), ("", "", "recipe")):
        with pytest.raises(ValueError) as value:
            Recipe.from_dict({"name": "x", "seed": -1}, origin)
        assert str(value.value) == f"{at}recipe 'x': seed is -1; it must be 0 or more"
        with pytest.raises(ValueError, match=f"^{key}: the key 'name' is missing$"):
            Recipe.from_dict({}, origin)


@given(st.dictionaries(st.text(max_size=12), st.one_of(st.integers(), st.text(max_size=5), st.none(), st.lists(st.integers()))))
def test_any_mapping_is_a_recipe_or_one_sentence(values):
    try:
        Recipe.from_dict(values)
    except ValueError as error:
        assert "\n" not in str(error).replace(repr(values), "")


def test_bits_per_weight_by_hand():
    # q, k, v, gate, up: 128 FP16 channels of 4096, the rest 4 bits and 20 bits a group of 128. o: 32 of each head's
    # 128 in FP16, 96 in one group. down: 11008 channels in 86 groups. Weighted by their sizes.
    residual = (128 * 16 + 3968 * 4 + 31 * 20) / 4096
    attention = (32 * 16 + 96 * 4 + 20) / 128
    down = 4 + 20 / 128
    sizes = (3 * 4096**2 + 2 * 11008 * 4096, 4096**2, 11008 * 4096)
    wanted = (residual * sizes[0] + attention * sizes[1] + down * sizes[2]) / sum(sizes)
    assert make_plan(load_recipe("rosaq-paper"), LLAMA2_7B).bits_per_weight == pytest.approx(wanted, rel=1e-12)
    assert round(wanted, 2) == 4.66


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_file_states_its_bits(name):
    four, three = (make_plan(load_recipe(name).replace(bits=bits), LLAMA2_7B).bits_per_weight for bits in (4, 3))
    line = f"# Bits per weight (Llama-2-7B, all that is stored): {four:.2f} at INT4, {three:.2f} at INT3.\n"
    assert line in (files("rosaq") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def test_a_rotation_per_layer_pays_for_itself():
    plans = {name: make_plan(load_recipe(name), LLAMA2_7B) for name in ("rosaq-paper", "rosaq-paper-per-layer")}
    block = sum(layout.out_features * layout.in_features for layout in plans["rosaq-paper"].blocks[0].values())
    extra = plans["rosaq-paper-per-layer"].bits_per_weight - plans["rosaq-paper"].bits_per_weight
    assert extra == pytest.approx(2 * 16 * 4096**2 / block)


def test_a_rotation_across_heads_pays_for_itself():
    head_wise, across = (make_plan(load_recipe(name), LLAMA2_7B) for name in ("rosaq-paper", "rosaq-heads-concatenated"))
    assert across.blocks[0]["o"].salient == 32 * 32 and across.blocks[0]["o"].blocks == 1
    assert across.bits_per_weight > head_wise.bits_per_weight + 0.9 * 16 * 4096**2 / (4 * 4096**2 + 3 * 4096 * 11008)


@pytest.mark.parametrize(("intermediate", "ranks"), [(11008, {1, 2}), (14336, {1, 2, 4, 8}), (28672, {1, 2, 4, 8})])
def test_ranks_can_share_the_recommended_recipe(intermediate, ranks):
    """W_down's salient channels are one prefix, which the first rank gets; what is cut is whole groups of 128."""
    down = make_plan(load_recipe("rosaq-int4"), dataclasses.replace(LLAMA2_7B, intermediate=intermediate)).blocks[0]["down"]
    assert (down.blocks, down.salient) == (1, 128) and set(input_parts(down)) & {1, 2, 4, 8} == ranks


def test_baselines_spend_the_same_bits():
    """RTN, GPTQ and AWQ store 4 bits and, per 128 channels, an FP16 scale and a 4-bit zero point; nothing else."""
    for name in ("rtn", "gptq", "gptq-act-order", "awq"):
        assert make_plan(load_recipe(name), LLAMA2_7B).bits_per_weight == 4 + 20 / 128


def test_tied_tables():
    tied = dataclasses.replace(LLAMA2_7B, tied=True)
    assert make_plan(load_recipe("rtn"), tied).tied and not make_plan(load_recipe("rosaq-paper"), tied).tied
    assert not make_plan(load_recipe("rosaq-paper"), tied).tables  # small beside 7B: 16 bits fit under half
