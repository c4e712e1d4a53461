"""Makes a trained sparse model fast: every layer gets the product that is fastest for it, on the machine at hand.

``auto`` times each layer's candidates once, dense ones among them, so that no layer becomes slower. Layers of the same
shape, density and pattern share a timing.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_trainer.kernels import on_gpu
from sparse_trainer.kernels.attention import attention, find_attention, with_kernel, without_kernel
from sparse_trainer.kernels.layers import (
    FOR_INFERENCE,
    CompressedRows,
    SparseLinear,
    SparsePatches,
    is_just,
    is_looked_at,
)
from sparse_trainer.kernels.library import KernelError, Library, load_library
from sparse_trainer.kernels.packed import DTYPES, block_rows, pack
from sparse_trainer.wrappers import unwrapped

KERNELS = ("auto", "dense", "sparse")
LEAST_GAIN = 1.03
"""A candidate replaces the dense product only where it is faster by this factor, which is more than the noise."""
PAIRS = 5
ROWS = 1024
"""Tokens that a candidate is timed with, at most."""
SOME_TOKENS = 197
"""Of an image, where a model does not say."""
FEW_LIVE = 0.2
"""Density up to which compressed rows may be worth trying."""


@dataclass(frozen=True)
class Choice:
    """What one layer computes with."""

    layer: str
    kernel: str  #: ``dense``, ``16x1``, ``1x1``, ``csr``, ``2:4``, ``bsr 32x32``; or ``attention``
    density: float
    speedup: float | None  #: over the dense product where it was timed
    why: str = ""  #: it stays dense untimed: ``hooks`` would go with the layer, or its ``own forward``


def accelerate(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    kernels: str = "auto",
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A copy of a model for inference, with the fastest kernels for its layers. The model itself stays as it is.

    Every ``Linear`` with a mask may be replaced, and a patch embedding whose stride is its kernel; one with hooks, or
    with a ``forward`` of its own, stays as it is. An activation that follows ``fc1`` of timm's ``Mlp`` is computed with
    it. On a CPU attention has a kernel too, with or without masks,
    that takes images of unequal lengths at once. What was chosen is in ``result.kernel_choices``.

    Args:
        model: dense or compact, on its device; its dead weights are 0.
        masks: bool, by parameter name (``scheduler.masks``, or ``load_sparse_masks`` of a file).
        kernels: ``auto`` keeps what is fastest for each layer, ``sparse`` takes a sparse product for every layer that
            has one, ``dense`` changes nothing.
        rows: tokens to time with: those of a batch.
        dtype: that products are computed in: float32, bfloat16 or (on a GPU) float16.

    Returns:
        the copy, in eval mode. It cannot train.

    Raises:
        ValueError: for unknown ``kernels``, or a mask that is of no parameter.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: {kernels!r} is not one of {', '.join(KERNELS)}")
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    odd = [name for name, mask in masks.items() if name not in parameters or parameters[name].shape != mask.shape]
    if odd:
        raise ValueError(f"masks: {odd[0]} is no parameter of this model, or of another shape")
    result: Any = copy.deepcopy(model).eval()
    without_kernel(result)
    if kernels == "dense":
        result.kernel_choices = ()
        return result
    result.requires_grad_(False)
    library, why = None, ""
    try:
        library = load_library()
    except KernelError as error:
        why = str(error)
    if why and masks and next(iter(parameters.values())).device.type == "cpu":
        warnings.warn(why, stacklevel=2)
    chooser = _Chooser(library, kernels, rows, dtype)
    modules = dict(result.named_modules())
    choices = []
    for name, mask in masks.items():
        layer_name = name.removesuffix(".weight")
        layer = modules.get(layer_name)
        if layer is None or not name.endswith(".weight"):
            continue
        made, choice = chooser.choose(layer_name, layer, mask.to(parameters[name].device))
        choices.append(choice)
        if made is not layer:
            owner, _, leaf = layer_name.rpartition(".")
            setattr(result.get_submodule(owner), leaf, made)
    _fuse_activations(result)
    if library is not None and next(iter(parameters.values())).device.type == "cpu":
        choices += chooser.choose_attention(library, result)
    result.kernel_choices = tuple(choices)
    result.train = _StaysInEval(result)
    return result


def describe_choices(model: nn.Module) -> str:
    """Which kernels an accelerated model computes with, as one line."""
    counts: dict[str, int] = {}
    for choice in getattr(model, "kernel_choices", ()):
        kernel = f"{choice.kernel} ({choice.why})" if choice.why else choice.kernel
        counts[kernel] = counts.get(kernel, 0) + 1
    return ", ".join(f"{kernel}: {count} layers" for kernel, count in sorted(counts.items())) or "dense"


class _StaysInEval:
    """``train()`` of an accelerated model; copied and saved along with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(FOR_INFERENCE)
        return nn.Module.train(self.model, False)


