"""Pictures of trained models: where attention looks, and where words lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from seqkern.train.log import new_figure


def attention_heatmap(weights: Tensor, rows: Sequence[str], columns: Sequence[str], picture: Path) -> None:
    """Attention weights [len(rows), len(columns)], what attends in rows, as a PNG.

    Raises:   ImportError: matplotlib is not installed
    """
    figure = new_figure(figsize=(2 + 0.4 * len(columns), 1.5 + 0.4 * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(weights.float().cpu().numpy(), vmin=0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label="attention")
    figure.savefig(picture, dpi=120)


def tsne(vectors: Tensor, words: Sequence[str], picture: Path, *, seed: int = 0) -> None:
    """Vectors [N, E] in two dimensions, each with its word, as a PNG.

    Raises:   ImportError: matplotlib or scikit-learn is not installed;  ValueError: fewer than three words
    Source:   van der Maaten and Hinton 2008, "Visualizing Data using t-SNE"
    """
    if len(words) < 3:
        raise ValueError(f"words: expected at least 3 to lay out, got {len(words)}")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'seqkern[plot]'") from error
    perplexity = min(30.0, (len(words) - 1) / 3)
    method = TSNE(2, perplexity=perplexity, init="pca", metric="cosine", random_state=seed)
    places = method.fit_transform(vectors.float().cpu().numpy())
    figure = new_figure(figsize=(10, 10))
    axes = figure.subplots()
    axes.scatter(places[:, 0], places[:, 1], s=6, alpha=0.4)
    for word, place in zip(words, places, strict=True):
        axes.annotate(word, place, fontsize=7)
    axes.set_axis_off()
    figure.savefig(picture, dpi=120)
