"""Several processes train as one does: with the same images, masks and weights, one decision, and no more talk than
that takes.

Two processes are started once; each runs all of :data:`SCENARIOS`, and the tests look at what they found.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.config.reading import to_yaml
from experiments.data import sources as data_sources
from experiments.data.batches import Place, share_of
from experiments.data.create_data import Data, create_data
from experiments.errors import ConfigError
from experiments.evaluation.measuring import measure
from experiments.processes import processes as processes_module
from experiments.processes.data_parallel import unused_parameters
from experiments.processes.processes import ALONE, Processes, find_processes, join_processes
from experiments.training.trainer import Trainer, TrainingError
from models import create_model
from sparse_trainer import DisagreementError, SparsityConfig, SparsityScheduler
from sparse_trainer.agreement import differences
from sparse_trainer.files.checkpoint import load_resume, save_resume
from tests.test_training import Sick, configure, equal, json_like

Found = dict[str, Any]
Change = dict[str, Any]

FIFTY: Change = {
    "data": {"eval_subset": 21},
    "sparsity": {"density": 0.5, "updates": 8},
    "training": {"steps": 50},
}
"""Fifty steps, updates after every fifth of the first forty; the images to evaluate do not divide evenly."""

UNITS: Change = {"density": 0.35, "head_density": 0.67, "neuron_density": 0.5, "swap": "always"}
THRESHOLD: Change = {
    # Half of the patches lie below it, and the mean of the batch on either side of the target.
    "selector": {"kind": "threshold", "stages": [1], "thresholds": [0.0045]},
    "losses": {"macs_target": 0.75, "macs_weight": 1000.0},
    "optimizer": {"lr": 1e-4},
}
KINDS: dict[str, Change] = {
    "weights": {},
    "falling": {
        "sparsity": {
            "density": 0.2,
            "initial_density": 0.9,
            "head_density": 0.67,
            "neuron_density": 0.5,
            "unit_falls": 2,
        }
    },
    "structured": {"sparsity": {**UNITS, "density": None, "start": "score"}},
    "top_k": {"selector": {"keep_ratio": 0.5, "noise": 1.0}, "data": {"mixup": 0.8, "batch_size": 12}},
    "threshold": THRESHOLD,
    "joint": {**THRESHOLD, "sparsity": UNITS, "losses": {"macs_target": 0.5, "macs_weight": 1000.0}},
    "everything": {
        "data": {
            "mixup": 0.8,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
            "random_erasing": 0.3,
            "crop_padding": 2,
            "batch_size": 20,
        },
        "sparsity": {"growth_batches": 4},
        "training": {"accumulate": 2, "clip_grad": 1.0, "ema_decay": 0.9, "ema_warmup": True},
    },
}
LEFT_AT = 24  # inside the window in which "everything" collects the growth gradient for its update at step 25


class Wide:
    """Batches in the default type: in float64 the order of summation decides nothing."""

    def __init__(self, batches: Any) -> None:
        self.inner = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batches(self, *arguments: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self.inner.batches(*arguments):
            yield images.to(torch.get_default_dtype()), targets


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def merged(*changes: Change) -> Change:
    values: Change = {}
    for change in changes:
        for section, inner in change.items():
            values[section] = {**values.get(section, {}), **inner}
    return values


def make(processes: Processes, *changes: Change, resuming: bool = False) -> Trainer:
    config = configure(merged(*changes))
    place = {"rank": processes.rank, "world_size": processes.size}
    data = create_data(config.data, device="cpu", seed=config.training.seed, **place)
    data = dataclasses.replace(data, train=Wide(data.train), eval=Wide(data.eval))
    return Trainer(config, data, processes, resuming=resuming)


def advance(trainer: Trainer, until: int) -> Trainer:
    while trainer.tried < until:
        trainer.train_step()
    return trainer


def outcome(trainer: Trainer) -> Found:
    advance(trainer, trainer.plan.total_steps)
    sparsity = trainer.sparsity
    assert sparsity is not None
    return {
        "masks": dict(trainer.masks),
        "heads": sparsity.live_heads,
        "neurons": sparsity.live_neurons,
        "weights": dict(trainer.result_model.named_parameters()),
        "training": trainer.take_running(),
        "evaluation": trainer.evaluate().metrics,
    }


def same_outcome(found: Found, expected: Found, tolerance: float = 1e-6) -> None:
    assert equal(found["masks"], expected["masks"])
    assert (found["heads"], found["neurons"]) == (expected["heads"], expected["neurons"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=tolerance, rtol=0)
    for what in ("training", "evaluation"):  # the losses are summed in float32
        assert found[what] == pytest.approx(expected[what], rel=1e-5)


# What the two processes do


def every_kind(processes: Processes, folder: Path) -> Found:
    with float64():
        return {kind: outcome(make(processes, FIFTY, change)) for kind, change in KINDS.items()}


PLAIN: Change = {"optimizer": {"name": "sgd", "lr": 0.02}}


def in_float32(processes: Processes, folder: Path) -> Found:
    return outcome(make(processes, FIFTY, PLAIN))


def saved_by_two(processes: Processes, folder: Path) -> None:
    with float64():
        state = advance(make(processes, FIFTY, KINDS["everything"]), LEFT_AT).state_dict()
    if processes.is_main:
        save_resume(folder / "two", state)


def resumed_from_one(processes: Processes, folder: Path) -> Found:
    with float64():
        trainer = make(processes, FIFTY, KINDS["everything"], resuming=True)
        trainer.load_state_dict(load_resume(folder / "one"))
        return outcome(trainer)


def resumed_alike(processes: Processes, folder: Path) -> Found:
    """With what each process draws for itself."""
    change = merged(KINDS["everything"], {"model": {"drop_path": 0.3}, "training": {"steps": 10}})
    whole = advance(make(processes, change), 10)
    state = advance(make(processes, change), 6).state_dict()
    if processes.is_main:
        save_resume(folder / "half", state)
    processes.wait()
    resumed = make(processes, change, resuming=True)
    torch.rand(3 + processes.rank)  # whatever was drawn before does not matter
    resumed.load_state_dict(load_resume(folder / "half"))
    advance(resumed, 10)
    return {
        "equal": equal(whole.state_dict(), resumed.state_dict()),
        "drawn": torch.rand(1).item(),
    }


def bad_loss_on_one(processes: Processes, folder: Path) -> Found:
    """The loss of the second process is not finite, and only that: its gradient is."""

    class Odd(Sick):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return self.loss(logits, targets) + super().forward(logits, targets).detach() * 0

    found: Found = {}
    for amp in ("float32", "float16"):
        change = {"training": {"amp": amp, "ema_decay": 0.9}, "sparsity": {"updates": None, "update_every": 4}}
        trainer = make(processes, change, {"sparsity": {"growth_batches": 3}})
        trainer.objective.loss = Odd(trainer.objective.loss, lambda call: processes.rank == 1 and call == 3)
        advance(trainer, 2)  # one more and the update is due; the growth gradient is being collected
        before = json_like({key: value for key, value in trainer.state_dict().items() if key not in DROPPED})
        result = trainer.train_step()
        after = {key: value for key, value in trainer.state_dict().items() if key in before}
        unchanged, bad_steps = equal(before, after), trainer.bad_steps
        goes_on = any(trainer.train_step().counted for _ in range(3))  # float16 may overflow once more
        found[amp] = (result.counted, unchanged, bad_steps, goes_on)
    return found


DROPPED = ("tried", "bad_in_a_row", "random")


def too_many_bad(processes: Processes, folder: Path) -> str:
    trainer = make(processes, {"training": {"max_bad_steps": 3}}, PLAIN)
    if processes.rank == 1:
        trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call > 1)
    with pytest.raises(TrainingError) as caught:
        advance(trainer, 20)
    return str(caught.value)


def data_ends_on_one(processes: Processes, folder: Path) -> Found:
    """With the second batch of an accumulated step; the others must not wait for the gradients of that step."""
    trainer = make(processes, KINDS["everything"] | {"training": {"accumulate": 2, "steps": 10}}, THRESHOLD)
    read = trainer.feed.batches

    def breaking() -> Iterator[Any]:
        for number, batch in enumerate(read):
            if processes.rank == 1 and number == 3:
                raise TrainingError("data: 10 images in a row cannot be read")
            yield batch

    trainer.feed.batches = breaking()
    trainer.train_step()
    before = json_like(trainer.state_dict())
    with pytest.raises(TrainingError) as caught:
        trainer.train_step()
    return {"message": str(caught.value), "unchanged": equal(before, trainer.state_dict())}


def compiled(processes: Processes, folder: Path) -> bool:
    """Whether a compiled network trains to the same bits."""
    change = merged(KINDS["top_k"], {"sparsity": {**UNITS, "updates": 4}, "training": {"accumulate": 2, "steps": 6}})
    plain = advance(make(processes, change), 6)
    own_compile = torch.compile
    torch.compile = partial(own_compile, backend="eager")  # type: ignore[assignment]
    try:
        trainer = advance(make(processes, change, {"training": {"compile": True}}), 6)
    finally:
        torch.compile = own_compile
    return equal(plain.state_dict()["model"], trainer.state_dict()["model"]) and equal(plain.masks, trainer.masks)


def stop_on_one(processes: Processes, folder: Path) -> list[bool]:
    trainer = make(processes)
    return [trainer.train_step(stop=processes.rank == 1 and step == 1).stop for step in range(3)]


def tampered(processes: Processes, folder: Path) -> Found:
    found = {}
    for where, message in (("mask", {}), ("units", {"sparsity": {**UNITS, "density": None}})):
        trainer = make(processes, message)
        assert trainer.sparsity is not None
        if processes.rank == 1 and where == "mask":
            mask = trainer.masks["blocks.1.mlp.fc1.weight"].view(-1)
            live, dead = int(mask.nonzero()[0]), int((~mask).nonzero()[0])
            mask[live], mask[dead] = False, True
        if processes.rank == 1 and where == "units":
            units = trainer.sparsity._units
            assert units is not None
            units.groups[0].live.reverse()
        with pytest.raises(TrainingError) as caught:
            advance(trainer, 20)
        found[where] = (trainer.tried, str(caught.value))
    return found


class Traffic(TorchDispatchMode):
    """Bytes that go through the processes' group."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(function):
            self.sizes.append(sum(t.nbytes for t in pytree.tree_leaves(args) if isinstance(t, Tensor)))
        return function(*args, **(kwargs or {}))


