"""What a sparse checkpoint says about itself: checked when built, and again when read from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_trainer.budget import Budget

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)?")
_BLOCK = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")
INPUT = ("image_size", "in_chans", "mean", "std")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")
FITS = ("crop", "pad", "squash")
_MAX_SELECTOR_ITEMS = 64
_MAX_NUMBER = 1 << 40
_MAX_PIXELS = 1 << 13
_MAX_DEPTH = 256


@dataclass(frozen=True)
class SparseInfo:
    """Everything in a sparse checkpoint that is not a weight.

    Raises:
        ValueError: at construction, with all problems together.
    """

    model: str  #: a timm model name, such as ``deit_small_patch16_224``
    budget: Budget  #: live and total parameters, as the scheduler counts them
    macs: int  #: multiply-accumulates of one image
    image_size: int | tuple[int, int]  #: pixels, (height, width); one number means a square
    in_chans: int
    mean: tuple[float, ...]  #: of the input normalisation, one per channel
    std: tuple[float, ...]
    model_args: Mapping[str, Any] = field(default_factory=dict)  #: keyword arguments of the model factory
    #: How a picture is brought to its size: ``interpolation``, ``crop_pct``, ``fit``, ``white_level``, as far as known.
    preparation: Mapping[str, Any] = field(default_factory=dict)
    selector: Mapping[str, Any] | None = None  #: the token selector's configuration
    class_names: tuple[str, ...] | None = None
    step: int = 0  #: optimizer steps done
    recipe: str = ""  #: name of the recipe that made it
    metrics: Mapping[str, float] = field(default_factory=dict)  #: such as ``{"top1": 81.2}``
    #: By block, the head of the dense block in each slot of the compact one; empty if all are live.
    live_heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    live_neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  #: likewise

    def __post_init__(self) -> None:
        if type(self.image_size) is int:
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        for name in ("image_size", "mean", "std", "class_names"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("live_heads", "live_neurons"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                units = {block: tuple(u) if isinstance(u, Sequence) else u for block, u in value.items()}
                object.__setattr__(self, name, units)
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        problems = []

        def check(holds: bool, key: str, expected: str, value: object) -> None:
            if not holds:
                text = repr(value)
                shown = text if len(text) <= 80 else text[:77] + "..."
                problems.append(f"{key}: expected {expected}, found {shown}")

        def is_pixels(value: object) -> bool:
            return isinstance(value, tuple) and len(value) == 2 and all(_is_int(v, 1, _MAX_PIXELS) for v in value)

        def per_channel(value: object, low: float) -> bool:
            return (
                isinstance(value, tuple) and len(value) == self.in_chans and all(_is_number(v, low, 1e6) for v in value)
            )

        check(
            isinstance(self.model, str) and len(self.model) <= 200 and bool(_NAME.fullmatch(self.model)),
            "model",
            "the name of a registered timm model (no path, no 'hf_hub:')",
            self.model,
        )
        if isinstance(self.model_args, Mapping):
            for key, value in self.model_args.items():
                known = isinstance(key, str) and key in _MODEL_ARGS
                check(known, "model_args", f"keys among {', '.join(sorted(_MODEL_ARGS))}", key)
                if known:
                    holds, expected = _MODEL_ARGS[key]
                    check(value is None or holds(value), f"model_args.{key}", expected, value)
        else:
            check(False, "model_args", "a mapping", self.model_args)
        check(
            self.selector is None or _is_plain_mapping(self.selector),
            "selector",
            f"None or a mapping of numbers, short strings and lists of at most {_MAX_SELECTOR_ITEMS} of them",
            self.selector,
        )
        check(
            isinstance(self.budget, Budget)
            and _is_int(self.budget.total, 0, _MAX_NUMBER)
            and _is_int(self.budget.live, 0, self.budget.total),
            "budget",
            "whole numbers with 0 <= live <= total",
            self.budget,
        )
        check(_is_int(self.macs, 0, 1 << 62), "macs", "a whole number", self.macs)
        pixels = f"height and width, 1 to {_MAX_PIXELS} pixels"
        check(is_pixels(self.image_size), "image_size", pixels, self.image_size)
        check(_is_int(self.in_chans, 1, 4096), "in_chans", "a whole number from 1", self.in_chans)
        check(per_channel(self.mean, -1e6), "mean", f"{self.in_chans!r:.40} numbers", self.mean)
        check(per_channel(self.std, 1e-12), "std", f"{self.in_chans!r:.40} positive numbers", self.std)
        if isinstance(self.preparation, Mapping):
            for key, value in self.preparation.items():
                known = isinstance(key, str) and key in _PREPARATION
                check(known, "preparation", f"keys among {', '.join(_PREPARATION)}", key)
                if known:
                    holds, expected = _PREPARATION[key]
                    check(holds(value), f"preparation.{key}", expected, value)
        else:
            check(False, "preparation", "a mapping", self.preparation)
        check(
            self.class_names is None
            or (isinstance(self.class_names, tuple) and all(_is_text(name) for name in self.class_names)),
            "class_names",
            "None or printable strings",
            self.class_names,
        )
        check(_is_int(self.step, 0, _MAX_NUMBER), "step", "a whole number", self.step)
        check(_is_text(self.recipe), "recipe", "a printable string", self.recipe)
        check(
            isinstance(self.metrics, Mapping)
            and all(_is_text(key) and _is_number(value, -1e300, 1e300) for key, value in self.metrics.items()),
            "metrics",
            "finite numbers by name",
            self.metrics,
        )
        for key in ("live_heads", "live_neurons"):
            units = getattr(self, key)
            if not isinstance(units, Mapping):
                check(False, key, "unit numbers by block", units)
                continue
            for block, numbers in units.items():
                named = isinstance(block, str) and len(block) <= 200 and bool(_BLOCK.fullmatch(block))
                check(named, key, "block names such as 'blocks.0'", block)
                check(_are_units(numbers), f"{key}.{block!r:.80}", "distinct unit numbers from 0", numbers)
        return problems

    def to_metadata(self) -> dict[str, Any]:
        """JSON values by metadata key, as the file holds them."""
        return {
            "model": {"name": self.model, "args": dict(self.model_args)},
            "live_heads": {block: list(units) for block, units in self.live_heads.items()},
            "live_neurons": {block: list(units) for block, units in self.live_neurons.items()},
            "selector": None if self.selector is None else dict(self.selector),
            "budget": {"live": self.budget.live, "total": self.budget.total},
            "macs": self.macs,
            "input": {
                "image_size": self.image_size,
                "in_chans": self.in_chans,
                "mean": self.mean,
                "std": self.std,
                **({"preparation": dict(self.preparation)} if self.preparation else {}),
            },
            "class_names": self.class_names,
            "provenance": {"step": self.step, "recipe": self.recipe, "metrics": dict(self.metrics)},
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SparseInfo:
        """The inverse of :meth:`to_metadata`.

        Raises:
            ValueError: if a key is missing or unknown, or a value is not what it should be.
        """
        keys: dict[str, tuple[str, ...] | None] = {
            "model": ("name", "args"),
            "live_heads": None,
            "live_neurons": None,
            "selector": None,
            "budget": ("live", "total"),
            "macs": None,
            "input": INPUT,
            "class_names": None,
            "provenance": ("step", "recipe", "metrics"),
        }
        if isinstance(metadata.get("input"), Mapping) and "preparation" in metadata["input"]:  # older files have none
            keys["input"] = (*INPUT, "preparation")
        _require_keys("metadata", metadata, keys)
        for key, inner in keys.items():
            if inner is not None:
                _require_keys(key, metadata[key], inner)
        model, budget = metadata["model"], metadata["budget"]
        image, provenance = metadata["input"], metadata["provenance"]
        return cls(
            model=model["name"],
            model_args=_with_tuples(model["args"]),
            live_heads=metadata["live_heads"],
            live_neurons=metadata["live_neurons"],
            selector=metadata["selector"],
            budget=Budget(budget["live"], budget["total"]),
            macs=metadata["macs"],
            image_size=image["image_size"],
            in_chans=image["in_chans"],
            mean=image["mean"],
            std=image["std"],
            preparation=image.get("preparation", {}),
            class_names=metadata["class_names"],
            step=provenance["step"],
            recipe=provenance["recipe"],
            metrics=provenance["metrics"],
        )


def _require_keys(where: str, value: object, keys: Sequence[str] | Mapping[str, object]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(keys):
        found = ", ".join(map(repr, list(value)[:20])) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{where}: expected {', '.join(keys)}, found {found:.200}")


def _with_tuples(args: object) -> Any:
    """Sizes are pairs in a model's arguments and lists in JSON."""
    if not isinstance(args, Mapping):
        return args
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object) -> bool:
    # Printed in terminals: a control character could rewrite what is seen there.
    return isinstance(value, str) and value.isprintable() and len(value) <= 1000


