from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmark import COMMANDS, Setting, Structure, calibrate, main, make_model, textured_images
from experiments.timing import Figure, paired, peak_memory, show

SMALL = ["--model", "deit_tiny_patch16_224", "--image_size", "32", "--patch_size", "8", "--batch_size", "2"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_runs_and_writes_its_figures(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert main([command, *SMALL, "--pairs", "1", "--amp", "float32", "--device", "cpu", "--json", str(file)]) == 0
    assert f"{command}: deit_tiny_patch16_224" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["settings"]["batch_size"] == 2
    assert content["machine"]["torch"] == torch.__version__
    for figure in content["figures"]:
        assert set(figure) == {"name", "value", "unit", "reference", "ratio", "ideal"}
        assert figure["value"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overhead", "--batch_size", "0"], "batch_size: 0 is not positive"),
        (["train", "--heads", "2"], "heads: 2.0 is not a share"),
        (["inference", "--amp", "int8"], "amp: 'int8' is not one of"),
        (["train", "--model", "deit_tinny_patch16_224"], "close names: deit_tiny_patch16_224"),
        (["overheat"], "overheat"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse-trainer benchmark: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_pairs_alternate() -> None:
    calls: list[str] = []
    paired(lambda: calls.append("a"), lambda: calls.append("b"), device=torch.device("cpu"), pairs=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]


def hold(megabytes: int) -> Any:
    def run() -> None:
        torch.ones(megabytes * 2**18).sum()

    return run


def test_peak_memory_sees_what_a_task_holds() -> None:
    device = torch.device("cpu")
    assert 150 < (peak_memory(hold, 200, device=device) - peak_memory(hold, 20, device=device)) / 2**20 < 210


def test_thresholds_are_calibrated_to_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(model="deit_tiny_patch16_224", image_size=64, patch_size=8, device="cpu")
    model = make_model(setting, {"kind": "threshold"}).eval()
    counts = calibrate(model, textured_images(16, 64, torch.device("cpu")), 0.7).float()
    reached = torch.tensor([64.0, *counts.mean(dim=0)[:2]])
    assert torch.allclose(counts.mean(dim=0) / reached, torch.tensor(0.7), atol=0.02)
    assert counts.std(dim=0).min() > 0
    show("title", [Figure("count", 12.0, "images", 6.0, 2.0, 2.5)], {"device": "x"})
    assert "12 images" in capsys.readouterr().out
    assert Structure().heads == 0.67
