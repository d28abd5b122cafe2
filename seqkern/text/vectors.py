"""Pretrained word vectors in the text formats of GloVe, word2vec and fastText; neighbours and analogies."""

from __future__ import annotations

import re
from array import array
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.text.files import CorpusError, bad_line, read_lines
from seqkern.text.vocabulary import Vocabulary


class WordVectors:
    """Tokens and their vectors.

    WordVectors.load("glove.6B.100d.txt.gz", vocabulary) reads only the vocabulary's;
    WordVectors(vocabulary.tokens, model.embedding.weight) takes those of a trained model.

    Args:     tokens: V different ones;  vectors: [V, E] floating
    Raises:   ValueError: a token twice, or another number of vectors than of tokens
    """

    def __init__(self, tokens: Iterable[str], vectors: Tensor) -> None:
        self.tokens = list(tokens)
        self.vectors = vectors.detach()
        if vectors.dim() != 2 or len(vectors) != len(self.tokens):
            raise ValueError(f"vectors: expected [{len(self.tokens)}, E], got {list(vectors.shape)}")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            raise ValueError(f"tokens: expected each once, got {len(self.tokens) - len(self._ids)} repeated")

    @classmethod
    def load(cls, path: str | Path, only: Container[str] | None = None) -> WordVectors:
        """Lines `token number … number`, plain or .gz, with or without a first line `V E`. Streams.

        A token may hold spaces (GloVe 840B has some); of one that comes twice the first vector counts.

        Args:     only: a Vocabulary, or a set: other tokens' numbers are not even looked at
        Returns:  float32 vectors
        Raises:   CorpusError: file and line: another number of columns, or what is no number; a file that
                  holds fewer or more vectors than its first line says, or none
        """
        seen: dict[str, None] = {}
        numbers = array("f")
        promised = size = None
        count = 0
        for number, line in enumerate(read_lines(path), 1):
            line = line.rstrip(" ")
            spaces = line.count(" ")
            if number == 1 and re.fullmatch(r"\d+ \d+", line):
                promised, size = map(int, line.split())
                continue
            if size is None:
                size = spaces
            if spaces < size or size < 1:
                expected = f"a token and {size} numbers" if size else "a token and numbers"
                raise bad_line(path, number, f"expected {expected}, got {spaces + 1} columns")
            count += 1
            token = line.partition(" ")[0] if spaces == size else line.rsplit(" ", size)[0]
            if token in seen or (only is not None and token not in only):
                continue
            try:
                numbers.extend(map(float, line.rsplit(" ", size)[1:]))
            except ValueError as error:
                raise bad_line(path, number, str(error)) from error
            seen[token] = None
        if not count:
            raise CorpusError(f"corpus: no vectors in {path}")
        if promised not in (None, count):
            raise CorpusError(f"{path}: expected {promised} vectors, as its first line says, got {count}")
        vectors = torch.frombuffer(numbers, dtype=torch.float32).clone() if numbers else torch.empty(0)
        return cls(seen, vectors.view(len(seen), size))

    def save(self, path: str | Path) -> None:
        """Writes word2vec's text format, which gensim reads, too: a line `V E`, then `token number … number`.

        ValueError: a token with white space, which the format cannot hold.
        """
        for token in self.tokens:
            if not token or token.split() != [token]:
                raise ValueError(f"tokens: expected none with white space, got {token!r}")
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            file.write(f"{len(self)} {self.vectors.size(1)}\n")
            for token, row in zip(self.tokens, self.vectors.tolist(), strict=True):
                file.write(f"{token} {' '.join(f'{x:.9g}' for x in row)}\n")

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def __getitem__(self, token: str) -> Tensor:
        """[E]. ValueError: an unknown token"""
        if token not in self._ids:
            raise ValueError(f"token {token!r} has no vector among the {len(self)}")
        return self.vectors[self._ids[token]]

    def embedding(
        self,
        vocabulary: Vocabulary,
        *,
        freeze: bool = True,
        padding_idx: int | None = None,
        generator: torch.Generator | None = None,
    ) -> nn.Embedding:
        """An embedding of the vocabulary, from torch.nn.Embedding.from_pretrained.

        A token without a vector gets normal random numbers of the vectors' mean and deviation, so that it is
        no outlier; `padding_idx` gets zeros.
        """
        E = self.vectors.size(1)
        known = [(i, self._ids[token]) for i, token in enumerate(vocabulary.tokens) if token in self._ids]
        mean, deviation = self.vectors.mean().item(), self.vectors.std(correction=0).item()
        weight = torch.empty(len(vocabulary), E, dtype=self.vectors.dtype)
        weight.normal_(mean, deviation, generator=generator)
        if known:
            ours, theirs = torch.tensor(known).t()
            weight[ours] = self.vectors[theirs].to(weight)
        if padding_idx is not None:
            weight[padding_idx] = 0
        return nn.Embedding.from_pretrained(weight, freeze=freeze, padding_idx=padding_idx)

    def nearest(self, query: str | Tensor, k: int = 10) -> list[tuple[str, float]]:
        """The k tokens whose vectors have the largest cosine with the query's, and the cosine; best first.

        Args:     query: a token, which is not among its neighbours, or a vector [E]
        """
        if isinstance(query, str):
            return self._nearest(self[query], k, {query})
        return self._nearest(query, k, set())

    def analogy(
        self, positive: Sequence[str], negative: Sequence[str] = (), k: int = 1
    ) -> list[tuple[str, float]]:
        """The k tokens nearest to Σ positive − Σ negative, of vectors of length 1; none of the given ones.

        king − man + woman: analogy(["king", "woman"], ["man"]) → [("queen", 0.77)]

        Source: Mikolov, Yih and Zweig 2013, "Linguistic regularities in continuous space word
        representations"
        """
        query = torch.zeros(self.vectors.size(1), dtype=self.vectors.dtype, device=self.vectors.device)
        for sign, tokens in ((1, positive), (-1, negative)):
            for token in tokens:
                query += sign * F.normalize(self[token], dim=0)
        return self._nearest(query, k, {*positive, *negative})

    def _nearest(self, query: Tensor, k: int, without: set[str]) -> list[tuple[str, float]]:
        cosines = F.cosine_similarity(self.vectors, query.to(self.vectors), dim=1)
        cosines[[self._ids[token] for token in without]] = -torch.inf
        best = cosines.topk(min(k, len(self) - len(without)))
        return [(self.tokens[i], cosines[i].item()) for i in best.indices.tolist()]
