"""Two sparse networks laid over each other: by hand, by brute force, and against the expanded network."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.__main__ import main
from experiments.inspection.compare import Overlap, add, compare, dense_masks, overlap, overlap_of_units
from experiments.inspection.contents import Contents, create_dense, read_contents
from sparse_trainer import Budget, SparseInfo, expand, save_sparse
from sparse_trainer.files.checkpoint import read_sparse
from sparse_trainer.scheduler import prunable_weights
from sparse_trainer.units import compact
from tests.conftest import TINY

PROJ = "blocks.0.attn.proj.weight"


def test_six_elements_by_hand() -> None:
    """Live 0 1 2 3 and 2 3 4: two in both, five in either, three in one alone. Random: 4 * 3 / 6 = 2 in both."""
    a, b = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([[0, 0, 1], [1, 1, 0]]).bool()
    found = overlap(a, b)
    assert found == Overlap(total=6, a=4, b=3, both=2, random_both=2.0)
    assert (found.iou, found.hamming) == (2 / 5, 3)
    assert (found.random_iou, found.random_hamming) == (2 / 5, 3.0)
    assert (found.share_of_a, found.share_of_b) == (2 / 4, 2 / 3)
    assert overlap(a, a).iou == 1
    assert overlap(a, ~a).iou == 0
    assert overlap(a, ~a).hamming == 6


def test_the_sum_keeps_the_density_of_each_layer() -> None:
    """A dense layer of 10 and one of 10 with 2 and 5 live: 10 + 1 expected, not 12 * 15 / 20 = 9."""
    total = add([Overlap(10, 10, 10, 10, 10.0), Overlap(10, 2, 5, 2, 1.0)])
    assert total == Overlap(total=20, a=12, b=15, both=12, random_both=11.0)


def test_random_overlap_is_the_mean_over_all_subsets() -> None:
    for total, a, b in ((4, 2, 1), (5, 3, 2), (5, 5, 2)):
        shared = [
            len(set(first) & set(second))
            for first in itertools.combinations(range(total), a)
            for second in itertools.combinations(range(total), b)
        ]
        found = overlap_of_units(total, range(a), range(b))
        assert found.random_both == pytest.approx(sum(shared) / len(shared))


def save(
    path: Path,
    model: nn.Module,
    heads: Mapping[str, tuple[int, ...]],
    neurons: Mapping[str, tuple[int, ...]],
    masks: Mapping[str, Tensor],
    **changes: Any,
) -> Contents:
    """A checkpoint of ``model`` with those units, and masks of the compact shapes."""
    compact(model, heads, neurons)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    prunable = sum(weight.numel() for weight in prunable_weights(model).values())
    live = sum(int(mask.count_nonzero()) for mask in masks.values()) if masks else prunable
    info = SparseInfo(
        model="deit_tiny_patch16_224",
        model_args={**TINY, **changes},
        budget=Budget(live, max(live, prunable)),
        macs=0,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
        metrics={"top1": 50.0},
    )
    save_sparse(path, model, masks=masks, info=info, live_heads=heads, live_neurons=neurons)
    return read_contents(path)


def test_masks_are_compared_where_they_lie_in_the_dense_network(
    tmp_path: Path, tiny_deit: Callable[..., nn.Module]
) -> None:
    """Heads 0, 2 and heads 2, 1 of three, of width 8: in common are head 2, its 3 * 8 rows of qkv, 8 columns of proj.

    Of proj only one column is on, channel 1 of head 2: in slot 1 there and slot 0 here, column 17 of the dense 24.
    """
    contents = []
    for name, heads, neurons, column in (
        ("a", (0, 2), range(48), 9),
        ("b", (2, 1), range(71, 23, -1), 1),
    ):
        mask = torch.zeros(24, 16, dtype=torch.bool)
        mask[:, column] = True
        units = {"blocks.0": heads}, {"blocks.0": tuple(neurons)}
        contents.append(save(tmp_path / f"{name}.safetensors", tiny_deit(), *units, {PROJ: mask}))
    found = compare(*contents)
    assert found.layers["blocks.0.attn.qkv.weight"] == Overlap(
        72 * 24, 48 * 24, 48 * 24, 24 * 24, (48 * 24) ** 2 / 1728
    )
    assert found.layers[PROJ] == Overlap(24 * 24, 24, 24, 24, 1.0)
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        assert found.layers[name] == Overlap(96 * 24, 48 * 24, 48 * 24, 24 * 24, 24 * 24)
        assert found.layers[name].hamming == 2 * 24 * 24
    for name in ("patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "head.weight"):
        assert found.layers[name].iou == 1
    block = found.blocks["blocks.0"]
    assert block.heads == Overlap(3, 2, 2, 1, 4 / 3)
    assert block.neurons == Overlap(96, 48, 48, 24, 24.0)
    assert found.blocks["blocks.1"].heads == Overlap(3, 3, 3, 3, 3.0)
    place = dense_masks(contents[1].file, create_dense(contents[1].info))[PROJ].nonzero()
    assert place.tolist() == [[row, 17] for row in range(24)]
    assert found.total.both == sum(layer.both for layer in found.layers.values())


@pytest.mark.parametrize("seed", range(6))
def test_dense_masks_are_where_the_expanded_network_is_not_zero(
    seed: int, tmp_path: Path, tiny_deit: Callable[..., nn.Module]
) -> None:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    names = ["blocks.0", "blocks.1"]
    heads = {name: tuple(draw.sample(range(3), draw.randint(1, 3))) for name in draw.sample(names, draw.randint(0, 2))}
    neurons = {name: tuple(draw.sample(range(96), draw.randint(1, 96))) for name in draw.sample(names, 1)}
    shapes = tiny_deit()
    compact(shapes, heads, neurons)
    masked = draw.sample(list(prunable_weights(shapes)), 5)
    masks = {name: torch.rand(shapes.get_parameter(name).shape, generator=generator) < 0.4 for name in masked}
    path = tmp_path / "x.safetensors"
    model = tiny_deit()
    with torch.no_grad():  # no weight is 0 by chance, as timm's biases are
        for weight in model.parameters():
            weight.fill_(1.0)
    save(path, model, heads, neurons, masks)
    dense = expand(path)
    found = dense_masks(read_sparse(path), dense)
    assert list(found) == list(prunable_weights(dense))
    for name, mask in found.items():
        assert torch.equal(mask, dense.get_parameter(name) != 0), name


def test_other_shapes_are_refused_in_one_line(
    tmp_path: Path, tiny_deit: Callable[..., nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    save(Path(a), tiny_deit(), {}, {}, {})
    save(Path(b), tiny_deit(embed_dim=48), {}, {}, {}, embed_dim=48)
    save(Path(c), tiny_deit(depth=1), {}, {}, {}, depth=1)
    for other, message in (
        (b, "patch_embed.proj.weight is 24x1x4x4 and 48x1x4x4, and 9 more weights differ"),
        (c, "blocks.1.attn.qkv.weight is 72x24 and missing, and 3 more weights differ"),
    ):
        assert main(["inspect", "--compare", a, other]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"differ in shape: {message}; compare networks that are the same when dense" in error
