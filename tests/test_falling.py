"""A budget that falls: by hand, exact after every step in every mode, the same after a stop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.falling import FallingBudget, steps_of_fall
from sparse_trainer.masks import prune_and_grow
from sparse_trainer.patterns import Pattern
from tests.test_scheduler import assert_invariants, batches

Factory = Callable[..., nn.Module]


def test_by_hand() -> None:
    """The example of the module."""
    fall = FallingBudget(1000, 100, (10, 20, 30, 40))
    assert [fall.at(step) for step in (0, 9, 10, 19, 20, 30, 39, 40, 1000)] == [
        1000, 1000, 480, 480, 212, 114, 114, 100, 100,
    ]  # fmt: skip
    assert fall.values == (1000, 480, 212, 114, 100)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**9), st.integers(0, 10**9), st.lists(st.integers(1, 10**6), min_size=1, unique=True))
def test_it_never_rises_and_ends_at_its_last_value(last: int, more: int, steps: list[int]) -> None:
    values = FallingBudget(last + more, last, tuple(sorted(steps))).values
    assert values[0] == last + more
    assert values[-1] == last
    assert list(values) == sorted(values, reverse=True)


def test_which_updates_it_falls_at() -> None:
    every = (10, 20, 30, 40, 50, 60, 70)
    assert steps_of_fall(every, 100, 0.5) == (10, 20, 30, 40, 50)
    assert steps_of_fall(every, 100, 0.05) == (10,)  # the first there is
    assert steps_of_fall(every, 100, 1.0) == every
    assert steps_of_fall(every, 100, 0.6, most=3) == (20, 40, 60)
    assert steps_of_fall(every, 100, 0.6, most=9) == (10, 20, 30, 40, 50, 60)
    with pytest.raises(ValueError, match="falls at updates, and this run has none; set updates"):
        steps_of_fall((), 100, 0.5)


def test_one_layer_by_hand() -> None:
    """Six live, four are to stay, one of them replaced: three go, and the dead one of greatest gradient comes."""
    weight = torch.tensor([0.5, 0.1, 0.9, 0.2, 0.3, 0.8, 0.0, 0.0])
    live = weight != 0
    gradient = torch.tensor([0.0, 0.6, 0.0, 0.0, 0.0, 0.0, 0.2, 0.7])
    change = prune_and_grow(weight, live, gradient, 1, fewer=2)
    assert change.live.tolist() == [True, False, True, False, False, True, False, True]
    assert change.threshold == pytest.approx(0.3)
    back = prune_and_grow(weight, live, torch.where(weight == 0.1, 2.0, gradient), 1, fewer=2)
    assert back.live.tolist() == [True, True, True, False, False, True, False, False]  # 0.1 grew again at once
    assert int(prune_and_grow(weight, live, gradient, 1, fewer=-1).live.sum()) == 7
    none = prune_and_grow(weight, live, gradient, 0, fewer=0)
    assert torch.equal(none.live, live)
    assert none.threshold == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(-3, 9), st.floats(0, 1), st.booleans(), st.booleans())
def test_the_count_is_met_whatever_may_change(seed: int, fewer: int, drop: float, regrow: bool, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern(2, 1)
    weight = torch.randn(8, 4, generator=generator)
    live = pattern.first_mask(weight, 24, generator)
    eligible = pattern.expand(torch.rand(4, 4, generator=generator) < 0.3, live.shape) if frozen else None
    if frozen and fewer < 0:  # there may not be so many that may grow
        return
    score = torch.rand(8, 4, generator=generator)
    change = pattern.update(weight * live, live, score, drop, fewer=2 * fewer, regrow=regrow, eligible=eligible)
    assert int(change.live.sum()) == 24 - 2 * fewer
    assert pattern.fits(change.live)


CONFIGS: list[dict[str, Any]] = [
    {"initial_density": 1.0, "density": 0.1},
    {"initial_density": 0.5, "density": 0.1, "grow": "random"},
    {"initial_density": 0.6, "density": 0.2, "distribution": "uniform", "regrow": False},
    {"initial_density": 1.0, "density": 0.2, "distribution": "global"},
    {"initial_density": 0.8, "density": 0.3, "pattern": "8x1"},
    {"initial_density": 0.8, "density": 0.3, "pattern": "4x2", "distribution": "global"},
    {"initial_density": 1.0, "density": 0.1, "neuron_density": 0.5, "head_density": 0.67, "swap": "always"},
    {"initial_density": 0.5, "density": 0.3, "drop_fraction": 0.0, "drop_fraction_end": 0.0},
    {"initial_density": 0.3, "density": 0.3},
    {"initial_density": 0.9, "live_parameters": 5000, "start": "score"},
]


def run(
    model: nn.Module, options: dict[str, Any], steps: int, *, total: int = 20
) -> tuple[SparsityScheduler, torch.optim.Optimizer, list[int]]:
    """Train, and look at everything around every step."""
    config = SparsityConfig(**{"update_every": 2, "drop_fraction": 0.3, **options})
    scheduler = SparsityScheduler(model, config, total_steps=total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = copy.deepcopy(model)
    scheduler.attach(optimizer, ema=ema)
    last = config.live_parameters or round((config.density or 0) * scheduler.budget.total)
    fall = FallingBudget(scheduler.budget.live, last, steps_of_fall(scheduler.schedule.update_steps, total, 0.5))
    seen = []
    for step, (images, targets) in zip(range(steps + 1), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        assert_invariants(scheduler, optimizer, fall.at(step), ema)
        if step == steps:
            break
        optimizer.step()
        report = scheduler.step(lambda i=images, t=targets: F.cross_entropy(model(i), t))  # type: ignore[misc]
        if report is not None:
            assert report.budget.live == fall.at(step + 1) == sum(layer.live for layer in report.layers.values())
        assert_invariants(scheduler, optimizer, fall.at(step + 1), ema)
        seen.append(scheduler.budget.live)
        optimizer.zero_grad()
    return scheduler, optimizer, seen


@pytest.mark.filterwarnings("ignore:pattern. .* does not divide", "ignore:.*is rounded to", "ignore:what came back")
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_exact_after_every_step(tiny_deit: Factory, options: dict[str, Any]) -> None:
    scheduler, _, seen = run(tiny_deit(), options, 16)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 3 or options["initial_density"] == options.get("density")
    assert scheduler._weights is not None
    for name, pattern in scheduler._weights.patterns.items():
        assert pattern.fits(scheduler.masks[name])


def test_a_layer_without_gradient_loses_its_weakest(tiny_deit: Factory) -> None:
    """Frozen meanwhile: the budget is met all the same."""
    model = tiny_deit()
    scheduler = SparsityScheduler(
        model, SparsityConfig(initial_density=1.0, density=0.2, update_every=2), total_steps=8
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    name = "blocks.0.mlp.fc1.weight"
    model.get_parameter(name).requires_grad_(False)
    before = model.get_parameter(name).detach().clone()
    for _, (images, targets) in zip(range(4), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert scheduler.budget.live == round(0.2 * scheduler.budget.total)
    mask = scheduler.masks[name]
    assert float(before[mask].abs().min()) >= float(before[~mask].abs().max())


@pytest.mark.parametrize("at", [0, 3, 4, 9, 14])
def test_a_scheduler_that_goes_on_makes_the_same_masks(tiny_deit: Factory, at: int) -> None:
    options = {"initial_density": 0.8, "density": 0.2, "grow": "random"}
    torch.manual_seed(0)
    expected, _, seen = run(tiny_deit(), options, 16)
    torch.manual_seed(0)
    first, optimizer, _ = run(tiny_deit(), options, at)
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=2, drop_fraction=0.3, **options), total_steps=20)
    model.load_state_dict(first.model.state_dict())
    again = torch.optim.AdamW(model.parameters(), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    scheduler.attach(again)
    scheduler.load_state_dict(copy.deepcopy(first.state_dict()))
    for step, (images, targets) in zip(range(16), batches(), strict=False):
        if step < at:
            continue
        again.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        again.step()
        scheduler.step()
        assert scheduler.budget.live == seen[step]
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in scheduler.masks.items())
    for name, value in expected.model.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def test_states_of_budgets_that_stay_and_that_fall_are_not_mixed_up(tiny_deit: Factory) -> None:
    falls = SparsityScheduler(tiny_deit(), SparsityConfig(initial_density=0.8, density=0.2), total_steps=1000)
    stays = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.2), total_steps=1000)
    with pytest.raises(ValueError, match="the saved budget falls, and the configuration's does not; set initial_dens"):
        stays.load_state_dict(falls.state_dict())
    with pytest.raises(ValueError, match="the saved budget does not fall, and the configuration's does"):
        falls.load_state_dict(stays.state_dict())
    older = {key: value for key, value in stays.state_dict().items() if key != "first_live"}
    stays.load_state_dict(older)


def test_a_second_scheduler_lets_it_fall_from_where_it_is(tiny_deit: Factory) -> None:
    """As when a trainer fits twice: what was reached stays reached, and the rest of the way is gone."""
    first, _, _ = run(tiny_deit(), {"initial_density": 1.0, "density": 0.2}, 4)
    there, total = first.budget.live, first.budget.total
    config = first.config
    with pytest.warns(UserWarning, match="the schedule was not reached"):
        second = SparsityScheduler(first.model, config, total_steps=20, resume_from=first)
    assert second.budget.live == there > round(0.2 * total)
    optimizer = torch.optim.SGD(second.model.parameters(), lr=0.1)
    second.attach(optimizer)
    for _, (images, targets) in zip(range(16), batches(), strict=False):
        F.cross_entropy(second.model(images), targets).backward()
        optimizer.step()
        second.step()
        optimizer.zero_grad()
    assert second.budget.live == round(0.2 * total)
    third = SparsityScheduler(second.model, config, total_steps=20, resume_from=second)
    assert third._fall is None
    assert third.budget.live == round(0.2 * total)


def test_bad_values_are_named(tiny_deit: Factory) -> None:
    for wrong, said in (
        ({"initial_density": 0.2, "density": 0.5}, r"initial_density: 0\.2 is below density \(0\.5\)"),
        ({"initial_density": 1.5}, r"initial_density: 1\.5 is not a share in \(0, 1\] or null"),
        ({"initial_density": 0.0}, r"initial_density: 0\.0 is not a share"),
        ({"initial_density": 0.9, "density": None, "head_density": 0.5}, "initial_density: needs density"),
        ({"initial_density": 0.9, "pattern": "2:4"}, "initial_density: pattern 2:4 has one density; give 1x1 or RxC"),
        ({"reach_at": 0.0}, r"reach_at: 0\.0 is not a share in \(0, 1\]"),
        ({"reach_at": True}, "reach_at: True is not"),
    ):
        with pytest.raises(ValueError, match=said):
            SparsityConfig(**wrong)
    with pytest.raises(ValueError, match="falls at updates, and this run has none; set updates"):
        SparsityScheduler(tiny_deit(), SparsityConfig(initial_density=0.9, updates=0), total_steps=9)
    with pytest.raises(ValueError, match=r"initial_density: 0\.1 of .* prunable weights is .*, below the budget"):
        SparsityScheduler(tiny_deit(), SparsityConfig(initial_density=0.1, live_parameters=12_000), total_steps=900)
