"""Calls every compiled operator with arguments that are nearly right: nothing may crash or hang.

    python tests/fuzz_operators.py [--seed N] [--count N | --minutes M] [--case N]

Right calls are recorded from the layers that make them. Then one to three of a call's arguments are changed:
shape, strides, dtype, values, numbers, lists, None; lengths out of their range are among the changes. A
call must return or raise an exception with a message; a read or write beyond a tensor shows under
AddressSanitizer, or when the process dies. Before each call its number goes to stdout, so that --case N can
repeat the last one.

What the operators leave to ops/ to check (TRUSTED) is not changed; the operators that are written in Python
(IN_PYTHON) are left to the tests of ops/.
"""

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern.ops import attention_cpu

Call = tuple[Any, tuple, dict]

# Positions, by operator and argument's name, whose values index memory and which ops/ makes itself.
TRUSTED = {
    "attention_pieces_forward": {"pieces", "mask", "key_valid", "query_valid"},
    "attention_pieces_backward": {"pieces", "mask", "key_valid", "query_valid"},
    "recurrent_mask": {"D", "H"},  # how much is made
}

IN_PYTHON = {"attention_forward": attention_cpu.forward, "attention_backward": attention_cpu.backward}


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every seqkern operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "seqkern":
            if in_python := IN_PYTHON.get(func._schema.name.split("::")[1]):
                with self:  # what it calls is compiled
                    return in_python(*args, **(kwargs or {}))
            self.calls.append((func, copied(args), copied(kwargs or {})))
        return func(*args, **(kwargs or {}))


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return copy.copy(value)


def right_calls() -> list[Call]:
    """A few calls of each operator, forward and backward, as the layers make them."""
    lengths = torch.tensor([5, 2, 4])
    recorder = Recorder()

    def record(make: Callable[[], Any], *shapes: tuple[int, ...], **options: Any) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            module = make().to(dtype)
            inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
            with recorder:
                results = module(*inputs, **options)
                flat = [results] if isinstance(results, Tensor) else list(_tensors(results))
                sum(r.float().sum() for r in flat if r.requires_grad).backward()

    x = (6, 3, 5)
    for layer in (seqkern.RNN, seqkern.LSTM, seqkern.GRU):
        record(lambda layer=layer: layer(5, 7, 2, bidirectional=True), x)
        record(lambda layer=layer: layer(5, 7), x, lengths=lengths)
        record(lambda layer=layer: layer(5, 7), (1, 1, 5))
    record(lambda: seqkern.LSTM(5, 7, proj_size=3), x)
    for name in ("PeepholeLSTM", "CIFG", "MGU", "IndRNN", "NestedLSTM", "NestedGRU", "LayerNormLSTM"):
        record(lambda name=name: getattr(seqkern, name)(5, 7), x, lengths=lengths)
    record(lambda: seqkern.SLSTM(5, 8, num_heads=2), x)
    record(lambda: seqkern.LSTM(5, 7, zoneout=0.1, weight_dropout=0.1, cell_clip=1.0), x)
    record(lambda: seqkern.MultiHeadAttention(8, 2), (6, 3, 8), (5, 3, 8), (5, 3, 8), need_weights=False)
    record(lambda: seqkern.MultiHeadAttention(8, 2), (6, 3, 8), (5, 3, 8), (5, 3, 8), lengths=lengths)
    record(lambda: seqkern.MultiHeadAttention(8, 2, dropout=0.1), *[(6, 3, 8)] * 3, is_causal=True)
    record(lambda: seqkern.AdditiveAttention(6, 6, 6), (3, 4, 6), (3, 5, 6), lengths=lengths)
    decoder = seqkern.AttentionDecoder
    for cell in ("lstm", "gru"):
        record(lambda cell=cell: Decode(decoder(5, 6, cell=cell, batch_first=True)), (3, 4, 5), (3, 5, 6))
    for dtype in (torch.float32, torch.float64):
        crf, scores = seqkern.CRF(4).to(dtype), torch.randn(5, 3, 4, dtype=dtype, requires_grad=True)
        tags = torch.randint(4, (5, 3))
        with recorder:
            crf(scores, tags, lengths=lengths).backward()
            crf.decode(scores, nbest=2)
            crf.marginals(scores.detach())
    return recorder.calls


class Decode(torch.nn.Module):
    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return self.decoder(x, self.decoder.project_keys(memory))


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# ---- changes -----------------------------------------------------------------------------------------------

