"""Small made-up source files, the corpus of the tests of seqkern.text and seqkern.train."""

import random
from pathlib import Path

from seqkern.text import Text


def some_texts(n: int = 40) -> list[Text]:
    rng = random.Random(0)
    words = ["def", "return", "self", "x", "=", "(", ")", "for", "in", "not", "\n"]
    return [Text(f"package/file{i}.py", " ".join(rng.choices(words, k=200))) for i in range(n)]


def write_some_texts(root: Path) -> Path:
    for text in some_texts():
        file = root / text.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.text)
    return root
