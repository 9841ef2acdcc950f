"""Orders of channels that begin with the salient ones."""

import pytest
import torch

from rosaq.saliency import salient_first, spectrum_order


@pytest.mark.parametrize(("selection", "chosen"), [("eigenvalue", [0, 1, 2]), ("bottom", [7, 8, 9]), ("top-bottom", [0, 1, 9])])
def test_spectrum_orders_by_hand(selection, chosen):
    order = spectrum_order(10, 3, selection, 0).tolist()
    assert order[:3] == chosen and order[3:] == sorted(set(range(10)) - set(chosen))


def test_random_channels_are_consecutive_and_seeded():
    orders = [spectrum_order(100, 10, "random", seed).tolist() for seed in range(20)]
    for order in orders:
        assert order[:10] == list(range(order[0], order[0] + 10)) and sorted(order) == list(range(100))
    assert len({order[0] for order in orders}) > 10
    assert orders[3] == spectrum_order(100, 10, "random", 3).tolist()


@pytest.mark.parametrize("selection", ["eigenvalue", "bottom", "random", "top-bottom"])
def test_no_salient_channel_is_no_choice(selection):
    assert spectrum_order(8, 0, selection, 5).tolist() == list(range(8))


def test_salient_first_by_hand():
    assert salient_first(torch.tensor([1.0, 5.0, 2.0, 9.0]), 2).tolist() == [3, 1, 0, 2]
