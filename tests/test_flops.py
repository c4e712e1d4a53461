from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.evaluation.measuring import count_used
from models import create_model
from models.selection import tokens_per_block
from sparse_trainer import SparsityConfig, SparsityScheduler, flops
from sparse_trainer.units import compact
from tests.conftest import TINY

Factory = Callable[..., nn.Module]


def counted_by_torch(model: nn.Module, image: Tensor) -> float:
    """Half the floating-point operations that torch counts: a multiply-accumulate is two."""
    for module in model.modules():  # not every torch counts fused attention on a CPU; all count matrix products
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2


def test_block_by_hand() -> None:
    # n=2, D=3, h*d=4, m=5: qkv 2*3*12=72, scores and mix 2*4*4=32, proj 2*4*3=24, mlp 2*2*3*5=60
    assert flops.block_macs(2, 3, 2, 2, 5) == 72 + 32 + 24 + 60


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"name": "deit_tiny_distilled_patch16_224"},
        {"name": "deit3_small_patch16_224"},
        {"name": "vit_tiny_patch16_224", "reg_tokens": 4},
        {"name": "vit_tiny_patch16_224", "mlp_layer": timm.layers.SwiGLUPacked},
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_agrees_with_torch(tiny_deit: Factory, arguments: dict[str, object], small: bool) -> None:
    model = tiny_deit(**arguments).eval()
    if small:
        compact(model, {"blocks.0": [1], "blocks.1": [0, 2]}, {"blocks.0": range(10), "blocks.1": range(33)})
    image = torch.randn(1, 1, 16, 16)
    expected = counted_by_torch(model, image)
    assert flops.count(model).macs == pytest.approx(expected, rel=0.01)
    assert flops.count(model, input_size=(1, 16, 16)).macs == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1}),  # calls its qkv layer as a function
        ("cait_xxs24_224", {"img_size": 32, "depth": 1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "depths": (1, 1)}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 32, "depth": 1}),  # a convolutional stem
        ("vit_so150m_patch16_reg4_map_256", {"img_size": 32, "depth": 1}),  # pools by attention, over patches alone
        ("vit_small_patch16_rope_224", {"img_size": 32, "depth": 1}),
    ],
)
def test_other_networks_agree_with_torch(name: str, arguments: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=10, **arguments).eval().requires_grad_(False)
    side = arguments["img_size"]
    found = count_used(model, {}, None, (3, side, side)).macs
    by_running = flops.count(model, input_size=(3, side, side)).macs
    expected = counted_by_torch(model, torch.randn(1, 3, side, side))
    assert found == pytest.approx(expected, rel=0.01)
    assert by_running == pytest.approx(expected, rel=0.01)


def test_running_finds_the_same_layers_as_the_formula(tiny_deit: Factory) -> None:
    model = tiny_deit()
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.5), total_steps=500)
    formula = flops.count(model, scheduler.masks).layers
    running = flops.count(model, scheduler.masks, input_size=(1, 16, 16)).layers
    products = {name for name in formula if name.endswith(".attn")}
    assert set(running) == set(formula) - products | {flops.OTHER_PRODUCTS}
    assert all(running[name] == layer for name, layer in formula.items() if name not in products)
    assert running[flops.OTHER_PRODUCTS].macs == sum(formula[name].macs for name in products)


def test_a_convolutional_network_agrees_with_torch() -> None:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    expected = counted_by_torch(model, torch.randn(1, 3, 64, 64))
    assert flops.count(model, input_size=(3, 64, 64)).macs == pytest.approx(expected, rel=0.01)
    assert not model.training


@pytest.mark.parametrize(("name", "giga"), [("tiny", 1.26), ("small", 4.6), ("base", 17.6)])
def test_deit_has_its_published_cost(name: str, giga: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"deit_{name}_patch16_224")
    assert flops.count(model).macs / 1e9 == pytest.approx(giga, rel=0.01)


def test_masks_count_their_live_share(tiny_deit: Factory) -> None:
    model = tiny_deit()
    dense = flops.count(model)
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.5, distribution="uniform"), total_steps=10)
    sparse = flops.count(model, scheduler.masks)
    products = sum(layer.macs for name, layer in dense.layers.items() if name.endswith(".attn"))
    assert sparse.macs == dense.macs
    assert sparse.live_macs - products == pytest.approx((dense.macs - products) / 2, rel=1e-3)
    assert dense.live_parameters - sparse.live_parameters == scheduler.budget.total - scheduler.budget.live


def test_tokens(tiny_deit: Factory) -> None:
    model = tiny_deit()
    dense = flops.count(model)
    fewer = flops.count(model, tokens=[17, 9])
    assert dense.macs - fewer.macs == flops.block_macs(17, 24, 3, 8, 96) - flops.block_macs(9, 24, 3, 8, 96)
    tokens = torch.tensor([[17.0, 17.0], [17.0, 9.0]], requires_grad=True)
    found = flops.model_macs(model, tokens)
    assert found.tolist() == [dense.macs, fewer.macs]
    found.sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad > 0).all()
    with pytest.raises(ValueError, match="3 numbers were given for 2 blocks"):
        flops.count(model, tokens=[1, 2, 3])


