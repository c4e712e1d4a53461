"""What a run is: one frozen record from a YAML file and dotted overrides.

jsonargparse reads and merges files and the command line; the dataclasses check themselves when they are built.
Whatever is wrong becomes one :class:`ConfigError` of one line that names the key, the value and what would work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from experiments.data_config import DataConfig
from experiments.field_docs import field_docs
from models.token_selector import SelectorConfig
from sparse_trainer.sparsity_config import SparsityConfig

DEFAULT_RECIPE = "quickstart"
REFERENCE_BATCH = 512
"""Images per optimizer step at which ``optimizer.base_lr`` is the learning rate (DeiT, arXiv 2012.12877)."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


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
    """Start from the weights of a dense run of this project: its folder, or a sparse checkpoint of it."""
    drop_path: float = 0.0
    """Stochastic depth: the greatest probability that a block is left out."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm's model, such as patch_size, embed_dim, depth. Image size, channels and classes come
    from the data."""

    def __post_init__(self) -> None:
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

    def __post_init__(self) -> None:
        check = _Checks(self)
        for name in ("cross_entropy_weight", "macs_weight", "distillation_weight"):
            check(name, "0 or more", lambda v: 0 <= v < math.inf)
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
        check("seed", "0 or more", lambda v: v >= 0)
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
    lr = config.optimizer.lr
    if lr is None:
        lr = config.optimizer.base_lr * config.step_images / REFERENCE_BATCH
    return dataclasses.replace(
        config,
        recipe=config.recipe or recipe or "run",
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


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Turn the ValueError of a part into a :class:`ConfigError` of one line that names the section."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_with_section(section, str(error))) from error


def _with_section(section: str, message: str) -> str:
    """Put ``section.`` before every key that a record's problems begin with."""
    names = _leaves(_RECORDS[section]) if section in _RECORDS else {}
    problems = []
    for line in message.split("\n"):
        if not line.strip():
            continue
        if names:
            pattern = rf"(^|; )(?=(?:{'|'.join(map(re.escape, names))})\b)"
            line = re.sub(pattern, rf"\g<1>{section}.", line)
        problems.append(line.strip())
    text = "; ".join(problems)
    return text if re.match(rf"{section}\b", text) else f"{section}: {text}"


_RECORDS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "sparsity": SparsityConfig,
    "selector": SelectorConfig,
    "losses": LossConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
}


def _record_type(hint: Any) -> type | None:
    """The dataclass in a type hint such as ``SparsityConfig | None``."""
    candidates = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def _leaves(record: type, prefix: str = "") -> dict[str, Any]:
    """Type hints of all values by dotted key."""
    leaves: dict[str, Any] = {}
    hints = typing.get_type_hints(record)
    for item in dataclasses.fields(record):
        hint = hints[item.name]
        inner = _record_type(hint)
        if inner is None:
            leaves[prefix + item.name] = hint
        else:
            leaves.update(_leaves(inner, f"{prefix}{item.name}."))
    return leaves


def recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    folder = resources.files("experiments") / "recipes"
    return {
        Path(str(item)).stem: Path(str(item))
        for item in sorted(folder.iterdir(), key=str)
        if item.name.endswith(".yaml")
    }


def find_config(name: str) -> Path:
    """The file that ``name`` means: a path, or the name of a recipe.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipes()
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"--config: {name} is no file and no recipe; {hint}recipes: {', '.join(known)}")


def create_parser(command: str) -> ArgumentParser:
    """A parser for all of :class:`RunConfig` as ``--config FILE`` and dotted options."""
    parser = ArgumentParser(
        prog=f"sparse-trainer {command}",
        description="Train a sparse Vision Transformer under one exact budget.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file or name of a recipe ({', '.join(recipes())}); without one: {DEFAULT_RECIPE}. Of "
        "several the later wins; options win over files.",
    )
    parser.add_class_arguments(RunConfig)
    explain_options(parser)
    return parser


def explain_options(parser: ArgumentParser) -> None:
    """Give every dotted option the text that stands under its field."""
    texts = field_docs(RunConfig)
    for section, record in _RECORDS.items():
        texts |= {f"{section}.{name}": text for name, text in field_docs(record).items()}
    # The parser lists no options of a section that may be null.
    inner = [f"--{key}: {text}" for key, text in texts.items() if key.startswith("sparsity.")]
    texts["sparsity"] = " ".join(["null trains the dense network.", *inner])
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")


def _expand_config_names(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The files behind ``--config`` in order, and the command line with them in front: overrides win over files
    wherever they stand."""
    rest: list[str] = []
    files: list[Path] = []
    waiting = False
    for argument in arguments:
        if waiting or argument.startswith("--config="):
            files.append(find_config(argument if waiting else argument.removeprefix("--config=")))
            waiting = False
        elif argument == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise ConfigError("--config: needs a file or the name of a recipe")
    return [*(f"--config={path}" for path in files), *rest], files


def parse(parser: ArgumentParser, arguments: Sequence[str], *, base: Path | None = None) -> tuple[RunConfig, Namespace]:
    """Read files and overrides.

    Args:
        parser: of :func:`create_parser`, with more options or without.
        arguments: the command line after the sub-command.
        base: configuration where the command line names none; by default the quick start.

    Returns:
        The configuration, named after the last file, and all parsed values.

    Raises:
        ConfigError: with all problems of all sections on one line.
    """
    expanded, files = _expand_config_names(arguments)
    if not files:
        files = [base or recipes()[DEFAULT_RECIPE]]
        expanded = [f"--config={files[0]}", *expanded]
    contents = [_read_yaml(path) for path in files]
    try:
        parsed = parser.parse_args(expanded)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, expanded, contents)) from error
    config = build(parsed.as_dict())
    return (config if config.recipe else dataclasses.replace(config, recipe=files[-1].stem)), parsed


