"""``sparse-trainer inspect``: the table, the JSON, the picture, and its errors."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import experiments.inspection
from experiments.__main__ import commands, main
from experiments.config.reading import to_yaml
from experiments.evaluation.token_overlay import GAP, SIDE
from experiments.inspection import tables
from experiments.inspection.contents import read_contents
from experiments.inspection.tables import Column
from experiments.run_folder.folder import RunFolder
from sparse_trainer.files.checkpoint import read_info
from tests.test_losses import JOINT, THRESHOLD
from tests.test_training import configure, open_data, run, start


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: joint (top-k), adaptive (threshold), plain (no selector)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "joint": JOINT,
        "adaptive": {"sparsity": None, "selector": THRESHOLD},
        "plain": {},
    }
    for name, changes in kinds.items():
        loop = start(folder / name, changes, {"training": {"epochs": 1}})
        loop.folder.config.write_text(to_yaml(loop.trainer.config))
        run(loop)
    return folder


def read_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_a_command() -> None:
    assert "inspect" in commands()


def test_a_joint_checkpoint_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three heads of 8, 48 of 96 neurons, 8 of 16 patches; the width is 24."""
    report = read_json(capsys, runs / "joint")
    info = read_info(runs / "joint" / "sparse.safetensors")
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == ["patch_embed.proj", "blocks.0", "blocks.1", "head", "selector.scorers.0"]
    block = parts["blocks.0"]
    assert block["shapes"] == {
        "attn.qkv": [48, 24],
        "attn.proj": [24, 16],
        "mlp.fc1": [48, 24],
        "mlp.fc2": [24, 48],
    }
    assert (block["heads"], block["neurons"], block["tokens"]) == ([2, 3], [48, 96], 9)
    assert block["total"] == 4 * 24 * 24 + 2 * 24 * 96
    assert block["density"] == block["live"] / block["total"]
    assert block["macs"] == pytest.approx(9 * block["live"] + 2 * 9 * 9 * 16)
    prunable = [part for name, part in parts.items() if not name.startswith("selector")]
    assert sum(part["live"] for part in prunable) == report["live_parameters"] == info.budget.live
    assert sum(part["total"] for part in prunable) == report["total_parameters"] == info.budget.total
    assert sum(part["macs"] for part in parts.values()) == pytest.approx(report["macs"], abs=1)
    assert report["provenance"] == {"recipe": "test", "step": 10, "metrics": dict(info.metrics)}


