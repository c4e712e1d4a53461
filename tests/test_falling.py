"""A budget that falls: by hand, exact after every step in every mode, the same after a stop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.budget import count_units
from sparse_trainer.falling import FallingBudget, steps_of_fall
from sparse_trainer.files.checkpoint import read_info
from sparse_trainer.masks import prune_and_grow
from sparse_trainer.optimizer_state import moments
from sparse_trainer.patterns import Pattern
from sparse_trainer.report import MaskUpdate
from sparse_trainer.units import find_blocks
from tests.test_scheduler import assert_invariants, batches
from tests.test_training import run as train_run
from tests.test_training import start

Factory = Callable[..., nn.Module]
pytestmark = pytest.mark.filterwarnings(
    "ignore:pattern. .* does not divide",
    "ignore:.*is rounded to",
    "ignore:what came back",
    "ignore:.*has single weights",
)


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


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_exact_after_every_step(tiny_deit: Factory, options: dict[str, Any]) -> None:
    scheduler, _, seen = run(tiny_deit(), options, 16)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 3 or options["initial_density"] == options.get("density")
    assert scheduler._weights is not None
    for name, pattern in scheduler._weights.patterns.items():
        assert pattern.fits(scheduler.masks[name])


@pytest.mark.parametrize("most", [False, True])
def test_a_frozen_layer_keeps_its_weights_where_the_others_can_meet_the_budget(tiny_deit: Factory, most: bool) -> None:
    """Else the budget comes first, and it loses its weakest."""
    model = tiny_deit()
    scheduler = SparsityScheduler(
        model, SparsityConfig(initial_density=1.0, density=0.2, update_every=2), total_steps=8
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    name = "blocks.0.mlp.fc1.weight"
    for other, parameter in model.named_parameters():
        if other == name or (most and other.startswith("blocks")):
            parameter.requires_grad_(False)
    before = model.get_parameter(name).detach().clone()
    for _, (images, targets) in zip(range(4), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert scheduler.budget.live == round(0.2 * scheduler.budget.total)
    mask = scheduler.masks[name]
    assert bool(mask.all()) != most
    assert torch.equal(model.get_parameter(name).detach()[mask], before[mask])
    if most:
        assert float(before[mask].abs().min()) >= float(before[~mask].abs().max())


@pytest.mark.filterwarnings("ignore:pattern. 8x1 does not divide")
def test_single_weights_make_up_what_frozen_blocks_cannot(tiny_deit: Factory) -> None:
    """The classifier has the only single weights: a few of them, and not the blocks of a frozen layer."""
    model = tiny_deit()
    config = SparsityConfig(density=0.6, initial_density=1.0, pattern="8x1", updates=3)
    scheduler = SparsityScheduler(model, config, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler.attach(optimizer)
    for part in ("head", "blocks.0"):
        model.get_submodule(part).requires_grad_(False)
    for _, (images, targets) in zip(range(10), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert_invariants(scheduler, optimizer, scheduler.target)
    assert all(bool(mask.all()) for name, mask in scheduler.masks.items() if name.startswith("blocks.0."))


@pytest.mark.parametrize("distribution", ["erk", "global"])
@pytest.mark.filterwarnings("ignore:pattern. 4.weight has single weights:UserWarning")
def test_a_frozen_layer_takes_up_what_blocks_leave(distribution: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    config = SparsityConfig(density=0.3, initial_density=1.0, distribution=distribution, pattern="4x1", update_every=1)
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    model.get_parameter("4.weight").requires_grad_(False)
    for _ in range(20):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert_invariants(scheduler, optimizer, scheduler.target)


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


UNITS: list[dict[str, Any]] = [
    {"density": None, "head_density": 0.34, "neuron_density": 0.5, "unit_falls": 3},
    {"density": 0.3, "head_density": 0.34, "unit_falls": 2},
    {"density": 0.2, "initial_density": 1.0, "head_density": 0.34, "neuron_density": 0.5, "unit_falls": 3},
    {
        "density": 0.2, "initial_density": 0.9, "head_density": 0.67, "neuron_density": 0.25, "unit_falls": 3,
        "unit_distribution": "by_score", "distribution": "global", "candidates": "first",
    },
    {"density": 0.3, "head_density": 0.34, "neuron_density": 0.5, "unit_falls": 3, "pattern": "8x1"},
    {"density": 0.3, "neuron_density": 0.5, "unit_falls": 9, "grow": "random", "swap": "always"},
]  # fmt: skip


def prepare(
    tiny_deit: Factory, options: dict[str, Any], opt: str = "adamw"
) -> tuple[SparsityScheduler, torch.optim.Optimizer, ModelEmaV3]:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(**{"update_every": 2, **options}), total_steps=20)
    if opt == "adafactor":
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    else:
        optimizer = create_optimizer_v2(model, opt=opt, lr=1e-2)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler.attach(optimizer, ema=ema.module)
    return scheduler, optimizer, ema


def one_step(
    scheduler: SparsityScheduler, optimizer: torch.optim.Optimizer, ema: ModelEmaV3, step: int
) -> MaskUpdate | None:
    images, targets = next(itertools.islice(batches(), step, None))
    model = scheduler.model
    loss = F.cross_entropy(model(images), targets)
    ema.graph_before, ema.graph = getattr(ema, "graph", None), loss  # as in a loop that holds its last loss
    loss.backward()
    optimizer.step()
    update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
    optimizer.zero_grad()
    ema.update(model)
    return update


@pytest.mark.parametrize("options", UNITS, ids=str)
def test_units_leave_during_training(tiny_deit: Factory, options: dict[str, Any]) -> None:
    """All are there at first; at the end as many as were asked for, in the model, its average and the moments."""
    scheduler, optimizer, ema = prepare(tiny_deit, options)
    total = scheduler.budget.total
    heads, neurons = scheduler.dense_heads, scheduler.dense_neurons
    assert {name: len(live) for name, live in scheduler.live_heads.items()} == heads
    assert {name: len(live) for name, live in scheduler.live_neurons.items()} == neurons
    sizes = []
    for step in range(16):
        update = one_step(scheduler, optimizer, ema, step)
        available = sum(p.numel() for p in scheduler._prunable.values())
        if scheduler.config.masks_weights:
            fall, last = scheduler._fall, round(scheduler.config.density * total)  # type: ignore[operator]
            live = min(fall.at(step + 1), available) if fall is not None else last
            assert_invariants(scheduler, optimizer, live, ema.module)
            assert all(p.fits(scheduler.masks[name]) for name, p in scheduler._weights.patterns.items())  # type: ignore[union-attr]
        sizes.append(sum(p.numel() for p in scheduler.model.parameters()))
        if update is not None:
            assert update.reshaped == (sizes[-1] < sizes[-2])
            gone = sum(len(b.heads_removed) - len(b.heads_added) for b in update.blocks.values())
            gone += sum(len(b.neurons_removed) - len(b.neurons_added) for b in update.blocks.values())
            assert (gone > 0) == update.reshaped
        for name, parameter in scheduler.model.named_parameters():
            assert ema.module.get_parameter(name).shape == parameter.shape
            for _, value in moments(optimizer, parameter):
                assert value.shape == parameter.shape
        images, _ = next(batches())
        assert ema.module(images).isfinite().all()
    falls = len(set(sizes))
    assert 2 <= falls <= options["unit_falls"] + 1
    assert sizes == sorted(sizes, reverse=True)
    count = sum(map(len, scheduler.live_heads.values())), sum(map(len, scheduler.live_neurons.values()))
    config = scheduler.config
    assert count == (
        sum(count_units(config.head_density, n, "head") for n in heads.values()),
        sum(count_units(config.neuron_density, n, "neuron") for n in neurons.values()),
    )
    for name, dense in heads.items():
        assert sorted([*scheduler.live_heads[name], *_dormant(scheduler, name, "head")]) == list(range(dense))


def _dormant(scheduler: SparsityScheduler, block: str, kind: str) -> list[int]:
    assert scheduler._units is not None
    found = [u for u in scheduler._units.groups if (u.group.block, u.group.kind) == (block, kind)]
    return list(found[0].dormant) if found else []


@pytest.mark.parametrize("opt", ["sgd", "adafactor", "lion", "lamb"])
def test_units_leave_under_other_optimizers(tiny_deit: Factory, opt: str) -> None:
    scheduler, optimizer, ema = prepare(tiny_deit, {"density": 0.3, "head_density": 0.34, "unit_falls": 2}, opt)
    for step in range(12):
        one_step(scheduler, optimizer, ema, step)
    assert_invariants(scheduler, optimizer, round(0.3 * scheduler.budget.total), ema.module)


def test_those_that_matter_least_leave_and_the_function_stays(tiny_deit: Factory) -> None:
    """Heads whose output is 0, and whose values have a bias that reaches the output as a constant."""
    scheduler, optimizer, ema = prepare(
        tiny_deit, {"density": None, "head_density": 0.34, "unit_falls": 1, "swap": "if_better"}
    )
    model = scheduler.model
    for block in find_blocks(model).values():
        part = block.heads.inputs[0]
        with torch.no_grad():
            # Their values do not depend on the image, so the gate has a gradient, and the constant is all they add.
            part.units(model.get_parameter(part.name).data)[1:, 2] = 0
            model.get_parameter(f"{block.name}.attn.qkv.bias").view(3, 3, -1)[2, 1:] = 0.3
            model.get_parameter(f"{block.name}.attn.proj.weight")[:, part.size :].mul_(1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    images, _ = next(batches())
    before = model(images)
    for step in range(10):
        one_step(scheduler, optimizer, ema, step)
    assert set(scheduler.live_heads.values()) == {(0,)}
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", [5, 9, 12])
@pytest.mark.parametrize("options", [UNITS[2], UNITS[3]], ids=["uniform", "by_score"])
def test_a_state_between_two_falls_goes_on_bit_for_bit(tiny_deit: Factory, options: dict[str, Any], at: int) -> None:
    first = prepare(tiny_deit, options)
    for step in range(at):
        one_step(*first, step)
    states = copy.deepcopy([first[0].model.state_dict(), *(part.state_dict() for part in first)])
    again = prepare(tiny_deit, options)
    again[0].take_shapes(states[1])
    for part, state in zip((again[0].model, *again), states, strict=True):
        part.load_state_dict(state)
    for step in range(at, 16):
        one_step(*first, step)
        one_step(*again, step)
    for mine, other in ((first[0].model, again[0].model), (first[2], again[2])):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in mine.state_dict().items())
    assert all(torch.equal(mask, again[0].masks[name]) for name, mask in first[0].masks.items())
    assert first[0].live_heads == again[0].live_heads


def test_a_compiled_network_goes_on(tiny_deit: Factory) -> None:
    torch.compiler.reset()
    scheduler, optimizer, _ = prepare(tiny_deit, {"density": None, "neuron_density": 0.5, "unit_falls": 1})
    model = scheduler.model
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(12):
        images, targets = next(itertools.islice(batches(), step, None))
        F.cross_entropy(compiled(images), targets).backward()
        optimizer.step()
        scheduler.step(lambda i=images, t=targets: F.cross_entropy(model(i), t))  # type: ignore[misc]
        optimizer.zero_grad()
        torch.testing.assert_close(compiled(images), model(images))
    assert {len(live) for live in scheduler.live_neurons.values()} == {48}


def test_bad_unit_falls_are_named() -> None:
    with pytest.raises(ValueError, match="unit_falls: needs head_density or neuron_density below 1"):
        SparsityConfig(unit_falls=2)
    with pytest.raises(ValueError, match="unit_falls: pattern 2:4 has one density; give 1x1 or RxC"):
        SparsityConfig(unit_falls=2, head_density=0.5, pattern="2:4")
    with pytest.raises(ValueError, match="unit_falls: -1 is not a whole number"):
        SparsityConfig(unit_falls=-1, head_density=0.5)


def test_the_best_checkpoint_has_come_down(tmp_path: Path) -> None:
    """While there is more live than was asked for, no evaluation is the best, however good."""
    sparsity = {
        "density": 0.2, "initial_density": 1.0, "head_density": 0.34, "neuron_density": 0.5, "unit_falls": 1,
        "updates": None, "update_every": 3, "growth_batches": 1, "stop_at": 1.0,
    }  # fmt: skip
    changes = {"data": {"train_subset": 60}, "sparsity": sparsity, "training": {"steps": 12, "eval_every": 0.2}}
    loop = start(tmp_path / "run", changes)
    train_run(loop)
    assert loop.trainer.sparsity is not None
    assert not loop.trainer.sparsity.falling
    live = round(0.2 * loop.trainer.budget.total)
    assert loop.trainer.target == loop.trainer.budget.live == live
    assert loop.history.best is not None
    first = next(step for step in loop.trainer.sparsity.schedule.update_steps if step >= 6)
    assert loop.history.best["step"] >= first
    for file in (loop.folder.best, loop.folder.sparse):
        assert read_info(file).budget.live == live
