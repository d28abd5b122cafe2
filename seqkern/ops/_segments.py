"""Resets inside sequences: a batch is cut into its documents, which run as one packed batch.

Letters: T steps, B batch, N steps that are data, S documents, L layers, D directions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the documents of a batch lie, the longest first. All on the input's device but batch_sizes."""

    batch_sizes: Tensor  # of the packed documents, on the CPU
    t: Tensor  # [N] of each packed step: its time in the batch
    b: Tensor  # [N] its row in the batch
    row: Tensor  # [S] of each document: its row in the batch
    starts: Tensor  # [D, S] bool: the row's initial state of this direction enters the document
    ends: Tensor  # [D, B]: the document that leaves the row's final state of this direction
    data: Tensor  # [B, 1] bool: the row has any

    def gather_states(self, state: Tensor) -> Tensor:
        """[L*D, B, .] -> [L*D, S, .]: zeros but in the documents that a row's initial state enters."""
        D = self.starts.shape[0]
        by_document = state.index_select(1, self.row).unflatten(0, (-1, D))
        return torch.where(self.starts.unsqueeze(-1), by_document, 0).flatten(0, 1)

    def scatter_states(self, final: Tensor, initial: Tensor) -> Tensor:
        """[L*D, S, .] -> [L*D, B, .]; a row without data keeps its initial state."""
        D = self.ends.shape[0]
        by_row = torch.cat([final[d::D].index_select(1, self.ends[d]) for d in range(D)])
        by_row = by_row.unflatten(0, (D, -1)).transpose(0, 1).flatten(0, 1)
        return torch.where(self.data, by_row, initial)


def cut(reset: Tensor, lengths: Tensor | None, D: int, device: torch.device) -> Segments | None:
    """The documents of a batch; None if it has none. Looks at the values: on a GPU that synchronises.

    Args:
        reset: [T, B] bool, True where a document starts; every row's first step starts one, too
        lengths: [B] int64, below 0 taken for 0 and beyond T for T; None: T for every row
        device: of the results
    """
    T, B = reset.shape
    reset = reset.t().cpu()  # [B, T], so that a row's documents follow each other
    lengths = torch.full((B,), T) if lengths is None else lengths.cpu().clamp(0, T)
    b, t = (torch.arange(T) < lengths.unsqueeze(1)).nonzero().unbind(1)  # [N] each
    if len(b) == 0:
        return None
    first = reset[b, t] | (t == 0)
    row, start = b[first], t[first]  # [S] each
    document = first.cumsum(0) - 1  # [N]
    size = torch.bincount(document)
    order = size.argsort(descending=True, stable=True)
    rank = order.argsort()
    step = t - start[document]
    packed = (step * len(row) + rank[document]).argsort()

    # The directions enter a row at its two ends. A reset at the first step shuts the state of the first out.
    opening, closing = start == 0, start + size == lengths[row]
    enters = [opening & ~reset[:, 0][row], closing][:D]
    leaves = [closing, opening][:D]
    starts = torch.stack(enters)[:, order]
    ends = torch.zeros((D, B), dtype=torch.int64)
    for d in range(D):
        ends[d, row[leaves[d]]] = rank[leaves[d]]
    return Segments(
        torch.bincount(step),
        *(x.to(device) for x in (t[packed], b[packed], row[order], starts, ends, (lengths > 0).unsqueeze(1))),
    )
