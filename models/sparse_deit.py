"""A timm VisionTransformer that may hold a token selector.

Without one, :func:`create_model` returns timm's own model. With one, the model is a subclass of timm's class:
the same parameters under the same names, and ``selector.*`` beside them.

The number of heads and neurons is read from a block whenever it runs, so blocks may be compact.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, to_2tuple
from timm.models import get_pretrained_cfg
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.adaptive_tokens import run_with_thresholds
from models.blocks import attend_gated, run_block
from models.choosing import gather_tokens
from models.fusing import fuse
from models.selection import Selection
from models.selector_config import SelectorConfig
from models.threshold_selector import ThresholdSelector
from models.top_k_selector import TopKSelector

#: Names of this project: timm's name and the arguments that make it what it is.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_quickstart": (
        "deit_tiny_patch16_224",
        {
            "img_size": 28,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 64,
            "depth": 6,
            "num_heads": 4,
            "num_classes": 10,
        },
    ),
}


class _SelectsTokens(VisionTransformer):
    """What a VisionTransformer needs to hold a selector. Comes before timm's class in the bases."""

    selector: TopKSelector | ThresholdSelector
    #: While a block runs on a sheet ``[S, C]`` of the tokens of all images: number in the batch of each row's image
    #: ``[S]``, and how many images there are. For whoever hooks into a layer and counts by image.
    sheet_rows: tuple[Tensor, int] | None = None

    def set_progress(self, fraction: float) -> None:
        """Say how far training has come, 0 to 1: the temperature of a top-k selector follows it.

        Raises:
            ValueError: the fraction lies outside 0 to 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"progress is {fraction}; give the share of training that is done, 0 to 1")
        self.selector.set_progress(fraction)

    def no_sparsity(self) -> set[str]:
        """Prefixes of parameters that are never pruned."""
        return {"selector"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: timm's, and the thresholds."""
        return {*super().no_weight_decay(), "selector.thresholds"}

    def forward(  # type: ignore[override]
        self, x: Tensor, return_selection: bool = False
    ) -> Tensor | tuple[Tensor, Selection]:
        """Logits of images ``[B, in_chans, H, W]``; with ``return_selection`` also what was kept.

        In evaluation a threshold selector removes tokens image by image: the logits of an image do not
        depend on its batch, and its dropped patches cost nothing.
        """
        tokens, selection = self._select_and_run(x)
        logits = self.forward_head(self.norm(tokens))
        return (logits, selection) if return_selection else logits

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised tokens as the head reads them.

        Top-k: prefix tokens and kept patches ``[B, P + K, C]``, and behind them what was fused. Threshold: the prefix
        tokens ``[B, P, C]``, because every image keeps another number of patches.
        """
        return self.norm(self._select_and_run(x)[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's.

        Raises:
            ValueError: a pooling over patches, with a threshold selector.
        """
        if isinstance(self.selector, ThresholdSelector) and global_pool not in (None, "token"):
            raise ValueError(f"global_pool is {global_pool!r}; the threshold selector needs 'token'")
        super().reset_classifier(num_classes, global_pool)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: timm's walk over the blocks would skip the selector.

        Raises:
            ValueError: always.
        """
        raise ValueError("forward_intermediates would run without the selector; create the model without one")

    def _select_and_run(self, x: Tensor) -> tuple[Tensor, Selection]:
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        if isinstance(self.selector, TopKSelector):
            return self._run_top_k(self.selector, x)
        return run_with_thresholds(cast(Any, self), self.selector, x, self._call)

    def _run_top_k(self, selector: TopKSelector, x: Tensor) -> tuple[Tensor, Selection]:
        """Gather what each stage keeps; what it fuses comes last. ``x``: ``[B, P + N, C]``."""
        prefix = self.num_prefix_tokens
        batch, everything = x.shape[0], x.shape[1] - prefix
        patches = everything
        positions = torch.arange(patches, device=x.device).expand(batch, -1)
        masks: list[Tensor] = []
        config = selector.config
        for number, block in enumerate(self.blocks):
            if number in selector.stages:
                first, live, fused = x.split([prefix, patches, x.shape[1] - prefix - patches], dim=1)
                indices, factor = selector(live, len(masks))
                kept_factor = factor.gather(1, indices)
                positions = positions.gather(1, indices)
                kept = live if config.zeroing else gather_tokens(live, indices)
                if config.zeroing:
                    kept = kept * factor.unsqueeze(-1).to(x.dtype)
                elif self.training and config.gradient == "factor":
                    kept = kept * kept_factor.unsqueeze(-1).to(x.dtype)
                parts = [first, kept, fused]
                if config.dropped == "fused" and indices.shape[1] < patches:
                    parts.append(fuse(live, selector.score(live, len(masks)).softmax(dim=1), factor))
                masks.append(factor.new_zeros(batch, everything).scatter(1, positions, kept_factor))
                x, patches = torch.cat(parts, dim=1), kept.shape[1]
                if self.training and config.gradient == "attention":
                    behind = x.shape[1] - prefix - patches
                    x = self._call(_run_block_gated, block, x, F.pad(kept_factor, (prefix, behind), value=1.0))
                    continue
            x = self._call(block, x)
        return x, Selection(
            selector.stages, tuple(masks), prefix, removes=not config.zeroing, fuses=config.dropped == "fused"
        )

    @property
    def _call(self) -> Callable[..., Any]:
        """Calls a function; with ``set_grad_checkpointing``, backward computes its activations again.

        The same object at every step: for a new one, such as a bound method, older releases of torch compile again.
        """
        return _with_checkpoint if self.grad_checkpointing and torch.is_grad_enabled() else _plainly


def _plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _with_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def _run_block_gated(block: Block, x: Tensor, factor: Tensor) -> Tensor:
    def attend_to(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return attend_gated(cast(Attention, block.attn), q, k, v, factor=factor), None

    return run_block(block, x, attend_to)[0]


class SparseVisionTransformer(_SelectsTokens):
    """timm's VisionTransformer with a selector."""


