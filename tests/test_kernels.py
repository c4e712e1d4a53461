"""Products that skip dead weights: against dense products in float64, whatever the mask, the tail and the batch."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from models import create_model
from sparse_trainer import (
    Budget,
    SparseInfo,
    SparsityConfig,
    SparsityScheduler,
    accelerate,
    load_sparse,
    save_sparse,
)
from sparse_trainer.kernels import accelerate as accelerating
from sparse_trainer.kernels import library, masking, on_gpu, packed
from sparse_trainer.kernels.accelerate import describe_choices
from sparse_trainer.kernels.layers import CompressedRows, SparseLinear, SparsePatches
from tests.conftest import TINY

Factory = Callable[..., nn.Module]


def draw_mask(outputs: int, inputs: int, rows: int, density: float, generator: torch.Generator) -> Tensor:
    blocks = torch.rand(-(-outputs // rows), 1, inputs, generator=generator) < density
    return blocks.expand(-1, rows, -1).reshape(-1, inputs)[:outputs].contiguous()


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return {"none": y, "gelu": F.gelu(y), "relu": F.relu(y)}[activation]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    inputs=st.one_of(st.integers(1, 70), st.sampled_from([192, 193, 384, 400, 780])),  # of one chunk, and of several
    blocks=st.integers(1, 6),
    rows=st.sampled_from([1, 4, 8, 16, 32]),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0]),
    activation=st.sampled_from(["none", "gelu", "relu"]),
    biased=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_products(
    kernels: library.Library,
    tokens: int,
    inputs: int,
    blocks: int,
    rows: int,
    density: float,
    activation: str,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = blocks * rows + (3 if rows == 1 else 0)
    mask = draw_mask(outputs, inputs, rows, density, generator)
    weight = torch.randn(outputs, inputs, generator=generator) * mask
    bias = torch.randn(outputs, generator=generator) if biased else None
    x = torch.randn(tokens, inputs + 3, generator=generator)[:, :inputs]  # rows that lie apart
    taken = packed.pack(weight, mask, bias, rows)
    assert torch.equal(packed.unpack(taken), weight)
    torch.set_num_threads(threads)
    found = packed.product(kernels, x, taken, activation)
    wanted = expected(x, weight, bias, activation)
    scale = max(1.0, float(wanted.abs().max()) if tokens else 0.0)
    assert float((found - wanted).abs().max() if tokens else 0.0) <= 1e-5 * scale
    half = packed.product(kernels, x.bfloat16(), taken, activation)
    assert half.dtype == torch.bfloat16
    wanted = expected(x.bfloat16(), weight, bias, activation)
    torch.testing.assert_close(half.double(), wanted, atol=1e-2 * scale, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32])
def test_sixteen_bits_are_the_rounded_float32_result(kernels: library.Library, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    outputs = 37 if rows == 1 else 64
    mask = draw_mask(outputs, 50, rows, 0.5, generator)
    taken = packed.pack(torch.randn(outputs, 50, generator=generator), mask, rows=rows)
    for tokens in (1, 40, 1029):
        size = torch.randn(tokens, 1, generator=generator).mul(20).exp()  # from tiny to huge
        x = (torch.randn(tokens, 50, generator=generator) * size).bfloat16()
        assert torch.equal(packed.product(kernels, x, taken), packed.product(kernels, x.float(), taken).bfloat16())


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_batch(kernels: library.Library, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = draw_mask(48, 500, rows, 0.3, generator)
    taken = packed.pack(torch.randn(48, 500, generator=generator), mask, torch.randn(48, generator=generator))
    x = torch.randn(1157, 500, generator=generator).to(dtype)
    whole = packed.product(kernels, x, taken, "gelu")
    for first, last in ((0, 1), (5, 18), (60, 133), (1000, 1157)):
        assert torch.equal(packed.product(kernels, x[first:last], taken, "gelu"), whole[first:last])


def test_vectors_by_hand() -> None:
    """197 tokens on two threads, 16 in a register: 4 tiles of 4 registers take two rounds of 1.75; 7 of 2 take four."""
    assert packed.vectors_of(197, 2, 16) == 4
    assert packed.vectors_of(130, 2, 16) == 2  # three rounds of 1, two of 1.75
    assert packed.vectors_of(17, 2, 16) == 1  # one round of 0.87
    assert packed.vectors_of(3152, 2, 16) == 4


def test_chunks_by_hand() -> None:
    """Two chunks of 16 inputs for two blocks of outputs: first all of the first chunk, then all of the second."""
    assert [packed.chunk_of(inputs, 384) for inputs in (1, 384, 385, 1536, 3072)] == [16, 384, 208, 384, 384]
    assert packed.place_in_tile(torch.tensor([0, 15, 16, 35])).tolist() == [0, 15, 256, 515]


def test_one_live_weight_by_hand(kernels: library.Library) -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    taken = packed.pack(weight, weight != 0, torch.tensor([1.0, -1.0]))
    assert taken.starts.tolist() == [0, 0, 1]
    assert taken.places.tolist() == [1]
    found = packed.product(kernels, torch.tensor([[5.0, 2.0], [7.0, -1.0]]), taken)
    assert found.tolist() == [[1.0, 5.0], [1.0, -4.0]]


def test_numbers_that_are_not_finite(kernels: library.Library) -> None:
    taken = packed.pack(torch.eye(16), torch.eye(16) != 0, rows=1)
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), *[1.0] * 13]])
    torch.testing.assert_close(packed.product(kernels, x, taken), x, equal_nan=True)
    torch.testing.assert_close(packed.product(kernels, x.bfloat16(), taken).float(), x, equal_nan=True)


@pytest.mark.parametrize("size", [1, 15, 1000, masking.IN_THREADS + 3])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_masked_gradients_have_the_same_bits_as_without_a_compiler(
    kernels: library.Library, size: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    live = torch.rand(size, generator=generator) < 0.5
    gradient = torch.randn(size, generator=generator)
    gradient[:: max(1, size // 7)] = torch.inf
    expected, found = gradient.clone(), gradient.clone()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        masking.mask_gradient(expected, live, None)
        masking.mask_gradient(found, live, kernels)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(expected.view(torch.int32), found.view(torch.int32))
    strided = torch.randn(size, 2)[:, 0]
    masking.mask_gradient(strided, live, kernels)  # by the plain way
    assert not strided[~live].any()


def test_only_large_networks_compile_for_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise library.KernelError("there is none")

    monkeypatch.setattr(masking, "load_library", no_compiler)
    assert masking.masking_library(masking.WORTH, torch.device("cpu")) is None
    monkeypatch.setattr(masking, "load_library", lambda: "a library")
    assert masking.masking_library(masking.WORTH, torch.device("cpu")) == "a library"
    assert masking.masking_library(masking.WORTH - 1, torch.device("cpu")) is None
    assert masking.masking_library(masking.WORTH, torch.device("meta")) is None


def test_heights_of_blocks_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (32, 16, 8, 4, 1):
        assert packed.block_rows(draw_mask(64, 20, rows, 0.5, generator)) == rows
    assert packed.block_rows(draw_mask(63, 20, 1, 0.5, generator)) == 1


def test_tiles_are_shared_evenly() -> None:
    """197 tokens on two threads: ten tiles of 10 for each are 100 tokens, eight of 14 would be 112."""
    assert packed.tile_of(197, 2) == 10
    assert packed.tile_of(14 * 100, 1) == 14


# The whole model


def sparse_model(**arguments: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = create_model("deit_tiny_patch16_224", **{**TINY, **arguments})
    scheduler = SparsityScheduler(model, SparsityConfig(density=0.2, updates=0), total_steps=9)
    return model.eval(), scheduler.masks


@pytest.mark.parametrize("kind", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("selector", [None, {"kind": "top_k", "keep_ratio": 0.6}, {"kind": "threshold", "stages": [1]}])
def test_an_accelerated_model_computes_the_same(kind: str, selector: Any) -> None:
    model, masks = sparse_model(selector=selector)
    before = copy.deepcopy(model.state_dict())
    fast: Any = accelerate(model, masks, kernels=kind, rows=17)
    images = torch.randn(5, 1, 16, 16)
    with torch.inference_mode():
        wanted = model(images)
        torch.testing.assert_close(fast(images), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fast)(images), wanted, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fast(images).float(), wanted, atol=5e-2, rtol=5e-2)
        single = torch.cat([fast(image[None]) for image in images])
    torch.testing.assert_close(single, wanted, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [choice.layer for choice in fast.kernel_choices if choice.kernel != "attention"] == (
        [] if kind == "dense" else [name.removesuffix(".weight") for name in masks]
    )
    if kind == "sparse":
        assert isinstance(fast.get_submodule("patch_embed.proj"), SparsePatches)
        assert isinstance(fast.blocks[0].mlp.act, nn.Identity)  # it is computed with fc1
        assert "1x1: " in describe_choices(fast)
    assert not any(choice.speedup is not None and choice.speedup < 1 for choice in fast.kernel_choices)


def test_it_cannot_train_or_be_saved() -> None:
    model, masks = sparse_model()
    fast = accelerate(model, masks, kernels="sparse")
    for forbidden in (fast.train, lambda: fast.blocks.train(), fast.state_dict):  # type: ignore[union-attr,operator]
        with pytest.raises(RuntimeError, match=r"accelerated for inference.*kernels='dense'"):
            forbidden()
    assert fast.eval() is fast
    images = torch.randn(2, 1, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient passes here"):
        fast(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_gets_its_own_back(dtype: torch.dtype) -> None:
    model, masks = sparse_model()
    fast: Any = accelerate(model, masks, kernels="sparse").to(dtype)
    images = torch.randn(3, 1, 16, 16)
    with torch.inference_mode():
        found = fast(images.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), model(images), atol=5e-2, rtol=5e-2)


def test_it_cannot_be_pickled() -> None:
    model, masks = sparse_model()
    with pytest.raises(RuntimeError, match="save the model that accelerate"):
        pickle.dumps(accelerate(model, masks, kernels="sparse"))


def test_where_all_stayed_dense_it_can_be_pickled_and_still_cannot_train() -> None:
    fast: Any = accelerate(nn.Sequential(nn.Linear(3, 4)), {"0.weight": torch.ones(4, 3) > 0}, kernels="sparse")
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with pytest.raises(RuntimeError, match="was accelerated for inference"):
            again.train()
        assert again.eval() is again
        assert again.train.model is again


def test_what_is_wrong_is_said() -> None:
    model, masks = sparse_model()
    with pytest.raises(ValueError, match="'fast' is not one of auto, dense, sparse"):
        accelerate(model, masks, kernels="fast")
    with pytest.raises(ValueError, match="nothing is no parameter"):
        accelerate(model, {"nothing": torch.ones(2, dtype=torch.bool)})


def test_from_a_sparse_file(tmp_path: Path) -> None:
    model, masks = sparse_model()
    live = sum(int(mask.sum()) for mask in masks.values())
    info = SparseInfo(
        model="deit_tiny_patch16_224",
        model_args=TINY,
        budget=Budget(live, sum(mask.numel() for mask in masks.values())),
        macs=1,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
    )
    save_sparse(tmp_path / "sparse.safetensors", model, masks=masks, info=info)
    images = torch.randn(3, 1, 16, 16)
    with torch.inference_mode():
        for kernels in ("auto", "sparse", "dense"):
            loaded = load_sparse(tmp_path / "sparse.safetensors", kernels=kernels)
            torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="kernels: 'slow'"):
        load_sparse(tmp_path / "sparse.safetensors", kernels="slow")


def test_compressed_rows_and_odd_convolutions() -> None:
    layer = nn.Linear(12, 7)
    mask = torch.rand(7, 12) < 0.3
    layer.weight.data.mul_(mask)
    with torch.inference_mode():
        found = accelerating._compressed(layer)
        assert isinstance(found, CompressedRows)
        torch.testing.assert_close(found(torch.ones(2, 5, 12)), layer(torch.ones(2, 5, 12)))
        copied = copy.deepcopy(nn.Sequential(found, found))
        assert copied[0] is copied[1]
        assert torch.equal(copied[0](torch.ones(3, 12)), found(torch.ones(3, 12)))
        assert copied[0].matrix is not found.matrix
    assert accelerating._as_linear(nn.Conv2d(3, 4, 4, stride=2)) is None
    assert accelerating._as_linear(nn.Conv2d(4, 4, 4, stride=4, groups=2)) is None
    # A picture that the patches do not divide: what is left over at the edges is not read, as by the convolution.
    convolution = nn.Conv2d(3, 5, (4, 2), stride=(4, 2))
    linear = accelerating._as_linear(convolution)
    assert linear is not None
    images = torch.randn(2, 3, 11, 9)
    with torch.inference_mode():
        torch.testing.assert_close(SparsePatches(linear, (4, 2))(images), convolution(images))


# Where an activation is computed with the layer before it


def masked(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Half of these weights are dead from now on, and so the masks say."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name in names:
        weight = model.get_parameter(name)
        masks[name] = torch.rand(weight.shape, generator=generator) < 0.5
        weight.data.mul_(masks[name])
    return masks


def compare(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Any:
    """The accelerated copy, which was seen to compute the same."""
    fast: Any = accelerate(model, masks, kernels="sparse")
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    return fast


class OtherMlp(nn.Module):
    """Called ``Mlp`` and with layers of the same names, but something lies between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.fc1, self.between, self.act, self.fc2 = nn.Linear(12, 16), between, nn.GELU(), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.between(self.fc1(x))))
        return y


