"""A recipe's options: a frozen dataclass whose fields are typed and documented, set by `key=value`."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

C = TypeVar("C", bound="Training")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its line of documentation."""
    return dataclasses.field(default=default, metadata={"help": help})


def changed(key: str, default: Any) -> Any:
    """The field `key` of Training with another default."""
    return option(default, Training.__dataclass_fields__[key].metadata["help"])


Schedule = Literal["constant", "plateau", "cosine", "inverse-sqrt"]


@dataclass(frozen=True)
class Training:
    """How any recipe is trained. A recipe's own config adds its model's and data's options to these."""

    seed: int = option(0, "of the parameters, the batches' order and dropout")
    epochs: int = option(10, "passes over the training data")
    minutes: float = option(
        math.inf, "stop after this time, evaluation included; cosine decay ends with it, too"
    )
    batch: int = option(64, "examples, or rows, in a batch of all processes together")
    accumulate: int = option(1, "batches for each update of the parameters")
    optimizer: Literal["adam", "adamw", "sgd"] = option(
        "adam", "adam, adamw (weight decay apart from the gradient) or sgd"
    )
    lr: float = option(1e-3, "learning rate")
    beta2: float = option(0.999, "adam's second moment decay")
    momentum: float = option(0.0, "sgd's momentum")
    weight_decay: float = option(0.0, "of weight matrices; biases, norms and vectors have none")
    clip: float = option(1.0, "largest norm of the gradient (inf: not clipped)")
    schedule: Schedule = option(
        "constant", "of the learning rate, after the warm-up: constant, plateau, cosine or inverse-sqrt"
    )
    warmup: int = option(0, "updates over which the learning rate grows linearly, at most a fifth of all")
    plateau_factor: float = option(0.5, "by which schedule=plateau multiplies the learning rate")
    plateau_patience: int = option(2, "evaluations without improvement before that")
    patience: int = option(0, "evaluations without improvement before training stops (0: never)")
    label_smoothing: float = option(0.0, "share of the target spread over all classes")
    average: float = option(0.0, "decay of an average of the parameters, which is then evaluated (0: none)")
    orthogonal: bool = option(False, "orthogonal initial weights of the recurrences")
    amp: Literal["off", "bf16", "fp16"] = option("off", "automatic mixed precision")
    fsdp: bool = option(
        False, "under torchrun, shard parameters and optimizer (FSDP2) instead of copying (DDP)"
    )
    evaluate_every: int = option(0, "updates from one evaluation to the next (0: an epoch)")
    save_every: int = option(0, "updates from one checkpoint to the next, beside those of evaluations")
    log_every: int = option(50, "updates from one line of the log to the next")

    def __post_init__(self) -> None:
        for key, least in {
            "epochs": 1,
            "batch": 1,
            "accumulate": 1,
            "warmup": 0,
            "patience": 0,
            "evaluate_every": 0,
            "save_every": 0,
            "log_every": 1,
            "weight_decay": 0,
        }.items():
            if not getattr(self, key) >= least:
                raise ValueError(f"{key}: expected at least {least}, got {getattr(self, key)}")
        for key in ("lr", "clip", "minutes"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: expected a number above 0, got {getattr(self, key)}")
        for key in ("label_smoothing", "average", "momentum", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: expected a number from 0 to below 1, got {getattr(self, key)}")


def with_options(config: C, assignments: Sequence[str]) -> C:
    """`config` with each "key=value" of `assignments` set, the value read by the field's type.

    Raises:   ValueError: no "=", an unknown key (the message lists those known), or a value of another type
    """
    types = typing.get_type_hints(type(config))
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"options: expected key=value, got {assignment!r}")
        if key not in types:
            known = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config))
            raise ValueError(f"options: no key {key!r}; known, with their values: {known}")
        changes[key] = _parse(key, text, types[key])
    return dataclasses.replace(config, **changes)


def _parse(key: str, text: str, type_: Any) -> Any:
    if typing.get_origin(type_) is Literal:
        choices = typing.get_args(type_)
        if text not in choices:
            raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {text!r}")
        return text
    if type_ is bool:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"{key}: expected true or false, got {text!r}")
        return words[text.lower()]
    try:
        return type_(text)
    except ValueError:
        raise ValueError(f"{key}: expected {type_.__name__}, got {text!r}") from None


def describe(config: Training) -> str:
    """A line for each option: key=default and what it means."""
    rows = [
        (f"{f.name}={getattr(config, f.name)}", f.metadata.get("help", ""))
        for f in dataclasses.fields(config)
    ]
    return "\n".join(f"  {assignment:<28} {help}" for assignment, help in rows)


def from_state(type_: type[C], state: dict[str, Any]) -> C:
    """A config from a checkpoint's dict.

    Raises:   ValueError: keys that the config does not have, or that it has and the dict has not
    """
    names = {f.name for f in dataclasses.fields(type_)}
    if names != state.keys():
        odd = ", ".join(sorted(names ^ state.keys()))
        raise ValueError(
            f"config: the checkpoint is of another version of this recipe; the keys differ in {odd}"
        )
    return type_(**state)
