"""What ``sparse-trainer train`` says at its end: what came out, with the dense network beside it."""

from __future__ import annotations

import shlex
from importlib import resources
from typing import Any

import yaml
from rich.console import Console

from experiments.config.reading import flatten, load_config, recipes
from experiments.config.run_config import RunConfig
from experiments.evaluation.measuring import describe_tokens, missed_target
from experiments.run_folder.model_card import CARD, write_card
from experiments.run_folder.same_settings import differing
from experiments.terminal import print_table
from experiments.training.loop import Loop
from experiments.training.speeds import Speeds

OF_NO_MATTER = ("training.seed", "training.amp", "training.deterministic", "losses.teacher_amp")
"""Settings with which a recipe still comes to what it is known to come to, but for chance."""
WORTH_SAYING = 1.05
"""Times as fast that kernels must make a network to be named."""


def conclude(loop: Loop, console: Console) -> None:
    """The model card beside the file, and the table at the end: measured on the tensors and files as they are."""
    trainer, folder, history = loop.trainer, loop.folder, loop.history
    unreadable = trainer.unreadable_images()
    if not loop.processes.is_main:
        return
    assert history.best is not None
    if not write_card(folder.sparse, trainer.config.data):
        console.print(f"note: {folder.path / CARD} is not ours and stays; there is no model card", markup=False)
    last, best, count = history.evaluations[-1], history.best, trainer.count()
    prefix = "ema_" if trainer.ema is not None else ""
    sparse_bytes = folder.sparse.stat().st_size
    minutes, seconds = divmod(round(loop.clock.seconds), 60)
    losses = trainer.config.losses
    # Of training images, which may be augmented to hold less that is worth a look than those of the evaluation.
    asked, missed = "", None
    if losses.macs_target is not None and losses.bounds_macs:
        computed = count.macs / trainer.dense_macs
        asked = f"; {computed:.1%} computed, {losses.macs_target:.1%} asked of training images"
        if trainer.tokens is not None:
            missed = missed_target(computed, losses.macs_target, trainer.tokens)
    rows = [
        (
            "accuracy",
            f"top-1 {last[prefix + 'top1']:.2f} %   top-5 {last[prefix + 'top5']:.2f} %",
            dense_accuracy(trainer.config),
        ),
        ("best top-1", f"{best[loop.score]:.2f} % at step {int(best['step']):,}", ""),
        ("live parameters", f"{trainer.budget}; budget {trainer.target:,}", f"{trainer.budget.total:,}"),
        (
            "MACs per image",
            f"{count.live_macs / 1e6:,.1f} M live, {count.macs / 1e6:,.1f} M as computed{asked}",
            f"{trainer.dense_macs / 1e6:,.1f} M",
        ),
        (
            "sparse file",
            f"{sparse_bytes / 1e6:,.3f} MB, {sparse_bytes / trainer.dense_bytes:.1%} of the dense weights",
            f"{trainer.dense_bytes / 1e6:,.3f} MB",
        ),
        ("training time", f"{minutes} min {seconds:02d} s, evaluation and saving not counted", ""),
        ("saved weights", "average over the training (EMA)" if trainer.ema is not None else "of the last step", ""),
        ("written to", str(folder.path), ""),
    ]
    if loop.speeds is not None:
        own = trainer.config.sparsity is not None or trainer.config.selector is not None
        speeds = _describe_speeds(loop.speeds) if own else f"{loop.speeds.trained:,.0f}"
        rows.insert(5, ("images per second", speeds, f"{loop.speeds.dense:,.0f}" if own else ""))
    if trainer.tokens is not None:
        rows.insert(4, ("patches kept", describe_tokens(trainer.tokens), "all"))
    if trainer.bad_steps:
        rows.insert(-1, ("dropped steps", f"{trainer.bad_steps} with a loss or gradient that was not finite", ""))
    if unreadable:
        rows.insert(-1, ("unreadable images", f"{len(unreadable)}", ""))
    print_table(console, f"{trainer.config.recipe}: done", rows, headings=("", "this network", "dense"))
    if missed is not None:
        console.print(f"note: {missed}", soft_wrap=True, markup=False)
    file, runs = (shlex.quote(str(path)) for path in (folder.sparse, folder.path.parent))
    console.print(
        f"next:\n  sparse-trainer evaluate {file}\n  tensorboard --logdir {runs}", soft_wrap=True, markup=False
    )


def _describe_speeds(speeds: Speeds) -> str:
    text = f"{speeds.trained:,.0f}, {speeds.trained / speeds.dense:.2f} times dense"
    fast = speeds.accelerated
    if fast is not None and fast > WORTH_SAYING * speeds.trained:
        text += f"; {fast:,.0f}, {fast / speeds.dense:.2f} times dense, with --kernels auto"
    return text


def dense_accuracy(config: RunConfig) -> str:
    """What the dense network of an unchanged recipe came to; else how to find out."""
    if config.sparsity is None and config.selector is None:
        return ""
    reference = references().get(config.recipe)
    if reference is not None and is_unchanged(config):
        seeds = "one seed" if reference["seeds"] == 1 else f"mean of {reference['seeds']} seeds"
        return f"top-1 {reference['top1']:.2f} % ({seeds})"
    return "not known: train it with --sparsity null --selector null"


def references() -> dict[str, dict[str, Any]]:
    """By recipe, the dense network's top-1 in percent after as many steps, and the number of seeds."""
    text = (resources.files("experiments.config") / "references.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def is_unchanged(config: RunConfig) -> bool:
    """Whether a run is that of its recipe, whatever its seed and wherever it writes."""
    recipe = recipes().get(config.recipe)
    if recipe is None:
        return False
    odd = differing(flatten(load_config(recipe)), flatten(config))
    return all(key in OF_NO_MATTER for key in odd)
