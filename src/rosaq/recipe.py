"""A recipe: one row of the table of methods, written whole into every checkpoint that it makes.

A weight-only method is which basis a linear layer's inputs are put in, which input channels stay precise, and how the
rest is rounded. `residual` sites are attn_in (q, k, v) and mlp_in (gate, up); `head` is attn_out (o); `down` is
mlp_out. Sources: ROSAQ, arXiv:2506.13472 (Eq. 1, 3, 4, 6; App. G); AWQ, arXiv:2306.00978; QuaRot, arXiv:2404.00456;
SpinQuant, arXiv:2405.16406.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

CHOICES: dict[str, tuple[object, ...]] = {
    "bits": (2, 3, 4),
    "salient_bits": (8, 16),
    "rotation": ("none", "global", "per-layer", "hadamard", "random", "learned"),
    "head_rotation": ("none", "head-wise", "shared", "concatenated", "hadamard", "random", "learned"),
    "down_rotation": ("none", "hadamard"),
    "selection": ("eigenvalue", "bottom", "random", "top-bottom", "magnitude"),
    "scaling": ("none", "awq"),
    "down_scaling": ("none", "awq"),
    "clipping": ("none", "awq", "mse"),
    "rounding": ("nearest", "gptq"),
    "token_weights": ("equal", "gradient"),
    "embedding_bits": ("auto", "8", "16"),
}
ABSORBED = ("global", "hadamard", "random", "learned")  # rotations of the whole residual stream, nothing left at run time
DRAWN = ("hadamard", "random", "learned")  # bases without eigenvalues: their channels are in no order
ENTRY = r"[234]:\d+:\d+"  # of an allocation: bits, salient channels, group size of one site


@dataclass(frozen=True)
class SiteForm:
    """How the linear layers of one site are stored.

    Attributes:
        bits: of a quantized weight.
        salient: channels that stay precise, of attn_out in each head.
        group_size: channels that share a scale.
    """

    bits: int
    salient: int
    group_size: int

    def __str__(self) -> str:
        """As an allocation has it."""
        return f"{self.bits}:{self.salient}:{self.group_size}"


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        name: what the recipe is called in tables and in the checkpoint.
        description: one sentence on what it is for; the cost at run time where there is one.
        bits: width of a quantized weight, 2, 3 or 4.
        group_size: consecutive input channels that share one FP16 scale and one zero point. A group never crosses a
            head of the attention output; where it does not divide the channels, the last group is shorter.
        rotation: basis of the residual stream. "global": one PCA for all layers, absorbed (no cost at run time).
            "per-layer": one PCA per attn_in and mlp_in, as the paper puts it; it cannot be absorbed and costs a
            d x d product per site and token. "none": the model's own basis. "hadamard": a Hadamard matrix with random
            signs (QuaRot), "random": a random orthogonal matrix, "learned": SpinQuant's R1; all three absorbed.
        head_rotation: basis of the attention output. "head-wise": one PCA per key-value head (ROSAQ Eq. 6), absorbed.
            "shared": one PCA of a head's size for all heads, absorbed. "concatenated": one PCA over the concatenated
            heads, which W_V cannot absorb (each head mixes its values by its own attention), so it costs a product
            with a matrix as wide as the heads together per layer and token; its salient channels are the first
            heads x salient_per_head.
            "hadamard", "random", "learned" (SpinQuant's R2, with rotation "learned" only): one per key-value head too.
        salient: channels of attn_in and mlp_in that stay precise.
        salient_per_head: channels of each head of attn_out that stay precise.
        salient_bits: 16 (FP16) or 8 (INT8, one FP16 scale per output).
        selection: of the rotated basis "eigenvalue": the leading channels (ROSAQ), "bottom": the last, "random":
            consecutive ones from a drawn place, "top-bottom": half of each end (Table 2). "magnitude": the channels
            with the largest mean |x| in the model's own basis ("Mixed" in the paper), gathered at run time.
        scaling: "awq": per-channel scaling of the inputs of attn_in and mlp_in, absorbed by the norm weight, and of
            attn_out, absorbed by W_V. It takes a second pass over the calibration text.
        down_scaling: "awq": per-channel scaling of W_down's input, absorbed by W_up.
        clipping: "awq": the range of each group's grid is searched below the group's largest weight, in all layers
            but q and k, as AWQ has it. "mse": the range is searched for the least squared error of its weights, in all layers;
            each channel counts by GPTQ's conditional variance, or by its second moment. Both take a second pass over the calibration text.
        salient_down: channels of the feed-forward network that stay precise at mlp_out, those of the largest mean |x|.
            Putting them first is absorbed by W_gate and W_up.
        rounding: "nearest", or "gptq": error feedback by the second moment of the inputs, with the salient channels
            last, so that they take up the rest. It takes a second pass over the calibration text.
        embedding_bits: width of embedding and lm_head. "16": as they are. "8": INT8 per group. "auto": 16, unless the
            rotation unties a tied table and the checkpoint would not stay under half of the FP16 file.
        act_order: GPTQ rounds the channels of largest second moment first. The groups stay consecutive channels, with
            grids fitted beforehand, so nothing changes at run time.
        refinement: sweeps of coordinate descent over the codes behind GPTQ, with all scales fitted by least squares before each
            and at the end (`rounding/refinement.py`); 0: none of it.
        token_weights: how much each calibration token counts in the moments that GPTQ and AWQ's searches look at. "equal": alike.
            "gradient": by how much the loss feels an error there (`sensitivity.py`), which takes a pass backward through the model.
        sink_weight: how many times the first token of each calibration window counts in the moments that GPTQ and AWQ's searches look
            at, of the inputs of all sites. All later tokens attend to it (an attention sink), so its errors cost more than another's.
        down_rotation: "hadamard": W_down's input is multiplied by a Hadamard matrix at run time (R4 of QuaRot and
            SpinQuant), and W_down by its inverse: a few small products per token, up to 4 % of a block's.
        learning_steps: of Cayley SGD, where the rotation is "learned", else 0; SpinQuant takes 100.
        learning_rate: at the first step, falling linearly to 0, where the rotation is "learned", else 0; SpinQuant
            takes 1.5. While a rotation is learned weights are rounded unscaled and unclipped, whatever else is said.
        seed: of what a recipe draws at random: a random rotation, random salient channels.
        target_bits: where above 0, each site of each block gets its own bits, salient channels and group size, out of
            those that are no more than the recipe's own channels, so that the model loses least at no more than so many
            bits per weight (`allocation.py`); `bits` then says nothing.
        allocation: what was found for the target, or given: a word per decoder block, with the forms of attn_in,
            attn_out, mlp_in and mlp_out as BITS:SALIENT:GROUP, separated by commas. "": the recipe's own for all.
        distillation_windows: of the calibration text, of its length, on which all that stays precise is trained against the original
            afterwards (`distillation/`); 0: none of it. It holds the whole model.
        distillation_epochs: times that each of them is seen, else 0.

    Raises:
        ValueError: a value that is not allowed, naming the field and what is.
    """

    name: str
    description: str = ""
    bits: int = 4
    group_size: int = 128
    rotation: str = "global"
    head_rotation: str = "head-wise"
    salient: int = 128
    salient_per_head: int = 32
    salient_bits: int = 16
    selection: str = "eigenvalue"
    scaling: str = "none"
    down_scaling: str = "awq"
    salient_down: int = 0
    clipping: str = "none"
    rounding: str = "nearest"
    embedding_bits: str = "auto"
    act_order: bool = False
    refinement: int = 0
    token_weights: str = "equal"
    sink_weight: int = 1
    down_rotation: str = "none"
    learning_steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    target_bits: float = 0.0
    allocation: str = ""
    distillation_windows: int = 0
    distillation_epochs: int = 0

    def __post_init__(self) -> None:
        """Refuse types and values that mean nothing, and pairs that contradict each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = {"int": int, "str": str, "bool": bool, "float": float}[getattr(field.type, "__name__", str(field.type))]
            if type(value) is not expected:
                raise ValueError(f"recipe {self.name!r}: {field.name} is {value!r}; it must be of type {expected.__name__}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ValueError(f"recipe {self.name!r}: {field.name} is {value!r}; allowed are {CHOICES[field.name]}")
        for name in ("salient", "salient_per_head", "salient_down", "refinement", "seed", "distillation_windows", "distillation_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"recipe {self.name!r}: {name} is {getattr(self, name)}; it must be 0 or more")
        if self.sink_weight < 1:
            raise ValueError(f"recipe {self.name!r}: sink_weight is {self.sink_weight}; it must be 1 or more")
        if self.group_size < 16 or self.group_size % 16:
            raise ValueError(f"recipe {self.name!r}: group_size is {self.group_size}; it must be a multiple of 16, such as 32, 64 or 128")
        self._refuse_contradictions()
        self._refuse_rotations()
        self._refuse_allocations()
        self._refuse_distillation()

    def _refuse_rotations(self) -> None:
        """Refuse what no rotation that is drawn or learned, or made at run time, allows."""
        learned = self.rotation == "learned"
        if self.salient_per_head and self.head_rotation in DRAWN:
            raise ValueError(f"recipe {self.name!r}: no channel of head_rotation {self.head_rotation!r} is salient; salient_per_head must be 0")
        if self.head_rotation == "learned" and not learned:
            raise ValueError(f"recipe {self.name!r}: head_rotation 'learned' needs rotation 'learned'; rotation is {self.rotation!r}")
        if learned and (self.salient or self.salient_per_head or self.salient_down):
            raise ValueError(f"recipe {self.name!r}: a rotation is learned for weights that are all quantized; salient channels must be 0")
        if learned and self.head_rotation not in ("none", *DRAWN):
            raise ValueError(
                f"recipe {self.name!r}: rotation 'learned' takes head_rotation 'none', 'hadamard', 'random' or 'learned', not {self.head_rotation!r}"
            )
        if (self.learning_steps > 0, self.learning_rate > 0) != (learned, learned):
            raise ValueError(
                f"recipe {self.name!r}: learning_steps is {self.learning_steps} and learning_rate {self.learning_rate}; both must be above 0 "
                "for rotation 'learned' (SpinQuant: 100 and 1.5), and 0 otherwise"
            )
        if self.down_rotation == "hadamard" and (self.salient_down or self.down_scaling != "none"):
            raise ValueError(f"recipe {self.name!r}: down_rotation 'hadamard' mixes all channels: salient_down must be 0, down_scaling 'none'")

    def _refuse_allocations(self) -> None:
        """Refuse an allocation that cannot be read, and recipes whose sites cannot each have their own form."""
        if self.allocation and not re.fullmatch(rf"{ENTRY}(,{ENTRY}){{3}}( {ENTRY}(,{ENTRY}){{3}})*", self.allocation):
            raise ValueError(f"recipe {self.name!r}: allocation must be words of four BITS:SALIENT:GROUP separated by commas, one word a block")
        if self.target_bits < 0:
            raise ValueError(f"recipe {self.name!r}: target_bits is {self.target_bits}; it must be above 0, or 0 for none")
        if self.target_bits or self.allocation:
            if self.selection not in ("eigenvalue", "magnitude"):
                raise ValueError(f"recipe {self.name!r}: target_bits needs selection 'eigenvalue' or 'magnitude', not {self.selection!r}")
            for name, value in (("rotation", "learned"), ("head_rotation", "concatenated"), ("down_rotation", "hadamard")):
                if getattr(self, name) == value:
                    raise ValueError(f"recipe {self.name!r}: target_bits does not go with {name} {value!r}")

    def _refuse_distillation(self) -> None:
        """Refuse half of the settings, and rotations that are made at run time."""
        windows, epochs = self.distillation_windows, self.distillation_epochs
        if (windows > 0) != (epochs > 0):
            raise ValueError(
                f"recipe {self.name!r}: distillation_windows is {windows} and distillation_epochs {epochs}; both must be above 0, or both 0 for none"
            )
        for name, value in (("rotation", "per-layer"), ("head_rotation", "concatenated"), ("down_rotation", "hadamard")):
            if windows and getattr(self, name) == value:
                raise ValueError(f"recipe {self.name!r}: distillation does not go with {name} {value!r}, which rotates at run time")

    def site_forms(self, block: int) -> tuple[SiteForm, ...]:
        """How attn_in, attn_out, mlp_in and mlp_out of a decoder block are stored.

        Raises:
            ValueError: the allocation has no such block.
        """
        if not self.allocation:
            return tuple(SiteForm(self.bits, salient, self.group_size) for salient in self.site_salient)
        words = self.allocation.split()
        if block >= len(words):
            raise ValueError(f"recipe {self.name!r}: allocation is of {len(words)} blocks; the model has more")
        return tuple(SiteForm(*map(int, entry.split(":"))) for entry in words[block].split(","))

    @property
    def site_salient(self) -> tuple[int, int, int, int]:
        """Salient channels of attn_in, attn_out (a head), mlp_in and mlp_out, where no allocation says otherwise."""
        return self.salient, self.salient_per_head, self.salient, self.salient_down

    def _refuse_contradictions(self) -> None:
        """Refuse pairs of values that contradict each other."""
        if self.selection != "magnitude" and self.salient and self.rotation not in ("global", "per-layer"):
            raise ValueError(
                f"recipe {self.name!r}: selection by {self.selection} needs a rotation 'global' or 'per-layer'; rotation is {self.rotation!r}"
            )
        if self.selection == "magnitude" and (self.rotation, self.head_rotation) != ("none", "none"):
            raise ValueError(f"recipe {self.name!r}: selection by magnitude is made in the model's own basis: rotation and head_rotation 'none'")
        if self.scaling == "awq" and (self.rotation == "per-layer" or self.head_rotation == "concatenated"):
            raise ValueError(f"recipe {self.name!r}: scaling 'awq' is absorbed by norms and W_V, which a rotation at run time keeps from it")
        if self.act_order and self.rounding != "gptq":
            raise ValueError(f"recipe {self.name!r}: act_order is an order of GPTQ's rounding; it needs rounding 'gptq'")
        if self.refinement and self.rounding != "gptq":
            raise ValueError(f"recipe {self.name!r}: refinement is {self.refinement}; it goes over GPTQ's codes, so it needs rounding 'gptq'")
        if self.token_weights == "gradient" and (self.sink_weight > 1 or not self.needs_moments):
            raise ValueError(
                f"recipe {self.name!r}: token_weights 'gradient' needs rounding 'gptq', scaling 'awq' or a clipping, and sink_weight 1, "
                "since it weighs sinks too"
            )
        if self.sink_weight > 1 and not self.needs_moments:
            raise ValueError(f"recipe {self.name!r}: sink_weight is {self.sink_weight}; it needs rounding 'gptq', scaling 'awq' or a clipping")

    @property
    def needs_moments(self) -> bool:
        """Whether whole second moments of all sites are needed, a second pass over the calibration text."""
        return self.rounding == "gptq" or self.scaling == "awq" or self.clipping != "none" or self.head_rotation == "concatenated"

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "") -> "Recipe":
        """A recipe out of a mapping; an unknown key is an error that lists the known ones.

        Args:
            values: field names and values.
            origin: what every error begins with, such as the file's path; "" for nothing.

        Raises:
            ValueError: an unknown key, no name, or what the recipe itself refuses.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{origin or 'recipe'}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
        if "name" not in values:
            raise ValueError(f"{origin or 'recipe'}: the key 'name' is missing")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}" if origin else str(error)) from error

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with the fields that are not None changed."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with rosaq."""
    names = [entry.name for entry in resources.files("rosaq").joinpath("recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or one from a TOML file.

    Raises:
        ValueError: no such recipe or file, or a file that is no recipe.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"{path}: no such recipe file")
        try:
            text, origin = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from error
    elif name_or_path in shipped_recipes():
        text, origin = resources.files("rosaq").joinpath("recipes", f"{name_or_path}.toml").read_text(encoding="utf-8"), name_or_path
    else:
        raise ValueError(f"unknown recipe {name_or_path!r}; shipped are {', '.join(shipped_recipes())}, or give a .toml file")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{origin}: not a TOML file: {error}") from error
    return Recipe.from_dict(values, origin)
