"""Scores and masked attention against the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.scores import class_attention, head_weighted_scores
from tests.masked_reference import masked_attention_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_class_attention_is_a_row_of_the_matrix() -> None:
    query, key = torch.randn(2, 3, 9, 5, generator=generator()), torch.randn(2, 3, 9, 5, generator=generator(1))
    matrix = (query @ key.transpose(-2, -1) * 5**-0.5).softmax(dim=-1)
    row = class_attention(query[:, :, 0], key, 5**-0.5)
    torch.testing.assert_close(row, matrix[:, :, 0], atol=1e-6, rtol=0)


def test_scores_by_hand() -> None:
    # Two patches, two heads of width 1. The first patch is all head 0; the second is 1/4 head 0, 3/4 head 1.
    class_row = torch.tensor([[0.2, 0.6], [0.4, 0.8]])
    context = torch.tensor([[[2.0], [0.0]], [[-1.0], [3.0]]])
    torch.testing.assert_close(head_weighted_scores(class_row, context, 197), torch.tensor([0.2, 0.7]))
    # With half the tokens a score means half as much.
    torch.testing.assert_close(head_weighted_scores(class_row, context, 394), torch.tensor([0.4, 1.4]))


@pytest.mark.parametrize("height", [0.0, 60.0, 500.0])
def test_masked_attention_is_attention_over_the_kept(height: float) -> None:
    """Also where a dropped token has by far the greatest score."""
    logits = torch.randn(2, 3, 6, 6, generator=generator())
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])
    logits = logits + height * (1 - mask)[:, None, None, :]
    weights = masked_attention_weights(logits, mask)
    for image in range(2):
        kept = mask[image].nonzero().flatten()
        alone = logits[image][:, kept][:, :, kept].softmax(dim=-1)
        torch.testing.assert_close(weights[image][:, kept][:, :, kept], alone, atol=2e-6, rtol=0)
        dropped = weights[image][:, kept][:, :, (mask[image] == 0).nonzero().flatten()]
        assert dropped.max() < 1e-6
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 6))


def test_masked_attention_reaches_dropped_tokens_with_its_gradient() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=generator())
    value = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=generator(1))

    def attended(mask: Tensor) -> Tensor:
        return masked_attention_weights(logits, mask) @ value

    assert torch.autograd.gradcheck(attended, (mask,), atol=1e-6)
    (gradient,) = torch.autograd.grad(attended(mask)[:, :, 0].sum(), mask)
    assert gradient[0, 1] != 0
