"""Attention that computes what is kept, against the formula that computes everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.masked_attention import (
    ELSEWHERE,
    Limits,
    MaskedAttention,
    Sheets,
    attend_from_borderline,
    class_attention_masked,
    cut,
)
from models.packing import lay_out
from tests.masked_reference import masked_attention_weights

TOKENS, HEADS, WIDTH = 7, 2, 3
kinds = st.lists(st.lists(st.sampled_from("kkbg"), min_size=TOKENS - 1, max_size=TOKENS - 1), min_size=1, max_size=6)


def sheets_of(kinds: Sequence[Sequence[str]], limits: Limits | None = None) -> tuple[Sheets, Tensor, Tensor]:
    """The class token is kept; of the others each is kept (k), borderline (b) or gone (g)."""
    kept = torch.tensor([[True, *(kind == "k" for kind in image)] for image in kinds])
    close = torch.tensor([[False, *(kind == "b" for kind in image)] for image in kinds])
    return cut(*lay_out(kept, close), HEADS, limits), kept, close


def dense(seed: int, images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, TOKENS, HEADS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("padding", [0, 2**14])
@settings(max_examples=40, deadline=None)
@given(kinds=kinds, seed=st.integers(0, 1000))
def test_outputs_and_gradients_are_those_of_the_formula(padding: int, kinds: list[list[str]], seed: int) -> None:
    """Of queries, keys, values and the mask, for kept and borderline tokens, whether images share a piece or not."""
    sheets, kept, close = sheets_of(kinds, Limits(2**18, padding))
    query, key, value, seen = (x.requires_grad_() for x in dense(seed, len(kinds)))
    mask = kept.double().requires_grad_()

    weights = masked_attention_weights(torch.einsum("bihd,bjhd->bhij", query, key) * WIDTH**-0.5, mask, epsilon=1e-12)
    expected = torch.einsum("bhij,bjhd->bihd", weights, value)
    row = weights[:, :, 0].transpose(1, 2)
    # Nothing depends on what a dropped token becomes.
    loss = (expected * seen.detach())[kept].sum() + (row * seen.detach()[..., 0])[kept].sum()
    wanted = torch.autograd.grad(loss, (query, key, value, mask))

    layout, others = sheets.kept, sheets.borderline
    q, k, v, s = (x.flatten(0, 1)[layout.grid] for x in (query, key, value, seen.detach()))
    masks = [mask.flatten()[sheet.grid] for sheet in (layout, others)]
    own = [x.detach().flatten(0, 1)[others.grid] for x in (query, key, value)]
    output = MaskedAttention.apply(q, k, v, masks[0], own[1], own[2], masks[1], sheets)
    class_row = class_attention_masked(q, k, masks[0], own[1], masks[1], sheets)
    torch.testing.assert_close(output, expected.flatten(0, 1)[layout.grid], atol=1e-9, rtol=0)
    torch.testing.assert_close(class_row, row.flatten(0, 1)[layout.grid], atol=1e-9, rtol=0)
    found = torch.autograd.grad((output * s).sum() + (class_row * s[..., 0]).sum(), (query, key, value, mask))
    for got, want, name in zip(found, wanted, ("query", "key", "value", "mask"), strict=True):
        if name == "mask":  # a gone token's is not computed, the class token's mask is no mask
            got, want = (x[:, 1:][(kept | close)[:, 1:]] for x in (got, want))
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    mixed = attend_from_borderline(own[0], k, v, own[1], own[2], sheets)
    torch.testing.assert_close(mixed, expected.detach().flatten(0, 1)[others.grid], atol=1e-9, rtol=0)


@settings(max_examples=60, deadline=None)
@given(kinds, st.integers(0, 200), st.integers(0, 400))
def test_pieces_hold_every_image_once_and_not_too_many(kinds: list[list[str]], padding: int, most: int) -> None:
    sheets, _, _ = sheets_of(kinds, Limits(most, padding))
    assert sum(part.images for part, _ in sheets.pieces) == len(kinds)
    for sheet, parts in zip((sheets.kept, sheets.borderline), zip(*sheets.pieces, strict=True), strict=True):
        ends = [0]
        for part in parts:
            if part is not None:
                assert part.rows.start == ends[-1]
                ends.append(part.rows.stop)
        assert ends[-1] == sum(sheet.lengths)
    for kept, other in sheets.pieces:
        scores = kept.images * HEADS * kept.longest * (kept.longest + (other.longest if other else 0))
        assert kept.images == 1 or scores <= most + HEADS * kept.images * kept.longest**2


def test_a_dropped_token_of_great_score_is_bounded() -> None:
    """It would weigh e^500 times as much as all others: the gradient of its mask stays finite."""
    sheets, _, _ = sheets_of(["kbgggg"])
    query, key, value, _ = dense(0, 1)
    own_key = 1e3 * query[0, :1]
    q, k, v = (x[0, :2] for x in (query, key, value))
    mask = torch.ones(2, dtype=torch.float64, requires_grad=True)
    other_mask = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    output = MaskedAttention.apply(q, k, v, mask, own_key, value[0, 2:3], other_mask, sheets)
    row = class_attention_masked(q, k, mask, own_key, other_mask, sheets)
    (gradient,) = torch.autograd.grad(output.sum() + row[1].sum(), other_mask)
    assert bool(gradient.isfinite().all())
    assert 0 < gradient.abs() < 1e8


def test_an_accelerator_gets_few_pieces() -> None:
    """256 images that keep about 70 % of 197 tokens, 6 heads: what a GPU gets in two pieces was cut into 18."""
    keep = torch.rand(256, 197, generator=torch.Generator().manual_seed(0)) < 0.7
    layouts = lay_out(keep, torch.zeros_like(keep))
    assert len(cut(*layouts, 6, ELSEWHERE).pieces) == 2
    assert len(cut(*layouts, 6, ELSEWHERE._replace(padding=2**14)).pieces) == 18
