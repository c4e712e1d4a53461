"""A run: from the first step to the sparse file, stopped and resumed, and with steps that go wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from experiments.__main__ import main
from experiments.config.reading import build, to_yaml
from experiments.config.run_config import RunConfig, ScheduleConfig, resolve
from experiments.data.create_data import Data, create_data
from experiments.errors import ConfigError
from experiments.evaluation.measuring import count_correct
from experiments.run_folder.folder import RunFolder, create_run_folder
from experiments.run_folder.metrics_writer import NO_CHARTS
from experiments.run_folder.random_states import random_states, restore_random_states, resume_random_states
from experiments.terminal import Display
from experiments.training.loop import Loop, Stopped, StopRequest, describe
from experiments.training.losses import create_loss
from experiments.training.network import create_lr_schedule, create_optimizer
from experiments.training.plan import create_plan
from experiments.training.trainer import Trainer, TrainingError
from models import create_model
from sparse_trainer.files.checkpoint import load_resume, load_sparse, load_sparse_masks, read_info, save_resume
from sparse_trainer.mask_log import read_timeline

SMALL: dict[str, dict[str, Any]] = {
    "model": {"kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 7}},
    "data": {"train_subset": 100, "eval_subset": 20, "batch_size": 10},
    "sparsity": {"density": 0.5, "updates": 4},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_epochs": 0.5},
    "training": {"epochs": 2, "log_every": 3, "device": "cpu", "amp": "float32"},
}
"""Ten steps an epoch, twenty in all; updates after steps 3, 6, 10 and 13."""

EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {"drop_path": 0.2},
    "data": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "random_erasing": 0.3, "crop_padding": 2},
    "training": {"accumulate": 2, "epochs": 4, "clip_grad": 1.0, "ema_decay": 0.9, "ema_warmup": True},
}
"""Everything that draws random numbers or keeps a state of its own; five steps an epoch."""

CLOCKS = ("train/images_per_second", "update/seconds")


def configure(*changes: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {section: dict(inner) for section, inner in SMALL.items()}
    for change in changes:
        for section, inner in change.items():
            values[section] = None if inner is None else {**values.get(section, {}), **inner}
    return resolve(build(values), "test")


def open_data(config: RunConfig) -> Data:
    return create_data(config.data, device="cpu", seed=config.training.seed)


def make_trainer(*changes: dict[str, Any]) -> Trainer:
    config = configure(*changes)
    return Trainer(config, open_data(config))


def quiet() -> Console:
    return Console(quiet=True)


def run(loop: Loop, display: type[Display] = Display, **options: Any) -> None:
    stop = StopRequest()
    with display(quiet(), loop.trainer.plan.total_steps, loop.trainer.tried, **options) as shown:
        if isinstance(shown, StopAt):
            shown.stop = stop
        loop.run(shown, stop)


class StopAt(Display):
    """Asks for an end after a step, as Ctrl-C does."""

    stop: StopRequest

    def __init__(self, *arguments: Any, at: int) -> None:
        super().__init__(*arguments)
        self.at = at

    def advance(self, step: int) -> None:
        self.stop.made = step == self.at


def start(path: Path, *changes: dict[str, Any]) -> Loop:
    (path / "checkpoints").mkdir(parents=True)
    return Loop(make_trainer(*changes), RunFolder(path))


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def equal(left: Any, right: Any) -> bool:
    """Equality in every bit of nested states."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def test_a_whole_run_leaves_what_it_promises(tmp_path: Path) -> None:
    loop = start(tmp_path / "run", {"training": {"ema_decay": 0.9}})
    run(loop)
    trainer, folder = loop.trainer, loop.folder
    assert trainer.step == trainer.tried == 20

    records = read_metrics(folder)
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    by_step = {record["step"]: record for record in records}
    assert by_step[0]["budget/live_parameters"] == trainer.budget.live == round(0.5 * trainer.budget.total)
    assert [step for step in steps if "sparsity/churn" in by_step[step]] == [3, 6, 10, 13]
    assert [step for step in steps if "eval/ema_top1" in by_step[step]] == [10, 20]
    assert by_step[3].keys() >= {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "budget/macs"}
    assert by_step[20]["train/bad_steps"] == 0

    events = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    shown = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    written = {(tag, r["step"]): value for r in records for tag, value in r.items() if tag != "step"}
    written = {key: value for key, value in written.items() if not key[0].startswith(NO_CHARTS)}
    results = {tag: value for (tag, _), value in shown.items() if tag.startswith("result/")}
    assert results.keys() == {"result/images_per_second", "result/file_megabytes"}
    assert results["result/file_megabytes"] == pytest.approx(folder.sparse.stat().st_size / 1e6)
    assert {key: value for key, value in shown.items() if key[0] not in results} == pytest.approx(written)
    assert "_hparams_/session_start_info" in events.summary_metadata

    assert [record.step for record in read_timeline(folder.path)] == [0, 3, 6, 10, 13]
    info = read_info(folder.sparse)
    assert info.budget == trainer.budget
    assert (info.step, info.recipe, info.class_names) == (20, "test", trainer.data.class_names)
    assert info.metrics == {name: by_step[20][f"eval/{name}"] for name in info.metrics}
    assert info.metrics.keys() == {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"}
    assert folder.best.is_file()


def test_the_sparse_file_holds_the_average_where_there_is_one(tmp_path: Path) -> None:
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for name, change in (("plain", {}), ("ema", {"training": {"ema_decay": 0.9}})):
        loop = start(tmp_path / name, {"training": {"epochs": 1}}, change)
        run(loop)
        trained = loop.trainer.ema.module if loop.trainer.ema is not None else loop.trainer.model
        loaded = load_sparse(loop.folder.sparse, create_model=create_model)
        with torch.no_grad():
            assert torch.equal(loaded(images), trained.eval()(images))
        for parameter, mask in load_sparse_masks(loop.folder.sparse).items():
            assert not trained.get_parameter(parameter)[~mask].any()


@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        {
            "sparsity": {"density": 0.4, "head_density": 0.67, "neuron_density": 0.5, "swap": "always"},
            "training": {"ema_decay": 0.9},
        },
        {"training": {"amp": "float16"}},
        {"sparsity": None, "optimizer": {"name": "sgd"}},
        {"selector": {"keep_ratio": 0.5, "noise": 1.0}},
    ],
    ids=["everything", "structured", "float16", "dense", "selector"],
)  # fmt: skip
@pytest.mark.parametrize("at", [7, 10], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_equals_one_that_never_stopped(changes: dict[str, Any], at: int, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", changes)
    run(whole)
    with pytest.raises(Stopped):
        run(start(tmp_path / "parts", changes), StopAt, at=at)
    resumed = Loop(make_trainer(changes), RunFolder(tmp_path / "parts"))
    torch.rand(3)  # whatever was drawn before does not matter
    resumed.resume()
    assert resumed.trainer.tried == at
    run(resumed)

    assert equal(whole.trainer.state_dict(), resumed.trainer.state_dict())
    assert whole.history == resumed.history
    without_clocks = [
        [{tag: value for tag, value in record.items() if tag not in CLOCKS} for record in read_metrics(loop.folder)]
        for loop in (whole, resumed)
    ]
    assert without_clocks[0] == without_clocks[1]
    assert whole.folder.sparse.read_bytes() == resumed.folder.sparse.read_bytes()
    timelines = [[record.masks() for record in read_timeline(loop.folder.path)] if changes.get("sparsity", 1) else []
                 for loop in (whole, resumed)]  # fmt: skip
    assert equal(*timelines)


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    loop = start(tmp_path / "run")
    run(loop)
    whole = read_metrics(loop.folder)
    with pytest.raises(Stopped):
        run(start(tmp_path / "killed"), StopAt, at=7)
    folder = RunFolder(tmp_path / "killed")
    # As if the process had gone on after its last checkpoint, and was killed in the middle of a line.
    with folder.metrics.open("a") as file:
        file.write('{"step": 9, "train/loss": 1.0}\n{"step": 10, "tra')
    resumed = Loop(make_trainer(), folder)
    resumed.resume()
    run(resumed)
    assert [record["step"] for record in read_metrics(folder)] == [record["step"] for record in whole]


def test_another_configuration_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(start(tmp_path / "run"), StopAt, at=2)
    other = Loop(make_trainer({"optimizer": {"lr": 2e-3}, "training": {"log_every": 7}}), RunFolder(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"^optimizer.lr: 0.002 differs from 0.001, which the run was started with"):
        other.resume()


class Sick(nn.Module):
    """A loss that is not finite at some calls."""

    def __init__(self, loss: nn.Module, when: Callable[[int], bool]) -> None:
        super().__init__()
        self.loss, self.when, self.calls = loss, when, 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        loss: Tensor = self.loss(logits, targets)
        return loss * math.nan if self.when(self.calls) else loss


@pytest.mark.parametrize("amp", ["float32", "float16"])
def test_a_step_without_a_finite_loss_moves_nothing(amp: str) -> None:
    trainer = make_trainer(
        {"training": {"amp": amp, "ema_decay": 0.9}, "sparsity": {"updates": None, "update_every": 3}}
    )
    trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call == 3)
    trainer.train_step()
    trainer.train_step()
    before = {
        key: value for key, value in trainer.state_dict().items() if key not in ("tried", "bad_in_a_row", "random")
    }
    before = json_like(before)
    result = trainer.train_step()  # an update was due here
    after = {key: value for key, value in trainer.state_dict().items() if key in before}
    assert not result.counted
    assert result.update is None
    assert trainer.bad_steps == 1
    if amp == "float16":
        assert after.pop("scaler")["scale"] == before.pop("scaler")["scale"] / 2
    assert equal(after, before)
    result = trainer.train_step()
    assert result.counted
    assert result.update is not None
    assert result.update.step == 3
    assert trainer.bad_in_a_row == 0


def test_a_run_resumed_after_an_overflow_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """The loss scale has fallen, and it rises again: both belong to the state."""
    changes = {"training": {"amp": "float16", "accumulate": 2, "epochs": 4}}

    def run_on(trainer: Trainer, until: int) -> Trainer:
        trainer.scaler._growth_interval = 4  # type: ignore[attr-defined]  # by torch 2000 steps
        while trainer.tried < until:
            trainer.train_step()
        return trainer

    def overflowing() -> Trainer:
        trainer = make_trainer(changes)
        trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call in (4, 11))
        return trainer

    whole = run_on(overflowing(), 20)
    save_resume(tmp_path / "bundle", run_on(overflowing(), 8).state_dict())
    resumed = make_trainer(changes)
    resumed.load_state_dict(load_resume(tmp_path / "bundle"))
    assert resumed.bad_steps == 2
    assert resumed.scaler.get_scale() == 65536 / 4  # twice halved, and not yet four good steps in a row
    assert equal(whole.state_dict(), run_on(resumed, 20).state_dict())
    assert whole.scaler.get_scale() > 65536 / 4


def json_like(state: Any) -> Any:
    """A copy that later steps do not change."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: json_like(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(json_like(value) for value in state)
    return state


@pytest.mark.parametrize(("clip", "told"), [(1e-6, 1), (0.5, 0), (None, 0)])
def test_a_run_says_once_that_clipping_leaves_next_to_nothing(clip: float | None, told: int, tmp_path: Path) -> None:
    lines: list[str] = []

    class Listening(Display):
        def line(self, text: str) -> None:
            lines.append(text)

    run(start(tmp_path, {"training": {"clip_grad": clip, "log_every": 1}}), Listening)
    found = [line for line in lines if "so most weights hardly learn" in line]
    assert len(found) == told
    assert all(line.startswith("step 1: gradients have a norm of ") and "clipped to 1e-06" in line for line in found)


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    trainer = make_trainer({"training": {"max_bad_steps": 3}})
    trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call > 2)
    for _ in range(4):
        trainer.train_step()
    with pytest.raises(TrainingError, match=r"^step 5: loss or gradient was not finite in 3 steps in a row \(loss nan"):
        trainer.train_step()


def test_weights_that_are_not_finite_at_an_update_end_the_run() -> None:
    """One step is enough, where loss and gradient still were finite."""
    often = {"density": 0.5, "updates": None, "update_every": 1}
    trainer = make_trainer({"optimizer": {"lr": 1e38}, "schedule": {"warmup_epochs": 0}, "sparsity": often})
    message = r"^step [12]: \S+weight holds NaN or infinity, .* has diverged; a lower optimizer\.lr may help$"
    with pytest.raises(TrainingError, match=message):
        [trainer.train_step() for _ in range(3)]


@pytest.mark.parametrize("sparsity", [None, {"density": 1.0}])
def test_a_dense_run_is_a_run_too(sparsity: dict[str, Any] | None, tmp_path: Path) -> None:
    loop = start(tmp_path / "run", {"training": {"epochs": 1}, "sparsity": sparsity})
    run(loop)
    budget = read_info(loop.folder.sparse).budget
    assert budget.live == budget.total


def test_two_small_batches_make_the_step_of_one_large_batch() -> None:
    plain = {"data": {"horizontal_flip": 0.0}, "training": {"clip_grad": 1.0}, "optimizer": {"name": "sgd"}}
    large = make_trainer(plain, {"data": {"batch_size": 20}})
    small = make_trainer(plain, {"training": {"accumulate": 2}})
    assert large.plan.steps_per_epoch == small.plan.steps_per_epoch == 5
    for _ in range(3):
        large.train_step()
        small.train_step()
    assert equal(large.masks, small.masks)
    for name, parameter in large.model.named_parameters():
        torch.testing.assert_close(parameter, small.model.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trainers = [make_trainer({"training": {"compile": compiled}}) for compiled in (True, False)]
    for trainer in trainers:
        for _ in range(4):
            trainer.train_step()
    assert equal(trainers[0].masks, trainers[1].masks)
    assert equal(*(dict(trainer.model.state_dict()) for trainer in trainers))


@pytest.mark.parametrize(
    "units",
    [{"unit_distribution": "global", "swap": "always", "probation": 0}, {"unit_falls": 3}],
    ids=["between blocks", "falling"],
)
def test_blocks_that_change_their_size_are_compiled_once_more(
    units: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once as they are at first, and once more for each kind of change, not for each change; without being told torch
    compiles 16 and 4 times."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    changes = {
        "model": {"kwargs": {"depth": 3}},
        "sparsity": {"density": None, "head_density": 0.67, "neuron_density": 0.5, "updates": 6, **units},
        "training": {"epochs": 3},
    }
    plain, fast = (make_trainer(changes, {"training": {"compile": compiled}}) for compiled in (False, True))
    shapes = set()
    while not fast.finished:
        for trainer in (plain, fast):
            trainer.train_step()
        shapes.add(tuple(p.shape for p in fast.model.parameters()))
        fast.evaluate()
    assert len(shapes) >= 3
    assert 1 <= len(graphs) <= (4 if "unit_distribution" in units else 3)
    assert equal(*(dict(trainer.model.state_dict()) for trainer in (plain, fast)))


@pytest.mark.parametrize(("distribution", "scored"), [("uniform", 10), ("global", 5)])
def test_where_units_move_between_blocks_half_of_the_images_score_them(
    distribution: str, scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {"density": None, "head_density": 0.67, "neuron_density": 0.5, "unit_distribution": distribution}
    trainer = make_trainer({"sparsity": units})
    own, seen, batches = trainer.objective.probe, [], []

    def probe(images: Tensor, targets: Tensor) -> Tensor:
        seen.append((images, targets))
        return own(images, targets)

    def taken(images: Tensor, targets: Tensor, **options: Any) -> Any:
        batches.append((images, targets))
        return update_masks(images, targets, **options)

    update_masks = trainer._update_masks
    monkeypatch.setattr(trainer.objective, "probe", probe)
    monkeypatch.setattr(trainer, "_update_masks", taken)
    for _ in range(3):
        trainer.train_step()
    assert len(seen) == 1
    every = 10 // scored
    assert all(torch.equal(part, whole[::every]) for part, whole in zip(seen[0], batches[-1], strict=True))


def test_data_that_fails_during_the_run_is_said_in_one_line() -> None:
    trainer = make_trainer()

    def broken(epoch: int, start: int = 0) -> Any:
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback ...\n10 images cannot be read")
        yield

    object.__setattr__(trainer.data.train, "batches", broken)
    with pytest.raises(TrainingError, match=r"^data: 10 images cannot be read$"):
        trainer.train_step()


def test_the_budget_holds_after_every_step() -> None:
    trainer = make_trainer({"training": {"ema_decay": 0.9}}, EVERYTHING)
    assert trainer.ema is not None
    while not trainer.finished:
        trainer.train_step()
        assert sum(int(mask.sum()) for mask in trainer.masks.values()) == round(0.5 * trainer.budget.total)
        for name, mask in trainer.masks.items():
            assert not trainer.model.get_parameter(name)[~mask].any()
            assert not trainer.ema.module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": {"density": 1e-4}}, "sparsity.density: 0.0001 of 15,240 prunable weights leaves 2 live"),
        ({"sparsity": {"updates": 90}}, "sparsity.updates: 90 do not fit the 15 steps before the stop"),
        ({"sparsity": {"include": ["blok*"]}}, "sparsity.include: 'blok\\*' matches no prunable weight; close names: "),
        (
            {"model": {"kwargs": {"img_size": 32}}},
            r"model.kwargs.img_size: 32 does not match data.image_size \(28\); leave it out, or change the data",
        ),
        ({"model": {"kwargs": {"patch_size": 5}}}, r"model: patch_size \(5, 5\) does not divide img_size \(28, 28\)"),
        ({"model": {"name": "deit_smal"}}, "model: unknown model name 'deit_smal'; close names: "),
        ({"model": {"kwargs": {"colour": 1}}}, "model: deit_tiny_patch16_224 cannot be made with "),
        ({"optimizer": {"name": "adamm"}}, "optimizer.name: 'adamm' is no optimizer of timm; close names: adam"),
        ({"optimizer": {"name": "adafactor"}}, r"optimizer timm\.optim\.adafactor\.Adafactor: its state"),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}, r"optimizer.betas: \(0.9, 0.9\) is given, but sgd"),
        ({"optimizer": {"name": "sgd", "momentum": 0.0}}, r"optimizer.momentum: 0 does not go with sgd "),
        (
            {"model": {"name": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "patch_size": 7, "scale_mlp_norm": True}},
             "selector": {"stages": [1]}},
            "selector: the MACs of vit_tiny_patch16_224 with fewer tokens cannot be counted, .*; set selector to null",
        ),
        ({"optimizer": {"name": "adahessian"}, "sparsity": None}, "optimizer.name: adahessian needs second"),
        ({"schedule": {"warmup_epochs": 1e308}}, r"schedule.warmup_epochs: 1e\+308 \(10{18} steps\) does not"),
        ({"optimizer": {"lr": 1e-6}}, r"schedule.min_lr: 1e-05 is above optimizer.lr \(1e-06\)"),
        ({"training": {"accumulate": 11}}, "training.accumulate: 11 is more than the 10 batches of an epoch"),
        (
            {"schedule": {"warmup_epochs": 2}},
            r"schedule.warmup_epochs: 2 \(20 steps\) does not end before the run \(20 steps\); less than 2 works",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_trainer(change)


def test_a_model_that_no_checkpoint_can_hold_is_refused_before_the_training() -> None:
    with pytest.raises(ValueError, match="model_args"):
        describe(make_trainer({"model": {"kwargs": {**SMALL["model"]["kwargs"], "mlp_layer": None}}}), {})


def test_the_plan_in_steps() -> None:
    config = configure({"training": {"accumulate": 3, "epochs": 4, "eval_every": 0.5, "checkpoint_every": 2.0}})
    plan = create_plan(config, batches_per_epoch=19)  # the 19th batch fills no step
    assert (plan.steps_per_epoch, plan.total_steps, plan.eval_every, plan.checkpoint_every) == (6, 24, 3, 12)
    assert plan.warmup_steps == 3
    assert [plan.locate(step) for step in (0, 5, 6, 13)] == [(0, 0), (0, 15), (1, 0), (2, 3)]
    assert [step for step in range(1, 25) if plan.saves(step)] == [12, 24]
    assert create_plan(configure({"training": {"steps": 7}}), 10).total_steps == 7
    never = create_plan(configure({"training": {"eval_every": 1e308, "checkpoint_every": 1e308}}), 10)
    assert [step for step in range(1, 21) if never.evaluates(step) or never.saves(step)] == [20]


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.505, 0.01), ("linear", 0.505, 0.01), ("constant", 1.0, 1.0)]
)
def test_the_learning_rate_by_hand(name: Any, middle: float, end: float) -> None:
    """Half-way between 1 and 0.01 both curves are at 0.505; the warm-up goes from 0 in four equal steps."""
    config = configure({"optimizer": {"lr": 1.0, "name": "sgd"}, "training": {"steps": 20}})
    plan = create_plan(configure({"training": {"steps": 20}, "schedule": {"warmup_epochs": 0.4}}), 10)
    optimizer = create_optimizer(nn.Linear(2, 2), config.optimizer)
    schedule = create_lr_schedule(optimizer, ScheduleConfig(name=name, warmup_lr=0.0, min_lr=0.01), plan)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 21):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert rates[10] == pytest.approx(middle)
    assert rates[20] == pytest.approx(end)


def test_correct_guesses_by_hand() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    counts = count_correct(logits, torch.tensor([0, 4, 5]))  # the first guess, the fifth, the sixth
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 4, 5]), reduction="sum")
    assert counts.tolist() == pytest.approx([3, loss.item(), 1, 2])
    assert count_correct(logits[:, :3], torch.tensor([0, 1, 2])).tolist()[3] == 3


def test_the_loss_takes_the_targets_of_the_data() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2, 3, 4])
    smoothed = create_loss(configure({"data": {"label_smoothing": 0.1}}).data)(logits, targets)
    soft = nn.functional.one_hot(targets, 10) * 0.9 + 0.01
    mixed = create_loss(configure({"data": {"mixup": 0.2, "label_smoothing": 0.1}}).data)(logits, soft)
    torch.testing.assert_close(smoothed, mixed)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("python", lambda state: [3, state[1][:-1], None]),
        ("numpy", lambda state: [*state[:2], 625, *state[3:]]),
        ("numpy", lambda state: [state[0], state[1][1:], *state[2:]]),
        ("torch", lambda state: state[:-2]),
        ("torch", lambda state: "x" + state[1:]),
        ("torch", lambda state: state[:16] + "ffffff7f" + state[24:]),
        ("torch", lambda state: None),
    ],
)
def test_random_states_that_cannot_be_are_refused(part: str, change: Callable[[Any], Any]) -> None:
    cpu = torch.device("cpu")
    good = json.loads(json.dumps(random_states(cpu)))
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
    with pytest.raises(ValueError, match=r"^the random states cannot be: "):
        restore_random_states({**good, part: change(good[part])}, cpu)
    restore_random_states(good, cpu)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn  # noqa: NPY002
    with pytest.raises(ValueError, match="are missing"):
        resume_random_states([], cpu, rank=0, size=1, seed=0, step=0)


def test_run_folders_have_names_of_their_own(tmp_path: Path) -> None:
    output = build({"output": {"runs": str(tmp_path)}}).output
    names = [create_run_folder(output, "quickstart").path.name for _ in range(2)]
    assert names == ["quickstart", "quickstart-2"]
    named = build({"output": {"runs": str(tmp_path), "name": names[0]}}).output
    with pytest.raises(ConfigError, match=r"output\.name: .* exists; choose another name, or go on with it: --resume"):
        create_run_folder(named, "quickstart")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output\.runs: cannot make"):
        create_run_folder(build({"output": {"runs": str(tmp_path / "file")}}).output, "quickstart")


def test_deterministic_algorithms_are_asked_for_in_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    step = Trainer.train_step

    def watch(self: Trainer, **options: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if len(seen) > 3:
            raise RuntimeError("kernel does not have a deterministic implementation, but you set ...\nmore")
        return step(self, **options)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(Trainer, "train_step", watch)
    (tmp_path / "small.yaml").write_text(to_yaml(configure({"training": {"deterministic": True}})))
    assert main(["train", "--config", str(tmp_path / "small.yaml"), "--output.runs", str(tmp_path)]) == 1
    assert seen == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "sparse-trainer train: error: training.deterministic: kernel does not have a deterministic implementation, but "
        "you set ..."
    )
