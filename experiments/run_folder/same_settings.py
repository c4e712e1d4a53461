"""What must be the same: the settings of a run that goes on, and what its processes find on their machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config.reading import flatten
from experiments.config.run_config import RunConfig
from experiments.data.create_data import Data
from experiments.errors import ConfigError
from experiments.processes.processes import Processes
from sparse_trainer.files.tensor_file import quote

MAY_CHANGE = (
    "output.",
    "recipe",
    "data.root",
    "data.download",
    "data.workers",
    "data.eval_batch_size",
    "data.memory_limit",
    "training.device",
    "training.compile",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.max_bad_steps",
)
"""Settings, or sections of them, that a resumed run may have otherwise."""
PER_MACHINE = ("output.", "data.root", "data.download", "data.workers", "data.memory_limit")
"""Settings, or sections of them, that the processes of a run may have each for itself."""


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys of the settings that differ and would make another run."""
    keys = sorted({*saved, *now})
    return [key for key in keys if saved.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)]


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that would make another run of it.

    Raises:
        ConfigError: naming every such setting.
    """
    odd = [f"{key}: {now.get(key)!r} differs from {quote(saved.get(key), 300)}" for key in differing(saved, now)]
    if odd:
        raise ConfigError(f"{'; '.join(odd)}, which the run was started with; leave it out to resume")


def check_same_settings(config: RunConfig, processes: Processes) -> None:
    """Refuse to train together under different settings, given so or chosen so by machines that differ.

    Raises:
        ConfigError: on every process, naming the first such setting.
    """
    everyone = processes.gather(flatten(config))
    for rank, found in enumerate(everyone):
        for key in sorted({*found, *everyone[0]}):
            if found.get(key) != everyone[0].get(key) and not key.startswith(PER_MACHINE):
                raise ConfigError(
                    f"{key}: {found.get(key)!r} on process {rank} and {everyone[0].get(key)!r} on process 0; give all "
                    "the same, and a value where auto chooses"
                )


def check_same_data(data: Data, processes: Processes) -> None:
    """Refuse images that are other ones on another machine.

    Raises:
        ConfigError: on every process, saying what each finds.
    """
    own = [data.train_size, data.eval_size, data.num_classes, list(data.mean), list(data.class_names)]
    everyone = processes.gather(own)
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            (train, evaluation, classes, mean, _), first = found, everyone[0]
            raise ConfigError(
                f"data.root: process {rank} finds {train:,} images to train on and {evaluation:,} to evaluate, of "
                f"{classes} classes and mean {mean}; process 0 {first[0]:,} and {first[1]:,}, of {first[2]} and "
                f"{first[3]}; all machines need the same files"
            )


def check_same_checkpoint(steps: Sequence[int], processes: Processes) -> None:
    """Refuse to go on where the processes have read different checkpoints.

    Raises:
        ConfigError: on every process.
    """
    everyone = processes.gather(list(steps))
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            raise ConfigError(
                f"output.runs: process {rank} found the checkpoint of step {found[0]:,} and process 0 that of step "
                f"{everyone[0][0]:,}; it must be a folder that all machines share"
            )


def check_same_order(saved: Sequence[int], now: Sequence[int]) -> None:
    """Refuse to go on inside an epoch whose images would come in another order: some twice, others not at all.

    Args:
        saved, now: :attr:`experiments.data.batches.TrainBatches.order`.

    Raises:
        ConfigError: saying how the run was started.
    """
    if list(saved) != list(now):
        raise ConfigError(
            f"data.workers: a streamed data set comes in another order to {now[0]} processes with {now[1]} workers "
            f"each, and the run stopped inside an epoch; go on with {saved[0]} and {saved[1]}, as before"
        )