def load_config(path: Path) -> RunConfig:
    """The configuration in a file, with nothing changed.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return parse(create_parser("train"), ["--config", str(path)])[0]


def build(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from plain values by section; missing ones take their defaults.

    Raises:
        ConfigError: with all problems of all sections on one line.
    """
    sections: dict[str, Any] = {"recipe": values.get("recipe") or ""}
    problems = []
    for section, record in _RECORDS.items():
        if section not in values:
            continue
        given = values[section]
        if given is None or isinstance(given, record):
            sections[section] = given
            continue
        known = {item.name for item in dataclasses.fields(record)}
        try:
            with naming(section):
                sections[section] = record(**{key: value for key, value in given.items() if key in known})
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return RunConfig(**sections)


def to_yaml(config: RunConfig) -> str:
    """YAML that :func:`parse` reads back into an equal configuration."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def flatten(config: RunConfig) -> dict[str, Any]:
    """All values by dotted key; a section that is switched off is None under its name."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from walk(inner, f"{key}.{name}" if key else name)
        else:
            yield key, value

    return dict(walk(_plain(dataclasses.asdict(config)), ""))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place is not None else ""
        raise ConfigError(f"--config: {path} is not YAML{where}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} holds {type(content).__name__}, not sections such as model and training")
    for section, record in _RECORDS.items():
        value = content.get(section, {})
        if not isinstance(value, dict) and not (value is None and section in ("sparsity", "selector")):
            keys = ", ".join(item.name for item in dataclasses.fields(record))
            raise ConfigError(f"{section}: {value!r} is not a section with keys such as {keys}")
    return content


def explain(
    error: str,
    parser: ArgumentParser,
    arguments: Iterable[str],
    contents: Iterable[Mapping[str, Any]] = (),
    sections: Sequence[str] = ("recipe", *_RECORDS),
) -> str:
    """One line for what a parser refused in a command line or in the contents of files.

    Unknown keys are found here and not in the parser's text, since it does not say what is close to them.

    Args:
        sections: those parts of :class:`RunConfig` that the parser knows.
    """
    leaves = {key: hint for key, hint in _leaves(RunConfig).items() if key.split(".")[0] in sections}
    extra = {action.dest for action in parser._actions}
    given = [a[2:].split("=", 1)[0] for a in arguments if a.startswith("--")]
    for content in contents:
        given.extend(_keys(content))
    unknown = [key for key in given if not _is_known(key, leaves, extra)]
    if unknown:
        ours = sorted(dest.replace("_", "-") for dest in extra if re.fullmatch(r"(?!help|print)\w+", dest))
        options = [dest for dest in ours if dest not in sections]
        return "; ".join(_unknown_key(key, leaves, options) for key in dict.fromkeys(unknown))
    choice = re.search(r"argument --([\w.-]+): invalid choice: '?(.*?)'? \(choose from (.*)\)", error)
    if choice is not None:
        key = choice.group(1) if choice.group(1) in leaves else f"--{choice.group(1)}"
        return f"{key}: {choice.group(2)!r} is not one of {choice.group(3).replace(chr(39), '')}"
    keys = list(re.finditer(r'[Kk]ey "([^"]+)"', error))
    key = ".".join(match.group(1) for match in keys)
    value = re.search(r"(?:Given|Got) value: (.*)", error[keys[-1].end() :]) if keys else None
    if key in leaves and value is not None:
        return f"{key}: {value.group(1).strip()!r} is not {_in_words(leaves[key])}"
    if value is not None and (simple := re.search(r"Expected a <class '(int|float|bool|str)'>", error)):
        kind = {"int": int, "float": float, "bool": bool, "str": str}[simple.group(1)]
        return f"--{key.replace('_', '-')}: {value.group(1).strip()!r} is not {_in_words(kind)}"
    return " ".join(error.split())


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{key}.")
        else:
            yield key


def _is_known(key: str, leaves: Mapping[str, Any], extra: set[str]) -> bool:
    if key in leaves or key.replace("-", "_") in extra:
        return True
    return any(key.startswith(f"{leaf}.") and typing.get_origin(hint) is dict for leaf, hint in leaves.items())


def _unknown_key(key: str, leaves: Mapping[str, Any], options: Sequence[str]) -> str:
    section, _, last = key.rpartition(".")
    if section in _RECORDS:
        there = [leaf for leaf in leaves if leaf.startswith(f"{section}.")]
        close = difflib.get_close_matches(key, there, n=1, cutoff=0.8)
    else:
        there = list(dict.fromkeys([*(leaf.split(".")[0] for leaf in leaves), *options]))
        close = difflib.get_close_matches(section or key, there, n=1)
    if not close:  # the right name in the wrong section, or without one
        names = {leaf.rsplit(".", 1)[-1]: leaf for leaf in reversed(list(leaves))}
        close = [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.8)]
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
    return f"{key}: unknown key; {hint}"


def _in_words(hint: Any) -> str:
    """A type hint as a user would say it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(inner) for inner in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"a list such as [{'a, b' if str in inner else '0.5, 0.5'}]"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a mapping such as {depth: 6}",
        types.NoneType: "null",
    }
    return words.get(origin or hint, str(hint))
