"""The figure of a run: its panels and what their lines show, by hand on a run of two updates."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from experiments.errors import ConfigError
from experiments.inspection.compare import Comparison, add, overlap
from experiments.inspection.panels import kind_of, lanes_of, spread
from experiments.inspection.plot import draw, save
from experiments.inspection.run import Run, read_run
from sparse_trainer import BlockUpdate
from sparse_trainer.mask_log import write_record
from tests.test_inspect_run import LINES, WEIGHT, update_at, write_run

TOKENS = [
    {**line, "tokens/kept/1": 12.5, "eval/tokens_kept/1": 12.0, "budget/macs": 1e6 + line["step"]} for line in LINES
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run", TOKENS))


def panels(figure: Figure) -> dict[str, list[Axes]]:
    """Those with a title, by it."""
    found: dict[str, list[Axes]] = {}
    for axes in figure.axes:
        if axes.get_title(loc="left"):
            found.setdefault(axes.get_title(loc="left"), []).append(axes)
    return found


def lines_of(axes: Axes) -> dict[str, list[list[float]]]:
    """Points of the lines that have a label."""
    return {
        str(line.get_label()): np.asarray(line.get_xydata()).tolist()
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_panels_of_a_joint_run(run: Run) -> None:
    figure = draw([run])
    found = panels(figure)
    assert list(found) == [
        "Accuracy",
        "Loss",
        "Density by layer",
        "Churn of each update",
        "Exploration rate",
        "Patches kept",
        "Live heads",
    ]
    for title, label in (
        ("Accuracy", "top-1, %"),
        ("Density by layer", "live / weights of live units"),
        ("Churn of each update", "changed sides / live"),
        ("Exploration rate", "ever live / all"),
        ("Live heads", "block, a lane per head"),
    ):
        assert found[title][0].get_ylabel() == label
        assert found[title][0].get_xlim() == (0, 15)
    assert found["Live heads"][0].get_xlabel() == "optimizer step"
    (heading,) = [axes for axes in figure.axes if not axes.get_title(loc="left")]
    assert texts(heading) == ["run", "deit_quickstart, 5 of 10 prunable weights live, 15 of 20 steps, top-1 50.00 %"]


def test_the_lines_by_hand(run: Run) -> None:
    """Of 5 live weights 2 changed sides, of 2 heads 2, of 4 neurons 2; the first masks hold 4 of 10."""
    found = panels(draw([run]))
    assert lines_of(found["Churn of each update"][0]) == {
        "weights": [[4, 0.4], [8, 0.4]],
        "heads": [[4, 1.0], [8, 1.0]],
        "neurons": [[4, 0.5], [8, 0.5]],
        "2 x drop fraction": [[4, 0.5], [8, 0.5]],
    }
    assert sorted(texts(found["Exploration rate"][0])) == ["heads 100%", "neurons 62%", "weights 70%"]
    assert texts(found["Density by layer"][0]) == ["mlp.fc1"]
    (density,) = found["Density by layer"][0].lines
    assert np.asarray(density.get_xydata()).tolist() == [[0, 0.4], [4, 0.5], [8, 0.5], [15, 0.5]]
    assert density.get_drawstyle() == "steps-post"  # it holds until the next update
    assert texts(found["Patches kept"][0]) == ["before block 1: 12.0"]
    assert texts(found["Accuracy"][0]) == ["50.00"]
    assert sorted(texts(found["Loss"][0])) == ["evaluation 1.70", "training 1.00"]


def test_the_head_map_by_hand(run: Run) -> None:
    """Heads 0 and 1 until step 4, then 0 and 2, to the end of the run at 15."""
    axes = panels(draw([run]))["Live heads"][0]
    (mesh,) = [item for item in axes.collections if isinstance(item, QuadMesh)]
    assert np.asarray(mesh.get_array()).reshape(3, 3).tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 1]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 4, 8, 15]
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0"]
    assert lanes_of(run) == [("blocks.0", 0), ("blocks.0", 1), ("blocks.0", 2)]


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", LINES, ())
    assert list(panels(draw([read_run(dense)]))) == ["Accuracy", "Loss"]
    for step in (4, 8):  # weight masks alone
        write_record(dense.path, step, {}, {}, {}, update_at(step, blocks={}))
    weights = panels(draw([read_run(dense)]))
    assert list(weights) == ["Accuracy", "Loss", "Density by layer", "Churn of each update", "Exploration rate"]
    assert list(lines_of(weights["Churn of each update"][0])) == ["weights", "2 x drop fraction"]
    blocks = {"blocks.0": BlockUpdate((), (), (0,), (5,), (0, 1, 2), 3, 4, 8, 3, 5)}
    for step in (4, 8):  # neurons alone
        write_record(dense.path, step, {}, {}, {}, update_at(step, layers={}, blocks=blocks))
    neurons = panels(draw([read_run(dense)]))
    assert list(neurons) == ["Accuracy", "Loss", "Churn of each update", "Exploration rate"]
    assert list(lines_of(neurons["Churn of each update"][0])) == ["neurons", "2 x drop fraction"]


def test_macs_are_drawn_where_they_move(tmp_path: Path) -> None:
    lines = [{**line, "budget/macs": 2e6 - 1e5 * line["step"]} for line in LINES]
    axes = panels(draw([read_run(write_run(tmp_path / "run", lines))]))["MACs of one image"][0]
    assert axes.lines[0].get_ydata()[:4] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_two_runs_side_by_side_share_their_scales(run: Run, tmp_path: Path) -> None:
    lines = [{**line, **({"eval/top1": 90.0} if "eval/top1" in line else {})} for line in LINES]
    other = read_run(write_run(tmp_path / "other", lines, ()))
    found = panels(draw([run, other]))
    assert {title: len(axes) for title, axes in found.items()} == {
        "Accuracy": 2,
        "Loss": 2,
        "Density by layer": 1,
        "Churn of each update": 1,
        "Exploration rate": 1,
        "Patches kept": 1,
        "Live heads": 1,
    }
    left, right = found["Accuracy"]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 40
    assert left.get_ylim()[1] > 90
    # The name of a line stands where it ends on the scale that both have in the end.
    low, high = left.get_ylim()
    assert left.texts[0].xy[1] == pytest.approx((50 - low) / (high - low))
    assert [axes.get_xlabel() for axes in found["Loss"]] == ["", "optimizer step"]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_picture_is_what_its_name_says(suffix: str, start: bytes, run: Run, tmp_path: Path) -> None:
    assert save([run], tmp_path / f"x{suffix}")[0] == "Accuracy"
    content = (tmp_path / f"x{suffix}").read_bytes()
    assert content.startswith(start)
    assert len(content) > 10_000


def test_a_run_with_nothing_to_draw(tmp_path: Path) -> None:
    nothing = read_run(write_run(tmp_path / "run", LINES[:1], ()))
    with pytest.raises(ConfigError, match=r"run has recorded nothing yet that could be drawn"):
        save([nothing], tmp_path / "x.png")


def test_names_are_text_and_no_formulas(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / r"a$\frac$"))
    save([run], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (WEIGHT, "mlp.fc1"),
        ("blocks.11.attn.qkv.weight", "attn.qkv"),
        ("patch_embed.proj.weight", "patch_embed.proj"),
        ("head.weight", "head"),
        ("stages.0.blocks.3.mlp.fc2.weight", "blocks.3.mlp.fc2"),
    ],
)
def test_the_kind_of_a_layer(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_names_keep_apart() -> None:
    assert spread([0.2, 0.5, 0.9], 0.1) == [0.2, 0.5, 0.9]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([0.95, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    generator = np.random.default_rng(0)
    for count in range(1, 9):
        places = sorted(generator.random(count).tolist())
        found = spread(places, 0.1)
        assert all(second - first >= 0.1 - 1e-9 for first, second in itertools.pairwise(found))
        assert found[-1] <= 1


def test_what_two_runs_share_by_hand(run: Run, tmp_path: Path) -> None:
    """Live in the first 2 of 4 and in the second 2 of 4, one in both: a third of those in either; at random as many."""
    layers = {
        "blocks.0.mlp.fc1.weight": overlap(torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()),
        "head.weight": overlap(torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()),
    }
    found = cast(Comparison, SimpleNamespace(layers=layers, total=add(layers.values())))
    figure = draw([run, run], found)
    axes = figure.axes[-1]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1 / 3, 1])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["blocks.0.mlp.fc1", "head"]
    assert axes.get_title("right") == "all layers 60.0%, at random 33.3%"
    assert save([run, run], tmp_path / "two.png", found)[-1] == "Weights live in both runs"
    assert "Weights live in both runs" not in save([run], tmp_path / "one.png")
