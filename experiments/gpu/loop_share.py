"""How much of its time the GPU is busy in the training loop of this project."""

from __future__ import annotations

import time
from typing import Any

import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.timing import synchronize
from experiments.config.reading import build, find_config
from experiments.config.run_config import RunConfig, resolve
from experiments.data.create_data import EMBEDDED, create_data
from experiments.gpu.settings import Settings
from experiments.training.trainer import Trainer

WARMUP, STEPS, PROFILED = 10, 60, 10
"""Training steps."""


def measure_loop(settings: Settings, *, compile: bool) -> dict[str, Any]:
    """A training step of DeiT-S at 32 px with patch 4, half of its weights live, images in memory on the device.

    ``busy`` is the time that kernels take in a step, as a profiler adds them up, over the time of a step without one;
    the images are the embedded ones, enlarged.
    """
    config = loop_config(settings, compile=compile)
    data = create_data(config.data, device=config.training.device, seed=0)
    trainer = Trainer(config, data)
    warmup, steps, profiled = (2, 2, 1) if settings.dry else (WARMUP, STEPS, PROFILED)
    started = time.perf_counter()
    for _ in range(warmup):
        trainer.train_step()
    synchronize(trainer.device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    synchronize(trainer.device)
    seconds = (time.perf_counter() - started) / steps
    cuda = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(profiled):
            trainer.train_step()
        synchronize(trainer.device)
    # What a kernel takes is told twice, of itself and of the operation that started it.
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    events = [event for event in events if not event.is_user_annotation]
    on_device = sum(event.self_device_time_total for event in events) / 1e6 / profiled
    kernels = sum(event.count for event in events) / profiled
    return {
        "step_seconds": seconds,
        "kernel_seconds": on_device,
        "busy": on_device / seconds if cuda else None,
        "kernels_per_step": kernels,
        "first_seconds": first,
        "images_per_second": config.data.batch_size / seconds,
    }


def loop_config(settings: Settings, *, compile: bool) -> RunConfig:
    """That of ``cifar10_deit_small`` on images that are always there."""
    values = yaml.safe_load(find_config("cifar10_deit_small").read_text(encoding="utf-8"))
    values["data"] |= {"dataset": EMBEDDED, "root": None, "in_chans": 3}
    values["training"] |= {"compile": compile, "steps": 1000}
    values["schedule"] |= {"warmup_epochs": 0}
    values["sparsity"] |= {"update_every": 500}
    if settings.dry:
        values["model"]["kwargs"] |= {"embed_dim": 24, "depth": 2, "num_heads": 3}
        values["data"] |= {"batch_size": 4, "train_subset": 40, "eval_subset": 10}
        values["training"] |= {"device": "cpu", "amp": "float32"}
    return resolve(build(values))
