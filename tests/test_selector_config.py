"""What one may ask of a selector, and what one is told of what one may not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from models.selector_config import SelectorConfig


def test_defaults_follow_the_papers_but_where_another_way_chose_better() -> None:
    top_k = SelectorConfig()
    assert (top_k.kind, top_k.stages, top_k.tau_start, top_k.tau_end) == ("top_k", (0,), 10.0, 0.1)
    assert (top_k.gradient, top_k.noise) == ("attention", 0.0)
    threshold = SelectorConfig(kind="threshold")
    assert threshold.stages == (4, 7, 10)
    assert threshold.thresholds == (0.001, 0.002, 0.003)
    assert threshold.temperature == 1e4


@pytest.mark.parametrize("values", [{}, {"kind": "threshold", "stages": [2, 3]}, {"keep_ratio": 0.5, "stages": (0, 4)}])
def test_configuration_survives_json(values: dict[str, Any]) -> None:
    config = SelectorConfig.from_mapping(values)
    assert SelectorConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_thresholds_of_an_earlier_file_are_read() -> None:
    """What they are by default, and what the settings of the other kind were by default then."""
    earlier = {**SelectorConfig(kind="threshold").to_dict(), "gradient": "factor", "noise": 1.0}
    assert SelectorConfig.from_mapping(earlier) == SelectorConfig(kind="threshold")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio: 0.0"),
        ({"keep_ratio": 1.01}, "keep_ratio: 1.01"),
        ({"keep_ratio": math.nan}, "keep_ratio: nan"),
        ({"stages": ()}, "stages: ()"),
        ({"stages": (-1,)}, "stages: (-1,)"),
        ({"stages": (3, 3)}, "stages: (3, 3)"),
        ({"stages": ("4",)}, "stages: ('4',)"),
        ({"kind": "threshold", "stages": (0, 4)}, "the block before"),
        ({"kind": "threshold", "stages": (7, 4)}, "stages: (7, 4)"),
        ({"kind": "threshold", "thresholds": (0.1,)}, "one number for each of the 3 stages"),
        ({"kind": "threshold", "temperature": 0.0}, "temperature: 0.0"),
        ({"kind": "threshold", "borderline": 0.3}, "borderline: 0.3 is not a number from 0 to 0.25"),
        ({"kind": "threshold", "borderline": -1e-9}, "borderline: -1e-09"),
        ({"borderline": 0.1}, "is for kind threshold alone"),
        ({"dropped": "lost"}, "dropped: 'lost' is not one of gone, fused"),
        ({"zeroing": True, "dropped": "fused"}, "needs dropped: gone"),
        ({"ramp": 1.5}, "ramp: 1.5 is not a share in [0, 1]"),
        ({"kind": "threshold", "ramp": 0.5}, "is for kind top_k alone"),
        ({"kind": "threshold", "keep_ratio": 0.5}, "is for kind top_k alone"),
        ({"thresholds": (0.1,)}, "is for kind threshold alone"),
        ({"tau_end": 0.0}, "tau_end: 0.0"),
        ({"zeroing": True}, "needs gradient: factor"),
        ({"zeroing": True, "gradient": "factor", "stages": (0, 4)}, "it is there for one stage"),
        ({"zeroing": True, "gradient": "attention"}, "needs gradient: factor"),
        ({"gradient": "none"}, "is not one of factor, attention"),
        ({"noise": -1.0}, "noise: -1.0"),
        ({"noise": math.nan}, "noise: nan"),
        ({"noise": math.inf}, "noise: inf"),
        ({"kind": "threshold", "noise": 0.5}, "is for kind top_k alone"),
        ({"keep_ratio": "much"}, "keep_ratio: 'much'"),
        ({"tau_start": None}, "tau_start: None"),
        ({"noise": "loud"}, "noise: 'loud'"),
        ({"zeroing": "no"}, "zeroing: 'no'"),
        ({"seed": 0.5}, "seed: 0.5"),
        ({"seed": 2**63}, "seed: 9223372036854775808"),
        ({"keep_ratio": 10**400}, "keep_ratio: 1000"),
        ({"tau_end": 1e-60}, "tau_end: 1e-60"),
        ({"noise": 1e300}, "noise: 1e+300"),
        ({1: 2, "ratio": 0.5}, "unknown 1, ratio"),
        ({"stages": "4"}, "stages: ('4',)"),
        ({"kind": "threshold", "thresholds": ("a", 0.1, 0.2)}, "is not numbers"),
        ({"kind": "threshold", "temperature": [1.0]}, "temperature: [1.0]"),
        ({"kind": ["top_k"]}, "is not one of top_k, threshold"),
        ({"kind": "topk"}, "is not one of top_k, threshold"),
        ({"ratio": 0.5}, "unknown ratio"),
    ],
)
def test_bad_configuration_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is checked below
        SelectorConfig.from_mapping(values)
    assert named in str(raised.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"stages: .*keep_ratio: 2 .*tau_start: -1"):
        SelectorConfig(stages=(4, 2), keep_ratio=2, tau_start=-1)


@pytest.mark.parametrize("values", [None, 5, ["kind"]])
def test_a_selector_that_is_no_mapping_is_named(values: Any) -> None:
    with pytest.raises(ValueError, match="give a mapping"):
        SelectorConfig.from_mapping(values)