def _are_units(value: object) -> bool:
    # In the order of the slots that hold them, which updates shuffle.
    numbers = value if isinstance(value, tuple) else ()
    whole = all(_is_int(number, 0, 1 << 20) for number in numbers)
    return whole and 0 < len(numbers) == len(set(numbers))


def _is_plain_mapping(value: object, depth: int = 3) -> bool:
    """Numbers, short strings and None in mappings and lists of bounded size and depth."""
    if value is None or isinstance(value, bool) or _is_number(value, -1e9, 1e9):
        return depth < 3
    if isinstance(value, str):
        return depth < 3 and _is_text(value)
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        few = len(value) <= _MAX_SELECTOR_ITEMS
        return few and all(_is_text(k) and _is_plain_mapping(v, depth - 1) for k, v in value.items())
    if isinstance(value, list | tuple) and depth < 3:
        return len(value) <= _MAX_SELECTOR_ITEMS and all(_is_plain_mapping(v, depth - 1) for v in value)
    return False


def _pair_or_int(value: object) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return len(values) in (1, 2) and all(_is_int(v, 1, _MAX_PIXELS) for v in values)


def _whole(low: int, high: int) -> tuple[Callable[[object], bool], str]:
    return (lambda value: _is_int(value, low, high)), f"a whole number from {low} to {high}"


