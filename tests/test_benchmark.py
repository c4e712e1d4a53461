"""``sparse-trainer benchmark``: figures by hand from given times, and every sub-command in its smallest form."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import report as report_module
from experiments.benchmarks import setting as setting_module
from experiments.benchmarks import train as train_module
from experiments.benchmarks.images import image_files, sample, spread_out
from experiments.benchmarks.inference import calibrate
from experiments.benchmarks.kernels import (
    Kernels,
    KernelTime,
    benchmark_kernels,
    draw_weight,
    ours,
    scipy_csr,
    show_kernels,
    torch_bsr,
    torch_csr,
)
from experiments.benchmarks.overhead import macs_of_passes
from experiments.benchmarks.patterns import Patterns, benchmark_patterns
from experiments.benchmarks.report import Report, Row, create_dense, latency_rows, size_rows, throughput_row
from experiments.benchmarks.report_page import cells, print_report, to_html, write_page
from experiments.benchmarks.save import read_plain, save_flushed
from experiments.benchmarks.setting import Setting, Structure, macs_of, make_model, make_small, textured_images
from experiments.benchmarks.timing import (
    Figure,
    alternate,
    paired,
    peak_memory,
    percentiles_of,
    show,
    spread,
    summarize,
    use_threads,
)
from experiments.commands import benchmark
from experiments.commands.benchmark import COMMANDS, choose, main
from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo, save_sparse
from sparse_trainer.flops import Count, block_macs, count
from sparse_trainer.kernels.library import load_library

CPU = torch.device("cpu")
SMALL = ["--model=deit_tiny_patch16_224", "--image_size=32", "--patch_size=8", "--pairs=1"]
FIGURES = ("overhead", "train", "teacher", "inference", "data", "save", "onnx")
SETTINGS = {"batch_size": 2, "pairs": 1, "image_size": 32, "patch_size": 8, "model": "deit_tiny_patch16_224"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a benchmark that works prints."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a benchmark that cannot be run says, without its beginning."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("sparse-trainer benchmark: error: ")
    return error.removeprefix("sparse-trainer benchmark: error: ").strip()


@pytest.mark.parametrize("command", FIGURES)
def test_every_benchmark_runs_and_writes_its_figures(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    arguments, settings, title = [*SMALL, "--batch_size=2", f"--json={file}"], dict(SETTINGS), "deit_tiny_patch16_224"
    if command == "data":  # which trains no model
        arguments, title = ["--pairs=1", "--batch_size=2", "--device=cpu", f"--json={file}"], "batch 2"
        settings = {"batch_size": 2, "pairs": 1}
    elif command == "onnx":  # the exporter takes seconds per block
        monkeypatch.setattr(setting_module, "create_model", partial(create_model, depth=1))
    else:
        arguments += ["--amp=float32", "--device=cpu", *(["--compiled=false"] if command == "teacher" else [])]
    assert f"{command}: {title}" in run(capsys, command, *arguments)
    content = json.loads(file.read_text())
    assert settings.items() <= content["settings"].items()
    assert content["machine"]["torch"] == torch.__version__
    for figure in content["figures"]:
        assert set(figure) == {"name", "value", "unit", "reference", "ratio", "ideal"}
        assert figure["value"] > 0 or "difference" in figure["name"]
    figures = {figure["name"]: figure for figure in content["figures"]}
    if command == "teacher":
        ways = ("with a graph, float32", "in inference mode, float32", "in inference mode, bfloat16")
        assert [*figures][:-1] == [f"teacher {way}" for way in ways]
        assert 0 < figures["greatest change of a probability by bfloat16"]["value"] < 0.01
    if command == "save":
        assert figures["file, float32"]["value"] < 0.54 * figures["file, float32"]["reference"]
        assert figures["pause by saving it, beside a training step"]["ideal"] == 1


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    text, gone = tmp_path / "text.safetensors", tmp_path / "gone"
    for arguments, message in (
        (["overhead", "--batch_size", "0"], "batch_size: 0 is not positive"),
        (["overhead", "--density", "0"], "density: 0.0 is not a share in (0, 1]"),
        (["train", "--heads", "2"], "heads: 2.0 is not a share in (0, 1]"),
        (["train", "--neurons", "0.0001"], "model: neuron_density: 0.0001 of 1536 neurons leaves none"),
        (["train", "--threads", "0"], "threads: 0 is not positive"),
        (["train", "--pairs", "many"], "--pairs: 'many' is not a whole number"),
        (["train", "--pair", "1"], "pair: unknown key; did you mean pairs?"),
        (["inference", "--amp", "int8"], "amp: 'int8' is not one of float32, bfloat16, float16"),
        (["train", "--model", "deit_tinny_patch16_224"], "model: unknown model name 'deit_tinny_patch16_224'; close "),
        (["train", "--model", "resnet18"], "model: resnet18 takes no image and patch size; give a ViT of timm"),
        (["train", "--patch-size", "5"], "model: patch_size (5, 5) does not divide img_size (32, 32); choose sizes"),
        (["data", "--batch-size", "4000"], "batch_size: 4000 is more than the 2,000 images that are written to files"),
        (["overheat"], "'overheat' is neither a benchmark nor a checkpoint; did you mean overhead?"),
        (["--pairs", "1"], "give a checkpoint, or one of report, overhead, "),
        ([], "give a checkpoint, or one of report, overhead, "),
        (["report"], "give a sparse checkpoint, such as runs/<name>/sparse.safetensors"),
        ([gone / "x.safetensors"], f"checkpoint: there is no {gone}/x.safetensors; give the folder of a finished run"),
        ([tmp_path], f"checkpoint: {tmp_path} holds no sparse.safetensors; "),
        ([text], f"{text}: is truncated or no safetensors file"),
        ([text, "--calls", "0"], "calls: 0 is not positive"),
        ([text, "--output", "report.pdf"], "output: report.pdf is neither a page nor a picture; end it in .html or "),
        ([text, f"--output={gone}/report.html"], f"output: there is no folder {gone}; make it, or choose another "),
        (["data", f"--json={gone}/figures.json"], f"json: there is no folder {gone}; make it, or choose another "),
        (["data", f"--json={tmp_path}"], f"json: {tmp_path} is a folder; give the name of a file"),
        (["kernels", "--sparsities", "0.5", "1"], "sparsities: 1.0 is not in (0, 1)"),
        (["kernels", "--batches", "0", "--block", "0"], "batches: 0 is not positive; block: 0 is not positive"),
        (["kernels", *SMALL, "--block", "5"], "block: 5 does not divide fc1, 768 x 192; 192 and what divides it does"),
        (["kernels", "--amp", "bfloat16"], "amp: unknown key; there are "),
        (["save", f"--folder={gone}"], f"folder: there is no folder {gone}"),
    ):
        assert fail(capsys, *arguments).startswith(message)


def test_a_place_that_cannot_be_written_is_found_before_the_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    for name, command in COMMANDS.items():
        never = dataclasses.replace(command, measure=lambda *_, name=name: measured.append(name))
        monkeypatch.setitem(COMMANDS, name, never)
        fail(capsys, name, f"--json={tmp_path}/gone/figures.json")
    assert measured == []


def test_missing_extras_say_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.benchmarks.report_page.find_spec", lambda name: None)
    monkeypatch.setattr("experiments.exports.onnx.find_spec", lambda name: None)
    message = fail(capsys, "report", "x.safetensors", "--output=report.png")
    assert message.startswith("output: a .png needs matplotlib: pip install 'sparse-trainer[plot]'")
    assert fail(capsys, "onnx").startswith("onnx needs onnx, onnxruntime, onnxscript: pip install")


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--help")
    assert all(f"\n  {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert "--pairs" in capsys.readouterr().out


def test_help_says_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for command in COMMANDS.values():
        summary = " ".join((command.measure.__doc__ or "").partition("\n\n")[0].split())
        assert summary.endswith(".")
        assert summary in words


def test_a_path_means_the_report_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert choose(["run", "--pairs=1"]) == ("report", ["run", "--pairs=1"])
    assert choose(["runs/gone"])[0] == "report"
    assert choose(["gone.safetensors"])[0] == "report"
    assert choose(["report", "run"]) == ("report", ["run"])
    assert choose(["train", "--pairs=1"]) == ("train", ["--pairs=1"])


# Times that are given.


def test_the_middle_of_numbers_by_hand() -> None:
    assert spread([5.0]) == report_module.Spread(5.0, 5.0, 5.0)
    assert spread([4.0, 1.0, 3.0, 2.0, 100.0]) == report_module.Spread(3.0, 2.0, 4.0)
    assert spread([1.0, 2.0]) == report_module.Spread(1.5, 1.25, 1.75)
    assert percentiles_of([float(n) for n in range(101)]) == {50: 50.0, 90: 90.0, 99: 99.0}
    assert percentiles_of([3.0, 1.0, 2.0]) == {50: 2.0, 90: 3.0, 99: 3.0}


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_the_median_lies_between_the_quartiles(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.median == pytest.approx(statistics.median(values))


def test_the_ratio_is_that_of_the_pairs() -> None:
    """The machine is ten times slower during the last pair; the ratio of the pairs does not see it."""
    found = summarize([(1.0, 2.0), (2.0, 4.0), (10.0, 20.0)])
    assert (found.first, found.second, found.ratio) == (2.0, 4.0, 2.0)
    found = summarize([(1.0, 1.0), (1.0, 2.0), (4.0, 12.0), (1.0, 4.0), (1.0, 5.0)])
    assert (found.first, found.second) == (1.0, 4.0)  # whose ratio would be 4
    assert (found.ratio, found.ratios.low, found.ratios.high) == (3.0, 2.0, 4.0)


def test_pairs_alternate() -> None:
    calls: list[str] = []
    paired(lambda: calls.append("a"), lambda: calls.append("b"), device=CPU, pairs=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    calls.clear()
    rounds = alternate(*(partial(calls.append, name) for name in "abc"), device=CPU, pairs=2)
    assert calls == ["a", "b", "c", "c", "b", "a"]
    assert [len(found) for found in rounds] == [3, 3]
    calls.clear()
    paired(lambda: calls.append("a"), lambda: calls.append("b"), device=CPU, pairs=1, warmup=0, each=2)
    assert calls == ["a", "a", "b", "b"]


def test_times_stay_with_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of a round, and however many calls are timed at once."""
    now = [0.0]
    monkeypatch.setattr("experiments.benchmarks.timing.time.perf_counter", lambda: now[0])

    def takes(seconds: float) -> Callable[[], None]:
        def work() -> None:
            now[0] += seconds

        return work

    assert alternate(takes(1.0), takes(2.0), takes(4.0), device=CPU, pairs=3) == [(1.0, 2.0, 4.0)] * 3
    monkeypatch.setattr("experiments.benchmarks.timing.time.sleep", lambda seconds: takes(seconds)())
    # What is short runs until the processor is awake: 3 times 0.01 seconds, each time; what is long only at first.
    calls: list[str] = []

    def short() -> None:
        calls.append("short")
        takes(0.011)()

    def long() -> None:
        calls.append("long")
        takes(1.0)()

    rounds = alternate(short, long, device=CPU, pairs=2, rest=0.2)
    assert [round(seconds, 6) for seconds, _ in rounds] == [0.011, 0.011]
    assert [round(seconds, 6) for _, seconds in rounds] == [1.0, 1.0]
    assert calls == ["short"] * 4 + ["long"] * 2 + ["long"] + ["short"] * 4
    found = paired(takes(1.0), takes(3.0), device=CPU, pairs=3, each=7)
    assert (found.first, found.second, found.ratio) == (1.0, 3.0, 3.0)


