"""Existing models on seqkern's layers: replace and restore in place, patch what constructs them, compile.

Our layers are subclasses of torch.nn's with the same parameters and attributes, so that a module becomes ours
by taking our class: it stays the same object, and all that refers to it, or hangs on it, stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from seqkern import nn as ours
from seqkern.nn import _recurrent

F = TypeVar("F", bound=Callable[..., Any])  # a model or a function

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: ours.RNN,
    nn.LSTM: ours.LSTM,
    nn.GRU: ours.GRU,
    nn.RNNCell: ours.RNNCell,
    nn.LSTMCell: ours.LSTMCell,
    nn.GRUCell: ours.GRUCell,
    nn.MultiheadAttention: ours.MultiHeadAttention,
    nn.TransformerEncoderLayer: ours.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: ours.TransformerDecoderLayer,
    nn.TransformerEncoder: ours.TransformerEncoder,
    nn.TransformerDecoder: ours.TransformerDecoder,
    nn.Transformer: ours.Transformer,
}

# The attribute that a replaced module has, so that copies and pickles can be restored, too.
_MARK = "_replaced_by_seqkern"


@dataclass(frozen=True)
class Report:
    """What `replace` or `restore` did; `print` it, or read its fields.

    changed:  (name of the module in the model, its class before, its class now)
    skipped:  (name, class, why it was left)
    """

    changed: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(name, before, f"-> {now}") for name, before, now in self.changed]
        rows += [(name, kind, f"left: {why}") for name, kind, why in self.skipped]
        if not rows:
            return "nothing to change"
        first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def replace(model: nn.Module) -> Report:
    """Make every torch.nn layer of `model` that seqkern has a kernel for seqkern's, in place.

    Those are RNN, LSTM, GRU and their cells, MultiheadAttention, TransformerEncoder, TransformerDecoder,
    their layers, and Transformer; and the CRF of pytorch-crf. Each stays the same object with the same
    parameters: optimizers, tied weights, parametrizations, hooks, device, dtype and training mode hold, and
    so does the state_dict. Only modules of exactly torch.nn's classes are changed, since a subclass may have
    its own forward.

    Args:     model: any module, a single layer or one wrapped by DataParallel or DDP included
    Returns:  what was changed, and what was left and why
    Raises:   TypeError: not a module

    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.LSTM(16, 32))
    >>> print(replace(model))
    1  torch.nn.LSTM  -> seqkern.LSTM
    """
    report = Report()
    for name, module in _modules(model):
        kind = _plain_class(module)
        target = _counterpart(kind)
        why = _why_not_torchs(module, kind) if target is None else _why_left(module)
        if why is not None:
            report.skipped.append((name, _name(kind), why))
        elif target is not None:
            setattr(module, _MARK, kind)
            _set_class(module, kind, target)
            report.changed.append((name, _name(kind), _name(target)))
    return report


def restore(model: nn.Module) -> Report:
    """Undo `replace`: each module that it changed has its former class again. A copy of the model will do.

    A module that has since been given what the former class lacks (a regulariser, another gate) is left.

    Returns:  what was changed, and what was left and why
    Raises:   TypeError: not a module
    """
    report = Report()
    for name, module in _modules(model):
        former = module.__dict__.get(_MARK)
        if former is None:
            continue
        now = _plain_class(module)
        if (extra := _what_torch_lacks(module)) is not None:
            report.skipped.append((name, _name(now), f"{_name(former)} has no {extra}"))
            continue
        delattr(module, _MARK)
        _set_class(module, now, former)
        report.changed.append((name, _name(now), _name(former)))
    return report


@contextmanager
def patch() -> Iterator[None]:
    """Within it, whatever constructs one of torch.nn's layers that seqkern has gets seqkern's.

    For code that builds its own model, however it imported the classes; subclasses are left alone, and so is
    every other thread. What was made stays ours afterwards. A decorator, too.

    >>> with patch():
    ...     model = torch.nn.LSTM(16, 32)
    >>> type(model)
    <class 'seqkern.nn.lstm.LSTM'>
    """
    for kind in _table():
        if "__new__" not in vars(kind):  # stays, since CPython cannot take it off a class again
            kind.__new__ = staticmethod(_new)  # type: ignore[assignment]
    token = _patched.set(True)
    try:
        yield
    finally:
        _patched.reset(token)


@overload
def compile(model: None = None, **options: Any) -> Callable[[F], F]: ...


@overload
def compile(model: F, **options: Any) -> F: ...


def compile(model: Any = None, **options: Any) -> Any:
    """torch.compile for models that have an RNN, LSTM or GRU of seqkern.

    Dynamo refuses torch.nn's RNN, LSTM and GRU, and every subclass of theirs, unless
    torch._dynamo.config.allow_rnn is on. This turns it on, for the whole process and from now on, since later
    calls may compile again. Models without these layers need nothing but torch.compile.

    Args:     model, options: torch.compile's;  without a model, a decorator
    Returns:  the compiled model or function
    """
    torch._dynamo.config.allow_rnn = True
    return torch.compile(model, **options)


_patched: ContextVar[bool] = ContextVar("seqkern.patch", default=False)


def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """A torch.nn class's __new__. Python then calls the __init__ of what it returns."""
    return object.__new__((_counterpart(cls) or cls) if _patched.get() else cls)


