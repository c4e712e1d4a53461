from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from experiments.trials import damaged_heads
from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.optimizer_state import Optimizers
from sparse_trainer.unit_choice import choose, spread_by_score
from sparse_trainer.unit_exchange import exchange
from sparse_trainer.unit_scores import Scores
from sparse_trainer.units import find_blocks, keep
from tests.test_scheduler import assert_invariants

Factory = Callable[..., nn.Module]

pytestmark = pytest.mark.filterwarnings("ignore:.*is rounded to:UserWarning")


def six_heads(live: list[int]) -> LiveUnits:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=6)
    return LiveUnits(model, find_blocks(model)["blocks.0"].heads, live)


def pick(units: LiveUnits, size: list[float], gain: list[float], count: int, swap: str, probation: int = 0) -> Swap:
    return choose(units, Scores(torch.tensor(size), torch.tensor(gain)), count, {}, swap, probation)


def test_which_units_are_chosen() -> None:
    """Heads 0, 1, 2 live and are missed by .3, .1, .2; 3, 4, 5 change the loss by .5, .15, .05, up or down."""
    units = six_heads([0, 1, 2])
    size, gain = [0.3, 0.1, 0.2, 0.5, 0.15, 0.05], [0.0, 0.0, 0.0, -0.4, 0.12, 0.05]
    assert pick(units, size, gain, 2, "always") == Swap((1, 2), (1, 2), (3, 4))
    assert pick(units, size, gain, 2, "if_better") == Swap((1,), (1,), (3,))  # .5 > .1, but .15 < .2
    # 4 gains .12 > .1. 5 gains too little, but was never tried, and of those 3 changes more.
    assert pick(units, size, gain, 1, "explore") == Swap((1,), (1,), (4,), (1,))
    assert pick(units, size, gain, 2, "explore") == Swap((1, 2), (1, 2), (4, 3), (1,))
    units.tried.update([3, 4, 5])
    assert pick(units, size, gain, 2, "explore") == Swap((1,), (1,), (4,), (1,))
    gain[4] = 0.09
    assert pick(units, size, gain, 2, "explore") == Swap((), (), ())


def test_what_is_taken_back_writes_as_it_did_and_what_is_tried_begins_with_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=6)
    group = find_blocks(model)["blocks.0"].heads
    units = LiveUnits(model, group, [0, 1, 2])
    keep(model, group, [0, 1, 2])
    parameters, stored = dict(model.named_parameters()), copy.deepcopy(units.candidates)
    swap = Swap((0, 2), (0, 2), (5, 3), (2,))
    exchange(units, swap, parameters, optimizer=Optimizers([]), ema={}, masks={}, seed_moments=False)
    (written,) = group.outputs
    now, before = written.units(parameters[written.name].detach()), written.units(stored[written.name])
    assert units.live == [5, 1, 3]
    assert (now[0] == 0).all()
    assert torch.equal(now[2], before[0])  # 3 was the first candidate
    for part in group.inputs:
        assert torch.equal(part.units(parameters[part.name].detach())[0], part.units(stored[part.name])[2])


def test_probation_keeps_who_came_and_who_left() -> None:
    units = six_heads([0, 1, 2])
    size, gain = [0.3, 0.1, 0.2, 0.5, 0.15, 0.05], [0.0] * 6
    units.updates = 1
    swap = pick(units, size, gain, 1, "always", 2)
    assert swap == Swap((1,), (1,), (3,))
    units.exchanged(swap)
    assert (units.live, units.dormant) == ([0, 3, 2], [1, 4, 5])
    size = [0.3, 0.0, 0.2, 0.9, 0.15, 0.05]  # 3, in slot 1, is nothing yet, and 1 would be a great gain
    for update in (2, 3):
        units.updates = update
        assert pick(units, size, gain, 1, "always", 2) == Swap((2,), (2,), (4,))
    units.updates = 4
    assert pick(units, size, gain, 1, "always", 2) == Swap((1,), (3,), (1,))
    units.updates = 2
    assert pick(units, size, gain, 3, "always", 2) == Swap((2, 0), (2, 0), (4, 5))  # those that are left
    restored = six_heads([0, 1, 2])
    restored.load_state_dict(units.state_dict())
    assert pick(restored, size, gain, 3, "always", 2) == Swap((2, 0), (2, 0), (4, 5))
    assert restored.tried == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "swap", [pytest.param("always", marks=pytest.mark.filterwarnings("ignore:.*growth changes nothing")), "explore"]
)
def test_a_lone_candidate_does_not_go_back_and_forth(swap: str, tiny_deit: Factory) -> None:
    """Two of three heads: without probation, each update of those that always swap undid the one before."""
    model = tiny_deit()
    config = SparsityConfig(density=None, head_density=0.67, update_every=1, drop_fraction=0.6, swap=swap)
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    images, targets = torch.randn(8, 1, 16, 16), torch.arange(8) % 5
    swapped: dict[str, list[bool]] = {"blocks.0": [], "blocks.1": []}
    for _ in range(6):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
        assert update is not None
        for name, block in update.blocks.items():
            swapped[name].append(bool(block.heads_added))
    assert all(several[:3] == [True, False, False] for several in swapped.values())
    assert all(several[3] == (swap == "always") for several in swapped.values())


