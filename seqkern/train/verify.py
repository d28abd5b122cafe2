"""python -m seqkern verify: every kernel of this machine against float64, and its speed beside torch.nn's.

Small awkward shapes in every dtype: padded, with `lengths`, packed; outputs, states and every gradient.
A cell of the table is the worst error found, as a share of what is allowed: at most 1.00. Allowed is twice
the error of torch.nn in that dtype, or, where torch.nn has no such layer, of the eager formula.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import seqkern
from seqkern import _extension
from seqkern.ops import _backend
from seqkern.train.compare import (
    Comparison,
    against_eager,
    attention,
    parity,
    recurrent,
    recurrent_cell,
    speed,
    variant,
)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Row(NamedTuple):
    """What is compared on one line of the table; op: its name in seqkern.ops' table of backends."""

    op: str
    comparisons: list[Comparison]


class Place(NamedTuple):
    """Something that can compute here."""

    title: str
    backend: str
    device: str
    instruction_set: str | None = None


def layers() -> dict[str, Row]:
    """By the name of the line. A layer that lands later adds its own."""
    sizes = (7, 5, 15, 17)
    lengths = [3, 7, 1, 5, 7]
    rows: dict[str, Row] = {}
    recurrent_layers: list[tuple[str, type[nn.RNNBase], type[nn.RNNBase], dict[str, Any]]] = [
        ("LSTM", nn.LSTM, seqkern.LSTM, {}),
        ("LSTM, proj_size", nn.LSTM, seqkern.LSTM, {"proj_size": 9}),
        ("GRU", nn.GRU, seqkern.GRU, {}),
        ("RNN, tanh", nn.RNN, seqkern.RNN, {}),
        ("RNN, relu", nn.RNN, seqkern.RNN, {"nonlinearity": "relu"}),
    ]
    for name, peer, ours, options in recurrent_layers:
        deep = {"num_layers": 2, "bidirectional": True, **options}
        rows[name] = Row(
            ours.__name__.lower(),
            [
                recurrent(peer, ours, sizes, **options),
                recurrent(peer, ours, sizes, **options, bias=False),
                recurrent(peer, ours, sizes, **deep),
                recurrent(peer, ours, sizes, **deep, lengths=lengths),
                recurrent(peer, ours, sizes, **deep, lengths=lengths, packed=True),
                recurrent(peer, ours, (5, 33, 31, 65), **options),
                recurrent(peer, ours, (1, 1, 64, 64), **options),
            ],
        )
    cells: list[tuple[str, type[nn.RNNCellBase], type[nn.RNNCellBase]]] = [
        ("LSTMCell", nn.LSTMCell, seqkern.LSTMCell),
        ("GRUCell", nn.GRUCell, seqkern.GRUCell),
        ("RNNCell", nn.RNNCell, seqkern.RNNCell),
    ]
    for name, cell_peer, cell in cells:
        op = name.removesuffix("Cell").lower()
        rows[name] = Row(op, [recurrent_cell(cell_peer, cell, (B, 15, 17)) for B in (1, 5)])
    for name in (
        *("PeepholeLSTM", "CIFGLSTM", "MGU", "IndRNN", "NestedLSTM", "NestedGRU", "SLSTM"),
        *("LayerNormLSTM", "LayerNormGRU"),
    ):
        layer, cell = getattr(seqkern, name), getattr(seqkern, f"{name}Cell")
        rows[name] = Row(
            "recurrent",
            [
                variant(partial(layer, 15, 17), (7, 5, 15)),
                variant(partial(layer, 15, 17, 2, bidirectional=True), (7, 5, 15), lengths=lengths),
                variant(partial(cell, 15, 17), (1, 5, 15)),
            ],
        )
    rows["MultiHeadAttention"] = Row(
        "attention",
        [
            attention((3, 17, 17, 4, 16)),
            attention((3, 33, 17, 2, 15), need_weights=True),
            attention((4, 65, 65, 2, 40), lengths=[65, 1, 33, 20], is_causal=True),
            attention((4, 15, 65, 3, 8), lengths=[65, 1, 33, 20], need_weights=True, add_bias_kv=True),
            attention((1, 129, 129, 1, 64), is_causal=True, need_weights=True),
        ],
    )
    rows["AdditiveAttention"] = Row("additive_attention", [_additive(3, 5, 9, 17), _additive(2, 1, 33, 40)])
    rows["AttentionDecoder"] = Row(
        "attention_decoder", [_decoder(cell, 3, 5, 9, 17) for cell in ("lstm", "gru")]
    )
    rows["CRF"] = Row("crf", [_crf(3, 7, 5), _crf(2, 33, 17)])
    return rows


