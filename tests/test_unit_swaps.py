from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparse_trainer import LiveNetwork, MaskUpdate, SparsityConfig, SparsityScheduler
from sparse_trainer.live_units import LiveUnits
from sparse_trainer.units import compact, find_blocks
from tests.conftest import TINY
from tests.test_scheduler import assert_invariants

Factory = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is rounded to:UserWarning", "ignore:.*growth changes nothing:UserWarning"
)


def structured(**changes: Any) -> SparsityConfig:
    defaults: dict[str, Any] = {
        "density": None,
        "head_density": 0.67,
        "neuron_density": 0.6,
        "update_every": 1,
        "drop_fraction": 0.6,
        "swap": "always",
        "probation": 0,
    }
    return SparsityConfig(**{**defaults, **changes})


def prepare(
    model: nn.Module, config: SparsityConfig, total_steps: int = 100, lr: float = 1e-2
) -> tuple[SparsityScheduler, torch.optim.Optimizer, ModelEmaV3]:
    scheduler = SparsityScheduler(model, config, total_steps=total_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler.attach(optimizer, ema=ema)
    return scheduler, optimizer, ema


def train_step(
    model: nn.Module, scheduler: SparsityScheduler, optimizer: torch.optim.Optimizer, ema: ModelEmaV3, seed: int
) -> MaskUpdate | None:
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.randn(8, 1, 16, 16, generator=generator), torch.randint(5, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
    ema.update(model)
    return update


def test_the_network_is_the_small_one(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, structured(), total_steps=10)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["blocks.0.attn.qkv.weight"] == (3 * 2 * 8, 24)
    assert shapes["blocks.0.attn.proj.weight"] == (24, 2 * 8)
    assert shapes["blocks.0.mlp.fc1.weight"] == (58, 24)
    assert shapes["blocks.0.mlp.fc2.weight"] == (24, 58)
    assert {len(units) for units in scheduler.live_heads.values()} == {2}
    assert scheduler.dense_neurons == {"blocks.0": 96, "blocks.1": 96}
    prunable = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert scheduler.budget.live == prunable < scheduler.budget.total


@settings(max_examples=10, deadline=None)
@example(heads=1.0, neurons=0.999, share=None, swap="always", distribution="erk")  # of which none is dormant
@given(
    heads=st.sampled_from([0.34, 0.67, 1.0]),
    neurons=st.floats(0.05, 1.0),
    share=st.sampled_from([None, 0.3, 0.9]),
    swap=st.sampled_from(["always", "if_better"]),
    distribution=st.sampled_from(["erk", "global"]),
)
def test_budget_and_invariants_hold_together(
    heads: float, neurons: float, share: float | None, swap: str, distribution: str
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **TINY)
    total = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    compact_total = SparsityScheduler(
        copy.deepcopy(model), structured(head_density=heads, neuron_density=neurons), total_steps=9
    ).budget.live
    live = round(share * compact_total) if share else None
    config = structured(
        head_density=heads, neuron_density=neurons, live_parameters=live, swap=swap, distribution=distribution
    )
    scheduler, optimizer, ema = prepare(model, config, 10)
    assert scheduler.budget.total == total
    assert scheduler.budget.live == (live or compact_total)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for seed in range(4):
        assert train_step(model, scheduler, optimizer, ema, seed) is not None
        assert scheduler.budget.live == (live or compact_total)
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        if live:
            assert_invariants(scheduler, optimizer, live, ema.module)
        for units in (*scheduler.live_heads.values(), *scheduler.live_neurons.values()):
            assert len(set(units)) == len(units)


def test_growth_is_not_a_no_op(tiny_deit: Factory) -> None:
    """After 10 updates units that were never live at the start are live, and they have learned."""
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured())
    start_heads, start_neurons = scheduler.live_heads, scheduler.live_neurons
    assert scheduler._units is not None
    born = {
        (group.group.block, group.group.kind, unit): {
            part.name: part.units(group.candidates[part.name])[place].clone() for part in group.group.slices
        }
        for group in scheduler._units.groups
        for place, unit in enumerate(group.dormant)
    }
    for seed in range(10):
        assert train_step(model, scheduler, optimizer, ema, seed) is not None
    for seed in range(10, 13):  # the last that came learn too
        scheduler.schedule.__dict__["update_steps"] = ()
        train_step(model, scheduler, optimizer, ema, seed)
    parameters = dict(model.named_parameters())
    came = 0
    for group in scheduler._units.groups:
        start = (start_heads if group.group.kind == "head" else start_neurons)[group.group.block]
        for slot, unit in enumerate(group.live):
            if unit in start:
                continue
            came += 1
            for part in group.group.slices:
                now = part.units(parameters[part.name].detach())[slot]
                if part.name.endswith("weight"):
                    assert (now != born[group.group.block, group.group.kind, unit][part.name]).float().mean() > 0.99
                    assert now.std() > 0
            if group.group.kind == "head":
                q, k = group.group.inputs[0].units(parameters[group.group.inputs[0].name].detach())[slot][:2]
                assert q.std() > 1e-3
                assert k.std() > 1e-3
    assert came >= 10


def test_growth_preserves_the_function(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """Units that write nothing are replaced: the logits stay, to 1e-6."""
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured())
    assert scheduler._units is not None
    parameters = dict(model.named_parameters())
    for group in scheduler._units.groups:
        part = group.group.outputs[0]
        part.units(parameters[part.name].data)[0] = 0  # the weakest of all, so the one that leaves
    images, targets = tiny_batch
    model.eval()
    before = model(images)
    swaps, _ = scheduler._units.update(
        lambda: F.cross_entropy(model(images), targets),
        0.5 / 1,
        optimizer=optimizer,
        ema=ema.module,
        masks={},
    )
    heads = [swap for index, swap in swaps.items() if scheduler._units.groups[index].group.kind == "head"]
    assert len(heads) == 2
    assert all(swap.slots == (0,) for swap in heads)
    # neurons: undo all swaps but those of the dead slot by comparing heads alone
    only_heads = tiny_deit()
    scheduler, optimizer, ema = prepare(only_heads, structured(neuron_density=1.0))
    assert scheduler._units is not None
    for group in scheduler._units.groups:
        part = group.group.outputs[0]
        part.units(dict(only_heads.named_parameters())[part.name].data)[0] = 0
    only_heads.eval()
    before = only_heads(images)
    scheduler._units.update(
        lambda: F.cross_entropy(only_heads(images), targets),
        0.5,
        optimizer=optimizer,
        ema=None,
        masks={},
    )
    torch.testing.assert_close(only_heads(images), before, atol=1e-6, rtol=0)


def test_a_grown_neuron_preserves_the_function(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()
    scheduler, optimizer, _ = prepare(model, structured(head_density=1.0))
    assert scheduler._units is not None
    parameters = dict(model.named_parameters())
    for group in scheduler._units.groups:
        for part in group.group.slices:  # 29 of 58 are nothing at all: those are the least by magnitude
            part.units(parameters[part.name].data)[:29] = 0
    model.eval()
    before = model(tiny_batch[0])
    swaps, _ = scheduler._units.update(
        lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]),
        0.5,
        optimizer=optimizer,
        ema=None,
        masks={},
    )
    assert all(sorted(swap.slots) == list(range(29)) for swap in swaps.values())
    torch.testing.assert_close(model(tiny_batch[0]), before, atol=1e-6, rtol=0)


