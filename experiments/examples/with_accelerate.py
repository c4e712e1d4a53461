"""Hugging Face Accelerate: ``python -m experiments.examples.with_accelerate``.

The scheduler is built on the bare model before ``prepare``, and attached to the optimizer after it, when everything
lies on its device.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from experiments.examples import task
from sparse_trainer import SparsityScheduler


def train(folder: Path | None = None, epochs: int = task.EPOCHS) -> SparsityScheduler:
    """Train, and return what owns the masks.

    Args:
        folder: where to save after each epoch; if one was saved there, training goes on after it.
    """
    accelerator = Accelerator(gradient_accumulation_steps=task.ACCUMULATE)
    bare_model = task.create_model()
    scheduler = SparsityScheduler(bare_model, task.SPARSITY, total_steps=task.TOTAL_STEPS)
    optimizer = task.create_optimizer(bare_model)
    model, optimizer, loader = accelerator.prepare(bare_model, optimizer, task.create_loader())
    scheduler.attach(optimizer)
    accelerator.register_for_checkpointing(scheduler)  # save_state and load_state carry the masks
    if folder is not None and folder.exists():
        accelerator.load_state(str(folder))

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(bare_model(images), targets)

    for _ in range(scheduler.step_number * task.EPOCHS // task.TOTAL_STEPS, epochs):
        for images, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step(partial(loss_of, images, targets))  # where the optimizer did not step, neither does it
                optimizer.zero_grad()
        if folder is not None:
            accelerator.save_state(str(folder))
    return scheduler


if __name__ == "__main__":
    print(task.describe(train()))