def _table() -> dict[type[nn.Module], type[nn.Module]]:
    """Whose modules are replaced, and by what."""
    torchcrf = sys.modules.get("torchcrf")
    return _OURS if torchcrf is None else _OURS | {torchcrf.CRF: ours.CRF}


def _counterpart(kind: type) -> type[nn.Module] | None:
    return _table().get(kind)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name or "(model)", module) for name, module in model.named_modules()]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the one that torch.nn.utils.parametrize puts before it."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _set_class(module: nn.Module, before: type[nn.Module], now: type[nn.Module]) -> None:
    kind = type(module)
    if kind is before:
        module.__class__ = now
    else:  # parametrized: the class is this module's alone
        members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, (now,), members)


def _why_left(module: nn.Module) -> str | None:
    """Why a module of torch.nn's class cannot become ours."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def _why_not_torchs(module: nn.Module, kind: type) -> str | None:
    """Why a module that looks like one of torch.nn's is not taken for one; None if it does not look so."""
    if kind in _table().values():
        return "already seqkern's"
    if isinstance(module, torch.jit.ScriptModule):
        script = getattr(module, "original_name", "")
        return "compiled by TorchScript" if any(script == t.__name__ for t in _table()) else None
    for theirs, our in _table().items():
        if isinstance(module, our):
            return "already seqkern's, by a subclass"
        if isinstance(module, theirs):
            return f"a subclass of {_name(theirs)}, whose forward may be its own"
        if kind.__name__ == theirs.__name__ and kind.__module__.startswith("torch."):
            return f"not torch.nn's, but {kind.__module__}'s"
    return None


def _what_torch_lacks(module: nn.Module) -> str | None:
    """An attribute by which one of our modules does what torch.nn's cannot."""
    checks: dict[str, Callable[[Any], bool]] = {
        **{name: lambda v: v not in (0, None, (0, 0)) for name in _recurrent.REGULARISERS},
        "reset_after": lambda v: not v,
        "update_gate": lambda v: v != "keep",
        "num_kv_heads": lambda v: v not in (None, getattr(module, "num_heads", None)),
    }
    for name, differs in checks.items():
        value = getattr(module, name, None)
        if hasattr(module, name) and differs(value):
            return f"{name}={value}"
    if isinstance(module, ours.CRF) and module._buffers.get("_allowed_start") is not None:
        return "constraints"
    return None


def _name(kind: type) -> str:
    if kind in _OURS:
        return f"torch.nn.{kind.__name__}"
    if kind in _table().values():
        return f"seqkern.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
