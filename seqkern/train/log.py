"""What a run leaves behind to look at: a JSON object per line, and the curves drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Log:
    """Appends events to a file, each a JSON object on a line of its own; None keeps them nowhere.

    A run that was killed and resumed repeats the steps after its last checkpoint: of equal steps, the last
    line counts (`read`).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **values: Any) -> None:
        if self._path is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite({"event": event, **values})) + "\n")


def finite(value: Any) -> Any:
    """The value with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log; of equal events at equal steps, the last. A line cut short is left out."""
    events: dict[Any, dict[str, Any]] = {}
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = (event["event"], event.get("step", ("line", i)))
        events.pop(key, None)
        events[key] = event
    return list(events.values())


def draw(log: Path, picture: Path) -> None:
    """The training loss, and below it the validation's figures, over the updates, as a PNG.

    Raises:   ImportError: matplotlib is not installed
    """
    events = read(log)
    steps = [e for e in events if e["event"] == "step"]
    evaluations = [e for e in events if e["event"] == "evaluation"]
    names = [k for k, v in (evaluations or [{}])[0].items() if k not in _NO_FIGURE and not isinstance(v, str)]
    figure = new_figure(figsize=(8, 3 + 2 * len(names)))
    axes = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot([e["step"] for e in steps], [_number(e["loss"]) for e in steps])
    axes[0].set_ylabel("training loss")
    for axis, name in zip(axes[1:], names, strict=True):
        axis.plot(
            [e["step"] for e in evaluations], [_number(e.get(name)) for e in evaluations], marker="o", ms=3
        )
        axis.set_ylabel(name)
    axes[-1].set_xlabel("updates")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


_NO_FIGURE = ("event", "step", "epoch", "seconds", "best")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that needs no display.

    Raises:   ImportError: matplotlib is not installed
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'seqkern[plot]'") from error
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure
