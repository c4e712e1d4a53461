"""Which networks work with what: ``python -m experiments.trials.backbones`` tries them and writes a table.

Each network takes a few training steps with an update of its masks after every one, is written as a sparse checkpoint,
loaded, exported, and its logits are compared. A cell of the table is "yes", "partly" or "no", the last two with a
number that leads to the error which one gets. Random images and first weights: this is about what works, not how well.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.evaluation.measuring import count_used, known_tokens
from experiments.exports.source import open_source
from experiments.exports.writers import export_dense, export_onnx
from models import create_model
from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, load_sparse, save_sparse

BATCH, CLASSES, STEPS = 4, 10, 3
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network by its name in timm, and what makes it small enough to be tried."""

    title: str
    name: str
    image_size: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True  #: whether it is told the image size

    def factory_arguments(self) -> dict[str, Any]:
        """All that the factory needs to build it again."""
        size = {"img_size": self.image_size} if self.sized else {}
        return {**self.arguments, **size, "num_classes": CLASSES}


DEPTH = {"depth": 2}
BACKBONES = (
    Backbone("DeiT-T", "deit_tiny_patch16_224", 64),
    Backbone("DeiT-S", "deit_small_patch16_224", 64),
    Backbone("DeiT-B", "deit_base_patch16_224", 64, DEPTH),
    Backbone("DeiT-S distilled", "deit_small_distilled_patch16_224", 64),
    Backbone("DeiT-III-S", "deit3_small_patch16_224", 64),
    Backbone("ViT-T", "vit_tiny_patch16_224", 64),
    Backbone("ViT-S", "vit_small_patch16_224", 64),
    Backbone("ViT-B", "vit_base_patch16_224", 64, DEPTH),
    Backbone("ViT with registers, mean pooling", "vit_medium_patch16_reg4_gap_256", 64),
    Backbone("DINOv2 ViT-S", "vit_small_patch14_dinov2", 56),
    Backbone("DINOv2 ViT-S with registers", "vit_small_patch14_reg4_dinov2", 56),
    Backbone("DINOv2 with SwiGLU", "vit_giant_patch14_dinov2", 56, {"depth": 4, "embed_dim": 192, "num_heads": 6}),
    Backbone("CLIP ViT-B", "vit_base_patch16_clip_224", 64, DEPTH),
    Backbone("SigLIP ViT-B, attention pooling", "vit_base_patch16_siglip_224", 64, DEPTH),
    Backbone("ViT-T with a convolutional stem", "vit_tiny_r_s16_p8_224", 64),
    Backbone("ViT-S with rotary embedding", "vit_small_patch16_rope_224", 64),
    Backbone("NaFlexViT-B", "naflexvit_base_patch16_gap", 64, DEPTH),
    Backbone("DINOv3 ViT-S", "vit_small_patch16_dinov3", 64),
    Backbone("EVA-02-T", "eva02_tiny_patch14_224", 56),
    Backbone("BEiT-B", "beit_base_patch16_224", 64, DEPTH),
    Backbone("CaiT-XXS24", "cait_xxs24_224", 64),
    Backbone("XCiT-nano", "xcit_nano_12_p16_224", 64),
    Backbone("PiT-Ti", "pit_ti_224", 64),
    Backbone("Swin-T", "swin_tiny_patch4_window7_224", 64),
    Backbone("PVTv2-b0", "pvt_v2_b0", 64, sized=False),
    Backbone("MobileViT-XXS", "mobilevit_xxs", 64),
    Backbone("ConvNeXt-atto", "convnext_atto", 64, sized=False),
    Backbone("ResNet-18", "resnet18", 64, sized=False),
)

#: What a network is asked for: how sparse, and which selector.
FEATURES: dict[str, tuple[SparsityConfig, dict[str, Any] | None]] = {
    "weight masks": (SparsityConfig(density=0.5, update_every=1), None),
    "heads and neurons": (
        SparsityConfig(density=0.25, head_density=0.5, neuron_density=0.5, update_every=1, swap="always"),
        None,
    ),
    "top-k tokens": (SparsityConfig(density=0.5, update_every=1), {"kind": "top_k", "keep_ratio": 0.5}),
    "threshold tokens": (
        SparsityConfig(density=0.5, update_every=1),
        {"kind": "threshold", "stages": [1], "thresholds": [0.0065]},
    ),
}
SPARSE = "sparse file"


@dataclass(frozen=True)
class Cell:
    """What came of it."""

    result: str  #: "yes", "partly" or "no"
    text: str = ""  #: unless it is yes: what one is told
    broken: bool = False  #: whether something broke, where one should have been told