def test_a_dormant_unit_is_only_weights(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured())
    for seed in range(3):
        train_step(model, scheduler, optimizer, ema, seed)
    assert scheduler._units is not None
    for group in scheduler._units.groups:
        assert not any(value.requires_grad for value in group.candidates.values())
    state = [value.numel() for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    assert sum(state) == 2 * sum(p.numel() for p in model.parameters())


def test_a_closure_is_needed(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()
    scheduler, optimizer, _ = prepare(model, structured())
    assert scheduler.needs_closure
    optimizer.step()
    with pytest.raises(ValueError, match="needs the loss of one batch"):
        scheduler.step()
    scheduler, optimizer, _ = prepare(tiny_deit(), structured())
    optimizer.step()
    with pytest.raises(ValueError, match="did not run the model"):
        scheduler.step(lambda: nn.Linear(1, 1)(torch.ones(1, 1)).sum())
    optimizer.step()
    with pytest.raises(ValueError, match="must return the loss"):
        scheduler.step(lambda: torch.ones(1))


def test_fractions_of_a_unit_are_carried_over(tiny_deit: Factory) -> None:
    """With drop * live = 0.4 of 2 heads, one is due at every fifth half..: credits .4 .8 1.2 -> 1, .6 1.0 -> 1."""
    model = tiny_deit()
    units = LiveUnits(model, find_blocks(model)["blocks.0"].heads, [0, 1])

    def counts(units: LiveUnits, drop_fraction: float, updates: int) -> list[int]:
        found = []
        for _ in range(updates):
            count, units.credit = units.due(drop_fraction)
            found.append(count)
        return found

    assert counts(units, 0.2, 5) == [0, 0, 1, 0, 1]
    units.credit = 0.0
    assert [units.due(fraction, round_up=True) for fraction in (0.2, 0.5, 0.0)] == [(1, 0.0), (1, 0.0), (0, 0.0)]
    single = LiveUnits(model, find_blocks(model)["blocks.0"].heads, [0])
    assert counts(single, 1.0, 3) == [0, 0, 0]  # never the last


def test_swap_if_better_swaps_only_where_the_estimate_is_greater(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured(swap="if_better"))
    assert scheduler._units is not None
    for group in scheduler._units.groups:
        for value in group.candidates.values():
            value.zero_()  # a candidate that writes nothing can change nothing
    update = train_step(model, scheduler, optimizer, ema, 0)
    assert update is not None
    assert not any(block.heads_added or block.neurons_added for block in update.blocks.values())


@pytest.mark.parametrize("candidates", ["last", "first"])
def test_what_a_unit_that_left_comes_back_with(tiny_deit: Factory, candidates: str) -> None:
    """Its last values, or those from before the training; the state carries them over a restart."""
    model = tiny_deit()
    first = {name: value.clone() for name, value in model.named_parameters()}
    scheduler, optimizer, ema = prepare(model, structured(candidates=candidates, neuron_density=1.0), lr=0.1)
    last = {}
    for step in range(2):
        slots = {name: list(heads) for name, heads in scheduler.live_heads.items()}
        last = {name: value.detach().clone() for name, value in model.named_parameters()}
        update = train_step(model, scheduler, optimizer, ema, step)
        assert update is not None
        for block, report in update.blocks.items():
            assert scheduler._units is not None
            (units,) = (units for units in scheduler._units.groups if units.group.block == block)
            for removed in report.heads_removed:
                for part in units.group.slices:
                    stored = part.units(units.candidates[part.name])[units.dormant.index(removed)]
                    if candidates == "first":
                        assert torch.equal(stored, part.units(first[part.name].detach())[removed])
                    else:
                        before = part.units(last[part.name])[slots[block].index(removed)]
                        assert torch.allclose(stored, before, atol=0.2)  # one step of 0.1 later
    state = scheduler.state_dict()["units"]["blocks.0.head"]
    assert set(state["first"]) == (set() if candidates == "last" else set(state["candidates"]))


def test_report_tells_who_left_and_who_came(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured())
    before = scheduler.live_heads
    update = train_step(model, scheduler, optimizer, ema, 0)
    assert update is not None
    for name, block in update.blocks.items():
        assert (len(block.heads_removed), len(block.heads_added)) == (1, 1)
        assert set(scheduler.live_heads[name]) == set(before[name]) - set(block.heads_removed) | set(block.heads_added)
        assert block.live_heads == tuple(sorted(scheduler.live_heads[name]))
        assert (block.heads, block.neurons, block.live_neurons) == (3, 96, 58)
        assert len(block.neurons_added) == 34  # 0.6 of 58, and the schedule has hardly begun to fall
        assert block.explored_heads == 3
        assert block.explored_neurons == 58 + 34


def test_swapping_back_and_forth_warns(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """With two of three heads, whoever left is the only candidate: the same swap undone is a warning."""
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured(neuron_density=1.0), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        updates = [train_step(model, scheduler, optimizer, ema, 0) for _ in range(4)]
    assert any("growth changes nothing" in str(warning.message) for warning in caught)
    assert any(update and update.warnings for update in updates)


@pytest.mark.parametrize("start", ["zero", "mean"])
def test_moments_of_a_unit_that_came(start: str, tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured(neuron_density=1.0, unit_moments=start))
    update = train_step(model, scheduler, optimizer, ema, 0)
    assert update is not None
    removed, added = update.blocks["blocks.0"].heads_removed[0], update.blocks["blocks.0"].heads_added[0]
    assert removed != added
    slot = scheduler.live_heads["blocks.0"].index(added)
    part = find_blocks(model)["blocks.0"].heads.inputs[0]
    state = optimizer.state[dict(model.named_parameters())[part.name]]
    first, second = part.units(state["exp_avg"]), part.units(state["exp_avg_sq"])
    assert (first[slot] == 0).all()
    assert second[1 - slot].mean() > 0
    assert torch.allclose(second[slot], second[1 - slot].mean() if start == "mean" else torch.zeros(()))
    assert (part.units(dict(model.named_parameters())["blocks.0.attn.qkv.weight"].grad)[slot] == 0).all()  # type: ignore[arg-type]


def test_state_round_trip_continues_bit_for_bit() -> None:
    def run(split: int | None) -> tuple[nn.Module, SparsityScheduler]:
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224", **TINY)
        config = structured(density=0.4, drop_fraction=0.3, swap="always")
        scheduler, optimizer, ema = prepare(model, config, 12)
        for step in range(8):
            if step == split:
                saved = copy.deepcopy(
                    (model.state_dict(), scheduler.state_dict(), optimizer.state_dict(), ema.state_dict())
                )
                torch.manual_seed(5)
                model = timm.create_model("deit_tiny_patch16_224", **TINY)
                scheduler, optimizer, ema = prepare(model, config, 12)
                model.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
                ema.load_state_dict(saved[3])
            train_step(model, scheduler, optimizer, ema, step)
        return model, scheduler

    model, scheduler = run(None)
    for split in (2, 5):
        resumed, again = run(split)
        assert again.live_heads == scheduler.live_heads
        assert again.live_neurons == scheduler.live_neurons
        for name, value in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value)


def test_torch_compile_is_not_compiled_again(tiny_deit: Factory, tiny_batch: Batch) -> None:
    frames = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal frames
        frames += 1
        return graph.forward

    torch._dynamo.reset()
    model = tiny_deit()
    scheduler, optimizer, ema = prepare(model, structured(density=0.4, update_every=2))
    compiled = torch.compile(model, backend=backend)
    counts, updates = [], 0
    for _ in range(9):
        F.cross_entropy(compiled(tiny_batch[0]), tiny_batch[1]).backward()
        optimizer.step()
        updates += scheduler.step(lambda: F.cross_entropy(compiled(tiny_batch[0]), tiny_batch[1])) is not None
        optimizer.zero_grad()
        ema.update(model)
        counts.append(frames)
    assert updates == 4
    assert counts[0] == counts[-1] >= 1


# Where a block is compiled alone, torch.compile looks at the gradient of what comes in.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")
def test_blocks_that_were_compiled_train_as_others(tiny_deit: Factory) -> None:
    def trained(compiled: bool) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(0)
        model = tiny_deit()
        if compiled:
            model.blocks = nn.Sequential(*(torch.compile(block, backend="eager") for block in model.blocks))
        config = structured(density=0.4, update_every=2, swap="always", unit_distribution="global")
        scheduler, optimizer, ema = prepare(model, config, 8)
        for step in range(6):
            train_step(model, scheduler, optimizer, ema, step)
        return list(model.parameters()), list(scheduler.live_heads.values())

    torch._dynamo.reset()
    (plain, heads), (wrapped, same) = trained(False), trained(True)
    assert heads == same
    assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))


