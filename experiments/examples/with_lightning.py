"""Lightning: ``python -m experiments.examples.with_lightning``. ``SparsityCallback`` can be copied as it is.

Lightning's own training loop stays: accumulation, clipping, precision and checkpoints are the trainer's arguments.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.examples import task
from sparse_trainer import SparsityConfig, SparsityScheduler


class SparsityCallback(lightning.Callback):
    """Makes ``module.model`` sparse. ``module.loss(images, targets)`` ranks heads and neurons."""

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config
        self.scheduler: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":  # before configure_optimizers, since the model becomes compact here
            total_steps = int(trainer.estimated_stepping_batches)
            former = self.scheduler  # of an earlier fit, or of a search for a learning rate
            if former is not None:
                former.detach()
            own = former if former is not None and former.model is pl_module.model else None
            self.scheduler = SparsityScheduler(pl_module.model, self.config, total_steps=total_steps, resume_from=own)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.scheduler.attach(trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.scheduler.step(partial(pl_module.loss, *batch))  # where the optimizer did not step, neither does it

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.scheduler.detach()  # says so if the schedule was not reached

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scheduler.load_state_dict(state)


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), targets)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return task.create_optimizer(self.model)


def train(folder: Path | None = None, *callbacks: lightning.Callback) -> SparsityScheduler:
    """Train, and return what owns the masks. With a folder, save after each epoch, and go on from what is there."""
    sparsity = SparsityCallback(task.SPARSITY)
    saving = [] if folder is None else [ModelCheckpoint(folder, filename="last", enable_version_counter=False)]
    trainer = lightning.Trainer(
        max_epochs=task.EPOCHS,
        accumulate_grad_batches=task.ACCUMULATE,
        gradient_clip_val=1.0,
        callbacks=[sparsity, *callbacks, *saving],
        enable_checkpointing=bool(saving),
        logger=False,
    )
    last = None if folder is None else next(folder.glob("last.ckpt"), None)
    trainer.fit(Classifier(task.create_model()), task.create_loader(), ckpt_path=last)
    return sparsity.scheduler


if __name__ == "__main__":
    print(task.describe(train()))
