"""The two towers and their floors: a file imports only from lower floors, and models never meets sparse_trainer."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "models": {
        "choosing": 0,
        "fusing": 0,
        "packing": 0,
        "scores": 0,
        "selection": 0,
        "selector_config": 0,
        "blocks": 1,
        "masked_attention": 1,
        "threshold_selector": 1,
        "top_k_selector": 1,
        "adaptive_tokens": 2,
        "sparse_deit": 3,
    },
    "sparse_trainer": {
        "masks": 0,
        "budget": 0,
        "given_values": 0,
        "wrappers": 0,
        "update_schedule": 1,
        "falling": 0,
        "units": 0,
        "generators": 0,
        "agreement": 1,
        "patterns": 1,
        "optimizer_state": 1,
        "ownership": 0,
        "prunable": 0,
        "enforcement": 2,
        "following": 2,
        "construction": 4,
        "report": 1,
        "sparsity_config": 2,
        "flops": 1,
        "live_units": 1,
        "unit_scores": 2,
        "unit_choice": 3,
        "unit_exchange": 2,
        "unit_reshaping": 2,
        "unit_moves": 3,
        "unit_groups": 4,
        "unit_swaps": 5,
        "growth_gradient": 2,
        "weight_choice": 2,
        "weight_masks": 3,
        "taking_over": 6,
        "mask_owner": 6,
        "scheduler": 7,
        "kernels.library": 0,
        "kernels.masking": 1,
        "kernels.packed": 1,
        "kernels.layers": 2,
        "kernels.attention": 3,
        "kernels.on_gpu": 3,
        "kernels.accelerate": 4,
        "files.whole_file": 6,
        "files.tensor_file": 7,
        "files.resume": 8,
        "files.sparse_info": 8,
        "files.rebuild": 9,
        "files.masked_tensor": 10,
        "files.checkpoint": 11,
        "mask_history": 2,
        "palette": 2,
        "mask_pictures": 3,
        "overview": 4,
        "mask_log": 12,
    },
}
"""Of each file of a tower."""
PACKAGES = {
    "errors": 0,
    "terminal": 1,
    "processes": 1,
    "data": 2,
    "config": 3,
    "run_folder": 4,
    "evaluation": 5,
    "examples": 5,
    "inspection": 6,
    "training": 7,
    "exports": 8,
    "benchmarks": 9,
    "grids": 10,
    "shrinking": 10,
    "commands": 11,
    "gpu": 12,
    "trials": 12,
    "__main__": 13,
}
"""Of each package of the bridge. Within a package no two files import each other, by whatever way round."""


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(top: str) -> dict[str, Path]:
    """Every file by its dotted name within ``top``; a package's ``__init__`` has the name of the package."""
    found = {}
    for path in (ROOT / top).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / top).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    found.pop("__init__")
    return found


def neighbours(top: str) -> dict[str, set[str]]:
    """By file, the files of the same tower that it imports."""
    files = files_of(top)
    found = {}
    for name, path in files.items():
        rests = {full.removeprefix(f"{top}.") for full in imported(path) if full.startswith(f"{top}.")}
        found[name] = (rests & set(files)) - {name}
        # A package is there without what it holds, so importing a file does not count as importing its package.
        found[name] -= {rest.rpartition(".")[0] for rest in found[name]}
    return found


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Names on a circle of imports; empty if there is none."""
    left = {name: set(found) for name, found in imports.items()}
    while True:
        free = [name for name, found in left.items() if not found & set(left)]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


@pytest.mark.parametrize("tower", FLOORS)
def test_floors(tower: str) -> None:
    files = files_of(tower)
    modules = {name for name, path in files.items() if path.stem != "__init__"}
    assert modules == set(FLOORS[tower]), "a new file needs a floor"
    for name, found in neighbours(tower).items():
        for below in found & modules if name in modules else ():
            assert FLOORS[tower][below] < FLOORS[tower][name], f"{tower}: {name} imports {below}"


def test_floors_of_the_bridge() -> None:
    assert {name.partition(".")[0] for name in files_of("experiments")} == set(PACKAGES), "a new package needs a floor"
    imports = neighbours("experiments")
    for name, found in imports.items():
        package = name.partition(".")[0]
        for below in {full.partition(".")[0] for full in found} - {package}:
            assert PACKAGES[below] < PACKAGES[package], f"experiments: {name} imports from {below}"
    assert circle(imports) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("tower", "others"),
    [("models", {"sparse_trainer", "experiments"}), ("sparse_trainer", {"models", "experiments"})],
)
def test_the_towers_never_meet(tower: str, others: set[str]) -> None:
    for path in (ROOT / tower).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(path)}
        assert not tops & others, f"{path.name} imports {tops & others}"
