"""What earlier calls brought home: outcomes stand in the grid's JSON file, so that a grid can go on elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.grids.report import Outcome

Outcomes = dict[str, dict[int, Outcome]]


def digest(settings: Mapping[str, Any]) -> str:
    """Of the settings of an entry: an outcome is of them, or of another run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def remember(outcomes: Mapping[str, Mapping[int, Outcome]], digests: Mapping[str, str]) -> dict[str, Any]:
    """As JSON values: by entry, its digest and its outcomes by seed."""
    return {
        entry: {"settings": digests[entry], "seeds": {str(seed): asdict(outcome) for seed, outcome in found.items()}}
        for entry, found in outcomes.items()
        if found
    }


def recall(content: Mapping[str, Any], digests: Mapping[str, str]) -> Outcomes:
    """The inverse of :func:`remember`, for entries whose settings are still the same."""
    known: Outcomes = {entry: {} for entry in digests}
    for entry, found in content.get("outcomes", {}).items():
        if found["settings"] == digests.get(entry):
            for seed, values in found["seeds"].items():
                curve = tuple((int(step), float(value)) for step, value in values["curve"])
                known[entry][int(seed)] = Outcome(**{**values, "curve": curve})
    return known
