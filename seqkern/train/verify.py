"""python -m seqkern verify: every layer, backend and instruction set of this machine against torch.nn.

Small awkward shapes in every dtype: padded, with `lengths`, packed; outputs, states and every gradient.
A cell of the table is the worst error found, as a share of what is allowed: at most 1.00.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import seqkern
from seqkern import _extension
from seqkern.train.compare import Comparison, attention, parity, recurrent, recurrent_cell

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def layers() -> dict[str, list[Comparison]]:
    """What is compared, by the row of the table that it belongs to. A layer that lands later adds its own."""
    sizes = (7, 5, 15, 17)
    lengths = [3, 7, 1, 5, 7]
    rows: dict[str, list[Comparison]] = {}
    recurrent_layers: list[tuple[str, type[nn.RNNBase], type[nn.RNNBase], dict[str, Any]]] = [
        ("LSTM", nn.LSTM, seqkern.LSTM, {}),
        ("LSTM, proj_size", nn.LSTM, seqkern.LSTM, {"proj_size": 9}),
        ("GRU", nn.GRU, seqkern.GRU, {}),
        ("RNN, tanh", nn.RNN, seqkern.RNN, {}),
        ("RNN, relu", nn.RNN, seqkern.RNN, {"nonlinearity": "relu"}),
    ]
    for name, peer, ours, options in recurrent_layers:
        deep = {"num_layers": 2, "bidirectional": True, **options}
        rows[name] = [
            recurrent(peer, ours, sizes, **options),
            recurrent(peer, ours, sizes, **options, bias=False),
            recurrent(peer, ours, sizes, **deep),
            recurrent(peer, ours, sizes, **deep, lengths=lengths),
            recurrent(peer, ours, sizes, **deep, lengths=lengths, packed=True),
            recurrent(peer, ours, (5, 33, 31, 65), **options),
            recurrent(peer, ours, (1, 1, 64, 64), **options),
        ]
    cells: list[tuple[str, type[nn.RNNCellBase], type[nn.RNNCellBase]]] = [
        ("LSTMCell", nn.LSTMCell, seqkern.LSTMCell),
        ("GRUCell", nn.GRUCell, seqkern.GRUCell),
        ("RNNCell", nn.RNNCell, seqkern.RNNCell),
    ]
    for name, cell_peer, cell in cells:
        rows[name] = [recurrent_cell(cell_peer, cell, (B, 15, 17)) for B in (1, 5)]
    rows["MultiHeadAttention"] = [
        attention((3, 17, 17, 4, 16)),
        attention((3, 33, 17, 2, 15), need_weights=True),
        attention((4, 65, 65, 2, 40), lengths=[65, 1, 33, 20], is_causal=True),
        attention((4, 15, 65, 3, 8), lengths=[65, 1, 33, 20], need_weights=True, add_bias_kv=True),
        attention((1, 129, 129, 1, 64), is_causal=True, need_weights=True),
    ]
    return rows


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """The CPU kernels compiled for `name`; None leaves them as they are."""
    extension = _extension._C
    if name is None or extension is None:
        yield
        return
    before = extension.instruction_set()
    extension.set_instruction_set(name)
    try:
        yield
    finally:
        extension.set_instruction_set(before)


def places() -> list[tuple[str, str, str | None]]:
    """(title, backend, instruction set) of everything that can compute here."""
    report = seqkern.info()
    found: list[tuple[str, str, str | None]] = []
    for backend, why_not in report.backends.items():
        if why_not is None and backend == "cpu":
            found += [(f"cpu, {name}", backend, name) for name in report.instruction_sets]
        elif why_not is None:
            found.append((backend, backend, None))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where everything agrees, else 1."""
    parser = argparse.ArgumentParser(prog="python -m seqkern verify", description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    start = time.perf_counter()
    for backend, why_not in seqkern.info().backends.items():
        if why_not is not None:
            print(f"not checked: {backend}: {why_not}")
    print("worst error / allowed error")
    print(f"{'layer':<20}{'backend':<18}{''.join(f'{name:>10}' for name in DTYPES)}")
    failures = []
    for title, backend, isa in places():
        for layer, compared in layers().items():
            cells = []
            for dtype_name, dtype in DTYPES.items():
                worst = 0.0
                for comparison in compared:
                    with seqkern.use_backend(backend), instruction_set(isa), warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
                        result = parity(comparison, dtype)
                    worst = max(worst, result.error / result.allowed)
                    if not result.ok:
                        failures.append(f"{layer} on {title}, {dtype_name}, {comparison.case}: {result}")
                cells.append(f"{worst:>10.2f}" if worst <= 1 else f"{f'FAILED {worst:.2g}':>10}")
            print(f"{layer:<20}{title:<18}{''.join(cells)}", flush=True)
    for line in failures:
        print(f"FAILED {line}")
    verdict = f"{len(failures)} cases disagree" if failures else "everything agrees"
    print(f"{verdict} with torch.nn ({time.perf_counter() - start:.0f} s)")
    return 1 if failures else 0
