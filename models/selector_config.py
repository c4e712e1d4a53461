"""What the user asks of a token selector: one frozen record that says everything that is wrong at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

import numpy as np
import torch

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "top_k": ("keep_ratio", "ramp", "gradient", "noise", "tau_start", "tau_end", "zeroing", "seed"),
    "threshold": ("thresholds", "temperature", "borderline"),
}
#: What these were by default before. Files and configurations of that time hold them for kind threshold too.
_EARLIER_DEFAULTS: dict[str, object] = {"gradient": "factor", "noise": 1.0}
_DEFAULT_STAGES: dict[str, tuple[int, ...]] = {"top_k": (0,), "threshold": (4, 7, 10)}


def _plain(value: Any) -> Any:
    """A number or array of NumPy or torch as number or list of Python; anything else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


def _as_tuple(value: object) -> tuple[Any, ...]:
    """A list as JSON and YAML give it; anything else alone, for the checks to refuse."""
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else (value,)


@dataclass(frozen=True)
class SelectorConfig:
    """Which patches are dropped, where, and how that is learned. Checked when built.

    Raises:
        ValueError: lists everything that is wrong, a setting that the chosen kind would ignore included.
    """

    kind: Literal["top_k", "threshold"] = "top_k"
    """Keep as many patches of every image (top_k, SViTE+) or those whose score exceeds a threshold (AS-ViT)."""
    stages: tuple[int, ...] | None = None
    """Patches are dropped before these blocks (0: right after the position embedding). null: [0] for top_k, [4, 7, 10]
    for threshold, which needs the attention of the block before and so starts at 1."""
    dropped: Literal["gone", "fused"] = "gone"
    """What becomes of the patches that a stage drops: gone, or fused into one token that stays, their mean weighted by
    their scores (EViT)."""
    keep_ratio: float = 0.7
    """top_k: patches kept over patches that reach a stage."""
    ramp: float = 0.0
    """top_k: share of the run over which, in training, keep_ratio falls evenly from 1 to what it is; evaluation keeps
    what it is from the start. torch.compile compiles for every number of patches on the way."""
    gradient: Literal["factor", "attention"] = "attention"
    """top_k: by what the scorer learns that a kept patch was worth it. attention: what the loss would gain if the other
    tokens looked at it more, in the block that follows. factor: if it were multiplied by more than 1 (published). From
    a trained network the former, without noise, chose far better than the latter with it, which chose worse than
    chance; from scratch at the input the latter was level or a little ahead."""
    noise: float = 0.0
    """top_k: of the Gumbel noise that scores get in training, which tries out other patches than evaluation takes (0:
    none; 1: published)."""
    tau_start: float = 10.0
    """top_k: softmax temperature at the start of training."""
    tau_end: float = 0.1
    """top_k: and at its end; linear in between."""
    zeroing: bool = False
    """top_k: zero the dropped patches and carry them along, as the published code does. Saves no time."""
    seed: int = 0
    """top_k: of the generator that draws the Gumbel noise."""
    thresholds: tuple[float, ...] | None = None
    """threshold: one initial value per stage, for 197 tokens. null: 0.001, 0.002, 0.003, ..."""
    temperature: float = 1e4
    """threshold: slope of the sigmoid that carries the gradient, for 197 tokens."""
    borderline: float = 2.5e-4
    """threshold: in training a dropped patch is computed on, without being looked at, where the slope s (1 - s) of that
    sigmoid, at most 0.25, exceeds this: its gradient teaches the threshold. 0: wherever there is any."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if not isinstance(self.kind, str) or self.kind not in _DEFAULT_STAGES:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(_DEFAULT_STAGES)}")
        if self.kind == "threshold":
            for name, earlier in _EARLIER_DEFAULTS.items():
                value = getattr(self, name)
                if value == earlier and not isinstance(value, bool):
                    object.__setattr__(self, name, type(self).__dataclass_fields__[name].default)
        stages = _as_tuple(_DEFAULT_STAGES[self.kind] if self.stages is None else self.stages)
        object.__setattr__(self, "stages", stages)
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", _as_tuple(self.thresholds))
        elif self.kind == "threshold":
            default = tuple(round(0.001 * (stage + 1), 6) for stage in range(len(stages)))
            object.__setattr__(self, "thresholds", default)
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []

        def check(name: str, works: str, accept: bool) -> None:
            if not accept:
                problems.append(f"{name}: {getattr(self, name)!r} is not {works}")

        def number(value: object) -> bool:
            """Whether float32 holds it."""
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            return real and abs(cast(float, value)) <= torch.finfo(torch.float32).max

        def positive(value: object) -> bool:
            return number(value) and cast(float, value) >= torch.finfo(torch.float32).tiny

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        stages: tuple[Any, ...] = self.stages or ()
        least, why = (0, "") if self.kind == "top_k" else (1, " (a threshold reads the attention of the block before)")
        ascending = bool(stages) and all(map(whole, stages)) and list(stages) == sorted(set(stages))
        check("stages", f"ascending block numbers from {least}{why}", ascending and stages[0] >= least)
        check("dropped", "one of gone, fused", self.dropped in ("gone", "fused"))
        check("thresholds", "numbers", self.thresholds is None or all(map(number, self.thresholds)))
        if self.thresholds is not None and len(self.thresholds) != len(stages):
            check("thresholds", f"one number for each of the {len(stages)} stages", False)
        check("temperature", "a positive number", positive(self.temperature))
        check("borderline", "a number from 0 to 0.25", number(self.borderline) and 0 <= self.borderline <= 0.25)
        check("keep_ratio", "a share in (0, 1]", positive(self.keep_ratio) and self.keep_ratio <= 1)
        check("ramp", "a share in [0, 1]", number(self.ramp) and 0 <= self.ramp <= 1)
        check("gradient", "one of factor, attention", self.gradient in ("factor", "attention"))
        check("noise", "0 (none) or a positive number (1: as published)", number(self.noise) and self.noise >= 0)
        check("tau_start", "a positive number", positive(self.tau_start))
        check("tau_end", "a positive number", positive(self.tau_end))
        check("zeroing", "true or false", isinstance(self.zeroing, bool))
        check("seed", "a whole number from 0 to 2^63 - 1", whole(self.seed) and 0 <= self.seed < 2**63)
        if self.zeroing is True and self.gradient != "factor":
            problems.append("zeroing: it multiplies by the mask, and needs gradient: factor (published with noise: 1)")
        if self.zeroing is True and self.dropped != "gone":
            problems.append("zeroing: it carries the dropped patches along, and needs dropped: gone")
        if self.zeroing is True and len(stages) > 1:
            problems.append(f"zeroing: it is there for one stage; stages is {stages}")
        other = "threshold" if self.kind == "top_k" else "top_k"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _ONLY_FOR[other] and value != field.default:
                problems.append(f"{field.name}: {value!r} is for kind {other} alone, and kind is {self.kind}")
        return problems

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SelectorConfig:
        """Inverse of :meth:`to_dict`; a key that is missing takes its default.

        Raises:
            ValueError: no mapping, an unknown key, or a value that :class:`SelectorConfig` refuses.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"selector is {values!r}; give a mapping with some of {', '.join(known)}")
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ValueError(f"selector: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))
