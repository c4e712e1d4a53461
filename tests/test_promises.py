"""What is promised holds in the loops that people have: whoever writes to weights and gradients, dead weights are 0."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from torch import Tensor, nn

from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, live_network, load_sparse, save_sparse
from sparse_trainer.flops import count
from sparse_trainer.optimizer_state import moments
from sparse_trainer.prunable import prunable_weights
from tests.conftest import TINY
from tests.test_scheduler import batches

Factory = Callable[..., nn.Module]
CONFIG = SparsityConfig(density=0.5, updates=3)
STEPS = 20


def dead_that_live(scheduler: SparsityScheduler, model: nn.Module | None = None) -> int:
    """Dead weights that are not 0."""
    parameters = dict((model or scheduler.model).named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in scheduler.masks.items())


def run(
    scheduler: SparsityScheduler,
    optimizer: Any,
    *,
    steps: int = STEPS,
    gradients: Callable[[nn.Module, Tensor], None] | None = None,
    after: Callable[[nn.Module, int], None] | None = None,
) -> int:
    """Train; dead weights that a forward pass saw, summed over the steps. The budget is exact at every one."""
    model, seen = scheduler.model, 0
    live = scheduler.budget.live
    for step, (images, targets) in zip(range(steps), batches(), strict=False):
        loss = F.cross_entropy(model(images), targets)
        if gradients is None:
            loss.backward()
        else:
            gradients(model, loss)
        optimizer.step()
        if after is not None:
            after(model, step)
        scheduler.step()
        optimizer.zero_grad()
        seen += dead_that_live(scheduler)
        assert scheduler.budget.live == live
    return seen


# Gradients that somebody writes between the backward pass and the optimizer


def noise(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.01)


def noise_through_data(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad + 0.01


def centralised(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            assert parameter.grad is not None
            parameter.grad.sub_(parameter.grad.flatten(1).mean(dim=1).view(-1, *[1] * (parameter.ndim - 1)))


def assigned(model: nn.Module, loss: Tensor) -> None:
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def penalised(model: nn.Module, loss: Tensor) -> None:
    """Weight decay into the gradient of everything, by a constant."""
    loss.backward()
    torch._foreach_add_([p.grad for p in model.parameters() if p.grad is not None], 1e-3)


@pytest.mark.parametrize("gradients", [noise, noise_through_data, centralised, assigned, penalised])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_gradients_that_somebody_else_writes(tiny_deit: Factory, gradients: Any, kind: Any) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = kind(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    assert run(scheduler, optimizer, gradients=gradients) == 0
    for name, mask in scheduler.masks.items():
        for _, value in moments(optimizer, dict(scheduler.model.named_parameters())[name]):
            assert (value[~mask] == 0).all()


def test_assigned_gradients_grow_weights(tiny_deit: Factory) -> None:
    """They come by no backward hook, and the masks still change as with those that do."""
    found = []
    for gradients in (None, assigned):
        scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
        optimizer = torch.optim.SGD(scheduler.model.parameters(), lr=1e-2)
        scheduler.attach(optimizer)
        run(scheduler, optimizer, gradients=gradients)
        found.append(scheduler.masks)
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


# Weights that somebody writes


def perturb(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


class Copied:
    """Every third step all weights become those of a copy from before, as Lookahead or an average does."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        self.slow = [torch.randn(p.shape, generator=generator) * 0.02 for p in model.parameters()]

    def __call__(self, model: nn.Module, step: int) -> None:
        if step % 3 == 2:
            with torch.no_grad():
                for parameter, slow in zip(model.parameters(), self.slow, strict=True):
                    parameter.copy_(slow)


class CopiedThroughData(Copied):
    def __call__(self, model: nn.Module, step: int) -> None:
        if step % 3 == 2:
            for parameter, slow in zip(model.parameters(), self.slow, strict=True):
                parameter.data.copy_(slow)


@pytest.mark.parametrize("writer", ["perturb", "copied"])
def test_weights_that_somebody_else_writes(tiny_deit: Factory, writer: str) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    after = perturb if writer == "perturb" else Copied(scheduler.model)
    with pytest.warns(UserWarning, match=r"dead weights were written to .* scheduler\.enforce\(\)"):
        assert run(scheduler, optimizer, after=after) == 0


