"""What every update did: to TensorBoard, to flat records, and to a timeline on disk that can be replayed.

The timeline is ``<run>/masks/``: one file per update, ``step_00001200.safetensors``, with the packed masks and, as
metadata, the live heads and neurons and the update's report; the first holds the state before any update. Each is
written whole or not at all and named by its step, so a run that was killed and resumed has no torn, doubled or
lost record once :func:`truncate_timeline` has dropped what the resumed run will do again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from torch import Tensor, nn

from sparse_trainer.budget import Budget
from sparse_trainer.files.tensor_file import CheckpointError, fault, quote, read_metadata, read_tensors, write_tensors
from sparse_trainer.mask_history import MaskHistory
from sparse_trainer.mask_pictures import to_tensor, units_picture, weights_picture
from sparse_trainer.masks import pack_bits, unpack_bits
from sparse_trainer.report import BlockUpdate, LayerUpdate, MaskUpdate

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FORMAT, VERSION = "sparse-trainer-masks", 1

_RECORD_NAME = re.compile(r"step_(\d{8,})\.safetensors")
_HISTOGRAM_ELEMENTS = 1 << 14
#: Of one width: torch's own choice, 1,549 that grow, takes four times as long.
_BINS = 64

_Part = TypeVar("_Part")

#: What a file may hold where a report says this type.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "tuple[int, ...]": lambda value: type(value) is tuple and all(type(item) is int for item in value),
    "tuple[str, ...]": lambda value: type(value) is tuple and all(map(str.isprintable, value)),
}


@dataclass(frozen=True)
class MaskRecord:
    """One record of the timeline. The masks, which are large, are read when asked for."""

    path: Path
    step: int  #: optimizer steps done
    live_heads: Mapping[str, tuple[int, ...]]  #: by block; empty without head sparsity
    live_neurons: Mapping[str, tuple[int, ...]]
    update: MaskUpdate | None  #: None for the state before any update

    def masks(self) -> dict[str, Tensor]:
        """bool, by parameter name, of the shape of the parameter.

        Raises:
            CheckpointError: if the file is damaged.
        """
        tensors, metadata = read_tensors(self.path, format=FORMAT, version=VERSION)
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in metadata["shapes"].items()}
            return {name: unpack_bits(tensors[name], math.prod(shape)).view(shape) for name, shape in shapes.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
            raise fault(
                self.path, "the masks", expected="bits that fit their shapes", found=quote(str(error))
            ) from error


class MaskLog:
    """Writes the timeline of a run and, where there is a writer, its TensorBoard tags.

    Args:
        run_dir: the run's folder; the timeline lies in its ``masks`` folder.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or None for the timeline alone.
        image_every: write the images of weight masks at every n-th update of the run; None: at the start and
            at updates 4, 8, 16, ..., so that a long run with many layers does not spend its time on
            pictures.
        image_side: the longer side of such an image, in pixels, at most.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        writer: SummaryWriter | None,
        *,
        image_every: int | None = None,
        image_side: int = 256,
    ) -> None:
        if (image_every is not None and image_every < 1) or image_side < 1:
            raise ValueError(f"image_every and image_side must be at least 1, got {image_every}, {image_side}")
        self.run_dir = Path(run_dir)
        self.writer = writer
        self.image_every = image_every
        self.image_side = image_side
        self.history = MaskHistory()
        self._updates = 0

    def log_start(
        self,
        masks: Mapping[str, Tensor],
        *,
        live_heads: Mapping[str, Sequence[int]] | None = None,
        live_neurons: Mapping[str, Sequence[int]] | None = None,
        dense_heads: Mapping[str, int] | None = None,
        step: int = 0,
    ) -> None:
        """Record the state before any update.

        Args:
            masks: bool, by parameter name; empty without weight masks.
            live_heads, live_neurons: unit numbers by block; None without such sparsity.
            dense_heads: heads of the dense block, by block; with it the first ``heads/live`` image is drawn.
        """
        write_record(self.run_dir, step, masks, live_heads or {}, live_neurons or {}, None)
        if self.writer is None:
            return
        self.history = MaskHistory()
        self.history.observe(step, masks, live_heads or {}, live_neurons or {}, None)
        self._add_weights(step)
        if live_heads and dense_heads:
            self._add_units("heads", self.history.heads, dense_heads, step)

    def log_update(
        self,
        update: MaskUpdate,
        masks: Mapping[str, Tensor],
        *,
        live_heads: Mapping[str, Sequence[int]] | None = None,
        live_neurons: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Record one update.

        Args:
            masks: bool, by parameter name, after the update.
            live_heads, live_neurons: unit numbers by block after the update. Heads default to the report's; the
                report does not list all neurons.

        Raises:
            CheckpointError: if the timeline cannot be written.
        """
        if live_heads is None:
            live_heads = {name: block.live_heads for name, block in update.blocks.items() if block.live_heads}
        write_record(self.run_dir, update.step, masks, live_heads, live_neurons or {}, update)
        self._updates += 1
        if self.writer is None:
            return
        known = self.history.budget
        self.history.observe(update.step, masks, live_heads, live_neurons or {}, update)
        for tag, value in update_record(update, self.history).items():
            if tag != "step" and not (tag.startswith("budget/") and known == self.history.budget):
                self.writer.add_scalar(tag, value, update.step)
        blocks = update.blocks
        if any(len(block.live_heads) < block.heads for block in blocks.values()):
            heads = {name: block.heads for name, block in blocks.items()}
            self._add_units("heads", self.history.heads, heads, update.step)
        if live_neurons and any(block.live_neurons < block.neurons for block in blocks.values()):
            neurons = {name: block.neurons for name, block in blocks.items()}
            self._add_units("neurons", self.history.neurons, neurons, update.step)
        if self._draws_weights:
            self._add_weights(update.step)

    def log_weights(self, step: int, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Histograms of the live weights, ``weights/<layer>``.

        Of a large layer an even sample of about 16,384 places is taken: enough for 64 bins, and quick.
        """
        if self.writer is None:
            return
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            inputs, stride = mask[:1].numel(), max(1, math.ceil(mask.numel() / _HISTOGRAM_ELEMENTS))
            while math.gcd(stride, inputs) > 1:  # else some of them would never be looked at
                stride += 1
            live = parameters[name].detach().reshape(-1)[::stride][mask.reshape(-1)[::stride]]
            if live.numel():
                self.writer.add_histogram(f"weights/{name}", live.float().cpu(), step, bins=_BINS)

    def truncate_after(self, step: int) -> None:
        """Forget records after ``step``, as a run that resumes from there must. See :func:`truncate_timeline`.

        Updates are counted on from those that are left, so that ``image_every`` means the same ones as before, and the
        ages of weights and units are read from them. Where a record is damaged, ages begin anew: no run should
        end for its pictures.
        """
        truncate_timeline(self.run_dir, step)
        if self.writer is not None and (self.run_dir / "masks").is_dir():
            self.history = MaskHistory()
            try:
                for record in read_timeline(self.run_dir):
                    masks = record.masks()
                    self.history.observe(record.step, masks, record.live_heads, record.live_neurons, record.update)
            except CheckpointError:
                self.history = MaskHistory()
        self._updates = sum(step > 0 for step, _ in _records(self.run_dir / "masks"))

    @property
    def _draws_weights(self) -> bool:
        """Whether the update that was just counted has pictures of the weights."""
        if self.image_every is not None:
            return self._updates % self.image_every == 0
        # The first two change little of what the start shows.
        return self._updates > 2 and self._updates.bit_count() == 1

    def _add_weights(self, step: int) -> None:
        history = self.history
        for name, born in history.born.items():
            picture = weights_picture(name, born, history.updates, step, self.image_side)
            self._add_picture(f"masks/evolution/{name}", picture, step)

    def _add_units(
        self, kind: str, born: Mapping[str, Mapping[int, int]], all_units: Mapping[str, int], step: int
    ) -> None:
        picture = units_picture(kind, born, all_units, self.history.updates, step)
        self._add_picture(f"{kind}/live", picture, step)

    def _add_picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """As it is where the writer takes pictures (a method ``add_picture``), else as the pixels torch's takes."""
        add_picture = getattr(self.writer, "add_picture", None)
        if add_picture is not None:
            add_picture(tag, picture, step)
        elif self.writer is not None:
            self.writer.add_image(tag, to_tensor(picture), step)


def update_record(update: MaskUpdate, history: MaskHistory | None = None) -> dict[str, int | float]:
    """The numbers of one update by TensorBoard tag, and ``step``: a flat record for ``metrics.jsonl``.

    Heads and neurons appear where some are dormant, densities of layers where they change.

    Args:
        history: which has seen this update; None leaves out what needs earlier ones.
    """
    record: dict[str, int | float] = {
        "step": update.step,
        "budget/live_parameters": update.budget.live,
        "budget/total_parameters": update.budget.total,
        "update/drop_fraction": update.drop_fraction,
        "update/seconds": update.seconds,
    }
    if update.layers:
        record["sparsity/churn"] = update.churn
        record["sparsity/exploration"] = update.exploration_rate
        if history is not None:
            record["sparsity/survival"] = history.survival()
            if history.density_varies:
                record["sparsity/density"] = update.budget.density
    for name, layer in update.layers.items():
        if history is not None and history.density_varies:
            record[f"weights_by_layer/density/{name}"] = layer.density
        record[f"weights_by_layer/churn/{name}"] = layer.churn
        record[f"weights_by_layer/threshold/{name}"] = layer.threshold
    blocks = update.blocks
    if any(len(block.live_heads) < block.heads for block in blocks.values()):
        explored = sum(block.explored_heads for block in blocks.values())
        record["heads/exploration"] = explored / sum(block.heads for block in blocks.values())
        record |= {f"heads/swapped/{name}": len(block.heads_added) for name, block in blocks.items()}
    if any(block.live_neurons < block.neurons for block in blocks.values()):
        explored = sum(block.explored_neurons for block in blocks.values())
        record["neurons/exploration"] = explored / sum(block.neurons for block in blocks.values())
        record |= {f"neurons/swapped/{name}": len(block.neurons_added) for name, block in blocks.items()}
    return record


def record_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the timeline of a run keeps the record of one step."""
    return Path(run_dir) / "masks" / f"step_{step:08d}.safetensors"


def write_record(
    run_dir: str | os.PathLike[str],
    step: int,
    masks: Mapping[str, Tensor],
    live_heads: Mapping[str, Sequence[int]],
    live_neurons: Mapping[str, Sequence[int]],
    update: MaskUpdate | None,
) -> Path:
    """Add one record to the timeline, or replace the one of the same step.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = record_path(run_dir, step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be made: {error.strerror}") from error
    metadata = {
        "step": step,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "live_heads": {block: list(units) for block, units in live_heads.items()},
        "live_neurons": {block: list(units) for block, units in live_neurons.items()},
        "update": None if update is None else update_to_json(update),
    }
    packed = {name: pack_bits(mask) for name, mask in masks.items()}
    write_tensors(path, packed, metadata, format=FORMAT, version=VERSION)
    return path


def read_timeline(run_dir: str | os.PathLike[str]) -> Iterator[MaskRecord]:
    """The records of a run in the order of steps, one at a time; no mask is read before it is asked for.

    Raises:
        CheckpointError: if the run has no timeline, or a record is damaged.
    """
    folder = Path(run_dir) / "masks"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no mask timeline, expected the masks folder of a run")
    for step, path in _records(folder):
        metadata = read_metadata(path, format=FORMAT, version=VERSION)
        if metadata.get("step") != step:
            raise fault(path, "the step", expected=f"{step}, its name", found=quote(metadata.get("step")))
        try:
            update = metadata["update"]
            record = MaskRecord(
                path=path,
                step=step,
                live_heads=_units_from_json(metadata["live_heads"]),
                live_neurons=_units_from_json(metadata["live_neurons"]),
                update=None if update is None else update_from_json(update),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise fault(path, "the report", expected="that of an update", found=quote(str(error))) from error
        yield record


def truncate_timeline(run_dir: str | os.PathLike[str], step: int) -> None:
    """Delete the records after ``step`` and what a killed process left half-written.

    The record of ``step`` itself stays: an update belongs to the state that was saved after it.
    """
    folder = Path(run_dir) / "masks"
    try:
        for later, path in _records(folder):
            if later > step:
                path.unlink()
        for torn in folder.glob(".step_*.safetensors.tmp"):
            torn.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be truncated: {error}") from error


def _records(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((_RECORD_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def update_to_json(update: MaskUpdate) -> dict[str, Any]:
    """The whole report as JSON values; :func:`update_from_json` is its inverse."""
    return dataclasses.asdict(update)


def update_from_json(value: Mapping[str, Any]) -> MaskUpdate:
    """The inverse of :func:`update_to_json`.

    Raises:
        TypeError, KeyError: if it is no such report.
    """
    fields = dict(value)
    fields["budget"] = _from_json(Budget, fields["budget"])
    fields["layers"] = {_name(name): _from_json(LayerUpdate, layer) for name, layer in fields["layers"].items()}
    fields["blocks"] = {_name(name): _from_json(BlockUpdate, block) for name, block in fields["blocks"].items()}
    return _from_json(MaskUpdate, fields)


def _from_json(kind: type[_Part], fields: Mapping[str, Any]) -> _Part:
    """A part of a report. JSON knows lists only; every sequence in a report is a tuple."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        check = _TYPES.get(str(field.type))
        if check is not None and field.name in values and not check(values[field.name]):
            raise TypeError(f"{kind.__name__}.{field.name} is no {field.type}: {quote(values[field.name])}")
    return kind(**values)


def _units_from_json(value: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if not all(isinstance(units, list) and all(type(unit) is int for unit in units) for units in value.values()):
        raise TypeError(f"units that are no whole numbers: {quote(value)}")
    return {_name(name): tuple(units) for name, units in value.items()}


def _name(text: str) -> str:
    # Printed in terminals: a control character could rewrite what is seen there.
    if not text.isprintable():
        raise ValueError(f"a name that cannot be printed: {quote(text)}")
    return text
