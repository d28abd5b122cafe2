"""Loads the compiled module `seqkern._C` where one fits this torch, and says why where none does.

An extension built against one torch minor version calls into that one's C++ classes, so loading it under
another may crash. Which torch it was built for is written in the file itself, and read before it is loaded. A
wheel brings several, `_C_0`, `_C_1`, …, which share libseqkern_kernels.so.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import mmap
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the extension uses the libraries that torch loads, libgomp included

_MARK = re.compile(rb"seqkern was built for torch=([0-9A-Za-z.+_-]+)")
_NAME = "seqkern._C"


def find_extensions(package: Path) -> list[Path]:
    """The extensions in `package` that this Python could load, whatever torch they are for."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        name = re.compile(rf"_C(_\d+)?{re.escape(suffix)}")
        if found := sorted(path for path in package.glob(f"_C*{suffix}") if name.fullmatch(path.name)):
            return found
    return []


def built_for(extension: Path) -> str | None:
    """The torch version that an extension file was built against, read without loading it."""
    with extension.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _MARK.search(content)
        return found[1].decode() if found else None


def _minor(version: str) -> str:  # "2.13.0+cpu" -> "2.13"
    return ".".join(version.split("+")[0].split(".")[:2])


def mismatch(built: list[str], found: str) -> str | None:
    """Why no extension of those built for torches `built` can be used with torch `found`; None: one can.

    >>> mismatch(["2.12.1", "2.13.0+cpu"], "2.14.1")
    'built for torch 2.12 and 2.13, found 2.14: reinstall seqkern'
    """
    if not built:
        return "the extension does not say which torch it was built for: reinstall seqkern"
    minors = list(map(_minor, built))
    if _minor(found) not in minors:
        return f"built for torch {_and(minors)}, found {_minor(found)}: reinstall seqkern"
    return None


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _load(package: Path, torch_version: str) -> tuple[ModuleType | None, str | None]:
    torches = {path: built_for(path) for path in find_extensions(package)}
    if not torches:
        if others := sorted(path.name for path in package.glob("_C*.*.so")):
            return None, f"built for another Python ({', '.join(others)}): reinstall seqkern"
        return None, "no compiled extension: no C++ compiler at the install, or SEQKERN_EXTENSION=off"
    if why_not := mismatch([built for built in torches.values() if built], torch_version):
        return None, why_not
    path = next(p for p, built in torches.items() if built and _minor(built) == _minor(torch_version))
    try:
        return _import(path), None
    except ImportError as error:  # a missing library or symbol: the message names it
        return None, f"the extension does not load ({error}): reinstall seqkern"


def _import(path: Path) -> ModuleType:
    """As `import seqkern._C` would, from a file of another name."""
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


_C: Any  # the module, or None
_C, WHY_NOT = _load(Path(__file__).parent, torch.__version__)
AVAILABLE = _C is not None