def traffic(processes: Processes, folder: Path) -> Found:
    """By step: what was sent, whether it was an update; and the size of gradients and masks."""
    change: Change = {"selector": {"keep_ratio": 0.5, "noise": 1.0}, "training": {"accumulate": 2, "steps": 20}}
    trainer = advance(make(processes, {**change, "sparsity": {"growth_batches": 1}}), 2)
    steps = []
    for _ in range(8):
        with Traffic() as count:
            result = trainer.train_step()
        steps.append((result.update is not None, count.sizes))
    return {
        "steps": steps,
        "gradients": sum(p.nbytes for p in trainer.model.parameters()),
        "masks": sum(mask.numel() for mask in trainer.masks.values()),
    }


def without_backward(processes: Processes, folder: Path) -> Found:
    """In one step no gradient reaches the second process, which steps all the same; and its passes are half as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=4, growth_batches=6), total_steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler.attach(optimizer)
    generator = torch.Generator().manual_seed(processes.rank)
    updates = 0
    for step in range(12):
        passes = 0 if processes.rank == 1 and step in (3, 6, 11) else 2 - processes.rank
        for _ in range(passes):
            model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        for parameter in model.parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            dist.all_reduce(gradient)
            parameter.grad = gradient if passes else None
        if not passes:
            for parameter in model.parameters():  # as a loop that averages by itself may do
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
        updates += scheduler.step() is not None
        optimizer.zero_grad()
    return {"updates": updates, "masks": dict(scheduler.masks)}


def evaluated(processes: Processes, folder: Path) -> Found:
    found = {}
    for count in (1, 2, 10, 11):
        trainer = make(processes, {"data": {"eval_subset": count, "eval_batch_size": 4}}, ADAPTIVE)
        measured = measure(trainer.model, trainer.data.eval, trainer.autocast, processes)
        assert measured.kept is not None
        found[count] = (measured.metrics, measured.kept.clone())
    return found


ADAPTIVE: Change = {"selector": {"kind": "threshold", "stages": [1], "thresholds": [0.0045]}}


def corrupt(processes: Processes, folder: Path) -> Found:
    found: Found = {}
    for path in ("always", "never"):
        trainer = make(processes, picture_settings(folder, path))
        advance(trainer, trainer.plan.steps_per_epoch)
        measured = measure(trainer.model, trainer.data.eval, trainer.autocast, processes)
        found[path] = (measured.metrics["images"], sorted(trainer.unreadable_images()), trainer.data.train_size)

    # A file that one process alone cannot read, on a disk of its own perhaps.
    own_load = data_sources.ImageSource.load

    def load(source: Any, index: int) -> Image.Image:
        if processes.rank == 1 and source.name(index).endswith("train/bee/2.png"):
            raise data_sources.UnreadableImage(source.name(index), "stale file handle")
        return own_load(source, index)

    data_sources.ImageSource.load = load  # type: ignore[method-assign]
    try:
        trainer = make(processes, picture_settings(folder, "always"))
    finally:
        data_sources.ImageSource.load = own_load  # type: ignore[method-assign]
    found["one"] = (trainer.data.train_size, trainer.data.mean, sorted(trainer.unreadable_images()))
    return found


def other_data(processes: Processes, folder: Path) -> str:
    other = configure({"data": {"train_subset": 100 - 10 * processes.rank}})
    data = create_data(other.data, device="cpu", seed=0, rank=processes.rank, world_size=processes.size)
    with pytest.raises(ConfigError) as caught:
        Trainer(configure(), data, processes)
    return str(caught.value)


def other_settings(processes: Processes, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make(
            processes,
            {"training": {"amp": ["bfloat16", "float32"][processes.rank]}, "data": {"workers": processes.rank}},
        )
    return str(caught.value)


def other_checkpoint(processes: Processes, folder: Path) -> str:
    trainer = make(processes)
    states = []
    for step in range(2):
        advance(trainer, step + 1)
        states.append(trainer.state_dict())
    with pytest.raises(ConfigError) as caught:
        trainer.load_state_dict(states[processes.rank])
    return str(caught.value)


def said(processes: Processes, folder: Path) -> Found:
    value = torch.tensor(float(processes.rank), requires_grad=True)
    mean = processes.mean(value)
    (3 * mean).backward()
    rows = torch.full((2 * processes.rank, 3), processes.rank)
    return {
        "shared": processes.share({"of": [processes.rank, None, "ä"]}),
        "gathered": processes.gather("x" * processes.rank),
        "any": [processes.any(False), processes.any(processes.rank == 1)],
        "mean": (mean.item(), float(value.grad) if value.grad is not None else 0.0),
        "rows": processes.rows(rows),
    }


SCENARIOS: tuple[Callable[[Processes, Path], Any], ...] = (
    every_kind,
    in_float32,
    saved_by_two,
    resumed_from_one,
    resumed_alike,
    bad_loss_on_one,
    too_many_bad,
    data_ends_on_one,
    compiled,
    stop_on_one,
    tampered,
    traffic,
    without_backward,
    evaluated,
    corrupt,
    other_data,
    other_settings,
    other_checkpoint,
    said,
)


def work(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "no update fits into")
    warnings.filterwarnings("ignore", r"The \.grad attribute")  # of torch.compile's own
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=2))
    processes = Processes(rank, size, rank)
    found = {scenario.__name__: scenario(processes, Path(folder)) for scenario in SCENARIOS}
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 3)):
        for shade, name in enumerate(("ant", "bee", "cat")):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (12, 12, 3), dtype=np.uint8) + np.uint8(80 * shade)
                Image.fromarray(pixels).save(path / split / name / f"{number}.png")
    for damaged in (path / "train/ant/1.png", path / "validation/cat/2.png"):
        damaged.write_bytes(damaged.read_bytes()[:60])
    return path


def picture_settings(folder: Path, in_memory: str) -> Change:
    data = {"dataset": "folder", "root": str(folder), "train_subset": None, "eval_subset": None, "batch_size": 4}
    return {
        "data": {**data, "in_memory": in_memory, "workers": 0},
        "model": {"kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 4}},
        "sparsity": {"updates": 1},
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """What one process finds with the whole of every batch; it leaves a checkpoint for the others."""
    with float64():
        found = {kind: outcome(make(ALONE, FIFTY, change)) for kind, change in KINDS.items()}
        save_resume(folder / "one", advance(make(ALONE, FIFTY, KINDS["everything"]), LEFT_AT).state_dict())
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path, alone: Found) -> list[Found]:
    torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, ranks: list[Found], alone: Found) -> None:
    found = [rank["every_kind"][kind] for rank in ranks]
    assert equal(*found)
    same_outcome(found[0], alone[kind])


def test_they_do_in_float32_too(ranks: list[Found]) -> None:
    found = [rank["in_float32"] for rank in ranks]
    assert equal(*found)
    same_outcome(found[0], outcome(make(ALONE, FIFTY, PLAIN)))


def test_one_process_goes_on_with_what_two_saved(ranks: list[Found], alone: Found, folder: Path) -> None:
    with float64():
        trainer = make(ALONE, FIFTY, KINDS["everything"], resuming=True)
        trainer.load_state_dict(load_resume(folder / "two"))
        assert trainer.tried == LEFT_AT
        same_outcome(outcome(trainer), alone["everything"])


def test_two_processes_go_on_with_what_one_saved(ranks: list[Found], alone: Found) -> None:
    found = [rank["resumed_from_one"] for rank in ranks]
    assert equal(*found)
    same_outcome(found[0], alone["everything"])


def test_as_many_processes_go_on_in_the_same_bits(ranks: list[Found]) -> None:
    found = [rank["resumed_alike"] for rank in ranks]
    assert all(rank["equal"] for rank in found)
    assert found[0]["drawn"] != found[1]["drawn"]  # each has a stream of its own


@pytest.mark.parametrize("amp", ["float32", "float16"])
def test_a_loss_that_is_not_finite_on_one_process_moves_nothing_on_any(amp: str, ranks: list[Found]) -> None:
    for rank in ranks:
        counted, unchanged, bad_steps, goes_on = rank["bad_loss_on_one"][amp]
        assert not counted
        assert unchanged
        assert bad_steps == 1
        assert goes_on


def test_too_many_bad_steps_end_all_processes_and_name_the_one(ranks: list[Found]) -> None:
    messages = {rank["too_many_bad"] for rank in ranks}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith("step 4: loss or gradient was not finite in 3 steps in a row (loss nan, gradient norm n")
    assert "; first not finite: the loss, of outputs that are finite (process 1); a lower" in message


def test_data_that_end_on_one_process_end_the_run_on_all(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["data_ends_on_one"]["message"] == "data: 10 images in a row cannot be read (process 1)"
        assert rank["data_ends_on_one"]["unchanged"]


def test_a_compiled_network_trains_alike_on_two_processes(ranks: list[Found]) -> None:
    assert [rank["compiled"] for rank in ranks] == [True, True]


def test_a_stop_on_one_process_is_a_stop_on_all(ranks: list[Found]) -> None:
    assert [rank["stop_on_one"] for rank in ranks] == [[False, True, False]] * 2


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("mask", "process 1 has another former mask of blocks.1.mlp.fc1.weight than process 0"),
        ("units", "process 1 has another former order of live heads in blocks.0 than process 0"),
    ],
)
def test_other_masks_on_one_process_are_named_on_all(where: str, named: str, ranks: list[Found]) -> None:
    for rank in ranks:
        tried, message = rank["tampered"][where]
        assert tried == 2  # the update after the third step found it
        assert message.startswith("after the update at step 3 the processes differ: ")
        assert named in message
        assert message.endswith("; go on from the last checkpoint")


def test_between_updates_only_gradients_and_one_small_vector_are_sent(ranks: list[Found]) -> None:
    for rank in ranks:
        found = rank["traffic"]
        quiet = [sizes for update, sizes in found["steps"] if not update]
        assert len(quiet) >= 5
        for sizes in quiet:
            *gradients, vector = sizes
            assert sum(gradients) == found["gradients"]
            assert vector == 6 * 4  # not finite, stop, no data, loss, cross-entropy, patches kept
        loud = [sizes for update, sizes in found["steps"] if update]
        assert loud
        # An update adds the dense gradient of the masked weights, in float32, and digests.
        for sizes in loud:
            assert found["masks"] * 4 < sum(sizes) - found["gradients"] < found["masks"] * 4 + 1000


def test_a_process_without_a_backward_pass_keeps_nobody_waiting(ranks: list[Found]) -> None:
    found = [rank["without_backward"] for rank in ranks]
    assert [one["updates"] for one in found] == [3, 3]
    assert equal(found[0]["masks"], found[1]["masks"])


@pytest.mark.parametrize("count", [1, 2, 10, 11])
def test_evaluation_counts_each_image_once(count: int, ranks: list[Found]) -> None:
    trainer = make(ALONE, {"data": {"eval_subset": count, "eval_batch_size": 4}}, ADAPTIVE)
    expected = measure(trainer.model, trainer.data.eval, trainer.autocast)
    assert expected.metrics["images"] == count
    for rank in ranks:
        metrics, kept = rank["evaluated"][count]
        assert metrics == pytest.approx(expected.metrics, rel=1e-5)
        assert torch.equal(kept, expected.kept)
    shares = [len(share_of(count, Place(torch.device("cpu"), rank, 2))) for rank in range(2)]
    assert shares == [-(-count // 2), count // 2]  # of one image the second process has none


def test_corrupt_images_are_left_out_and_counted_once(ranks: list[Found], folder: Path) -> None:
    train, validation = str(folder / "train/ant/1.png"), str(folder / "validation/cat/2.png")
    for rank in ranks:
        assert rank["corrupt"]["always"] == (8, [train, validation], 11)
        assert rank["corrupt"]["never"] == (8, [train, validation], 12)


def test_an_image_that_one_process_cannot_read_no_process_trains_on(ranks: list[Found], folder: Path) -> None:
    sizes, means, names = zip(*(rank["corrupt"]["one"] for rank in ranks), strict=True)
    assert sizes == (10, 10)
    assert means[0] == means[1]
    assert str(folder / "train/bee/2.png") in names[0]
    assert names[0] == names[1]


def test_other_images_on_one_machine_are_refused(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["other_data"].startswith(
            "data.root: process 1 finds 90 images to train on and 20 to evaluate, of 10 classes"
        )


def test_other_settings_on_one_machine_are_refused(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["other_settings"] == (
            "training.amp: 'float32' on process 1 and 'bfloat16' on process 0; give all the same, and a value where "
            "auto chooses"
        )


def test_other_checkpoints_on_one_machine_are_refused(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["other_checkpoint"].startswith(
            "output.runs: process 1 found the checkpoint of step 2 and process 0 that of step 1; it must be a folder"
        )


def test_what_they_say_to_each_other(ranks: list[Found]) -> None:
    for rank, found in enumerate(ranks):
        assert found["said"].pop("rows").tolist() == [[1, 1, 1], [1, 1, 1]]
        assert found["said"] == {
            "shared": {"of": [0, None, "ä"]},
            "gathered": ["", "x"],
            "any": [False, True],
            "mean": (0.5, 3.0),  # the value of both, the gradient of one
        }, rank


PARTINGS = ("in order", "by an error", "the second does not come", "the second is gone")


def threads_of_the_group() -> list[str]:
    """Names of this process's threads that are gloo's (on Linux)."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def train_and_part(processes: Processes, title: str, folder: Path) -> None:
    network = DistributedDataParallel(nn.Linear(2, 2))
    network.circle = [network]  # type: ignore[assignment]
    network(torch.ones(1, 2)).sum().backward()
    processes.wait()
    if title == "by an error":
        raise KeyError(title)
    if processes.rank == 1 and title == "the second is gone":
        os._exit(0)
    while processes.rank == 1 and title == "the second does not come" and not (folder / f"{title} 0.pt").exists():
        time.sleep(0.05)
    processes.part()


