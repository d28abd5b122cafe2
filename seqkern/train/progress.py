"""A progress bar without dependencies: one line redrawn on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import TextIO


class Progress:
    """
    with Progress("training", total=600) as progress:
        progress.update(10, "2.31 bits")
    """

    def __init__(self, label: str, total: int, *, stream: TextIO | None = None, width: int = 16) -> None:
        self.label = label
        self.total = total
        self.width = width
        self._stream = sys.stdout if stream is None else stream
        self._redraws = self._stream.isatty()
        self._tenths = 0
        self._drawn = 0

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of `total` are done."""
        line = f"{self.label} {done}/{self.total}  {note}".rstrip()
        if self._redraws:
            full = self.width * done // self.total
            line = f"[{'#' * full}{'.' * (self.width - full)}] {line}"
            line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be redrawn
            self._stream.write("\r" + line.ljust(self._drawn))
            self._drawn = len(line)
        elif done * 10 // self.total > self._tenths:
            self._tenths = done * 10 // self.total
            self._stream.write(line + "\n")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redraws and self._drawn:
            self._stream.write("\n")
            self._stream.flush()
