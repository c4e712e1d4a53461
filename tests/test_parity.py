"""``experiments/PARITY.md``: the settings that it names exist, and each option of timm's stands in it once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import experiments
from experiments.config.reading import flatten
from experiments.config.run_config import RunConfig

FOLDER = Path(experiments.__file__).parent
TEXT = (FOLDER / "PARITY.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT.splitlines()
    if line.startswith("| `") or line.startswith("| `torchrun")
]


def settings() -> set[str]:
    """Every setting, and the sections that may be null."""
    return {*flatten(RunConfig()), "sparsity", "selector"}


SECTIONS = "model|data|optimizer|schedule|training|losses|output|sparsity|selector"
NAMED = sorted(set(re.findall(rf"`((?:{SECTIONS})(?:\.\w+)?)`", TEXT)))


def test_every_row_names_what_there_is_or_says_why_not() -> None:
    assert len(ROWS) > 60
    for timm, here, note in ROWS:
        assert timm
        assert here or note, timm
        assert here or note.startswith(("left out", "not yet", "TensorBoard")), note


@pytest.mark.parametrize("name", NAMED)
def test_the_settings_exist(name: str) -> None:
    assert name in settings()


def test_options_of_timm_stand_once() -> None:
    options = [option for timm, _, _ in ROWS for option in re.findall(r"--[\w-]+", timm)]
    assert len(options) > 120
    assert len(set(options)) == len(options), sorted({option for option in options if options.count(option) > 1})


def test_all_settings_of_the_data_have_a_place() -> None:
    """Those that timm has no counterpart for are named here, so that a new one is thought about."""
    own = {
        "data.subset_seed",
        "data.eval_subset",
        "data.fit",
        "data.white_level",
        "data.memory_limit",
        "losses.macs_ramp",
        "losses.macs_weight",
        "losses.teacher_amp",
        "optimizer.threshold_lr_scale",
    }
    sections = ("data.", "optimizer.", "schedule.", "training.", "losses.", "model.", "output.")
    missing = {name for name in settings() if name.startswith(sections) and f"`{name}`" not in TEXT}
    assert missing == own
