"""Every field of the two records that users fill in: a good value is taken, any other is named with what would work."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.selector_config import SelectorConfig
from sparse_trainer.scheduler import SparsityScheduler
from sparse_trainer.sparsity_config import SparsityConfig

VALUES: dict[str, Any] = {
    "null": None,
    "0": 0,
    "-1": -1,
    "1.5": 1.5,
    "abc": "abc",
    "empty text": "",
    "true": True,
    "false": False,
    "[]": [],
    "()": (),
    "{}": {},
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1": 1,
    "0.5": 0.5,
    "huge": 10**400,
    "bytes": b"abc",
    "object": object(),
    "[None]": [None],
    "np 1": np.int64(1),
    "np 0": np.int32(0),
    "np 0.5": np.float32(0.5),
    "np nan": np.float64("nan"),
    "np true": np.bool_(True),
    "np abc": np.str_("abc"),
    "array": np.array([0.5, 0.25]),
    "array abc": np.array(["abc", "abc"]),
    "tensor 0.5": torch.tensor(0.5),
    "tensor": torch.ones(2),
}

SHARE, FROM_ZERO = {"1", "0.5", "np 1", "np 0.5", "tensor 0.5"}, {"0", "np 0"}
POSITIVE_WHOLE = {"1", "np 1"}
WHOLE = POSITIVE_WHOLE | FROM_ZERO
BOOL = {"true", "false", "np true"}
PATTERNS = {"abc", "empty text", "[]", "()", "np abc", "array abc"}
POSITIVE = SHARE | {"1.5"}

TAKEN_BY_SPARSITY = {
    "density": SHARE | {"null"},
    "live_parameters": POSITIVE_WHOLE | {"null", "huge"},
    "initial_density": SHARE | {"null"},
    "reach_at": SHARE,
    "head_density": SHARE,
    "neuron_density": SHARE,
    "unit_falls": FROM_ZERO,  # more needs head_density or neuron_density
    "update_every": POSITIVE_WHOLE | {"null", "huge"},
    "updates": WHOLE | {"null", "huge"},
    "drop_fraction": SHARE,  # and none below drop_fraction_end
    "drop_fraction_end": FROM_ZERO,  # and none above drop_fraction
    "stop_at": SHARE | FROM_ZERO,
    "growth_batches": POSITIVE_WHOLE | {"huge"},
    "regrow": BOOL,
    "floor": SHARE | FROM_ZERO,
    "probation": WHOLE | {"huge"},
    "score_batches": POSITIVE_WHOLE | {"huge"},
    "include": PATTERNS,
    "exclude": PATTERNS,
    "seed": WHOLE,
}
"""The values of each field that are good by themselves. Fields that are not named take words that are not here."""

TAKEN_BY_TOP_K = {
    "stages": WHOLE | {"null", "huge"},
    "keep_ratio": SHARE,
    "ramp": SHARE | FROM_ZERO,
    "noise": POSITIVE | FROM_ZERO,
    "tau_start": POSITIVE,
    "tau_end": POSITIVE,
    "zeroing": {"false"},  # true needs gradient: factor
    "seed": WHOLE,
    "thresholds": {"null"},
}
TAKEN_BY_THRESHOLD = {
    "stages": POSITIVE_WHOLE | {"null", "huge"},
    "thresholds": {"null"},
    "temperature": POSITIVE,
    "borderline": FROM_ZERO,
    "ramp": FROM_ZERO,
    "noise": FROM_ZERO | {"1", "np 1"},  # what it was by default before
    "zeroing": {"false"},
    "seed": FROM_ZERO,
}


def check_field(record: Any, name: str, value: Any, good: bool, **others: Any) -> None:
    """A good value is taken, as what JSON holds; of any other, the error names the field and says what is wrong."""
    if good:
        json.dumps(asdict(record(**{name: value}, **others)))
        return
    works = "is not|is no pattern|is for kind|needs|is below|is above"
    with pytest.raises(ValueError, match=rf"(^|; ){name}: .*({works})|is above {name} "):
        record(**{name: value}, **others)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", [field.name for field in fields(SparsityConfig)])
def test_sparsity(name: str, value: str) -> None:
    check_field(SparsityConfig, name, VALUES[value], value in TAKEN_BY_SPARSITY.get(name, set()))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", [field.name for field in fields(SelectorConfig)])
def test_selector_top_k(name: str, value: str) -> None:
    check_field(SelectorConfig, name, VALUES[value], value in TAKEN_BY_TOP_K.get(name, set()))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", [field.name for field in fields(SelectorConfig) if field.name != "kind"])
def test_selector_threshold(name: str, value: str) -> None:
    check_field(SelectorConfig, name, VALUES[value], value in TAKEN_BY_THRESHOLD.get(name, set()), kind="threshold")


@pytest.mark.parametrize("value", VALUES)
def test_total_steps(value: str) -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    if value in POSITIVE_WHOLE:
        assert SparsityScheduler(model, SparsityConfig(), total_steps=VALUES[value]).schedule.total_steps == 1
        return
    with pytest.raises(ValueError, match=r"total_steps: .* is not a positive whole number of optimizer steps"):
        SparsityScheduler(model, SparsityConfig(), total_steps=VALUES[value])
    assert torch.equal(model.weight, before)


def test_numbers_of_numpy_and_torch_are_taken_as_those_of_python() -> None:
    config = SparsityConfig(density=np.float32(0.5), update_every=np.int64(3), exclude=np.array(["head"]))
    assert config == SparsityConfig(density=0.5, update_every=3, exclude=("head",))
    assert type(config.density) is float
    thresholds: Any = torch.tensor([0.25, 0.5])
    stages: Any = [np.int64(1), np.int64(2)]
    selector = SelectorConfig(kind="threshold", stages=stages, thresholds=thresholds)
    assert selector == SelectorConfig(kind="threshold", stages=(1, 2), thresholds=(0.25, 0.5))


def test_thresholds_for_the_other_kind_are_named() -> None:
    given: Any = 0.1
    with pytest.raises(ValueError, match=r"thresholds: \(0.1,\) is for kind threshold alone, and kind is top_k"):
        SelectorConfig(kind="top_k", thresholds=given)
