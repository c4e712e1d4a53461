"""Whoever drives the loop: the same seed gives the same masks, and a restart changes nothing."""

from __future__ import annotations

import gc
import re
import runpy
import sys
import weakref
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import nn

from experiments.examples import plain, task, with_accelerate, with_grad_scaler, with_lightning
from sparse_trainer import SparsityScheduler

EXAMPLES = ("plain", "with_accelerate", "with_grad_scaler", "with_lightning")

# Said by Lightning of a short run on a CPU, and of its own use of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:the schedule was not reached"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


@pytest.fixture(scope="module")
def reference() -> SparsityScheduler:
    torch.set_num_threads(1)
    return plain.train()


def assert_same(found: SparsityScheduler, wanted: SparsityScheduler) -> None:
    """The same masks, units, budget and weights, to the last bit."""
    assert found.step_number == wanted.step_number == task.TOTAL_STEPS
    assert found.budget == wanted.budget
    assert found.live_heads == wanted.live_heads
    assert found.live_neurons == wanted.live_neurons
    assert found.masks.keys() == wanted.masks.keys()
    for name, mask in wanted.masks.items():
        assert torch.equal(found.masks[name], mask), name
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    assert task.describe(found) == task.describe(wanted)


def test_the_plain_loop_moves_masks_and_units(reference: SparsityScheduler) -> None:
    first = SparsityScheduler(task.create_model(), task.SPARSITY, total_steps=task.TOTAL_STEPS)
    assert reference.budget == first.budget
    assert reference.budget.live == round(0.3 * reference.budget.total)
    assert reference.live_heads != first.live_heads
    assert reference.live_neurons != first.live_neurons
    assert any(not torch.equal(mask, first.masks[name]) for name, mask in reference.masks.items())
    assert task.describe(reference) != task.describe(first)


def test_accelerate(reference: SparsityScheduler) -> None:
    assert_same(with_accelerate.train(), reference)


def test_accelerate_goes_on_after_a_restart(reference: SparsityScheduler, tmp_path: Path) -> None:
    half = with_accelerate.train(tmp_path / "state", epochs=1)
    assert half.step_number == task.TOTAL_STEPS // 2
    assert task.describe(half) != task.describe(reference)
    assert_same(with_accelerate.train(tmp_path / "state"), reference)


def test_lightning(reference: SparsityScheduler) -> None:
    assert_same(with_lightning.train(), reference)


def test_lightning_goes_on_after_a_restart(reference: SparsityScheduler, tmp_path: Path) -> None:
    class StopAfterOneEpoch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = True

    half = with_lightning.train(tmp_path, StopAfterOneEpoch())
    assert half.step_number == task.TOTAL_STEPS // 2
    assert_same(with_lightning.train(tmp_path), reference)


def fit(module: nn.Module, callback: lightning.Callback, steps: int) -> lightning.Trainer:
    trainer = lightning.Trainer(max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(module, task.create_loader())  # type: ignore[arg-type]
    return trainer


def test_lightning_fits_twice() -> None:
    """One budget, not a budget of a budget."""
    callback = with_lightning.SparsityCallback(task.SPARSITY)
    module = with_lightning.Classifier(task.create_model())
    fit(module, callback, 8)
    first, budget = callback.scheduler, callback.scheduler.budget
    fit(module, callback, 10)
    assert callback.scheduler is not first
    assert callback.scheduler.budget == budget
    assert callback.scheduler.step_number == 10
    assert {name: len(heads) for name, heads in callback.scheduler.live_heads.items()} == {
        name: len(heads) for name, heads in first.live_heads.items()
    }


def test_lightning_searches_for_a_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search trains for a while, and then gives the module its former weights back: still one budget."""

    class Tuned(with_lightning.Classifier):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.lr = 1e-3

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=self.lr)

    monkeypatch.chdir(tmp_path)  # where the search keeps its checkpoint
    callback = with_lightning.SparsityCallback(task.SPARSITY)
    module = Tuned(task.create_model())
    trainer = lightning.Trainer(max_steps=10, callbacks=[callback], logger=False, enable_checkpointing=False)
    Tuner(trainer).lr_find(module, train_dataloaders=task.create_loader(), num_training=10)
    searched = callback.scheduler
    assert searched is not None
    budget = searched.budget
    trainer.fit(module, task.create_loader())
    assert callback.scheduler is not searched
    assert callback.scheduler.step_number == 10
    assert callback.scheduler.budget == budget
    assert budget.live == round(0.3 * budget.total)


def test_lightning_averages_weights() -> None:
    """Stochastic weight averaging writes its mean into the model, over masks that have changed."""

    def run(*callbacks: lightning.Callback) -> SparsityScheduler:
        sparsity = with_lightning.SparsityCallback(task.SPARSITY)
        trainer = lightning.Trainer(
            max_epochs=task.EPOCHS, callbacks=[sparsity, *callbacks], logger=False, enable_checkpointing=False
        )
        trainer.fit(with_lightning.Classifier(task.create_model()), task.create_loader())
        return sparsity.scheduler

    found = run(lightning.pytorch.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1))
    found.enforce()
    assert found.budget == run().budget


def test_grad_scaler(reference: SparsityScheduler) -> None:
    """Scales are powers of two, so scaling and unscaling lose no bit."""
    assert_same(with_grad_scaler.train(), reference)


def test_steps_that_overflow_do_not_count(reference: SparsityScheduler) -> None:
    found = with_grad_scaler.train(init_scale=2.0**127)
    assert 0 < found.step_number < task.TOTAL_STEPS
    assert found.budget == reference.budget
    assert all(bool(tensor.isfinite().all()) for tensor in found.model.state_dict().values())


def test_a_wrapped_optimizer_is_followed(reference: SparsityScheduler) -> None:
    class Wrapper(torch.optim.SGD):
        """As Accelerate's: an optimizer that hands everything on to the one it wraps."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__([nn.Parameter(torch.zeros(1))])
            self.optimizer = optimizer

    model = task.create_model()
    scheduler = SparsityScheduler(model, task.SPARSITY, total_steps=task.TOTAL_STEPS)
    optimizer = task.create_optimizer(model)
    scheduler.attach(Wrapper(Wrapper(optimizer)))
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.step_number == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_printed_and_stay_short(
    name: str, reference: SparsityScheduler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(task.__file__).with_name(f"{name}.py")
    assert len(source.read_text(encoding="utf-8").splitlines()) < 90
    command = re.search(r"``python -m (experiments\.examples\.\w+)``", source.read_text(encoding="utf-8"))
    assert command is not None
    assert command[1] == f"experiments.examples.{name}"
    monkeypatch.delitem(sys.modules, command[1])
    runpy.run_module(command[1], run_name="__main__")
    assert capsys.readouterr().out.strip().splitlines()[-1] == task.describe(reference)


def test_a_run_that_is_dropped_is_freed() -> None:
    """As in a notebook whose cell runs again: no detach(), and yet nothing stays."""
    model = task.create_model()
    scheduler = SparsityScheduler(model, task.SPARSITY, total_steps=task.TOTAL_STEPS)
    optimizer = task.create_optimizer(model)
    scheduler.attach(optimizer)
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    optimizer.step()
    scheduler.step()
    dropped = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, scheduler, optimizer
    gc.collect()
    assert not any(parameter() is not None for parameter in dropped)
