"""Model families as data: where a decoder's norms, linear layers, heads and embeddings are.

A new family is one entry of FAMILIES. All of them are pre-norm decoders with RMSNorm (weight times x / rms(x)),
rotary position embeddings on q and k, and a gated feed-forward network; that is what makes the absorptions of
`rotation.py` exact.
"""

from dataclasses import dataclass
from typing import Any

# Linear layers and norms of a decoder block, by role. The same in all families below.
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

# A site is a place where a decoder block feeds linear layers, with the roles it feeds.
SITES = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_out": ("down",)}
SITE_NORM = {"attn_in": "attn_norm", "mlp_in": "mlp_norm"}
SITE_OF = {role: site for site, roles in SITES.items() for role in roles}

EMBEDDING, FINAL_NORM, HEAD, BLOCKS = "model.embed_tokens", "model.norm", "lm_head", "model.layers"


@dataclass(frozen=True)
class Family:
    """What tells a family from the others: its names in config.json, and the optional tensors of its blocks."""

    model_type: str
    causal_lm: str  # class named in config.json's "architectures"
    optional: tuple[str, ...] = ()  # tensors of a block beside the linear weights and norms, kept as they are or rotated


_BIASES = tuple(f"{LINEARS[role]}.bias" for role in LINEARS)
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")  # per head, after q and k: no basis reaches them

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _BIASES),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", _BIASES),
        Family("qwen3", "Qwen3ForCausalLM", _BIASES + HEAD_NORMS),
    )
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model, read from its config.json (channels unless said otherwise)."""

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # embedding and lm_head are one table
    context: int  # tokens

    @classmethod
    def of(cls, config: Any, name: str = "the model") -> "Architecture":
        """Read a transformers config.

        Raises:
            ValueError: not a causal language model, or a family that is not known; lists the known ones.
        """
        family = FAMILIES.get(config.model_type)
        known = ", ".join(f"{f.model_type} ({f.causal_lm})" for f in FAMILIES.values())
        if family is None:
            raise ValueError(f"{name}: model_type {config.model_type!r} is not supported; known are {known}")
        classes = config.architectures or [family.causal_lm]
        if not isinstance(classes, list):
            raise ValueError(f"{name}: config.json's architectures is {classes!r}; it must be a list of names")
        if family.causal_lm not in classes:
            raise ValueError(f"{name}: architecture {classes[0]!r} is not a causal language model; known are {known}")
        head_size = getattr(config, "head_dim", None)
        if head_size is None:
            heads = config.num_attention_heads
            if type(heads) is not int or type(config.hidden_size) is not int or heads < 1:
                raise ValueError(
                    f"{name}: config.json has {heads!r} attention heads and {config.hidden_size!r} channels; both must be positive whole numbers"
                )
            head_size = config.hidden_size // heads
        return cls(
            family, config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, head_size, config.vocab_size, bool(config.tie_word_embeddings),
            config.max_position_embeddings,
        ).checked(name)  # fmt: skip

    def checked(self, name: str) -> "Architecture":
        """Itself, if its sizes are sizes.

        Raises:
            ValueError: a size is no positive whole number, or the heads do not form equal groups.
        """
        for size in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_size", "vocabulary", "context"):
            value = getattr(self, size)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: config.json's number for {size} is {value!r}; it must be a positive whole number")
        if self.heads % self.kv_heads:
            raise ValueError(f"{name}: {self.heads} attention heads do not form equal groups for {self.kv_heads} key-value heads")
        return self

    def shape(self, role: str) -> tuple[int, int]:
        """(outputs N, inputs K) of a block's linear layer."""
        attention, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q": (attention, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, attention),
            "gate": (self.intermediate, self.hidden), "up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate),
        }[role]  # fmt: skip

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its name within a block."""
        module, _, part = name.rpartition(".")
        for role, linear in LINEARS.items():
            if module == linear:
                return self.shape(role) if part == "weight" else self.shape(role)[:1]
        return (self.head_size,) if name in HEAD_NORMS else (self.hidden,)

    def width(self, site: str) -> int:
        """Input channels of a site."""
        return self.shape(SITES[site][0])[1]

    def norm_weights(self) -> int:
        """Weights of all norms of a block."""
        per_head = sum(name in self.family.optional for name in HEAD_NORMS)
        return 2 * self.hidden + per_head * self.head_size

    def block_prefix(self, index: int) -> str:
        """Name that the tensors of decoder block `index` begin with."""
        return f"{BLOCKS}.{index}."

    def required(self) -> list[str]:
        """Tensor names, within a block, that every block must have."""
        return [f"{name}.weight" for name in (*LINEARS.values(), *NORMS.values())]


# The shape of meta-llama/Llama-2-7b-hf, for which a recipe's bits per weight are stated where no model is at hand.
LLAMA2_7B = Architecture(FAMILIES["llama"], 4096, 11008, 32, 32, 32, 128, 32000, False, 4096)