def test_rows_from_given_times_by_hand() -> None:
    """At half of the MACs: batches of 8 in 4 s dense and 2.5 s sparse, single images in 2 and 3 ms."""
    row = throughput_row([(4.0, 2.0), (4.0, 2.5), (4.0, 4.0)], 8, 0.5)
    assert (row.dense, row.sparse, row.ratio, row.ideal) == (2.0, 3.2, 1.6, 2.0)
    assert row.quartiles == pytest.approx((1.3, 1.8))
    assert row.of_ideal == pytest.approx(0.8)
    median, ninetieth, last = latency_rows([(0.002, 0.003)] * 9 + [(0.004, 0.008)] * 2, 0.5)
    assert (median.dense, median.sparse, median.ratio) == pytest.approx((2.0, 3.0, 1.5))
    assert median.of_ideal == pytest.approx(1 / 3)
    assert (ninetieth.name, last.name) == ("latency, batch 1, p90", "latency, batch 1, p99")
    assert (last.dense, last.sparse, last.ratio, last.quartiles) == pytest.approx((4.0, 8.0, 2.0, None))


def test_sizes_by_hand() -> None:
    """A file at its ideal would hold a quarter; a 25 % longer one gets 80 % of that."""
    dense, sparse = Count(8e6, 8e6, 4_000_000, 4_000_000), Count(6e6, 2e6, 3_000_000, 1_000_000)
    rows = {row.name: row for row in size_rows(sparse, dense, 5_000_000, 16_000_000)}
    assert {name: row.ratio for name, row in rows.items()} == {
        "MACs of an image": 0.75,
        "MACs, live weights only": 0.25,
        "parameters": 0.75,
        "live parameters": 0.25,
        "file": 0.3125,
    }
    assert (rows["file"].ideal, rows["file"].of_ideal) == (0.25, pytest.approx(0.8))
    assert rows["parameters"].of_ideal is None