class SparseVisionTransformerDistilled(_SelectsTokens, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with a selector."""


_WITH_SELECTOR: dict[type[nn.Module], type[_SelectsTokens]] = {
    VisionTransformer: SparseVisionTransformer,
    VisionTransformerDistilled: SparseVisionTransformerDistilled,
}


def add_selector(model: nn.Module, config: SelectorConfig) -> nn.Module:
    """Give a timm VisionTransformer a selector, in place. Its weights stay as they are.

    Raises:
        ValueError: lists everything about the model that the selector cannot work with.
    """
    holder = _WITH_SELECTOR.get(type(model))
    if holder is None:
        raise ValueError(
            f"selector: the model is of timm's class {type(model).__name__}; selectors work with VisionTransformer, "
            "which is that of deit_*, deit3_* and most of vit_*; without one (null) the model can be trained"
        )
    assert isinstance(model, VisionTransformer)
    assert config.stages is not None
    problems = []
    depth = len(model.blocks)
    if config.stages[-1] >= depth:
        scaled = sorted({max(1, round(stage * depth / 12)) for stage in (4, 7, 10)})
        hint = f"; the published (4, 7, 10) of 12 are {tuple(scaled)} here" if config.kind == "threshold" else ""
        problems.append(f"stages is {config.stages}, but the model has {depth} blocks: give at most {depth - 1}{hint}")
    if not model.has_class_token:
        problems.append("the model has no class token")
    if not isinstance(model.patch_drop, nn.Identity):
        problems.append("patch_drop_rate drops patches at random; leave it at 0")
    if config.kind == "threshold" and model.global_pool != "token":
        problems.append(f"global_pool is {model.global_pool!r}; the threshold selector needs 'token'")
    reads_attention = config.kind == "threshold" or config.gradient == "attention"
    if reads_attention and not all(type(block) is Block and type(block.attn) is Attention for block in model.blocks):
        kind, way = type(model.blocks[0]).__name__, "" if config.kind == "threshold" else " (gradient: factor any)"
        problems.append(f"the blocks are {kind}; the {config.kind} selector knows timm's Block with Attention{way}")
    elif config.kind == "threshold" and any(cast(Any, block).attn.attn_drop.p for block in model.blocks):
        problems.append("attn_drop_rate drops attention at random, which the threshold selector cannot; leave it at 0")
    if problems:
        raise ValueError("selector: " + "; ".join(problems))

    selector = (TopKSelector(config, model.embed_dim) if config.kind == "top_k" else ThresholdSelector(config)).to(
        next(model.parameters())
    )
    model.__class__ = holder  # timm's entry points build timm's class and no other
    model.selector = selector
    return model


def resolve(name: str, kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """timm's name and all arguments for ``name``, so that ``timm.create_model`` alone builds the dense model.

    Args:
        name: a timm name (also with a pretrained tag, or a source such as ``hf-hub:``), or an alias.
        kwargs: timm arguments; they win over those of an alias.

    Raises:
        ValueError: the name is unknown.
    """
    kwargs = dict(kwargs or {})
    if name in ALIASES:
        timm_name, defaults = ALIASES[name]
        if kwargs.get("pretrained"):
            raise ValueError(f"pretrained: there are no pretrained weights for {name!r}; use a timm name")
        return timm_name, {**defaults, **kwargs}
    if ":" in name:
        return name, kwargs
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*ALIASES, *timm.list_models()]
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        hint = f"close names: {', '.join(close)}" if close else "timm.list_models('*deit*') lists the DeiT names"
        raise ValueError(f"unknown model name {name!r}; {hint}")
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            tagged = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
            raise ValueError(f"unknown pretrained tag {tag!r} of {architecture!r}; known: {tagged}") from None
    return name, kwargs


def create_model(
    name: str, *, selector: SelectorConfig | Mapping[str, Any] | None = None, **timm_kwargs: Any
) -> nn.Module:
    """Build a timm model, with a token selector if asked.

    Args:
        name: a timm name or an alias, see :func:`resolve`.
        selector: what and where to drop. None: exactly timm's model.
        timm_kwargs: passed to ``timm.create_model`` (``img_size``, ``patch_size``, ``pretrained``, ...).

    Raises:
        ValueError: the name is unknown, the patch size does not divide the image size, or the model cannot
            hold the selector.
    """
    timm_name, kwargs = resolve(name, timm_kwargs)
    if selector is not None and not isinstance(selector, SelectorConfig):
        selector = SelectorConfig.from_mapping(selector)
    model = timm.create_model(timm_name, **kwargs)
    if kwargs.keys() & {"img_size", "patch_size"} and not kwargs.get("dynamic_img_pad"):
        _check_grid(model)
    return model if selector is None else add_selector(model, selector)


def _check_grid(model: nn.Module) -> None:
    """Refuse an image size that the patch size does not divide; timm would cut the rest off."""
    embed = getattr(model, "patch_embed", None)
    img_size, patch_size = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if img_size is None or patch_size is None:
        return
    img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)  # XCiT keeps one number
    if any(side % patch for side, patch in zip(img_size, patch_size, strict=True)):
        raise ValueError(f"patch_size {patch_size} does not divide img_size {img_size}; choose sizes that fit")