def part(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    processes_module.GRACE = timedelta(seconds=1)
    for title, port in zip(PARTINGS, ports, strict=True):
        environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()})
        with suppress(KeyError), join_processes("cpu") as processes:
            before = threads_of_the_group()
            train_and_part(processes, title, folder)
        torch.save((before, threads_of_the_group()), folder / f"{rank}.pt")
        (folder / f"{rank}.pt").rename(folder / f"{title} {rank}.pt")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("localhost", 0))
        return [free.getsockname()[1] for free in sockets]


def test_when_they_part_no_thread_of_the_group_is_left(tmp_path: Path) -> None:
    """One that is left aborts the process now and then while the interpreter ends. And nobody fails for want of the
    other, when all is done."""
    torch.multiprocessing.spawn(part, args=(free_ports(len(PARTINGS)), tmp_path), nprocs=2)
    for title in PARTINGS:
        for rank in range(1 if title == "the second is gone" else 2):
            before, after = torch.load(tmp_path / f"{title} {rank}.pt")
            assert before or not Path("/proc/self/task").exists()
            assert after == [], (title, rank)


def test_torchrun_on_two_machines(tmp_path: Path) -> None:
    """Two of torchrun's agents meet on this machine, as they would on two."""
    (tmp_path / "small.yaml").write_text(to_yaml(configure({"data": {"eval_subset": 21}, "training": {"epochs": 1}})))
    (port,) = free_ports(1)
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=localhost:{port}", "-m", "experiments", "train", f"--config={tmp_path}/small.yaml"),
        *(f"--output.runs={tmp_path}", "--output.name=run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted("test: done" in text for text in said) == [False, True]  # the first process speaks alone
    assert (tmp_path / "run" / "sparse.safetensors").is_file()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 10
    top1 = last["eval/top1"] * 21 / 100
    assert math.isclose(top1, round(top1), abs_tol=1e-6)  # of 21 images, each counted once


# One process is enough for these


def test_who_a_process_is() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_processes({}) == ALONE
    assert find_processes(torchrun) == Processes(3, 4, 1)
    assert [p.is_main for p in (ALONE, Processes(3, 4, 1))] == [True, False]
    for change, message in (
        ({"RANK": "4"}, "RANK: the environment variable is 4, which is no process of 4"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: the environment variable is 'two'"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_processes({**torchrun, **change})
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT: not set, though WORLD_SIZE is 4"):
        find_processes({name: value for name, value in torchrun.items() if "MASTER" not in name})


def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Processes(3, 4, 1).device("cuda") == "cuda:1"
    assert Processes(3, 4, 1).device("cpu") == "cpu"
    assert ALONE.device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"process 2 of this machine has no GPU, there are 2; .* --nproc-per-node 2"):
        Processes(2, 4, 2).device("cuda")
    with pytest.raises(ConfigError, match=r"training.device: cuda:1 is one device for 4 processes; use cuda"):
        Processes(2, 4, 2).device("cuda:1")


def test_what_differs_is_what_most_do_not_have() -> None:
    table = [[1, 5, 7], [1, 6, 7], [2, 6, 7], [1, 6, 7]]
    assert differences(["a", "b", "c"], table) == [
        "process 2 has another a than process 0",
        "process 0 has another b than process 1",
    ]
    assert differences(["a"], [[1], [2]]) == ["process 1 has another a than process 0"]
    assert differences(["a"], [[1], [2], [2], [1], [3]]) == ["processes 1, 2, 4 have another a than process 0"]
    assert issubclass(DisagreementError, RuntimeError)


def test_parameters_that_learn_nothing_are_found() -> None:
    small = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_classes": 5}
    model = create_model("deit_tiny_patch16_224", **small)
    assert unused_parameters(model, (1, 28, 28)) == []
    model.blocks[1].mlp.register_module("spare", nn.Linear(2, 2))  # type: ignore[union-attr,operator]
    before = torch.get_rng_state()
    assert unused_parameters(model, (1, 28, 28)) == ["blocks.1.mlp.spare.weight", "blocks.1.mlp.spare.bias"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stream_is_not_resumed_inside_an_epoch_in_another_order() -> None:
    trainer = make(ALONE)
    state = advance(trainer, 3).state_dict()
    object.__setattr__(trainer.data.train, "order", (2, 4))
    with pytest.raises(ConfigError, match=r"another order to 2 processes with 4 workers each, .* go on with 0 and 0, "):
        trainer.load_state_dict(state)
    trainer.load_state_dict({**state, "tried": 10})


def test_a_share_that_does_not_divide_is_refused() -> None:
    config = configure()
    message = r"batch_size is 10 over all .*, and there are 3; it must be a multiple of 3, as 12, or start 2 of them"
    with pytest.raises(ValueError, match=message):
        create_data(config.data, device="cpu", seed=0, rank=0, world_size=3)
    assert isinstance(create_data(config.data, device="cpu", seed=0, rank=0, world_size=5), Data)
    assert math.isclose(config.step_images, 10)
