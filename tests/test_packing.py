"""Codes to words and back, on shapes that no word divides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosaq.packing import pack, pack_zeros, unpack, unpack_zeros, words_for


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 9), length=st.integers(1, 131), seed=st.integers(0, 99))
def test_round_trip(bits, rows, length, seed):
    codes = torch.randint(1 << bits, (rows, length), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, words_for(length, bits)) == (rows, -(-length * bits // 32))
    assert torch.equal(unpack(words, bits, length), codes.int())


def test_bits_lie_where_the_format_says():
    # code i of a row takes bits 3 i to 3 i + 2 of the row's bit stream, lowest bit of the first word first
    codes = torch.arange(64).remainder(8).view(1, 64)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(6)]
    assert [word & 0xFFFFFFFF for word in pack(codes, 3)[0].tolist()] == words
    four = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]])
    assert pack(four, 4)[0].tolist() == [0xF7654321 - (1 << 32)]


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 576])
def test_zero_points_share_words_along_outputs(outputs):
    zeros = torch.randint(16, (outputs, 5), generator=torch.Generator().manual_seed(outputs))
    words = pack_zeros(zeros, 4)
    assert words.shape == (-(-outputs // 8), 5)
    assert torch.equal(unpack_zeros(words, 4, outputs), zeros.int())


def test_codes_out_of_range_are_our_own_mistake():
    with pytest.raises(AssertionError):
        pack(torch.tensor([[8]]), 3)
