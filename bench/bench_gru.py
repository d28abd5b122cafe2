"""GRU and GRUCell against torch.nn: see cases.py for the grid, conftest.py for `measure`."""

from __future__ import annotations

from collections.abc import Callable

FAMILY = "GRU"


def test_gru(measure: Callable[..., None], dtype: str, case: str, mode: str) -> None:
    measure(FAMILY, dtype, case, mode)
