from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from sparse_trainer.units import UnitSlice, compact, constant_output, expand_state_dict, find_blocks
from tests.conftest import VITS


class Mlp(timm.layers.Mlp):
    """Called as timm's, with something between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x).roll(1, dims=-1)))


Factory = Callable[..., nn.Module]


def test_slices_by_hand() -> None:
    # three groups (q, k, v) of two units of two rows
    rows = torch.arange(12.0)[:, None]
    part = UnitSlice("qkv.weight", 0, groups=3, size=2)
    assert part.take(rows, [1]).flatten().tolist() == [2, 3, 6, 7, 10, 11]
    assert part.units(rows)[0].flatten().tolist() == [0, 1, 4, 5, 8, 9]
    assert torch.equal(part.join(part.take(rows, [0]), part.take(rows, [1])), rows)
    columns = torch.arange(4.0)[None, :]
    assert UnitSlice("fc2.weight", 1).take(columns, [2, 0]).tolist() == [[2, 0]]


def zero_units(model: nn.Module, heads: dict[str, list[int]], neurons: dict[str, list[int]]) -> None:
    """Zero everything of the units that are not live, in the dense layout."""
    parameters = dict(model.named_parameters())
    for name, block in find_blocks(model).items():
        for group, live in ((block.heads, heads[name]), (block.neurons, neurons[name])):
            dormant = [unit for unit in range(group.count()) if unit not in live]
            for part in group.slices:
                part.units(parameters[part.name].data)[dormant] = 0


HEADS = {"blocks.0": [0, 2], "blocks.1": [1, 2]}
NEURONS = {"blocks.0": list(range(5, 40)), "blocks.1": list(range(0, 48, 2))}


@pytest.mark.parametrize("arguments", VITS.values(), ids=VITS)
def test_compact_equals_zeroed_dense(
    tiny_deit: Factory, tiny_batch: tuple[Tensor, Tensor], arguments: dict[str, object]
) -> None:
    """Same logits, and for live units the same gradients."""
    dense, small = tiny_deit(**arguments), tiny_deit(**arguments)
    assert torch.equal(dense.state_dict()["head.weight"], small.state_dict()["head.weight"])
    zero_units(dense, HEADS, NEURONS)
    compact(small, HEADS, NEURONS)
    torch.testing.assert_close(small(tiny_batch[0]), dense(tiny_batch[0]), atol=1e-5, rtol=0)
    for model in (dense, small):
        model(tiny_batch[0]).square().sum().backward()
    wanted, found = dict(dense.named_parameters()), dict(small.named_parameters())
    for name, block in find_blocks(dense).items():
        for group, live in ((block.heads, HEADS[name]), (block.neurons, NEURONS[name])):
            for part in group.slices:
                gradient = wanted[part.name].grad
                assert gradient is not None
                torch.testing.assert_close(found[part.name].grad, part.take(gradient, live), atol=1e-5, rtol=1e-4)
    expanded = expand_state_dict(small, HEADS, NEURONS, heads=3, neurons=find_blocks(dense)["blocks.0"].neurons.count())
    for name, value in dense.state_dict().items():
        assert torch.equal(expanded[name], value), name
    modules = dict(small.named_modules())
    for name in HEADS:
        qkv, proj = modules[f"{name}.attn.qkv"], modules[f"{name}.attn.proj"]
        assert isinstance(qkv, nn.Linear)
        assert isinstance(proj, nn.Linear)
        assert (qkv.out_features, qkv.in_features) == qkv.weight.shape
        assert (proj.out_features, proj.in_features) == proj.weight.shape


def test_folded_biases_keep_what_a_removed_head_always_added(
    tiny_deit: Factory, tiny_batch: tuple[Tensor, Tensor]
) -> None:
    """A head whose values are constant (v rows 0) is removed without any change of the logits."""
    dense, small = tiny_deit(), tiny_deit()
    for model in (dense, small):
        for name, block in find_blocks(model).items():
            parameters = dict(model.named_parameters())
            weight, bias = (part.units(parameters[part.name].data) for part in block.heads.inputs)
            weight[1, 2], bias[1] = 0, torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
            neuron_row, neuron_bias = (part.units(parameters[part.name].data) for part in block.neurons.inputs)
            neuron_row[7], neuron_bias[7] = 0, 1.5
            assert name in ("blocks.0", "blocks.1")
    heads = {name: [0, 2] for name in HEADS}
    neurons = {name: [unit for unit in range(96) if unit != 7] for name in HEADS}
    compact(small, heads, neurons, fold_biases=True)
    torch.testing.assert_close(small(tiny_batch[0]), dense(tiny_batch[0]), atol=1e-5, rtol=0)
    unfolded = tiny_deit()
    unfolded.load_state_dict(dense.state_dict())
    compact(unfolded, heads, neurons)
    assert (unfolded(tiny_batch[0]) - dense(tiny_batch[0])).abs().max() > 1e-3


def test_constant_of_a_head_by_hand(tiny_deit: Factory) -> None:
    model = tiny_deit()
    parameters = dict(model.named_parameters())
    torch.nn.init.normal_(parameters["blocks.0.attn.qkv.bias"])
    heads = find_blocks(model)["blocks.0"].heads
    found = constant_output(heads, parameters, [1])
    value_bias = parameters["blocks.0.attn.qkv.bias"][2 * 24 + 8 : 2 * 24 + 16]
    expected = parameters["blocks.0.attn.proj.weight"][:, 8:16] @ value_bias
    torch.testing.assert_close(found, expected)


def test_slots_follow_the_given_order(tiny_deit: Factory) -> None:
    dense, small = tiny_deit(), tiny_deit()
    compact(small, {"blocks.0": [2, 0]}, {})
    weight = dict(small.named_parameters())["blocks.0.attn.proj.weight"]
    full = dict(dense.named_parameters())["blocks.0.attn.proj.weight"]
    assert torch.equal(weight, torch.cat([full[:, 16:24], full[:, 0:8]], dim=1))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"blocks.9": [0]}, "no block 'blocks.9'; it has blocks.0, blocks.1"),
        ({"blocks.0": []}, "not distinct numbers from 0 to 2"),
        ({"blocks.0": [0, 3]}, "not distinct numbers from 0 to 2"),
        ({"blocks.0": [1, 1]}, "not distinct numbers from 0 to 2"),
    ],
)
def test_wrong_units_raise(tiny_deit: Factory, heads: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(tiny_deit(), heads, {})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "has no transformer blocks"),
        (lambda: timm.create_model("resnet10t"), "has no transformer blocks"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, scale_attn_norm=True),
            r"blocks\.0: timm\.layers\.attention\.Attention normalises over all heads",
        ),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, scale_mlp_norm=True),
            r"blocks\.0: timm\.layers\.mlp\.Mlp normalises over all neurons",
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", depth=1),
            r"blocks\.0: timm\.models\.beit\.Attention is of a kind whose heads cannot be taken out",
        ),
        (
            lambda: timm.create_model("cait_xxs24_224", depth=1),
            r"blocks\.0: timm\.models\.cait\.TalkingHeadAttn is of a kind.*set head_density and neuron_density to 1",
        ),
        (
            lambda: timm.create_model("vitamin_small_224"),
            r"GeGluMlp is of a kind whose neurons cannot be taken out",
        ),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, mlp_layer=Mlp),
            r"tests\.test_units\.Mlp is of a kind whose neurons cannot be taken out",
        ),
        (
            lambda: timm.create_model("vit_small_patch16_rope_mixed_224", img_size=32, depth=1),
            r"Eva rotates every head by angles of its own",
        ),
    ],
    ids=["linear", "resnet", "scale_attn_norm", "scale_mlp_norm", "beit", "cait", "vitamin", "mixing", "rope_mixed"],
)
def test_other_layouts_are_refused_clearly(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_blocks(model())


def test_a_compiled_layer_is_refused_clearly(tiny_deit: Factory) -> None:
    model = tiny_deit()
    block = model.get_submodule("blocks.0")
    block.mlp = torch.compile(block.mlp, backend="eager")  # type: ignore[assignment, arg-type]
    with pytest.raises(ValueError, match=r"blocks\.0: OptimizedModule wraps Mlp.* compile the block, or .*in place"):
        find_blocks(model)
