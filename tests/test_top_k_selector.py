"""The top-k selector: its noise, its temperature, its gradient, and that it resumes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from models.selector_config import SelectorConfig
from models.top_k_selector import TopKSelector, perturb


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_without_noise_chooses_as_evaluation_does_at_any_temperature() -> None:
    """At 0.1 the share of all patches but a few is 0 in float32."""
    selector = TopKSelector(SelectorConfig(keep_ratio=0.5, noise=0.0, tau_end=0.1), width=8)
    selector.set_progress(1.0)
    patches = 300 * torch.randn(4, 20, 8, generator=generator())
    chosen = selector.train()(patches, 0)[0]
    assert torch.equal(chosen, selector.eval()(patches, 0)[0])
    assert not torch.equal(chosen, torch.arange(10).expand(4, -1))


def test_scores_do_not_depend_on_autocast() -> None:
    selector = TopKSelector(SelectorConfig(keep_ratio=0.5), width=8).eval()
    patches = 1 + 1e-3 * torch.randn(4, 200, 8, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = selector(patches, 0)[0]
    assert torch.equal(chosen, selector(patches, 0)[0])


def test_gumbel_softmax_is_the_stated_formula() -> None:
    logits, noise = torch.randn(2, 3, generator=generator()), torch.randn(2, 3, generator=generator(1))
    weights = ((logits.softmax(1).log() + noise) / 0.5).exp()
    torch.testing.assert_close((perturb(logits, noise) / 0.5).softmax(1), weights / weights.sum(1, keepdim=True))


def test_gumbel_noise_draws_in_proportion_to_the_scores() -> None:
    """The first place under Gumbel noise falls to patch i with probability softmax(logits)_i."""
    selector = TopKSelector(SelectorConfig(seed=3), width=2)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    winners = (logits + selector._noise(logits)).argmax(dim=1)
    shares = winners.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_top_k_selector_counts_and_gradient() -> None:
    selector = TopKSelector(SelectorConfig(keep_ratio=0.5), width=6)
    patches = torch.randn(3, 8, 6, generator=generator())
    indices, factor = selector(patches, 0)
    assert indices.shape == (3, 4)
    assert factor.detach().sum(dim=1).tolist() == [4.0] * 3
    (factor.gather(1, indices) * torch.randn(3, 4, generator=generator(1))).sum().backward()
    assert selector.scorers[0].weight.grad.abs().sum() > 0


def test_noise_in_training_only_and_only_where_asked_for() -> None:
    quiet = TopKSelector(SelectorConfig(keep_ratio=0.5, noise=0.0), width=6)
    patches = torch.randn(3, 8, 6, generator=generator())
    state = quiet.generator.get_state()
    assert torch.equal(quiet.train()(patches, 0)[0], quiet.eval()(patches, 0)[0])
    assert torch.equal(quiet.generator.get_state(), state)

    selector = TopKSelector(SelectorConfig(keep_ratio=0.5, noise=1.0), width=6)
    first, second = selector(patches, 0)[0], selector(patches, 0)[0]
    assert not torch.equal(first, second)
    selector.eval()
    first, second = selector(patches, 0)[0], selector(patches, 0)[0]
    assert torch.equal(first, second)
    logits = selector.scorers[0](patches).squeeze(-1)
    assert torch.equal(first, logits.topk(4).indices.sort().values)


def test_temperature_falls_linearly() -> None:
    selector = TopKSelector(SelectorConfig(), width=2)
    seen = []
    for fraction in (0.0, 0.5, 1.0):
        selector.set_progress(fraction)
        seen.append(selector.tau.item())
    assert seen == pytest.approx([10.0, 5.05, 0.1])


def test_the_noise_resumes_where_it_stopped(tmp_path: Any) -> None:
    config, patches = SelectorConfig(keep_ratio=0.5, noise=1.0), torch.randn(2, 8, 4, generator=generator())
    selector = TopKSelector(config, width=4)
    selector(patches, 0)
    torch.save(selector.state_dict(), tmp_path / "state.pt")
    expected = [selector(patches, 0)[1] for _ in range(3)]

    resumed = TopKSelector(config, width=4)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for mask in expected:
        assert torch.equal(resumed(patches, 0)[1], mask)


def test_a_copy_draws_its_own_noise() -> None:
    selector = TopKSelector(SelectorConfig(noise=1.0), width=4)
    copy = deepcopy(selector)
    before = selector.generator.get_state()
    copy(torch.randn(2, 8, 4), 0)
    assert torch.equal(selector.generator.get_state(), before)
    assert not torch.equal(copy.generator.get_state(), before)


def test_training_keeps_fewer_and_fewer_patches_on_a_ramp() -> None:
    selector = TopKSelector(SelectorConfig(keep_ratio=0.25, ramp=0.5), width=4)
    patches = torch.randn(2, 8, 4, generator=generator())
    counts = [selector.train()(patches, 0)[0].shape[1]]
    for progress in (0.25, 0.5, 1.0):
        selector.set_progress(progress)
        counts.append(selector.train()(patches, 0)[0].shape[1])
    assert counts == [8, 5, 2, 2]
    selector.set_progress(0.0)
    assert selector.eval()(patches, 0)[0].shape[1] == 2