NUMBERS = (-1, 0, 1, 2, 3, 17, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 62, -(1 << 63))
FLOATS = (0.0, -1.0, 0.5, 1.0, 2.0, 1e38, float("inf"), float("-inf"), float("nan"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def changed_tensor(x: Tensor, draw: random.Random) -> Tensor | None:
    """Another shape, other strides, another dtype, other values, or None."""
    kind = draw.randrange(12)
    dim = draw.randrange(x.dim()) if x.dim() else 0
    if kind == 0:
        return None
    if kind == 1 and x.dim():
        return x.narrow(dim, 0, draw.randrange(x.shape[dim] + 1))
    if kind == 2 and x.dim():
        return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim)
    if kind == 3 and x.dim() > 1:
        return x.transpose(dim, draw.randrange(x.dim()))
    if kind == 4:
        return x.unsqueeze(draw.randrange(x.dim() + 1))
    if kind == 5 and x.dim():
        return x.select(dim, 0) if x.shape[dim] else x
    if kind == 6:
        return x.to(draw.choice(DTYPES))
    if kind == 7 and x.dim():
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)  # strides of zero
    if kind == 8 and x.dim():
        return x.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]  # every second
    if kind == 9:
        value = draw.choice(FLOATS if x.is_floating_point() else NUMBERS)
        if x.dtype in (torch.int32, torch.bool, torch.uint8):
            value = int(value) % 2
        return torch.full_like(x, value)
    if kind == 10 and x.numel():
        y = x.clone().flatten()
        y[draw.randrange(len(y))] = draw.choice((-1, 2, 100) if not x.is_floating_point() else FLOATS)
        return y.view(x.shape)
    return torch.empty(0, dtype=x.dtype)


def changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, Tensor):
        return changed_tensor(value, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(NUMBERS)
    if isinstance(value, float):
        return draw.choice(FLOATS)
    if isinstance(value, str):
        return draw.choice(["lstm", "gru", "slstm", "", "no such cell", "ind_rnn_tanh", "layer_norm_gru"])
    if isinstance(value, (list, tuple)) and value:
        items, place = list(value), draw.randrange(len(value))
        kind = draw.randrange(3)
        if kind == 0:
            del items[place]
        elif kind == 1:
            items.insert(place, items[place])
        else:
            items[place] = changed(items[place], draw)
        return items
    return draw.choice([None, torch.tensor([5, 2, 4]), torch.ones(3, 5, dtype=torch.bool), torch.randn(3)])


def fuzzed(calls: list[Call], seed: int, number: int) -> tuple[Any, list, list[str]]:
    """(operator, arguments, names of those changed) of case `number`."""
    draw = random.Random(f"{seed} {number}")
    func, args, kwargs = draw.choice(calls)
    names = [argument.name for argument in func._schema.arguments]
    arguments = list(copied(args)) + [copied(kwargs[name]) for name in names[len(args) :] if name in kwargs]
    trusted = TRUSTED.get(func._schema.name.split("::")[1], set())
    free = [i for i, name in enumerate(names[: len(arguments)]) if name not in trusted]
    chosen = draw.sample(free, min(len(free), draw.choice([1, 1, 1, 2, 3])))
    for i in chosen:
        arguments[i] = changed(arguments[i], draw)
    return func, arguments, [names[i] for i in chosen]


def attempt(func: Any, arguments: list) -> str:
    """ "returned", or the exception's class; AssertionError where it has no message."""
    try:
        func(*arguments)
        return "returned"
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError) as error:
        assert str(error).strip(), f"{func}: {type(error).__name__} without a message"
        return type(error).__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    calls = right_calls()
    recorded = {func._schema.name for func, _, _ in calls}
    if options.case is not None:
        func, arguments, names = fuzzed(calls, options.seed, options.case)
        print(func, names, *(describe(a) for a in arguments), sep="\n  ")
        print(attempt(func, arguments))
        return 0
    counts: dict[str, int] = {}
    end = time.monotonic() + 60 * options.minutes
    number = 0
    while time.monotonic() < end if options.minutes else number < options.count:
        print(number, flush=True)
        func, arguments, _ = fuzzed(calls, options.seed, number)
        outcome = attempt(func, arguments)
        counts[outcome] = counts.get(outcome, 0) + 1
        number += 1
    print("operators", *sorted(recorded))
    print("outcomes", *(f"{name}={n}" for name, n in sorted(counts.items())))
    return 0


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    return repr(value)


if __name__ == "__main__":
    sys.exit(main())
