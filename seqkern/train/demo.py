"""python -m seqkern demo: one language model, trained on torch.nn.LSTM and on seqkern.LSTM side by side.

Both start from the same parameters and read the same batches; they take turns in blocks of steps, so that
whatever slows the machine down slows both. Afterwards: a table of every layer's parity and speed.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

import seqkern
from seqkern.text import CharCorpus, CorpusError, Windows, read_texts, standard_library
from seqkern.train.char_lm import CharLM, bits_per_character, sample
from seqkern.train.compare import Comparison, parity, recurrent, speed
from seqkern.train.log import new_figure
from seqkern.train.progress import Progress
from seqkern.train.tbptt import TruncatedBPTT

# Round-off grows from step to step as in any chaotic system; over the first steps it has not had the time to.
_EARLY_STEPS = 50
_EARLY_LIMIT = 1e-3  # bits per character


@dataclass(frozen=True)
class Settings:
    """What is trained and for how long. The defaults keep the demo under three minutes on two cores."""

    steps: int = 1000
    seconds: float = (
        100.0  # a limit for the training of both; a slow machine stops early, at the same step for both
    )
    block: int = 10
    B: int = 32
    T: int = 64
    embed_dim: int = 64
    hidden_size: int = 256
    num_layers: int = 1
    learning_rate: float = 5e-3
    clip: float = 1.0
    min_share: float = 1e-5  # a character rarer than this in the training files is unknown
    characters: int | None = None  # None: the whole corpus
    held_out_characters: int = 8192  # of each held-out file
    sample_characters: int = 400
    table_seconds: float = 0.6  # per measurement


QUICK = Settings(
    steps=12,
    block=3,
    B=8,
    T=16,
    embed_dim=16,
    hidden_size=32,
    characters=60_000,
    held_out_characters=256,
    sample_characters=40,
    table_seconds=0.0,
)


def comparisons(quick: bool = False) -> list[Comparison]:
    """The rows of the closing table. A layer that lands later (attention, with its masks) adds its own."""
    sizes = (6, 3, 17, 17) if quick else (64, 32, 256, 256)
    T, B, *_ = sizes
    ragged = [T - (T - max(T // 8, 1)) * b // (B - 1) for b in range(B)]
    twins = [(nn.LSTM, seqkern.LSTM), (nn.GRU, seqkern.GRU), (nn.RNN, seqkern.RNN)]
    return [
        recurrent(peer, ours, sizes, lengths=lengths) for peer, ours in twins for lengths in (None, ragged)
    ]


@dataclass
class Run:
    """One of the two models, its trainer, and what was recorded of it."""

    name: str
    model: CharLM
    trainer: TruncatedBPTT
    losses: list[float] = field(default_factory=list)  # bits per character, one per step
    times: list[float] = field(default_factory=list)  # seconds, one per step
    held_out: float = math.nan

    @property
    def step_time(self) -> float:
        return statistics.median(self.times)


def make_run(name: str, layer: type[nn.RNNBase], vocab_size: int, settings: Settings, seed: int) -> Run:
    torch.manual_seed(seed)
    model = CharLM(
        vocab_size,
        embed_dim=settings.embed_dim,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        layer=layer,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=max(settings.steps, 2),
        pct_start=0.05,
        cycle_momentum=False,
    )
    return Run(name, model, TruncatedBPTT(model, optimizer, clip=settings.clip, scheduler=scheduler))


def train_in_turn(runs: Sequence[Run], windows: Windows, settings: Settings) -> None:
    """The same steps for every run, block by block, each run first in its turn; records losses and times."""
    start = time.perf_counter()
    with Progress("training", settings.steps) as progress:
        for block, first in enumerate(range(0, settings.steps, settings.block)):
            if block and time.perf_counter() - start > settings.seconds:
                break
            count = min(settings.block, settings.steps - first)
            for run in runs if block % 2 == 0 else reversed(runs):
                before = time.perf_counter()
                for loss in run.trainer.train(windows, count, start=first):
                    now = time.perf_counter()
                    run.losses.append(loss)
                    run.times.append(now - before)
                    before = now
            note = ", ".join(
                f"{run.name} {run.losses[-1]:.2f} bits {run.step_time * 1e3:.0f} ms" for run in runs
            )
            progress.update(first + count, note)
    done = len(runs[0].losses)
    if done < settings.steps:
        print(f"stopped after {done} of {settings.steps} steps: {settings.seconds:g} s are over")


def plot_losses(runs: Sequence[Run], path: Path) -> None:
    """A PNG of the loss curves, and of their difference below.

    Raises:   ImportError: matplotlib is not installed
    """
    peer, ours = runs
    figure = new_figure(figsize=(8, 6))
    curves, difference = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curves.plot(peer.losses, label=peer.name, color="tab:orange", linewidth=4, alpha=0.6)
    curves.plot(ours.losses, label=ours.name, color="tab:blue", linewidth=1)
    curves.set_ylabel("training loss, bits per character")
    ratio = peer.step_time / ours.step_time
    curves.set_title(f"One model, trained twice: {ours.name} at {ratio:.2f}× the speed of {peer.name}")
    curves.legend()
    curves.grid(alpha=0.3)
    difference.semilogy(
        [abs(a - b) + 1e-9 for a, b in zip(peer.losses, ours.losses, strict=True)], color="tab:gray"
    )
    difference.set_ylabel("difference")
    difference.set_xlabel("step")
    difference.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def print_table(rows: Sequence[Comparison], seconds: float) -> bool:
    """Parity in float32, then speed, for each comparison. True: all agree."""
    header = (
        f"{'layer':<6}{'parity':<8}{'error':>9}{'allowed':>9}   {'forward':<30}{'forward + backward':<30}case"
    )
    print(f"Parity with torch.nn, and speed (float32; torch.nn → seqkern, times faster)\n{header}")
    failed = []
    for row in rows:
        result = parity(row)
        if not result.ok:
            failed.append(f"{row.layer}, {row.case}: {result}")
        times = []
        for training in (False, True):
            s = speed(row, training=training, seconds=seconds, min_rounds=5 if seconds else 1)
            times.append(f"{s.peer * 1e3:.2f} → {s.ours * 1e3:.2f} ms, {s.ratio:.2f}×".ljust(30))
        verdict = "ok" if result.ok else "FAILED"
        numbers = f"{result.error:>9.1e}{result.allowed:>9.1e}"
        print(f"{row.layer:<6}{verdict:<8}{numbers}   {''.join(times)}{row.case}", flush=True)
    for line in failed:
        print(f"FAILED {line}")
    return not failed


def load_corpus(path: Path | None, settings: Settings) -> tuple[CharCorpus, str]:
    """The corpus as ids, and a line that describes it."""
    texts = standard_library() if path is None else read_texts(path)
    where = "Python's standard library" if path is None else str(path)
    if not texts:
        raise CorpusError("corpus: this Python's standard library comes without .py files; name a --corpus")
    corpus = CharCorpus.from_texts(texts, min_share=settings.min_share, max_characters=settings.characters)
    line = (
        f"{where}: {len(corpus.train):,} characters to learn from, "
        f"{sum(map(len, corpus.held_out)):,} held out ({len(corpus.held_out)} of {len(texts)} files), "
        f"{len(corpus.vocabulary)} symbols"
    )
    return corpus, line


def report_training(runs: Sequence[Run]) -> bool:
    """Prints how the two trainings compare. True: they agree where round-off has not had the time to grow."""
    peer, ours = runs
    differences = [abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True)]
    early = max(differences[:_EARLY_STEPS])
    last = min(_EARLY_STEPS, len(differences))
    print(f"{'':<22}{'first loss':>12}{f'last {last} steps':>16}{'held-out files':>16}{'step time':>12}")
    for run in runs:
        final = statistics.fmean(run.losses[-last:])
        bits = f"{run.losses[0]:>12.3f}{final:>16.3f}{run.held_out:>16.3f}"
        print(f"{run.name:<22}{bits}{run.step_time * 1e3:>9.1f} ms")
    print(
        f"losses in bits per character; the curves differ by at most {max(differences):.1e}, "
        f"{early:.1e} in the first {last} steps (training amplifies round-off)"
    )
    print(f"training on {ours.name} runs at {peer.step_time / ours.step_time:.2f}× the speed of {peer.name}")
    if not early <= _EARLY_LIMIT:
        print(f"FAILED the first {last} losses should agree within {_EARLY_LIMIT:g} bits")
    return early <= _EARLY_LIMIT


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where seqkern disagrees with torch.nn. Wrong arguments end the program with 2."""
    parser = argparse.ArgumentParser(prog="python -m seqkern demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--corpus", type=Path, metavar="PATH", help="a text file or folder (Python's own library)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="where the PNG goes (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=_at_least_one, help=f"training steps of each model ({Settings.steps})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the parameters and of the sampled text (%(default)s)"
    )
    parser.add_argument("--prompt", default="def ", help="what the sampled text begins with (%(default)r)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model: does it run at all?"
    )
    args = parser.parse_args(argv)
    if not args.prompt:
        parser.error("--prompt: expected at least one character")
    settings = QUICK if args.quick else Settings()
    if args.steps is not None:
        settings = replace(settings, steps=args.steps, seconds=math.inf)
    start = time.perf_counter()
    try:
        corpus, line = load_corpus(args.corpus, settings)
        windows = Windows(corpus.train, settings.B, settings.T)
    except CorpusError as error:
        parser.error(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {args.out}: {error.strerror}")

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the corpus may hold what the terminal cannot show
    print(f"seqkern {seqkern.__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    report = seqkern.info()
    ready = [name for name, why_not in report.backends.items() if why_not is None]
    print(f"backends: {', '.join(ready)}; instruction set: {report.instruction_set or 'no compiled kernels'}")
    print(line)
    runs = [
        make_run("torch.nn.LSTM", nn.LSTM, len(corpus.vocabulary), settings, args.seed),
        make_run("seqkern.LSTM", seqkern.LSTM, len(corpus.vocabulary), settings, args.seed),
    ]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(
        f"a model of {parameters:,} parameters (H {settings.hidden_size}, {settings.num_layers} layer), "
        f"batches of {settings.B} × {settings.T} characters\n"
    )
    train_in_turn(runs, windows, settings)
    for run in runs:
        run.held_out = bits_per_character(
            run.model,
            corpus.held_out,
            B=settings.B,
            T=settings.T,
            max_characters=settings.held_out_characters,
        )
    print()
    curves_agree = report_training(runs)

    picture = args.out / "losses.png"
    try:
        plot_losses(runs, picture)
        print(f"loss curves: {picture}")
    except ImportError:
        print("loss curves: not drawn, matplotlib is not installed (pip install matplotlib)")

    prompt = corpus.vocabulary.encode(args.prompt)
    generator = torch.Generator().manual_seed(args.seed)
    text = sample(runs[1].model, prompt, settings.sample_characters, temperature=0.6, generator=generator)
    print("\nThe model on seqkern.LSTM writes:\n")
    print("\n".join(f"    {line.rstrip()[:100]}" for line in corpus.vocabulary.decode(text).splitlines()))
    print()
    layers_agree = print_table(comparisons(args.quick), settings.table_seconds)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0 if curves_agree and layers_agree else 1


def _at_least_one(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {n}")
    return n
