"""The two towers and their floors: a file imports only from lower floors, and models never meets sparse_trainer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "models": {"token_selector": 0, "packing": 0, "sparse_deit": 1},
    "sparse_trainer": {
        "masks": 0,
        "budget": 0,
        "update_schedule": 0,
        "units": 0,
        "agreement": 1,
        "optimizer_state": 1,
        "whole_file": 0,
        "generators": 0,
        "tensor_file": 1,
        "report": 1,
        "sparsity_config": 1,
        "unit_swaps": 2,
        "weight_masks": 2,
        "flops": 1,
        "scheduler": 3,
        "sparse_info": 3,
        "rebuild": 4,
        "checkpoint": 5,
        "resume": 2,
        "mask_log": 4,
    },
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("tower", FLOORS)
def test_floors(tower: str) -> None:
    files = {path.stem: path for path in (ROOT / tower).glob("*.py") if path.stem != "__init__"}
    assert set(files) == set(FLOORS[tower]), "a new file needs a floor"
    for stem, path in files.items():
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top == tower and rest:
                below = rest.split(".")[0]
                assert FLOORS[tower][below] < FLOORS[tower][stem], f"{tower}/{stem}.py imports {below}"


@pytest.mark.parametrize(
    ("tower", "others"),
    [("models", {"sparse_trainer", "experiments"}), ("sparse_trainer", {"models", "experiments"})],
)
def test_the_towers_never_meet(tower: str, others: set[str]) -> None:
    for path in (ROOT / tower).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(path)}
        assert not tops & others, f"{path.name} imports {tops & others}"
