"""Two thousand optimiser steps of three models on both libraries' layers: do the losses go the same way?

    python -m bench.training [--seeds 3] [--steps 2000]

A seed draws the parameters and the batches, the same for both. Rounding differs from the first step on, and
training magnifies it, so curves of one seed part; they are held to the spread of the seeds. A curve is the
mean loss of every 50 steps. In every window the two libraries' means over the seeds may differ by the smaller
of the two spreads, largest minus smallest of the seeds. Data: the source of Python's standard library; a
window of it is read as a language, or told from which of eight modules it is. Results go to
bench/results/<CPU model>/numerics/training.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern.nn
from bench import machine, store
from seqkern.models import GRUClassifier, RNNLanguageModel, TransformerClassifier
from seqkern.text import standard_library

WINDOW = 50
B, T = 32, 48
CHARACTERS = 128  # those of ASCII; another is read as 0
MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "inspect", "pickle", "tarfile")


def _language_model(layers: ModuleType) -> nn.Module:
    return RNNLanguageModel(CHARACTERS, 64, 128, cell="lstm", logits=True, layers=layers)


def _classifier(layers: ModuleType) -> nn.Module:
    return GRUClassifier(CHARACTERS, 32, 64, len(MODULES), dropout=0.0, layer_dropout=0.0, layers=layers)


def _transformer(layers: ModuleType) -> nn.Module:
    return TransformerClassifier(2, 64, 4, 128, CHARACTERS, len(MODULES), dropout=0.0, layers=layers)


def _language_loss(model: nn.Module, ids: Tensor, module: Tensor) -> Tensor:
    scores, _ = model(ids[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


def _class_loss(model: nn.Module, ids: Tensor, module: Tensor) -> Tensor:
    lengths = 8 + (ids[:, :8].sum(1) % (T - 8))  # as different as the texts
    return F.cross_entropy(model(ids, lengths), module)


MODELS: dict[str, tuple[Callable[[ModuleType], nn.Module], Callable[..., Tensor]]] = {
    "LSTM language model": (_language_model, _language_loss),
    "GRU classifier, padded": (_classifier, _class_loss),
    "Transformer classifier, padded": (_transformer, _class_loss),
}


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [B, T], module [B]) without end."""
    texts = {text.name: text.text for text in standard_library()}
    ids = [
        torch.tensor([ord(c) if ord(c) < CHARACTERS else 0 for c in texts[f"{name}.py"]]) for name in MODULES
    ]
    generator = torch.Generator().manual_seed(seed)
    while True:
        module = torch.randint(len(MODULES), (B,), generator=generator)
        places = torch.rand(B, generator=generator)
        rows = []
        for m, place in zip(module.tolist(), places.tolist(), strict=True):
            first = int(place * (len(ids[m]) - T))
            rows.append(ids[m][first : first + T])
        yield torch.stack(rows), module


def curve(name: str, layers: ModuleType, seed: int, steps: int) -> list[float]:
    """The mean loss of every WINDOW steps."""
    make, loss_of = MODELS[name]
    torch.manual_seed(seed)
    model = make(layers)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses, windows = [], []
    for step, batch in zip(range(1, steps + 1), batches(seed), strict=False):
        loss = loss_of(model, *batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % WINDOW == 0:
            windows.append(statistics.mean(losses[-WINDOW:]))
    return windows


def spread(curves: list[list[float]]) -> list[float]:
    return [max(at) - min(at) for at in zip(*curves, strict=True)]


def summary(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, float]:
    """The window where the means are furthest apart, in spreads; the last losses; the largest relative
    difference of the first window, seed by seed, where rounding is all."""
    means = [[statistics.mean(at) for at in zip(*curves, strict=True)] for curves in (ours, theirs)]
    allowed = [min(both) for both in zip(spread(ours), spread(theirs), strict=True)]
    apart = [abs(a - b) / s for a, b, s in zip(*means, allowed, strict=True)]
    first = [abs(a[0] - b[0]) / b[0] for a, b in zip(ours, theirs, strict=True)]
    return {
        "worst": max(apart),
        "windows_beyond": sum(a > 1 for a in apart),
        "windows": len(apart),
        "last_seqkern": means[0][-1],
        "last_torch": means[1][-1],
        "last_spread": spread(theirs)[-1],
        "first_window": max(first),
    }


def path_of(slug: str) -> pathlib.Path:
    return store.RESULTS / slug / "numerics" / "training.json"


def load(slug: str) -> dict[str, dict]:
    path = path_of(slug)
    return json.loads(path.read_text()) if path.is_file() else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args(argv)
    slug = str(machine.machine("cpu")["slug"])
    results = {}
    for name in MODELS:
        curves = {
            side: [curve(name, layers, seed, options.steps) for seed in range(options.seeds)]
            for side, layers in (("seqkern", seqkern.nn), ("torch", torch.nn))
        }
        results[name] = {
            "steps": options.steps,
            "commit": machine.commit()["commit"],
            "summary": summary(curves["seqkern"], curves["torch"]),
            "curves": {side: [[round(x, 6) for x in c] for c in cs] for side, cs in curves.items()},
        }
        print(name, json.dumps(results[name]["summary"]), flush=True)
    path = path_of(slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