def _additive(B: int, L: int, S: int, H: int) -> Comparison:
    lengths = torch.linspace(1, S, B).long()

    def call(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, keys = given
        return module(query, keys, lengths=lengths.to(query.device))

    make = partial(seqkern.AdditiveAttention, H, H, H)
    return against_eager(make, [(B, L, H), (B, S, H)], f"B {B}, L {L}, S {S}, H {H}", call)


def _decoder(cell: str, B: int, T: int, S: int, H: int) -> Comparison:
    lengths = torch.linspace(1, S, B).long()

    def call(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, memory = given
        y, _, context, weights = module(x, module.project_keys(memory, lengths=lengths.to(x.device)))
        return y, context, weights

    def make() -> nn.Module:
        return seqkern.AttentionDecoder(11, H, cell=cell, batch_first=True)

    return against_eager(make, [(B, T, 11), (B, S, H)], f"{cell}, B {B}, T {T}, S {S}, H {H}", call)


def _crf(B: int, T: int, K: int) -> Comparison:
    lengths = torch.linspace(1, T, B).long()
    tags = torch.arange(B * T).reshape(B, T) % K

    def call(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (emissions,) = given
        there = lengths.to(emissions.device)
        score = module(emissions, tags.to(emissions.device), lengths=there, reduction="none")
        return score, module.log_partition(emissions, lengths=there)

    return against_eager(partial(seqkern.CRF, K, batch_first=True), [(B, T, K)], f"B {B}, T {T}, K {K}", call)


def timed() -> dict[str, tuple[Comparison, bool]]:
    """What the speed is taken of, by the name of the line; True: with backward."""
    lengths = torch.linspace(8, 64, 32).long().tolist()
    size = (64, 32, 128, 256)
    rows: dict[str, Comparison] = {
        "LSTM": recurrent(nn.LSTM, seqkern.LSTM, size),
        "LSTM, padded": recurrent(nn.LSTM, seqkern.LSTM, size, lengths=lengths, bidirectional=True),
        "GRU": recurrent(nn.GRU, seqkern.GRU, size),
        "RNN": recurrent(nn.RNN, seqkern.RNN, size),
        "LSTM, one step": recurrent(nn.LSTM, seqkern.LSTM, (1, 1, 128, 256)),
        "LSTMCell": recurrent_cell(nn.LSTMCell, seqkern.LSTMCell, (32, 128, 256)),
        "MultiHeadAttention": attention((8, 128, 128, 8, 32)),
        "MultiHeadAttention, padded": attention((8, 256, 256, 8, 32), lengths=[32 * k for k in range(1, 9)]),
    }
    only_forward = {"LSTM, one step"}
    return {
        f"{name}{', training' if training else ''}": (comparison, training)
        for name, comparison in rows.items()
        for training in (False, True)
        if not (training and name in only_forward)
    }


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


def places() -> list[Place]:
    """Everything that can compute here."""
    report = seqkern.info()
    found: list[Place] = []
    for backend, why_not in report.backends.items():
        if why_not is not None:
            continue
        if backend == "cpu":
            found += [Place(f"cpu, {name}", backend, "cpu", name) for name in report.instruction_sets]
        else:
            found.append(Place(backend, backend, "cpu" if backend == "eager" else "cuda"))
    return found


def check(row: str, place: Place, dtype: str, comparisons: Sequence[Comparison]) -> tuple[float, list[str]]:
    """The worst error as a share of what is allowed, and a line for each case that is beyond it."""
    worst, failures = 0.0, []
    for comparison in comparisons:
        with (
            seqkern.use_backend(place.backend),
            instruction_set(place.instruction_set),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
            result = parity(comparison, DTYPES[dtype], device=place.device)
        worst = max(worst, result.error / result.allowed)
        if not result.ok:
            failures.append(f"{row} on {place.title}, {dtype}, {comparison.case}: {result}")
    return worst, failures


def print_parity() -> list[str]:
    """The table of errors; returns a line for each case that disagrees."""
    print("worst error / allowed error")
    print(f"{'layer':<20}{'backend':<18}{''.join(f'{name:>10}' for name in DTYPES)}")
    failures = []
    rows = layers()
    for place in places():
        for name, row in rows.items():
            cells = []
            for dtype in DTYPES:
                if _backend.refusal(place.backend, row.op, place.device, DTYPES[dtype]) is not None:
                    cells.append(f"{'–':>10}")
                    continue
                worst, found = check(name, place, dtype, row.comparisons)
                failures += found
                cells.append(f"{worst:>10.2f}" if worst <= 1 else f"{f'FAILED {worst:.2g}':>10}")
            if any("–" not in cell for cell in cells):
                print(f"{name:<20}{place.title:<18}{''.join(cells)}", flush=True)
    return failures


def print_speed(seconds: float) -> None:
    """The table of times, float32, torch.nn and seqkern in turn."""
    devices = ["cpu"] if _extension.AVAILABLE else []
    if seqkern.info().backends["cuda"] is None:
        devices.append("cuda")
    if not devices:
        print("speed: not measured: no kernels here")
        return
    show: Callable[[float], str] = lambda t: f"{1000 * t:.3g} ms"  # noqa: E731
    print(f"{'speed, float32':<40}{'device':<8}{'torch.nn':>12}{'seqkern':>12}{'ratio':>8}   case")
    for device in devices:
        for name, (comparison, training) in timed().items():
            found = speed(comparison, training=training, seconds=seconds, device=device)
            print(
                f"{name:<40}{device:<8}{show(found.peer):>12}{show(found.ours):>12}{found.ratio:>8.2f}"
                f"   {comparison.case}",
                flush=True,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where everything agrees, else 1. Times do not count."""
    parser = argparse.ArgumentParser(prog="python -m seqkern verify", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.7,
        help="for each time taken (default %(default)s); 0 takes none and checks the numbers only",
    )
    options = parser.parse_args(argv)
    start = time.perf_counter()
    for backend, why_not in seqkern.info().backends.items():
        if why_not is not None:
            print(f"not checked: {backend}: {why_not}")
    failures = print_parity()
    if options.seconds > 0:
        print()
        print_speed(options.seconds)
    for line in failures:
        print(f"FAILED {line}")
    verdict = f"{len(failures)} cases disagree" if failures else "everything agrees"
    print(f"{verdict} with torch.nn and float64 ({time.perf_counter() - start:.0f} s)")
    return 1 if failures else 0