def test_the_ideal_of_units_and_tokens_by_hand() -> None:
    """Two of three heads of 64, 460 of 768 neurons; 11 of 16 patches and the class token at the width 192."""
    setting = Setting(model="deit_tiny_patch16_224", image_size=32, patch_size=8, device="cpu")
    structure = Structure(heads=0.67, neurons=0.6, tokens=0.7)
    small = make_small(setting, structure, structure.top_k)
    around = 16 * 3 * 64 * 192 + 192 * 10 + 16 * 192  # patch embedding, classifier, scores of the selector
    neurons = 456  # of 768, in eights
    assert macs_of(small, structure) == 12 * block_macs(12, 192, 2, 64, neurons) + around
    assert count(make_model(setting)).macs == 12 * block_macs(17, 192, 3, 64, 768) + around - 16 * 192


def hold(megabytes: int) -> Any:
    def run() -> None:
        torch.ones(megabytes * 2**18).sum()

    return run


def hold_at_first(megabytes: int) -> Any:
    """Needs memory only to be made."""
    torch.ones(megabytes * 2**18).sum()
    return lambda: None


@pytest.mark.parametrize("of_weights", [True, False])
def test_macs_of_both_passes_are_those_that_torch_counts(of_weights: bool) -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=3, depth=2)
    assert isinstance(model, nn.Module)
    for parameter in model.parameters():
        parameter.requires_grad_(of_weights)
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert 2 * macs_of_passes(model, of_weights=of_weights) == counter.get_total_flops()


