"""``sparse-trainer benchmark``: what sparsity saves on the machine at hand, and what the scheduler costs.

Every figure is measured in this run; beside it stands the ideal, what the arithmetic alone would give.
"""

from __future__ import annotations

import difflib
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser

from experiments.benchmarks.data import benchmark_data
from experiments.benchmarks.inference import benchmark_inference
from experiments.benchmarks.kernels import Kernels, KernelTime, benchmark_kernels, kernels_content, show_kernels
from experiments.benchmarks.onnx import benchmark_onnx
from experiments.benchmarks.overhead import benchmark_overhead
from experiments.benchmarks.patterns import Patterns, benchmark_patterns
from experiments.benchmarks.report import Report, ReportOptions, measure_report
from experiments.benchmarks.report_page import check_page, print_report, write_page
from experiments.benchmarks.save import Place, benchmark_save
from experiments.benchmarks.setting import Setting, Structure, Weights
from experiments.benchmarks.teacher import Ways, benchmark_teacher
from experiments.benchmarks.timing import (
    Figure,
    check_output,
    describe_machine,
    figures_content,
    show,
    use_threads,
    write_json,
)
from experiments.benchmarks.train import Selection, benchmark_train
from experiments.config.explaining import explain
from experiments.config.field_docs import field_docs
from experiments.errors import ConfigError
from experiments.terminal import create_console, run_command

