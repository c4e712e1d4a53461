"""Does the scheduler find the better heads? A case with a known answer: ``python -m experiments.trials.damaged_heads``.

A small ViT is trained dense. In each block the head that the loss would miss most is the *good* one, and the second
is *damaged*: its queries and keys are drawn anew, so that it attends to nothing in particular. One of the two lies
dormant:

- the good one, while the damaged one lives: the scheduler should exchange them;
- the damaged one, while the good one lives: the scheduler should leave them.

Training goes on for a few updates, and we count the blocks in which the good head is not live at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.data.data_config import DataConfig
from experiments.data.sources import ImageSource, open_sources
from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.units import find_blocks

HEADS, BLOCKS, BATCH = 4, 2, 32
CASES = ("good dormant", "damaged dormant")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "always": {"swap": "always", "probation": 0},
    "if_better": {"swap": "if_better", "probation": 0},
    "explore": {"swap": "explore", "probation": 2},
    "explore, between blocks": {"swap": "explore", "probation": 2, "unit_distribution": "global"},
}
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Images:
    """Some images ``[M, 1, 28, 28]`` and their classes ``[M]``."""

    images: Tensor
    targets: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many drawn at random."""
        chosen = torch.randint(len(self.images), (size,), generator=generator)
        return self.images[chosen], self.targets[chosen]


@dataclass(frozen=True)
class Outcome:
    """One seed, case and way."""

    seed: int
    case: str
    way: str
    errors: int  #: blocks in which the good head is not live at the end
    damaged: int  #: blocks in which the damaged one is
    swaps: int  #: heads that were exchanged
    loss: float  #: on the test images at the end


def embedded(split: int) -> Images:
    """The Fashion-MNIST images that come with the project: split 0 to train, 1 to test."""
    source = open_sources(DataConfig())[split]
    assert isinstance(source, ImageSource)
    return Images((torch.tensor(source.dataset).float().unsqueeze(1) / 255 - 0.286) / 0.353, source.targets)


def small_vit(seed: int) -> nn.Module:
    """Two blocks of four heads, 16 patches."""
    torch.manual_seed(seed)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        embed_dim=32,
        depth=BLOCKS,
        num_heads=HEADS,
        in_chans=1,
        num_classes=10,
    )