def test_peak_memory_sees_what_a_task_holds() -> None:
    assert 190 < peak_memory(hold, 200, device=CPU) / 2**20 < 250
    assert peak_memory(hold_at_first, 200, device=CPU) < 100 * 2**20


def test_threads_are_given_back() -> None:
    def count_and_fail() -> None:
        raise ValueError(torch.get_num_threads())

    with pytest.raises(ValueError, match="2"), use_threads(2):
        count_and_fail()
    with use_threads(None):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


def test_training_with_thresholds_is_timed_alone_and_with_a_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "peak_memory", lambda task, *arguments, device: (task(*arguments)(), 2**20)[1])
    file = tmp_path / "figures.json"
    given = [*SMALL, "--batch_size=4", "--amp=float32", "--device=cpu", "--selector=threshold", "--heads=1"]
    run(capsys, "train", *given, "--neurons=1", "--tokens=0.5", f"--json={file}")
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    share = figures["MACs of one image"]["ratio"]
    # Of 16 patches a half, a quarter and an eighth before blocks 4, 7 and 10 of 12.
    assert 0.5 < share < 0.7
    assert figures["training step"]["ideal"] == share
    assert figures["training step with a teacher"]["ideal"] == pytest.approx(share + 1 / 3)
    assert figures["peak memory with a teacher"]["value"] == 1
    assert fail(capsys, "train", *given).startswith("tokens: 1.0 keeps all patches")


def test_thresholds_are_calibrated_to_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(model="deit_tiny_patch16_224", image_size=64, patch_size=8, device="cpu")
    model = make_model(setting, {"kind": "threshold"}).eval()
    counts = calibrate(model, textured_images(16, 64, CPU), 0.7).counts.float()
    reached = torch.tensor([64.0, *counts.mean(dim=0)[:2]])
    assert torch.allclose(counts.mean(dim=0) / reached, torch.tensor(0.7), atol=0.02)
    assert counts.std(dim=0).min() > 0
    show("title", [Figure("count", 12.0, "images", 6.0, 2.0, 2.5)], {"device": "x"})
    assert "12 images" in capsys.readouterr().out
    assert Structure().heads == 0.67


# Kernels.


def test_sparse_kernels_compute_the_dense_product() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(32, 7, generator=generator)
    single, blocks = (draw_weight(48, 32, 0.75, block, generator) for block in (1, 16))
    for product in (scipy_csr(single, columns), torch_csr(single, columns)):
        assert torch.allclose(product(), single @ columns, atol=1e-5)
    assert torch.allclose(torch_bsr(blocks, columns, 16)(), blocks @ columns, atol=1e-5)
    assert int(single.count_nonzero()) == 48 * 32 // 4
    live = blocks.view(3, 16, 2, 16).ne(0).sum(dim=(1, 3))
    assert sorted(live.flatten().tolist()) == [0, 0, 0, 0, 256, 256]  # round(1.5) of six blocks


