"""What a selection says of itself, by hand."""

from __future__ import annotations

import torch

from models.selection import Selection, tokens_per_block


def test_tokens_per_block_by_hand() -> None:
    masks = (torch.tensor([[1.0, 1, 0, 1]], requires_grad=True), torch.tensor([[0.0, 1, 0, 0]]))
    selection = Selection((1, 3), masks, num_prefix_tokens=2)
    tokens = tokens_per_block(selection, depth=5)
    assert tokens.tolist() == [[6.0, 5.0, 5.0, 3.0, 3.0]]
    assert selection.counts.tolist() == [[3, 1]]
    assert [kept.tolist() for kept in selection.kept(0)] == [[0, 1, 3]]
    (gradient,) = torch.autograd.grad(tokens.sum(), masks[0])
    assert gradient.tolist() == [[2.0] * 4]


def test_zeroed_tokens_are_still_computed() -> None:
    selection = Selection((0,), (torch.tensor([[1.0, 0.0]]),), num_prefix_tokens=1, removes=False)
    assert tokens_per_block(selection, depth=2).tolist() == [[3.0, 3.0]]
    assert selection.counts.tolist() == [[1]]


def test_a_fused_token_is_there_from_the_stage_that_drops_a_patch_of_the_image() -> None:
    masks = (torch.tensor([[1.0, 1, 1], [1, 0, 1]]), torch.tensor([[1.0, 0, 0], [1, 0, 1]]))
    selection = Selection((1, 2), masks, num_prefix_tokens=1, fuses=True)
    assert tokens_per_block(selection, depth=3).tolist() == [[4, 4, 1 + 1 + 1], [4, 3 + 1, 3 + 1]]
