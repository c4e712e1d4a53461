"""Blocks of weights and n of every m: by hand, by brute force, and exact after every step in every mode."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.masks import count_dead_nonzero, kill_dead
from sparse_trainer.patterns import Pattern, read_pattern, whole_blocks
from tests.test_scheduler import assert_invariants, train

Factory = Callable[..., nn.Module]


def test_names() -> None:
    assert read_pattern("16x1") == Pattern(16, 1)
    assert read_pattern("2:4") == Pattern(1, 4, 2)
    assert [str(read_pattern(text)) for text in ("1x1", "32x32", "2:4")] == ["1x1", "32x32", "2:4"]
    for wrong in ("", "0x1", "4:4", "4:2", "16", "x", "2:4:8", "-1x1"):
        with pytest.raises(ValueError, match="is no pattern; such as 1x1"):
            read_pattern(wrong)
    with pytest.raises(ValueError, match="pattern: '5:2' is no pattern"):
        SparsityConfig(pattern="5:2")


def test_blocks_by_hand() -> None:
    """The example of the module: of the live blocks 4 and 7 the lesser goes, and the third comes."""
    weight = torch.tensor([[1.0, -5.0, 0.0], [3.0, 2.0, 0.0]])
    live = torch.tensor([[True, True, False], [True, True, False]])
    gradient = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5]])
    change = Pattern(2, 1).update(weight, live, gradient, 0.5, regrow=True, eligible=None)
    assert change.live.tolist() == [[False, True, True], [False, True, True]]
    assert change.threshold == 4.0
    assert int(change.removed.sum()) == int(change.added.sum()) == 2


def test_groups_by_hand() -> None:
    """Two of every four: each group offers its weakest for its best; of two swaps one is due, where the weakest is."""
    weight = torch.tensor([[1.0, -5.0, 0.0, 0.0, 0.5, 2.0, 0.0, 0.0]])
    live = weight != 0
    gradient = torch.tensor([[0.0, 0.0, 0.3, 0.9, 0.0, 0.0, 0.8, 0.1]])
    change = read_pattern("2:4").update(weight, live, gradient, 0.25, regrow=True, eligible=None)
    assert change.live.tolist() == [[True, True, False, False, False, True, True, False]]
    assert change.threshold == 0.5
    both = read_pattern("2:4").update(weight, live, gradient, 0.5, regrow=True, eligible=None)
    assert both.live.tolist() == [[False, True, False, True, False, True, True, False]]


def brute_force(pattern: Pattern, weight: Tensor, live: Tensor, score: Tensor, count: int) -> set[tuple[int, int]]:
    """Live blocks after one update without regrowth, by sorting lists."""
    rows, columns = weight.shape[0] // pattern.rows, weight.shape[1] // pattern.columns

    def total(values: Tensor, r: int, c: int) -> float:
        block = values[r * pattern.rows : (r + 1) * pattern.rows, c * pattern.columns : (c + 1) * pattern.columns]
        return float(block.sum())

    every = list(itertools.product(range(rows), range(columns)))
    alive = [block for block in every if live[block[0] * pattern.rows, block[1] * pattern.columns]]
    dead = [block for block in every if block not in alive]
    gone = sorted(alive, key=lambda block: total(weight.abs(), *block))[:count]
    come = sorted(dead, key=lambda block: -total(score, *block))[:count]
    return (set(alive) - set(gone)) | set(come)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 4]),
    columns=st.sampled_from([1, 3]),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    share=st.floats(0.2, 0.8),
    drop=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_blocks_against_brute_force(
    rows: int, columns: int, grid: tuple[int, int], share: float, drop: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern(rows, columns)
    shape = (grid[0] * rows, grid[1] * columns)
    blocks = grid[0] * grid[1]
    alive = max(1, round(share * blocks))
    weight = torch.randn(shape, generator=generator)
    live = pattern.first_mask(weight, alive * pattern.size, generator)
    assert int(live.sum()) == alive * pattern.size
    weight, score = weight * live, torch.rand(shape, generator=generator)
    change = pattern.update(weight, live, score, drop, regrow=False, eligible=None)
    expected = brute_force(pattern, weight, live, score, min(round(drop * alive), blocks - alive))
    found = {(int(r), int(c)) for r, c in pattern.whole(change.live).nonzero()}
    assert found == expected
    assert torch.equal(pattern.expand(pattern.whole(change.live), shape), change.live)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 99))
def test_counts_are_whole_blocks_with_the_same_sum(blocks: list[int], rows: int, seed: int) -> None:
    sizes = {f"layer{index}": (count + 1) * rows for index, count in enumerate(blocks)} | {"single": 50}
    generator = torch.Generator().manual_seed(seed)
    counts = {name: 1 + int(torch.randint(size, (1,), generator=generator)) for name, size in sizes.items()}
    patterns = {name: Pattern(rows, 1) for name in sizes if name != "single"} | {"single": Pattern()}
    if sum(counts.values()) <= sum(pattern.size for pattern in patterns.values()):  # less than a block for each
        return
    found, _ = whole_blocks(counts, sizes, dict(patterns))
    assert sum(found.values()) == sum(counts.values())
    for name, count in found.items():
        assert count % patterns[name].size == 0
        assert 0 < count <= sizes[name]


CONFIGS: list[dict[str, Any]] = [
    {"pattern": "8x1", "density": 0.4},
    {"pattern": "4x2", "density": 0.3, "distribution": "uniform", "grow": "random"},
    {"pattern": "8x1", "density": 0.5, "distribution": "global"},
    {"pattern": "2:4", "density": 0.5},
    {"pattern": "1:4", "density": 0.25, "grow": "random"},
    {"pattern": "8x1", "density": 0.3, "neuron_density": 0.5},
    {"pattern": "8x1", "density": 0.2, "first_weights": "rescaled", "regrow": False},
]


def holds(pattern: Pattern, mask: Tensor) -> bool:
    """Whether a mask is one of the pattern."""
    if pattern.live is not None:
        return bool((mask.reshape(mask.shape[0], -1, pattern.columns).sum(dim=2) == pattern.live).all())
    return torch.equal(pattern.expand(pattern.whole(mask), mask.shape), mask)


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide", "ignore:.*is rounded to")
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_exact_after_every_step(tiny_deit: Factory, options: dict[str, Any]) -> None:
    """Exactness, invariants and pattern; the classifier of five classes has single weights."""
    config = SparsityConfig(**{"update_every": 2, "drop_fraction": 0.5, **options})
    if config.structured:
        model = tiny_deit()
        scheduler = SparsityScheduler(model, config, total_steps=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler.attach(optimizer)
        images, targets = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
        reports = []
        for _ in range(8):
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            reports.append(scheduler.step(lambda: nn.functional.cross_entropy(model(images), targets)))
            optimizer.zero_grad()
            assert_invariants(scheduler, optimizer, round(config.density * scheduler.budget.total))  # type: ignore[operator]
        reports = [report for report in reports if report]
    else:
        scheduler, reports = train(tiny_deit(), config, 8, total=10)
        assert scheduler.budget.live == round(config.density * scheduler.budget.total)  # type: ignore[operator]
    pattern = read_pattern(config.pattern)
    assert scheduler._weights is not None
    patterns = scheduler._weights.patterns
    assert patterns["head.weight"].single == (5 % pattern.rows != 0 or 24 % pattern.columns != 0)
    assert all(holds(patterns[name], mask) for name, mask in scheduler.masks.items())
    assert any(layer.grown for report in reports for layer in report.layers.values())
    assert len(reports) >= 3


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide")
def test_a_resumed_scheduler_has_the_same_masks(tiny_deit: Factory) -> None:
    config = SparsityConfig(pattern="8x1", density=0.4, update_every=2)
    whole, _ = train(tiny_deit(), config, 8, total=10)
    again = SparsityScheduler(tiny_deit(), config, total_steps=10)
    again.model.load_state_dict(whole.model.state_dict())
    again.load_state_dict(whole.state_dict())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in whole.masks.items())


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide")
def test_the_greatest_blocks_come_first(tiny_deit: Factory) -> None:
    model = tiny_deit()
    weight = model.get_parameter("blocks.0.mlp.fc1.weight").detach().clone()
    config = SparsityConfig(pattern="8x1", density=0.4, start="score", updates=0)
    mask = SparsityScheduler(model, config, total_steps=9).masks["blocks.0.mlp.fc1.weight"]
    sums = Pattern(8, 1).sums(weight.abs())
    alive = Pattern(8, 1).whole(mask)
    assert float(sums[alive].min()) >= float(sums[~alive].max())


def test_rescaled_weights_pass_on_the_variance() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(400, 300, bias=False))
    x = torch.randn(2000, 400)
    dense = float(layer(x).detach().var())
    drawn, rescaled = (
        float(made(x).detach().var())
        for made in (
            _masked(layer, SparsityConfig(density=0.1, updates=0, first_weights=first))
            for first in ("drawn", "rescaled")
        )
    )
    assert drawn == pytest.approx(0.1 * dense, rel=0.05)
    assert rescaled == pytest.approx(dense, rel=0.05)


def _masked(layer: nn.Module, config: SparsityConfig) -> nn.Module:
    import copy

    model = copy.deepcopy(layer)
    SparsityScheduler(model, config, total_steps=9)
    return model


@pytest.mark.parametrize("share", [1.0, 2 / 3])
@pytest.mark.parametrize("density", [0.05, 0.4, 0.6])
@pytest.mark.filterwarnings("ignore:.*is rounded to", "ignore:pattern. ")
def test_the_density_that_a_message_gives_works(tiny_deit: Factory, density: float, share: float) -> None:
    def build(density: float) -> None:
        config = SparsityConfig(pattern="2:4", density=density, head_density=share, neuron_density=share, updates=0)
        SparsityScheduler(tiny_deit(), config, total_steps=9)

    with pytest.raises(ValueError, match=r"pattern|density") as caught:
        build(density)
    message = re.search(r"give density=([0-9.]+)", str(caught.value))
    if density > share:
        assert "lower density" in str(caught.value)
        return
    assert message is not None
    build(float(message[1]))
    assert ("dormant" in str(caught.value)) == (share < 1)


def test_what_does_not_go_together(tiny_deit: Factory) -> None:
    with pytest.raises(
        ValueError, match=r"pattern: a budget of .* cannot be met with 2:4, which leaves .* give density="
    ):
        SparsityScheduler(tiny_deit(), SparsityConfig(pattern="2:4", density=0.2, updates=0), total_steps=9)
    with pytest.raises(ValueError, match="pattern: 512x1 divides no layer"):
        SparsityScheduler(tiny_deit(), SparsityConfig(pattern="512x1", updates=0), total_steps=9)
    with pytest.warns(UserWarning, match=r"pattern: 8x1 does not divide head\.weight; single weights there"):
        SparsityScheduler(tiny_deit(), SparsityConfig(pattern="8x1", updates=0), total_steps=9)
    with pytest.warns(UserWarning, match=r"has single weights, so that the budget is met exactly"):
        odd = SparsityScheduler(
            tiny_deit(num_classes=8), SparsityConfig(pattern="8x1", density=0.4003, updates=0), total_steps=9
        )
    assert odd.budget.live == round(0.4003 * odd.budget.total)


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide")
@pytest.mark.parametrize(("own", "other"), [("8x1", "1x1"), ("1x1", "8x1"), ("2:4", "8x1"), ("8x1", "4x2")])
def test_a_state_of_another_pattern_is_refused(tiny_deit: Factory, own: str, other: str) -> None:
    """Else the masks were of no pattern, or the budget was missed by what does not divide."""
    saved = SparsityScheduler(tiny_deit(), SparsityConfig(pattern=own), total_steps=1000).state_dict()
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(pattern=other), total_steps=1000)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {name: mask.clone() for name, mask in scheduler.masks.items()}
    with pytest.raises(ValueError, match=f"masks are of pattern {own}, the configuration's is {other}"):
        scheduler.load_state_dict(saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in scheduler.masks.items())


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide")
def test_going_on_with_another_pattern(tiny_deit: Factory) -> None:
    """Single weights may go on from blocks; blocks only from blocks of theirs."""
    blocks = SparsityScheduler(tiny_deit(), SparsityConfig(pattern="8x1"), total_steps=1000)
    live, model = blocks.live_network, blocks.model
    blocks.detach(release=True)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong in ("16x1", "2:4"):
        with pytest.raises(ValueError, match=rf"resume_from: the mask of .* is not of pattern {wrong}; give pattern="):
            SparsityScheduler(model, SparsityConfig(pattern=wrong), total_steps=1000, resume_from=live)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    single = SparsityScheduler(model, SparsityConfig(pattern="1x1"), total_steps=1000, resume_from=live)
    assert single.budget.live == sum(int(mask.sum()) for mask in live.masks.values())


def test_dead_weights_become_exactly_0() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -1.0, float("nan"), float("-inf"), 2.0, -0.0]))
    live = torch.tensor([True, False, False, False, True, False])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = nn.Parameter(weight.detach().clone().to(dtype))
        version = values._version
        assert count_dead_nonzero(values.float(), live) == 3
        kill_dead(values, live)
        assert values.tolist() == [1.0, 0.0, 0.0, 0.0, 2.0, 0.0]
        assert not torch.signbit(values).any()
        assert values._version > version  # autograd and enforcement see the write


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide")
def test_neurons_come_in_whole_blocks(tiny_deit: Factory) -> None:
    """Else no layer of the MLP would have the pattern."""
    with pytest.warns(UserWarning, match=r"neuron_density: 0\.6 of 96 neurons is rounded to 64 "):
        scheduler = SparsityScheduler(
            tiny_deit(),
            SparsityConfig(pattern="16x1", density=0.3, neuron_density=0.6, updates=0),
            total_steps=9,
        )
    assert {len(live) for live in scheduler.live_neurons.values()} == {64}  # 57.6 is 3.6 blocks of 16
    assert scheduler._weights is not None
    assert not scheduler._weights.patterns["blocks.0.mlp.fc1.weight"].single
    assert scheduler.budget.live == round(0.3 * scheduler.budget.total)
    plain = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.3, neuron_density=0.6, updates=0), total_steps=9)
    assert {len(live) for live in plain.live_neurons.values()} == {58}
