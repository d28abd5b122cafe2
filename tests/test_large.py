"""Sizes whose products, and offsets, pass 2**31: nothing counts elements in 32 bits.

Up to 20 GB of memory. Storage that is only strided over is never touched, so it costs nothing.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqkern
from seqkern.reference.masks import recurrent_mask

pytestmark = pytest.mark.slow

BEYOND = 2**31
GB = 2**30
MEMORY = Path("/proc/meminfo")
RECURRENT = ("LSTM", "GRU", "RNN", "PeepholeLSTM", "LayerNormGRU")


@pytest.fixture(autouse=True)
def memory(request: pytest.FixtureRequest) -> None:
    """Skips where the memory that `needs` names is not free."""
    wanted = getattr(request.function, "gigabytes", 1) * GB
    if not MEMORY.exists():
        pytest.skip("reads Linux's /proc")
    (line,) = (line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    free = int(line.split()[1]) * 1024
    if free < wanted:
        pytest.skip(f"needs {wanted / GB:.0f} GB of free memory, {free / GB:.0f} there")


def gigabytes(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def mark(test: Callable[..., None]) -> Callable[..., None]:
        test.gigabytes = number  # type: ignore[attr-defined]
        return test

    return mark


def far(like: Tensor, dim: int) -> Tensor:
    """The same values, rows of `dim` more than 2**31 bytes and elements apart."""
    strides, apart = list(like.stride()), BEYOND + 64
    strides[dim] = apart
    storage = torch.empty(apart * (like.shape[dim] - 1) + like.numel(), dtype=like.dtype)
    return storage.as_strided(like.shape, strides).copy_(like)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("dim", (0, 1), ids=("steps", "rows"))
def test_recurrent_inputs_that_lie_far_apart(name: str, dim: int) -> None:
    torch.manual_seed(0)
    layer = getattr(seqkern, name)(6, 8)
    x = torch.randn(3, 3, 6)
    apart = far(x, dim)
    assert apart.stride(dim) > BEYOND
    near_x, far_x = x.clone().requires_grad_(), apart.requires_grad_()
    near_y, far_y = layer(near_x)[0], layer(far_x)[0]
    assert near_y.abs().max() > 0.1
    torch.testing.assert_close(far_y, near_y, rtol=0, atol=0)
    for y, given in ((near_y, near_x), (far_y, far_x)):
        y.square().sum().backward(inputs=[given])
    torch.testing.assert_close(far_x.grad, near_x.grad, rtol=0, atol=0)


def long_input(T: int, B: int, layer: nn.Module) -> Tensor:
    """[T, B, 1] of the layer's dtype, different everywhere near."""
    x = torch.arange(T * B, dtype=torch.int32).remainder_(251).to(next(layer.parameters()).dtype)
    return x.sub_(125).div_(50).view(T, B, 1)


@gigabytes(14)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_outputs_of_more_elements(name: str) -> None:
    """[T, B, H]: the end is that of the second half alone, begun with the first one's state."""
    torch.manual_seed(0)
    B, H = 64, 16
    T = BEYOND // (B * H) + 64
    layer = getattr(seqkern, name)(1, H).bfloat16()
    x = long_input(T, B, layer)
    with torch.no_grad():
        y, _ = layer(x)
        assert y.numel() > BEYOND
        end = y[-1000:].clone()
        del y
        _, state = layer(x[: T // 2])
        again, _ = layer(x[T // 2 :], state)
    assert end.abs().max() > 0.1
    torch.testing.assert_close(end, again[-1000:], rtol=0.02, atol=0.02)


@gigabytes(18)
def test_recurrent_backward_of_more_elements() -> None:
    """The reserve has several values for each of T * B * H; the last steps' gradients are as theirs alone."""
    torch.manual_seed(0)
    B, H, last = 64, 16, 64
    T = BEYOND // (4 * B * H) + 64  # LSTM: six values each
    layer = seqkern.LSTM(1, H).bfloat16()
    x = long_input(T, B, layer).requires_grad_()
    y, _ = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype).expand_as(y))
    del y
    with torch.no_grad():
        _, state = layer(x[:-last])
    end = x[-last:].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(end, state)[0].sum(), end)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(dx[-last:], wanted, rtol=0.02, atol=2e-3)
    assert dx.isfinite().all()


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "heads", "rows"))
def test_attention_inputs_that_lie_far_apart(dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 3, 8).unbind()
    given = [
        [t.clone().requires_grad_() for t in (q, k, v)],
        [far(t, dim).requires_grad_() for t in (q, k, v)],
    ]
    near_y, far_y = (seqkern.scaled_dot_product_attention(*tensors, is_causal=True) for tensors in given)
    torch.testing.assert_close(far_y, near_y, rtol=0, atol=0)
    for y, tensors in zip((near_y, far_y), given, strict=True):
        y.square().sum().backward(inputs=tensors)
    for there, here in zip(given[1], given[0], strict=True):
        torch.testing.assert_close(there.grad, here.grad, rtol=0, atol=0)