@pytest.mark.parametrize("dropped", ["gone", "fused"])
@pytest.mark.parametrize(("stages", "depth"), [((0,), 2), ((1,), 2), ((0, 1, 3), 4), ((2, 3), 4)])
def test_a_selector_scores_the_patches_that_reach_it(stages: tuple[int, ...], depth: int, dropped: str) -> None:
    arguments = {**TINY, "depth": depth}
    model: Any = create_model(
        "deit_tiny_patch16_224", selector={"stages": stages, "keep_ratio": 0.5, "dropped": dropped}, **arguments
    ).eval()
    image = torch.randn(1, 1, 16, 16)
    expected = counted_by_torch(model, image)
    selection = model(image, return_selection=True)[1]
    tokens = tokens_per_block(selection, depth)
    reaching = [16, *selection.counts[0].tolist()[:-1]]
    if dropped == "fused":  # the patches are scored again as weights of their mean, and the mean is a product too
        expected -= 2 * 24 * sum(reaching)
    found = flops.count(model, tokens=tokens[0].tolist())
    scored = [found.layers[f"selector.scorers.{stage}.weight"].macs for stage in range(len(stages))]
    assert scored == [24 * patches for patches in reaching]
    assert found.macs == expected
    assert flops.model_macs(model, tokens).tolist() == [expected]
    everything = flops.count(model)
    assert [everything.layers[f"selector.scorers.{stage}.weight"].macs for stage in range(len(stages))] == [
        24 * 16
    ] * len(stages)


def test_a_stage_that_drops_nothing_fuses_nothing() -> None:
    """The first leaves 8 patches, a token of the others and the class token; the second drops nothing."""
    selector = {"stages": [0, 1, 2], "dropped": "fused"}
    model = create_model("deit_tiny_patch16_224", selector=selector, **{**TINY, "depth": 3})
    layers = flops.count(model, tokens=[10, 10, 6]).layers
    assert [layers[f"selector.scorers.{stage}.weight"].macs for stage in range(3)] == [24 * 16, 24 * 8, 24 * 8]


def test_each_image_of_a_batch_is_scored_where_it_is() -> None:
    """Before block 1 a scorer reads the 16 patches of the first image and 3 of the second, of 24 channels each."""
    model = create_model("deit_tiny_patch16_224", selector={"stages": [0, 1]}, **TINY)
    tokens = torch.tensor([[17.0, 9.0], [4.0, 2.0]], requires_grad=True)
    found = flops.model_macs(model, tokens)
    assert found.tolist() == [flops.count(model, tokens=row.tolist()).macs for row in tokens]
    plain = flops.model_macs(create_model("deit_tiny_patch16_224", **TINY), tokens)
    assert (found - plain).tolist() == [24 * (16 + 16), 24 * (16 + 3)]
    assert torch.autograd.grad((found - plain).sum(), tokens)[0].tolist() == [[24.0, 0.0], [24.0, 0.0]]


def test_a_pooling_by_attention_reads_the_patches_that_are_left() -> None:
    pooled = {**TINY, "depth": 2, "global_pool": "map"}
    model: Any = create_model("vit_tiny_patch16_224", selector={"stages": [1], "keep_ratio": 0.5}, **pooled).eval()
    model.requires_grad_(False)  # torch's counter does not take a parameter as what a module is given
    image = torch.randn(1, 1, 16, 16)
    expected = counted_by_torch(model, image)
    tokens = tokens_per_block(model(image, return_selection=True)[1], 2).requires_grad_()
    assert flops.count(model, tokens=tokens[0].tolist()).macs == expected
    assert flops.model_macs(model, tokens).tolist() == [expected]
    # One token less in the last block, where nothing of the selector is.
    fewer = tokens.detach() - torch.tensor([[0.0, 1.0]])
    difference = expected - flops.count(model, tokens=fewer[0].tolist()).macs
    assert difference == flops.model_macs(model, tokens).item() - flops.model_macs(model, fewer).item()
    between = flops.count(model, tokens=((tokens + fewer) / 2)[0].tolist()).layers
    several = [flops.count(model, tokens=row[0].tolist()).layers for row in (tokens, fewer)]
    for name in between:
        if name.startswith("attn_pool"):
            assert between[name].macs == pytest.approx(sum(layers[name].macs for layers in several) / 2)


def test_gated_mlp_in_the_differentiable_form(tiny_deit: Factory) -> None:
    for layer in (timm.layers.SwiGLUPacked, timm.layers.SwiGLU):
        model = tiny_deit(name="vit_tiny_patch16_224", mlp_layer=layer)
        assert flops.model_macs(model, torch.full((1, 2), 17.0)).item() == flops.count(model).macs


def test_a_layer_at_two_places_is_left_as_it_is() -> None:
    """torch's own functional call leaves it without its weights."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Sequential(self.a, nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    model = Twice()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert flops.count(model, input_size=(4,)).macs == 2 * 16
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())
    with pytest.raises(RuntimeError, match=r"5\]? X \[?4|1x5"):
        flops.count(model, input_size=(5,))
    assert not model.a.weight.is_meta
    assert model.training


def test_a_compiled_model_is_counted_as_the_model(tiny_deit: Factory) -> None:
    model = torch.compile(tiny_deit(), backend="eager")
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.1), total_steps=10)  # type: ignore[arg-type]
    found = flops.count(model, scheduler.masks)  # type: ignore[arg-type]
    assert found == flops.count(scheduler.model, scheduler.masks)
    assert found.live_macs < found.macs
    with pytest.raises(ValueError, match=r"masks: x\.weight is no parameter of VisionTransformer"):
        flops.count(scheduler.model, {"x.weight": torch.ones(1)})


def test_other_modules_need_an_input_size() -> None:
    with pytest.raises(ValueError, match="give input_size"):
        flops.count(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"VisionTransformer: its blocks are not those .* give input_size"):
        flops.count(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, scale_mlp_norm=True))
