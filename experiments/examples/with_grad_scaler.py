"""Mixed precision with ``GradScaler``: ``python -m experiments.examples.with_grad_scaler``.

On a GPU the matrix products are float16; a CPU does the same scaling in float32. Where a gradient overflows, the
scaler leaves the optimizer's step out and the scheduler does not count it: call ``scheduler.step()`` every time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.examples import task
from sparse_trainer import SparsityScheduler


def train(device: str = "cpu", init_scale: float = 2.0**16) -> SparsityScheduler:
    """Train, and return what owns the masks."""
    model = task.create_model().to(device)
    loader = task.create_loader()
    scheduler = SparsityScheduler(model, task.SPARSITY, total_steps=task.TOTAL_STEPS)
    optimizer = task.create_optimizer(model)
    scheduler.attach(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=init_scale)

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.float16, enabled=device != "cpu"):
            return F.cross_entropy(model(images), targets)

    for _ in range(task.EPOCHS):
        for number, batch in enumerate(loader, start=1):
            images, targets = (tensor.to(device) for tensor in batch)
            scaler.scale(loss_of(images, targets) / task.ACCUMULATE).backward()
            if number % task.ACCUMULATE:
                continue
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step(partial(loss_of, images, targets))
            optimizer.zero_grad()
    return scheduler


if __name__ == "__main__":
    print(task.describe(train("cuda" if torch.cuda.is_available() else "cpu")))
