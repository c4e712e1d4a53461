"""What the examples have in common: a tiny DeiT, 320 images, and how sparse the network is."""

from __future__ import annotations

import hashlib

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.data.create_data import create_data
from experiments.data.data_config import DataConfig
from sparse_trainer import SparsityConfig, SparsityScheduler

EPOCHS = 2
ACCUMULATE = 2
"""Batches per optimizer step."""
TOTAL_STEPS = 20
"""Optimizer steps of the whole run."""

SPARSITY = SparsityConfig(density=0.3, head_density=0.5, neuron_density=0.75, updates=4, swap="always")
"""Two of four heads, three quarters of the neurons, and of all weights 30 % live."""


def create_model() -> nn.Module:
    """A DeiT for greyscale images of 28 pixels: 16 patches, 2 blocks of 4 heads."""
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=10,
        embed_dim=48,
        depth=2,
        num_heads=4,
    )


def create_loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    """320 Fashion-MNIST images in batches of 16, in the same order every epoch."""
    data = create_data(DataConfig(train_subset=320, eval_subset=10, batch_size=320), device="cpu", seed=0)
    images, targets = next(iter(data.train.batches(epoch=0)))
    return DataLoader(TensorDataset(images, targets), batch_size=16)


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """To be called after the scheduler, which makes the model compact."""
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def describe(scheduler: SparsityScheduler) -> str:
    """One line that two runs share only if they ended with the same live heads, neurons and weights."""
    digest = hashlib.sha256(repr((scheduler.live_heads, scheduler.live_neurons)).encode())
    for mask in scheduler.masks.values():
        digest.update(mask.cpu().numpy().tobytes())
    return f"{scheduler.step_number} steps, {scheduler.budget} prunable weights live, masks {digest.hexdigest()[:12]}"
