"""What an update leaves behind: tags, flat records, and a timeline that can be replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sparse_trainer.budget import Budget
from sparse_trainer.files.tensor_file import CheckpointError, write_tensors
from sparse_trainer.mask_log import (
    MaskLog,
    read_timeline,
    record_path,
    truncate_timeline,
    update_from_json,
    update_record,
    update_to_json,
)
from sparse_trainer.masks import random_mask
from sparse_trainer.report import BlockUpdate, LayerUpdate, MaskUpdate

SHAPES = {"fc1.weight": (6, 7), "conv.weight": (4, 3, 2, 2)}


def make_masks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_mask(shape, 20, generator) for name, shape in SHAPES.items()}


def make_update(step: int) -> MaskUpdate:
    return MaskUpdate(
        step=step,
        drop_fraction=0.25,
        budget=Budget(40, 90),
        seconds=0.125,
        layers={
            "fc1.weight": LayerUpdate(pruned=3, grown=3, live=20, total=42, explored=30, threshold=0.5),
            "conv.weight": LayerUpdate(pruned=1, grown=1, live=20, total=48, explored=24, threshold=0.0),
        },
        blocks={
            "blocks.0": BlockUpdate(
                heads_removed=(1,),
                heads_added=(2,),
                neurons_removed=(5, 6),
                neurons_added=(0, 9),
                live_heads=(0, 2),
                heads=4,
                live_neurons=5,
                neurons=10,
                explored_heads=3,
                explored_neurons=7,
            ),
            "blocks.1": BlockUpdate(
                live_heads=(0, 1), heads=3, live_neurons=5, neurons=10, explored_heads=2, explored_neurons=5
            ),
        },
        warnings=("something",),
    )


def test_the_flat_record() -> None:
    assert update_record(make_update(300)) == {
        "step": 300,
        "budget/live_parameters": 40,
        "budget/total_parameters": 90,
        "update/drop_fraction": 0.25,
        "update/seconds": 0.125,
        "sparsity/churn": 8 / 40,
        "sparsity/exploration": 54 / 90,
        "weights_by_layer/churn/fc1.weight": 6 / 20,
        "weights_by_layer/churn/conv.weight": 2 / 20,
        "weights_by_layer/threshold/fc1.weight": 0.5,
        "weights_by_layer/threshold/conv.weight": 0.0,
        "heads/exploration": 5 / 7,
        "heads/swapped/blocks.0": 1,
        "heads/swapped/blocks.1": 0,
        "neurons/exploration": 12 / 20,
        "neurons/swapped/blocks.0": 2,
        "neurons/swapped/blocks.1": 0,
    }
    unstructured = update_record(MaskUpdate(step=1, drop_fraction=0.1, budget=Budget(1, 2), seconds=0.0))
    assert not [tag for tag in unstructured if tag.startswith(("heads", "neurons", "sparsity"))]


def test_a_report_survives_json() -> None:
    update = make_update(300)
    assert update_from_json(json.loads(json.dumps(update_to_json(update)))) == update


def test_the_timeline_replays(tmp_path: Path) -> None:
    log = MaskLog(tmp_path, writer=None)
    heads, neurons = {"blocks.0": (1, 0)}, {"blocks.0": (5, 6, 1)}
    log.log_start(make_masks(0), live_heads=heads, live_neurons=neurons)
    for step in (100, 200):
        log.log_update(make_update(step), make_masks(step), live_heads=heads, live_neurons=neurons)
    records = list(read_timeline(tmp_path))
    assert [record.step for record in records] == [0, 100, 200]
    assert [record.update for record in records] == [None, make_update(100), make_update(200)]
    for record in records:
        assert record.live_heads == heads
        assert record.live_neurons == neurons
        masks = record.masks()
        assert masks.keys() == SHAPES.keys()
        for name, mask in make_masks(record.step).items():
            assert torch.equal(masks[name], mask)
    assert record_path(tmp_path, 100).name == "step_00000100.safetensors"


def test_live_heads_default_to_the_report(tmp_path: Path) -> None:
    MaskLog(tmp_path, writer=None).log_update(make_update(100), {})
    (record,) = read_timeline(tmp_path)
    assert record.live_heads == {"blocks.0": (0, 2), "blocks.1": (0, 1)}
    assert record.masks() == {}


def test_the_timeline_is_lazy(tmp_path: Path) -> None:
    log = MaskLog(tmp_path, writer=None)
    log.log_start(make_masks(0))
    path = record_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # damage in the masks
    (record,) = read_timeline(tmp_path)
    with pytest.raises(CheckpointError, match="the tensor data is damaged"):
        record.masks()


def test_a_resumed_run_leaves_no_lost_or_doubled_record(tmp_path: Path) -> None:
    log = MaskLog(tmp_path, writer=None)
    log.log_start(make_masks(0))
    for step in (100, 200, 300):
        log.log_update(make_update(step), make_masks(step))
    torn = tmp_path / "masks" / ".step_00000400.safetensors.tmp"
    torn.write_bytes(b"half of a rec")
    other = tmp_path / "masks" / "notes.txt"
    other.write_text("a user's own file")

    log.truncate_after(200)
    assert [record.step for record in read_timeline(tmp_path)] == [0, 100, 200]
    assert not torn.exists()
    assert other.exists()
    log.log_update(make_update(200), make_masks(7))  # the same step again replaces
    log.log_update(make_update(300), make_masks(300))
    records = list(read_timeline(tmp_path))
    assert [record.step for record in records] == [0, 100, 200, 300]
    assert torch.equal(records[2].masks()["fc1.weight"], make_masks(7)["fc1.weight"])
    truncate_timeline(tmp_path / "no run", 0)


def test_damaged_records(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no mask timeline"):
        list(read_timeline(tmp_path))
    log = MaskLog(tmp_path, writer=None)
    log.log_start(make_masks(0))
    record_path(tmp_path, 0).rename(record_path(tmp_path, 5))
    with pytest.raises(CheckpointError, match="the step: expected 5, its name, found 0"):
        list(read_timeline(tmp_path))

    def write(**changes: object) -> None:
        metadata = {"step": 5, "shapes": {}, "live_heads": {}, "live_neurons": {}, "update": None, **changes}
        write_tensors(record_path(tmp_path, 5), {}, metadata, format="sparse-trainer-masks", version=1)

    for changes in ({"update": {"step": 3}}, {"update": 3}, {"live_heads": [1]}, {"live_neurons": {"a": "b"}}):
        write(**changes)
        with pytest.raises(CheckpointError, match=r"step_00000005.safetensors: the report: expected"):
            list(read_timeline(tmp_path))
    for shapes in (3, {"w": [8]}, {"w": "a"}, {"w": [-8]}):
        write(shapes=shapes)
        (record,) = read_timeline(tmp_path)
        with pytest.raises(CheckpointError, match="the masks: expected bits that fit their shapes"):
            record.masks()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "masks").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"masks: cannot be made: File exists"):
        MaskLog(tmp_path, writer=None).log_start({})


def test_tensorboard_reads_the_tags_back(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(7, 6)
            self.conv = nn.Conv2d(3, 4, 2)

    folder = tmp_path / "tensorboard"
    with tensorboard.SummaryWriter(str(folder)) as writer:
        log = MaskLog(tmp_path, writer, image_every=2)
        log.log_start(make_masks(0), live_heads={"blocks.0": (0, 1)}, dense_heads={"blocks.0": 4})
        for step in (100, 200, 300):
            log.log_update(make_update(step), make_masks(step))
        log.log_weights(300, Model(), make_masks(300))
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    expected = {tag: value for tag, value in update_record(make_update(0)).items() if tag != "step"}
    assert set(events.Tags()["scalars"]) == {*expected, "sparsity/survival"}, "densities of layers do not change"
    for tag, value in expected.items():
        scalars = events.Scalars(tag)
        steps = [100] if tag.startswith("budget/") else [100, 200, 300]
        assert [scalar.step for scalar in scalars] == steps, "a budget that stays is said once"
        assert scalars[0].value == pytest.approx(value)
    first, last = (make_masks(step) for step in (0, 100))
    stayed = sum(int((first[name] & last[name]).sum()) for name in SHAPES)
    assert events.Scalars("sparsity/survival")[0].value == pytest.approx(stayed / 40)
    names = {f"masks/evolution/{name}" for name in SHAPES}
    assert set(events.Tags()["images"]) == {"heads/live", *names}
    assert [image.step for image in events.Images("heads/live")] == [0, 100, 200, 300]
    assert [image.step for image in events.Images("masks/evolution/fc1.weight")] == [0, 200], "every second update"
    assert set(events.Tags()["histograms"]) == {"weights/fc1.weight", "weights/conv.weight"}
    assert events.Histograms("weights/fc1.weight")[0].histogram_value.num == 20, "live weights only"


def test_pictures_of_weights_come_whenever_the_updates_have_doubled(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        log = MaskLog(tmp_path, writer)
        log.log_start(make_masks(0))
        for number in range(1, 10):
            log.log_update(make_update(100 * number), make_masks(number))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    steps = [image.step for image in events.Images("masks/evolution/fc1.weight")]
    assert steps == [0, 400, 800]


def test_histograms_of_a_large_layer_see_all_of_its_inputs(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = torch.nn.Linear(512, 256, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(512.0).expand(256, 512))
    mask = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) < 0.5
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        MaskLog(tmp_path, writer).log_weights(1, model, {"weight": mask})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    value = events.Histograms("weights/weight")[0].histogram_value
    assert 5_000 < value.num < 10_000, "about half of 16,384 places"
    assert value.sum / value.num == pytest.approx(255.5, rel=0.02), "all inputs alike"
    assert (value.min, value.max) == (0, 511)


def test_a_writer_that_takes_pictures_gets_them_as_they_are(tmp_path: Path) -> None:
    taken: list[tuple[str, str, int]] = []

    class Writer:
        def add_scalar(self, *args: object) -> None: ...

        def add_picture(self, tag: str, picture: Any, step: int) -> None:
            taken.append((tag, picture.mode, step))

    log = MaskLog(tmp_path, cast("Any", Writer()))
    log.log_start(make_masks(0), live_heads={"blocks.0": (0, 1)}, dense_heads={"blocks.0": 4})
    assert taken == [*((f"masks/evolution/{name}", "P", 0) for name in SHAPES), ("heads/live", "P", 0)]


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_every and image_side must be at least 1"):
        MaskLog(tmp_path, None, image_every=0)