@dataclass(frozen=True)
class Trained:
    """A network after its steps."""

    backbone: Backbone
    model: nn.Module
    scheduler: SparsityScheduler
    selector: Mapping[str, Any] | None


class Fault(Exception):
    """Something that should hold does not: an error of this project, not of the user's."""


def require(holds: bool, what: str) -> None:
    """Raises :class:`Fault` where ``holds`` is False."""
    if not holds:
        raise Fault(what)


def train(backbone: Backbone, config: SparsityConfig, selector: Mapping[str, Any] | None) -> Trained:
    """A few steps, an update after each, and what must hold after it.

    Raises:
        ValueError: what a user is told where the network and the configuration do not go together.
        Fault: an invariant is broken.
    """
    torch.manual_seed(0)
    model = create_model(backbone.name, selector=selector, **backbone.factory_arguments()).train()
    scheduler = SparsityScheduler(model, config, total_steps=4 * STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    budget = scheduler.budget
    images = torch.randn(BATCH, 3, backbone.image_size, backbone.image_size)
    targets = torch.randint(CLASSES, (BATCH,))
    grown = swapped = 0
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
        optimizer.zero_grad()
        require(bool(loss.isfinite()), "the loss is not finite")
        require(update is not None and scheduler.budget == budget, "the budget is not met after an update")
        assert update is not None
        grown += sum(layer.grown for layer in update.layers.values())
        swapped += sum(len(block.heads_added) + len(block.neurons_added) for block in update.blocks.values())
        for name, mask in scheduler.masks.items():
            require(not bool(model.get_parameter(name).detach()[~mask].any()), f"a dead weight of {name} is not 0")
    require(grown > 0, "no weight was grown")
    require(swapped > 0 or not config.structured, "no head or neuron was replaced")
    if selector is not None:
        _, selection = model.eval()(images, return_selection=True)
        require(bool((selection.counts < model.patch_embed.num_patches).any()), "no token was dropped")  # type: ignore[union-attr, operator]
    return Trained(backbone, model.eval(), scheduler, selector)


def save(trained: Trained, path: Path) -> None:
    """Write the sparse checkpoint."""
    model, scheduler, size = trained.model, trained.scheduler, trained.backbone.image_size
    macs = count_used(model, scheduler.masks, known_tokens(model), (3, size, size)).live_macs
    info = SparseInfo(
        model=trained.backbone.name,
        model_args=trained.backbone.factory_arguments(),
        selector=trained.selector,
        budget=scheduler.budget,
        macs=round(macs),
        image_size=size,
        in_chans=3,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        step=STEPS,
    )
    save_sparse(
        path,
        model,
        masks=scheduler.masks,
        live_heads=scheduler.live_heads,
        live_neurons=scheduler.live_neurons,
        info=info,
        create_model=create_model,
    )


@torch.inference_mode()
def check_sparse_file(trained: Trained, path: Path, images: Tensor) -> None:
    """The loaded network gives the saved one's logits, bit for bit."""
    loaded = load_sparse(path, create_model=create_model)
    require(torch.equal(loaded(images), trained.model(images)), "the loaded network gives other logits")


def check_dense_export(trained: Trained, path: Path, images: Tensor) -> None:
    """timm opens the folder by itself; the export compares the logits."""
    export_dense(open_source(path, torch.float32), path.with_suffix(".dense"), overwrite=True)


def check_onnx_export(trained: Trained, path: Path, images: Tensor) -> None:
    """onnxruntime opens the file; the export compares the logits. A threshold selector keeps fixed numbers there."""
    counts = (4,) if trained.selector is not None and trained.selector["kind"] == "threshold" else None
    export_onnx(open_source(path, torch.float32), path.with_suffix(".onnx"), True, counts)


CHECKS: dict[str, Callable[[Trained, Path, Tensor], None]] = {
    SPARSE: check_sparse_file,
    "dense export": check_dense_export,
    "ONNX export": check_onnx_export,
}


def told(error: Exception, folder: Path) -> Cell:
    """The cell for an error: in one line, without what only this machine has."""
    text = re.sub(rf"{re.escape(str(folder))}/?[\w.-]*(: )?", "", " ".join(str(error).split())) or type(error).__name__
    broken = not isinstance(error, ValueError)
    text = f"{type(error).__name__}: {text}" if broken else text
    return Cell("no", text if len(text) <= 300 else f"{text[:297]}...", broken)


def together(found: Mapping[str, Cell]) -> Cell:
    """One cell for a kind of file, from the cells of everything that trained."""
    failed = {feature: cell for feature, cell in found.items() if cell.result != "yes"}
    if not failed:
        return Cell("yes") if found else Cell("no", "nothing could be trained")
    text = "; ".join(f"{feature}: {cell.text}" for feature, cell in failed.items())
    return Cell("no" if failed == found else "partly", text, any(cell.broken for cell in failed.values()))


def try_backbone(backbone: Backbone, folder: Path, files: Sequence[str] | None = None) -> dict[str, Cell]:
    """The cells of one row. Files are written to ``folder``, one over the other; by default all of :data:`CHECKS`."""
    files = list(CHECKS) if files is None else files
    path = folder / "sparse.safetensors"
    images = torch.randn(BATCH, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1))
    cells: dict[str, Cell] = {}
    found: dict[str, dict[str, Cell]] = {name: {} for name in files}
    for feature, (config, selector) in FEATURES.items():
        try:
            trained = train(backbone, config, selector)
            cells[feature] = Cell("yes")
        except Exception as error:
            cells[feature] = told(error, folder)
            continue
        path.unlink(missing_ok=True)  # that of the feature before must not stand in for one that cannot be written
        for name in files:
            try:
                if name == SPARSE:
                    save(trained, path)
                CHECKS[name](trained, path, images)
                found[name][feature] = Cell("yes")
            except Exception as error:
                found[name][feature] = told(error, folder)
    return cells | {name: together(found[name]) for name in files}


