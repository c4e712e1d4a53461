"""Selection as functions: small worked examples, equalities with the plain formulas, and exact guards."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.token_selector import (
    Selection,
    SelectorConfig,
    ThresholdSelector,
    TopKSelector,
    above_threshold,
    as_many_at_random,
    class_attention,
    gather_tokens,
    head_weighted_scores,
    kept_count,
    masked_attention_weights,
    perturb,
    straight_through,
    tokens_per_block,
    top_k_indices,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_defaults_follow_the_papers() -> None:
    top_k = SelectorConfig()
    assert (top_k.kind, top_k.stages, top_k.tau_start, top_k.tau_end) == ("top_k", (0,), 10.0, 0.1)
    assert (top_k.gradient, top_k.noise) == ("factor", 1.0)
    threshold = SelectorConfig(kind="threshold")
    assert threshold.stages == (4, 7, 10)
    assert threshold.thresholds == (0.001, 0.002, 0.003)
    assert threshold.temperature == 1e4


@pytest.mark.parametrize("values", [{}, {"kind": "threshold", "stages": [2, 3]}, {"keep_ratio": 0.5, "stages": (0, 4)}])
def test_configuration_survives_json(values: dict[str, Any]) -> None:
    config = SelectorConfig.from_mapping(values)
    assert SelectorConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": 1.01}, "keep_ratio is 1.01"),
        ({"keep_ratio": math.nan}, "keep_ratio is nan"),
        ({"stages": ()}, "stages is ()"),
        ({"stages": (-1,)}, "stages is (-1,)"),
        ({"stages": (3, 3)}, "stages is (3, 3)"),
        ({"stages": ("4",)}, "stages is ('4',)"),
        ({"kind": "threshold", "stages": (0, 4)}, "the block before"),
        ({"kind": "threshold", "stages": (7, 4)}, "stages is (7, 4)"),
        ({"kind": "threshold", "thresholds": (0.1,)}, "one for each of the 3 stages"),
        ({"kind": "threshold", "temperature": 0.0}, "temperature is 0.0"),
        ({"kind": "threshold", "keep_ratio": 0.5}, "only kind 'top_k' reads it"),
        ({"thresholds": (0.1,)}, "only kind 'threshold' reads it"),
        ({"tau_end": 0.0}, "tau_end is 0.0"),
        ({"zeroing": True, "stages": (0, 4)}, "zeroing is there for one stage"),
        ({"zeroing": True, "gradient": "attention"}, "needs gradient: factor"),
        ({"gradient": "none"}, "choose factor or attention"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": math.nan}, "noise is nan"),
        ({"noise": math.inf}, "noise is inf"),
        ({"kind": "threshold", "noise": 0.0}, "only kind 'top_k' reads it"),
        ({"kind": "threshold", "gradient": "attention"}, "only kind 'top_k' reads it"),
        ({"keep_ratio": "much"}, "keep_ratio is 'much'"),
        ({"tau_start": None}, "tau_start is None"),
        ({"noise": "loud"}, "noise is 'loud'"),
        ({"zeroing": "no"}, "zeroing is 'no'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"keep_ratio": 10**400}, "keep_ratio is 1000"),
        ({"tau_end": 1e-60}, "tau_end is 1e-60"),
        ({"noise": 1e300}, "noise is 1e+300"),
        ({1: 2, "ratio": 0.5}, "unknown 1, ratio"),
        ({"stages": "4"}, "stages is ('4',)"),
        ({"kind": "threshold", "thresholds": ("a", 0.1, 0.2)}, "give numbers"),
        ({"kind": "threshold", "temperature": [1.0]}, "temperature is [1.0]"),
        ({"kind": ["top_k"]}, "choose one of top_k, threshold"),
        ({"kind": "topk"}, "choose one of top_k, threshold"),
        ({"ratio": 0.5}, "unknown ratio"),
    ],
)
def test_bad_configuration_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is checked below
        SelectorConfig.from_mapping(values)
    assert named in str(raised.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"stages is .*keep_ratio is 2.*tau_start is -1"):
        SelectorConfig(stages=(4, 2), keep_ratio=2, tau_start=-1)


@pytest.mark.parametrize("values", [None, 5, ["kind"]])
def test_a_selector_that_is_no_mapping_is_named(values: Any) -> None:
    with pytest.raises(ValueError, match="give a mapping"):
        SelectorConfig.from_mapping(values)


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


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    soft = torch.tensor([0.3, 0.9], requires_grad=True)
    mask = straight_through(torch.tensor([0.0, 1.0]), soft)
    assert mask.tolist() == [0.0, 1.0]
    (mask * torch.tensor([2.0, 5.0])).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [2.0, 5.0]


@pytest.mark.parametrize(("ratio", "patches", "count"), [(0.7, 196, 137), (0.5, 49, 24), (1, 9, 9), (0.01, 9, 1)])
def test_kept_count(ratio: float, patches: int, count: int) -> None:
    assert kept_count(ratio, patches) == count


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9], [5.0, 4.0, 3.0, 2.0]])
    assert top_k_indices(scores, 2).tolist() == [[1, 3], [0, 1]]
    tokens = torch.arange(8.0).view(2, 4, 1)
    assert gather_tokens(tokens, top_k_indices(scores, 2)).flatten(1).tolist() == [[1, 3], [4, 5]]


def test_equal_scores_are_taken_in_order() -> None:
    scores = torch.tensor([[0.0] * 6, [1, 3, 1, 1, 3, 1], [math.nan, 1, math.nan, 2, -math.inf, math.nan]])
    assert top_k_indices(scores, 3).tolist() == [[0, 1, 2], [0, 1, 4], [0, 1, 3]]
    assert top_k_indices(torch.full((1, 3), math.nan), 2).tolist() == [[0, 1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_top_k_is_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    assert top_k_indices(torch.tensor([scores], dtype=torch.float), count).tolist() == [sorted(best)]


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


def test_as_many_at_random() -> None:
    live = torch.rand(200, 12, generator=generator(1)) < 0.7
    live[:, 0] = True
    keep = live & (torch.rand(200, 12, generator=generator(2)) < 0.5)
    drawn = as_many_at_random(keep, live, generator())
    assert torch.equal(drawn.sum(dim=1), keep.sum(dim=1))
    assert not (drawn & ~live).any()
    assert not torch.equal(drawn, keep)
    # Each live place is drawn as often as another: of 4 live ones 2 are kept, so half of the time.
    live = torch.tensor([True, False, True, True, False, True]).expand(4000, -1)
    keep = torch.tensor([True, False, True, False, False, False]).expand(4000, -1)
    shares = as_many_at_random(keep, live, generator()).double().mean(dim=0)
    assert torch.allclose(shares[live[0]], torch.full((4,), 0.5, dtype=torch.float64), atol=0.03)


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

    selector = TopKSelector(SelectorConfig(keep_ratio=0.5), width=6)
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
    config, patches = SelectorConfig(keep_ratio=0.5), torch.randn(2, 8, 4, generator=generator())
    selector = TopKSelector(config, width=4)
    selector(patches, 0)
    torch.save(selector.state_dict(), tmp_path / "state.pt")
    expected = [selector(patches, 0)[1] for _ in range(3)]

    resumed = TopKSelector(config, width=4)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for mask in expected:
        assert torch.equal(resumed(patches, 0)[1], mask)


def test_a_copy_draws_its_own_noise() -> None:
    selector = TopKSelector(SelectorConfig(), width=4)
    copy = deepcopy(selector)
    before = selector.generator.get_state()
    copy(torch.randn(2, 8, 4), 0)
    assert torch.equal(selector.generator.get_state(), before)
    assert not torch.equal(copy.generator.get_state(), before)


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


def test_above_threshold_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.3, 0.2], [0.9, 0.3, 0.4]])
    live = torch.tensor([[True, True, True], [True, True, True], [False, True, True]])
    keep = above_threshold(scores, torch.tensor(0.5), live)
    assert keep.tolist() == [
        [True, False, True],
        [False, True, False],  # none is above: the best stays
        [False, False, True],  # the best of those that are left
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 2))
def test_a_dropped_patch_stays_dropped_and_one_always_remains(seed: int, theta: float) -> None:
    scores = torch.rand(4, 7, generator=generator(seed))
    live = torch.rand(4, 7, generator=generator(seed + 1)) < 0.4
    live[:, seed % 7] = True
    keep = above_threshold(scores, torch.tensor(theta), live)
    assert bool(keep.any(dim=1).all())
    assert not bool((keep & ~live).any())


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
