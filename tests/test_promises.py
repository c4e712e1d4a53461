"""What is promised holds in the loops that people have: whoever writes to weights and gradients, dead weights are 0."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.optimizer_state import moments
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
