"""Hadamard matrices by construction, and the fast product with one.

A Hadamard matrix of order n has entries +1 and -1 and H H^T = n I. Orders come from Sylvester's doubling and Paley's
two constructions over finite fields (Paley, 1933); no table is stored. Every width of the known models whose
factors allow it is covered: see `tests/test_hadamard.py`.
"""

import itertools
from functools import lru_cache

import torch

LARGEST_FACTOR = 32  # powers of two are cut into factors up to this: a product with each is small, and there are few


def hadamard_matrix(order: int) -> torch.Tensor:
    """A Hadamard matrix (order, order), int8, entries +1 and -1: the Kronecker product of `hadamard_factors`.

    Raises:
        ValueError: none of that order can be constructed.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in hadamard_factors(order):
        matrix = torch.kron(matrix, _factor_matrix(factor))
    return matrix


@lru_cache
def hadamard_factors(order: int) -> tuple[int, ...]:
    """Orders whose matrices' Kronecker product is the Hadamard matrix of this order.

    The first is the smallest order of Paley's that leaves a power of two (none where the order is one itself), the
    others are powers of two up to LARGEST_FACTOR.

    Raises:
        ValueError: no Hadamard matrix of the order can be constructed this way.
    """
    power = order & -order
    base = order // power
    while base > 1 and _paley_field(base) is None:
        if power == 1:
            raise ValueError(f"no Hadamard matrix of order {order} can be constructed by Sylvester's and Paley's methods")
        base, power = 2 * base, power // 2
    factors = [base] if base > 1 else []
    while power > 1:
        factors.append(min(power, LARGEST_FACTOR))
        power //= factors[-1]
    return tuple(factors)


def has_hadamard(order: int) -> bool:
    """Whether `hadamard_matrix` can construct this order."""
    try:
        hadamard_factors(order)
    except ValueError:
        return False
    return True


def hadamard_transform(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The product x H / sqrt(K), or with its inverse, x H^T / sqrt(K), for x (..., K); in the type of x.

    One small product per factor: K sum(factors) multiplications instead of K^2.
    """
    shape, width = x.shape, x.shape[-1]
    for factor in hadamard_factors(width):
        matrix = _device_matrix(factor, x.device, x.dtype)
        # Scaled before the product, so that float16 cannot overflow, and not in the matrix, whose entries stay exact.
        columns = (x * factor**-0.5).reshape(*shape[:-1], factor, width // factor).transpose(-1, -2)
        x = columns @ (matrix.T if inverse else matrix)  # the axis of this factor is now the last one
    return x.reshape(shape)


@lru_cache
def _device_matrix(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):
        return _factor_matrix(order).to(device, dtype)


def _factor_matrix(order: int) -> torch.Tensor:
    """Sylvester's matrix of a power of two, Paley's of another order; int8."""
    if order & (order - 1) == 0:
        ones = torch.arange(order)
        parity = sum(((ones[:, None] & ones) >> bit) & 1 for bit in range(order.bit_length()))
        return (1 - 2 * (torch.as_tensor(parity) % 2)).to(torch.int8)
    field = _paley_field(order)
    assert field is not None
    prime, degree = field
    size = prime**degree
    jacobsthal = _quadratic_characters(prime, degree)
    # S is the Jacobsthal matrix with a border of ones: skew where q = 3 mod 4, symmetric where q = 1 mod 4.
    bordered = torch.zeros(size + 1, size + 1, dtype=torch.int8)
    bordered[1:, 1:], bordered[0, 1:] = jacobsthal, 1
    bordered[1:, 0] = -1 if size % 4 == 3 else 1
    unit = torch.eye(size + 1, dtype=torch.int8)
    if size % 4 == 3:
        return bordered + unit
    return torch.kron(bordered, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)) + torch.kron(
        unit, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    )


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, n) of the field of p^n elements that gives this order: order - 1 = 3 mod 4, or order / 2 - 1 = 1 mod 4."""
    if order % 4:
        return None
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        field = _prime_power(size)
        if size % 4 == remainder and field is not None:
            return field
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """(p, n) with p prime, p^n = size and n at most 3, or None."""
    if size < 2:
        return None
    prime = next((p for p in range(2, int(size**0.5) + 1) if size % p == 0), size)
    degree = next((n for n in (1, 2, 3) if prime**n == size), None)
    return None if degree is None else (prime, degree)


def _quadratic_characters(prime: int, degree: int) -> torch.Tensor:
    """The Jacobsthal matrix of the field of p^n elements: chi(a - b), 1 for squares, -1 for the others, 0 at 0; int8.

    An element is a polynomial of degree below n over the integers mod p, modulo an irreducible one; of degree 2 and 3
    a polynomial is irreducible where it has no root.
    """
    elements = torch.tensor(list(itertools.product(range(prime), repeat=degree)))  # (q, n), lowest power first
    weights = prime ** torch.arange(degree)
    modulus = next(
        low for low in elements if degree == 1 or all(int((low * x ** torch.arange(degree)).sum() + x**degree) % prime for x in range(prime))
    )
    squares = torch.zeros(len(elements), 2 * degree - 1, dtype=torch.int64)
    for i, j in itertools.product(range(degree), repeat=2):
        squares[:, i + j] += elements[:, i] * elements[:, j]
    for power in range(2 * degree - 2, degree - 1, -1):  # x^n = -modulus(x)
        squares[:, power - degree : power] -= squares[:, power : power + 1] * modulus
    chi = torch.full((len(elements),), -1, dtype=torch.int8)
    chi[(squares[:, :degree] % prime * weights).sum(1)] = 1
    chi[0] = 0
    differences = (elements[:, None] - elements) % prime
    return chi[(differences * weights).sum(-1)]
