"""Attention of a sheet by our kernel: against float64, whatever the lengths, the width and the batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import create_model
from sparse_trainer import accelerate, flops
from sparse_trainer.kernels import accelerate as accelerating
from sparse_trainer.kernels.accelerate import describe_choices
from sparse_trainer.kernels.attention import attention
from sparse_trainer.kernels.library import Library
from sparse_trainer.kernels.packed import product
from tests.conftest import TINY


def drawn(tokens: int, heads: int, width: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[S, H, dh]`` as a Linear gives them: side by side."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (scale * torch.randn(tokens, 3, heads, width, generator=generator)).unbind(1)
    return query, key, value


def expected(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """In float64, image by image."""
    parts = []
    for parts_of in zip(*(x.double().split(list(lengths)) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in parts_of)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        parts.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.sampled_from([96, 97, 197])), min_size=1, max_size=4),
    heads=st.integers(1, 4),
    width=st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 80, 128])),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_attention(
    kernels: Library, lengths: list[int], heads: int, width: int, scale: float, threads: int, seed: int
) -> None:
    heads_of = drawn(sum(lengths), heads, width, seed, scale)
    torch.set_num_threads(threads)
    wanted = expected(*heads_of, lengths)
    found = attention(kernels, *heads_of, lengths)
    # Scores of some hundreds are rounded before e to their power is taken, here as anywhere in float32.
    tolerance = 1e-5 if scale < 10 else 1e-3
    assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))
    query, key, value = (x.bfloat16() for x in heads_of)
    half = attention(kernels, query, key, value, lengths)
    assert half.dtype == torch.bfloat16
    wanted = expected(query, key, value, lengths)
    torch.testing.assert_close(half.double(), wanted, atol=1e-2 * max(1.0, float(wanted.abs().max())), rtol=1e-2)


def test_by_hand(kernels: Library) -> None:
    """Two tokens of width 1: the first weighs e^1 against e^0 for a query of 1, and both the same for one of 0."""
    query, key, value = (torch.tensor(x).view(2, 1, 1) for x in ([1.0, 0.0], [1.0, 0.0], [3.0, 7.0]))
    found = attention(kernels, query, key, value, (2,)).flatten()
    share = torch.e / (1 + torch.e)
    torch.testing.assert_close(found, torch.tensor([3 * share + 7 * (1 - share), 5.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(kernels: Library, dtype: torch.dtype) -> None:
    lengths = (3, 31, 31, 100)
    heads = tuple(x.to(dtype) for x in drawn(sum(lengths), 3, 24))
    whole = attention(kernels, *heads, lengths)
    for image, part in enumerate(whole.split(lengths)):
        alone = [x.split(lengths)[image] for x in heads]
        assert torch.equal(attention(kernels, *alone, lengths[image : image + 1]), part)


def test_scores_far_below_the_greatest_and_numbers_that_are_not_finite(kernels: Library) -> None:
    query = torch.ones(3, 1, 1)
    key = torch.tensor([-1000.0, -2000.0, -1e30]).view(3, 1, 1)
    value = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert attention(kernels, query, key, value, (3,)).flatten().tolist() == [1.0, 1.0, 1.0]
    query[1] = torch.nan
    found = attention(kernels, query, key, value, (3,)).flatten()
    assert found[[0, 2]].tolist() == [1.0, 1.0]
    assert found[1].isnan()


def test_no_images_float16_and_other_strides(kernels: Library) -> None:
    assert attention(kernels, *drawn(0, 2, 8), ()).shape == (0, 2, 8)
    query, key, value = drawn(9, 2, 8)
    wanted = expected(query, key, value, (4, 5))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(attention(kernels, *turned, (4, 5)).double(), wanted, atol=1e-5, rtol=0)
    half = attention(kernels, query.half(), key.half(), value.half(), (4, 5))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), wanted, atol=1e-2, rtol=0)


# In a model


def tiny(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("deit_tiny_patch16_224", **{**TINY, **arguments}).eval()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qk_norm": True},
        {"selector": {"kind": "top_k", "keep_ratio": 0.6}},
        {"selector": {"kind": "threshold", "stages": [1], "thresholds": [0.002]}},
    ],
)
def test_a_model_without_masks_has_fast_attention(arguments: dict[str, Any], amp: bool) -> None:
    model = tiny(**arguments)
    fast: Any = accelerate(model, {}, kernels="sparse")
    assert describe_choices(fast) == "attention: 2 layers"
    assert all(hasattr(block.attn, "kernel") for block in fast.blocks)
    images = torch.randn(5, 1, 16, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        wanted, tolerance = model(images), 5e-2 if amp else 1e-5
        torch.testing.assert_close(fast(images), wanted, atol=tolerance, rtol=0)
        torch.testing.assert_close(copy.deepcopy(fast)(images), wanted, atol=tolerance, rtol=0)
    assert flops.count(fast).macs == flops.count(model).macs


def test_unequal_lengths_reach_the_kernel() -> None:
    model = tiny(selector={"kind": "threshold", "stages": [1], "thresholds": [0.005]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)  # so that patches differ in their scores
    fast: Any = accelerate(model, {}, kernels="sparse")
    seen = []
    for block in fast.blocks:
        kernel = block.attn.kernel
        block.attn.kernel = lambda q, k, v, lengths, kernel=kernel: seen.append(lengths) or kernel(q, k, v, lengths)
    with torch.inference_mode():
        fast(torch.randn(5, 1, 16, 16))
    assert seen[0] == (17,) * 5
    assert len(set(seen[1])) > 1


def test_a_mask_goes_to_timm() -> None:
    block: Any = accelerate(tiny(), {}, kernels="sparse")
    attn = block.blocks[0].attn
    plain: Any = tiny()
    x = torch.randn(2, 17, 24)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    with torch.inference_mode():
        torch.testing.assert_close(attn(x, mask), plain.blocks[0].attn(x, mask))
        torch.testing.assert_close(attn(x), plain.blocks[0].attn(x), atol=1e-5, rtol=0)


def test_no_gradient_on_the_sheet_either() -> None:
    fast = accelerate(tiny(selector={"kind": "threshold", "stages": [1], "thresholds": [0.001]}), {}, kernels="sparse")
    with pytest.raises(RuntimeError, match="no gradient passes here"):
        fast(torch.randn(4, 1, 16, 16, requires_grad=True))


def test_what_somebody_else_computes_or_looks_at_stays() -> None:
    model: Any = tiny()
    model.blocks[0].attn.forward = MethodType(
        lambda self, x, *others, **named: torch.zeros_like(x), model.blocks[0].attn
    )
    seen: list[int] = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *arguments: seen.append(1))
    model.blocks[1].attn.fused_attn = False
    images = torch.randn(2, 1, 16, 16)
    fast = accelerate(model, {}, kernels="sparse")
    assert describe_choices(fast) == "dense"
    with torch.inference_mode():
        assert torch.equal(fast(images), model(images))
    assert len(seen) == 2


@pytest.mark.parametrize("layer", ["q_norm", "k_norm", "norm", "attn_drop"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_within_see_what_timm_gives_them(layer: str, before: bool) -> None:
    model: Any = tiny(qk_norm=True)
    model.blocks[0].attn.fused_attn = False
    shapes: list[torch.Size] = []
    hooked = model.blocks[0].attn.get_submodule(layer)
    if before:
        hooked.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    else:
        hooked.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    fast = accelerate(model, {}, kernels="sparse")
    assert describe_choices(fast) == "attention: 1 layers"
    images = torch.randn(2, 1, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=0)
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


class Sharper(nn.Module):
    """In the place of a dropout: it changes how much each token looks at the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x**2