def test_writes_that_torch_does_not_count_are_found(tiny_deit: Factory) -> None:
    """Through ``.data``: found at the first steps, at an update, or layer by layer; then every step is enforced."""
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=60)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    after = CopiedThroughData(scheduler.model)
    model, seen = scheduler.model, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, (images, targets) in zip(range(60), batches(), strict=False):
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            after(model, step)
            scheduler.step()
            optimizer.zero_grad()
            seen.append(dead_that_live(scheduler))
    assert [w for w in caught if "dead weights were written to" in str(w.message)]
    assert scheduler.budget.live == round(0.5 * scheduler.budget.total)
    assert dead_that_live(scheduler) == 0  # what reports has put it right
    assert sum(seen[:3]) > 0  # such a write is seen only afterwards


@pytest.mark.parametrize("at", [[2], [7], [7, 9, 12]], ids=str)
def test_no_moment_of_a_dead_weight_remains_of_such_a_write(tiny_deit: Factory, at: list[int]) -> None:
    """A penalty on weights (as of Adam, not AdamW) takes what was written before the step into the moments."""
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, update_every=50), total_steps=100)
    model = scheduler.model
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    scheduler.attach(optimizer)

    def write(model: nn.Module, loss: Tensor) -> None:
        loss.backward()
        written.append(None)
        if len(written) in at:
            for name in scheduler.masks:
                model.get_parameter(name).data.add_(0.1)

    written: list[None] = []
    with pytest.warns(UserWarning, match="dead weights were written to"):
        run(scheduler, optimizer, steps=40, gradients=write)
    assert dead_that_live(scheduler) == 0
    for name, mask in scheduler.masks.items():
        for _, value in moments(optimizer, model.get_parameter(name)):
            assert not value[~mask].any()


@pytest.mark.parametrize("counted", [False, True])
def test_no_average_keeps_what_was_written_to_dead_weights(tiny_deit: Factory, counted: bool) -> None:
    """Neither when the write is found, nor where the average takes one in before it is."""
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, updates=3), total_steps=30)
    model = scheduler.model
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer, ema=ema)

    @torch.no_grad()
    def write(model: nn.Module, step: int) -> None:
        if step in (25, 28):
            for name in scheduler.masks:
                parameter = model.get_parameter(name)
                (parameter if counted else parameter.data).add_(0.1)
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 0.01)

    with pytest.warns(UserWarning, match="dead weights were written to"):
        run(scheduler, optimizer, steps=30, after=write)
    assert dead_that_live(scheduler, ema) == 0


def test_how_often_weights_are_looked_at_goes_on_after_a_restart(tiny_deit: Factory) -> None:
    def looked(stop: bool) -> list[int]:
        torch.manual_seed(0)
        scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, update_every=50), total_steps=100)
        optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
        scheduler.attach(optimizer)
        seen = []
        for step, (images, targets) in zip(range(20), batches(), strict=False):
            model = scheduler.model
            if stop and step in (5, 12):
                states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
                model = tiny_deit()
                scheduler = SparsityScheduler(model, scheduler.config, total_steps=100)
                model.load_state_dict(states[0])
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                scheduler.attach(optimizer)
                optimizer.load_state_dict(states[1])
                scheduler.load_state_dict(states[2])
            F.cross_entropy(model(images), targets).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
                if step == 7:
                    model.get_parameter("blocks.1.mlp.fc2.weight").data.add_(0.1)
                scheduler.step()
            optimizer.zero_grad()
            seen.append(dead_that_live(scheduler))
        return seen

    assert looked(True) == looked(False)
    assert sum(looked(False)) > 0


