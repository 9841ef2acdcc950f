"""Bases: principal axes out of second moments, and their exact absorption by the weights on both sides.

All functions here take a block as a dict of tensors under their names in the block (`self_attn.q_proj.weight`) and
return it changed; weights are (N outputs, K inputs), x is a row vector, y = x W^T + b. Shape letters: D hidden,
H key-value heads, E head size. Sources: ROSAQ Eq. 1, 4, 6 and App. G, arXiv:2506.13472; computational invariance of
RMSNorm under rotation as in SliceGPT, arXiv:2401.15024, but without its mean subtraction, which RMSNorm does not need.
Random bases as in QuaRot, arXiv:2404.00456.
"""

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES, Architecture
from rosaq.hadamard import hadamard_matrix, hadamard_transform, has_hadamard

Block = dict[str, torch.Tensor]


def principal_basis(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors of a second moment, largest eigenvalue first (ROSAQ Eq. 1, 4; uncentred).

    Args:
        moment: (..., D, D) symmetric, the mean of x^T x over tokens.

    Returns:
        Basis (..., D, D), float64, orthogonal, one eigenvector a column, its largest component positive, so that the
        same moment always gives the same basis; and eigenvalues (..., D), descending, not below 0.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * torch.gather(vectors, -2, largest).sign(), values


def random_bases(kind: str, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthogonal bases (count, size, size), float64, one column an axis.

    Args:
        kind: "random": uniform over all orthogonal matrices (QR of a normal matrix, signs of R's diagonal taken out).
            "hadamard": diag(random signs) H / sqrt(size); the signs come before the product, since behind it they would
            not change what is rounded. Where no Hadamard matrix of the size can be constructed, H of the power of two
            in the size, times (Kronecker) a "random" basis of the odd rest.
        count: how many.
        size: channels.
        generator: of the draws, on the CPU.
    """
    if kind == "random":
        normal = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(normal)
        return basis * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    assert kind == "hadamard"
    signs = 1 - 2 * torch.randint(2, (count, size, 1), generator=generator).double()
    power = size if has_hadamard(size) else size & -size
    hadamard = hadamard_matrix(power).double() / power**0.5
    if power == size:
        return signs * hadamard
    rest = random_bases("random", count, size // power, generator)
    return signs * torch.kron(rest.contiguous(), hadamard[None])


def fold_norms(block: Block) -> Block:
    """Move each norm's weight into the linear layers it feeds: W <- W diag(g), g <- 1. Exact."""
    folded = dict(block)
    for site, norm in SITE_NORM.items():
        gain = block[f"{NORMS[norm]}.weight"]
        for role in SITES[site]:
            name = f"{LINEARS[role]}.weight"
            folded[name] = block[name] * gain.to(block[name].dtype)
        folded[f"{NORMS[norm]}.weight"] = torch.ones_like(gain)
    return folded


def absorb_residual(block: Block, basis_DD: torch.Tensor) -> Block:
    """Put the residual stream in another orthogonal basis, h <- h R: readers get W R, writers R^T W and b R.

    The block's norms must be folded; embedding and lm_head get `W R` likewise (each row is a row of the stream).
    """
    rotated = dict(block)
    for role in ("q", "k", "v", "gate", "up"):
        name = f"{LINEARS[role]}.weight"
        rotated[name] = block[name] @ basis_DD.to(block[name])
    for role in ("o", "down"):
        name = f"{LINEARS[role]}.weight"
        rotated[name] = basis_DD.to(block[name]).T @ block[name]
        bias = f"{LINEARS[role]}.bias"
        if bias in block:
            rotated[bias] = block[bias] @ basis_DD.to(block[bias])
    return rotated


def absorb_inputs(block: Block, site: str, basis_DD: torch.Tensor) -> Block:
    """Put the inputs of one site in another basis, x <- x R, where R is applied to the activations at run time."""
    rotated = dict(block)
    for role in SITES[site]:
        name = f"{LINEARS[role]}.weight"
        rotated[name] = block[name] @ basis_DD.to(block[name])
    return rotated


def absorb_heads(block: Block, bases_HEE: torch.Tensor, architecture: Architecture) -> Block:
    """One orthogonal basis per key-value head for the attention output (ROSAQ Eq. 6), between W_V and W_O.

    The value of head h becomes v_h R_h: W_V's rows and bias are rotated; every query head of the group mixes rows of
    the same values, so its columns of W_O get R_h too.
    """
    a = architecture
    rotated = dict(block)
    v, o = f"{LINEARS['v']}.weight", f"{LINEARS['o']}.weight"
    bases = bases_HEE.to(block[v])
    rotated[v] = torch.einsum("hef,hed->hfd", bases, block[v].view(a.kv_heads, a.head_size, -1)).reshape(block[v].shape)
    bias = f"{LINEARS['v']}.bias"
    if bias in block:
        rotated[bias] = torch.einsum("hef,he->hf", bases, block[bias].view(a.kv_heads, a.head_size)).reshape(-1)
    per_query_head = bases.repeat_interleave(a.heads // a.kv_heads, 0)
    columns = block[o].view(block[o].shape[0], a.heads, a.head_size)
    rotated[o] = torch.einsum("nqe,qef->nqf", columns, per_query_head).reshape(block[o].shape)
    return rotated


def scale_feed_forward(block: Block, scale_K: torch.Tensor) -> Block:
    """Scale the inputs of W_down: W_down diag(s), and W_up's rows and bias over s (AWQ, arXiv:2306.00978; ROSAQ App. G)."""
    scaled = dict(block)
    down, up, bias = f"{LINEARS['down']}.weight", f"{LINEARS['up']}.weight", f"{LINEARS['up']}.bias"
    scaled[down] = block[down] * scale_K.to(block[down])
    scaled[up] = block[up] / scale_K.to(block[up])[:, None]
    if bias in block:
        scaled[bias] = block[bias] / scale_K.to(block[bias])
    return scaled


def rotate_down(block: Block, inverse: bool = False) -> Block:
    """Put the inputs of W_down in the Hadamard basis, x <- x H / sqrt(K), which is applied at run time (R4); or take it back."""
    name = f"{LINEARS['down']}.weight"
    return {**block, name: hadamard_transform(block[name], inverse)}


def scale_residual_inputs(block: Block, site: str, scale_D: torch.Tensor) -> Block:
    """Scale the inputs of a site behind a norm: W diag(s), and the norm's weight over s (AWQ)."""
    scaled = dict(block)
    for role in SITES[site]:
        name = f"{LINEARS[role]}.weight"
        scaled[name] = block[name] * scale_D.to(block[name])
    norm = f"{NORMS[SITE_NORM[site]]}.weight"
    scaled[norm] = block[norm] / scale_D.to(block[norm])
    return scaled


def scale_values(block: Block, scale_HE: torch.Tensor, architecture: Architecture) -> Block:
    """Scale the attention output per channel of each key-value head: W_O diag(s), and W_V's rows and bias over s (AWQ).

    The query heads of a group mix rows of the same values, so they share the head's scale.
    """
    a = architecture
    scaled = dict(block)
    v, o, bias = f"{LINEARS['v']}.weight", f"{LINEARS['o']}.weight", f"{LINEARS['v']}.bias"
    scaled[o] = block[o] * scale_HE.repeat_interleave(a.heads // a.kv_heads, 0).flatten().to(block[o])
    scaled[v] = block[v] / scale_HE.flatten().to(block[v])[:, None]
    if bias in block:
        scaled[bias] = block[bias] / scale_HE.flatten().to(block[bias])
    return scaled


def permute_feed_forward(block: Block, order_K: torch.Tensor) -> Block:
    """Reorder the channels of the feed-forward network: columns of W_down, rows and biases of W_gate and W_up."""
    permuted = dict(block)
    permuted[f"{LINEARS['down']}.weight"] = block[f"{LINEARS['down']}.weight"][:, order_K]
    for role in ("gate", "up"):
        for name in (f"{LINEARS[role]}.weight", f"{LINEARS[role]}.bias"):
            if name in block:
                permuted[name] = block[name][order_K]
    return permuted