OtherMlp.__name__ = "Mlp"


class Between(Mlp):
    """A subclass of timm's with a ``forward`` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x) + 1))
        return y


class Named(Mlp):
    """A subclass of timm's that computes as timm's."""


def with_own_forward() -> nn.Module:
    mlp: Any = Mlp(12, 16)
    mlp.forward = MethodType(Between.forward, mlp)
    return mlp  # type: ignore[no-any-return]


def with_doubled(name: str, *, before: bool = False) -> nn.Module:
    """timm's, with a hook that doubles what goes into a layer, or what comes out of it."""
    mlp: Any = Mlp(12, 16)
    layer = mlp.get_submodule(name)
    if before:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    else:
        layer.register_forward_hook(lambda _, inputs, output: output * 2)
    return mlp  # type: ignore[no-any-return]


def with_own_activation() -> nn.Module:
    mlp: Any = Mlp(12, 16)
    mlp.act.forward = MethodType(lambda self, x: x.sigmoid(), mlp.act)
    return mlp  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda: Mlp(12, 16), True),
        (lambda: Mlp(12, 16, act_layer=nn.ReLU, norm_layer=nn.LayerNorm, bias=False, drop=0.5), True),
        (lambda: Named(12, 16), True),
        (lambda: with_doubled("drop1"), True),  # behind the activation
        (lambda: Mlp(12, 16, act_layer=lambda: nn.GELU(approximate="tanh")), False),
        (lambda: Between(12, 16), False),
        (lambda: OtherMlp(nn.LayerNorm(16)), False),
        (with_own_forward, False),
        (with_own_activation, False),
        (lambda: with_doubled("act"), False),
        (lambda: with_doubled("act", before=True), False),
        (lambda: with_doubled("fc1"), False),
        (lambda: with_doubled("fc1", before=True), False),
    ],
)
def test_an_activation_is_fused_only_where_it_follows_at_once(make: Callable[[], nn.Module], fused: bool) -> None:
    torch.manual_seed(0)
    mlp = make().eval()
    fast = compare(mlp, masked(mlp, "fc1.weight"), torch.randn(3, 5, 12))
    assert isinstance(fast.act, nn.Identity) is fused