def test_an_optimizer_with_a_step_of_its_own(tiny_deit: Factory) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)

    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = Noisy(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    with pytest.warns(UserWarning, match="dead weights were written to"):
        assert run(scheduler, optimizer) == 0


def test_enforce_is_for_those_who_write_on_purpose(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    with torch.no_grad():
        for parameter in scheduler.model.parameters():
            parameter.fill_(1.0)
    assert dead_that_live(scheduler) > 0
    assert scheduler.budget.live == scheduler.budget.total  # what is in the tensors
    scheduler.enforce()
    assert dead_that_live(scheduler) == 0
    assert scheduler.budget.live == round(0.5 * scheduler.budget.total)


def test_an_average_is_enforced_with_the_model(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    average = copy.deepcopy(scheduler.model)
    scheduler.attach(torch.optim.SGD(scheduler.model.parameters(), lr=0.1), ema=average)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.fill_(1.0)
    scheduler.enforce()
    assert dead_that_live(scheduler, average) == 0


# A model has one scheduler


@pytest.mark.parametrize("config", [CONFIG, SparsityConfig(density=None, head_density=0.7, updates=3)])
def test_a_second_scheduler_is_refused(tiny_deit: Factory, config: SparsityConfig) -> None:
    model = tiny_deit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first: Any = SparsityScheduler(model, config, total_steps=STEPS)
        before = copy.deepcopy(model.state_dict())
        for whole in (model, nn.Sequential(model), nn.DataParallel(model)):
            with pytest.raises(ValueError, match=r"has a scheduler already.*resume_from=scheduler"):
                SparsityScheduler(whole, config, total_steps=STEPS)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        second = SparsityScheduler(model, config, total_steps=2 * STEPS, resume_from=first)
        assert second.live_heads == first.live_heads
        assert all(torch.equal(mask, first.masks[name]) for name, mask in second.masks.items())
        assert second.budget == first.budget
        del first
        gc.collect()
        with pytest.raises(ValueError, match="has a scheduler already"):
            SparsityScheduler(model, config, total_steps=STEPS)
        second.detach(release=True)
        third = SparsityScheduler(model, SparsityConfig(density=0.2, updates=3), total_steps=STEPS)
    assert third.budget.live == round(0.2 * third.budget.total)


def test_a_scheduler_on_a_part_is_refused(tiny_deit: Factory) -> None:
    """As on the whole: it would prune what the first left, whichever of the two is there first."""
    model = tiny_deit()
    first: Any = SparsityScheduler(model, CONFIG, total_steps=STEPS)
    before = copy.deepcopy(model.state_dict())
    blocks, layer = model.get_submodule("blocks"), model.get_submodule("blocks.1.mlp.fc1")
    for part in (blocks, layer):
        with pytest.raises(ValueError, match=r"it is a part of one that was made sparse.*resume_from=scheduler"):
            SparsityScheduler(part, CONFIG, total_steps=STEPS)
        with pytest.raises(ValueError, match="it is a part of one that was made sparse"):
            SparsityScheduler(part, CONFIG, total_steps=STEPS, resume_from=first)
    with pytest.raises(ValueError, match="its part 1 is a part of one that was made sparse"):
        SparsityScheduler(nn.Sequential(nn.Linear(24, 24), layer), CONFIG, total_steps=STEPS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    SparsityScheduler(copy.deepcopy(layer), CONFIG, total_steps=STEPS)
    second = SparsityScheduler(model, CONFIG, total_steps=STEPS, resume_from=first)
    model.add_module("blocks", nn.Identity())  # what was taken out of the model is given free with it
    second.detach(release=True)
    of_part = SparsityScheduler(blocks, CONFIG, total_steps=STEPS)
    model.add_module("blocks", blocks)
    with pytest.raises(ValueError, match=r"its part blocks was made sparse.*resume_from=scheduler"):
        SparsityScheduler(model, CONFIG, total_steps=STEPS)
    of_part.detach(release=True)
    SparsityScheduler(model, CONFIG, total_steps=STEPS)


def test_what_is_not_trained_may_be_shared() -> None:
    """An activation, and a frozen network in front, belong to no scheduler."""
    shared = nn.Sequential(nn.Linear(24, 24), nn.ReLU()).requires_grad_(False)
    config = SparsityConfig(exclude=("0.*",), updates=3)
    kept = [SparsityScheduler(nn.Sequential(shared, nn.Linear(24, 24)), config, total_steps=STEPS) for _ in range(2)]
    assert all(list(scheduler.masks) == ["1.weight"] for scheduler in kept)


def test_a_copy_of_the_model_is_free(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    SparsityScheduler(copy.deepcopy(scheduler.model), CONFIG, total_steps=STEPS)
    buffer = io.BytesIO()
    torch.save(scheduler.model, buffer)
    buffer.seek(0)
    SparsityScheduler(torch.load(buffer, weights_only=False), CONFIG, total_steps=STEPS)


# Refused before anything is changed


def frozen(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.1.mlp.fc1").requires_grad_(False)
    return model


def adapted(model: nn.Module) -> nn.Module:
    """As LoRA does: every base weight is frozen, and small matrices beside them train."""
    model.requires_grad_(False)
    model.add_module("adapter", nn.Linear(24, 2))
    return model


def weak_first_block(model: nn.Module) -> nn.Module:
    """Its units have the least scores, so more of the other block are live."""
    with torch.no_grad():
        for layer in ("blocks.0.attn.proj", "blocks.0.mlp.fc2"):
            model.get_parameter(f"{layer}.weight").mul_(0.01)
    return model


UNITS = {"head_density": 2 / 3, "neuron_density": 0.5, "start": "score"}
WRONG: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "frozen": (frozen, {"density": 0.5}),
    "frozen, with units": (frozen, {"density": None, "head_density": 0.7, "neuron_density": 0.5}),
    "low-rank adapters": (adapted, {"density": 0.5}),
    "too few": (lambda model: model, {"density": 1e-5}),
    "more than there are": (lambda model: model, {"density": None, "live_parameters": 10**9}),
    "more than units leave": (lambda model: model, {"density": 0.9, "head_density": 0.4, "neuron_density": 0.4}),
    "no head": (lambda model: model, {"head_density": 0.1}),
    "no name": (lambda model: model, {"exclude": ("nothing",)}),
    "no block": (lambda model: nn.Sequential(nn.Linear(4, 4)), {"head_density": 0.7}),
    "no loss": (lambda model: model, {"start": "score", "head_density": 0.7}),
    "a small layer is left empty": (lambda model: model, {"density": 0.0011, "distribution": "uniform"}),
    "a budget that is not met with the units of greatest score": (
        weak_first_block,
        {"pattern": "2:4", "density": 0.285, "exclude": ("blocks.0.*",), "unit_distribution": "by_score", **UNITS},
    ),
    "units that count elsewhere only": (
        lambda model: model,
        {"density": 0.2, "exclude": ("blocks.0.mlp.*",), "unit_distribution": "global", **UNITS},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_leaves_the_model_alone(tiny_deit: Factory, case: str) -> None:
    change, settings = WRONG[case]
    model = change(tiny_deit())
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    images, targets = next(batches())
    closure = None if case == "no loss" else lambda: F.cross_entropy(model(images), targets)
    with pytest.raises(ValueError, match=r"\w"):
        SparsityScheduler(model, SparsityConfig(updates=2, **settings), total_steps=STEPS, closure=closure)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(id(after[name]) == identity for name, (identity, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert not any(hasattr(module, "_sparsity_owner") for module in model.modules())


def test_what_attach_refuses_changes_nothing(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    model = scheduler.model
    before = copy.deepcopy(model.state_dict())
    head = [p for name, p in model.named_parameters() if name.startswith("head")]
    for wrong in (
        torch.optim.Rprop(model.parameters()),
        torch.optim.SGD(head, lr=0.1),
        [],
        "adamw",
        [torch.optim.SGD(head, lr=0.1), torch.optim.Rprop(head)],
    ):
        with pytest.raises(ValueError, match=r"\w"):
            scheduler.attach(wrong)  # type: ignore[arg-type]
        assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scheduler.attach(torch.optim.SGD(model.parameters(), lr=0.1))


# Copies, other optimizers, frozen and replaced layers


def test_copies_go_on_by_themselves(tiny_deit: Factory) -> None:
    original = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(original.model.parameters(), lr=1e-2)
    original.attach(optimizer)
    run(original, optimizer, steps=2)
    _, twin_optimizer, twin = copy.deepcopy((original.model, optimizer, original))
    stored = io.BytesIO()
    torch.save((original.model, optimizer, original), stored)
    stored.seek(0)
    _, loaded_optimizer, loaded = torch.load(stored, weights_only=False)
    alone = copy.deepcopy(original)  # brings its own model and optimizer
    (alone_optimizer,) = alone._following.optimizers.members
    for scheduler, own in ((original, optimizer), (twin, twin_optimizer), (loaded, loaded_optimizer)):
        assert run(scheduler, own, steps=STEPS) == 0
    assert run(alone, alone_optimizer) == 0
    for scheduler in (twin, loaded, alone):
        assert scheduler._updates == original._updates == 3
        assert scheduler.model is not original.model
        assert all(torch.equal(mask, original.masks[name]) for name, mask in scheduler.masks.items())


def test_another_optimizer_than_the_attached_one(tiny_deit: Factory) -> None:
    for kind, options in ((torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {}), (torch.optim.Rprop, {})):
        scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
        scheduler.attach(torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2))
        with pytest.raises(RuntimeError, match="not by the optimizer that the scheduler is attached to"):
            run(scheduler, kind(scheduler.model.parameters(), lr=1e-2, **options), steps=3)


def test_frozen_and_thawed_in_mid_training(tiny_deit: Factory) -> None:
    config = SparsityConfig(density=0.4, neuron_density=0.5, updates=6, swap="always")
    scheduler = SparsityScheduler(tiny_deit(), config, total_steps=STEPS)
    model = scheduler.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)

    def steps(count: int) -> list[Any]:
        found = []
        for _, (images, targets) in zip(range(count), batches(), strict=False):
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            found.append(scheduler.step(lambda i=images, t=targets: F.cross_entropy(model(i), t)))
            optimizer.zero_grad()
        return [update for update in found if update is not None]

    steps(4)
    block = model.get_submodule("blocks.0").requires_grad_(False)
    neurons = scheduler.live_neurons["blocks.0"]
    weights = copy.deepcopy(block.state_dict())
    masks = {name: mask.clone() for name, mask in scheduler.masks.items()}
    updates = steps(8)
    assert updates
    assert scheduler.live_neurons["blocks.0"] == neurons
    assert all(torch.equal(value, weights[name]) for name, value in block.state_dict().items())
    for name, mask in scheduler.masks.items():
        still = name.startswith("blocks.0.") or bool(mask.all())
        assert torch.equal(mask, masks[name]) == still, name
    block.requires_grad_(True)
    assert steps(8)
    assert any(not torch.equal(m, masks[name]) for name, m in scheduler.masks.items() if name.startswith("blocks.0."))
    assert dead_that_live(scheduler) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.2, "head_density": 0.67, "neuron_density": 0.5, "unit_falls": 2},
        {"density": 0.4, "initial_density": 0.8},
        {
            "density": 0.4,
            "head_density": 0.67,
            "neuron_density": 0.5,
            "unit_distribution": "global",
            "distribution": "uniform",
            "swap": "always",
            "probation": 0,
        },
    ],
    ids=["units fall", "the budget falls", "units move"],
)
@pytest.mark.filterwarnings("ignore:.*is rounded to:UserWarning", "ignore:what came back:UserWarning")
def test_what_is_frozen_stays_whatever_else_changes(tiny_deit: Factory, settings: dict[str, Any]) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1, **settings), total_steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    block = model.get_submodule("blocks.0").requires_grad_(False)
    before = copy.deepcopy(block.state_dict())
    masks = {name: mask.clone() for name, mask in scheduler.masks.items() if name.startswith("blocks.0.")}
    for _, (images, targets) in zip(range(STEPS), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        scheduler.step(lambda i=images, t=targets: F.cross_entropy(model(i), t))  # type: ignore[misc]
        optimizer.zero_grad()
        assert scheduler.budget.live == scheduler.target
        assert dead_that_live(scheduler) == 0
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(torch.equal(mask, scheduler.masks[name]) for name, mask in masks.items())


def test_a_copy_that_is_made_while_layers_are_frozen(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    scheduler.model.requires_grad_(False).get_submodule("head").requires_grad_(True)
    model, adamw, copied = copy.deepcopy((scheduler.model, optimizer, scheduler))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2
    model.requires_grad_(True)
    run(copied, adamw)
    assert copied.budget.live == copied.target
    assert dead_that_live(copied) == 0


@pytest.mark.parametrize(("every", "freeze", "thaw", "stop"), [(8, 3, 12, 5), (20, 5, 15, 17), (20, 5, 15, 15)])
def test_a_copy_goes_on_alike_where_layers_thaw(
    tiny_deit: Factory, every: int, freeze: int, thaw: int, stop: int
) -> None:
    """Also while the gradient that grows weights is collected."""
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, update_every=every), total_steps=100)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=3e-3)
    scheduler.attach(optimizer)

    def grown(scheduler: SparsityScheduler, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[int]:
        found = []
        for step, (images, targets) in enumerate(batches()):
            if step == last:
                break
            if step < first:
                continue
            if step in (freeze, thaw):
                scheduler.model.get_submodule("blocks.0").requires_grad_(step == thaw)
            F.cross_entropy(scheduler.model(images), targets).backward()
            optimizer.step()
            update = scheduler.step()
            optimizer.zero_grad()
            if update is not None:
                found.append(sum(layer.grown for n, layer in update.layers.items() if n.startswith("blocks.0")))
        return found

    grown(scheduler, optimizer, 0, stop)
    copied, adamw = copy.deepcopy((scheduler, optimizer))
    ours = grown(scheduler, optimizer, stop, 50)
    assert ours == grown(copied, adamw, stop, 50)
    assert sum(ours) > 0
    assert all(torch.equal(mask, copied.masks[name]) for name, mask in scheduler.masks.items())


def test_a_layer_that_is_replaced_is_noticed(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    scheduler.model.reset_classifier(5)  # type: ignore[operator]
    optimizer.add_param_group({"params": list(scheduler.model.head.parameters())})  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"head\.weight is another parameter"):
        run(scheduler, optimizer, steps=1)


# Where a block is compiled alone, torch.compile looks at the gradient of what comes in.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")
def test_a_layer_that_is_wrapped_is_called_so(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters())
    scheduler.attach(optimizer)
    block = scheduler.model.get_submodule("blocks.1")
    scheduler.model.get_submodule("blocks").add_module("1", torch.compile(block, backend="eager"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"blocks\.1\..* is in a layer that OptimizedModule wraps"):
        run(scheduler, optimizer, steps=1)


# Layers of all kinds


class Zoo(nn.Module):
    """A layer of each kind, in one network over ``[B, 4, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 1)
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 1), padding=(0, 1, 0))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
        self.pair = nn.Bilinear(8, 8, 6)
        self.words = nn.Embedding(30, 8)
        self.slow = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.pruned = nn.utils.prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.up(self.conv(images))
        x = x + self.conv3(x[:, :1].unsqueeze(1)).mean(dim=1)
        x = self.conv1(x.flatten(2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, x[..., :4].contiguous(), x[..., :6].contiguous(), need_weights=False)[0]
        x = self.pruned(self.slow(x + self.words.weight.mean(dim=0)))
        return self.head(self.pair(x, x).mean(dim=1))


def test_layers_of_all_kinds() -> None:
    torch.manual_seed(0)
    model = Zoo()
    with pytest.warns(UserWarning, match=r"weights stay dense and are in no budget.*words\.weight.*exclude="):
        scheduler = SparsityScheduler(model, CONFIG, total_steps=STEPS)
    assert set(scheduler.masks) == {
        *("conv.weight", "up.weight", "conv1.weight", "conv3.weight", "attention.in_proj_weight"),
        *("attention.out_proj.weight", "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight"),
        *("cross.out_proj.weight", "pair.weight", "head.weight"),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    live, generator = scheduler.budget.live, torch.Generator().manual_seed(0)
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}
    for _ in range(STEPS):
        model(torch.randn(4, 4, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert dead_that_live(scheduler) == 0
        assert scheduler.budget.live == live == round(0.5 * scheduler.budget.total)
    assert any(not torch.equal(mask, before[name]) for name, mask in scheduler.masks.items())


def test_what_stays_dense_can_be_said_to_be_meant() -> None:
    model = Zoo()
    names = ("words.weight", "slow.*", "pruned.*")
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.5, updates=3, exclude=names), total_steps=STEPS)
    assert "words.weight" not in scheduler.masks


def test_attention_of_torchvision() -> None:
    """All matrices of ViT-B/16 are in the budget, and ``in_proj_weight`` is three of them to ERK."""
    with torch.device("meta"):
        large = torchvision.models.vit_b_16()
    matrices = sum(p.numel() for name, p in large.named_parameters() if p.ndim > 1 and p.shape[0] > 1)
    assert sum(weight.numel() for weight in prunable_weights(large).values()) == matrices
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
    )
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.3, updates=3), total_steps=STEPS)
    layer = "encoder.layers.encoder_layer_0.self_attention"
    thirds, whole = scheduler.masks[f"{layer}.in_proj_weight"], scheduler.masks[f"{layer}.out_proj.weight"]
    assert abs(int(thirds.sum()) - 3 * int(whole.sum())) <= 3
    counted = count(model, scheduler.masks, input_size=(3, 32, 32))
    tokens = 17
    assert counted.layers[f"{layer}.in_proj_weight"].macs == tokens * 3 * 32 * 32
    assert counted.layers[f"{layer}.out_proj.weight"].live_macs == pytest.approx(tokens * int(whole.sum()))


# Going on from a sparse file, and from another scheduler


@pytest.mark.filterwarnings("ignore:pattern. 4.weight has single weights:UserWarning")
def test_going_on_after_a_budget_that_fell_in_blocks() -> None:
    """One layer has single weights then, so that every budget on the way is met exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    settings: dict[str, Any] = {"density": 0.25, "pattern": "4x1", "distribution": "uniform", "update_every": 1}

    def trained(scheduler: SparsityScheduler) -> list[int]:
        """Live weights after each step."""
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler.attach(optimizer)
        live = []
        for _ in range(10):
            model(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            live.append(scheduler.budget.live)
            assert dead_that_live(scheduler) == 0
        return live

    former = SparsityScheduler(model, SparsityConfig(initial_density=1.0, **settings), total_steps=10)
    last = trained(former)[-1]
    scheduler = SparsityScheduler(model, SparsityConfig(**settings), total_steps=10, resume_from=former)
    assert trained(scheduler) == [last] * 10
    scheduler.detach(release=True)
    other = SparsityConfig(density=0.25, pattern="8x1", updates=0)
    with pytest.raises(ValueError, match=r"resume_from: the mask of \S+ is not of pattern 8x1"):
        SparsityScheduler(model, other, total_steps=10, resume_from=scheduler.live_network)


@pytest.mark.filterwarnings("ignore:pattern. ")
def test_going_on_with_fewer_classes_than_the_layer_of_single_weights_has_weights(tiny_deit: Factory) -> None:
    config = SparsityConfig(density=0.503, pattern="4x1", updates=2)
    model: Any = tiny_deit(num_classes=100)
    former = SparsityScheduler(model, config, total_steps=6)
    single = former.masks["patch_embed.proj.weight"].clone()
    model.reset_classifier(10)
    scheduler = SparsityScheduler(model, config, total_steps=6, resume_from=former)
    assert torch.equal(scheduler.masks["patch_embed.proj.weight"], single)


def save(path: Any, scheduler: SparsityScheduler) -> None:
    info = SparseInfo(
        model="deit_tiny_patch16_224",
        model_args=TINY,
        budget=scheduler.budget,
        macs=1,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
        live_heads=scheduler.live_heads,
        live_neurons=scheduler.live_neurons,
    )
    save_sparse(path, scheduler.model, masks=scheduler.masks, info=info)


@pytest.fixture
def trained(tiny_deit: Factory, tmp_path: Any) -> Any:
    """A sparse file of a network with masks, heads and neurons, and its scheduler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SparsityConfig(density=0.3, head_density=0.67, neuron_density=0.5, updates=0)
        scheduler = SparsityScheduler(tiny_deit(), config, total_steps=STEPS)
    save(tmp_path / "sparse.safetensors", scheduler)
    return tmp_path / "sparse.safetensors", scheduler


def test_going_on_from_a_sparse_file(trained: Any) -> None:
    path, former = trained
    model = load_sparse(path)
    before = copy.deepcopy(model.state_dict())
    config = SparsityConfig(density=0.3, head_density=0.67, neuron_density=0.5, updates=3, swap="always")
    scheduler = SparsityScheduler(model, config, total_steps=STEPS, resume_from=live_network(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scheduler.budget == former.budget
    assert scheduler.live_heads == former.live_heads
    assert scheduler.dense_neurons == former.dense_neurons
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    updates = []
    for _, (images, targets) in zip(range(STEPS), batches(), strict=False):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        updates.append(scheduler.step(lambda i=images, t=targets: F.cross_entropy(model(i), t)))
        optimizer.zero_grad()
        assert scheduler.budget == former.budget
    assert dead_that_live(scheduler) == 0
    assert sum(update is not None for update in updates) == 3
    save(path.with_name("again.safetensors"), scheduler)


@pytest.mark.parametrize("change", ["classes", "size", "channels"])
def test_going_on_with_other_shapes(trained: Any, change: str) -> None:
    path, former = trained
    model: Any = load_sparse(path)
    if change == "classes":
        model.reset_classifier(9)
    elif change == "size":
        model.set_input_size(img_size=32)
    else:
        model.patch_embed.proj = nn.Conv2d(3, 24, 4, 4)
    config = SparsityConfig(density=0.3, head_density=0.67, neuron_density=0.5, updates=3)
    scheduler = SparsityScheduler(model, config, total_steps=STEPS, resume_from=live_network(path))
    for name, mask in scheduler.masks.items():
        old = former.masks[name]
        if mask.shape == old.shape:
            assert torch.equal(mask, old)
        else:
            assert float(mask.float().mean()) == pytest.approx(float(old.float().mean()), abs=1 / old.numel())
    assert dead_that_live(scheduler) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.5, "head_density": 0.67, "neuron_density": 0.5}, r"give density=0\.3"),
        ({"density": None, "head_density": 0.67, "neuron_density": 0.5}, "it has weight masks"),
        ({"density": 0.3, "head_density": 1.0, "neuron_density": 0.5}, r"give head_density=0\.6667"),
    ],
)
def test_going_on_under_another_budget_is_refused(trained: Any, settings: dict[str, Any], message: str) -> None:
    path, _ = trained
    model = load_sparse(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        SparsityScheduler(model, SparsityConfig(updates=0, **settings), total_steps=9, resume_from=live_network(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Optimizers


def test_muon_stays_within_the_masks(tiny_deit: Factory) -> None:
    """Its step is dense before the mask; the usual pair: Muon for matrices, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    named = dict(scheduler.model.named_parameters())
    flat = [name for name in scheduler.masks if named[name].ndim == 2]
    muon = torch.optim.Muon([named[name] for name in flat], lr=1e-2)
    rest = torch.optim.AdamW([p for name, p in named.items() if name not in flat], lr=1e-2)
    with pytest.raises(ValueError, match="lacks 9 prunable parameters"):
        scheduler.attach(rest)
    scheduler.attach([muon, rest])
    before = {name: mask.clone() for name, mask in scheduler.masks.items()}

    class Both:
        def step(self) -> None:
            muon.step()
            rest.step()

        def zero_grad(self) -> None:
            muon.zero_grad()
            rest.zero_grad()

    assert run(scheduler, Both()) == 0
    assert scheduler.step_number == STEPS
    assert scheduler._updates == 3
    assert any(not torch.equal(mask, before[name]) for name, mask in scheduler.masks.items())
    for name in flat:
        for _, value in moments(muon, named[name]):
            assert (value[~scheduler.masks[name]] == 0).all()


# Saving the object, compiling, the end of a schedule


def test_the_model_can_be_saved_while_attached(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    run(scheduler, optimizer, steps=2)
    images, _ = next(batches())
    stored = io.BytesIO()
    torch.save(scheduler.model, stored)
    stored.seek(0)
    model = torch.load(stored, weights_only=False)
    assert torch.equal(model(images), scheduler.model(images))
    model.load_state_dict(scheduler.model.state_dict())  # whose hooks are gone
    assert torch.equal(copy.deepcopy(scheduler.model)(images), scheduler.model(images))


def test_compiled_as_one_graph(tiny_deit: Factory) -> None:
    scheduler = SparsityScheduler(tiny_deit(), CONFIG, total_steps=STEPS)
    optimizer = torch.optim.AdamW(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    compiled = torch.compile(scheduler.model, fullgraph=True, backend="aot_eager")
    for _, (images, targets) in zip(range(4), batches(), strict=False):
        F.cross_entropy(compiled(images), targets).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert dead_that_live(scheduler) == 0
    images, _ = next(batches())
    exported = torch.export.export(scheduler.model.eval(), (images,)).module()
    torch.testing.assert_close(exported(images), scheduler.model(images))


def test_a_schedule_that_was_not_reached_is_said(tiny_deit: Factory) -> None:
    """total_steps was counted in micro-batches, of which four make a step."""
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, updates=8), total_steps=40)
    optimizer = torch.optim.SGD(scheduler.model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    run(scheduler, optimizer, steps=10)
    with pytest.warns(UserWarning, match=r"10 of 40 optimizer steps and 2 of 8 updates came; total_steps counts steps"):
        scheduler.detach()


def shard(rank: int, size: int, address: str) -> None:
    """FSDP2 on gloo processes: refused in our own words, before the scheduler is built and after."""
    import timm
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from tests.conftest import TINY

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        model = timm.create_model("deit_tiny_patch16_224", **TINY)
        scheduler = SparsityScheduler(model, CONFIG, total_steps=STEPS)
        fully_shard(model)
        with pytest.raises(RuntimeError, match=r"patch_embed\.proj\.weight is another parameter"):
            scheduler.attach(torch.optim.AdamW(model.parameters()))
        other = timm.create_model("deit_tiny_patch16_224", **TINY)
        fully_shard(other)
        with pytest.raises(ValueError, match=r"spread over processes .*fully_shard.*DistributedDataParallel"):
            SparsityScheduler(other, CONFIG, total_steps=STEPS)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_parameters_are_refused(size: int, tmp_path: Any) -> None:
    address = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(shard, (size, address), nprocs=size)
