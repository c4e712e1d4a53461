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


def test_the_mask_learns_what_the_token_would_lose() -> None:
    """Keeping patch j takes score_j * (x_j - mean) / sum of scores out of the mean of the dropped."""
    tokens = torch.tensor([[[1.0], [5.0], [9.0]]], dtype=torch.float64)
    scores, mask = torch.tensor([[3.0, 7.0, 1.0]]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(fuse(tokens, scores, mask).sum(), mask)
    torch.testing.assert_close(gradient, -torch.tensor([[3 * (1 - 3), 7 * (5 - 3), 1 * (9 - 3)]]).double() / 4)
