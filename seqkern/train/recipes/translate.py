"""Translation: parallel files (train.de, train.en, val.de, …, or these in a folder raw), or pairs by tabs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models import (
    AttnDecoder,
    AttnEncoder,
    AttnScore,
    AttnSeq2Seq,
    TranslationGRU,
    TranslationTransformer,
    scheduled_sampling,
)
from seqkern.text import BytePairEncoding, CorpusError, Pair, collate_pairs, read_pairs, read_parallel, toy
from seqkern.train.batches import ExampleBatches, to_device
from seqkern.train.config import Schedule, Training, changed, option
from seqkern.train.metrics import bleu
from seqkern.train.recipes._recipe import PAD, Recipe, bucketed, by_length, device_of, find, found

SPECIALS = ("<unk>", "<pad>", "<sos>", "<eos>")
SOS, EOS = 2, 3


@dataclass(frozen=True)
class TranslateConfig(Training):
    model: Literal["gru", "lstm", "transformer"] = option(
        "gru", "gru (additive attention), lstm (attention, scheduled sampling) or transformer"
    )
    source: str = option("de", "ending of the source files")
    target: str = option("en", "ending of the target files")
    swap: bool = option(False, "of pairs by tabs, the second column is the source")
    epochs: int = changed("epochs", 15)
    batch: int = option(64, "pairs in a batch of all processes together")
    schedule: Schedule = changed("schedule", "cosine")
    warmup: int = changed("warmup", 1000)
    beta2: float = changed("beta2", 0.98)
    label_smoothing: float = changed("label_smoothing", 0.1)
    average: float = changed("average", 0.998)
    lowercase: bool = option(True, "read and write lower case")
    units: int = option(8000, "byte-pair units of both languages together")
    embed_dim: int = option(256, "size of the units' vectors; the Transformer's d_model")
    hidden_size: int = option(512, "of the recurrent decoder; of the Transformer's inner layer")
    num_layers: int = option(3, "of the Transformer's encoder and decoder each; lstm has 2 at most")
    num_heads: int = option(4, "the Transformer's")
    dropout: float = option(0.3, "everywhere")
    teacher_forcing: float = option(
        0.5, "lstm: least share of the target's own words as inputs, reached linearly"
    )
    beam_width: int = option(
        5, "of the final evaluation and of translate; while training the search is greedy"
    )
    length_penalty: float = option(1.0, "score = log p / length ** this")
    max_len: int = option(80, "longest output in units; longer training pairs lose their ends")


class Translate(Recipe):
    name = "translate"
    metric = "bleu"

    def read(self, path: Path | None) -> None:
        c = self.config
        if path is None:
            pairs = toy.translations()
            train, valid = pairs[200:], pairs[:200]
        elif (file := _pairs_file(path)) is not None:
            pairs = self._read_pairs(file)
            train, valid = [p for i, p in enumerate(pairs) if i % 100], pairs[::100]
        else:
            train, valid = self._read(path, "train"), self._read(path, "valid")
        self.vocabularies["tokens"] = BytePairEncoding.train(
            (self._clean(text) for pair in train for text in pair),
            vocab_size=c.units,
            specials=SPECIALS,
            default="<unk>",
        )
        examples = self.encode(train)
        self.valid = valid
        order = bucketed([len(s) + len(t) for s, t in examples], c.batch, c.seed)
        self.batches = ExampleBatches(examples, order, self.collate, lambda batch: int(batch[3].sum()))

    def _read(self, path: Path, split: str) -> list[Pair]:
        if (path / "raw").is_dir():
            path /= "raw"
        files = [
            found(find(path, split, f".{e}"), path, split, f".{e}")
            for e in (self.config.source, self.config.target)
        ]
        return list(read_parallel(*files))

    def _read_pairs(self, path: Path) -> list[Pair]:
        pairs = read_pairs(path)
        return [Pair(p.target, p.source) for p in pairs] if self.config.swap else list(pairs)

    def read_split(self, path: Path, split: str) -> list[Pair]:
        if (file := _pairs_file(path)) is not None:
            if split == "test" and path.is_dir():
                raise CorpusError(
                    f"corpus: {path} has one file of pairs: validation pairs among them, no test"
                )
            pairs = self._read_pairs(file)
            return pairs if path.is_file() else pairs[::100]
        return self._read(path, split)

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.lower() if self.config.lowercase else text

    def encode(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """Units of both sides, targets between <sos> and <eos>."""
        n, units = self.config.max_len, self.vocabularies["tokens"]
        sources, targets = (
            units.encode_batch([self._clean(text) for text in side]) for side in zip(*pairs, strict=True)
        )
        return [(s[:n] or [EOS], [SOS, *t[:n], EOS]) for s, t in zip(sources, targets, strict=True)]

    @staticmethod
    def collate(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sources [B, S], lengths, targets with <sos> and <eos> [B, T], lengths without the <eos>."""
        sources, lengths, targets, target_lengths = collate_pairs(examples, pad=PAD)
        return sources, lengths, targets, target_lengths - 1

    def build(self, layers: ModuleType) -> nn.Module:
        c, V = self.config, len(self.vocabularies["tokens"])
        shared: dict[str, Any] = dict(
            share_embeddings=True, pad_index=PAD, sos_index=SOS, eos_index=EOS, layers=layers
        )
        if c.model == "gru":
            return TranslationGRU(V, V, c.embed_dim, c.hidden_size, dropout=c.dropout, **shared)
        if c.model == "transformer":
            n = c.num_layers
            return TranslationTransformer(
                V, V, c.embed_dim, c.num_heads, n, n, c.hidden_size, c.dropout, **shared
            )
        n, H = min(c.num_layers, 2), c.hidden_size
        encoder = AttnEncoder(V, c.embed_dim, H, n, c.dropout, layers=layers)
        attention = AttnScore(H, H, layers=layers)
        return AttnSeq2Seq(encoder, AttnDecoder(V, c.embed_dim, H, H, n, c.dropout, attention, layers=layers))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        sources, lengths, targets, target_lengths = batch
        steps = torch.arange(targets.shape[1] - 1, device=targets.device)
        valid = steps < target_lengths[:, None]  # [B, T - 1]: the rest is padding
        inputs, wanted = targets[:, :-1], targets[:, 1:][valid]
        if self.config.model == "lstm":
            forcing = scheduled_sampling(self.epoch, self.config.epochs, self.config.teacher_forcing)
            # Time first; step 0 is <sos>, which is given.
            logits = model(sources.t(), targets.t(), forcing, src_lengths=lengths)[1:].transpose(0, 1)[valid]
        else:
            logits = model(sources, inputs, lengths, target_lengths, valid_only=True)
        return F.cross_entropy(logits, wanted, label_smoothing=self.config.label_smoothing, reduction="sum")

    def translations(self, model: nn.Module, texts: Sequence[str], beam_width: int) -> list[str]:
        c, units = self.config, self.vocabularies["tokens"]
        rows = units.encode_batch([self._clean(text) for text in texts])
        results = [""] * len(texts)
        for indices in by_length([len(row) for row in rows], 64):
            batch = self.collate([(rows[i][: c.max_len] or [EOS], [SOS, EOS]) for i in indices])
            sources, lengths, *_ = to_device(batch, device_of(model))
            if c.model == "lstm":
                sources = sources.t()
            found = model.decode(
                sources,
                lengths,
                max_len=c.max_len,
                beam_width=beam_width,
                length_penalty=c.length_penalty,
            )
            for i, ids, n in zip(indices, found.ids.tolist(), found.lengths.tolist(), strict=True):
                results[i] = units.decode(ids[:n]).strip()
        return results

    def figures(self, model: nn.Module, examples: Any, *, final: bool = False) -> dict[str, float]:
        sources, references = zip(*examples, strict=True)
        beam_width = self.config.beam_width if final else 1
        return bleu(
            self.translations(model, sources, beam_width), references, lowercase=self.config.lowercase
        )

    def attention(self, model: nn.Module, text: str) -> tuple[Tensor, list[str], list[str]]:
        """What each unit of the translation, in rows, was read from."""
        if self.config.model != "gru":
            return super().attention(model, text)
        units, device = self.vocabularies["tokens"], device_of(model)
        source = units.encode(self._clean(text))
        sources = torch.tensor([source], device=device)
        found = model.decode(sources, max_len=self.config.max_len)
        target = found.ids[0, : found.lengths[0]].tolist()
        weights = model.attention_weights(sources, torch.tensor([[SOS, *target[:-1]]], device=device))
        rows, columns = ([units.decode([i]) or "<eos>" for i in side] for side in (target, source))
        return weights[0], rows, columns

    def predict(self, model: nn.Module, texts: Sequence[str]) -> Iterator[str]:
        return iter(self.translations(model, texts, self.config.beam_width))


def _pairs_file(path: Path) -> Path | None:
    """A file of pairs: the path itself, or the only text file of a folder without parallel ones."""
    if path.is_file():
        return path
    files = (
        [f for f in sorted(path.iterdir()) if f.name.removesuffix(".gz").endswith((".txt", ".tsv"))]
        if path.is_dir()
        else []
    )
    files = [file for file in files if not file.name.startswith(("_", ".", "README"))]
    return files[0] if len(files) == 1 and not (path / "raw").is_dir() else None