def _real(low: float, high: float) -> tuple[Callable[[object], bool], str]:
    return (lambda value: _is_number(value, low, high) and math.isfinite(float(value))), (  # type: ignore[arg-type]
        f"a number from {low} to {high}"
    )


_flag = (lambda value: isinstance(value, bool)), "true or false"
_size = _pair_or_int, f"1 to {_MAX_PIXELS} pixels, one number or two"
_word = (lambda value: isinstance(value, str) and bool(_WORD.fullmatch(value))), "a plain word"

_PREPARATION: dict[str, tuple[Callable[[object], bool], str]] = {
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda value: _is_number(value, 1e-3, 1.0), "a share up to 1"),
    "fit": (lambda value: value in FITS, f"one of {', '.join(FITS)}"),
    "white_level": (lambda value: value is None or _is_number(value, 1e-9, 1e30), "a positive number or null"),
}

#: The only arguments that a file may pass to a model factory: numbers and plain words, nothing that names a
#: file, an address, a class or pretrained weights.
_MODEL_ARGS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("img_size", "patch_size"), _size),
    **dict.fromkeys(("in_chans", "num_heads"), _whole(1, 4096)),
    **dict.fromkeys(("embed_dim",), _whole(1, 1 << 16)),
    **dict.fromkeys(("num_classes",), _whole(0, 1 << 24)),
    **dict.fromkeys(("depth",), _whole(1, _MAX_DEPTH)),
    **dict.fromkeys(("reg_tokens",), _whole(0, 4096)),
    **dict.fromkeys(("mlp_ratio", "init_values"), _real(0.0, 1000.0)),
    **dict.fromkeys(
        (
            "drop_rate",
            "pos_drop_rate",
            "patch_drop_rate",
            "proj_drop_rate",
            "attn_drop_rate",
            "drop_path_rate",
        ),
        _real(0.0, 1.0),
    ),
    **dict.fromkeys(
        (
            "qkv_bias",
            "qk_norm",
            "proj_bias",
            "scale_attn_norm",
            "scale_mlp_norm",
            "class_token",
            "no_embed_class",
            "pre_norm",
            "final_norm",
            "fc_norm",
            "pool_include_prefix",
            "dynamic_img_size",
            "dynamic_img_pad",
            "fix_init",
        ),
        _flag,
    ),
    **dict.fromkeys(("global_pool", "pos_embed", "weight_init", "act_layer", "norm_layer", "embed_norm_layer"), _word),
}