def test_scores_of_another_scale_or_changed_by_another_layer_stay() -> None:
    model: Any = tiny()
    for block in model.blocks:
        block.attn.fused_attn = False
    model.blocks[0].attn.scale = 3.0
    model.blocks[1].attn.attn_drop = Sharper()
    images = torch.randn(2, 1, 16, 16)
    fast = accelerate(model, {}, kernels="sparse")
    assert describe_choices(fast) == "dense"
    with torch.inference_mode():
        assert torch.equal(fast(images), model(images))


def test_accelerated_again() -> None:
    fast = accelerate(tiny(), {}, kernels="sparse")
    plain: Any = accelerate(fast, {}, kernels="dense")
    assert describe_choices(plain) == "dense"
    assert not any("kernel" in vars(module) or "forward" in vars(module) for module in plain.blocks.modules())
    assert describe_choices(accelerate(fast, {}, kernels="sparse")) == "attention: 2 layers"
    plain.blocks[0].attn(torch.randn(2, 17, 24, requires_grad=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*", "ignore:Accessing the data pointer")
def test_who_only_looks_on_is_told(kernels: Library) -> None:
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(lambda x: attention(kernels, x, x, x, (4,)), torch.randn(4, 2, 8))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="fake tensors"):
        attention(kernels, *[torch.randn(4, 2, 8)] * 3, (4,))


def test_layers_that_are_no_linear_ones() -> None:
    class Quantized(nn.Module):
        """As torch's quantized layers, whose weight is a function."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def weight(self) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model: Any = tiny()
    for block in model.blocks:
        block.attn.qkv = Quantized(block.attn.qkv)
    fast = accelerate(model, {}, kernels="sparse")
    assert describe_choices(fast) == "attention: 2 layers"
    images = torch.randn(2, 1, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=0)


def test_the_lowest_scores(kernels: Library) -> None:
    key = torch.tensor([-3.2e38, -3.3e38, -3.35e38]).view(3, 1, 1)
    value = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert attention(kernels, torch.ones(3, 1, 1), key, value, (3,)).flatten().tolist() == [1.0, 1.0, 1.0]


def test_nobody_waits_for_a_gradient() -> None:
    attn: Any = accelerate(tiny(), {}, kernels="sparse").blocks[0].attn  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match="no gradient passes here"):
        attn(torch.randn(2, 17, 24, requires_grad=True))


def test_auto_keeps_torch_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio, choices in ((1.0, "dense"), (2.0, "attention: 2 layers")):
        monkeypatch.setattr(accelerating, "_alternate", lambda every, x, ratio=ratio: {"ours": 1.0, "dense": ratio})
        assert describe_choices(accelerate(tiny(), {})) == choices
    assert not any(hasattr(module, "kernel") for module in accelerate(tiny(), {}, kernels="dense").modules())


def test_another_device_is_one_line_and_a_default_one_does_no_harm() -> None:
    model = tiny()
    masks = {"blocks.0.mlp.fc1.weight": torch.rand(96, 24) < 0.5}
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").mul_(masks["blocks.0.mlp.fc1.weight"])
    fast: Any = accelerate(model, masks, kernels="sparse")
    x = torch.randn(2, 17, 24)
    with torch.inference_mode():
        wanted = fast.blocks[0](x)
        with torch.device("meta"):  # what is made without a word about its place would be there
            assert torch.equal(fast.blocks[0](x), wanted)
            torch.testing.assert_close(accelerate(model, masks).blocks[0](x), wanted)
        elsewhere = torch.empty(34, 24, device="meta")
        said = "accelerated on the CPU and cannot run on meta; call accelerate"
        with pytest.raises(RuntimeError, match=said):
            product(fast.blocks[0].mlp.fc1.library, elsewhere, fast.blocks[0].mlp.fc1.packed)
        with pytest.raises(RuntimeError, match=said):
            fast.blocks[0].attn.kernel(*[elsewhere.view(34, 3, 8)] * 3, (17, 17))
