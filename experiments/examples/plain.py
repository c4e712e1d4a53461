"""Plain PyTorch, with gradient accumulation and clipping: ``python -m experiments.examples.plain``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.examples import task
from sparse_trainer import SparsityScheduler


def train() -> SparsityScheduler:
    """Train, and return what owns the masks."""
    model = task.create_model()
    loader = task.create_loader()
    scheduler = SparsityScheduler(model, task.SPARSITY, total_steps=task.TOTAL_STEPS)
    optimizer = task.create_optimizer(model)  # after the scheduler
    scheduler.attach(optimizer)

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(images), targets)

    for _ in range(task.EPOCHS):
        for number, (images, targets) in enumerate(loader, start=1):
            loss = loss_of(images, targets) / task.ACCUMULATE
            loss.backward()
            if number % task.ACCUMULATE:
                continue
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # The loss of one batch tells at an update which heads and neurons are worth their place. A run with weight
            # masks alone calls scheduler.step() without it.
            update = scheduler.step(partial(loss_of, images, targets))
            optimizer.zero_grad()
            if update is not None:
                print(f"step {update.step}: {update.churn:.1%} of the live weights changed sides")
    return scheduler


if __name__ == "__main__":
    print(task.describe(train()))
