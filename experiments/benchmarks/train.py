"""What fewer heads, neurons and tokens save in training."""

from __future__ import annotations

from experiments.benchmarks.setting import Setting, Step, Structure, macs_of, make_model, make_small, training_step
from experiments.benchmarks.timing import Figure, paired, peak_memory
from sparse_trainer import flops


def dense_step(setting: Setting) -> Step:
    """A training step of the dense model (importable, so that it can run in a process of its own)."""
    return training_step(make_model(setting), setting)


def small_step(setting: Setting, structure: Structure) -> Step:
    """A training step of the small model."""
    return training_step(make_small(setting, structure, structure.top_k).train(), setting)


def benchmark_train(setting: Setting, structure: Structure) -> list[Figure]:
    """A training step of the compact network against the dense one, beside its share of MACs; peak memory.

    Args:
        setting: model, size, precision and number of pairs.
        structure: what is live.
    """
    device = setting.on
    dense, small = make_model(setting).train(), make_small(setting, structure, structure.top_k).train()
    macs, dense_macs = macs_of(small, structure), flops.count(dense).macs
    share = macs / dense_macs
    times = paired(training_step(dense, setting), training_step(small, setting), device=device, pairs=setting.pairs)
    del dense, small
    peak = peak_memory(small_step, setting, structure, device=device) / 2**20
    dense_peak = peak_memory(dense_step, setting, device=device) / 2**20
    return [
        Figure("MACs of one image", macs, "", reference=dense_macs, ratio=share),
        Figure("training step", times.second, "s", reference=times.first, ratio=times.ratio, ideal=share),
        Figure("training step over its share of MACs", times.ratio / share, "", ideal=1.0),
        Figure("peak memory of a training step", peak, "MiB", dense_peak, peak / dense_peak),
    ]
