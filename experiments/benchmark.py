"""``sparse-trainer benchmark``: what the scheduler costs, and what sparsity saves, on the machine at hand.

Every figure is measured in this run; beside it stands the ideal, what the arithmetic alone would give.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.config import choose_device
from experiments.data import DataConfig, create_data
from experiments.timing import (
    Figure,
    describe_machine,
    paired,
    peak_memory,
    percentiles,
    show,
    timed,
    write_json,
)
from models import create_model, tokens_per_block
from sparse_trainer import SparsityConfig, SparsityScheduler, flops
from sparse_trainer.units import compact, find_blocks


@dataclass(frozen=True)
class Setting:
    """What all benchmarks share."""

    model: str = "deit_small_patch16_224"
    """Any ViT of timm."""
    image_size: int = 32
    """Pixels."""
    patch_size: int = 4
    """Pixels."""
    batch_size: int = 64
    """Images per step."""
    amp: str = "bfloat16"
    """Precision of the forward pass: float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    pairs: int = 5
    """Alternating pairs of runs of which the median is taken."""
    compile: bool = False
    """Compile the models with torch.compile."""
    json: str | None = None
    """File for the figures, as well."""

    def __post_init__(self) -> None:
        problems = [
            f"{key}: {getattr(self, key)} is not positive"
            for key in ("image_size", "patch_size", "batch_size", "pairs")
            if getattr(self, key) < 1
        ]
        if self.amp not in ("float32", "bfloat16", "float16"):
            problems.append(f"amp: {self.amp!r} is not one of float32, bfloat16, float16")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Structure:
    """What makes the second model of a pair small."""

    heads: float = 0.67
    """Share of live heads; 1 for all."""
    neurons: float = 0.6
    """Share of live neurons; 1 for all."""
    tokens: float = 1.0
    """Share of patches that a selector keeps; 1 for no selector."""


Step = Callable[[], object]


def make_model(setting: Setting, selector: dict[str, Any] | None = None) -> nn.Module:
    """The dense model on its device."""
    torch.manual_seed(0)
    model = create_model(
        setting.model, img_size=setting.image_size, patch_size=setting.patch_size, num_classes=10, selector=selector
    )
    return model.to(choose_device(setting.device))