def test_convolutions_of_an_mlp_are_not_fused() -> None:
    mlp = Mlp(12, 16, use_conv=True).eval()
    fast = compare(mlp, masked(mlp, "fc1.weight"), torch.randn(3, 12, 4, 2))
    assert isinstance(fast.fc1, SparsePatches)
    assert isinstance(fast.act, nn.GELU)


def test_who_looks_at_a_sparse_layer_sees_no_activation() -> None:
    mlp = with_doubled("act").eval()
    fast: Any = accelerate(mlp, masked(mlp, "fc1.weight"), kernels="sparse")
    fast.act._forward_hooks.clear()
    fast.fc1.register_forward_hook(lambda _, inputs, output: output * 2)
    compare(fast, {}, torch.randn(3, 12))


def test_one_layer_of_two_mlps_is_fused_in_one() -> None:
    first, second = Mlp(12, 16), Mlp(12, 16, act_layer=nn.ReLU)
    second.fc1 = first.fc1
    both = nn.Sequential(first, second).eval()
    compare(both, masked(both, "0.fc1.weight"), torch.randn(3, 12))


# Layers that are more than their product


def doubled(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda layer: layer.register_forward_hook(doubled),
    "always": lambda layer: layer.register_forward_hook(doubled, always_call=True),
    "after, by name": lambda layer: layer.register_forward_hook(
        lambda _, inputs, named, output: output * 2, with_kwargs=True
    ),
    "before": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,)),
    "before, by name": lambda layer: layer.register_forward_pre_hook(
        lambda _, inputs, named: ((inputs[0] * 2,), named), with_kwargs=True
    ),
}


