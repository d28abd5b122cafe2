"""A second process that keeps one core busy: a layer on a machine that it shares."""

from __future__ import annotations

import subprocess
import sys
import time
from types import TracebackType

from bench.machine import available_cores

# Pinned to the last core that we may use; ends with its parent, or after ten minutes.
SPIN = """
import os, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
parent, end = os.getppid(), time.monotonic() + 600
print("spinning", flush=True)
while os.getppid() == parent and time.monotonic() < end:
    for _ in range(1_000_000):
        pass
"""


class Neighbour:
    """Context manager: one core is busy inside."""

    def __enter__(self) -> Neighbour:
        self.process = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def possible(threads: int) -> bool:
    """The question makes sense when the layer uses every core, the neighbour's included."""
    return 2 <= available_cores() <= threads
