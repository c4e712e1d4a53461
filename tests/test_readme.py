"""The README is true: its commands run as printed (with fewer steps where they are long), its tree is the tree."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from experiments.__main__ import main
from experiments.commands.shrink import RECIPE, create_options
from experiments.commands.train_request import read_command_line
from experiments.config.reading import create_parser, find_config, parse
from experiments.grids.report import to_markdown
from experiments.grids.speed_picture import points_of
from sparse_trainer import read_info
from tests.test_imports import FLOORS, PACKAGES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
ALL_RESULTS = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = TEXT) -> list[list[str]]:
    """Every ``sparse-trainer`` command of a page, split into words."""
    lines = [part.strip() for block in blocks("bash", text) for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sparse-trainer ")]


SHORT = ["--data.train_subset", "1000", "--data.eval_subset", "100", "--training.epochs", "2"]
SHORT += ["--schedule.warmup_epochs", "0.5", "--sparsity.updates", "2"]


def test_the_commands_of_the_quick_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert ["train"] in found
    assert ["evaluate", "runs/quickstart/sparse.safetensors"] in found
    assert main(["train", *SHORT]) == 0
    output = capsys.readouterr().out
    for word in (
        "accuracy",
        "live parameters",
        "patches kept",
        "sparse file",
        "written to",
        "tensorboard --logdir runs",
    ):
        assert word in output
    assert main(["evaluate", "runs/quickstart/sparse.safetensors"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert "tensorboard --logdir runs" in TEXT
    events = EventAccumulator(str(tmp_path / "runs" / "quickstart" / "tensorboard"), {"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert not [tag for tag in scalars if tag.startswith("budget/")], "a flat line"
    assert {"macs/share", "sparsity/exploration", "update/seconds", "eval/top1"} <= scalars
    assert {"Overview", "heads/live", "neurons/live"} <= set(events.Tags()["images"])


def test_the_other_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = next(words for words in commands() if "--sparsity.density" in words)
    assert main([*changed, *SHORT]) == 0
    capsys.readouterr()
    recipe = next(words for words in commands() if "svite_deit_small" in words)
    assert main(recipe) == 2  # there is no ImageNet here, and that is what it says
    assert "data/imagenet" in capsys.readouterr().err


def test_shrink_takes_the_options_of_the_readme() -> None:
    (words,) = [words for words in commands() if words[0] == "shrink"]
    options, rest = create_options().parse_known_args(words[2:])
    assert options.macs == 0.5
    config, _ = parse(create_parser("shrink"), rest, base=find_config(RECIPE))
    assert (config.data.dataset, config.data.root) == ("folder", "photos")


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_every_training_is_understood(page: Path) -> None:
    """Options that a later change renames are found here; runs to resume are not there to be read."""
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "train" and "--resume" not in words:
            read_command_line(words[1:])


def test_the_readme_is_short() -> None:
    assert len(TEXT.split()) <= 900


def test_the_loop_of_ten_lines_and_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    (ending,) = blocks("python", (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8"))
    images, targets = torch.randn(2, 3, 224, 224), torch.tensor([3, 5])
    names = {"loader": [(images, targets)], "criterion": nn.CrossEntropyLoss()}
    exec(compile(example, "README.md", "exec"), names)
    scheduler = names["scheduler"]
    assert scheduler.budget.live == round(0.5 * 21_912_576)  # type: ignore[attr-defined]
    assert scheduler.step_number == 1  # type: ignore[attr-defined]
    trained = names["model"].state_dict()  # type: ignore[attr-defined]
    exec(compile(ending, "README.md", "exec"), names)
    loaded = names["model"].state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert read_info(tmp_path / "sparse.safetensors").budget.live == round(0.5 * 21_912_576)


@pytest.mark.parametrize("tower", ["sparse_trainer", "models"])
def test_the_map_is_the_house(tower: str) -> None:
    """Every file of a tower, by its name and floor."""
    page = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    section = re.split(r"\n```|\n\w+/ ", page.split(f"\n{tower}/ ")[1])[0]
    listed, package = {}, ""
    for indent, name, kind, floor in re.findall(r"^( +)(\w+)(\.py|/) +(\d+) ", section, flags=re.MULTILINE):
        if kind == "/":
            package = f"{name}."
        else:
            listed[(package if len(indent) > 2 else "") + name] = int(floor)
    assert listed == FLOORS[tower]


def test_the_map_of_the_bridge() -> None:
    page = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    section = page.split("\nexperiments/\n")[1].split("\ntests/")[0]
    listed = {name: int(floor) for name, floor in re.findall(r"^  (\w+)(?:\.py|/) +(\d+) ", section, re.MULTILINE)}
    assert listed == {name: floor for name, floor in PACKAGES.items() if name != "__main__"}


def test_the_checks_are_what_ci_runs() -> None:
    assert "<!-- checks -->" in (ROOT / ".ci" / "run").read_text()
    checks = TEXT.split("<!-- checks -->")[1].split("```")[1]
    for tool in ("ruff format --check", "ruff check", "mypy", "pytest"):
        assert tool in checks


PUBLISHED = {"79.85", "82.22", "81.84", "0.28"}
"""By the papers."""


def figures_of(text: str) -> set[str]:
    """Numbers with two decimals or more, without their signs; those in the addresses of links left out."""
    text = re.sub(r"\]\([^)]*\)", "]", text)  # numbers of articles
    return set(re.findall(r"(?<![\d.,])\d[\d,]*\.\d{2,}(?!\d)", text))


def grids_of(section: str) -> str:
    """The reports of all grids that a section names."""
    names = re.findall(r"recipes/grids/(\w+)\.yaml|results/(\w+)\.md", section)
    files = [RESULTS / f"{name}.md" for pair in names for name in pair if name]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())  # cifar10 is for a GPU


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_of_results_is_that_of_the_grid() -> None:
    """Row by row, so that no figure is left behind when the grid runs again."""
    beginning = TEXT.split("\n## Start\n")[0]
    measured = [cells_of(line) for line in grids_of(beginning).splitlines()]
    rows = [cells_of(line) for line in beginning.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 3
    for name, *figures in rows:
        assert any(set(figures) <= set(line) for line in measured), name


def test_what_it_saves_was_measured() -> None:
    figures = figures_of(TEXT.split("\n## What it saves\n")[1].split("\n## ")[0])
    assert len(figures) >= 5
    assert figures - figures_of(ALL_RESULTS) == set()


def test_the_points_of_the_picture() -> None:
    report = json.loads((RESULTS / "converged.json").read_text(encoding="utf-8"))
    dense, half = points_of(report, ["dense", "svite_50=half of the weights"])
    assert dense[:2] == ("dense", 1.0)
    assert half[0] == "half of the weights"
    rows = {row["entry"]: row for row in report["rows"]}
    assert half[1] == report["speeds"]["entries"]["svite_50"]["throughput_ratio"]
    assert half[2:] == (rows["svite_50"]["top1_mean"], rows["svite_50"]["top1_spread"])
    with pytest.raises(ValueError, match="svite_51 was not run and timed in this grid"):
        points_of(report, ["svite_51"])


@pytest.mark.parametrize("section", re.split(r"^## ", ALL_RESULTS, flags=re.MULTILINE)[1:], ids=lambda text: text[:20])
def test_the_figures_in_the_text_are_those_of_the_grids(section: str) -> None:
    reports = grids_of(section)
    if not reports:  # of the benchmarks
        assert "results/benchmarks" in section
        return
    figures = figures_of(section) - PUBLISHED
    assert figures - figures_of(reports) == set()
    assert len(figures) >= 5


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_report_is_what_its_figures_say(file: Path) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    if "pairs" in report:  # of a grid
        assert to_markdown(file.stem, report) == file.with_suffix(".md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "RESULTS.md", *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_pages_are_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_page_is_found_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\((docs/[^)#]+)", TEXT)}
    assert set(DOCS) <= linked