def test_the_table_of_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.benchmarks.kernels.LEAST_SECONDS", 0.0)
    file = tmp_path / "kernels.json"
    out = run(capsys, "kernels", *SMALL, "--batches=1", "--sparsities", 0.5, 0.9, f"--json={file}")
    for text in ("fc1 768x192", "fc2 192x768", "proj 192x192", "qkv 576x192", "torch BSR 16", "faster than dense"):
        assert text in out
    times = json.loads(file.read_text())["kernels"]
    assert len(times) == 4 * 2 * 5
    assert {time["rows"] for time in times} == {17}
    csr = [time for time in times if time["kernel"] == "scipy CSR"]
    assert [time["ideal"] for time in csr] == pytest.approx([2.0, 10.0] * 4, rel=1e-3)


def test_our_kernels_compute_the_dense_product() -> None:
    library = load_library()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 32, generator=generator)
    weight = draw_weight(48, 32, 0.75, 16, generator, 1)
    assert torch.equal((weight.view(3, 16, 32) != 0).all(dim=1), (weight.view(3, 16, 32) != 0).any(dim=1))
    for height in (16, 1):
        assert torch.allclose(ours(weight, rows, library, height)(), weight @ rows.T, atol=1e-5)


def test_patterns_beside_dense_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole network: masks, units, tokens, with two dense twins in the same run."""
    file = tmp_path / "patterns.json"
    arguments = ["--patterns", "16x1", "1x1", "--densities", "0.5", "--batches", "2", "1", "--kernels=sparse"]
    smaller = ["--heads=0.67", "--neurons=0.5", "--tokens=0.7"]
    out = run(capsys, "patterns", *SMALL, *smaller, *arguments, f"--json={file}")
    assert "16x1 at 0.5, batch 2: over dense onnxruntime" in " ".join(out.split())
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert len(figures) == 2 * (2 * 2 + 1)
    found = figures["1x1 at 0.5, batch 1: over dense PyTorch"]
    assert found["ideal"] > 1 / (0.5 * 0.7)  # half of the weights of fewer heads and neurons, and fewer tokens
    plain = benchmark_patterns(
        Setting(model="deit_tiny_patch16_224", image_size=32, patch_size=8, device="cpu", amp="float32", pairs=1),
        Patterns(patterns=("1x1",), densities=(0.25,), batches=(1,)),
        Structure(heads=1.0, neurons=1.0),
    )
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10)
    config = SparsityConfig(density=0.25, updates=0)
    masks = SparsityScheduler(model, config, total_steps=1).masks
    live = count(model, masks)
    assert plain[0].ideal == pytest.approx(live.macs / live.live_macs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--densities", "0"], "densities: 0.0 is not in (0, 1]"),
        (["--patterns", "3y1"], "patterns: '3y1' is no pattern; such as 1x1"),
        (["--kernels", "quick"], "kernels: 'quick' is not one of auto, dense, sparse"),
        (["--tokens", "0"], "tokens: 0.0 is not a share in (0, 1]"),
        (["--patterns", "2:4", "--densities", "0.2"], "give density=0.5"),
    ],
)
def test_patterns_that_cannot_be(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in fail(capsys, "patterns", *SMALL, *arguments)


@pytest.mark.parametrize("width", [80, 110])
def test_how_often_a_kernel_wins_by_hand(width: int) -> None:
    speeds = {"fc1": (0.5, 1.5), "fc2": (0.9, 2.5), "qkv": (1.1, 0.7)}
    times = [
        KernelTime(layer, 1536, 384, 3152, kernel, sparsity, 1 / speed, 1.0, speed, 1 / (1 - sparsity))
        for kernel, factor in (("scipy CSR", 1.0), ("torch BSR 16", 0.1))
        for layer, found in speeds.items()
        for sparsity, speed in zip((0.5, 0.9), (factor * value for value in found), strict=True)
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    show_kernels(console, "kernels", times, Kernels(sparsities=(0.5, 0.9)), {"threads": 1})
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "scipy CSR 1 of 3 2 of 3" in lines
    assert "torch BSR 16 0 of 3 0 of 3" in lines
    assert "fc2 1536x384 3,152 1000.00 ms scipy CSR 0.90 2.50" in lines
    assert "At best it is 2, 10." in " ".join(text.split())


def test_a_kernel_that_takes_twice_as_long_has_half_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.benchmarks.kernels.paired", lambda *_, **__: summarize([(1.0, 2.0)]))
    setting = Setting(model="deit_tiny_patch16_224", image_size=32, patch_size=8, device="cpu")
    times = benchmark_kernels(setting, Kernels(sparsities=(0.75,), batches=(2,)))
    assert {(time.speed, time.seconds, time.dense_seconds, time.rows) for time in times} == {(0.5, 2.0, 1.0, 34)}
    assert [time.ideal for time in times] == pytest.approx([4.0] * 20)


def test_flushed_files_are_the_same_files(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0).view(2, 3)}
    save_file(state, tmp_path / "plain.safetensors")
    save_flushed(state, tmp_path / "flushed.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "flushed.safetensors").read_bytes()
    assert torch.equal(read_plain(tmp_path / "flushed.safetensors")["w"], state["w"])


# The report.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three heads of 8, 48 of 96 neurons, half of the weights, patches kept by a threshold; for 28 pixels."""
    torch.manual_seed(0)
    selector = {"kind": "threshold", "stages": [1], "thresholds": [1 / 197]}
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}
    arguments = {**size, "num_classes": 10}
    model = create_model("deit_tiny_patch16_224", selector=selector, **arguments)
    config = SparsityConfig(density=0.4, head_density=2 / 3, neuron_density=0.5, update_every=10)
    scheduler = SparsityScheduler(model, config, total_steps=100)
    path = tmp_path_factory.mktemp("checkpoint") / "sparse.safetensors"
    save_sparse(
        path,
        model,
        masks=scheduler.masks,
        live_heads=scheduler.live_heads,
        live_neurons=scheduler.live_neurons,
        create_model=create_model,
        info=SparseInfo(
            model="deit_tiny_patch16_224",
            model_args=arguments,
            selector=selector,
            budget=scheduler.budget,
            macs=1,
            image_size=28,
            in_chans=1,
            mean=(0.3,),
            std=(0.3,),
            metrics={"top1": 12.5},
        ),
    )
    return path


