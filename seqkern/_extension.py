"""Loads the compiled module `seqkern._C` where it fits this torch, and says why where it does not.

An extension built against one torch minor version calls into that one's C++ classes, so loading it under
another may crash. Which torch it was built for is written in the file itself, and read before it is loaded.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import mmap
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the extension uses the libraries that torch loads, libgomp included

_MARK = re.compile(rb"seqkern was built for torch=([0-9A-Za-z.+_-]+)")


def find_extension(package: Path) -> Path | None:
    """The extension in `package` that this Python would load."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = package / f"_C{suffix}"
        if path.is_file():
            return path
    return None


def built_for(extension: Path) -> str | None:
    """The torch version that an extension file was built against, read without loading it."""
    with extension.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _MARK.search(content)
        return found[1].decode() if found else None


def _minor(version: str) -> str:  # "2.13.0+cpu" -> "2.13"
    return ".".join(version.split("+")[0].split(".")[:2])


def mismatch(built: str | None, found: str) -> str | None:
    """Why an extension built for torch `built` cannot be used with torch `found`; None where it can.

    >>> mismatch("2.13.0+cpu", "2.14.1")
    'built for torch 2.13, found 2.14: reinstall seqkern'
    """
    if built is None:
        return "the extension does not say which torch it was built for: reinstall seqkern"
    if _minor(built) != _minor(found):
        return f"built for torch {_minor(built)}, found {_minor(found)}: reinstall seqkern"
    return None


def _load(package: Path, torch_version: str) -> tuple[ModuleType | None, str | None]:
    extension = find_extension(package)
    if extension is None:
        if others := sorted(path.name for path in package.glob("_C.*.so")):
            return None, f"built for another Python ({', '.join(others)}): reinstall seqkern"
        return None, "no compiled extension: no C++ compiler at the install, or SEQKERN_EXTENSION=off"
    if why_not := mismatch(built_for(extension), torch_version):
        return None, why_not
    try:
        return importlib.import_module("seqkern._C"), None
    except ImportError as error:  # a missing library or symbol: the message names it
        return None, f"the extension does not load ({error}): reinstall seqkern"


_C: Any  # the module, or None
_C, WHY_NOT = _load(Path(__file__).parent, torch.__version__)
AVAILABLE = _C is not None
