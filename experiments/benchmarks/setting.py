"""What the benchmarks share: their settings, and the models, batches and steps that they time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.config.records import naming
from experiments.config.run_config import choose_device
from experiments.data.create_data import create_data
from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.precision import narrow, precision_context
from experiments.training.compiling import compiled
from experiments.training.losses import distillation_loss
from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler, flops
from sparse_trainer.budget import count_neurons, count_units
from sparse_trainer.patterns import read_pattern
from sparse_trainer.units import compact, find_blocks

Step = Callable[[], object]


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
    threads: int | None = None
    """CPU threads; null for torch's own choice."""
    json: str | None = None
    """File for the figures, as well."""

    def __post_init__(self) -> None:
        problems = [
            f"{key}: {getattr(self, key)} is not positive"
            for key in ("image_size", "patch_size", "batch_size", "pairs", "threads")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]
        if self.amp not in ("float32", "bfloat16", "float16"):
            problems.append(f"amp: {self.amp!r} is not one of float32, bfloat16, float16")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def on(self) -> torch.device:
        """The device itself."""
        return choose_device(self.device)


def check_shares(record: object, *keys: str) -> None:
    """Refuse values outside (0, 1].

    Raises:
        ConfigError: naming the keys.
    """
    problems = [
        f"{key}: {getattr(record, key)} is not a share in (0, 1]" for key in keys if not 0 < getattr(record, key) <= 1
    ]
    if problems:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class Structure:
    """What makes the second model of a pair small."""

    heads: float = 0.67
    """Share of live heads; 1 for all."""
    neurons: float = 0.6
    """Share of live neurons; 1 for all."""
    tokens: float = 1.0
    """Share of patches that a selector keeps; 1 for no selector."""

    def __post_init__(self) -> None:
        check_shares(self, "heads", "neurons", "tokens")

    @property
    def top_k(self) -> dict[str, Any] | None:
        """The selector that keeps this share of the patches of every image."""
        return {"kind": "top_k", "keep_ratio": self.tokens} if self.tokens < 1 else None


@dataclass(frozen=True)
class Weights:
    """How sparse the weights are."""

    density: float = 0.5
    """Share of live weights."""
    pattern: str = "1x1"
    """Which of them live and die together."""

    def __post_init__(self) -> None:
        check_shares(self, "density")
        with naming("pattern"):
            read_pattern(self.pattern)


def make_scheduler(model: nn.Module, weights: Weights, *, total_steps: int, **options: Any) -> SparsityScheduler:
    """A scheduler of weight masks; that a classifier keeps single weights is no news in a benchmark.

    Args:
        options: others of :class:`SparsityConfig`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pattern: .* does not divide")
        config = SparsityConfig(density=weights.density, pattern=weights.pattern, **options)
        return SparsityScheduler(model, config, total_steps=total_steps)


def make_model(setting: Setting, selector: dict[str, Any] | None = None) -> nn.Module:
    """The dense model on its device.

    Raises:
        ConfigError: there is no such model, or not of this size.
    """
    torch.manual_seed(0)
    sizes = {"img_size": setting.image_size, "patch_size": setting.patch_size}
    with naming("model"):
        try:
            model = create_model(setting.model, **sizes, num_classes=10, selector=selector)
        except TypeError as error:
            raise ConfigError(f"model: {setting.model} takes no image and patch size; give a ViT of timm") from error
    return model.to(setting.on)


def threshold_selector(dense: nn.Module) -> dict[str, Any]:
    """Thresholds before three blocks, as published for twelve."""
    depth = len(find_blocks(dense))
    return {"kind": "threshold", "stages": sorted({max(1, round(stage * depth / 12)) for stage in (4, 7, 10)})}


def make_batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Images and targets on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size, generator=generator)
    return images.to(setting.on), torch.randint(10, (setting.batch_size,), generator=generator).to(setting.on)


def make_small(setting: Setting, structure: Structure, selector: dict[str, Any] | None = None) -> nn.Module:
    """A compact model; which units it holds does not matter to its speed.

    Raises:
        ConfigError: there is no such model, its heads and neurons are not laid out as known here, or none is left.
    """
    model = make_model(setting, selector)
    with naming("model"):
        keep_first_units(model, structure.heads, structure.neurons)
    return model


def keep_first_units(model: nn.Module, heads: float, neurons: float) -> None:
    """Keep these shares of the heads and neurons of each block, the first ones, in place: for what they cost.

    Raises:
        ValueError: none would be left, or they are not laid out as known here.
    """
    blocks = find_blocks(model)
    compact(
        model,
        {name: range(count_units(heads, block.heads.count(), "head")) for name, block in blocks.items()},
        {name: range(count_neurons(neurons, block.neurons.count())) for name, block in blocks.items()},
    )


def macs_of(model: nn.Module, structure: Structure) -> float:
    """MACs of one image, with as many tokens as top-k leaves right at the input."""
    tokens = None
    if structure.tokens < 1:
        module: Any = model
        kept = max(1, round(structure.tokens * module.patch_embed.num_patches)) + module.num_prefix_tokens
        tokens = [float(kept)] * len(find_blocks(model))
    return flops.count(model, tokens=tokens).macs


def training_step(
    model: nn.Module,
    setting: Setting,
    after: Callable[[], object] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    images: Tensor | None = None,
    teacher: nn.Module | None = None,
    sparsity: SparsityConfig | None = None,
) -> Step:
    """Forward, backward and optimizer (AdamW if none is given), and whatever comes ``after`` the optimizer.

    Args:
        images: a batch of other images than noise.
        teacher: a network to learn from besides.
        sparsity: what a scheduler does with it meanwhile.
    """
    noise, targets = make_batch(setting)
    images = noise if images is None else images
    moved = optimizer if optimizer is not None else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = compiled(model, sparsity) if setting.compile else model
    autocast = precision_context(images.device, setting.amp)
    advice = None
    if teacher is not None:
        narrow(teacher, setting.amp)
        advice = classifier(teacher, setting)

    def step() -> None:
        taught = None if advice is None else advice(images)
        with autocast():
            logits = forward(images).float()
            loss = F.cross_entropy(logits, targets)
            if taught is not None:
                loss = loss + distillation_loss(logits, taught)
        loss.backward()
        moved.step()
        if after is not None:
            after()
        moved.zero_grad()

    return step


def classifier(model: nn.Module, setting: Setting) -> Callable[..., Any]:
    """The model in evaluation mode, as a function of images: in the precision asked for, and compiled if asked."""
    model.eval()
    forward = torch.compile(model) if setting.compile else model
    autocast = precision_context(setting.on, setting.amp)

    def run(images: Tensor, **options: Any) -> Any:
        with torch.inference_mode(), autocast():
            return forward(images, **options)

    return run


def inference(model: nn.Module, images: Tensor, setting: Setting) -> Step:
    """One forward pass in evaluation mode."""
    run = classifier(model, setting)
    return lambda: run(images)


def textured_images(count: int, size: int, device: torch.device) -> Tensor:
    """Images with more or less going on in them, from blank to busy: ``[count, 3, size, size]``.

    The embedded pictures, enlarged: what differs between images is what a selector reacts to.
    """
    data = create_data(DataConfig(eval_batch_size=count), device="cpu", seed=0)
    images = next(iter(data.eval.batches()))[0][:count]
    images = images[torch.arange(count) % images.shape[0]].expand(-1, 3, -1, -1)
    return F.interpolate(images, size=(size, size), mode="bilinear").to(device)