class _Chooser:
    def __init__(self, library: Library | None, kernels: str, rows: int, dtype: torch.dtype) -> None:
        self.library, self.kernels, self.rows, self.dtype = library, kernels, max(1, min(rows, ROWS)), dtype
        self._known: dict[tuple[Any, ...], tuple[str, float]] = {}

    def choose(self, name: str, layer: nn.Module, mask: Tensor) -> tuple[nn.Module, Choice]:
        """The layer to compute with, which may be the one that is there."""
        linear = _as_linear(layer)
        density = float(mask.float().mean())
        if linear is None or density == 1.0:
            return layer, Choice(name, "dense", density, None)
        if not is_just(layer, nn.Linear, nn.Conv2d):
            why = "hooks" if is_looked_at(layer) else "own forward"
            return layer, Choice(name, "dense", density, None, why)
        flat = mask.reshape(mask.shape[0], -1)
        found = self._candidates(linear, flat, density)
        if not found:
            return layer, Choice(name, "dense", density, None)
        if self.kernels == "sparse":
            kernel, speedup = next(iter(found)), None
        else:
            key = (tuple(flat.shape), round(density, 2), *found)
            if key not in self._known:
                self._known[key] = self._time(linear, {kernel: make() for kernel, make in found.items()})
            kernel, speedup = self._known[key]
        if kernel not in found:
            return layer, Choice(name, "dense", density, speedup)
        made: Any = found[kernel]()
        made.given = linear.weight.dtype
        if isinstance(layer, nn.Conv2d):
            height, width = layer.kernel_size
            made = SparsePatches(made, (height, width))
        return made, Choice(name, kernel, density, speedup)

    def choose_attention(self, library: Library, model: nn.Module) -> list[Choice]:
        """Let our kernel compute the attention of blocks where it is faster; which ones."""
        known: dict[tuple[int, int], float | None] = {}
        chosen: list[Choice] = []
        if self.dtype not in DTYPES:
            return chosen
        for name, attn in find_attention(model).items():
            size = attn.num_heads, attn.head_dim
            if size not in known:
                known[size] = None if self.kernels == "sparse" else self._time_attention(library, model, *size)
            speedup = known[size]
            if speedup is None or speedup >= LEAST_GAIN:
                with_kernel(attn, library)
                chosen.append(Choice(name, "attention", 1.0, speedup))
        return chosen

    @torch.inference_mode()
    def _time_attention(self, library: Library, model: nn.Module, heads: int, width: int) -> float:
        """How many times as fast as torch's our kernel is, for images of one length."""
        embed = getattr(model, "patch_embed", None)
        tokens = int(getattr(embed, "num_patches", 0)) + int(getattr(model, "num_prefix_tokens", 0)) or SOME_TOKENS
        images = max(1, self.rows // tokens)
        sheet = torch.randn(images * tokens, 3, heads, width, device="cpu").to(self.dtype)

        def ours(sheet: Tensor) -> Tensor:
            return attention(library, *sheet.unbind(1), (tokens,) * images)

        def dense(sheet: Tensor) -> Tensor:
            query, key, value = sheet.unflatten(0, (images, tokens)).transpose(1, 3).unbind(2)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, heads, width)

        medians = _alternate({"ours": ours, "dense": dense}, sheet)
        return medians["dense"] / medians["ours"]

    def _candidates(self, linear: nn.Linear, mask: Tensor, density: float) -> dict[str, Callable[[], nn.Module]]:
        """What makes them, by name, the likeliest first."""
        if linear.weight.device.type == "cuda":
            made = on_gpu.candidates(linear, mask, self.dtype)
            return {kernel: lambda layer=layer: layer for kernel, layer in made.items()}  # type: ignore[misc]
        if linear.weight.device.type != "cpu" or self.dtype not in DTYPES:
            return {}
        found: dict[str, Callable[[], nn.Module]] = {}
        library = self.library
        if library is not None:
            rows = block_rows(mask)
            found[f"{rows}x1"] = lambda: SparseLinear(library, pack(linear.weight, mask, linear.bias, rows))
        if density <= FEW_LIVE and self.kernels == "auto":
            found["csr"] = lambda: _compressed(linear)
        return found

    @torch.inference_mode()
    def _time(self, linear: nn.Linear, found: Mapping[str, nn.Module]) -> tuple[str, float]:
        """The fastest, and how many times as fast as the dense layer; ``dense`` where that is it."""
        x = torch.randn(self.rows, linear.in_features, device=linear.weight.device).to(self.dtype)
        medians = _alternate({"dense": copy.deepcopy(linear).to(self.dtype), **found}, x)
        best = min(found, key=lambda kernel: medians[kernel])
        speedup = medians["dense"] / medians[best]
        return (best, speedup) if speedup >= LEAST_GAIN else ("dense", 1.0)


def _alternate(every: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Seconds that each takes for ``x``: medians of runs in turns, after one to warm up."""
    seconds: dict[str, list[float]] = {kernel: [] for kernel in every}
    for _ in range(PAIRS + 1):
        for kernel, run in every.items():
            _wait(x.device)
            started = time.perf_counter()
            run(x)
            _wait(x.device)
            seconds[kernel].append(time.perf_counter() - started)
    return {kernel: statistics.median(times[1:]) for kernel, times in seconds.items()}


def _compressed(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout is in beta
        return CompressedRows(linear.weight, linear.bias)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _as_linear(layer: nn.Module) -> nn.Linear | None:
    """A layer as a ``Linear`` over flat inputs: itself, or a convolution over patches that do not overlap."""
    if type(layer) is nn.Linear:
        return layer
    if (
        type(layer) is nn.Conv2d
        and layer.stride == layer.kernel_size
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding in ((0, 0), "valid")
    ):
        weight = layer.weight.detach().flatten(1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return linear
    return None


def _fuse_activations(model: nn.Module) -> None:
    """Let the kernel of ``fc1`` compute the activation after it, where timm's ``Mlp`` has one that it knows.

    The class itself, by its ``forward``: in others of that name something may lie between the two.
    """
    for module in model.modules():
        if not isinstance(module, Mlp) or type(module).forward is not Mlp.forward or "forward" in vars(module):
            continue
        mlp: Any = module
        if not is_just(mlp.fc1, SparseLinear):
            continue
        if is_just(mlp.act, nn.GELU) and mlp.act.approximate == "none":
            mlp.fc1.activation = "gelu"
        elif is_just(mlp.act, nn.ReLU):
            mlp.fc1.activation = "relu"
        else:
            continue
        mlp.act = nn.Identity()