ROWS = (
    "MACs of an image (M)",
    "MACs, live weights only (M)",
    "parameters (M)",
    "live parameters (M)",
    "file (MB)",
    "throughput, batch 6 (images/s)",
    "latency, batch 1, p50 (ms)",
    "latency, batch 1, p90 (ms)",
    "latency, batch 1, p99 (ms)",
    "peak memory, batch 6 (MiB)",
)
TINY = ["--batch_size=6", "--pairs=2", "--calls=3", "--device=cpu"]


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in processes that take seconds to start."""
    monkeypatch.setattr(report_module, "peak_memory", lambda task, *arguments, device: (task(*arguments)(), 2**20)[1])


def test_a_report(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever needs no clock is what can be counted by hand."""
    out = run(capsys, checkpoint, *TINY, f"--json={tmp_path}/r.json", f"--output={tmp_path}/r.html")
    for name in ROWS:
        assert name in out
    assert f"written to {tmp_path}/r.html" in " ".join(out.split())
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["settings"]["batch_size"] == 6
    assert content["facts"]["heads of a block"] == "2 of 3"
    assert content["facts"]["neurons of a block"] == "48 of 96"
    assert content["facts"]["top-1, when it was saved"] == "12.50 %"
    assert content["facts"]["images"] == "6 of fashion-mnist-10k (validation)"
    rows = {f"{row['name']} ({row['unit']})": row for row in content["rows"]}
    assert tuple(rows) == ROWS
    images, _ = sample(None, checkpoint, report_module.read_info(checkpoint), 6)
    model: Any = report_module.load_sparse(checkpoint, create_model=create_model)
    with torch.inference_mode():
        kept = model(images, return_selection=True)[1].counts[:, 0].tolist()
    assert min(kept) < max(kept), "all images alike prove little"
    around = 16 * 49 * 24 + 24 * 10
    each = [block_macs(17, 24, 2, 8, 48) + block_macs(1 + patches, 24, 2, 8, 48) + around for patches in kept]
    dense = 2 * block_macs(17, 24, 3, 8, 96) + around
    macs, throughput = rows["MACs of an image (M)"], rows["throughput, batch 6 (images/s)"]
    assert macs["sparse"] == pytest.approx(sum(each) / 6 / 1e6)
    assert macs["dense"] == pytest.approx(dense / 1e6)
    assert throughput["ideal"] == pytest.approx(dense / (sum(each) / 6))
    assert throughput["of_ideal"] == pytest.approx(throughput["ratio"] / throughput["ideal"])
    assert rows["latency, batch 1, p90 (ms)"]["ideal"] == pytest.approx(macs["ratio"])
    assert rows["file (MB)"]["sparse"] == checkpoint.stat().st_size / 1e6
    parameters = sum(parameter.numel() for parameter in create_dense(report_module.read_info(checkpoint)).parameters())
    assert rows["parameters (M)"]["dense"] == parameters / 1e6
    assert parameters * 4e-6 < rows["file (MB)"]["dense"] < parameters * 4e-6 + 0.01
    memory = rows["peak memory, batch 6 (MiB)"]
    assert 0 < memory["dense"] < 200
    assert 0 < memory["sparse"] < 200