def test_heads_that_were_not_live_come() -> None:
    """Three blocks as wide as DeiT-S, half of the heads: within 60 steps at least 3 of 9 slots see another head."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_small_patch16_224", img_size=32, patch_size=16, depth=3, num_classes=10, drop_path_rate=0.0
    )
    config = SparsityConfig(head_density=0.5, update_every=5, drop_fraction=0.4, swap="explore")
    scheduler = SparsityScheduler(model, config, total_steps=60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler.attach(optimizer)
    first = scheduler.live_heads
    seen: dict[str, set[int]] = {name: set() for name in first}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        images, targets = torch.randn(2, 3, 32, 32, generator=generator), torch.randint(10, (2,), generator=generator)
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step(lambda images=images, targets=targets: F.cross_entropy(model(images), targets))  # type: ignore[misc]
        optimizer.zero_grad()
        for name, heads in scheduler.live_heads.items():
            seen[name] |= set(heads)
    assert sum(len(seen[name] - set(first[name])) for name in first) >= 3
    scheduler.detach(release=True)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, dict[str, list[float]], damaged_heads.Images]:
    torch.set_num_threads(1)
    train = damaged_heads.embedded(0)
    some = damaged_heads.Images(train.images[::20], train.targets[::20])
    dense = damaged_heads.train_dense(0, train, 250)
    return dense, damaged_heads.worth(dense, some), train


@pytest.mark.parametrize("case", damaged_heads.CASES)
def test_damaged_heads(case: str, trained: Any) -> None:
    """The good head comes back and is kept; the damaged one is not there at the end in its place."""
    dense, missed, train = trained
    some = damaged_heads.Images(train.images[:500], train.targets[:500])
    outcome = damaged_heads.try_one(0, case, "explore", dense, missed, train, some)
    assert outcome.errors == 0
    assert 1 <= outcome.swaps <= 6


def test_the_trial_damages_what_it_says() -> None:
    """The order of heads is no part of the function; new queries and keys of one head are."""
    model = damaged_heads.small_vit(0).eval()
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before: Tensor = model(images)
    damaged_heads.arrange(model, {"blocks.0": [2, 0, 3, 1], "blocks.1": [3, 2, 1, 0]})
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    damaged_heads.damage(model, {"blocks.0": 1, "blocks.1": 3}, torch.Generator().manual_seed(0))
    for name, value in model.named_parameters():
        changed = (value != weights[name]).reshape(len(value), -1).any(dim=1)
        if name == "blocks.0.attn.qkv.weight":
            assert changed.view(3, 4, 8)[:2, 1].all()
            assert int(changed.sum()) == 2 * 8
        elif "blocks.1.attn.qkv" not in name and "blocks.0.attn.qkv" not in name:
            assert not changed.any()


def test_units_where_they_matter() -> None:
    """Six of nine, at least one of each block: the best of each, then 5, 4 and 4, of which the earlier block first."""
    scores = [torch.tensor(s) for s in ([9.0, 5.0, 4.0], [1.0, 0.5, 0.2], [4.0, 8.0, 0.1])]
    assert spread_by_score(scores, [2, 2, 2], [1, 1, 1]) == [[0, 1, 2], [0], [0, 1]]
    assert spread_by_score(scores, [1, 1, 1], [1, 1, 1]) == [[0], [0], [1]]
    assert spread_by_score(scores, [2, 2, 2], [2, 2, 2]) == [[0, 1], [0, 1], [0, 1]]


def test_by_score_in_eights() -> None:
    scores = [torch.rand(512, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(3)]
    alone = spread_by_score(scores, [256] * 3, [1] * 3)
    found = spread_by_score(scores, [256] * 3, [1] * 3, 8)
    assert sum(map(len, found)) == 3 * 256
    for score, units, others in zip(scores, found, alone, strict=True):
        assert len(units) % 8 == 0
        assert abs(len(units) - len(others)) < 8
        assert units == sorted(score.topk(len(units)).indices.tolist())


def by_score(model: nn.Module, batch: tuple[Tensor, Tensor], **changes: Any) -> SparsityScheduler:
    config: dict[str, Any] = {"density": None, "head_density": 0.67, "neuron_density": 0.5, "start": "score"}
    return SparsityScheduler(
        model,
        SparsityConfig(
            **{**config, "unit_distribution": "by_score", "update_every": 1, "drop_fraction": 0.6, **changes}
        ),
        total_steps=20,
        closure=lambda: F.cross_entropy(model(batch[0]), batch[1]),
    )


def test_blocks_of_different_sizes(tiny_deit: Factory, tiny_batch: tuple[Tensor, Tensor]) -> None:
    """Two heads and most neurons of block 1 write nothing, so block 0 keeps what they would have cost."""
    model, same = tiny_deit(), tiny_deit()
    block, parameters = find_blocks(model)["blocks.1"], dict(model.named_parameters())
    block.heads.outputs[0].units(parameters[block.heads.outputs[0].name].data)[:2] = 0
    block.neurons.outputs[0].units(parameters[block.neurons.outputs[0].name].data)[3:] = 0
    scheduler = by_score(model, tiny_batch, density=0.3)
    uniform = by_score(same, tiny_batch, density=0.3, unit_distribution="uniform")
    assert scheduler.live_heads == {"blocks.0": (0, 1, 2), "blocks.1": (2,)}
    assert [len(units) for units in scheduler.live_neurons.values()] == [91, 5]  # a tenth of 48, rounded up
    assert set(scheduler.live_neurons["blocks.1"]) > {0, 1, 2}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in same.parameters())
    assert scheduler.budget == uniform.budget
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for _ in range(4):
        F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
        optimizer.step()
        update = scheduler.step(lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]))
        assert update is not None
        assert update.budget == uniform.budget
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        assert (update.blocks["blocks.0"].explored_heads, update.blocks["blocks.0"].heads) == (3, 3)


def test_by_score_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match='unit_distribution: "by_score" needs start: "score"'):
        SparsityConfig(head_density=0.5, unit_distribution="by_score")
    with pytest.raises(ValueError, match="unit_distribution: 'everywhere' is not one of uniform, by_score, global"):
        SparsityConfig(head_density=0.5, unit_distribution="everywhere")


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_saved_state_of_other_sizes_goes_on_bit_for_bit(
    density: float | None, tiny_deit: Factory, tiny_batch: tuple[Tensor, Tensor]
) -> None:
    """The network that goes on was made from other weights, so its blocks have other sizes until the state is there."""

    def prepare(seed: int, quiet: int) -> tuple[nn.Module, SparsityScheduler, torch.optim.Optimizer, ModelEmaV3]:
        model = tiny_deit(seed)
        heads = find_blocks(model)[f"blocks.{quiet}"].heads.outputs[0]
        heads.units(dict(model.named_parameters())[heads.name].data)[:2] = 0
        scheduler = by_score(model, tiny_batch, density=density, growth_batches=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ema = ModelEmaV3(model, decay=0.9)
        scheduler.attach(optimizer, ema=ema)
        return model, scheduler, optimizer, ema

    def train(
        model: nn.Module, scheduler: SparsityScheduler, optimizer: torch.optim.Optimizer, ema: ModelEmaV3, steps: int
    ) -> None:
        for _ in range(steps):
            F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
            optimizer.step()
            assert scheduler.step(lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])) is not None
            optimizer.zero_grad()
            ema.update(model)

    first = prepare(0, 1)
    train(*first, 2)
    states = copy.deepcopy([part.state_dict() for part in first])
    again = prepare(1, 0)
    assert [len(heads) for heads in again[1].live_heads.values()] == [1, 3]
    F.cross_entropy(again[0](tiny_batch[0]), tiny_batch[1]).backward()
    owned = [id(parameter) for parameter in again[0].parameters()]
    assert again[1].take_shapes(states[1])
    assert not again[1].take_shapes(states[1])
    for part, state in zip((again[0], again[1], again[2], again[3]), states, strict=True):
        part.load_state_dict(state)
    again[2].zero_grad()
    assert [id(parameter) for parameter in again[0].parameters()] == owned
    assert [len(heads) for heads in again[1].live_heads.values()] == [3, 1]
    train(*first, 3)
    train(*again, 3)
    assert again[1].live_heads == first[1].live_heads
    assert again[1].live_neurons == first[1].live_neurons
    for mine, other in ((first[0], again[0]), (first[3], again[3])):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in mine.state_dict().items())
    if density is not None:
        assert_invariants(again[1], again[2], first[1].budget.live, again[3].module)
