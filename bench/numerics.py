"""Errors in units in the last place, of every layer and its peer, at ordinary and at extreme inputs.

    python -m bench.numerics [--only LAYER …]

The peer is torch.nn's layer, or, where torch.nn has none, the eager formula, which computes 16 bits within
float32. The yardstick is the peer in float64 on the same numbers, so float64 itself has none. An element's
error is its distance from that, in units in the last place of the dtype at the exact value; values below
eps of the tensor's largest, where a sum has cancelled to nothing, are measured with the unit at that size.
Elements that the dtype cannot hold are left out; those that should be finite and are not, are counted.
Results go to bench/results/<CPU model>/numerics/ulp.json; a layer that is not run keeps its entries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import seqkern
from bench import machine, store
from seqkern.train import compare
from seqkern.train.compare import Comparison

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = (
    *("PeepholeLSTM", "CIFGLSTM", "MGU", "IndRNN", "NestedLSTM", "NestedGRU", "SLSTM"),
    *("LayerNormLSTM", "LayerNormGRU"),
)
LONG = 10_000


def layers() -> dict[str, Callable[[int], Comparison]]:
    """By name: the layer over so many steps (keys and queries, of attention)."""
    lstm: dict[str, Callable[[int], Comparison]] = {
        "LSTM": lambda T: compare.recurrent(nn.LSTM, seqkern.LSTM, (T, 3, 8, 16)),
        "LSTM, proj_size": lambda T: compare.recurrent(nn.LSTM, seqkern.LSTM, (T, 3, 8, 16), proj_size=8),
        "GRU": lambda T: compare.recurrent(nn.GRU, seqkern.GRU, (T, 3, 8, 16)),
        "RNN, tanh": lambda T: compare.recurrent(nn.RNN, seqkern.RNN, (T, 3, 8, 16)),
        "RNN, relu": lambda T: compare.recurrent(nn.RNN, seqkern.RNN, (T, 3, 8, 16), nonlinearity="relu"),
    }
    variants = {name: partial(_variant, getattr(seqkern, name)) for name in VARIANTS}
    attention = {"MultiHeadAttention": lambda T: compare.attention((2, 8, T, 2, 8))}
    return lstm | variants | attention


def _variant(layer: type[nn.Module], T: int) -> Comparison:
    return compare.variant(partial(layer, 8, 16), (T, 3, 8))


def scaled(factor: float) -> Callable[[Tensor, torch.finfo], Tensor]:
    return lambda x, _: x * factor


def wide(x: Tensor, info: torch.finfo) -> Tensor:
    """Magnitudes spread evenly in their logarithms from 1e-30 to 1e30, or as far as the dtype goes."""
    low, high = math.log(max(1e-30, info.tiny)), math.log(min(1e30, info.max / 2))
    generator = torch.Generator().manual_seed(3)
    return x.sign() * torch.exp(
        low + (high - low) * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    )


def subnormal(x: Tensor, info: torch.finfo) -> Tensor:
    return x.sign() * info.tiny * x.abs().clamp(max=5) / 6


# By name: what the inputs, drawn from a normal distribution, become; and the steps.
RANGES: dict[str, tuple[Callable[[Tensor, torch.finfo], Tensor], int]] = {
    "ordinary": (scaled(1), 12),
    "gates saturated": (scaled(100), 12),
    "1e-30 to 1e30": (wide, 12),
    "subnormal": (subnormal, 12),
    "long": (scaled(1), LONG),
}


def in_range(comparison: Comparison, range_: Callable[[Tensor, torch.finfo], Tensor]) -> Comparison:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        drawn = comparison.inputs(torch.float64)
        return tuple(range_(x, torch.finfo(dtype)).to(dtype) for x in drawn)

    return dataclasses.replace(comparison, inputs=inputs)


def ulp(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Errors of a tensor's elements that `dtype` can hold, in units in the last place: see above."""
    info = torch.finfo(dtype)
    held = exact.abs() <= info.max
    found, exact = found.double()[held], exact[held]
    if not len(exact):
        return exact
    smallest = max(info.tiny, info.eps * exact.abs().max().item())
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=smallest)))
    return (found - exact).abs() / (info.eps * torch.exp2(exponent))


def errors(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> dict[str, object]:
    """Of outputs and of gradients: the largest error, the mean one, and how many are not finite."""
    result: dict[str, object] = {}
    for what, wanted in (("output", True), ("gradient", False)):
        names = [name for name in exact if name.startswith("output") == wanted]
        every = torch.cat([ulp(found[name], exact[name], dtype).flatten() for name in names])
        finite = every[every.isfinite()]
        result[what] = {
            "max": finite.max().item() if len(finite) else None,
            "mean": finite.mean().item() if len(finite) else None,
            "elements": len(every),
            "not_finite": len(every) - len(finite),
        }
    return result


def measure(comparison: Comparison, dtype: torch.dtype) -> dict[str, object]:
    peer, ours = comparison.build(dtype)
    inputs = comparison.inputs(dtype)
    oracle, _ = comparison.build(dtype)
    exact = compare.outputs_and_gradients(
        comparison.call_peer, oracle.double(), tuple(x.double() for x in inputs)
    )
    return {
        "seqkern": errors(compare.outputs_and_gradients(comparison.call_ours, ours, inputs), exact, dtype),
        "peer": errors(compare.outputs_and_gradients(comparison.call_peer, peer, inputs), exact, dtype),
    }


def path_of(slug: str) -> pathlib.Path:
    return store.RESULTS / slug / "numerics" / "ulp.json"


def load(slug: str) -> dict[str, dict]:
    """Entries by "layer, range, dtype"."""
    path = path_of(slug)
    return json.loads(path.read_text()) if path.is_file() else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="LAYER", choices=list(layers()))
    options = parser.parse_args(argv)
    slug = str(machine.machine("cpu")["slug"])
    results, commit = load(slug), machine.commit()["commit"]
    path = path_of(slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    for layer, make in layers().items():
        if options.only and layer not in options.only:
            continue
        for name, (range_, steps) in RANGES.items():
            for dtype_name, dtype in DTYPES.items():
                comparison = in_range(make(steps), range_)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
                    entry = measure(comparison, dtype)
                entry |= {"layer": layer, "range": name, "dtype": dtype_name, "case": comparison.case}
                entry["peer_is"] = "eager" if comparison.is_wide else "torch.nn"
                entry |= {"instruction_set": seqkern.info().instruction_set, "commit": commit}
                results[f"{layer}, {name}, {dtype_name}"] = entry
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(layer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
