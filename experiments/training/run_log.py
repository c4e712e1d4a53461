"""What a run tells of itself while it goes on: numbers, pictures, and the mask timeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from experiments.config.reading import flatten, to_yaml
from experiments.evaluation.measuring import Measured
from experiments.evaluation.token_overlay import draw, examples
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.metrics_writer import MetricsWriter
from experiments.training.speeds import Speeds
from experiments.training.trainer import Trainer
from sparse_trainer.mask_log import MaskLog
from sparse_trainer.overview import overview
from sparse_trainer.report import MaskUpdate

EXAMPLES = 10
"""Images in the picture of dropped patches."""
PANELS = {
    "top-1, %": {"weights": "eval/top1", "average": "eval/ema_top1"},
    "loss": {"training": "train/loss", "evaluation": "eval/loss"},
    "MACs, share of dense": {"live": "macs/share"},
    "patches kept": {},
}
"""Curves of the overview, by panel and name, with their tags; patches have a curve for each stage."""
LAYOUT = {
    "run": {
        "accuracy": ["Multiline", ["eval/top1", "eval/ema_top1"]],
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "masks": ["Multiline", ["sparsity/exploration", "sparsity/survival", "sparsity/churn"]],
        "MACs, share of dense": ["Multiline", ["macs/share"]],
    }
}
"""The charts of TensorBoard's page of custom scalars."""


class Journal:
    """``metrics.jsonl``, ``tensorboard/`` and ``masks/`` of a run; of several processes the first one alone has it.

    All records count the steps that were tried, so no two of them are of one step. Where a step was dropped, that is
    more than the schedules count.

    Args:
        trainer: whose tensors are looked at.
        folder: of the run.
        first: of the steps that are recorded from now on. What is there of this and later steps is forgotten: they
            are run again.
        size, line: of ``metrics.jsonl``, as :attr:`MetricsWriter.size` and :attr:`MetricsWriter.line` were then.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder, first: int, size: int, line: Mapping[str, float]) -> None:
        self.trainer = trainer
        purge_step = first if folder.tensorboard.exists() else None
        self.writer = MetricsWriter(folder.tensorboard, folder.metrics, purge_step=purge_step, size=size, line=line)
        self.mask_log = MaskLog(folder.path, self.writer)
        self.mask_log.truncate_after(first - 1)
        self._examples: Tensor | None = None  # the images of tokens/overlay
        self._all_heads: dict[str, int] = {}

    def begin(self) -> None:
        """The state before the first step; the line stays open for an evaluation of it."""
        trainer, sparsity = self.trainer, self.trainer.sparsity
        if sparsity is not None:
            self.mask_log.log_start(
                sparsity.masks,
                live_heads=sparsity.live_heads,
                live_neurons=sparsity.live_neurons,
                dense_heads=sparsity.dense_heads,
                step=trainer.tried,
            )
        self.writer.add_custom_scalars(LAYOUT)
        self.writer.add_text("configuration", f"<pre>{to_yaml(trainer.config)}</pre>", trainer.tried)
        numbers = {
            "budget/live_parameters": trainer.budget.live,
            "budget/total_parameters": trainer.budget.total,
        }
        self.writer.add_numbers(numbers, trainer.tried)
        self._add_macs()

    def _add_macs(self) -> None:
        macs = self.trainer.count().live_macs
        numbers = {"budget/macs": macs, "macs/share": macs / self.trainer.dense_macs}
        self.writer.add_numbers(numbers, self.trainer.tried)

    def _add_overview(self) -> None:
        """The picture that comes first in TensorBoard: its tag has a capital, and they stand before small letters."""
        trainer, history, series = self.trainer, self.mask_log.history, self.writer.series
        if not history.moments or trainer.sparsity is None:
            return
        panels = {title: {name: series.get(tag, ()) for name, tag in lines.items()} for title, lines in PANELS.items()}
        panels["patches kept"] = {
            f"block {tag.rpartition('/')[2]}": points
            for tag, points in series.items()
            if tag.startswith("eval/tokens_kept/")
        }
        facts = (
            f"{trainer.config.model.name}, step {trainer.tried:,} of {trainer.plan.total_steps:,}: {trainer.budget} "
            f"prunable weights live"
        )
        dense = trainer.sparsity.dense_heads
        dormant = any(len(live) < dense[block] for block, live in (trainer.sparsity.live_heads or {}).items())
        picture = overview(history, panels, facts, dense if dormant else {})
        self.writer.add_picture("Overview", picture, trainer.tried)

    def add_update(self, update: MaskUpdate) -> None:
        """What an update of the masks did, in this step."""
        trainer, sparsity = self.trainer, self.trainer.sparsity
        assert sparsity is not None
        self.mask_log.log_update(
            dataclasses.replace(update, step=trainer.tried),
            sparsity.masks,
            live_heads=sparsity.live_heads,
            live_neurons=sparsity.live_neurons,
        )
        self._add_macs()
        self._add_overview()

    def add_evaluation(self, measured: Measured) -> None:
        """What an evaluation found, after this step."""
        trainer, tried = self.trainer, self.trainer.tried
        self.writer.add_numbers({f"eval/{name}": value for name, value in measured.metrics.items()}, tried)
        evaluations = len(self.writer.series.get("eval/loss", ()))
        # As rare as the pictures of weights: in a long run an evaluation is to cost what it measures.
        draws = trainer.finished or evaluations.bit_count() == 1
        if measured.tokens is not None:
            self._add_macs()
            if draws:
                self._show_tokens(measured)
        if trainer.sparsity is not None and draws:
            self.mask_log.log_weights(tried, trainer.model, trainer.masks)

    def _show_tokens(self, measured: Measured) -> None:
        """What was kept at an evaluation: how it differs between images, and where in the images it lies."""
        trainer, step = self.trainer, self.trainer.tried
        if measured.kept is not None:
            for stage, counts in zip(trainer.stages, measured.kept.unbind(dim=1), strict=True):
                self.writer.add_histogram(f"tokens/kept_per_image/{stage}", counts.cpu(), step)
        if self._examples is None:
            self._examples = examples(*next(iter(trainer.data.eval.batches())), EXAMPLES)
        data = trainer.data
        picture, _ = draw(trainer.result_model, self._examples, data.mean, data.std, trainer.autocast)
        self.writer.add_image("tokens/overlay", picture, step)

    def end(self, final: Mapping[str, float], file_size: int, speeds: Speeds | None) -> None:
        """The run is complete: settings beside what it came to, for the HPARAMS page and as text.

        Args:
            final: the numbers of the last evaluation.
            file_size: of the sparse checkpoint, in bytes.
            speeds: None where they were not measured.
        """
        trainer, tried = self.trainer, self.trainer.tried
        results = {"result/file_megabytes": file_size / 1e6}
        if speeds is not None:
            results["result/images_per_second"] = speeds.trained
        self.writer.add_charts(results, tried)
        metrics = {f"eval/{name}": value for name, value in final.items()}
        metrics |= {"macs/share": trainer.count().live_macs / trainer.dense_macs, **results}
        self.writer.add_settings(flatten(trainer.config), metrics)
        rows = [("live weights", str(trainer.budget)), *((name, f"{value:,.5g}") for name, value in metrics.items())]
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        self.writer.add_text("result", "\n".join(lines), tried)
        self.writer.sync()
        self.writer.close()
