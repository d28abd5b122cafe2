"""Text files, plain or .gz, as lines or whole: every other reader of this package reads through these.

UTF-8 unless the caller names another encoding. Bytes that are not in it raise, with file, line and byte.
"""

from __future__ import annotations

import gzip
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

# Tables, tests (often of invalid code) and other people's packages: not the text that one would learn from.
_NOT_LIBRARY_CODE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CorpusError(ValueError):
    """A corpus that is missing, unreadable, malformed, empty or too short; it says which and where."""


def bad_line(path: str | Path, number: int, complaint: str) -> CorpusError:
    """The error of a line: `train.tsv:17: expected …`."""
    return CorpusError(f"{path}:{number}: {complaint}")


def read_lines(path: str | Path, *, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a text file, without their ends (\\n or \\r\\n, nothing else). Streams.

    Args:     path: plain, or compressed with the suffix .gz;  a byte order mark before UTF-8 is dropped
    Raises:   CorpusError: nothing at `path`, a damaged .gz, bytes outside the encoding (file, line, byte)
    """
    with _open(path) as file:
        number = 0
        while data := _guarded(path, file.readline):
            number += 1
            if number == 1 and encoding == "utf-8":
                data = data.removeprefix(_BYTE_ORDER_MARK)
            yield _decode(path, number, data, encoding).removesuffix("\n").removesuffix("\r")


def _open(path: str | Path) -> BinaryIO:
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"corpus: no file at {path}")
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _guarded(path: str | Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: not a whole .gz file: {error}") from error


def _decode(path: str | Path, number: int, data: bytes, encoding: str) -> str:
    """`data` begins with line `number` of the file."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start]
        number += before.count(b"\n")
        column = error.start - (before.rfind(b"\n") + 1) + 1
        found = f"0x{data[error.start]:02x}, byte {column} of the line"
        raise bad_line(path, number, f"not {encoding}: {found} ({error.reason})") from error


@dataclass(frozen=True)
class Text:
    """One file's contents. `name` is relative to the corpus' root: a split does not depend on the machine."""

    name: str
    text: str


def standard_library() -> list[Text]:
    """Python's own standard library: the .py files, without tests, encoding tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if not _NOT_LIBRARY_CODE & set(file.relative_to(root).parts))
    return _read(root, files)


def read_texts(path: str | Path) -> list[Text]:
    """A text file, or every one below a folder, plain or .gz; hidden, blank and binary files are passed over.

    Binary is what holds a zero byte. Line ends become \\n.

    Raises:   CorpusError: nothing at `path`, no text in it, or text that is not UTF-8 (file, line, byte)
    """
    path = Path(path)
    if path.is_file():
        texts = _read(path.parent, [path])
    elif path.is_dir():
        visible = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
        texts = _read(path, visible)
    else:
        raise CorpusError(f"corpus: no file or folder at {path}")
    if not texts:
        raise CorpusError(f"corpus: {path} holds no UTF-8 text")
    return texts


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _read(root: Path, files: Iterable[Path]) -> list[Text]:
    texts = []
    for path in sorted(files):
        if not path.is_file():
            continue
        with _open(path) as file:
            data = _guarded(path, file.read)
        if b"\0" in data:
            continue
        text = _decode(path, 1, data.removeprefix(_BYTE_ORDER_MARK), "utf-8")
        if text.strip():
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            texts.append(Text(path.relative_to(root).as_posix(), text))
    return texts
