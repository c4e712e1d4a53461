"""``sparse-trainer shrink``: a trained network made small and fast, with its accuracy before and after."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from experiments.benchmarks.report import Report, ReportOptions, measure_report
from experiments.benchmarks.setting import Setting
from experiments.commands import train
from experiments.config.reading import create_parser, find_config, parse, to_yaml
from experiments.config.records import naming
from experiments.config.run_config import RunConfig, resolve
from experiments.data.create_data import create_data
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import evaluate
from experiments.run_folder.folder import RunFolder, create_run_folder
from experiments.run_folder.model_card import write_card
from experiments.shrinking.dense import images_for, latency_share, model_config, open_dense, save_dense
from experiments.shrinking.plan import Plan, Target, make_plan
from experiments.shrinking.source import Source, find_source
from experiments.terminal import create_console, print_table, run_command
from experiments.training.plan import create_plan
from sparse_trainer.files.whole_file import write_atomically

RECIPE = "shrink"
DENSE = "dense"
"""Name of the checkpoint of the dense network, which a run's own do not have."""
CALLS = 30
"""Single images whose latency is taken."""


def create_options() -> argparse.ArgumentParser:
    """Options beside the configuration. ``MODEL`` stands before them all: the configuration has a ``model`` too."""
    parser = argparse.ArgumentParser(
        prog="sparse-trainer shrink",
        usage="sparse-trainer shrink MODEL (--macs | --latency | --density) SHARE --data.root FOLDER ...",
        description="Make a trained ViT small and fast. MODEL is a timm name with weights, a folder of timm's or the "
        "Hugging Face Hub, a .safetensors or .pth file (with --model.name), or a dense run of this project. It must "
        "know the classes of the data, and is the teacher of what becomes of it.",
        epilog="All options of train go here too, such as --data.eval_split, --training.amp, --optimizer.lr; what they "
        "are by default is in the recipe shrink.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--macs", type=float, metavar="SHARE", help="multiply-accumulates to keep, such as 0.5")
    parser.add_argument("--latency", type=float, metavar="SHARE", help="of the time that one image takes here")
    parser.add_argument("--density", type=float, metavar="SHARE", help="of the weights that stay live")
    parser.add_argument("--epochs", type=int, help="of training; by default those of the recipe shrink")
    parser.add_argument("--plan-only", action="store_true", help="write the plan, to be edited and trained by train")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("shrink", lambda: _shrink(list(arguments)))


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is asked for."""

    source: Source
    target: Target
    config: RunConfig  #: with the images as the network wants them
    plan_only: bool


def _read(arguments: list[str]) -> _Request:
    where = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if where is None:
        raise ConfigError("give the network first: a timm name, a folder, a file of weights or a run")
    try:
        options, rest = create_options().parse_known_args(arguments[1:])
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    target = Target(options.macs, options.density, options.latency)
    if options.epochs is not None:
        rest += ["--training.epochs", str(options.epochs)]
    given = {match[1] for word in rest if (match := re.match(r"--([a-z_.]+)", word))}
    parser = create_parser("shrink")
    config, _ = parse(parser, rest, base=find_config(RECIPE))
    source = find_source(where, config.model.name if "model.name" in given else None)
    if "model.kwargs" not in given and not any(key.startswith("model.kwargs.") for key in given):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, kwargs={}))
    keys = [key.removeprefix("data.") for key in given if key.startswith("data.")]
    if "data.root" not in given and config.data.dataset == "folder" and not Path(config.data.root or "").is_dir():
        raise ConfigError(
            "data.root: give the images, as --data.root FOLDER with train/<class>/* and val/<class>/* in it"
        )
    data = images_for(source, config.data, keys)
    losses = dataclasses.replace(config.losses, macs_target=None, teacher=None)
    plain = dataclasses.replace(
        config, data=data, losses=losses, sparsity=None, selector=None, model=model_config(source, config.model)
    )
    return _Request(source, target, resolve(plain), options.plan_only)


def _shrink(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        create_options().print_help()
        return 0
    request = _read(arguments)
    config, console = request.config, create_console()
    device = torch.device(config.training.device)
    with naming("data"):
        try:
            data = create_data(config.data, device=config.training.device, seed=config.training.seed)
        except OSError as error:
            raise ValueError(f"cannot be read: {error}") from error
    total_steps = create_plan(config, data.steps_per_epoch()).total_steps
    network = open_dense(request.source, config, data)
    measure_latency = latency_share(network, data, device, config.training.amp)
    plan = make_plan(network.model, request.target, measure_latency, lambda: next(iter(data.train.batches(0)))[0].cpu())

    name = config.output.name or f"{RECIPE}-{_word(request.source.name)}"
    folder = create_run_folder(dataclasses.replace(config.output, name=None), f"{name}-{DENSE}")
    save_dense(folder.sparse, network, data, config.data, RECIPE)
    write_card(folder.sparse, config.data)
    write_atomically(folder.config, [to_yaml(config).encode()])
    written = folder.path / "plan.yaml"
    write_atomically(written, [_plan_text(config, request.source, plan, folder, total_steps).encode()])

    dense = evaluate(folder.sparse, config.data, device=device, amp=config.training.amp)
    _show_plan(console, plan, written, dense.measured.metrics, dense.macs, network.notes)
    if request.plan_only:
        console.print(f"train it with:\n  sparse-trainer train --config {written}", soft_wrap=True, markup=False)
        return 0
    runs = RunFolder(Path(config.output.runs) / name)
    code = train.main(["--config", str(written), "--output.runs", config.output.runs, "--output.name", runs.path.name])
    if code != 0:
        return code
    small = evaluate(runs.sparse, config.data, device=device, amp=config.training.amp)
    setting = Setting(batch_size=config.data.eval_batch_size, amp=config.training.amp, device=str(device))
    report = measure_report(setting, ReportOptions(str(runs.sparse), calls=CALLS))
    _show_result(console, dense.measured.metrics, small.measured.metrics, report, runs, folder)
    return 0


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name.partition(".")[0]).strip("-") or "model"


def _plan_text(config: RunConfig, source: Source, plan: Plan, dense: RunFolder, total_steps: int) -> str:
    """The configuration of the run, as a file to be edited."""
    values: dict[str, Any] = yaml.safe_load(to_yaml(config))
    values["recipe"] = RECIPE
    values["output"]["name"] = None
    values["model"] |= {
        "start": str(dense.sparse),
        "pretrained": False,
        "kwargs": dict(source.kwargs) | config.model.kwargs,
    }
    sections = plan.sections(total_steps)
    values |= {"sparsity": sections["sparsity"], "selector": sections["selector"]}
    values["losses"] |= {**sections["losses"], "teacher": str(dense.sparse)}
    return f"# What goes of {source.name}, and how the rest trains; made by sparse-trainer shrink, to be edited.\n" + (
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    )


def _show_plan(
    console: Console, plan: Plan, written: Path, metrics: dict[str, float], macs: float, notes: Sequence[str]
) -> None:
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    rows = [("dense", f"top-1 {metrics['top1']:.2f} %, loss {metrics['loss']:.4f}, {macs / 1e6:,.1f} M MACs")]
    if plan.units_macs < 1:
        rows.append(
            (
                "heads, neurons",
                f"{plan.head_density:.3f} and {plan.neuron_density:.3f} of all stay, the best of all blocks by their "
                f"effect on the loss: {plan.units_macs:.1%} of the MACs",
            )
        )
    if plan.macs_target is not None:
        where = ", ".join(map(str, plan.stages))
        rows.append(("tokens", f"dropped before blocks {where}, so that {plan.macs_target:.1%} of the MACs are left"))
    if plan.density is not None:
        rows.append(
            (
                "weights",
                f"{plan.density:.1%} stay live in the end; the budget falls over the first half of the training",
            )
        )
    rows.append(("plan", str(written)))
    print_table(console, "the plan", rows)


def _show_result(
    console: Console,
    before: dict[str, float],
    after: dict[str, float],
    report: Report,
    small: RunFolder,
    dense: RunFolder,
) -> None:
    """Accuracy as evaluated, all else as measured in turns on this machine."""
    rows = [
        (
            "top-1",
            f"{before['top1']:.2f} % before, {after['top1']:.2f} % after ({after['top1'] - before['top1']:+.2f})",
        ),
        ("loss", f"{before['loss']:.4f} before, {after['loss']:.4f} after"),
    ]
    rows += [
        (row.name, f"{row.dense:,.2f} before, {row.sparse:,.2f} {row.unit} after ({row.ratio:.3f})")
        for row in report.rows
    ]
    rows += [("before", str(dense.sparse)), ("after", str(small.sparse))]
    print_table(console, "shrunk", rows)
