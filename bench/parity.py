"""The gate before every number: seqkern's outputs and gradients are as right as torch.nn's.

The referee is torch.nn on the same values in a wider type: float64 for float32, float32 for the 16-bit
types (its own error, 2^-24, vanishes beside theirs; on a GPU float64 too, since float32 may be TF32 there).
A tensor passes when

    max|seqkern - referee|  <=  2 * max|torch.nn - referee| + FLOOR_ULPS * eps * max|referee|

Where a run has no time for the full shape (--benchmark-quick, plain checks) the gate keeps B, I, H and
layers and cuts T (Case.scaled); a full measurement always gates the full shape.
"""

from __future__ import annotations

import dataclasses

import torch

FLOOR_ULPS = 4  # as in tests/compare.py, which asks torch.nn again where this says no
REFEREE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def referee(dtype: torch.dtype, device: str) -> torch.dtype:
    return torch.float64 if device == "cuda" else REFEREE[dtype]


@dataclasses.dataclass(frozen=True)
class Parity:
    """The tensor that came closest to its bound. error / bound <= 1 passes."""

    worst: str
    error: float
    torch_error: float
    bound: float
    steps: int  # T of the gate

    def to_json(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        return {
            key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in fields.items()
        }


class ParityError(AssertionError):
    pass


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def compare(
    got: dict[str, torch.Tensor],
    peer: dict[str, torch.Tensor],
    referee: dict[str, torch.Tensor],
    dtype: torch.dtype,
    steps: int,
    where: str,
) -> Parity:
    """Every tensor of `got` (name -> tensor) against the referee, with torch.nn's error as the yardstick.

    Raises: ParityError naming each tensor out of bounds, its worst index, got, expected, error and bound.
    """
    if got.keys() != referee.keys():
        raise ParityError(f"{where}: has {sorted(got)}, expected {sorted(referee)}")
    eps = torch.finfo(dtype).eps
    worst, failures = Parity("", 0.0, 0.0, 1.0, steps), []
    for name, expected in referee.items():
        ours = got[name]
        if ours.shape != expected.shape or ours.dtype != dtype:
            failures.append(
                f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {dtype} {tuple(expected.shape)}"
            )
            continue
        difference = (ours.to(expected.dtype) - expected).abs()
        error = largest(difference)
        torch_error = largest(peer[name].to(expected.dtype) - expected)
        bound = 2 * torch_error + FLOOR_ULPS * eps * largest(expected)
        if not error <= bound:  # a NaN fails here
            index = torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), difference.shape)
            index = tuple(int(i) for i in index)
            failures.append(
                f"{name}{list(index)}: got {float(ours[index])!r}, expected {float(expected[index])!r}, "
                f"error {error:.3g} > {bound:.3g} (torch.nn's own {torch_error:.3g})"
            )
        elif bound > 0 and error / bound >= worst.error / worst.bound:
            worst = Parity(name, error, torch_error, bound, steps)
    if failures:
        raise ParityError(
            f"{where}: {len(failures)} of {len(referee)} tensors differ\n  " + "\n  ".join(failures)
        )
    return worst