def test_a_threshold_checkpoint_tells_the_measured_tokens(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_json(capsys, runs / "adaptive" / "sparse.safetensors")
    tokens = [part["tokens"] for part in report["parts"] if part["name"].startswith("blocks.")]
    assert tokens == [17, 1 + report["provenance"]["metrics"]["tokens_kept/1"]]
    assert tokens[1] < 17


def test_the_totals_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the dense network: its parameters, its MACs on 17 tokens, its bytes, and every layer's share."""
    report = read_json(capsys, runs / "joint" / "sparse.safetensors")
    width, prunable = 24, 24 * 49 + 2 * (4 * 24 * 24 + 2 * 24 * 96) + 10 * 24
    others = 24 + 18 * 24 + 2 * (4 * 24 + 72 + 24 + 96 + 24) + 2 * 24 + 10  # biases, norms, class token, positions
    assert report["kind"] == "checkpoint"
    assert report["run"] is None
    assert report["total_parameters"] == prunable
    assert report["counted_live_parameters"] == report["live_parameters"]
    assert report["parameters"]["dense"] == prunable + others
    assert report["dense_bytes"] == 4 * (prunable + others)
    dense_block = 17 * (4 * width**2 + 2 * width * 96) + 2 * 17**2 * width
    assert report["counted_macs"] == pytest.approx(report["macs"], abs=1)
    assert report["dense_macs"] == 16 * 24 * 49 + 2 * dense_block + 10 * 24
    block = next(part for part in report["parts"] if part["name"] == "blocks.0")
    assert block["dense_macs"] == dense_block
    assert block["compact_macs"] == 9 * (4 * width * 16 + 2 * width * 48) + 2 * 9**2 * 16
    layers = {layer["name"]: layer for layer in block["layers"]}
    assert list(layers) == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ]
    qkv = layers["blocks.0.attn.qkv.weight"]
    assert (qkv["shape"], qkv["dense_shape"], qkv["total"]) == ([48, 24], [72, 24], 72 * 24)
    assert qkv["macs"] == pytest.approx(9 * qkv["live"])
    assert qkv["density"] == qkv["live"] / (72 * 24)
    assert layers["blocks.0.attn"] == {
        "name": "blocks.0.attn",
        "shape": None,
        "dense_shape": None,
        "live": 0,
        "total": 0,
        "density": None,
        "macs": 2 * 9**2 * 16,
        "compact_macs": 2 * 9**2 * 16,
        "dense_macs": 2 * 17**2 * 24,
    }
    assert report["bytes"] == (runs / "joint" / "sparse.safetensors").stat().st_size
    assert report["dtypes"] == ["float32"]
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_finished_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_json(capsys, runs / "joint")
    run = report["run"]
    assert report["kind"] == "run"
    assert report["checkpoint"] == str(runs / "joint" / "sparse.safetensors")
    assert (run["finished"], run["step"], run["total_steps"], run["epochs"], run["notes"]) == (True, 10, 10, 1, [])
    assert run["score"] == "ema_top1"
    assert run["last"]["ema_top1"] == report["provenance"]["metrics"]["ema_top1"]
    assert run["last"]["step"] == run["best"]["step"] == 10
    assert run["updates"] == {"done": 4, "planned": 4, "last_step": 6}
    assert (run["dropped_steps"], run["checkpoint"]) == (0, "sparse.safetensors")


