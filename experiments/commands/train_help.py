"""``sparse-trainer train --help``: the settings that matter, and on request those of a section or all of them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from experiments.commands.train_request import add_arguments
from experiments.config.field_docs import field_docs
from experiments.config.reading import create_parser, recipes
from experiments.config.records import RECORDS
from experiments.errors import ConfigError

MATTER = (
    ("--config", "a YAML file, or the name of a recipe; the later of several wins, and options win over files"),
    ("--data.root", "the folder of your images, with --data.dataset folder where the recipe has another"),
    ("--model.name", "any ViT of timm, such as deit_small_patch16_224"),
    ("--model.start", "weights to begin with: a run, or a file in timm's names"),
    ("--sparsity.density", "share of the weights that lives, such as 0.5; --sparsity null trains the dense network"),
    ("--sparsity.head_density", "share of the attention heads that lives"),
    ("--sparsity.neuron_density", "share of the MLP neurons that lives"),
    ("--selector", "which patches are looked at; null for all of them"),
    ("--training.epochs", "passes over the training images"),
    ("--resume", "a run folder to go on with, or auto"),
)
HELP = ("-h", "--help")


def help_text(topic: str | None) -> str:
    """The help on a topic: None for what matters, the name of a section, or all.

    Raises:
        ConfigError: there is no such topic.
    """
    if topic == "all":
        parser = create_parser("train")
        add_arguments(parser)
        return str(parser.format_help())
    if topic is not None:
        if topic not in RECORDS:
            raise ConfigError(f"--help: there is no section {topic!r}; there are {', '.join(RECORDS)}, and all")
        return _of_section(topic)
    width = max(len(option) for option, _ in MATTER) + 2
    lines = ["usage: sparse-trainer train [--config FILE_OR_RECIPE] [--SECTION.SETTING VALUE ...]", ""]
    lines += ["Train a sparse Vision Transformer under one exact budget. Without options: the quick start.", ""]
    lines += [f"  {option:<{width}}{text}" for option, text in MATTER]
    example = "sparse-trainer train --config svite_deit_small --data.root photos --sparsity.density 0.3"
    lines += ["", "For example:", f"  {example}"]
    lines += ["", *textwrap.wrap(f"Recipes: {', '.join(recipes())}", 110, subsequent_indent="  ")]
    lines += ["", f"All settings of a section: --help {' | '.join(RECORDS)}; of all: --help all"]
    return "\n".join(lines)


def _of_section(section: str) -> str:
    """Each setting with its value where neither a recipe nor an option gives another."""
    texts = field_docs(RECORDS[section])
    lines = []
    for setting in dataclasses.fields(RECORDS[section]):
        default = "" if setting.default is dataclasses.MISSING else f"  [{setting.default}]"
        lines.append(f"  --{section}.{setting.name}{default}")
        text = texts.get(setting.name, "")
        lines += textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def topic_of(arguments: Sequence[str]) -> str | None:
    """The word after ``--help``; None if there is none."""
    place = next(index for index, argument in enumerate(arguments) if argument in HELP)
    after = arguments[place + 1 : place + 2]
    return after[0] if after and not after[0].startswith("-") else None
