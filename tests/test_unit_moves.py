"""Heads and neurons that move between blocks: by hand, exact after every step, the same after a stop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.live_units import LiveUnits
from sparse_trainer.optimizer_state import moments
from sparse_trainer.unit_moves import Move, choose_moves, in_whole
from sparse_trainer.unit_scores import Scores
from sparse_trainer.units import find_blocks, keep
from tests.test_falling import one_step, prepare
from tests.test_scheduler import assert_invariants, batches

Factory = Callable[..., nn.Module]
pytestmark = pytest.mark.filterwarnings(
    "ignore:pattern. .* does not divide", "ignore:.*is rounded to", "ignore:what came"
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distribution", ["erk", "uniform", "global"])
def test_the_budget_of_weights_is_exact_wherever_units_move(seed: int, distribution: str) -> None:
    """Also where a layer has to have more weights than were dead before units came to it."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "deit_tiny_patch16_224",
        img_size=32, patch_size=8, in_chans=1, embed_dim=24, depth=4, num_heads=6, num_classes=5,
    )  # fmt: skip
    assert isinstance(model, nn.Module)
    config = SparsityConfig(
        density=0.5 if seed % 2 else 0.3,
        distribution=distribution,
        head_density=0.67,
        neuron_density=0.6,
        unit_distribution="global",
        update_every=1,
        seed=seed,
    )
    scheduler = SparsityScheduler(model, config, total_steps=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    images, targets = torch.randn(8, 1, 32, 32), torch.randint(5, (8,))
    for _ in range(16):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step(lambda: F.cross_entropy(model(images), targets))
        optimizer.zero_grad()
        assert_invariants(scheduler, optimizer, scheduler.target)
        assert scheduler.target == round((config.density or 0) * scheduler.budget.total)


def groups_of(model: nn.Module, live: list[list[int]]) -> list[LiveUnits]:
    """The heads of each block, of which some are live."""
    found = []
    for block, units in zip(find_blocks(model).values(), live, strict=True):
        found.append(LiveUnits(model, block.heads, units))
        keep(model, block.heads, units)
    return found


def scores(*values: list[float]) -> list[Scores]:
    return [Scores(torch.tensor(v), torch.tensor(v)) for v in values]


def test_who_moves_by_hand(tiny_deit: Factory) -> None:
    """Two blocks of three heads, two live in each: the weakest of the four gives way to the best of both candidates."""
    groups = groups_of(tiny_deit(), [[0, 1], [0, 1]])
    found = scores([0.1, 0.5, 0.2], [0.3, 0.9, 0.7])  # of two live heads and one candidate each
    for swap in ("always", "if_better", "explore"):
        moves = choose_moves(groups, found, 1, [1, 1], swap, 0)
        assert [(move.slots, move.places) for move in moves] == [((0,), ()), ((), (0,))]
    assert choose_moves(groups, found, 1, [1, 1], "explore", 0)[1].writing == (0,)
    # Two: the second pair would be 0.3 for 0.2, which only always and explore (once) take.
    both = [choose_moves(groups, found, 2, [1, 1], swap, 0) for swap in ("always", "if_better", "explore")]
    assert both[0] == [Move((0,), (0,), ()), Move((0,), (0,), ())]
    assert [(move.slots, move.places) for move in both[1]] == [((0,), ()), ((), (0,))]
    assert both[2] == [Move((0,), (0,), ()), Move((0,), (0,), (0,))]
    groups[0].tried.add(2)  # what was tried once comes back only if it is better
    assert choose_moves(groups, found, 2, [1, 1], "explore", 0)[0] == Move((0,), (), ())


def test_no_block_falls_below_its_floor(tiny_deit: Factory) -> None:
    groups = groups_of(tiny_deit(), [[0], [0, 1]])
    moves = choose_moves(groups, scores([0.1, 0.8, 0.7], [0.3, 0.9, 0.7]), 3, [1, 1], "always", 0)
    assert [(move.slots, move.places) for move in moves] == [((), (0,)), ((0,), ())]
    groups[1].came[0] = 0  # on probation
    assert not any(
        m.slots for m in choose_moves(groups, scores([0.1, 0.8, 0.7], [0.3, 0.9, 0.7]), 1, [1, 2], "always", 1)
    )


def test_changes_in_whole_numbers_by_hand() -> None:
    assert in_whole([11, -5, -6], 4) == [8, -4, -4]
    assert in_whole([11, -9, -2], 4) == [8, -8, 0]
    assert in_whole([7, 5, -12], 4) == [4, 4, -8], "what is too long gives up what it can"
    assert in_whole([3, -3], 4) == [0, 0]
    assert in_whole([5, -2, -3], 1) == [5, -2, -3]


def test_who_cannot_move_gives_way_within_the_block(tiny_deit: Factory) -> None:
    """By twos nobody moves alone: the weakest of the first block gives way to that block's own candidate, if better."""
    groups = groups_of(tiny_deit(), [[0, 1], [0, 1]])
    found = scores([0.1, 0.5, 0.2], [0.3, 0.9, 0.7])
    for swap in ("always", "if_better", "explore"):
        moves = choose_moves(groups, found, 1, [1, 1], swap, 0, together=2)
        assert [(move.slots, move.places) for move in moves] == [((0,), (0,)), ((), ())]
    worse = scores([0.1, 0.5, 0.05], [0.3, 0.9, 0.7])
    assert not any(move.slots for move in choose_moves(groups, worse, 1, [1, 1], "if_better", 0, together=2))


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_changes_in_whole_numbers(changes: list[int], together: int) -> None:
    changes = [*changes, -sum(changes)]
    found = in_whole(changes, together)
    assert sum(found) == 0
    assert all(value % together == 0 for value in found)
    assert all(0 <= value <= change or change <= value <= 0 for value, change in zip(found, changes, strict=True))


@pytest.mark.parametrize("swap", ["always", "if_better", "explore"])
def test_neurons_of_wide_blocks_stay_in_eights(swap: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=192, depth=3)
    config = SparsityConfig(
        density=None, neuron_density=0.5, unit_distribution="global", swap=swap, update_every=1, drop_fraction=0.3
    )
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    sizes, total = [], 3 * 384
    for _ in range(6):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step(lambda: F.cross_entropy(model(images), targets))
        optimizer.zero_grad()
        sizes.append([block.mlp.fc1.out_features for block in model.blocks])
    assert all(sum(found) == total for found in sizes)
    assert all(size % 8 == 0 for found in sizes for size in found)
    assert sizes[-1] != [384] * 3, "they move"


CONFIGS: list[dict[str, Any]] = [
    {"density": None, "head_density": 0.67, "neuron_density": 0.5},
    {"density": 0.3, "head_density": 0.67, "neuron_density": 0.5, "swap": "explore"},
    {"density": 0.3, "head_density": 0.67, "neuron_density": 0.5, "swap": "always", "distribution": "global"},
    {"density": 0.3, "head_density": 0.67, "swap": "always", "pattern": "8x1", "candidates": "first"},
    {
        "density": 0.2,
        "initial_density": 0.6,
        "head_density": 0.67,
        "neuron_density": 0.5,
        "unit_falls": 2,
        "swap": "always",
    },
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_exact_after_every_step(tiny_deit: Factory, options: dict[str, Any]) -> None:
    options = {"unit_distribution": "global", "drop_fraction": 0.6, "probation": 0, **options}
    scheduler, optimizer, ema = prepare(tiny_deit, options)
    first = sum(map(len, scheduler.live_heads.values())), sum(map(len, scheduler.live_neurons.values()))
    shapes, reshaped = set(), 0
    for step in range(16):
        update = one_step(scheduler, optimizer, ema, step)
        if scheduler.config.masks_weights:
            assert_invariants(scheduler, optimizer, scheduler.target, ema.module)
            assert all(p.fits(scheduler.masks[name]) for name, p in scheduler._weights.patterns.items())  # type: ignore[union-attr]
        count = sum(map(len, scheduler.live_heads.values())), sum(map(len, scheduler.live_neurons.values()))
        if not options.get("unit_falls"):
            assert count == first
        shapes.add(tuple(tuple(p.shape) for p in scheduler.model.parameters()))
        reshaped += update is not None and update.reshaped
        for name, parameter in scheduler.model.named_parameters():
            assert ema.module.get_parameter(name).shape == parameter.shape
            assert all(value.shape == parameter.shape for _, value in moments(optimizer, parameter))
        images, _ = next(batches())
        assert ema.module(images).isfinite().all()
    if options.get("swap") == "always" and "neuron_density" in options:
        assert len(shapes) > 1
        assert reshaped
    if scheduler.config.masks_weights and not options.get("unit_falls"):
        assert scheduler.budget.live == round(0.3 * scheduler.budget.total)
    for name, dense in scheduler.dense_heads.items():
        assert 1 <= len(scheduler.live_heads[name]) <= dense


def test_what_comes_changes_no_function(tiny_deit: Factory) -> None:
    """A head that grows in a block writes nothing at first, so logits change by what left alone."""
    scheduler, optimizer, ema = prepare(
        tiny_deit, {"density": None, "head_density": 0.67, "unit_distribution": "global", "swap": "always"}
    )
    model = scheduler.model
    assert scheduler._units is not None
    blocks = list(find_blocks(model).values())
    with torch.no_grad():  # one head of the first block writes nothing: it is the weakest, and nothing is lost by it
        part = blocks[0].heads.outputs[0]
        part.units(model.get_parameter(part.name).data)[0] = 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for units in scheduler._units.groups:
        units.credit = 0.5 if units.group.block == "blocks.0" else -0.7
    images, _ = next(batches())
    before = model(images)
    for step in range(2):
        one_step(scheduler, optimizer, ema, step)
    assert scheduler._units.groups[0].explored != {0, 1} or scheduler._units.groups[1].explored
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", [3, 8])
def test_a_state_goes_on_bit_for_bit(tiny_deit: Factory, at: int) -> None:
    options = {
        "density": 0.3, "head_density": 0.67, "neuron_density": 0.5, "swap": "always", "unit_distribution": "global",
        "drop_fraction": 0.6, "probation": 0,
    }  # fmt: skip
    first = prepare(tiny_deit, options)
    for step in range(at):
        one_step(*first, step)
    states = copy.deepcopy([first[0].model.state_dict(), *(part.state_dict() for part in first)])
    again = prepare(tiny_deit, options)
    again[0].take_shapes(states[1])
    for part, state in zip((again[0].model, *again), states, strict=True):
        part.load_state_dict(state)
    for step in range(at, 14):
        one_step(*first, step)
        one_step(*again, step)
    assert first[0].live_heads == again[0].live_heads
    assert first[0].live_neurons == again[0].live_neurons
    for mine, other in ((first[0].model, again[0].model), (first[2], again[2])):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in mine.state_dict().items())


def test_a_good_head_comes_back_in_another_block(tiny_deit: Factory, tiny_batch: tuple[Tensor, Tensor]) -> None:
    """The known answer: of a trained network a good head lies dormant in one block, and one of another was damaged."""
    images, targets = tiny_batch
    torch.manual_seed(0)
    model = tiny_deit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    config = SparsityConfig(
        density=None, head_density=0.67, update_every=1, unit_distribution="global", swap="explore", probation=0,
        drop_fraction=0.5,
    )  # fmt: skip
    scheduler = SparsityScheduler(model, config, total_steps=20)
    live = sum(map(len, scheduler.live_heads.values()))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler.attach(sgd)
    came = set()
    for _ in range(10):
        F.cross_entropy(model(images), targets).backward()
        sgd.step()
        update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
        sgd.zero_grad()
        came |= {name for name, block in update.blocks.items() if block.heads_added} if update else set()
    assert came
    assert sum(map(len, scheduler.live_heads.values())) == live


def test_blocks_of_different_widths_are_refused() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    block = model.blocks[1]
    block.mlp.fc2 = nn.Linear(96, 24)
    block.attn.head_dim = 4
    block.attn.num_heads = 6
    with pytest.raises(ValueError, match="unit_distribution: by_score and global need heads and neurons of one size"):
        SparsityScheduler(
            model, SparsityConfig(density=None, head_density=0.5, unit_distribution="global"), total_steps=9
        )
