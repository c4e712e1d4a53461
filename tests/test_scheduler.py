from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparse_trainer import MaskUpdate, SparsityConfig, SparsityScheduler
from sparse_trainer.masks import prune_and_grow, replaceable
from sparse_trainer.optimizer_state import moments

Factory = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]


def batches(seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(4, 1, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)


def assert_invariants(
    scheduler: SparsityScheduler, optimizer: torch.optim.Optimizer, live: int, ema: nn.Module | None = None
) -> None:
    """The budget is met exactly, and a dead weight is 0 in parameter, gradient, moments and EMA."""
    assert sum(int(mask.sum()) for mask in scheduler.masks.values()) == live == scheduler.budget.live
    parameters = dict(scheduler.model.named_parameters())
    averages = dict(ema.named_parameters()) if ema is not None else {}
    for name, mask in scheduler.masks.items():
        parameter = parameters[name]
        assert (parameter[~mask] == 0).all(), name
        assert parameter.grad is None or (parameter.grad[~mask] == 0).all(), name
        for key, value in moments(optimizer, parameter):
            assert (value[~mask] == 0).all(), (name, key)
        if averages:
            assert (averages[name][~mask] == 0).all(), name


def train(
    model: nn.Module,
    config: SparsityConfig,
    steps: int,
    *,
    total: int | None = None,
    opt: str = "adamw",
    check: bool = True,
    **options: Any,
) -> tuple[SparsityScheduler, list[MaskUpdate]]:
    scheduler = SparsityScheduler(model, config, total_steps=total or steps)
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.05, **options)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler.attach(optimizer, ema=ema)
    live = scheduler.budget.live
    reports = []
    for _, (images, targets) in zip(range(steps), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if check:
            assert_invariants(scheduler, optimizer, live, ema.module)
        optimizer.step()
        report = scheduler.step()
        if report:
            reports.append(report)
        ema.update(model)
        if check:
            assert_invariants(scheduler, optimizer, live, ema.module)
        optimizer.zero_grad()
    return scheduler, reports


@settings(max_examples=12, deadline=None)
@given(
    density=st.floats(0.05, 1.0),
    distribution=st.sampled_from(["erk", "uniform", "global"]),
    grow=st.sampled_from(["gradient", "random"]),
    regrow=st.booleans(),
    seed=st.integers(0, 3),
)
def test_invariants_after_every_step(density: float, distribution: str, grow: str, regrow: bool, seed: int) -> None:
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(
        "deit_tiny_patch16_224",
        **{
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "in_chans": 1,
            "num_classes": 5,
        },
    )
    config = SparsityConfig(
        density=density,
        distribution=distribution,
        grow=grow,
        regrow=regrow,
        seed=seed,
        update_every=2,
        drop_fraction=0.5,
    )
    scheduler, reports = train(model, config, 7, total=10)
    assert len(reports) == 3
    total = scheduler.budget.total
    assert scheduler.budget.live == round(density * total)
    for report in reports:
        for name, layer in report.layers.items():
            assert layer.pruned == layer.grown or distribution == "global"
            assert layer.total == scheduler.masks[name].numel()
        assert sum(layer.pruned for layer in report.layers.values()) == sum(
            layer.grown for layer in report.layers.values()
        )


@pytest.mark.parametrize(
    ("opt", "options"),
    [
        ("adamw", {}),
        ("adamw", {"foreach": True}),
        ("adamw", {"fused": True}),
        ("adamw", {"amsgrad": True}),
        ("momentum", {}),
        ("sgd", {}),
        ("lamb", {}),
        ("lion", {}),
        ("nadamw", {}),
        ("adan", {}),
        ("adamp", {}),
        ("lars", {}),
        ("madgrad", {}),
        ("novograd", {}),
        ("laprop", {}),
        ("mars", {}),
        ("adopt", {}),
        ("cadamw", {}),
    ],
)
def test_invariants_with_optimizers(tiny_deit: Factory, opt: str, options: dict[str, Any]) -> None:
    _, reports = train(tiny_deit(), SparsityConfig(update_every=2), 6, total=10, opt=opt, **options)
    assert len(reports) == 3
    assert all(report.churn > 0 for report in reports)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)),
    ],
)
def test_any_module_with_linear_and_conv(module: nn.Module) -> None:
    train(copy.deepcopy(module), SparsityConfig(density=0.3, update_every=2), 5, total=8)


