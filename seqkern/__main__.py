"""python -m seqkern info | plan | verify | demo | train | evaluate | predict | …"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module


def print_info(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m seqkern info", description=COMMANDS["info"][1]).parse_args(argv)
    from seqkern.info import info

    print(info())
    return 0


def print_plan(argv: list[str]) -> int:
    return import_module("seqkern.plan").main(argv)


def in_train(name: str, function: str = "main") -> Callable[[list[str]], int]:
    """Training code is loaded only by the command that needs it."""
    return lambda argv: getattr(import_module(f"seqkern.train.{name}"), function)(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "info": (print_info, "list backends, instruction sets, torch, Triton, CUDA, and what is missing and why"),
    "plan": (print_plan, "say which CUDA kernel a recurrent layer takes, and why, with or without a GPU"),
    "verify": (in_train("verify"), "compare every layer with torch.nn and float64 on this machine"),
    "demo": (in_train("demo"), "train a character model on torch.nn and on seqkern, side by side"),
    "train": (in_train("commands", "train"), "train a reference model on your data or a corpus at hand"),
    "evaluate": (in_train("commands", "evaluate"), "judge a trained model; prints JSON"),
    "predict": (in_train("commands", "predict"), "label, tag or translate texts"),
    "translate": (in_train("commands", "predict"), "the same as predict"),
    "generate": (in_train("commands", "generate"), "let a trained language model write"),
    "attention": (in_train("commands", "attention"), "draw where a trained model's attention looks"),
    "tsne": (in_train("commands", "draw_tsne"), "draw a trained model's word vectors"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqkern",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try --help after the command")
    options = parser.parse_args(argv)
    return COMMANDS[options.command][0](options.arguments)


if __name__ == "__main__":
    sys.exit(main())