@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("kind", ["auto", "sparse"])
@pytest.mark.parametrize(
    ("layer", "size"), [(nn.Linear(12, 16), (3, 12)), (nn.Conv2d(3, 16, 2, stride=2), (5, 3, 4, 6))]
)
def test_a_layer_with_hooks_stays(layer: nn.Module, size: tuple[int, ...], kind: str, hook: str) -> None:
    model = copy.deepcopy(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(12))).eval()
    model(torch.randn(size))
    HOOKS[hook](model[0])
    masks = masked(model, "0.weight")
    fast: Any = accelerate(model, masks, kernels=kind)
    x = torch.randn(size)
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x))
    (choice,) = fast.kernel_choices
    assert (choice.layer, choice.kernel, choice.why) == ("0", "dense", "hooks")
    assert describe_choices(fast) == "dense (hooks): 1 layers"


def test_hooks_of_one_layer_leave_the_others_fast() -> None:
    model, masks = sparse_model()
    mlp = model.get_submodule("blocks.0.mlp")
    for layer in (mlp.fc1, mlp.fc2):
        layer.register_forward_hook(doubled)
    fast = compare(model, masks, torch.randn(5, 1, 16, 16))
    assert [choice.layer for choice in fast.kernel_choices if choice.why] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert "1x1: 8 layers" in describe_choices(fast)
    assert "dense (hooks): 2 layers" in describe_choices(fast)