def test_a_report_with_kernels(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_memory: None
) -> None:
    """The kernels that skip dead weights, whose ideal counts live weights alone, beside two dense twins."""
    out = run(capsys, checkpoint, *TINY, "--kernels=sparse", f"--json={tmp_path}/r.json")
    assert "kernels" in out
    content = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    macs = rows["MACs, live weights only"]
    assert rows["throughput, batch 6"]["ideal"] == pytest.approx(macs["dense"] / macs["sparse"])
    assert rows["throughput, batch 6, dense in onnxruntime"]["ratio"] > 0
    assert content["facts"]["kernels"].startswith("1x1: ")
    message = fail(capsys, checkpoint, "--kernels=quick")
    assert message == "kernels: 'quick' is not one of auto, dense, sparse"


def test_both_see_the_same_images_one_by_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, no_memory: None
) -> None:
    """Single images take turns, and the pair of a latency is of one image."""
    seen: list[tuple[str, int, float]] = []

    def watch(model: Any, setting: Setting) -> Any:
        name = "sparse" if hasattr(model, "selector") else "dense"
        run = setting_module.classifier(model, setting)

        def watched(images: torch.Tensor, **options: Any) -> Any:
            seen.append((name, len(images), float(images.sum())))
            return run(images, **options)

        return watched

    counted: dict[str, int] = {}

    def batches(times: list[Any], *arguments: Any) -> Row:
        counted["batches"] = len(times)
        return throughput_row(times, *arguments)

    def images_alone(times: list[Any], *arguments: Any) -> list[Row]:
        counted["images"] = len(times)
        return latency_rows(times, *arguments)

    monkeypatch.setattr(report_module, "throughput_row", batches)
    monkeypatch.setattr(report_module, "latency_rows", images_alone)
    monkeypatch.setattr(report_module, "classifier", watch)
    setting = Setting(batch_size=3, pairs=1, amp="float32", device="cpu")
    report_module.measure_report(setting, report_module.ReportOptions(checkpoint=str(checkpoint), calls=4))
    singles = [(name, total) for name, images, total in seen if images == 1]
    assert len(singles) == 2 * (3 + 4)  # every image once to warm up
    assert counted == {"batches": 1, "images": 4}
    dense, sparse = ([total for name, total in singles if name == kind] for kind in ("dense", "sparse"))
    assert dense == sparse
    assert len(set(dense)) == 3
    assert [name for name, _ in singles[:4]] == ["dense", "sparse", "sparse", "dense"]


def test_images_of_ones_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_memory: None
) -> None:
    for number in range(4):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.new("L", (40, 30), 60 * number).save(tmp_path / str(number % 2) / f"{number}.png")
    info = report_module.read_info(checkpoint)
    images, text = sample([str(tmp_path)], checkpoint, info, 2)
    assert (tuple(images.shape), text) == ((2, 1, 28, 28), f"2 of {tmp_path}")
    levels = (images[:, 0, 14, 14] * 0.3 + 0.3) * 255
    assert levels.tolist() == pytest.approx([0, 60], abs=0.01)  # the first of each folder
    images, text = sample([str(tmp_path)], checkpoint, info, 5)
    assert text == f"4 of {tmp_path}, again and again"
    assert torch.equal(images[0], images[4])
    single = str(tmp_path / "0" / "0.png")
    assert image_files([single, str(tmp_path / "1")]) == [single, f"{tmp_path}/1/1.png", f"{tmp_path}/1/3.png"]
    out = run(capsys, "report", checkpoint, *TINY, "--images", single, tmp_path / "1")
    assert "3 of" in out
    (tmp_path / "empty").mkdir()
    message = fail(capsys, checkpoint, "--device=cpu", "--images", tmp_path / "empty")
    assert message == f"--images: {tmp_path}/empty holds no images"
    assert fail(capsys, checkpoint, "--device=cpu", "--images", "gone.png") == "--images: there is no gone.png"