@pytest.mark.parametrize("amp", [False, True])
def test_with_mixup_autocast_accumulation_and_drop_path(tiny_deit: Factory, amp: bool) -> None:
    from timm.data import Mixup

    model = tiny_deit(drop_path_rate=0.2)
    scheduler, optimizer, _ = prepare(model, structured(density=0.4, update_every=2))
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    generator = torch.Generator().manual_seed(0)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return -(targets * F.log_softmax(model(images).float(), dim=-1)).sum(dim=-1).mean()

    updates = []
    for _ in range(6):
        for _ in range(2):
            images, targets = mixup(
                torch.randn(4, 1, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)
            )
            loss(images, targets).backward()
        optimizer.step()
        update = scheduler.step(lambda images=images, targets=targets: loss(images, targets))
        optimizer.zero_grad()
        if update:
            updates.append(update)
        assert_invariants(scheduler, optimizer, scheduler.budget.live)
    assert len(updates) == 3
    assert any(update.blocks["blocks.0"].heads_added for update in updates)
    assert all(update.blocks["blocks.0"].neurons_added for update in updates)


def test_start_by_score_keeps_the_best_of_a_trained_model(tiny_deit: Factory, tiny_batch: Batch) -> None:
    images, targets = tiny_batch
    model = tiny_deit().eval()
    parameters = dict(model.named_parameters())
    for block in find_blocks(model).values():  # make head 1 worthless in each block
        block.heads.outputs[0].units(parameters[block.heads.outputs[0].name].data)[1] = 0
    before = model(images)
    scheduler = SparsityScheduler(
        model,
        structured(start="score", neuron_density=1.0),
        total_steps=10,
        closure=lambda: F.cross_entropy(model(images), targets),
    )
    assert scheduler.live_heads == {"blocks.0": (0, 2), "blocks.1": (0, 2)}
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="needs the loss of a batch"):
        SparsityScheduler(tiny_deit(), structured(start="score"), total_steps=10)