def train_dense(seed: int, train: Images, steps: int) -> nn.Module:
    """A trained network."""
    model, generator = small_vit(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        images, targets = train.batch(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return model


@torch.no_grad()
def test_loss(model: nn.Module, images: Images) -> float:
    """Mean over all of the images."""
    model.eval()
    loss = float(F.cross_entropy(model(images.images), images.targets))
    model.train()
    return loss


@torch.no_grad()
def worth(model: nn.Module, images: Images) -> dict[str, list[float]]:
    """By block, how much the loss rises without each head: the answer that a scheduler can only estimate."""
    parameters, whole = dict(model.named_parameters()), test_loss(model, images)
    found: dict[str, list[float]] = {}
    for name, block in find_blocks(model).items():
        (part,) = block.heads.outputs
        found[name] = []
        for head in range(HEADS):
            kept = parameters[part.name].data.clone()
            part.units(parameters[part.name].data)[head] = 0
            found[name].append(test_loss(model, images) - whole)
            parameters[part.name].data.copy_(kept)
    return found


@torch.no_grad()
def arrange(model: nn.Module, places: Mapping[str, Sequence[int]]) -> None:
    """Put head ``places[block][i]`` in place ``i`` of its block; the function stays."""
    parameters = dict(model.named_parameters())
    for name, block in find_blocks(model).items():
        for part in block.heads.slices:
            parameters[part.name].copy_(part.take(parameters[part.name], places[name]))


@torch.no_grad()
def damage(model: nn.Module, heads: Mapping[str, int], generator: torch.Generator) -> None:
    """Draw the queries and keys of one head of each block anew, as large as they were."""
    parameters = dict(model.named_parameters())
    for name, block in find_blocks(model).items():
        for part in block.heads.inputs:
            both = part.units(parameters[part.name].data)[heads[name]][:2]
            both.copy_(torch.randn(both.shape, generator=generator) * both.std())


def _loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(batch[0]), batch[1])


def try_one(
    seed: int,
    case: str,
    way: str,
    dense: nn.Module,
    missed: Mapping[str, Sequence[float]],
    train: Images,
    test: Images,
    *,
    updates: int = 6,
    every: int = 10,
) -> Outcome:
    """Go on with one head of each block dormant.

    Args:
        missed: of :func:`worth`, on the dense network.
    """
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(1000 + seed)
    config = SparsityConfig(
        density=None,
        head_density=(HEADS - 1) / HEADS,
        update_every=every,
        drop_fraction=0.4,
        drop_fraction_end=0.4,
        stop_at=1.0,
        seed=seed,
        **WAYS[way],
    )
    # The first masks are drawn by the seed alone, so the heads can be put where they are to be.
    chosen = SparsityScheduler(copy.deepcopy(dense), config, total_steps=every * updates).live_heads
    places, good, damaged = {}, {}, {}
    for name, live in chosen.items():
        (dormant,) = set(range(HEADS)) - set(live)
        best, second, *rest = sorted(range(HEADS), key=[-rise for rise in missed[name]].__getitem__)
        inner = [second, *rest] if case == CASES[0] else [best, *rest]
        order = {dormant: best if case == CASES[0] else second, **dict(zip(live, inner, strict=True))}
        places[name] = [order[place] for place in range(HEADS)]
        good[name], damaged[name] = places[name].index(best), places[name].index(second)
    arrange(model, places)
    damage(model, damaged, generator)
    scheduler = SparsityScheduler(model, config, total_steps=every * updates)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler.attach(optimizer)
    swaps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(every * updates):
            images, targets = train.batch(BATCH, generator)
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            update = scheduler.step(_loss_of(model, train.batch(4 * BATCH, generator)))
            optimizer.zero_grad()
            swaps += sum(len(block.heads_added) for block in update.blocks.values()) if update else 0
        ended = scheduler.live_heads
        scheduler.detach(release=True)
    return Outcome(
        seed,
        case,
        way,
        sum(good[name] not in heads for name, heads in ended.items()),
        sum(damaged[name] in heads for name, heads in ended.items()),
        swaps,
        test_loss(model, test),
    )


def try_all(seeds: Sequence[int], *, steps: int, say: Callable[[str], None] = print) -> list[Outcome]:
    """Every case and way with every seed."""
    train, test = embedded(0), embedded(1)
    some = Images(train.images[::10], train.targets[::10])
    outcomes = []
    for seed in seeds:
        dense = train_dense(seed, train, steps)
        missed = worth(dense, some)
        for case in CASES:
            for way in WAYS:
                outcomes.append(try_one(seed, case, way, dense, missed, train, test))
        say(f"seed {seed}: " + ", ".join(f"{o.way} {o.errors}" for o in outcomes if o.seed == seed))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Error rates by case and way, in Markdown."""
    lines = [
        "| case | way | good head not live | damaged head live | swaps in a run | test loss |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for way in WAYS:
            mine = [outcome for outcome in outcomes if (outcome.case, outcome.way) == (case, way)]
            blocks = len(mine) * BLOCKS
            rates = [sum(getattr(outcome, what) for outcome in mine) / blocks for what in ("errors", "damaged")]
            swaps, loss = (statistics.mean(getattr(o, what) for o in mine) for what in ("swaps", "loss"))
            lines.append(f"| {case} | `{way}` | {rates[0]:.0%} | {rates[1]:.0%} | {swaps:.1f} | {loss:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Try, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many (20)")
    parser.add_argument("--steps", type=int, default=600, help="steps of dense training (600)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for damaged_heads.md and .json")
    arguments = parser.parse_args()
    outcomes = try_all(range(arguments.seeds), steps=arguments.steps)
    page = (
        "# Damaged heads\n\n`python -m experiments.trials.damaged_heads"
        f" --seeds {arguments.seeds} --steps {arguments.steps}`\n\n"
        "A trained ViT of two blocks of four heads, one of which is dormant. Either the best head lies dormant and a\n"
        "live one was damaged (queries and keys drawn anew), or the damaged one lies dormant. After six updates, one\n"
        "head of each block due at most of them:\n\n" + table(outcomes) + "\n"
    )
    print(page)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "damaged_heads.md").write_text(page, encoding="utf-8")
    records = [asdict(outcome) for outcome in outcomes]
    (arguments.output / "damaged_heads.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