def describe(backbone: Backbone) -> str:
    """The name, and what was made smaller than timm's."""
    smaller = ", ".join(f"{key} {value}" for key, value in backbone.arguments.items())
    return f"`{backbone.name}`" + (f", {smaller}" if smaller else "")


def anonymous(text: str) -> str:
    """What one is told, without the names in which the same refusal of two networks differs."""
    text = re.sub(r"\b[\w.]+\.\d+: timm\.[\w.]+", "BLOCK: CLASS", text)
    return re.sub(r"(?<=class )[A-Z]\w+(?=; sel)|\b\w+(?= has no transformer)|\b\w+(?= rotates every)", "CLASS", text)


def table(rows: Sequence[tuple[Backbone, Mapping[str, Cell]]]) -> list[str]:
    """Markdown: a line a network, and below it the errors by number."""
    columns = list(rows[0][1])
    lines = [f"| network | timm | image | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 3)]
    notes: dict[str, int] = {}
    for backbone, cells in rows:
        shown = []
        for cell in cells.values():
            number = notes.setdefault(anonymous(cell.text), len(notes) + 1) if cell.text else None
            shown.append(cell.result if number is None else f"{cell.result} ({number})")
        size = f"{backbone.image_size} px"
        lines.append(f"| {backbone.title} | {describe(backbone)} | {size} | {' | '.join(shown)} |")
    return [*lines, "", *(f"{number}. {text}" for text, number in notes.items())]


def report(rows: Sequence[tuple[Backbone, Mapping[str, Cell]]]) -> str:
    """The page."""
    return "\n".join(
        [
            "# Backbones",
            "",
            f"Made with torch {torch.__version__.split('+')[0]} and timm {timm.__version__} by",
            "",
            "    python -m experiments.trials.backbones",
            "",
            f"Each network takes {STEPS} steps on {BATCH} random images, with an update after every one. \"yes\": it "
            "trained, the live parameters equal the budget after every update, weights were grown (units replaced, "
            "tokens dropped), and dead weights are 0.",
            "",
            "Files: \"yes\" if, with all that trained, the loaded or exported network gives the same logits, bit for "
            "bit from the sparse file and within 1e-4 from the others. A number leads to what one is told, where BLOCK "
            "and CLASS stand for the network's own names.",
            "",
            *table(rows),
            "",
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 where something broke, which a plain refusal does not."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trials.backbones", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="networks whose timm name holds it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    chosen = [backbone for backbone in BACKBONES if any(text in backbone.name for text in options.only)]
    if not chosen:
        names = ", ".join(backbone.name for backbone in BACKBONES)
        parser.error(f"--only: no name holds {' or '.join(options.only)}; there are {names}")
    rows: list[tuple[Backbone, dict[str, Cell]]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for backbone in chosen:
            cells = try_backbone(backbone, Path(folder))
            rows.append((backbone, cells))
            print(f"{backbone.name}: " + ", ".join(f"{name} {cell.result}" for name, cell in cells.items()), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "backbones.md").write_text(report(rows), encoding="utf-8")
    content = [{**asdict(b), "cells": {name: asdict(cell) for name, cell in cells.items()}} for b, cells in rows]
    (options.output / "backbones.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    broken = [backbone.name for backbone, cells in rows if any(cell.broken for cell in cells.values())]
    if broken:
        print(f"something broke with {', '.join(broken)}; {options.output / 'backbones.md'} says what")
    return int(bool(broken))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of the ONNX exporter
    raise SystemExit(main())