@pytest.mark.parametrize("before", [False, True])
def test_with_hooks_on_every_module_all_stay(before: bool) -> None:
    model, masks = sparse_model()

    def change(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        return (inputs[0] * 2 if before else output * 2) if type(module) in (nn.Linear, nn.Conv2d, nn.GELU) else None

    every = nn.modules.module
    handle = (every.register_module_forward_pre_hook if before else every.register_module_forward_hook)(change)
    try:
        fast = compare(model, masks, torch.randn(5, 1, 16, 16))
    finally:
        handle.remove()
    assert {choice.kernel for choice in fast.kernel_choices} == {"dense"}


class Shifted(nn.Linear):
    """A subclass with a ``forward`` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def with_forward() -> nn.Module:
    layer: Any = nn.Linear(12, 12)
    layer.forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias) + 1, layer)
    return layer  # type: ignore[no-any-return]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrized(name: str) -> nn.Module:
    layer = nn.Linear(12, 12)
    register_parametrization(layer, name, Doubled())
    return layer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Shifted(12, 12), "weight"),
        (with_forward, "weight"),
        (lambda: parametrized("weight"), "parametrizations.weight.original"),
        (lambda: parametrized("bias"), "weight"),
        (lambda: prune.random_unstructured(nn.Linear(12, 12), "weight", 0.5), "weight_orig"),
        (lambda: prune.random_unstructured(nn.Linear(12, 12), "bias", 0.5), "weight"),
    ],
)
def test_a_layer_that_computes_in_its_own_way_stays(make: Callable[[], nn.Module], name: str) -> None:
    with torch.no_grad():  # a pruned weight with a gradient cannot be copied
        model = nn.Sequential(make(), nn.ReLU()).eval()
    fast = compare(model, masked(model, f"0.{name}"), torch.randn(3, 12))
    assert type(fast[0]) is type(model[0])
    assert {choice.kernel for choice in fast.kernel_choices} <= {"dense"}
    if make is with_forward:
        assert describe_choices(fast) == "dense (own forward): 1 layers"


class Sharing(nn.Module):
    """A layer at two places, its weight in a third layer and in products of its own; likewise a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, (2, 4), stride=(2, 4))
        self.first = self.second = nn.Linear(12, 12)
        self.inner = nn.Sequential(self.first, nn.GELU())
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        again = F.conv2d(images, self.patches.weight, self.patches.bias, self.patches.stride)  # type: ignore[arg-type]
        x = (self.patches(images) + again).flatten(-2).transpose(-1, -2)
        x = self.second(self.inner(self.first(x)))
        return F.linear(self.tied(x), self.first.weight.t(), self.second.bias)


def test_layers_and_weights_at_several_places() -> None:
    torch.manual_seed(0)
    model = Sharing().eval()
    fast = compare(model, masked(model, "first.weight", "patches.weight"), torch.randn(5, 3, 4, 8))
    assert isinstance(fast.first, SparseLinear)
    assert isinstance(fast.patches, SparsePatches)
    assert torch.equal(fast.patches.weight, model.patches.weight)


@pytest.mark.parametrize("before", [False, True])
def test_weights_used_in_other_products_have_the_type_of_the_model(before: bool) -> None:
    """As in BEiT, which puts its bias together and calls ``F.linear``."""
    torch.manual_seed(0)
    model, images = Sharing().eval(), torch.randn(5, 3, 4, 8)
    masks = masked(model, "first.weight", "patches.weight")
    with torch.inference_mode():
        expected = model(images)
        if before:
            fast: Any = accelerate(model.bfloat16(), masks, kernels="sparse", dtype=torch.bfloat16)
        else:
            fast = accelerate(model, masks, kernels="sparse").bfloat16()
        torch.testing.assert_close(fast(images.bfloat16()).float(), expected, atol=5e-2, rtol=5e-2)
    assert fast.first.weight.dtype == fast.patches.weight.dtype == fast.second.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(3, 7, 9), (1, 3, 7, 9), (0, 3, 7, 9)])
