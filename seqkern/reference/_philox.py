"""The counter-based random numbers that every kernel draws: a function of seed and position alone."""

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


def hits(seed: Tensor, p: float, units: int, c1: Tensor, c2: Tensor, c3: Tensor, first: int = 0) -> Tensor:
    """Independent events of probability p, bool [*shape, units]; c1, c2, c3 broadcast to `shape`.

    Philox4x32-10 with the seed as key and the counter (unit >> 3, c1, c2, c3) gives four words; their eight
    16-bit halves, low half first, serve unit & 7 = 0 … 7, and the event happens where the half, as an
    unsigned number, is below round(p * 65536).

    Args:
        seed: [1] int64 on any device, which the counters share
        c1, c2, c3: int64, each in 0..2^32 - 1
        first: the first unit, a multiple of 8
    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011
    """
    groups = torch.arange(first // 8, first // 8 + (units + 7) // 8, device=seed.device)
    counter = torch.broadcast_tensors(groups, c1.unsqueeze(-1), c2.unsqueeze(-1), c3.unsqueeze(-1))
    words = philox(list(counter), seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves.flatten(-2)[..., :units] < round(p * 65536)


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Four 32-bit words, each held in int64, for four words of counter and an int64 key [1]."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of a 32-bit word and factor < 2^32, within int64."""
    low = word * (factor & 0xFFFF)  # < 2^48
    high = word * (factor >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & WORD
