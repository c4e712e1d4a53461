"""A run that was stopped anywhere, however its files were left, ends in the bits of one that never stopped."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from experiments.processes.signals import StopRequest
from experiments.run_folder.folder import RunFolder, create_run_folder, find_run
from experiments.terminal import Display
from experiments.training.loop import Loop, Stopped
from experiments.training.trainer import TrainingError
from experiments.trials.compare import differences, fingerprint, read_events, read_metrics
from sparse_trainer.files.checkpoint import CheckpointError, load_resume, save_resume
from sparse_trainer.mask_log import MaskLog, read_timeline
from tests.test_data import CLASSES, LIBRARY_LEAVES_FILES_OPEN, write_folder
from tests.test_mask_log import make_masks, make_update
from tests.test_training import Sick, StopAt, configure, make_trainer, run, start

# Python 3.12 warns of any fork beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
Changes = dict[str, Any]

SHORT: Changes = {
    "data": {"train_subset": 60},
    "sparsity": {"updates": None, "update_every": 3, "stop_at": 1.0, "growth_batches": 3},
    "training": {"steps": 8, "log_every": 3, "eval_every": 0.7, "checkpoint_every": 0.5},
}
"""Eight steps, six an epoch: updates after 3 and 6, evaluations after 4 and 8, checkpoints after 0, 3, 6, and 4, 8."""
VARIANTS: dict[str, Changes] = {
    "weights": {},
    "accumulation and averages": {
        "model": {"drop_path": 0.2},
        "data": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.3, "crop_padding": 2},
        "sparsity": {**SHORT["sparsity"], "grow": "random", "distribution": "global"},
        "training": {**SHORT["training"], "accumulate": 2, "clip_grad": 1.0, "ema_decay": 0.9, "ema_warmup": True},
    },
    "structured": {
        "sparsity": {
            **SHORT["sparsity"], "density": None, "head_density": 0.67, "neuron_density": 0.5, "swap": "always",
        },
        "optimizer": {"name": "lion", "lr": 1e-3},
    },
    "a budget that falls": {
        "sparsity": {**SHORT["sparsity"], "density": 0.2, "initial_density": 0.9, "pattern": "4x1"},
        "training": {**SHORT["training"], "ema_decay": 0.9},
    },
    "units that leave": {
        "sparsity": {
            **SHORT["sparsity"], "density": 0.2, "initial_density": 1.0, "head_density": 0.34, "neuron_density": 0.5,
            "unit_falls": 1, "update_every": 2, "reach_at": 0.4,
        },
        "training": {**SHORT["training"], "ema_decay": 0.9},
    },
    "blocks of different sizes": {
        "sparsity": {
            **SHORT["sparsity"], "density": 0.35, "head_density": 0.67, "neuron_density": 0.5, "start": "score",
            "unit_distribution": "by_score",
        },
        "training": {**SHORT["training"], "ema_decay": 0.9},
    },
    "tokens": {"sparsity": None, "selector": {"keep_ratio": 0.5, "noise": 1.0}},
    "joint": {
        "sparsity": {
            **SHORT["sparsity"], "density": 0.35, "head_density": 0.67, "neuron_density": 0.5, "swap": "always",
        },
        "selector": {"keep_ratio": 0.5, "noise": 1.0},
        "training": {**SHORT["training"], "ema_decay": 0.9},
    },
    "thresholds": {
        "sparsity": None,
        "selector": {"kind": "threshold", "stages": [1], "thresholds": [0.05]},
        "losses": {"macs_target": 0.8},
    },
    "float16": {"training": {**SHORT["training"], "amp": "float16"}},
    "loader": {"data": {**SHORT["data"], "in_memory": "never", "workers": 0, "auto_augment": "rand-m9-mstd0.5"}},
}  # fmt: skip


def go_on(path: Path, *changes: Changes) -> Loop:
    loop = Loop(make_trainer(*changes), RunFolder(path))
    torch.rand(3)  # whatever was drawn before does not matter
    loop.resume()
    return loop


def stopped(path: Path, *changes: Changes, at: int) -> RunFolder:
    """A run that was ended after a step."""
    loop = start(path, *changes)
    with pytest.raises(Stopped):
        run(loop, StopAt, at=at)
    return loop.folder


def whole(path: Path, *changes: Changes) -> dict[str, str]:
    """The fingerprint of a run that was never stopped."""
    run(start(path, *changes))
    return fingerprint(path)


def train_in_parts(path: Path, *changes: Changes) -> dict[str, str]:
    """The fingerprint of a run that is stopped after every step, and goes on in a new process, so to say."""
    loop, at = start(path, *changes), 1
    while True:
        try:
            run(loop, StopAt, at=at)
            return fingerprint(path)
        except Stopped:
            loop = go_on(path, *changes)
        assert loop.trainer.tried == at
        at += 1


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_after_every_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a scale that overflows at first, so that steps are skipped, and that grows again soon.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**32, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    changes = (SHORT, VARIANTS[name])
    expected = whole(tmp_path / "whole", *changes)
    assert not differences(expected, train_in_parts(tmp_path / "parts", *changes))
    state = load_resume(RunFolder(tmp_path / "parts").bundles()[0])["trainer"]
    if name == "float16":
        assert state["step"] < state["tried"]
        assert state["scaler"]["scale"] < 2.0**32


@pytest.mark.parametrize("at", [2, 5])
def test_the_growth_gradient_is_kept_in_the_middle_of_its_window(at: int, tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run", SHORT, at=at)
    growth = load_resume(folder.bundles()[0])["trainer"]["sparsity"]["weights"]["growth"]
    assert growth["steps"] == 2  # of the three before the update that is due
    assert all(bool(mean.any()) for mean in growth["mean"].values())


def test_worker_processes(tmp_path: Path) -> None:
    """How many there are decides nothing."""
    short = {**SHORT["training"], "steps": 5, "eval_every": 9}
    none, one = ({"data": {**SHORT["data"], "in_memory": "never", "workers": n}, "training": short} for n in (0, 1))
    expected = whole(tmp_path / "whole", SHORT, none)
    stopped(tmp_path / "parts", SHORT, none, at=3)
    run(go_on(tmp_path / "parts", SHORT, one))
    assert not differences(expected, fingerprint(tmp_path / "parts"))


def write_shards(images: Path, target: Path) -> None:
    """``train-0000.tar`` and so on of WebDataset, two of each split."""
    for split in ("train", "validation"):
        for shard in range(2):
            with tarfile.open(target / f"{split}-{shard:04d}.tar", "w") as tar:
                for number, file in enumerate(sorted((images / split).rglob("*.png"))[shard::2]):
                    label = str(CLASSES.index(file.parent.name)).encode()
                    for kind, content in (("png", file.read_bytes()), ("cls", label)):
                        member = tarfile.TarInfo(f"{shard}_{number}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


@LIBRARY_LEAVES_FILES_OPEN
def test_a_stream_inside_an_epoch(tmp_path: Path) -> None:
    write_shards(write_folder(tmp_path / "images", per_class=12, side=14), tmp_path)
    streamed = {
        "dataset": "wds/shards", "root": str(tmp_path), "train_split": "train-{0000..0001}.tar|36",
        "eval_split": "validation-{0000..0001}.tar|18", "num_classes": 3, "image_size": 14, "batch_size": 6,
        "workers": 0, "train_subset": None, "eval_subset": None,
    }  # fmt: skip
    changes = (SHORT, {"data": streamed})
    expected = whole(tmp_path / "whole", *changes)
    stopped(tmp_path / "parts", *changes, at=4)  # four of six batches
    run(go_on(tmp_path / "parts", *changes))
    assert not differences(expected, fingerprint(tmp_path / "parts"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip_a_bit, "the tensor data is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated or too long"),
        (lambda path: path.write_bytes(b""), "is truncated or no safetensors file"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder, expected a file"),
    ],
    ids=["bit", "truncated", "empty", "folder"],
)
def test_a_damaged_newest_checkpoint(damage: Callable[[Path], Any], fault: str, tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole", SHORT)
    folder = stopped(tmp_path / "run", SHORT, at=7)
    newest, before = folder.bundles()
    assert (newest, before) == (folder.bundle(7), folder.bundle(6))
    damage(newest)
    loop = go_on(tmp_path / "run", SHORT)
    assert loop.trainer.tried == 6
    (note,) = loop.notes
    assert note.startswith(f"damaged: {newest}: {fault}")
    assert note.endswith("; going on from step_00000006.resume, the one before")
    with (tmp_path / "said").open("w") as said, Display(Console(file=said), 8, 6) as display:
        loop.run(display, StopRequest())
    assert note in " ".join((tmp_path / "said").read_text().split())
    aside = newest.with_name("step_00000007.resume.damaged")
    assert aside.exists(), "whoever wants to know what happened finds it"
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_no_good_checkpoint(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run", SHORT, at=7)
    for bundle in folder.bundles():
        flip_a_bit(bundle)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"step_00000007.resume: .* damaged.*; the 1 before it cannot be read"):
        go_on(tmp_path / "run", SHORT)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    loop = start(tmp_path / "run", SHORT, {"output": {"keep_last": keep}})
    run(loop)
    names = [path.name for path in loop.folder.bundles()]
    assert names == ["step_00000008.resume", "step_00000006.resume", "step_00000004.resume"][:keep]
    assert not differences(whole(tmp_path / "whole", SHORT), fingerprint(tmp_path / "run"))


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """A process that was killed long after its last checkpoint, in the middle of everything."""
    expected = whole(tmp_path / "whole", SHORT)
    run(start(tmp_path / "run", SHORT, {"output": {"keep_last": 9}}))
    folder = RunFolder(tmp_path / "run")
    for step in (4, 6, 8):
        folder.bundle(step).unlink()
    folder.sparse.unlink()
    with folder.metrics.open("a") as file:
        file.write('{"step": 9, "tra')
    for path in (folder.path, folder.checkpoints, folder.path / "masks"):
        (path / ".step_00000009.safetensors.tmp").write_bytes(b"half of a rec")
    loop = go_on(tmp_path / "run", SHORT)
    assert loop.trainer.tried == 3
    run(loop)
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_killed_between_the_checkpoint_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(tmp_path / "whole", SHORT)
    save_best = Loop._save_best

    def killed(loop: Loop) -> None:
        if loop.trainer.tried == 4:
            raise KeyboardInterrupt
        save_best(loop)

    monkeypatch.setattr(Loop, "_save_best", killed)
    with pytest.raises(KeyboardInterrupt):
        run(start(tmp_path / "run", SHORT))
    assert not RunFolder(tmp_path / "run").best.exists()
    monkeypatch.setattr(Loop, "_save_best", save_best)
    run(go_on(tmp_path / "run", SHORT))
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_killed_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(tmp_path / "whole", SHORT)
    loop = start(tmp_path / "run", SHORT)
    monkeypatch.setattr(Loop, "save", lambda loop: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(loop)
    monkeypatch.undo()
    assert loop.folder.begins
    assert loop.folder.metrics.read_text() != ""
    run(Loop(make_trainer(SHORT), loop.folder))
    assert not differences(expected, fingerprint(tmp_path / "run"))
    assert not loop.folder.begins


def test_lines_that_are_lost_are_told(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run", SHORT, at=7)
    text = folder.metrics.read_text()
    folder.metrics.write_text(text[:-30])
    loop = go_on(tmp_path / "run", SHORT)
    run(loop)
    (note,) = loop.notes
    assert note == f"{folder.metrics}: 30 bytes are missing, which the run had written"
    for line in folder.metrics.read_text().splitlines():
        json.loads(line)


def test_the_run_of_an_older_version(tmp_path: Path) -> None:
    """It had one bundle, ``last.resume``, which knew nothing of an open line."""
    expected = whole(tmp_path / "whole", SHORT)
    folder = stopped(tmp_path / "run", SHORT, at=3)
    state = load_resume(folder.bundle(3))
    assert state.pop("metrics_line") == {}
    for bundle in folder.bundles():
        bundle.unlink()
    save_resume(folder.checkpoints / "last.resume", state)
    output = configure({"output": {"runs": str(tmp_path)}}).output
    assert find_run(str(folder.path), output, None) == folder
    assert find_run("auto", output, None) == folder
    loop = go_on(tmp_path / "run", SHORT)
    assert loop.trainer.tried == 3
    run(loop)
    assert not differences(expected, fingerprint(tmp_path / "run"))

    del state["trainer"]["optimizer"]
    save_resume(folder.checkpoints / "last.resume", state)
    for bundle in folder.bundles()[:-1]:
        bundle.unlink()
    with pytest.raises(
        CheckpointError, match=r"last.resume: is not of this run or version: trainer: lacks 'optimizer'"
    ):
        go_on(tmp_path / "run", SHORT)


def test_steps_that_are_dropped_make_no_two_records_of_one_step(tmp_path: Path) -> None:
    """The schedule counts the steps that counted, records count the steps that were tried."""
    loop = start(tmp_path / "run", SHORT, {"training": {**SHORT["training"], "log_every": 1}})
    loop.trainer.objective.loss = Sick(loop.trainer.objective.loss, lambda call: call == 2)
    run(loop)
    assert loop.trainer.bad_steps == 1
    assert [record["step"] for record in read_metrics(loop.folder.metrics)] == [*range(9)]
    assert [record.step for record in read_timeline(loop.folder.path)] == [0, 4, 7]
    assert [step for step, _ in read_events(loop.folder.tensorboard)["sparsity/churn"]] == [4, 7]


def test_bad_steps_are_counted_on(tmp_path: Path) -> None:
    changes = (SHORT, {"training": {**SHORT["training"], "max_bad_steps": 3}})

    def sick(loop: Loop) -> Loop:
        loop.trainer.objective.loss = Sick(loop.trainer.objective.loss, lambda call: True)
        return loop

    with pytest.raises(Stopped):
        run(sick(start(tmp_path / "run", *changes)), StopAt, at=2)
    with pytest.raises(TrainingError, match=r"^step 3: loss or gradient was not finite in 3 steps in a row"):
        run(sick(go_on(tmp_path / "run", *changes)))


def test_which_run_is_meant(tmp_path: Path) -> None:
    output = configure({"output": {"runs": str(tmp_path)}}).output
    assert find_run("auto", output, None) is None
    first, second = (stopped(tmp_path / name, SHORT, at=1) for name in ("first", "second"))
    assert find_run("auto", output, None) == second
    assert find_run(str(first.path), output, None) == first
    assert find_run(str(first.bundle(1)), output, None) == first
    with pytest.raises(ValueError, match=r"step_00000000.resume is not the newest of its run, which is .*00000001"):
        find_run(str(first.bundle(0)), output, None)
    with pytest.raises(ValueError, match=r"--resume: .*/masks holds no checkpoints/step_\*.resume"):
        find_run(str(first.path / "masks"), output, None)

    named = configure({"output": {"runs": str(tmp_path), "name": "third"}}).output
    assert find_run("auto", named, None) is None
    folder = create_run_folder(named, "test")
    assert find_run("auto", named, None) == folder, "killed before it saved anything, it begins once more"
    (folder.path / "notes.txt").touch()
    assert find_run("auto", named, None) is None, "not a folder that holds something else"


def test_pictures_of_every_nth_update_are_those_of_the_run(tmp_path: Path) -> None:
    """As a process that resumes would count them from its own start."""

    class Writer:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def add_image(self, tag: str, image: Tensor, step: int) -> None:
            if tag == "masks/evolution/fc1.weight":
                self.steps.append(step)

        def add_scalar(self, *_: Any) -> None:
            pass

    writer: Any = Writer()
    log = MaskLog(tmp_path, writer, image_every=2)
    log.log_start(make_masks(0))
    for step in (100, 200, 300, 400):
        if step == 400:
            log = MaskLog(tmp_path, writer, image_every=2)
            log.truncate_after(300)
        log.log_update(make_update(step), make_masks(step))
    assert writer.steps == [0, 200, 400]
