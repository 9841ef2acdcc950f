"""What a recipe makes of an architecture, before any weight is read: the form of every layer, sizes, and refusals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS, SITE_NORM, SITE_OF, SITES, Architecture
from rosaq.hadamard import hadamard_factors
from rosaq.layout import LinearLayout
from rosaq.recipe import ABSORBED, Recipe, SiteForm

TABLE_BITS = 8
OPTION_BITS, OPTION_GROUPS, OPTION_SHARES = (2, 3, 4), (32, 64, 128), (1, 2, 4, 8)  # what a site may get for a target: see `site_options`


@dataclass(frozen=True)
class Plan:
    """The form of a quantized model.

    Attributes:
        blocks: form of each linear layer of each decoder block, by role; all the same, but for an allocation.
        tables: form of embedding and lm_head where they are stored at 8 bits, by module name; empty where they stay.
        rotated_norms: names within a block of the norms that rotate at run time (rotation "per-layer").
        rotated_inputs: names within a block of the linear layers that rotate their input at run time
            (head_rotation "concatenated").
        hadamard_inputs: names within a block of the linear layers whose input is multiplied by a Hadamard matrix at run
            time (down_rotation "hadamard").
        untied: a tied embedding table gets a separate lm_head.
        tied: embedding and lm_head are one table in the checkpoint.
        bits_per_weight: stored bits over weights, all linear layers of the decoder blocks: scales, zero points,
            salient channels, orders and run-time rotations included, embedding and lm_head not.
        checkpoint_bytes: of all tensors.
        original_bytes: of the same model in FP16, a tied table counted once.
    """

    blocks: tuple[dict[str, LinearLayout], ...]
    tables: dict[str, LinearLayout]
    rotated_norms: tuple[str, ...]
    rotated_inputs: tuple[str, ...]
    hadamard_inputs: tuple[str, ...]
    untied: bool
    tied: bool
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int


def make_plan(recipe: Recipe, architecture: Architecture, biases: frozenset[str] = frozenset()) -> Plan:
    """Lay a recipe out over an architecture.

    Args:
        recipe: the recipe.
        architecture: the model's sizes.
        biases: roles whose linear layer has a bias.

    Raises:
        ValueError: the recipe keeps more channels precise than there are, or rotates W_down's input where there is no
            Hadamard matrix of its width; names the option and what is allowed.
    """
    a = architecture
    _check_salient(recipe, a)
    _check_down_rotation(recipe, a)
    if recipe.allocation and len(recipe.allocation.split()) != a.layers:
        raise ValueError(f"allocation is of {len(recipe.allocation.split())} decoder blocks, but the model has {a.layers}")
    if recipe.target_bits and not recipe.allocation:
        _check_target(recipe, a, biases)
    linears = [block_linears(recipe, a, biases, recipe.site_forms(index)) for index in range(a.layers)]
    untied = a.tied and recipe.rotation in ABSORBED
    weights = sum(layout.out_features * layout.in_features for layout in linears[0].values())
    rotated = tuple(NORMS[norm] for norm in SITE_NORM.values()) if recipe.rotation == "per-layer" else ()
    rotated_inputs = (LINEARS["o"],) if recipe.head_rotation == "concatenated" else ()
    online = (LINEARS["down"],) if recipe.down_rotation == "hadamard" else ()
    rotations = len(rotated) * a.hidden**2 + len(rotated_inputs) * a.width("attn_out") ** 2
    stored = sum(layout.bits_stored() for block in linears for layout in block.values()) + a.layers * 16 * rotations
    other = 16 * (a.norm_weights() + sum(linears[0][role].out_features for role in biases))
    blocks = stored + a.layers * other + 16 * a.hidden
    copies = 1 if a.tied and not untied else 2
    table = 16 * a.vocabulary * a.hidden
    original = a.layers * (16 * weights + other) + 16 * a.hidden + table * (1 if a.tied else 2)
    tables: dict[str, LinearLayout] = {}
    too_large = untied and 2 * (blocks + copies * table) >= original
    if recipe.embedding_bits == "8" or (recipe.embedding_bits == "auto" and too_large):
        layout = LinearLayout(a.vocabulary, a.hidden, TABLE_BITS, min(recipe.group_size, a.hidden))
        tables = {EMBEDDING: layout, HEAD: layout}
        copies, table = 2, layout.bits_stored()
    tied = copies == 1
    total = blocks + copies * table
    bits_per_weight = stored / (a.layers * weights)
    return Plan(tuple(linears), tables, rotated, rotated_inputs, online, a.tied and not tied, tied, bits_per_weight, total // 8, original // 8)


def block_linears(recipe: Recipe, a: Architecture, biases: frozenset[str], forms: Sequence[SiteForm]) -> dict[str, LinearLayout]:
    """Form of each linear layer of a decoder block, by role, where its sites are stored in these forms."""
    by_site = dict(zip(SITES, forms, strict=True))
    return {role: _linear(role, recipe, a, role in biases, by_site[SITE_OF[role]]) for role in LINEARS}


def site_options(recipe: Recipe) -> dict[str, list[SiteForm]]:
    """The forms that each site may get for a target.

    2, 3 or 4 bits; groups of 32, 64 or 128; the recipe's salient channels, a half, a quarter, an eighth or none, in multiples of 8 as the
    kernels like them.
    """
    options = {}
    for site, most in zip(SITES, recipe.site_salient, strict=True):
        counts = sorted({0, most, *(most // share // 8 * 8 for share in OPTION_SHARES[1:])})
        groups = sorted({*OPTION_GROUPS, recipe.group_size})
        options[site] = [SiteForm(bits, salient, group) for bits in OPTION_BITS for salient in counts for group in groups]
    return options


def _check_target(recipe: Recipe, a: Architecture, biases: frozenset[str]) -> None:
    """Refuse a target that no allocation reaches, or that all stay under."""
    base = make_plan(recipe.replace(target_bits=0.0), a, biases)
    weights = sum(layout.out_features * layout.in_features for layout in base.blocks[0].values())
    least, most = base.bits_per_weight, base.bits_per_weight
    for site, options in site_options(recipe).items():
        bits = [site_bits(recipe, a, site, form) / weights for form in options]
        own = sum(base.blocks[0][role].bits_stored() for role in SITES[site]) / weights
        least, most = least + min(bits) - own, most + max(bits) - own
    if not least <= recipe.target_bits <= most:
        reach = f"{least:.3f} to {most:.3f} bits per weight"
        raise ValueError(f"target_bits is {recipe.target_bits:g}; with recipe {recipe.name!r} this model can have {reach}")


def site_bits(recipe: Recipe, a: Architecture, site: str, form: SiteForm) -> int:
    """Stored bits of a site's linear layers in this form."""
    return sum(_linear(role, recipe, a, False, form).bits_stored() for role in SITES[site])


