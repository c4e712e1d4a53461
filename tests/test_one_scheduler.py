"""A model has one scheduler, what does not fit is refused, and another scheduler or a file goes on from it."""

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
from torch import nn

from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, live_network, load_sparse, save_sparse
from tests.conftest import TINY
from tests.test_promises import CONFIG, STEPS, Factory, dead_that_live
from tests.test_scheduler import batches

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
