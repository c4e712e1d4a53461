"""Copies, frozen and replaced layers, and layers of all kinds, are masked as others are."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from torch import Tensor, nn

from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.flops import count
from sparse_trainer.prunable import prunable_weights
from tests.test_promises import CONFIG, STEPS, Factory, dead_that_live, run
from tests.test_scheduler import batches

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