def make_batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Images and targets on the device."""
    device = choose_device(setting.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size, generator=generator)
    return images.to(device), torch.randint(10, (setting.batch_size,), generator=generator).to(device)


def make_small(setting: Setting, structure: Structure, selector: dict[str, Any] | None = None) -> nn.Module:
    """A compact model; which units it holds does not matter to its speed."""
    model = make_model(setting, selector)
    for_heads: dict[str, range] = {}
    for_neurons: dict[str, range] = {}
    for name, block in find_blocks(model).items():
        for_heads[name] = range(max(1, int(structure.heads * block.heads.count() + 0.5)))
        for_neurons[name] = range(max(1, int(structure.neurons * block.neurons.count() + 0.5)))
    compact(model, for_heads, for_neurons)
    return model


def training_step(
    model: nn.Module, setting: Setting, after: Callable[[torch.optim.Optimizer], object] | None = None
) -> Step:
    """Forward, backward and AdamW, and whatever comes ``after`` the optimizer."""
    images, targets = make_batch(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    forward = torch.compile(model) if setting.compile else model

    def step() -> None:
        with torch.autocast(images.device.type, getattr(torch, setting.amp), enabled=setting.amp != "float32"):
            loss = F.cross_entropy(forward(images).float(), targets)
        loss.backward()
        optimizer.step()
        if after is not None:
            after(optimizer)
        optimizer.zero_grad()

    return step


def dense_step(setting: Setting) -> Step:
    """A training step of the dense model (importable, so that it can run in a process of its own)."""
    return training_step(make_model(setting), setting)


def small_step(setting: Setting, structure: Structure) -> Step:
    """A training step of the small model."""
    selector = {"kind": "top_k", "keep_ratio": structure.tokens} if structure.tokens < 1 else None
    return training_step(make_small(setting, structure, selector).train(), setting)


def inference(model: nn.Module, images: Tensor, setting: Setting) -> Step:
    """One forward pass in evaluation mode."""
    model.eval()
    forward = torch.compile(model) if setting.compile else model

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, getattr(torch, setting.amp), enabled=setting.amp != "float32"),
        ):
            forward(images)

    return run


def benchmark_overhead(setting: Setting, density: float = 0.5) -> list[Figure]:
    """A training step under the scheduler against the same step without it; an update; the memory of the masks.

    Args:
        setting: model, size, precision and number of pairs.
        density: of the weight masks.
    """
    device = choose_device(setting.device)
    model = make_model(setting).train()
    config = SparsityConfig(density=density, update_every=10**6)
    scheduler = SparsityScheduler(model, config, total_steps=10**7)
    attached: list[bool] = []

    def after(optimizer: torch.optim.Optimizer) -> None:
        if attached:
            scheduler.step()

    # One model, one optimizer and one batch for both: the only difference is whether the scheduler is attached.
    images, targets = make_batch(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, getattr(torch, setting.amp), enabled=setting.amp != "float32"):
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()
        optimizer.step()
        after(optimizer)
        optimizer.zero_grad()

    def attach() -> None:
        scheduler.attach(optimizer)
        attached.append(True)

    def detach() -> None:
        if attached:
            scheduler.detach()
            attached.clear()

    def with_scheduler() -> None:
        attach()
        step()
        detach()

    steps = paired(step, with_scheduler, device=device, pairs=setting.pairs)
    masks = scheduler.masks
    gradients = [torch.randn_like(parameter) for name, parameter in model.named_parameters() if name in masks]

    def mask_all() -> None:
        for gradient, mask in zip(gradients, masks.values(), strict=True):
            gradient.mul_(mask)

    own = statistics.median(timed(mask_all, device) for _ in range(9))
    gradients.clear()
    figures = [
        Figure("training step", steps.second, "s", reference=steps.first, ratio=steps.ratio, ideal=1.0),
        Figure("masking all gradients", own, "s", reference=steps.first, ratio=own / steps.first),
    ]
    prunable = scheduler.budget.total
    held = sum(mask.nbytes for mask in masks.values())
    state = scheduler.state_dict()["weights"]
    explored = sum(bits.nbytes for bits in state["ever_live"].values())
    figures.append(Figure("update", _update_seconds(setting, density), "s"))
    figures.append(Figure("prunable weights", prunable, ""))
    figures.append(Figure("masks, per prunable weight", held / prunable, "bytes", ideal=1.0))
    figures.append(Figure("exploration record, per prunable weight", explored / prunable, "bytes", ideal=0.125))
    return figures


def _update_seconds(setting: Setting, density: float) -> float:
    """Median time of one update: every step updates."""
    model = make_model(setting).train()
    scheduler = SparsityScheduler(model, SparsityConfig(density=density, update_every=1), total_steps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler.attach(optimizer)
    images, targets = make_batch(Setting(**{**asdict(setting), "batch_size": 2}))
    seconds = []
    for _ in range(max(setting.pairs, 3) + 1):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        update = scheduler.step()
        optimizer.zero_grad()
        assert update is not None
        seconds.append(update.seconds)
    return statistics.median(seconds[1:])


def benchmark_train(setting: Setting, structure: Structure) -> list[Figure]:
    """A training step of the compact network against the dense one, beside its share of MACs; peak memory.

    Args:
        setting: model, size, precision and number of pairs.
        structure: what is live.
    """
    device = choose_device(setting.device)
    selector = {"kind": "top_k", "keep_ratio": structure.tokens} if structure.tokens < 1 else None
    dense, small = make_model(setting).train(), make_small(setting, structure, selector).train()
    share = _macs(small, structure) / flops.count(dense).macs
    times = paired(training_step(dense, setting), training_step(small, setting), device=device, pairs=setting.pairs)
    figures = [
        Figure("MACs of one image", _macs(small, structure), "", reference=flops.count(dense).macs, ratio=share),
        Figure("training step", times.second, "s", reference=times.first, ratio=times.ratio, ideal=share),
        Figure("training step over its share of MACs", times.ratio / share, "", ideal=1.0),
    ]
    del dense, small
    peaks = [
        peak_memory(dense_step, setting, device=device),
        peak_memory(small_step, setting, structure, device=device),
    ]
    figures.append(
        Figure("peak memory of a training step", peaks[1] / 2**20, "MiB", peaks[0] / 2**20, peaks[1] / peaks[0])
    )
    return figures


def _macs(model: nn.Module, structure: Structure) -> float:
    tokens = None
    if structure.tokens < 1:
        module: Any = model
        kept = max(1, round(structure.tokens * module.patch_embed.num_patches)) + module.num_prefix_tokens
        tokens = [float(kept)] * len(find_blocks(model))
    return flops.count(model, tokens=tokens).macs


def textured_images(count: int, size: int, device: torch.device) -> Tensor:
    """Images with more or less going on in them, from blank to busy: ``[count, 3, size, size]``.

    The embedded pictures, enlarged: what differs between images is what a selector reacts to.
    """
    data = create_data(DataConfig(eval_batch_size=count), device="cpu", seed=0)
    images = next(iter(data.eval.batches()))[0][:count]
    images = images[torch.arange(count) % images.shape[0]].expand(-1, 3, -1, -1)
    return F.interpolate(images, size=(size, size), mode="bilinear").to(device)


def calibrate(model: nn.Module, images: Tensor, keep: float) -> Tensor:
    """Set the thresholds so that each stage keeps ``keep`` of what reaches it on average; the counts ``[B, stages]``.

    An untrained network scores almost all patches alike, so the scores of the given images decide; how far the
    images differ from one another is theirs.
    """
    module: Any = model
    selector, patches = module.selector, module.patch_embed.num_patches
    with torch.inference_mode():
        for stage in range(len(selector.stages)):
            low, high = 0.0, 1.0
            for _ in range(24):
                selector.thresholds.data[stage] = (low + high) / 2
                _, selection = model(images, return_selection=True)
                counts = selection.counts
                reached = counts[:, stage - 1].float().mean() if stage else float(patches)
                if counts[:, stage].float().mean() / reached > keep:
                    low = (low + high) / 2
                else:
                    high = (low + high) / 2
        counts = model(images, return_selection=True)[1].counts
    return counts


def benchmark_inference(setting: Setting, structure: Structure) -> list[Figure]:
    """Throughput of the dense network against fewer units, fewer tokens per image, and both; latency at batch 1.

    Args:
        setting: model, size, precision and number of pairs.
        structure: what is live; tokens is the mean keep ratio at each of three stages.
    """
    device = choose_device(setting.device)
    dense = make_model(setting)
    images = textured_images(setting.batch_size, setting.image_size, device)
    dense_macs = flops.count(dense).macs
    run_dense = inference(dense, images, setting)
    figures = []
    latency = {"dense": percentiles(inference(dense, images[:1], setting), device, 15)}
    depth = len(find_blocks(dense))
    full = Structure(heads=1.0, neurons=1.0)
    variants: list[tuple[str, Structure, bool]] = [("fewer heads and neurons", structure, False)]
    if structure.tokens < 1:
        variants += [("fewer tokens, image by image", full, True), ("both", structure, True)]
    for name, units, tokens in variants:
        stages = tuple(max(1, round(stage * depth / 12)) for stage in (4, 7, 10))
        model = make_small(setting, units, {"kind": "threshold", "stages": stages} if tokens else None)
        mean_tokens = None
        if tokens:
            counts = calibrate(model.eval(), images, structure.tokens).float()
            with torch.inference_mode():
                selection = model(images, return_selection=True)[1]
            macs = float(flops.model_macs(model, tokens_per_block(selection, depth).cpu()).mean())
            mean_tokens = counts
        else:
            macs = flops.count(model).macs
        times = paired(run_dense, inference(model, images, setting), device=device, pairs=setting.pairs)
        speed, ideal = 1 / times.ratio, dense_macs / macs
        figures.append(
            Figure(
                f"{name}: throughput",
                setting.batch_size / times.second,
                "images/s",
                reference=setting.batch_size / times.first,
                ratio=speed,
                ideal=ideal,
            )
        )
        figures.append(Figure(f"{name}: achieved over ideal", speed / ideal, "", ideal=1.0))
        if mean_tokens is not None:
            for stage, column in enumerate(mean_tokens.T):
                figures.append(
                    Figure(
                        f"{name}: patches after stage {stage + 1}, mean ({int(column.min())} to {int(column.max())})",
                        float(column.mean()),
                        "",
                    )
                )
        latency[name] = percentiles(inference(model, images[:1], setting), device, 15)
    for name, values in latency.items():
        for percentile, seconds in values.items():
            figures.append(
                Figure(
                    f"{name}: latency at batch 1, p{percentile}",
                    seconds * 1000,
                    "ms",
                    latency["dense"][percentile] * 1000,
                )
            )
    return figures


def benchmark_data(setting: Setting) -> list[Figure]:
    """Images per second of both data paths: in memory and augmented on the device, and timm's loader from files.

    Args:
        setting: batch size, device and number of pairs.
    """
    device = choose_device(setting.device)
    memory = create_data(DataConfig(batch_size=setting.batch_size), device=device, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder))
        files = create_data(
            DataConfig(
                dataset="folder", root=folder, train_split="train", eval_split="test", in_memory="never", in_chans=1,
                batch_size=setting.batch_size,
            ),
            device=device,
            seed=0,
        )  # fmt: skip

        def epoch(data: Any, epochs: int) -> Callable[[], object]:
            return lambda: [None for epoch in range(epochs) for _ in data.train.batches(epoch)]

        images = files.train.steps_per_epoch * setting.batch_size
        times = paired(epoch(files, 1), epoch(memory, 1), device=device, pairs=min(setting.pairs, 3))
        in_memory = memory.train.steps_per_epoch * setting.batch_size / times.second
    return [
        Figure(
            "in memory", in_memory, "images/s", reference=images / times.first, ratio=in_memory / (images / times.first)
        ),
        Figure("timm loader, from image files", images / times.first, "images/s"),
    ]


def _write_images(folder: Path) -> None:
    """The first images of the embedded data as PNG files, as an image folder."""
    data = create_data(DataConfig(train_subset=2000, eval_subset=100), device="cpu", seed=0)
    for split in ("train", "test"):
        for index, (images, targets) in enumerate(data.eval.batches()):
            for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
                path = folder / split / f"{target}"
                path.mkdir(parents=True, exist_ok=True)
                pixels = ((image[0] - image.min()) / (image.max() - image.min()) * 255).to(torch.uint8)
                for copy in range(20 if split == "train" else 1):
                    Image.fromarray(pixels.numpy()).save(path / f"{index}-{number}-{copy}.png")


COMMANDS: dict[str, tuple[Callable[..., list[Figure]], Setting]] = {
    "overhead": (benchmark_overhead, Setting()),
    "train": (benchmark_train, Setting()),
    "inference": (benchmark_inference, Setting(image_size=224, patch_size=16, batch_size=16, amp="float32")),
    "data": (benchmark_data, Setting(batch_size=128)),
}


def create_parser() -> ArgumentParser:
    """The parser of ``sparse-trainer benchmark``."""
    parser = ArgumentParser(prog="sparse-trainer benchmark", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    types = get_type_hints(Setting)
    for name, (function, defaults) in COMMANDS.items():
        command = ArgumentParser(exit_on_error=False, description=function.__doc__)
        for key, value in asdict(defaults).items():
            command.add_argument(f"--{key}", type=types[key], default=value)
        if function in (benchmark_train, benchmark_inference):
            tokens = 0.7 if function is benchmark_inference else 1.0
            for key, value in asdict(Structure(tokens=tokens)).items():
                command.add_argument(f"--{key}", type=float, default=value)
        if function is benchmark_overhead:
            command.add_argument("--density", type=float, default=0.5)
        commands.add_subcommand(name, command, help=(function.__doc__ or "").splitlines()[0])
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark and report it. Returns the exit code."""
    try:
        chosen = create_parser().parse_args(list(arguments))
        values = dict(chosen[chosen.command].as_dict())
        setting = Setting(**{key: values.pop(key) for key in asdict(Setting())})
        if "heads" in values:
            structure = Structure(**values)
            for key, value in asdict(structure).items():
                if not 0 < value <= 1:
                    raise ValueError(f"{key}: {value} is not a share in (0, 1]")
            values = {"structure": structure}
        figures = COMMANDS[chosen.command][0](setting, **values)
    except (ArgumentError, ValueError) as error:
        print(f"sparse-trainer benchmark: error: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(choose_device(setting.device))
    title = f"{chosen.command}: {setting.model}, {setting.image_size} px, patch {setting.patch_size}, "
    show(title + f"batch {setting.batch_size}, {setting.amp}", figures, machine)
    if setting.json:
        write_json(setting.json, figures, machine, asdict(setting))
    return 0
