"""The numbers of a run, twice: for TensorBoard, and as lines of ``metrics.jsonl``.

Both are written by the process itself, without a thread: what a full disk refuses is known where it was written.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import FileWriter

FILE_VERSION = "brain.Event:2"
MOST_POINTS = 2048
"""Of a curve that is remembered; then every second one is forgotten."""


COLOURS = 192
"""Of a picture, at most."""
NO_CHARTS = ("budget/", "weights_by_layer/churn/", "weights_by_layer/threshold/", "heads/swapped/", "neurons/swapped/")
"""Beginnings of tags that have no chart in TensorBoard: the budget, a flat line, is in its text, and single layers and
blocks would be dozens of charts, which the overview shows in one picture."""


class WholeRecords:
    """A file that grows by whole records only: one that does not fit is taken back.

    Args:
        path: the file; it is made where it is missing.
        size: bytes that are kept of what is there; None for all.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        there = self._file.seek(0, os.SEEK_END)
        self.path, self.size = path, there
        #: Bytes that should have been there and are not.
        self.missing = max((size or 0) - there, 0)
        if size is not None:
            # Where something is missing a line may be torn.
            self.size = path.read_bytes().rfind(b"\n") + 1 if self.missing else size
            self._file.truncate(self.size)

    def append(self, record: bytes) -> None:
        """Add ``record``.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        done = 0
        try:
            while done < len(record):  # a part may be written where the rest does not fit; going on says why
                done += self._file.write(record[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.size += len(record)

    def sync(self) -> None:
        """Bring everything to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._file.close()


class EventFile:
    """One event file of TensorBoard; the part of its ``EventFileWriter`` that torch's writer needs.

    That one writes in a thread, which on a full disk dies with a trace and leaves the news for later.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: the later process comes second.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = WholeRecords(folder / name)
        self._waiting = io.BytesIO()
        self._records = RecordWriter(self._waiting)
        self.add_event(Event(wall_time=time.time(), file_version=FILE_VERSION))

    def get_logdir(self) -> str:
        return str(self._file.path.parent)

    def add_event(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        data = self._waiting.getvalue()
        if data:
            self._file.append(data)
            self._waiting.seek(0)
            self._waiting.truncate()

    def sync(self) -> None:
        """Bring everything to the disk."""
        self.flush()
        self._file.sync()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


class EventWriter(FileWriter):
    """torch's writer over an :class:`EventFile`."""

    def __init__(self, folder: Path) -> None:
        self.event_writer: Any = EventFile(folder)


class MetricsWriter(SummaryWriter):
    """A TensorBoard writer that also keeps every scalar in ``metrics.jsonl``.

    Numbers of one step make one line, ``{"step": 50, "train/loss": 1.9, ...}``, which is written by
    :meth:`end_line`. Images and histograms go to TensorBoard alone.

    Args:
        events: TensorBoard's folder.
        metrics: ``metrics.jsonl``.
        purge_step: of earlier processes TensorBoard is to forget this step and later ones; None if there were none.
        size: bytes of ``metrics.jsonl`` that are kept; later lines belong to steps that are run again.
        line: the line that was not ended when the state was saved, with its ``step``.
    """

    file_writer: Any
    all_writers: Any

    def __init__(
        self,
        events: Path,
        metrics: Path,
        *,
        purge_step: int | None = None,
        size: int = 0,
        line: Mapping[str, float] | None = None,
    ) -> None:
        self._lines = WholeRecords(metrics, size)
        self.line: dict[str, float] = dict(line or {})
        #: Numbers so far, by tag: (step, value), thinned where they are many.
        self.series: dict[str, list[tuple[int, float]]] = {}
        self._remember_file(metrics)
        super().__init__(str(events), purge_step=purge_step)

    def _remember_file(self, metrics: Path) -> None:
        """What earlier processes wrote, in whole lines."""
        for text in metrics.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, AttributeError):
                record = json.loads(text)
                for tag, value in record.items():
                    self._remember(tag, record["step"], value)
        for tag, value in self.line.items():
            self._remember(tag, int(self.line["step"]), value)

    def _remember(self, tag: str, step: int, value: float | None) -> None:
        if tag == "step" or value is None or not math.isfinite(value):
            return
        points = self.series.setdefault(tag, [])
        points.append((step, value))
        if len(points) > MOST_POINTS:
            del points[1::2]

    @property
    def missing(self) -> int:
        """Bytes of ``metrics.jsonl`` that should have been there."""
        return self._lines.missing

    @property
    def size(self) -> int:
        """Bytes of ``metrics.jsonl``, without the open line."""
        return self._lines.size

    def _get_file_writer(self) -> FileWriter:
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = EventWriter(Path(self.log_dir))
            self.all_writers = {self.file_writer.get_logdir(): self.file_writer}
            if self.purge_step is not None:
                step, self.purge_step = self.purge_step, None
                self.file_writer.add_event(Event(step=step, file_version=FILE_VERSION))
                self.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return self.file_writer

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        """One number. NaN and infinity, which JSON cannot hold, are null in ``metrics.jsonl``.

        What would be a flat line, or one of dozens of charts (:data:`NO_CHARTS`), stands there alone.
        """
        if self.line.get("step", global_step) != global_step:
            self.end_line()
        number = float(scalar_value)
        if not tag.startswith(NO_CHARTS):
            super().add_scalar(tag, number, global_step, *args, **kwargs)
        self._remember(tag, global_step, number)
        self.line.setdefault("step", global_step)
        self.line[tag] = int(number) if number.is_integer() else number

    def add_numbers(self, values: Mapping[str, float], step: int) -> None:
        """Several numbers of one step, by tag."""
        for tag, value in values.items():
            self.add_scalar(tag, value, step)

    def add_image(self, tag: str, img_tensor: Any, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        """A picture ``[3, H, W]``, in bytes or from 0 to 1. It is stored with a palette, which takes half of the time
        and of the place."""
        pixels = img_tensor.detach().cpu()
        if pixels.is_floating_point():
            pixels = (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)
        picture = Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())
        self.add_picture(tag, picture.quantize(COLOURS, method=Image.Quantize.FASTOCTREE), global_step)

    def add_picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """A picture as it is, such as one that has its palette."""
        encoded = io.BytesIO()
        picture.save(encoded, "PNG", compress_level=4)
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def add_charts(self, values: Mapping[str, float], step: int) -> None:
        """Numbers for TensorBoard alone: what a clock said, which ``metrics.jsonl`` need not repeat."""
        for tag, value in values.items():
            super().add_scalar(tag, value, step)

    def add_settings(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The run's settings for TensorBoard's HPARAMS page; beside them it shows the last value of each metric.

        Args:
            metrics: by the tags under which they were added.
        """
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        for summary in hparams(plain, dict(metrics)):
            self._get_file_writer().add_summary(summary)

    def end_line(self) -> None:
        """Write the open line: no more numbers of its step will come."""
        if self.line:
            values = {tag: value if math.isfinite(value) else None for tag, value in self.line.items()}
            self._lines.append(json.dumps(values).encode() + b"\n")
            self.line = {}
        self.flush()

    def sync(self) -> None:
        """Bring all but the open line to the disk."""
        self._lines.sync()
        self._get_file_writer().event_writer.sync()

    def close(self) -> None:
        """Close the files. An open line is left out: it is the checkpoint's to keep."""
        if self.all_writers is None:
            return
        events = self._get_file_writer().event_writer
        self.file_writer = self.all_writers = None
        try:
            events.close()
        finally:
            self._lines.close()
