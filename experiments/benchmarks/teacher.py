"""What a teacher costs, by the way it is run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.benchmarks.setting import Setting, classifier, make_model, textured_images, training_step
from experiments.benchmarks.timing import Figure, alternate, summarize
from experiments.evaluation.precision import narrow


@dataclass(frozen=True)
class Ways:
    """Which ways are tried."""

    compiled: bool = True
    """Time one that torch.compile made, too: it takes a minute to make."""


def benchmark_teacher(setting: Setting, ways: Ways) -> list[Figure]:
    """A teacher's forward pass over the training step of a student of the same size: with the graph that nobody
    needs, in inference mode, with weights in bfloat16, and compiled; and what bfloat16 does to its probabilities.

    Args:
        setting: model, size, the precision of the student, and number of rounds.
        ways: which are tried.
    """
    student = make_model(setting).train()
    images = textured_images(setting.batch_size, setting.image_size, setting.on)
    plain = make_model(replace(setting, amp="float32")).eval().requires_grad_(True)
    half = copy.deepcopy(plain).requires_grad_(False)
    narrow(half, "bfloat16")
    exact = classifier(copy.deepcopy(plain).requires_grad_(False), replace(setting, amp="float32", compile=False))
    short = replace(setting, amp="bfloat16", compile=False)
    rough = classifier(half, short)
    forward: dict[str, Callable[[Tensor], object]] = {
        "with a graph, float32": plain,
        "in inference mode, float32": exact,
        "in inference mode, bfloat16": rough,
    }
    if ways.compiled:
        forward["in inference mode, bfloat16, compiled"] = classifier(half, replace(short, compile=True))
    runs = [lambda call=call: call(images) for call in forward.values()]
    step = training_step(student, setting, images=images)
    rounds = alternate(step, *runs, device=setting.on, pairs=1 + setting.pairs)[1:]
    figures = []
    for number, name in enumerate(forward, start=1):
        times = summarize([(times[0], times[number]) for times in rounds])
        figures.append(Figure(f"teacher {name}", times.second, "s", times.first, times.ratio, ideal=1 / 3))
    with torch.inference_mode():
        change = float((exact(images).float().softmax(1) - rough(images).float().softmax(1)).abs().max())
    return [*figures, Figure("greatest change of a probability by bfloat16", change, "")]