def test_densities_that_do_not_fit(tiny_deit: Factory) -> None:
    with pytest.raises(ValueError, match=r"head_density: 0.1 of 3 heads leaves none"):
        SparsityScheduler(tiny_deit(), structured(head_density=0.1), total_steps=10)
    with pytest.raises(ValueError, match=r"leave [\d,]+ of [\d,]+ \(0\.\d+\); lower density"):
        SparsityScheduler(tiny_deit(), structured(density=0.9), total_steps=10)
    with pytest.raises(ValueError, match="has no transformer blocks"):
        SparsityScheduler(nn.Linear(3, 3), structured(), total_steps=10)


def test_rounding_is_reported(tiny_deit: Factory) -> None:
    with pytest.warns(UserWarning, match=r"head_density: 0\.7 of 3 heads is rounded to 2 \(0\.667\)"):
        SparsityScheduler(tiny_deit(), structured(head_density=0.7, neuron_density=0.5), total_steps=10)


def test_a_candidate_is_scored_under_the_mask_it_would_come_under(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """Candidates that are copies of the live units score exactly like them, whatever the masks."""
    model = tiny_deit()
    scheduler = SparsityScheduler(model, structured(density=0.2, neuron_density=0.5, head_density=1.0), total_steps=10)
    assert scheduler._units is not None
    parameters = dict(model.named_parameters())
    for group in scheduler._units.groups:
        for part in group.group.slices:  # 48 live, 48 dormant
            group.candidates[part.name] = parameters[part.name].detach().clone()
        masked = group.masked_candidates(scheduler.masks)
        for part in group.group.slices:
            assert torch.equal(masked[part.name], parameters[part.name])
            assert masked[part.name] is not parameters[part.name]
        group.candidates = {name: torch.ones_like(value) for name, value in group.candidates.items()}
        for part in group.group.slices:
            if part.name in scheduler.masks:
                sparse = group.masked_candidates(scheduler.masks)[part.name]
                assert torch.equal(sparse.bool(), scheduler.masks[part.name])


def test_a_swap_folds_the_bias_and_follows_in_the_average(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """What a head always added stays in the output bias; the average's slot holds the unit that came."""
    model = tiny_deit()
    torch.nn.init.normal_(dict(model.named_parameters())["blocks.0.attn.qkv.bias"])
    scheduler, optimizer, ema = prepare(model, structured(neuron_density=1.0))
    F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    live = scheduler.live_heads["blocks.0"]
    update = scheduler.step(lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]))
    assert update is not None
    slot = live.index(update.blocks["blocks.0"].heads_removed[0])
    value = before["blocks.0.attn.qkv.bias"].view(3, 2, 8)[2, slot]
    columns = before["blocks.0.attn.proj.weight"][:, slot * 8 : slot * 8 + 8]
    after, averages = dict(model.named_parameters()), dict(ema.module.named_parameters())
    expected = before["blocks.0.attn.proj.bias"] + columns @ value
    torch.testing.assert_close(after["blocks.0.attn.proj.bias"].detach(), expected)
    rows = find_blocks(model)["blocks.0"].heads.inputs[0]
    assert torch.equal(rows.units(averages[rows.name])[slot], rows.units(after[rows.name])[slot])
    assert scheduler._units is not None
    group = scheduler._units.groups[0]
    place = group.dormant.index(update.blocks["blocks.0"].heads_removed[0])
    kept = rows.units(group.candidates[rows.name])[place]
    assert torch.equal(kept, rows.units(before[rows.name])[slot])


