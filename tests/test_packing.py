"""A sheet of tokens against the same images one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models import packing
from models.packing import (
    Layout,
    attend,
    attend_by_length,
    attend_padded,
    attend_varlen,
    class_attention_packed,
    from_grid,
    lay_out,
    on_grid,
    pad,
    rows_in,
    uniform_layout,
    unpad,
)

TOKENS = 9
counts = st.lists(st.integers(1, TOKENS), min_size=1, max_size=8)


def keep_first(lengths: Sequence[int]) -> Tensor:
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


def packed(lengths: Sequence[int]) -> Layout:
    return lay_out(keep_first(lengths))[0]


def one_at_a_time(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    outputs = []
    for q, k, v in zip(*(x.split(layout.lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        outputs.append(((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def random_heads(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(tokens, 3, 2, 8, generator=generator).unbind(1)
    return query, key, value


def test_a_sheet_by_hand() -> None:
    """Two images of three tokens; the first keeps two of them, the second one: it comes first in the sheet."""
    whole = uniform_layout(2, 3, torch.device("cpu"))
    keep, others = torch.tensor([[True, False, True], [False, True, False]]), torch.tensor([[False, True, False]] * 2)
    smaller, beside = lay_out(keep, others)
    assert rows_in(whole, smaller).tolist() == [4, 0, 2]
    assert smaller.lengths == (1, 2)
    assert smaller.order.tolist() == [1, 0]
    assert smaller.image.tolist() == [0, 1, 1]
    assert smaller.image_in_batch.tolist() == [1, 0, 0]
    assert smaller.position.tolist() == [0, 0, 1]
    assert smaller.source.tolist() == [1, 0, 2]
    assert smaller.starts.tolist() == [0, 1, 3]
    assert smaller.groups == [(0, 1, 1), (1, 1, 2)]
    assert on_grid(torch.tensor([5.0, 6.0, 7.0]), smaller, 0.0).tolist() == [[6, 0, 7], [0, 5, 0]]
    assert beside.order.tolist() == [1, 0], "beside the first sheet, image by image"
    assert rows_in(whole, beside).tolist() == [4, 1]

    (smallest,) = lay_out(torch.tensor([[True, False, False], [False, True, False]]))
    assert rows_in(smaller, smallest).tolist() == [1, 0]
    assert smallest.order.tolist() == [0, 1]
    assert smallest.source.tolist() == [0, 1]
    assert smallest.groups == [(0, 2, 1)]


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 1000))
def test_every_kept_token_is_found_again(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = len(lengths)
    tokens = torch.randn(images, TOKENS, 4, generator=generator)
    ranks = torch.rand(images, TOKENS, generator=generator).argsort(dim=1).argsort(dim=1)
    keep = ranks < torch.tensor(lengths)[:, None]
    (layout,) = lay_out(keep)
    sheet = tokens.flatten(0, 1)[rows_in(uniform_layout(images, TOKENS, torch.device("cpu")), layout)]
    assert list(layout.lengths) == sorted(lengths)
    for row, part in enumerate(sheet.split(layout.lengths)):
        image = layout.order[row]
        assert torch.equal(part, tokens[image][keep[image]])
    assert torch.equal(tokens[layout.order[layout.image], layout.source], sheet)
    assert torch.equal(unpad(pad(sheet, layout, -1.0), layout), sheet)
    assert torch.equal(from_grid(on_grid(sheet[:, 0], layout, -1.0), layout), sheet[:, 0])
    assert (pad(sheet, layout, torch.inf) == torch.inf).sum() == 4 * (images * max(lengths) - sum(lengths))


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 1000))
def test_attention_stays_within_each_image(lengths: list[int], seed: int) -> None:
    layout = packed(lengths)
    query, key, value = random_heads(sum(lengths), seed)
    expected = one_at_a_time(query, key, value, layout)
    for attention in (attend, attend_by_length, attend_padded):
        torch.testing.assert_close(attention(query, key, value, layout), expected, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 1000))
def test_class_row_is_that_of_full_attention(lengths: list[int], seed: int) -> None:
    layout = packed(lengths)
    query, key, _ = random_heads(sum(lengths), seed)
    row = class_attention_packed(query, key, layout)
    for q, k, part in zip(*(x.split(layout.lengths) for x in (query, key, row)), strict=True):
        matrix = torch.einsum("ihd,jhd->hij", q, k).mul(8**-0.5).softmax(dim=-1)
        torch.testing.assert_close(part, matrix[:, 0].T, atol=1e-6, rtol=0)


def test_images_of_equal_length_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    real: Callable[..., Tensor] = F.scaled_dot_product_attention

    def counted(q: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(q.shape)
        return real(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    layout = packed([3, 7, 3, 3])
    attend(*random_heads(16, 0), layout)
    assert calls == [(3, 2, 3, 8), (1, 2, 7, 8)]


def test_the_kernel_for_unequal_lengths_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of ``torch.nn.attention.varlen.varlen_attn``, which runs on GPUs alone."""

    def stand_in(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == max_k == int(cu_q.diff().max())
        output = torch.empty_like(v)
        for first, last in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            part = (x[first:last].transpose(0, 1) for x in (q, k, v))
            output[first:last] = F.scaled_dot_product_attention(*part).transpose(0, 1)
        return output

    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    layout = packed([4, 1, 9, 4])
    heads = random_heads(18, 1)
    torch.testing.assert_close(attend_varlen(*heads, layout), one_at_a_time(*heads, layout), atol=1e-5, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:
    lengths = [5, 2, 9, 5]
    keep = keep_first(lengths).cuda()
    (layout,) = lay_out(keep)
    heads = tuple(x.cuda().to(dtype) for x in random_heads(sum(lengths), 2))
    expected = one_at_a_time(*(x.float() for x in heads), layout)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(*heads, layout).float(), expected, atol=tolerance, rtol=0)