def test_one_image_without_a_batch(size: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, (2, 4), stride=(2, 4)), nn.GELU()).eval()
    fast = compare(model, masked(model, "0.weight"), torch.randn(size))
    assert isinstance(fast[0], SparsePatches)


# What can go wrong with a compiler and a cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield tmp_path / "cache" / "sparse-trainer" / "kernels"
    library.load_library.cache_clear()


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_without_a_compiler_everything_works_as_before(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_compiler(monkeypatch, tmp_path)
    model, masks = sparse_model()
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found.*install one"):
        fast: Any = accelerate(model, masks, kernels="sparse")
    assert {choice.kernel for choice in fast.kernel_choices} == {"dense"}
    with torch.inference_mode():
        images = torch.randn(2, 1, 16, 16)
        assert torch.equal(fast(images), model(images))


def test_a_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(library.KernelError, match=r"broken cannot build the kernels .out of order."):
        library.load_library()
    assert list(cache.iterdir()) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Flags that are set for the test: without optimizing, a compiler is done in a fifth of the time."""
    flags = tuple("-O0" if flag == "-O3" else flag for flag in library.FLAGS)
    assert flags != library.FLAGS
    monkeypatch.setattr(library, "FLAGS", flags)
    return flags


def test_a_compiler_that_does_not_know_the_processor(quick: Sequence[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert library.open_library(library.build(("-march=nonsense",), tmp_path)).lanes in (4, 8, 16)


def test_the_cache(cache: Path, quick: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.build()
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    first = path.stat().st_mtime_ns
    assert library.build() == path
    assert path.stat().st_mtime_ns == first  # not built again
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        path.chmod(0o700)
        library.build()
        assert path.read_bytes() == whole
    second = path.stat().st_mtime_ns
    path.chmod(0o777)  # anybody might have written to it
    library.build()
    assert path.stat().st_mtime_ns != second
    assert path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the cache is a stranger's
    assert library.cache_folder() != cache


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = library.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert library._is_own(folder)


def test_two_processes_build_at_once(quick: Sequence[str], tmp_path: Path) -> None:
    code = f"from sparse_trainer.kernels import library; library.FLAGS = {quick}; print(library.load_library().lanes)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0].strip() for process in both]
    assert said[0] == said[1]
    assert said[0] in ("4", "8", "16")
    left = sorted(path.suffix for path in (tmp_path / "sparse-trainer" / "kernels").iterdir())
    assert left == [".so", ".sum"]


# On a GPU


def test_patterns_of_a_gpu_are_found() -> None:
    two = torch.tensor([[True, False, True, False], [False, False, False, True]]).repeat(8, 4)
    assert on_gpu.is_two_of_four(two)
    assert not on_gpu.is_two_of_four(~two | two)
    blocks = (torch.rand(4, 3) < 0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert on_gpu.block_side(blocks) == 32
    blocks[0, 0] ^= True
    assert on_gpu.block_side(blocks) is None
    assert on_gpu.candidates(nn.Linear(16, 16), two, torch.float32) == {}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "bsr"])
def test_products_on_a_gpu(dtype: torch.dtype, pattern: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 512).to("cuda", dtype)
    if pattern == "2:4":
        mask = torch.tensor([True, True, False, False]).repeat(512, 64).cuda()
    else:
        mask = (torch.rand(8, 4) < 0.5).repeat_interleave(64, 0).repeat_interleave(64, 1).cuda()
    layer.weight.data.mul_(mask)
    x = torch.randn(4, 64, 256, device="cuda", dtype=dtype)
    with torch.inference_mode():
        (found,) = on_gpu.candidates(layer, mask, dtype).values()
        torch.testing.assert_close(found(x), layer(x), atol=2e-2, rtol=2e-2)


def test_a_layer_says_what_it_is() -> None:
    layer = SparseLinear(library.load_library(), packed.pack(torch.eye(32), torch.eye(32) != 0))
    assert "density=0.031, kernel=1x1" in repr(layer)
    assert torch.equal(layer.weight, torch.eye(32))