def test_the_tables(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sparse_units in (("joint", True), ("plain", False)):
        assert main(["inspect", str(runs / name)]) == 0
        out = capsys.readouterr().out
        for text in ("blocks.0.attn.qkv", "patch_embed.proj", "density", "MMACs", "recipe test, 10 steps"):
            assert text in out
        assert ("tokens" in out.split(": blocks")[1].split("MMACs")[0]) == sparse_units
        assert ("2 of 3" in out) == sparse_units
        assert "exactly the budget" in out
        assert "finished: 10 of 10 steps (1 epochs)" in out


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_table_is_wider_than_the_terminal_nor_folded(runs: Path, width: int) -> None:
    """As many columns as there is room for, and every layer on one line of its own."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    contents = read_contents(runs / "joint" / "sparse.safetensors")
    tables.print_contents(console, contents)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.startswith(" blocks.0.mlp.fc1")]
    assert len(rows) == 1
    fc1 = next(layer for layer in contents.layers if layer.name == "blocks.0.mlp.fc1.weight")
    assert f"{fc1.live:,}" in rows[0]
    assert ("48x24" in rows[0]) == (width > 60)
    assert ("96x24" in rows[0]) == (width > 80)


def test_a_table_gives_up_the_highest_rank_first() -> None:
    columns = [
        Column("name", ["a"], left=True),
        Column("x" * 9, ["1"], rank=1),
        Column("y" * 9, ["2"], rank=2),
        Column("z" * 9, [""], rank=1),
    ]
    for width, headings in ((40, ["name", "x" * 9, "y" * 9]), (20, ["name", "x" * 9]), (12, ["name"])):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        tables.print_columns(console, "", columns)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().split("─")[0].split() == headings


@pytest.mark.parametrize(("share", "text"), [(1.0, "█" * 12), (0.5, "█" * 6), (0.01, "▏"), (0.0, ""), (None, "")])
def test_a_bar(share: float | None, text: str) -> None:
    assert tables.bar(share) == text
    assert len(tables.bar(share, utf8=False)) == round(12 * (share or 0))


def test_a_resume_bundle_stands_for_its_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = RunFolder(runs / "joint").bundles()[0]
    assert read_json(capsys, bundle) == read_json(capsys, runs.resolve() / "joint")
    folder = tmp_path / "runs" / "x" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "config.yaml").write_text("{}")
    (folder / bundle.name).write_bytes(bundle.read_bytes()[:-1])
    assert main(["inspect", str(folder / bundle.name)]) == 2
    assert f"{folder / bundle.name}: is truncated" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before its first evaluation, in the middle of a line."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    shutil.copytree(runs / "joint" / "masks", folder.path / "masks")
    folder.config.write_bytes((runs / "joint" / "config.yaml").read_bytes())
    folder.metrics.write_text(
        '{"step": 3, "train/loss": 2.5, "train/epoch": 0.3, "train/bad_steps": 1}\n{"step": 6, "tr'
    )
    report = read_json(capsys, folder.path)
    assert report["checkpoint"] is None
    run = report["run"]
    assert (run["finished"], run["step"], run["total_steps"], run["dropped_steps"]) == (False, 6, 10, 1)
    assert (run["last"], run["best"], run["bundle"]) == (None, None, None)
    assert len(run["notes"]) == 1
    assert main(["inspect", str(folder.path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not finished: 6 of 10 steps (1 epochs), 60%; last written" in out
    assert "not evaluated yet" in out
    assert "the last line of metrics.jsonl is cut off" in out
    for option in (["--compare", str(runs / "joint")], ["--output", "x.png"]):
        assert main(["inspect", str(folder.path), *option]) == 2
        message = f"{option[0]}: {folder.path} has no sparse checkpoint yet; the first comes with its evaluation"
        assert message in capsys.readouterr().err


def test_two_runs_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs / "joint", runs / "plain"
    found = read_json(capsys, "--compare", a, b)
    assert found["kind"] == "comparison"
    assert found["a"]["checkpoint"] == str(a / "sparse.safetensors")
    assert found["b"]["top1"] == read_info(b / "sparse.safetensors").metrics["top1"]
    assert found["a"]["live_parameters"] == found["total"]["a"]
    assert found["total"]["total"] == found["a"]["total_parameters"]
    assert found == read_json(capsys, a, "--compare", b)
    for arguments in (["--compare", str(a), str(b)], [str(a), "--compare", str(b)]):
        assert main(["inspect", *arguments]) == 0
        out = capsys.readouterr().out
        for text in ("IoU", "heads in both", "B against A", "points", f"{found['total']['hamming']:,}"):
            assert text in out


def test_the_plot_of_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_json(capsys, runs / "joint", "--plot", tmp_path / "run.png")
    titles = ["Accuracy", "Loss", "Density by layer", "Churn of each update", "Exploration rate", "Patches kept"]
    assert found["panels"] == [*titles, "Live heads"]
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size[0] == 1760
    assert main(["inspect", str(runs / "plain"), "--plot", str(tmp_path / "run.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run.svg: {', '.join(titles[:5])}\n"


def test_the_picture_of_evaluation_images(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_json(capsys, runs / "adaptive", "--output", tmp_path / "overlay.png")
    assert (found["stages"], found["patches"], len(found["images"])) == ([1], 16, 10)
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.size == (GAP + 2 * (SIDE + GAP), GAP + 10 * (SIDE + GAP))


def test_the_picture_of_files_and_folders(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with the pixels of an evaluation image is seen as that image."""
    data = open_data(configure())
    images, targets = next(iter(data.eval.batches()))
    first = int((targets == 0).nonzero()[0])  # of class 0, as the first of the examples
    pixels = ((images[first, 0] * data.std[0] + data.mean[0]) * 255).round().to(torch.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels.numpy()).convert("RGB").resize((90, 60)).save(tmp_path / "b.jpg")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    files = [tmp_path / "images", tmp_path / "b.jpg"]
    found = read_json(capsys, runs / "adaptive", "--images", *files, "--output", tmp_path / "overlay.png")
    names = [image["image"] for image in found["images"]]
    assert names == [str(tmp_path / "images" / "a.png"), str(tmp_path / "b.jpg")]
    own = read_json(capsys, runs / "adaptive", "--output", tmp_path / "own.png")
    assert found["images"][0]["kept"] == own["images"][0]["kept"]
    with Image.open(tmp_path / "overlay.png") as drawn, Image.open(tmp_path / "own.png") as whole:
        size = (0, 0, drawn.width, GAP + SIDE)
        assert drawn.crop(size).tobytes() == whole.crop(size).tobytes()
    assert main(["inspect", str(runs / "joint"), "--output", str(tmp_path / "joint.png")]) == 0
    assert "the image itself, then what is left of its 16 patches before block 0" in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("hello")
    adaptive, output = str(runs / "adaptive"), f"--output={tmp_path / 'x.png'}"
    for arguments, message in (
        ([], "give a run folder such as runs/<name>, or a sparse checkpoint"),
        (["gone"], "there is no gone; give a run folder such as runs/<name>, or a sparse checkpoint"),
        ([str(tmp_path / "empty")], f"{tmp_path / 'empty'} is an empty folder; give a run folder"),
        ([str(tmp_path)], f"{tmp_path} is no run folder: it holds no config.yaml, metrics.jsonl, masks or "),
        ([str(runs)], f"{runs} holds runs but is none; give one of them: {runs}/adaptive, {runs}/joint, {runs}/plain"),
        ([str(runs / "joint" / "config.yaml")], f"{runs / 'joint' / 'config.yaml'}: is truncated or no safetensors"),
        (["--compare", adaptive], "--compare: takes two runs or checkpoints, 1 given"),
        ([adaptive, "--compare", adaptive, adaptive], "--compare: takes two runs or checkpoints, 3 given"),
        ([adaptive, "--compare", adaptive, output], "--output: goes without --compare; ask for one at a time"),
        ([adaptive, "--plot=x.png", output], "--output: goes without --plot; ask for one at a time"),
        ([adaptive, "--plot=x.txt"], "--plot: x.txt is no name of a picture; end it in .png, .svg, .pdf"),
        ([adaptive, f"--plot={tmp_path}/gone/x.png"], f"--plot: cannot write {tmp_path}/gone/x.png: "),
        ([f"{adaptive}/sparse.safetensors", "--plot=x.png"], f"--plot: {adaptive}/sparse.safetensors is a checkpoint"),
        ([str(tmp_path / "text.png")], f"{tmp_path / 'text.png'}: is truncated or no safetensors file"),
        ([adaptive, "--images", "x.png"], "--images: needs --output, the picture to write, such as overlay.png"),
        ([adaptive, "--images", "gone.png", output], "--images: there is no gone.png"),
        ([adaptive, "--images", str(tmp_path / "empty"), output], f"--images: {tmp_path / 'empty'} holds no images"),
        ([adaptive, "--images", str(tmp_path / "text.png"), output], f"--images: {tmp_path / 'text.png'} cannot be "),
        ([adaptive, "--output=overlay"], "--output: overlay is no name of a picture; end it in .png"),
        ([adaptive, f"--output={tmp_path}/gone/x.png"], f"--output: cannot write {tmp_path}/gone/x.png: "),
        ([str(runs / "plain"), output], "--output: "),
        ([adaptive, "--ouput=x.png"], "ouput: unknown key; did you mean output?"),
    ):
        assert main(["inspect", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"sparse-trainer inspect: error: {message}")


def test_a_missing_matplotlib_is_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib" or name.startswith(("experiments.inspection.p",)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(experiments.inspection, "plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(runs / "plain"), "--plot=x.png"]) == 2
    expected = "sparse-trainer inspect: error: --plot: needs matplotlib: pip install 'sparse-trainer[plot]'\n"
    assert capsys.readouterr().err == expected