@given(st.integers(1, 500), st.integers(1, 300))
def test_chosen_images_are_spread_out(there: int, wanted: int) -> None:
    places = spread_out(there, wanted)
    assert len(places) == wanted
    assert set(places) <= set(range(there))
    assert len(set(places)) == min(there, wanted)
    if there >= wanted:
        distances = [b - a for a, b in pairwise(places)]
        assert not distances or max(distances) - min(distances) <= 1


def test_the_data_of_the_training_is_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "sparse.safetensors"
    moved.write_bytes(checkpoint.read_bytes())
    (tmp_path / "config.yaml").write_text(f"data: {{dataset: folder, root: {tmp_path}/gone}}\n")
    message = fail(capsys, moved, *TINY)
    assert "gone" in message
    assert message.endswith("; or give other images with --images FOLDER")


def test_a_file_that_claims_too_much(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = report_module.read_info(checkpoint)
    model = report_module.load_sparse(checkpoint, create_model=create_model)
    report_module.check_image_size(checkpoint, info, model)
    huge = dataclasses.replace(info, image_size=8000)
    with pytest.raises(CheckpointError, match="image size: expected 28 x 28 x 1, which the model takes, found 8000 x"):
        report_module.check_image_size(checkpoint, huge, model)
    monkeypatch.setattr(report_module.os, "sysconf", lambda name: 100)
    with pytest.raises(CheckpointError, match=r"its dense twin takes .* more than half of this machine's memory"):
        create_dense(info)


REPORT = Report(
    checkpoint="runs/<script>alert(1)</script>/sparse.safetensors",
    facts=(("model", "deit & co"), ("images", "16 of <b>x</b>")),
    rows=(
        Row("MACs of an image", "M", 4600.0, 2900.0, 0.63),
        Row("throughput, batch 16", "images/s", 20.9, 37.4, 1.76, (1.7, 1.8), 1.59, more_is_better=True),
        Row("latency, batch 1, p50", "ms", 49.4, 55.0, 1.11, (1.0, 1.2), 0.63),
    ),
)
MACHINE = {"device": "A <fast> one", "threads": 2}


class Elements(HTMLParser):
    """The elements of a page, which must be closed in the order in which they were opened."""

    VOID = ("meta", "rect", "line", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(text)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = to_html(REPORT, MACHINE)
    page = Elements()
    page.feed(text)
    page.close()
    assert page.open == []
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "b", "fast"}
    assert not any(key in ("src", "href", "style") or key.startswith("on") for _, given in page.seen for key in given)
    assert "url(" not in text
    assert "@import" not in text
    for row in REPORT.rows:
        for cell in cells(row):
            assert cell in page.cells or not cell
    bars = [given for tag, given in page.seen if tag == "rect"]
    assert [bar["class"] for bar in bars] == ["better", "better", "worse"]
    widths = [float(bar["width"] or 0) for bar in bars]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 1.76 / 0.63, 1.11 / 0.63], abs=0.01)
    assert sum(given.get("class") == "ideal" for _, given in page.seen) == 2


@pytest.mark.parametrize("width", [80, 110])
def test_the_terminal_shows_every_row(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    print_report(console, REPORT, MACHINE)
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= width
    assert "throughput, batch 16 (images/s) 20.90 37.40 1.76 1.70–1.80 1.59 111 %" in lines
    assert "latency, batch 1, p50 (ms) 49.40 55.00 1.11 1.00–1.20 0.63 57 %" in lines
    assert "MACs of an image (M) 4,600 2,900 0.63" in lines


def test_the_picture(tmp_path: Path) -> None:
    write_page(REPORT, MACHINE, str(tmp_path / "report.png"))
    with Image.open(tmp_path / "report.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    counts = {color: number for number, color in colors}
    better, worse = counts[0x2A, 0x7F, 0x78], counts[0xC2, 0x70, 0x2B]
    assert better / worse == pytest.approx((0.63 + 1.76) / 1.11, rel=0.1)  # whiskers and ideals lie on some of it


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_out_of_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(COMMANDS, "train", dataclasses.replace(COMMANDS["train"], measure=full))
    assert fail(capsys, "train", "--device=cpu") == "batch_size: 64 images do not fit in the memory of cpu"
    assert benchmark.COMMANDS is COMMANDS
