"""The threshold selector: masks, gradients, and the chance that it is compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.selector_config import SelectorConfig
from models.threshold_selector import ThresholdSelector
from models.top_k_selector import TopKSelector


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_chance_counts_in_evaluation_only(kind: str) -> None:
    """The same number for every image, another choice; training is as it was."""
    scores = torch.rand(8, 20, generator=generator())
    if kind == "top_k":
        selector: Any = TopKSelector(SelectorConfig(kind="top_k", keep_ratio=0.5), 4)
        patches = torch.randn(8, 20, 4, generator=generator())

        def choose() -> Tensor:
            return selector(patches, 0)[1].detach() > 0.5
    else:
        selector = ThresholdSelector(SelectorConfig(kind="threshold", stages=(1,), thresholds=(0.5,)))

        def choose() -> Tensor:
            return selector(scores, None, 0).detach() > 0.5

    selector.eval()
    learned = choose()
    selector.chance = generator(3)
    drawn = choose()
    assert torch.equal(drawn.sum(dim=1), learned.sum(dim=1))
    assert not torch.equal(drawn, learned)
    selector.train()
    state = selector.chance.get_state()
    choose()
    assert torch.equal(selector.chance.get_state(), state)


def test_threshold_masks_accumulate() -> None:
    selector = ThresholdSelector(SelectorConfig(kind="threshold", stages=(1, 2), thresholds=(0.5, 0.1)))
    first = selector(torch.tensor([[0.9, 0.2, 0.6]]), None, 0)
    second = selector(torch.tensor([[0.05, 0.9, 0.6]]), first, 1)
    assert first.tolist() == [[1.0, 0.0, 1.0]]
    assert second.tolist() == [[0.0, 0.0, 1.0]]


def test_threshold_gradient_is_that_of_the_sigmoid() -> None:
    config = SelectorConfig(kind="threshold", stages=(1,), thresholds=(0.5,), temperature=4.0)
    selector = ThresholdSelector(config)
    scores = torch.tensor([[0.9, 0.2]])
    selector(scores, None, 0).sum().backward()
    slope = torch.sigmoid((scores - 0.5) * 4.0)
    expected = -(4.0 * slope * (1 - slope)).sum()
    torch.testing.assert_close(selector.thresholds.grad, expected.reshape(1))
