"""What a run is: one frozen record of sections, each of which checks itself when it is built.

How it is read from files and the command line is in :mod:`experiments.config.reading`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from models.selector_config import SelectorConfig
from sparse_trainer.sparsity_config import SparsityConfig

REFERENCE_BATCH = 512
"""Images per optimizer step at which ``optimizer.base_lr`` is the learning rate (DeiT, arXiv 2012.12877)."""


class _Checks:
    """Collects what is wrong with a record, in the form ``key: value is not what works``."""

    def __init__(self, record: object) -> None:
        self.record = record
        self.problems: list[str] = []

    def __call__(self, name: str, works: str, accept: Callable[[Any], bool]) -> None:
        value = getattr(self.record, name)
        if not accept(value):
            self.problems.append(f"{name}: {value!r} is not {works}")

    def done(self) -> None:
        if self.problems:
            raise ValueError("; ".join(self.problems))


@dataclass(frozen=True)
class ModelConfig:
    """The dense network that becomes sparse."""

    name: str = "deit_quickstart"
    """Any ViT of timm, such as deit_small_patch16_224, or deit_quickstart."""
    pretrained: bool = False
    """Start from timm's weights."""
    start: str | None = None
    """Start from the weights of a dense run of this project (its folder, or a sparse checkpoint of it), or of a file in
    timm's names (.safetensors, or .pth with weights only): other image sizes, channels and classes are fitted."""
    drop_path: float = 0.0
    """Stochastic depth: the greatest probability that a block is left out."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm's model, such as patch_size, embed_dim, depth. Image size, channels and classes come
    from the data."""

    def __post_init__(self) -> None:
        if self.start is not None:
            object.__setattr__(self, "start", os.path.expanduser(self.start))
        check = _Checks(self)
        check("drop_path", "a probability in [0, 1)", lambda v: 0 <= v < 1)
        check("name", "a model name", lambda v: bool(v))
        check("start", "a run folder, a checkpoint or null", lambda v: v is None or bool(v))
        if self.pretrained and self.start is not None:
            check.problems.append("pretrained and start: give one of them, not both")
        check.done()


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: a weighted sum of up to three terms. A weight of 0 switches a term off."""

    cross_entropy_weight: float = 1.0
    """Of the cross-entropy with the labels."""
    macs_target: float | None = None
    """Share of the dense network's MACs (all heads, neurons and tokens) that a threshold selector is to reach on the
    mean; null for no such term."""
    macs_ramp: float = 0.0
    """Share of the run over which the target falls evenly to macs_target, from what the network computes with all its
    tokens: before it knows anything, it cannot know what to drop. 0: macs_target from the first step."""
    macs_weight: float = 2.0
    """Of the distance to the target, in GMACs. Small networks need a large one: at 0.01 GMACs dense it is at most
    0.01."""
    teacher: str | None = None
    """Dense network to learn from: a run folder or sparse checkpoint of this project, or a timm name with pretrained
    weights; null for none."""
    distillation_weight: float = 0.5
    """Of the divergence from the teacher, KL(student || teacher)."""
    temperature: float = 1.0
    """Divides the logits of both before they are compared."""
    teacher_amp: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher; auto is bfloat16 where the device has instructions for it, else float32."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            object.__setattr__(self, "teacher", os.path.expanduser(self.teacher))
        check = _Checks(self)
        for name in ("cross_entropy_weight", "macs_weight", "distillation_weight"):
            check(name, "0 or more", lambda v: 0 <= v < math.inf)
        check("macs_ramp", "a share in [0, 1]", lambda v: 0 <= v <= 1)
        check("macs_target", "a share in (0, 1] or null", lambda v: v is None or 0 < v <= 1)
        check("temperature", "a positive number", lambda v: 0 < v < math.inf)
        check("teacher", "a run folder, a checkpoint, a timm name or null", lambda v: v is None or bool(v))
        if self.cross_entropy_weight == 0 and not self.distills:
            check.problems.append(
                "cross_entropy_weight: 0 leaves nothing to learn from; give a teacher and a distillation_weight above 0"
            )
        check.done()

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.teacher is not None and self.distillation_weight > 0

    @property
    def bounds_macs(self) -> bool:
        """Whether the MACs are a part of the loss."""
        return self.macs_target is not None and self.macs_weight > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """timm's ``create_optimizer_v2``."""

    name: str = "adamw"
    """A name of timm's: adamw, sgd, lamb, lion, ..."""
    lr: float | None = None
    """Learning rate at its highest; null for base_lr * images per step / 512."""
    base_lr: float = 5e-4
    """Learning rate for 512 images per optimizer step."""
    weight_decay: float = 0.05
    """Not applied to biases, norms and embeddings."""
    momentum: float = 0.9
    """For optimizers that have one."""
    betas: tuple[float, float] | None = None
    """For optimizers that have them; null for the optimizer's own."""
    eps: float | None = None
    """For optimizers that have it; null for the optimizer's own."""
    threshold_lr_scale: float = 1.0
    """Learning rate of a threshold selector's thresholds, over that of the rest. A threshold is about 0.003, and a
    step of AdamW as long as the learning rate: with more than 1e-4, make this smaller."""

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
        check = _Checks(self)
        check("lr", "a positive number or null", lambda v: v is None or v > 0)
        check("base_lr", "a positive number", lambda v: v > 0)
        check("weight_decay", "0 or more", lambda v: v >= 0)
        check("momentum", "in [0, 1)", lambda v: 0 <= v < 1)
        check(
            "betas",
            "two numbers in [0, 1) or null",
            lambda v: v is None or (len(v) == 2 and all(0 <= beta < 1 for beta in v)),
        )
        check("eps", "a positive number or null", lambda v: v is None or v > 0)
        check("threshold_lr_scale", "a positive number", lambda v: v > 0)
        check.done()


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, changed at every step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls from the highest to min_lr, after the warm-up."""
    warmup_epochs: float = 5.0
    """Epochs (or a part of one) of linear warm-up, counted in the run's length."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        check = _Checks(self)
        names = ("cosine", "linear", "constant")
        check("name", f"one of {', '.join(names)}", lambda v: v in names)
        for name in ("warmup_epochs", "warmup_lr", "min_lr"):
            check(name, "0 or more", lambda v: v >= 0)
        check.done()


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, in which precision, how often it looks up."""

    epochs: int = 300
    """Length of the run in passes over the training images."""
    steps: int | None = None
    """Length in optimizer steps, in place of epochs."""
    accumulate: int = 1
    """Batches per optimizer step."""
    amp: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto is bfloat16 where the device has instructions for it, else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    compile: bool = False
    """Run the model through torch.compile."""
    clip_grad: float | None = None
    """Greatest norm of the gradient, that of a selector's thresholds left out; null for no clipping."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, such as 0.99996; it is then what is saved at the end."""
    ema_warmup: bool = False
    """Let the decay rise to ema_decay from 0, so that in a short run the average forgets the first weights."""
    seed: int = 0
    """Of the weights, the order of the images, the augmentation and drop path."""
    eval_every: float = 1.0
    """Epochs (or a part of one) between evaluations."""
    checkpoint_every: float | None = None
    """Epochs (or a part of one) between resume bundles; null for one with every evaluation. A new best has one too."""
    log_every: int = 50
    """Optimizer steps between the records of loss, learning rate and speed."""
    deterministic: bool = False
    """On a GPU use only algorithms that give the same bits each time, which are slower; what has none ends the run. A
    CPU has no others."""
    max_bad_steps: int = 20
    """Steps in a row without a finite loss and gradient after which the run stops; each of them is dropped."""

    def __post_init__(self) -> None:
        check = _Checks(self)
        check("epochs", "a positive whole number", lambda v: v >= 1)
        check("steps", "a positive whole number or null", lambda v: v is None or v >= 1)
        for name in ("accumulate", "log_every", "max_bad_steps"):
            check(name, "a positive whole number", lambda v: v >= 1)
        precisions = ("auto", "float32", "bfloat16", "float16")
        check("amp", f"one of {', '.join(precisions)}", lambda v: v in precisions)
        check("clip_grad", "a positive number or null", lambda v: v is None or v > 0)
        check("ema_decay", "in (0, 1) or null", lambda v: v is None or 0 < v < 1)
        check("seed", "a whole number from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63)
        check("eval_every", "a positive number of epochs", lambda v: v > 0)
        check("checkpoint_every", "a positive number of epochs or null", lambda v: v is None or v > 0)
        check.done()


@dataclass(frozen=True)
class OutputConfig:
    """Where a run writes."""

    runs: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; null for the recipe's, with a number if there is one of that name."""
    keep_last: int = 2
    """Resume bundles that are kept; the older ones are there in case the newest is damaged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", os.path.expanduser(self.runs))
        check = _Checks(self)
        check("runs", "a folder", lambda v: bool(v))
        check("keep_last", "a positive whole number", lambda v: v >= 1)
        check(
            "name",
            "a folder name (letters, digits, '.', '_', '-') or null",
            lambda v: v is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", v) is not None,
        )
        check.done()


@dataclass(frozen=True)
class RunConfig:
    """One run, complete."""

    recipe: str = ""
    """Name of the recipe, for the run folder and the checkpoint; by default that of the file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig | None = field(default_factory=SparsityConfig)
    """null trains the dense network."""
    selector: SelectorConfig | None = None
    """null looks at all tokens."""
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def step_images(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.data.batch_size * self.training.accumulate


def has_bfloat16_matmul(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on ``device``."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    # Without such instructions oneDNN emulates bfloat16 at a quarter of the speed of float32.
    queries = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, query, lambda: False)() for query in queries)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first accelerator, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    full_name = f"cuda:{device.index or 0}" if device is not None and device.type == "cuda" else str(device)
    if device is None or full_name not in there:
        raise ConfigError(f"training.device: {name!r} is not a device of this machine; use auto or {', '.join(there)}")
    return device


def resolve(config: RunConfig, recipe: str = "") -> RunConfig:
    """Replace everything that is chosen automatically by what is chosen, so that the record reproduces the run.

    Raises:
        ConfigError: the device or the precision does not exist here, or two sections do not go together.
    """
    _check_target(config)
    device = choose_device(config.training.device)
    amp = config.training.amp
    if amp == "auto":
        amp = "bfloat16" if has_bfloat16_matmul(device) else "float32"
    teacher_amp = config.losses.teacher_amp
    if teacher_amp == "auto":
        teacher_amp = "bfloat16" if has_bfloat16_matmul(device) else "float32"
    lr = config.optimizer.lr
    if lr is None:
        lr = config.optimizer.base_lr * config.step_images / REFERENCE_BATCH
    return dataclasses.replace(
        config,
        recipe=config.recipe or recipe or "run",
        losses=dataclasses.replace(config.losses, teacher_amp=teacher_amp),
        optimizer=dataclasses.replace(config.optimizer, lr=lr),
        training=dataclasses.replace(config.training, device=str(device), amp=amp),
    )


def _check_target(config: RunConfig) -> None:
    """Refuse a target that nothing could learn to reach."""
    target, selector = config.losses.macs_target, config.selector
    if target is None:
        return
    if selector is None:
        raise ConfigError(
            f"losses.macs_target: {target} needs tokens that can be dropped, but selector is null; set selector.kind "
            "to threshold"
        )
    if selector.kind != "threshold":
        raise ConfigError(
            f"losses.macs_target: {target} cannot be learned with selector.kind {selector.kind}, whose MACs "
            f"selector.keep_ratio ({selector.keep_ratio}) fixes; set selector.kind to threshold, or macs_target to null"
        )