def test_update_equals_the_pure_functions(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """The masks after one update are what prune_and_grow says about weights after the step and dense gradients."""
    model, (images, targets) = tiny_deit(), tiny_batch
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1, drop_fraction=0.3), total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    scheduler.attach(optimizer)
    F.cross_entropy(twin(images), targets).backward()  # no hooks: dense gradients
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = scheduler.step()
    assert report is not None
    dense = {name: p.grad for name, p in twin.named_parameters()}
    for name, mask in before.items():
        gradient = dense[name]
        assert gradient is not None
        count = replaceable(mask, scheduler.schedule.fraction(1))
        expected = prune_and_grow(weights[name], mask, gradient.abs(), count)
        assert torch.equal(scheduler.masks[name], expected.live)
        assert report.layers[name].grown == int(expected.added.sum())


SEEDED = SparsityConfig(update_every=1, drop_fraction=0.3, weight_moments="gradient")
"""The second moments of what grew tell by which gradient it did."""


def one_update(
    model: nn.Module, backward: Callable[[Tensor], None], batch: Batch, accumulate: int = 1, clip: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks after one update, and the second moments of what grew."""
    scheduler = SparsityScheduler(model, SEEDED, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999))
    scheduler.attach(optimizer)
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    for images, targets in zip(batch[0].chunk(accumulate), batch[1].chunk(accumulate), strict=True):
        backward(F.cross_entropy(model(images), targets) / accumulate)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    scheduler.step()
    grown = {}
    for name, parameter in model.named_parameters():
        if name in before:
            added = scheduler.masks[name] & ~before[name]
            grown[name] = optimizer.state[parameter]["exp_avg_sq"][added]
            assert (optimizer.state[parameter]["exp_avg"][added] == 0).all()
            assert (parameter[added] == 0).all()
    return {name: mask.clone() for name, mask in scheduler.masks.items()}, grown


def test_accumulation_and_clipping_give_the_same_growth(tiny_deit: Factory, tiny_batch: Batch) -> None:
    masks, seeds = one_update(tiny_deit(), lambda loss: loss.backward(), tiny_batch)
    accumulated, accumulated_seeds = one_update(tiny_deit(), lambda loss: loss.backward(), tiny_batch, accumulate=2)
    for name, mask in masks.items():
        assert (mask != accumulated[name]).sum() <= 2  # summation order may swap a near tie
        if torch.equal(mask, accumulated[name]):
            torch.testing.assert_close(seeds[name], accumulated_seeds[name], rtol=1e-3, atol=1e-12)
    # clipping scales what the optimizer sees, and so the seeds, by the square of its factor
    norm = nn.utils.get_total_norm(list(dense_gradients(tiny_deit(), tiny_batch).values()))
    clipped, clipped_seeds = one_update(tiny_deit(), lambda loss: loss.backward(), tiny_batch, clip=0.01)
    ratios = torch.cat([clipped_seeds[name] / seeds[name] for name in masks if torch.equal(masks[name], clipped[name])])
    assert ratios.numel() > 100
    assert ratios.max() / ratios.min() < 1.01
    assert 0 < ratios.mean() < (0.02 / float(norm)) ** 2 * 100


def dense_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_grad_scaler_gives_the_same_growth(tiny_deit: Factory, tiny_batch: Batch) -> None:
    masks, seeds = one_update(tiny_deit(), lambda loss: loss.backward(), tiny_batch)
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SEEDED, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    scaler.scale(F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scheduler.step() is not None
    for name, parameter in model.named_parameters():
        if name in masks:
            assert torch.equal(scheduler.masks[name], masks[name])
            added = scheduler.masks[name] & ~before[name]
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"][added], seeds[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_amp_skipped_moves_nothing(tiny_deit: Factory, tiny_batch: Batch, fused: bool) -> None:
    model, (images, targets) = tiny_deit(), tiny_batch
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=2), total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scheduler.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(factor: float) -> MaskUpdate | None:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images), targets) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return scheduler.step()

    assert step(1.0) is None
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    state = copy.deepcopy(scheduler.state_dict()["weights"]["growth"])
    assert step(float("inf")) is None
    assert scheduler.step_number == 1
    assert all(torch.equal(mask, before[name]) for name, mask in scheduler.masks.items())
    assert scheduler.state_dict()["weights"]["growth"]["steps"] == state["steps"]
    report = step(1.0)
    assert report is not None
    assert report.step == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bf16_autocast(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1), total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    live = scheduler.budget.live
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])
        loss.backward()
        assert_invariants(scheduler, optimizer, live)
        optimizer.step()
        assert scheduler.step() is not None
        optimizer.zero_grad()
        assert_invariants(scheduler, optimizer, live)


def test_torch_compile_is_not_compiled_again(tiny_deit: Factory, tiny_batch: Batch) -> None:
    frames = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal frames
        frames += 1
        return graph.forward

    torch._dynamo.reset()
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=2), total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    compiled = torch.compile(model, backend=backend)
    live, counts, updates = scheduler.budget.live, [], 0
    for _ in range(8):
        F.cross_entropy(compiled(tiny_batch[0]), tiny_batch[1]).backward()
        assert_invariants(scheduler, optimizer, live)
        optimizer.step()
        updates += scheduler.step() is not None
        optimizer.zero_grad()
        counts.append(frames)
    assert updates == 4
    assert counts[0] == counts[-1] >= 1


def test_growth_gradient_over_several_batches(tiny_deit: Factory) -> None:
    model = tiny_deit()
    config = SparsityConfig(update_every=4, growth_batches=3, drop_fraction=0.3)
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    twin = copy.deepcopy(model)
    scheduler.attach(optimizer)
    collecting = []
    total: dict[str, Tensor] = {}
    data = batches()
    report = None
    while report is None:
        images, targets = next(data)
        assert scheduler._weights is not None
        collecting.append(scheduler._weights.growth.collecting)
        F.cross_entropy(model(images), targets).backward()
        if collecting[-1]:
            twin.zero_grad()
            for name, gradient in dense_gradients(twin, (images, targets)).items():
                total[name] = total.get(name, torch.zeros(())) + gradient / 3
        before = {name: mask.clone() for name, mask in scheduler.masks.items()}
        optimizer.step()
        report = scheduler.step()
        optimizer.zero_grad()
    assert collecting == [False, True, True, True]
    weights = dict(twin.named_parameters())
    for name, mask in before.items():
        count = replaceable(mask, scheduler.schedule.fraction(4))
        expected = prune_and_grow(weights[name], mask, total[name].abs(), count).live
        assert (scheduler.masks[name] != expected).sum() <= 2


def test_no_dense_copy_between_updates(tiny_deit: Factory) -> None:
    scheduler, _ = train(tiny_deit(), SparsityConfig(update_every=10), 11, total=40)
    assert scheduler._weights is not None
    growth = scheduler._weights.growth
    assert not growth.collecting
    assert not growth._mean
    assert not growth._step
    assert all(mask.dtype == torch.bool for mask in scheduler.masks.values())


def test_same_seed_same_masks(tiny_deit: Factory) -> None:
    config = SparsityConfig(update_every=2, seed=3)
    first, _ = train(tiny_deit(), config, 6, total=10, check=False)
    second, _ = train(tiny_deit(), config, 6, total=10, check=False)
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
    other = SparsityScheduler(tiny_deit(), SparsityConfig(seed=4), total_steps=10)
    assert any(not torch.equal(mask, other.masks[name]) for name, mask in first.masks.items())


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_state_round_trip_continues_bit_for_bit(tiny_deit: Factory, grow: str) -> None:
    config = SparsityConfig(update_every=2, growth_batches=2, grow=grow)

    def run(split: int | None) -> tuple[nn.Module, SparsityScheduler]:
        model = tiny_deit()
        scheduler = SparsityScheduler(model, config, total_steps=12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler.attach(optimizer)
        for step, (images, targets) in zip(range(9), batches(), strict=False):
            if step == split:
                saved = copy.deepcopy((model.state_dict(), scheduler.state_dict(), optimizer.state_dict()))
                model = tiny_deit(seed=9)
                scheduler = SparsityScheduler(model, config, total_steps=12)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                model.load_state_dict(saved[0])
                scheduler.attach(optimizer)
                scheduler.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return model, scheduler

    model, scheduler = run(None)
    for split in (3, 4, 5):
        resumed, resumed_scheduler = run(split)
        for name, parameter in resumed.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert all(torch.equal(mask, resumed_scheduler.masks[name]) for name, mask in scheduler.masks.items())
        assert resumed_scheduler.step_number == 9


def test_include_and_exclude(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(
        tiny_deit(), SparsityConfig(include=("blocks.*",), exclude=("*.qkv",)), total_steps=10
    )
    assert set(scheduler.masks) == {
        f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")
    }
    with pytest.raises(ValueError, match=r"exclude: 'heads' matches no prunable weight; close names: head"):
        SparsityScheduler(tiny_deit(), SparsityConfig(exclude=("heads",)), total_steps=10)


def test_default_is_every_linear_and_conv(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(), total_steps=10)
    expected = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert set(scheduler.masks) == expected
    assert {"patch_embed.proj.weight", "head.weight"} < expected


def test_a_model_may_name_what_is_never_pruned(tiny_deit: Factory) -> None:
    model = tiny_deit()
    model.no_sparsity = lambda: {"head"}  # type: ignore[assignment]
    assert "head.weight" not in SparsityScheduler(model, SparsityConfig(), total_steps=10).masks


def test_live_parameters_is_the_budget_itself(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(live_parameters=1234), total_steps=10)
    assert scheduler.budget.live == 1234


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"density": 1e-9}, "density: 1e-09 .* leaves 0 live, fewer than one in each of the 10 layers"),
        ({"live_parameters": 10**9}, "live_parameters: 1,000,000,000 is more than the 14,328 prunable weights"),
    ],
)
def test_budgets_that_do_not_fit(tiny_deit: Factory, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityScheduler(tiny_deit(), SparsityConfig(**config), total_steps=10)


def test_a_module_with_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="no weight to prune"):
        SparsityScheduler(nn.LayerNorm(3), SparsityConfig(), total_steps=10)


def test_attach_checks(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(), total_steps=10)
    with pytest.raises(RuntimeError, match=r"before scheduler\.attach"):
        scheduler.step()
    with pytest.raises(ValueError, match="lacks 10 prunable parameters"):
        scheduler.attach(torch.optim.SGD(tiny_deit().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the EMA's parameters are other"):
        scheduler.attach(torch.optim.SGD(model.parameters(), lr=0.1), ema=nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    with pytest.raises(ValueError, match="attached to an optimizer already"):
        scheduler.attach(optimizer)
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="stepped 2 times"):
        scheduler.step()


def test_detach_leaves_no_hooks(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(), total_steps=10)
    scheduler.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler.detach()
    gradients = dense_gradients(model, tiny_batch)
    assert all((gradients[name][~mask] != 0).any() for name, mask in scheduler.masks.items() if "head" not in name)


def test_not_finite_gradients_are_not_ranked(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """A loop that steps on NaN gradients ruins its weights, but the masks do not follow them."""
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1), total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler.attach(optimizer)
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    (F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]) * float("nan")).backward()
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = scheduler.step()
    assert report is not None
    assert "no finite growth gradient" in str(caught[0].message)
    assert all(torch.equal(mask, before[name]) for name, mask in scheduler.masks.items())
    assert scheduler.budget.live == report.budget.live


def test_a_run_too_short_for_any_update_says_so(tiny_deit: Factory) -> None:
    with pytest.warns(UserWarning, match="no update fits into 50 steps, so the first masks stay; set updates"):
        SparsityScheduler(tiny_deit(), SparsityConfig(), total_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityScheduler(tiny_deit(), SparsityConfig(updates=0), total_steps=50)


def test_exploration_rate_by_hand() -> None:
    """Of 8 weights 4 are live; once 2 others have lived, 6 of 8 were explored."""
    layer = nn.Linear(4, 2, bias=False)
    scheduler = SparsityScheduler(
        layer, SparsityConfig(update_every=1, drop_fraction=0.5, regrow=False), total_steps=10
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    scheduler.attach(optimizer)
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    report = scheduler.step()
    assert report is not None
    assert (report.layers["weight"].pruned, report.layers["weight"].grown) == (2, 2)
    assert report.exploration_rate == 6 / 8
    assert report.churn == 4 / 4


def update_masks(
    model: nn.Module, batch: Batch, run: Callable[[torch.optim.Optimizer, Callable[[], Tensor]], None]
) -> Any:
    """One update of a loop of its own kind; masks and moments after it."""
    scheduler = SparsityScheduler(model, SEEDED, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    run(optimizer, lambda: F.cross_entropy(model(batch[0]), batch[1]))
    report = scheduler.step()
    assert report is not None
    assert report.churn > 0
    return scheduler.masks


def test_an_optimizer_that_runs_the_backward_pass_in_its_step(tiny_deit: Factory, tiny_batch: Batch) -> None:
    def plain(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        optimizer.step()

    def by_closure(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)

    masks = update_masks(tiny_deit(), tiny_batch, plain)
    found = update_masks(tiny_deit(), tiny_batch, by_closure)
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())


def test_a_fused_optimizer_seeds_moments_without_the_loss_scale(tiny_deit: Factory, tiny_batch: Batch) -> None:
    seeds = []
    for fused in (False, True):
        model = tiny_deit()
        scheduler = SparsityScheduler(model, SEEDED, total_steps=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        scheduler.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        before = scheduler.masks["head.weight"].clone()
        scaler.scale(F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scheduler.step() is not None
        added = scheduler.masks["head.weight"] & ~before
        seeds.append(optimizer.state[dict(model.named_parameters())["head.weight"]]["exp_avg_sq"][added])
    torch.testing.assert_close(seeds[0], seeds[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("when", ["before attach", "after attach", "while detached"])
def test_dead_weights_that_were_loaded_do_not_stay(tiny_deit: Factory, tiny_batch: Batch, when: str) -> None:
    model, dense = tiny_deit(), tiny_deit(seed=5).state_dict()
    scheduler = SparsityScheduler(model, SparsityConfig(), total_steps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if when == "before attach":
        model.load_state_dict(dense)
    scheduler.attach(optimizer)
    if when == "after attach":
        model.load_state_dict(dense)
    if when == "while detached":
        scheduler.detach()
        F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
        optimizer.step()
        scheduler.attach(optimizer)
    F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
    optimizer.step()
    scheduler.step()
    assert_invariants(scheduler, optimizer, scheduler.budget.live)


def test_micro_batches_belong_to_their_optimizer_step(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """A batch that the loop gave up is forgotten; batches before the optimizer steps are not."""

    def masks(give_up: bool, call_each_time: bool) -> dict[str, Tensor]:
        model = tiny_deit()
        scheduler = SparsityScheduler(model, SparsityConfig(update_every=1, drop_fraction=0.3), total_steps=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler.attach(optimizer)
        if give_up:
            (F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]) * float("nan")).backward()
            optimizer.zero_grad()
        for images, targets in zip(tiny_batch[0].chunk(2), tiny_batch[1].chunk(2), strict=True):
            if call_each_time:
                assert scheduler.step() is None
            F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        assert scheduler.step() is not None
        return scheduler.masks

    expected = masks(give_up=False, call_each_time=False)
    for found in (masks(give_up=True, call_each_time=False), masks(give_up=False, call_each_time=True)):
        assert all(torch.equal(mask, found[name]) for name, mask in expected.items())


@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_a_layer_without_a_gradient_is_left_alone(distribution: str) -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    config = SparsityConfig(update_every=1, drop_fraction=0.5, distribution=distribution)
    scheduler = SparsityScheduler(model, config, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    idle = scheduler.masks["idle.weight"].clone()
    for _ in range(3):
        model["used"](torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        report = scheduler.step()
        assert report is not None
        assert report.layers["idle.weight"].pruned == report.layers["idle.weight"].grown == 0
        assert report.layers["used.weight"].pruned > 0
        assert scheduler.budget.live == 64
    assert torch.equal(scheduler.masks["idle.weight"], idle)


def test_no_layer_falls_below_its_floor() -> None:
    model = nn.ModuleDict({"weak": nn.Linear(10, 10), "strong": nn.Linear(10, 10)})
    model["weak"].weight.data.mul_(1e-6)
    config = SparsityConfig(update_every=1, drop_fraction=1.0, distribution="global", grow="random", floor=0.2)
    scheduler = SparsityScheduler(model, config, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler.attach(optimizer)
    for _ in range(5):
        (model["weak"](torch.ones(1, 10)) + model["strong"](torch.ones(1, 10))).sum().backward()
        optimizer.step()
        scheduler.step()
        assert int(scheduler.masks["weak.weight"].sum()) >= 10  # a fifth of its first 50
        assert scheduler.budget.live == 100


def test_an_average_of_shared_weights_and_one_that_was_moved() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 6))
            self.out = nn.Linear(6, 6)
            self.out.weight = self.table

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.table)

    model = Tied()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1, drop_fraction=0.5), total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = copy.deepcopy(model)
    scheduler.attach(optimizer, ema=ema)
    ema.double()
    for _ in range(4):
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(weight.double(), 0.5)
        assert (ema.table[~scheduler.masks["out.weight"]] == 0).all()


def test_frozen_weights_are_named(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(), total_steps=10)
    model.get_submodule("head").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1 prunable weights are frozen, head\.weight among them; exclude them"):
        scheduler.attach(optimizer)
    model.get_submodule("head").requires_grad_(True)
    scheduler.attach(optimizer)
    assert scheduler._weights is not None
    assert len(scheduler._weights._handles) == len(scheduler.masks)


def test_seeds_are_the_mean_over_several_steps(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """The same batch twice and a learning rate of 0: the mean gradient is the gradient, not twice it."""

    def seeds(batches_each: int, every: int) -> Tensor:
        model = tiny_deit()
        config = replace(SEEDED, update_every=every, growth_batches=batches_each)
        scheduler = SparsityScheduler(model, config, total_steps=100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999))
        scheduler.attach(optimizer)
        before = scheduler.masks["head.weight"].clone()
        for _ in range(every):
            F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        added = scheduler.masks["head.weight"] & ~before
        return optimizer.state[dict(model.named_parameters())["head.weight"]]["exp_avg_sq"][added]

    torch.testing.assert_close(seeds(1, 2).sort().values, seeds(2, 2).sort().values, rtol=1e-4, atol=0)


def test_updates_zero_and_stop_zero_keep_the_first_masks(tiny_deit: Factory) -> None:
    scheduler, reports = train(tiny_deit(), SparsityConfig(updates=0, stop_at=0.0), 3)
    assert not reports
    assert scheduler.schedule.update_steps == ()


def test_the_first_masks_of_a_trained_network_hold_its_greatest_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.3, start="score", updates=0), total_steps=10)
    assert scheduler.budget.live == round(0.3 * (20 * 30 + 30 * 10))
    for name, mask in scheduler.masks.items():
        weight, after = before[name].abs(), dict(model.named_parameters())[name]
        assert weight[mask].min() > weight[~mask].max()
        assert torch.equal(after[mask], before[name][mask])
        assert not after[~mask].any()