def _linear(role: str, recipe: Recipe, a: Architecture, bias: bool, form: SiteForm) -> LinearLayout:
    site, salient = SITE_OF[role], form.salient
    n, k = a.shape(role)
    layout = LinearLayout(n, k, form.bits, form.group_size, salient_bits=recipe.salient_bits, bias=bias)
    if site == "attn_out" and recipe.head_rotation == "concatenated":
        return replace(layout, salient=salient * a.heads)
    if site == "attn_out":
        return replace(layout, blocks=a.heads, salient=salient) if salient else layout
    if site == "mlp_out":
        return replace(layout, salient=salient)
    return replace(layout, salient=salient, ordered=recipe.selection == "magnitude" and salient > 0)


def _check_salient(recipe: Recipe, a: Architecture) -> None:
    forms = [recipe.site_forms(index) for index in range(len(recipe.allocation.split()) or 1)]
    attn_in, per_head, mlp_in, down = (max(form.salient for form in site) for site in zip(*forms, strict=True))
    if max(attn_in, mlp_in) >= a.hidden:
        raise ValueError(f"salient is {max(attn_in, mlp_in)}, but the model is {a.hidden} channels wide; allowed are 0 to {a.hidden - 1}")
    if down >= a.intermediate:
        raise ValueError(f"salient_down is {down}, but there are {a.intermediate} channels; allowed are 0 to {a.intermediate - 1}")
    if per_head >= a.head_size:
        raise ValueError(f"salient_per_head is {per_head}, but a head has {a.head_size} channels; allowed are 0 to {a.head_size - 1}")


def _check_down_rotation(recipe: Recipe, a: Architecture) -> None:
    if recipe.down_rotation == "hadamard":
        try:
            hadamard_factors(a.intermediate)
        except ValueError as error:
            raise ValueError(f"down_rotation is 'hadamard', but {error}; the model needs down_rotation 'none'") from error


def block_forms(plan: Plan, a: Architecture, index: int, names: list[str], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every stored tensor of a decoder block, by its name within the block.

    Args:
        plan: the plan.
        a: the model's sizes.
        index: of the block.
        names: of the source's tensors within the block.
        dtype: type of what is not quantized.
    """
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for role, module in LINEARS.items():
        forms |= {f"{module}.{name}": form for name, form in plan.blocks[index][role].tensors().items()}
    for norm in plan.rotated_norms:
        forms[f"{norm}.rotation"] = ((a.hidden, a.hidden), torch.float16)
    for module in plan.rotated_inputs:
        forms[f"{module}.rotation"] = ((a.width("attn_out"), a.width("attn_out")), torch.float16)
    for name in names:
        if name.rpartition(".")[0] not in LINEARS.values():
            forms[name] = (a.tensor_shape(name), dtype)
    return forms


def table_forms(plan: Plan, a: Architecture, dtype: torch.dtype) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Shape and type of every stored tensor outside the decoder blocks, by module and full name."""
    forms: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {FINAL_NORM: {f"{FINAL_NORM}.weight": ((a.hidden,), dtype)}}
    for module in (EMBEDDING,) if plan.tied else (EMBEDDING, HEAD):
        if module in plan.tables:
            forms[module] = {f"{module}.{name}": form for name, form in plan.tables[module].tensors().items()}
        else:
            forms[module] = {f"{module}.weight": ((a.vocabulary, a.hidden), dtype)}
    return forms