def test_attention_of_more_scores() -> None:
    """L * S scores of one head, never kept; the last rows by the formula in float64."""
    torch.manual_seed(0)
    L = S = 46_400
    assert L * S > BEYOND
    q, k, v = torch.randn(3, 1, 1, L, 8).unbind()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y = seqkern.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = slice(L - 16, L)
    dy = torch.zeros_like(y)
    dy[:, :, rows] = torch.randn(16, 8)
    gradients = torch.autograd.grad(y, (q, k, v), dy)

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scores = wide[0][:, :, rows] @ wide[1].transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(16, S).triu(S - 15).bool(), -torch.inf)
    exact = scores.softmax(-1) @ wide[2]
    torch.testing.assert_close(y[:, :, rows].double(), exact, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(
        gradients, torch.autograd.grad(exact, wide, dy[:, :, rows].double()), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-6)


def test_attention_mask_of_more_elements() -> None:
    """A mask [B, N, L, S] that is one row expanded."""
    torch.manual_seed(0)
    B, N, L, S = 1, 1, 46_400, 46_400
    row = torch.randn(S)
    q, k, v = torch.randn(3, B, N, L, 4).unbind()
    with torch.no_grad():
        y = seqkern.scaled_dot_product_attention(q, k, v, attn_mask=row.expand(B, N, L, S))
        rows = slice(L - 16, L)
        exact = nn.functional.scaled_dot_product_attention(
            q[:, :, rows].double(), k.double(), v.double(), attn_mask=row.double().expand(B, N, 16, S)
        )
    torch.testing.assert_close(y[:, :, rows].double(), exact, rtol=1e-4, atol=1e-6)


@gigabytes(12)
def test_crf_of_more_elements() -> None:
    """Emissions [T, B, K]: a sequence's score is as alone."""
    torch.manual_seed(0)
    T, K = 64, 8
    B = BEYOND // (T * K) + 10
    crf = seqkern.CRF(K).bfloat16()
    emissions = torch.randn(T, 1, K).bfloat16().repeat(1, B, 1)
    emissions[:, -1] += torch.randn(T, K).bfloat16()
    tags = torch.zeros(1, 1, dtype=torch.long).expand(T, B)
    with torch.no_grad():
        scores = crf(emissions, tags, reduction="none")
        for i in (0, B - 2, B - 1):
            alone = crf(emissions[:, i : i + 1].contiguous(), tags[:, :1], reduction="none")
            torch.testing.assert_close(scores[i : i + 1], alone)


def test_masks_of_rows_with_large_numbers() -> None:
    """Counters have 32 bits: a row's number may use them all."""
    t, b = torch.zeros(3, dtype=torch.long), torch.tensor([0, BEYOND, 2 * BEYOND - 1])
    arguments = (torch.tensor([5]), [0.5, 0.5, 0.0], t, b, 0, 1, 512)
    mask = torch.ops.seqkern.recurrent_mask(*arguments)
    assert torch.equal(mask, recurrent_mask(*arguments))
    assert len({tuple(row.tolist()) for row in mask}) == 3