def test_by_default_heads_come_that_never_lived() -> None:
    """And no warning: none goes back and forth."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 96, "num_heads": 6, "depth": 3, "num_classes": 4}
    model = timm.create_model("deit_tiny_patch16_224", **sizes)
    config = SparsityConfig(density=None, head_density=0.5, neuron_density=0.5, update_every=5, drop_fraction=0.4)
    scheduler = SparsityScheduler(model, config, total_steps=60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    first = {name: set(heads) for name, heads in scheduler.live_heads.items()}
    seen = {name: set(heads) for name, heads in first.items()}
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            images, targets = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 4

            def loss(images: torch.Tensor = images, targets: torch.Tensor = targets) -> torch.Tensor:
                return F.cross_entropy(model(images), targets)

            loss().backward()
            optimizer.step()
            scheduler.step(loss)
            optimizer.zero_grad()
            for name, heads in scheduler.live_heads.items():
                seen[name] |= set(heads)
    assert sum(len(seen[name] - first[name]) for name in first) >= 7, "of 9 slots; 3 were asked for"
    assert (config.swap_of("head"), config.swap_of("neuron")) == ("explore", "if_better")
    assert SparsityConfig(swap="always").swap_of("head") == "always"


def of_wide_blocks(*lengths: int) -> tuple[nn.Module, LiveNetwork]:
    """Blocks of 512 neurons, of which so many live, as a network that was trained to that."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 4, "mlp_ratio": 512 / 48}
    model = timm.create_model("deit_tiny_patch16_224", depth=len(lengths), **sizes)
    live = {f"blocks.{number}": tuple(range(length)) for number, length in enumerate(lengths)}
    compact(model, {name: range(3) for name in live}, {name: range(len(units)) for name, units in live.items()})
    return model, LiveNetwork({}, live_neurons=live, dense_neurons=dict.fromkeys(live, 512))


