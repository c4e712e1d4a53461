"""One token in place of those that are dropped: by hand, on a sheet, and where there is nothing to fuse."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fusing import fuse, fuse_on_sheet


def test_the_mean_of_the_dropped_weighted_by_their_scores() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [9.0, 4.0]]])
    fused = fuse(tokens, torch.tensor([[3.0, 7.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(fused, torch.tensor([[[(3 * 1 + 9) / 4, 4 / 4]]]))


def test_patches_that_all_score_0_count_alike() -> None:
    fused = fuse(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(fused, torch.tensor([[[2.0]]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_on_a_sheet_it_is_the_same(images: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(images, 6, 4, dtype=torch.float64, generator=generator)
    scores = torch.rand(images, 6, dtype=torch.float64, generator=generator)
    mask = (torch.rand(images, 6, generator=generator) < 0.6).double()
    order = torch.randperm(images * 6, generator=generator)
    image = torch.arange(images).repeat_interleave(6)
    inputs = [x.requires_grad_() for x in (tokens, scores, mask)]
    whole = fuse(*inputs)[:, 0]
    sheet = fuse_on_sheet(
        tokens.flatten(0, 1)[order], scores.flatten()[order], mask.flatten()[order], image[order], images
    )
    torch.testing.assert_close(sheet, whole)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (whole, sheet)), strict=True):
        torch.testing.assert_close(other, one)
        assert bool(one.isfinite().all())
    nothing = mask.detach().all(dim=1)
    assert bool((whole[nothing] == 0).all())


def test_the_mask_learns_what_a_patch_would_change() -> None:
    """The mean of the dropped is 3/4 * 1 + 1/4 * 9 = 3. With the kept patch it would be 3 + 7/11 * (5 - 3): keeping it
    spares the token this change. Of the dropped ones each has its share: 3/4 * (1 - 3), 1/4 * (9 - 3)."""
    tokens = torch.tensor([[[1.0], [5.0], [9.0]]], dtype=torch.float64)
    scores, mask = torch.tensor([[3.0, 7.0, 1.0]]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double().requires_grad_()
    fused = fuse(tokens, scores, mask)
    torch.testing.assert_close(fused, torch.full_like(fused, 3.0))
    (gradient,) = torch.autograd.grad(fused.sum(), mask)
    torch.testing.assert_close(gradient, -torch.tensor([[3 / 4 * (1 - 3), 7 / 11 * (5 - 3), 1 / 4 * (9 - 3)]]).double())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_a_kept_patch_that_is_dropped_changes_the_token_by_its_gradient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 6, 1, dtype=torch.float64, generator=generator)
    scores = torch.rand(1, 6, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]).double().requires_grad_()
    fused = fuse(tokens, scores, mask)
    (gradient,) = torch.autograd.grad(fused.sum(), mask)
    for patch in range(2, 6):
        without = mask.detach().clone()
        without[0, patch] = 0
        torch.testing.assert_close(fuse(tokens, scores, without) - fused, -gradient[:, patch].view(1, 1, 1))


def test_the_gradient_stays_small_where_little_is_dropped() -> None:
    """One patch of 1,000, with a thousandth of the scores of the others."""
    tokens = torch.randn(1, 1000, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.full((1, 1000), 1.0)
    scores[0, 0] = 1e-3
    mask = torch.ones(1, 1000)
    mask[0, 0] = 0
    mask.requires_grad_()
    (gradient,) = torch.autograd.grad(fuse(tokens, scores, mask).sum(), mask)
    largest = (tokens - tokens[:, :1]).sum(dim=2).abs().max()
    assert float(gradient.abs().max()) <= float(largest)
