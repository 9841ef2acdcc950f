"""Hadamard matrices of the widths that models have; the fast product is the product."""

import pytest
import torch

from rosaq.hadamard import hadamard_factors, hadamard_matrix, hadamard_transform, has_hadamard

# Hidden sizes, feed-forward widths and heads of SmolLM2, Llama, Mistral, Qwen2 and Qwen3.
WIDTHS = [64, 128, 576, 896, 1536, 2048, 3584, 4096, 4864, 8192, 8960, 9728, 11008, 12288, 13824, 14336, 17408, 18944, 25600, 27648, 28672, 29568]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 40, 56, 76, 100, 108, 140, 148, 344, 576, 896, 924, 1536, 2048, 3584, 4864])
def test_orders_are_orthogonal_and_of_ones(order):
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order) and bool((matrix.abs() == 1).all())
    product = matrix.float() @ matrix.float().T  # exact: every partial sum is an integer below 2^24
    assert torch.equal(product, order * torch.eye(order))


@pytest.mark.parametrize("order", WIDTHS)
def test_widths_of_models_have_small_factors(order):
    """The factors' matrices are checked above (the largest by themselves here); their product is of the order."""
    factors = hadamard_factors(order)
    assert torch.tensor(factors).prod() == order and sum(factors) < order // 16 + 100
    for factor in factors:
        matrix = hadamard_matrix(factor).float()
        assert torch.equal(matrix @ matrix.T, factor * torch.eye(factor))


@pytest.mark.parametrize("order", WIDTHS)
def test_transform_and_inverse_of_a_models_width(order):
    x = torch.randn(3, order, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = hadamard_transform(x)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(hadamard_transform(turned, inverse=True), x, atol=1e-12)
    spike = torch.zeros(1, order, dtype=torch.float64)
    spike[0, order // 3] = 1
    assert torch.allclose(hadamard_transform(spike).abs(), torch.full_like(spike, order**-0.5))  # what it is for


@pytest.mark.parametrize("order", [16, 28, 36, 56, 344, 1536])
def test_transform_is_the_product(order):
    x = torch.randn(2, 3, order, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = hadamard_matrix(order).double() / order**0.5
    assert torch.allclose(hadamard_transform(x), x @ matrix, atol=1e-12)
    assert torch.allclose(hadamard_transform(x, inverse=True), x @ matrix.T, atol=1e-12)


def test_orders_that_cannot_be_made_are_refused():
    for order in (3, 6, 90, 92):  # 92 exists, but is not of Paley's
        assert not has_hadamard(order)
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            hadamard_matrix(order)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_keeps_the_scale_and_does_not_overflow(dtype, tolerance):
    x = torch.full((4, 14336), 8000.0).to(dtype)  # a sum of 28 of these is beyond float16
    x *= 1 - 2 * torch.randint(2, x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got, wanted = hadamard_transform(x).double(), hadamard_transform(x.double())
    assert float(wanted.abs().max()) < 65000 and float((got - wanted).norm() / wanted.norm()) < tolerance
    y = torch.randn(8, 14336, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert abs(float(hadamard_transform(y).double().norm() / y.double().norm()) - 1) < 1e-3