@pytest.mark.parametrize(
    ("lengths", "distribution"),
    [
        ((307, 307), "uniform"),  # of a file from before neurons came in eights
        ((304, 304), "uniform"),
        ((312, 296), "global"),
        ((311, 297), "global"),  # one within eight of its share, the other too
        ((301, 313), "global"),
        ((210, 404), "global"),
    ],
)
def test_a_wide_network_goes_on_whether_its_neurons_come_in_eights_or_not(
    lengths: tuple[int, ...], distribution: str
) -> None:
    model, live = of_wide_blocks(*lengths)
    config = SparsityConfig(density=None, neuron_density=0.6, unit_distribution=distribution, updates=2)
    scheduler = SparsityScheduler(model, config, total_steps=10, resume_from=live)
    assert tuple(len(units) for units in scheduler.live_neurons.values()) == lengths


@pytest.mark.parametrize(("lengths", "distribution"), [((306, 306), "uniform"), ((304, 305), "global")])
def test_another_number_of_neurons_is_refused(lengths: tuple[int, ...], distribution: str) -> None:
    model, live = of_wide_blocks(*lengths)
    config = SparsityConfig(density=None, neuron_density=0.6, unit_distribution=distribution, updates=2)
    with pytest.raises(ValueError, match=r"resume_from: .*neuron"):
        SparsityScheduler(model, config, total_steps=10, resume_from=live)
