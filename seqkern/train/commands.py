"""python -m seqkern train | evaluate | predict | translate | generate | attention | tsne."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import seqkern
from seqkern.text import CorpusError, Vocabulary
from seqkern.train import checkpoint, distributed
from seqkern.train.checkpoint import CheckpointError
from seqkern.train.config import Training, describe, with_options
from seqkern.train.distributed import World, join, was_restarted
from seqkern.train.log import Log, finite
from seqkern.train.plots import attention_heatmap, tsne
from seqkern.train.recipes import RECIPES, Recipe, restore
from seqkern.train.trainer import Result, Trainer

BACKENDS = ("eager", "cpu", "cuda", "triton")


# ---- train -------------------------------------------------------------------------------------------


def train(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    named = next((argument for argument in argv if argument in RECIPES), None)
    recipes = "\n".join(f"  {name:<14} {entry.help}" for name, entry in RECIPES.items())
    options = f"options of {named} (key=value):\n{describe(RECIPES[named].config())}" if named else ""
    parser = argparse.ArgumentParser(
        prog="python -m seqkern train",
        description="Train a reference model. Several processes: torchrun … -m seqkern train …",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=options or f"recipes (train RECIPE --help lists a recipe's options):\n{recipes}",
    )
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE", help="what to train")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the recipe")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="a folder or file (default: a corpus at hand)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints, log, curves (runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as seed=N")
    parser.add_argument("--compare", choices=["torch"], help="then train the same model on torch.nn's layers")
    _add_machine(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        seed = [] if args.seed is None else [f"seed={args.seed}"]
        config = with_options(RECIPES[args.recipe].config(), [*args.options, *seed])
    except ValueError as error:
        parser.error(str(error))
    if config.fsdp and "RANK" not in os.environ:
        parser.error("fsdp: expected to run under torchrun: torchrun --nproc-per-node=N -m seqkern train …")
    out = args.out or Path("runs") / args.recipe
    with join(args.device) as world, _backend(args):
        try:
            _train(args, config, out, world)
        except (CorpusError, CheckpointError, ImportError) as error:
            parser.error(str(error))
    return 0


def _train(args: argparse.Namespace, config: Training, out: Path, world: World) -> None:
    recipe = RECIPES[args.recipe].make(config)
    recipe.read(args.data)
    recipe.make()
    twin = None
    if args.compare:
        # A recipe's data are read once; model and what a loss carries are each one's own.
        twin = copy.copy(recipe)
        twin.make(torch.nn)
        twin.model.load_state_dict(recipe.model.state_dict())
    if world.leads:
        size = sum(p.numel() for p in recipe.model.parameters())
        processes = f", {world.size} processes" if world.size > 1 else ""
        print(f"{args.recipe}: {size:,} parameters, on {world.device}{processes}; in {out}", flush=True)
    result, figures = _fit(recipe, out, world, args)
    if world.leads:
        print(json.dumps(finite({"recipe": args.recipe, "seconds": result.seconds, **figures})))
    if twin is not None:
        peer, peer_figures = _fit(twin, out / "torch", world, args, is_twin=True)
        if world.leads:
            _report_comparison(recipe.metric, (result, figures), (peer, peer_figures), Log(out / "log.jsonl"))


def _fit(
    recipe: Recipe, out: Path, world: World, args: argparse.Namespace, *, is_twin: bool = False
) -> tuple[Result, dict[str, float]]:
    """Trains, and judges the best model as well as it can be.

    Of a run with --resume, the twin may not have begun.
    """
    label = f"{recipe.name} on torch.nn" if is_twin else recipe.name
    resume = args.resume
    if was_restarted(world) or (resume and is_twin):
        found = (out / "last.pt").exists() or distributed.newest_sharded(out / "last") is not None
        resume = world.gather(found)[0]
    trainer = Trainer(recipe, recipe.config, out=out, world=world, label=label)
    result = trainer.fit(resume=resume)
    figures = result.figures
    if world.leads:
        with torch.no_grad():
            figures = recipe.figures(recipe.model, recipe.valid, final=True)
        trainer.log.write("final", **figures)
    return result, figures


def _report_comparison(
    metric: str, ours: tuple[Result, dict[str, float]], theirs: tuple[Result, dict[str, float]], log: Log
) -> None:
    """Both results and the ratio of their times, as a table and into the log."""
    (result, figures), (peer, peer_figures) = ours, theirs
    ratio = result.targets_per_second / peer.targets_per_second
    print(f"{'':<10}{metric:>12}{'updates':>10}{'seconds':>10}{'targets/s':>12}")
    for name, run, shown in (("torch.nn", peer, peer_figures), ("seqkern", result, figures)):
        rate = f"{run.targets_per_second:,.0f}"
        print(f"{name:<10}{shown[metric]:>12.4f}{run.steps:>10}{run.seconds:>10.1f}{rate:>12}")
    print(f"training on seqkern runs at {ratio:.2f}× the speed of torch.nn")
    log.write(
        "comparison",
        ratio=ratio,
        seqkern={"seconds": result.seconds, "targets_per_second": result.targets_per_second, **figures},
        torch={"seconds": peer.seconds, "targets_per_second": peer.targets_per_second, **peer_figures},
    )


# ---- use a checkpoint ----------------------------------------------------------------------------------


def evaluate(argv: Sequence[str] | None = None) -> int:
    parser = _parser("evaluate", "Judge a checkpoint; prints one JSON object.")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="a folder as for train, or a file"
    )
    parser.add_argument(
        "--split", choices=["valid", "test"], help="of a folder (test if it has one, else valid)"
    )

    def run(recipe: Recipe, args: argparse.Namespace) -> None:
        split = args.split
        try:
            examples = recipe.read_split(args.data, split or "test")
        except CorpusError:
            if split is not None or args.data.is_file():
                raise
            split = "valid"
            examples = recipe.read_split(args.data, split)
        split = "file" if args.data.is_file() else split or "test"
        figures = recipe.figures(recipe.model, examples, final=True)
        print(json.dumps(finite({"recipe": recipe.name, "split": split, **figures})))

    return _use(parser, run, argv)


def predict(argv: Sequence[str] | None = None) -> int:
    parser = _parser("predict", "What a model says of texts: a line for each.")
    _add_texts(parser)

    def run(recipe: Recipe, args: argparse.Namespace) -> None:
        texts = _texts(args.texts)
        for first in range(0, len(texts), 256):
            for line in recipe.predict(recipe.model, texts[first : first + 256]):
                print(line, flush=True)

    return _use(parser, run, argv)


def generate(argv: Sequence[str] | None = None) -> int:
    parser = _parser("generate", "Let a language model write on.")
    _add_texts(parser)
    parser.add_argument("--length", type=int, default=200, help="tokens to write (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: likelier text (%(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this share")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")

    def run(recipe: Recipe, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        for prompt in _texts(args.texts):
            print(recipe.generate(recipe.model, prompt, args.length, generator, **sampling), flush=True)

    return _use(parser, run, argv)


def attention(argv: Sequence[str] | None = None) -> int:
    parser = _parser("attention", "Draw where a model with attention looks in a text.")
    parser.add_argument("text", help="what the model reads")
    parser.add_argument(
        "--out", type=Path, default=Path("attention.png"), metavar="PNG", help="(%(default)s)"
    )

    def run(recipe: Recipe, args: argparse.Namespace) -> None:
        attention_heatmap(*recipe.attention(recipe.model, args.text), args.out)
        print(args.out)

    return _use(parser, run, argv)


def draw_tsne(argv: Sequence[str] | None = None) -> int:
    parser = _parser("tsne", "Draw a model's word vectors in two dimensions.")
    parser.add_argument("--words", type=int, default=300, metavar="N", help="the most frequent (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("tsne.png"), metavar="PNG", help="(%(default)s)")

    def run(recipe: Recipe, args: argparse.Namespace) -> None:
        vocabulary, embedding = recipe.vocabularies["tokens"], getattr(recipe.model, "embedding", None)
        if not isinstance(vocabulary, Vocabulary) or not isinstance(embedding, nn.Embedding):
            raise ValueError(f"tsne: a {recipe.name} checkpoint has no vectors of whole tokens")
        first = len(vocabulary.specials)
        words = vocabulary.tokens[first : first + args.words]
        tsne(embedding.weight[first : first + len(words)], words, args.out)
        print(args.out)

    return _use(parser, run, argv)


# ---- shared --------------------------------------------------------------------------------------------


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help="of seqkern's layers (default: the fastest)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")


def _backend(args: argparse.Namespace) -> Any:
    return seqkern.use_backend(args.backend) if args.backend else nullcontext()


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m seqkern {command}", description=description)
    parser.add_argument("checkpoint", type=Path, help="best.pt, or the folder that it is in")
    _add_machine(parser)
    return parser


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="default: the lines of the standard input")


def _texts(arguments: Iterable[str]) -> list[str]:
    return list(arguments) or [line.rstrip("\n") for line in sys.stdin]


def _use(
    parser: argparse.ArgumentParser,
    run: Callable[[Recipe, argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Runs a command on a checkpoint's recipe; what the user got wrong ends the program with 2."""
    args = parser.parse_args(argv)
    path = args.checkpoint / "best.pt" if args.checkpoint.is_dir() else args.checkpoint
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _backend(args), torch.no_grad():
        try:
            recipe = restore(checkpoint.load(path))
            recipe.model.to(device)
            run(recipe, args)
        except (ValueError, ImportError) as error:
            parser.error(str(error))
    return 0
