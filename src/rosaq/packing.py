"""Integer codes to dense int32 words and back.

A row of L codes of b bits is a bit stream: code i takes bits i b to i b + b - 1 of the row, counted from the lowest
bit of the first word, so 3-bit codes cross word borders. 32 codes fill exactly b words; the last words of a row are
cut to what L codes need. Shape letters: R rows, L codes, W words.
"""

import torch

RUN = 32  # codes after which the bit pattern repeats on a word border


def words_for(length: int, bits: int) -> int:
    """Number of int32 words that `length` codes of `bits` bits need."""
    return -(-length * bits // 32)


def pack(codes_RL: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (R, L) of values 0 to 2^bits - 1 into int32 words (R, ceil(L bits / 32))."""
    rows, length = codes_RL.shape
    assert int(codes_RL.min()) >= 0 and int(codes_RL.max()) < 1 << bits if codes_RL.numel() else True
    runs = -(-length // RUN)
    padded = torch.nn.functional.pad(codes_RL.to(torch.int64), (0, runs * RUN - length)).view(rows, runs, RUN)
    words = torch.zeros(rows, runs, bits, dtype=torch.int64, device=codes_RL.device)
    for i in range(RUN):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= (padded[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(rows, runs * bits)[:, : words_for(length, bits)].contiguous()


def unpack(words_RW: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes (R, length), int32, out of words (R, W) that `pack` wrote."""
    rows = words_RW.shape[0]
    mask = (1 << bits) - 1
    if 32 % bits == 0:  # no code crosses a word: one shift for all
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words_RW.device)
        return ((words_RW[..., None] >> shifts) & mask).view(rows, -1)[:, :length]
    runs = -(-length // RUN)
    words = torch.nn.functional.pad(words_RW, (0, runs * bits - words_RW.shape[1])).view(rows, runs, bits)
    codes = torch.empty(rows, runs, RUN, dtype=torch.int32, device=words_RW.device)
    for i in range(RUN):
        word, shift = divmod(i * bits, 32)
        code = words[..., word] >> shift
        if shift + bits > 32:  # `>>` copies the sign, so keep only the bits that are this code's
            low = 32 - shift
            code = (code & ((1 << low) - 1)) | (words[..., word + 1] << low)
        codes[..., i] = code & mask
    return codes.view(rows, runs * RUN)[:, :length]


def pack_zeros(zeros_NG: torch.Tensor, zero_bits: int) -> torch.Tensor:
    """Pack zero points (N, G) along the outputs: int32 words (ceil(N zero_bits / 32), G)."""
    return pack(zeros_NG.t(), zero_bits).t().contiguous()


def unpack_zeros(words_WG: torch.Tensor, zero_bits: int, outputs: int) -> torch.Tensor:
    """Zero points (outputs, G), int32, out of words that `pack_zeros` wrote."""
    return unpack(words_WG.t().contiguous(), zero_bits, outputs).t().contiguous()
