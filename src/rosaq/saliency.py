"""Which input channels stay precise, as an order of channels that begins with them.

In a PCA basis the eigenvalues are sorted and the salient channels are the first ones (ROSAQ Eq. 3); the other choices
of its Table 2 are there to be compared. In the model's own basis they are those of the largest mean |x| ("Mixed").
"""

import random

import torch


def spectrum_order(width: int, salient: int, selection: str, seed: int) -> torch.Tensor:
    """A permutation (width,) of channels sorted by eigenvalue, the chosen ones first (ROSAQ Table 2).

    Args:
        width: channels of the basis.
        salient: how many are chosen.
        selection: "eigenvalue", "bottom", "random" (consecutive, from a place drawn by the seed), or "top-bottom"
            (half of each end, the odd one at the top).
        seed: of the draw; the same width and seed always give the same place.
    """
    first = {
        "eigenvalue": 0,
        "bottom": width - salient,
        "random": random.Random(seed).randrange(width - salient + 1),
    }
    if selection == "top-bottom":
        top = -(-salient // 2)
        chosen = [*range(top), *range(width - (salient - top), width)]
    else:
        chosen = list(range(first[selection], first[selection] + salient))
    rest = sorted(set(range(width)) - set(chosen))
    return torch.tensor(chosen + rest)


def salient_first(magnitude_K: torch.Tensor, salient: int) -> torch.Tensor:
    """A permutation (K,): the `salient` channels of the largest magnitude, largest first, then the rest as they come."""
    leading = magnitude_K.argsort(descending=True, stable=True)[:salient]
    rest = torch.ones_like(magnitude_K, dtype=torch.bool)
    rest[leading] = False
    return torch.cat([leading, rest.nonzero().flatten()])


def salient_first_heads(magnitude_K: torch.Tensor, salient: int, heads: int, kv_heads: int) -> torch.Tensor:
    """Permutation matrices (H, E, E), one per key-value head, that put the head's salient channels first.

    The query heads of a group share the values' channels, so their magnitudes are averaged. As bases of the attention
    output they are absorbed like ROSAQ's head-wise rotation.
    """
    size = magnitude_K.numel() // heads
    pooled = magnitude_K.view(kv_heads, heads // kv_heads, size).mean(1)
    orders = torch.stack([salient_first(head, salient) for head in pooled])
    return torch.eye(size, dtype=torch.float64)[orders].transpose(1, 2)
