"""What heads and neurons are worth, whatever the model and the loop are; and that nothing remains of a probe."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.unit_scores import gate_scores, probing
from sparse_trainer.units import UnitGroup, find_blocks
from tests.conftest import TINY, VITS
from tests.test_unit_swaps import Batch, Factory, prepare, structured, train_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is rounded to:UserWarning", "ignore:.*growth changes nothing:UserWarning"
)


def copies(model: nn.Module, units: list[int]) -> list[tuple[UnitGroup, Mapping[str, Tensor]]]:
    """Every group of a model, with copies of some of its live units as candidates."""
    parameters = dict(model.named_parameters())
    groups = [group for block in find_blocks(model).values() for group in (block.heads, block.neurons)]
    return [(g, {part.name: part.take(parameters[part.name].detach(), units) for part in g.slices}) for g in groups]


TOP_K = {"kind": "top_k", "stages": [1], "keep_ratio": 0.5}
THRESHOLDS = {"kind": "threshold", "stages": [1], "thresholds": [0.05], "temperature": 1000.0}


def selecting(selector: dict[str, Any] | None) -> nn.Module:
    torch.manual_seed(0)
    return create_model("deit_tiny_patch16_224", selector=selector, **TINY)


@pytest.mark.parametrize("kind", [*VITS, "top_k", "threshold"])
def test_a_copy_of_a_live_unit_scores_like_it(tiny_deit: Factory, tiny_batch: Batch, kind: str) -> None:
    selectors = {"top_k": TOP_K, "threshold": THRESHOLDS}
    model = selecting(selectors[kind]) if kind in selectors else tiny_deit(**VITS[kind])
    units = [2, 0]
    with probing(model, copies(model, units)) as gates:
        scores = gate_scores(lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]), gates)
    for gate, score in zip(gates, scores, strict=True):
        assert score.size.shape == score.gain.shape == (gate.live + 2,)
        assert bool((score.size[units] > 0).all())
        torch.testing.assert_close(score.size[gate.live :], score.size[units], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(score.gain[gate.live :], score.gain[units], rtol=1e-3, atol=1e-8)


def test_candidates_change_neither_the_loss_nor_the_scores_of_the_live(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()
    losses, scores = [], []
    for groups in (copies(model, []), copies(model, [1]), copies(model, [0, 1, 2])):

        def closure() -> Tensor:
            losses.append(F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]))
            return losses[-1]

        with probing(model, groups) as gates:
            scores.append(gate_scores(closure, gates))
    plain = F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])
    for loss in losses:
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for alone, few, many in zip(*scores, strict=True):
        live = len(alone.size)
        torch.testing.assert_close(few.size[:live], alone.size, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(many.gain[:live], alone.gain, rtol=1e-4, atol=1e-8)


def test_a_probe_of_several_forward_passes_adds_them_up(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """As where a large batch is taken in parts: the sum of what each part gives by itself."""
    model = tiny_deit()
    images, targets = tiny_batch

    def scores_of(*parts: slice) -> list[Tensor]:
        def closure() -> Tensor:
            return sum((F.cross_entropy(model(images[part]), targets[part]) for part in parts), torch.zeros(()))

        with probing(model, copies(model, [0, 1])) as gates:
            return [torch.cat([score.size, score.gain]) for score in gate_scores(closure, gates)]

    first, second, both = scores_of(slice(0, 5)), scores_of(slice(5, 8)), scores_of(slice(0, 5), slice(5, 8))
    for one, other, together in zip(first, second, both, strict=True):
        torch.testing.assert_close(together, one + other, rtol=1e-4, atol=1e-8)


def test_what_has_no_part_in_the_loss_is_worth_nothing(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit()

    def closure() -> Tensor:
        model(tiny_batch[0])
        return dict(model.named_parameters())["head.bias"].sum()

    with probing(model, copies(model, [0, 1])) as gates:
        scores = gate_scores(closure, gates)
    for gate, score in zip(gates, scores, strict=True):
        assert torch.equal(score.size, torch.zeros(gate.live + 2))
        assert torch.equal(score.gain, torch.zeros(gate.live + 2))


@pytest.mark.parametrize("kind", ["pieces", "hooks", "nested", "adversarial", "penalty"])
def test_candidates_are_scored_as_the_loop_runs_the_model(tiny_deit: Factory, tiny_batch: Batch, kind: str) -> None:
    """A copy of a live unit scores like it, whatever is done to the model and with it."""
    images, targets = tiny_batch
    inner: Any = tiny_deit()
    model: nn.Module = inner
    block = inner.blocks[1]

    def closure() -> Tensor:
        return F.cross_entropy(model(images), targets)

    if kind == "pieces":
        block.forward = lambda x, **_: (
            x + block.attn(block.norm1(x)) + block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x))))
        )
    elif kind == "hooks":
        block.attn.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 2, *arguments[1:]))
        block.mlp.fc2.register_forward_hook(lambda _, arguments, output: output * 3)
        block.mlp.register_forward_hook(lambda _, arguments, output: output * torch.linspace(0, 1, output.shape[-1]))
    elif kind == "nested":
        model = nn.Sequential(nn.Identity(), selecting(THRESHOLDS))
    else:

        def closure() -> Tensor:
            x = images.clone().requires_grad_()
            loss = F.cross_entropy(model(x), targets)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=kind == "penalty")
            if kind == "penalty":
                return loss + 100 * gradient.square().sum()
            return F.cross_entropy(model(images + 0.03 * gradient.sign()), targets)

    with sdpa_kernel(SDPBackend.MATH), probing(model, copies(model, [2, 0])) as gates:
        scores = gate_scores(closure, gates)
    for gate, score in zip(gates, scores, strict=True):
        torch.testing.assert_close(score.size[gate.live :], score.size[[2, 0]], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(score.gain[gate.live :], score.gain[[2, 0]], rtol=1e-2, atol=1e-7)


def test_a_part_of_a_model_may_pack_its_tokens(tiny_batch: Batch) -> None:
    """Scores are by image, also where the model that packs lies within another one."""
    inner = selecting(THRESHOLDS)
    found = []
    for model in (inner, nn.Sequential(nn.Identity(), inner)):
        with probing(model, copies(model, [])) as gates:
            found.append(gate_scores(lambda model=model: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]), gates))
    for plain, nested in zip(*found, strict=True):
        assert torch.equal(plain.size, nested.size)


def test_gate_scores_equal_their_definition(tiny_deit: Factory, tiny_batch: Batch) -> None:
    """Live: mean over samples of |sum(A * dL/dA)|; a candidate: the finite difference of its gate."""
    model = tiny_deit().double()
    images, targets = tiny_batch[0].double(), tiny_batch[1]
    scheduler = SparsityScheduler(model, structured(neuron_density=1.0), total_steps=10)
    assert scheduler._units is not None
    groups = scheduler._units.groups
    for group in groups:
        group.candidates = {name: value.double() for name, value in group.candidates.items()}
    with probing(model, [(group.group, group.candidates) for group in groups]) as gates:
        scores = gate_scores(lambda: F.cross_entropy(model(images), targets), gates)
    activations: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        activations.append(arguments[0])

    handles = [group.group.writer.register_forward_pre_hook(keep) for group in groups]
    F.cross_entropy(model(images), targets, reduction="none").sum().backward()
    for handle in handles:
        handle.remove()
    for activation, score in zip(activations, scores, strict=True):
        assert activation.grad is not None
        by_head = (activation * activation.grad).unflatten(2, (2, 8)).sum(dim=(1, 3)).abs().mean(dim=0)
        torch.testing.assert_close(score.size[:2].double(), by_head.detach(), rtol=1e-5, atol=1e-9)

    def loss_with_gate(value: float) -> Tensor:
        opened = copy.deepcopy(model)
        group, parameters = find_blocks(opened)["blocks.0"].heads, dict(opened.named_parameters())
        for part in group.slices:
            coming = groups[0].candidates[part.name] * (value if part in group.outputs else 1.0)
            parameters[part.name].data = part.join(parameters[part.name].data, coming)
        group.set_count(3)
        with torch.no_grad():
            return F.cross_entropy(opened(images), targets, reduction="none")

    step = 1e-4
    slope = (loss_with_gate(step) - loss_with_gate(-step)) / (2 * step)
    torch.testing.assert_close(scores[0].size[2].double(), slope.abs().mean(), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(scores[0].gain[2].double(), -slope.mean(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("distribution", ["uniform", "by_score", "global"])
def test_where_rounding_leaves_all_units_live_nothing_is_scored(tiny_deit: Factory, distribution: str) -> None:
    config = SparsityConfig(
        density=None, head_density=0.9, neuron_density=0.999, start="score", unit_distribution=distribution, updates=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SparsityScheduler(tiny_deit(), config, total_steps=10, closure=lambda: torch.zeros(()))
    assert scheduler.budget.live == scheduler.budget.total
    assert not scheduler.needs_closure


def test_the_probe_leaves_no_trace(tiny_deit: Factory, tiny_batch: Batch) -> None:
    model = tiny_deit(drop_path_rate=0.3, proj_drop_rate=0.1)
    model.register_buffer("running", torch.zeros(1))
    scheduler, optimizer, ema = prepare(model, structured(swap="if_better"))
    train_step(model, scheduler, optimizer, ema, 0)
    assert scheduler._units is not None
    groups = scheduler._units.groups
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random_states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    layout = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]

    def closure() -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        model.get_buffer("running").add_(1)
        return F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])

    with probing(model, [(group.group, group.candidates) for group in groups]) as gates:
        gate_scores(closure, gates)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identities
    for old, new in ((before[0], model.state_dict()), (before[1]["state"][0], optimizer.state_dict()["state"][0])):
        assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert (np.random.get_state()[1] == random_states[2]).all()  # noqa: NPY002
    assert layout == [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert {block.heads.owner.num_heads for block in find_blocks(model).values()} == {2}


def test_an_interrupted_probe_leaves_no_trace_either(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler, optimizer, _ = prepare(model, structured())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    optimizer.step()

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler.step(closure)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert find_blocks(model)["blocks.0"].heads.owner.num_heads == 2


def test_gradient_checkpointing_gives_the_same_scores(tiny_deit: Factory, tiny_batch: Batch) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_deit()
        scheduler = SparsityScheduler(model, structured(), total_steps=10)
        model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        assert scheduler._units is not None
        groups = [(group.group, group.candidates) for group in scheduler._units.groups]
        with probing(model, groups) as gates:
            found.append(gate_scores(lambda model=model: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]), gates))  # type: ignore[misc]
    assert all(torch.allclose(plain.size, again.size) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("selector", [None, TOP_K], ids=["plain", "top_k"])
def test_a_probe_inside_autocast(tiny_batch: Batch, selector: dict[str, Any] | None) -> None:
    """Autocast keeps weights that it has cast; the probe must see its own, and the loop its own again."""
    model = selecting(selector)
    scheduler, optimizer, _ = prepare(model, structured())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(tiny_batch[0]), tiny_batch[1]).backward()
            optimizer.step()
            assert scheduler.step(lambda: F.cross_entropy(model(tiny_batch[0]), tiny_batch[1])) is not None
        optimizer.zero_grad()