Machine = dict[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A sub-command: what it measures, under which settings, and how that is shown."""

    measure: Callable[..., Any]  #: of the records
    records: tuple[Any, ...]  #: dataclasses whose fields are the options; a :class:`Setting` comes first
    show: Callable[..., Values]  #: of what was measured, the records, the machine and the settings; returns the JSON
    hidden: tuple[str, ...] = ()  #: fields of the setting that mean nothing here


def _title(name: str, setting: Setting) -> str:
    if "model" in COMMANDS[name].hidden:
        return f"{name}: batch {setting.batch_size}"
    sizes = f"{setting.model}, {setting.image_size} px, patch {setting.patch_size}"
    if "batch_size" in COMMANDS[name].hidden:
        return f"{name}: {sizes}, {setting.amp}"
    return f"{name}: {sizes}, batch {setting.batch_size}, {setting.amp}"


def show_figures(
    figures: Sequence[Figure], setting: Setting, *_: Any, name: str, machine: Machine, settings: Values
) -> Values:
    """A table of figures."""
    show(_title(name, setting), figures, machine)
    return figures_content(figures, machine, settings)


def show_kernel_times(
    times: Sequence[KernelTime], setting: Setting, kernels: Kernels, *, name: str, machine: Machine, settings: Values
) -> Values:
    """A table of sparse kernels."""
    show_kernels(create_console(), f"{name}: {setting.model}, float32", times, kernels, machine)
    return kernels_content(times, machine, settings)


def show_report(
    report: Report, setting: Setting, options: ReportOptions, *, name: str, machine: Machine, settings: Values
) -> Values:
    """A report, and its page."""
    console = create_console()
    print_report(console, report, machine)
    if options.output is not None:
        write_page(report, machine, options.output)
        console.print(f"written to {options.output}", markup=False, soft_wrap=True)
    return report.content(machine, settings)


LARGE = Setting(image_size=224, patch_size=16, batch_size=16, amp="float32", pairs=9)
COMMANDS: dict[str, Command] = {
    "report": Command(
        measure_report, (LARGE, ReportOptions()), show_report, hidden=("model", "image_size", "patch_size")
    ),
    "overhead": Command(benchmark_overhead, (Setting(), Weights()), show_figures),
    "train": Command(benchmark_train, (Setting(), Structure(), Selection()), show_figures),
    "teacher": Command(benchmark_teacher, (replace(LARGE, pairs=5), Ways()), show_figures, hidden=("compile",)),
    "inference": Command(benchmark_inference, (replace(LARGE, pairs=5), Structure(tokens=0.7)), show_figures),
    "data": Command(
        benchmark_data,
        (Setting(batch_size=128),),
        show_figures,
        hidden=("model", "image_size", "patch_size", "amp", "compile"),
    ),
    "kernels": Command(
        benchmark_kernels,
        (replace(LARGE, pairs=7, device="cpu"), Kernels()),
        show_kernel_times,
        hidden=("batch_size", "amp", "compile", "device"),
    ),
    "patterns": Command(
        benchmark_patterns,
        (replace(LARGE, device="cpu"), Patterns(), Structure(heads=1.0, neurons=1.0)),
        show_figures,
        hidden=("batch_size", "compile", "device"),
    ),
    "onnx": Command(
        benchmark_onnx,
        (replace(LARGE, device="cpu"), Structure(tokens=0.7)),
        show_figures,
        hidden=("amp", "device"),
    ),
    "save": Command(benchmark_save, (Setting(amp="float32"), Weights(), Place()), show_figures),
}
POSITIONAL = ("checkpoint",)


def create_parser(name: str) -> ArgumentParser:
    """The parser of ``sparse-trainer benchmark NAME``."""
    command = COMMANDS[name]
    text = (command.measure.__doc__ or "").partition("\n\n")[0]
    parser = ArgumentParser(
        prog=f"sparse-trainer benchmark {name}", description=text, exit_on_error=False, allow_abbrev=False
    )
    for record in command.records:
        hints, docs = get_type_hints(type(record)), field_docs(type(record))
        for key, default in _shown(record, command.hidden).items():
            words = docs[key].replace("%", "%%")
            if key in POSITIONAL:
                parser.add_argument(key, nargs="?", type=str, default=default, help=words)
            elif (inner := _items(hints[key])) is not None:
                given = list(default) if default is not None else None
                parser.add_argument(f"--{key}", nargs="+", type=inner, default=given, help=words)
            elif hints[key] is bool:
                parser.add_argument(f"--{key}", nargs="?", const=True, type=bool, default=default, help=words)
            else:
                parser.add_argument(f"--{key}", type=hints[key], default=default, help=words)
    return parser


def _shown(record: Any, hidden: Sequence[str]) -> Values:
    """The fields that are options."""
    return {key: value for key, value in asdict(record).items() if key not in hidden}


def _items(hint: Any) -> type | None:
    """The type of the items, where ``hint`` is a tuple of any length or None."""
    for option in get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if get_origin(option) is tuple:
            return get_args(option)[0]  # type: ignore[no-any-return]
    return None


def choose(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The sub-command and its arguments; a checkpoint in its place means the report on it.

    Raises:
        ConfigError: it is neither.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"give a checkpoint, or one of {', '.join(COMMANDS)}, first")
    first, *rest = arguments
    if first in COMMANDS:
        return first, rest
    if Path(first).exists() or "/" in first or first.endswith(".safetensors"):
        return "report", list(arguments)
    close = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    raise ConfigError(f"{first!r} is neither a benchmark nor a checkpoint; {hint}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for name, command in COMMANDS.items():
        summary = textwrap.wrap(" ".join((command.measure.__doc__ or "").partition("\n\n")[0].split()), 76 - width)
        lines += [
            f"  {first:<{width}}  {line}" for first, line in zip([name, *[""] * len(summary)], summary, strict=False)
        ]
    return "\n".join(
        [
            "usage: sparse-trainer benchmark NAME ...",
            "       sparse-trainer benchmark CHECKPOINT ...   (the same as benchmark report CHECKPOINT)",
            "",
            *lines,
            "",
            "sparse-trainer benchmark NAME --help says more",
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark and report it. Returns the exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    return run_command("benchmark", lambda: _benchmark(arguments))


def _benchmark(arguments: Sequence[str]) -> int:
    name, rest = choose(arguments)
    command, parser = COMMANDS[name], create_parser(name)
    rest = [_underscored(argument) for argument in rest]
    try:
        values = parser.parse_args(rest).as_dict()
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, rest, sections=())) from error
    records = [
        replace(record, **{key: _frozen(values[key]) for key in _shown(record, command.hidden)})
        for record in command.records
    ]
    setting: Setting = records[0]
    check_output("json", setting.json)
    if isinstance(records[-1], ReportOptions):
        check_page(records[-1].output)
    device = setting.on
    with use_threads(setting.threads):
        machine = describe_machine(device)
        try:
            with create_console().status(f"measuring {name}"):
                measured = command.measure(*records)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"batch_size: {setting.batch_size} images do not fit in the memory of {device}"
            ) from error
    content = command.show(measured, *records, name=name, machine=machine, settings=values)
    if setting.json is not None:
        write_json(setting.json, content)
    return 0


def _underscored(argument: str) -> str:
    """``--batch-size=1`` as ``--batch_size=1``: both are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
