"""Which image patches are worth looking at: functions over tensors, and two modules that learn it.

*Top-k* (SViTE+, arXiv 2106.04533): a linear scorer, Gumbel noise, the same number of patches for every image.
*Threshold* (AS-ViT, arXiv 2209.13802): head-weighted class attention against a learned threshold, so every
image keeps its own number of patches.

Prefix tokens (class, distillation, registers) are always kept, and every image keeps at least one patch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Scores of the threshold selector are expressed for this many tokens (DeiT at 224 pixels, patch 16), the
#: size for which the thresholds were published; see :func:`head_weighted_scores`.
REFERENCE_TOKENS = 197

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "top_k": ("keep_ratio", "gradient", "noise", "tau_start", "tau_end", "zeroing", "seed"),
    "threshold": ("thresholds", "temperature"),
}
_DEFAULT_STAGES: dict[str, tuple[int, ...]] = {"top_k": (0,), "threshold": (4, 7, 10)}


def _is_number(value: object) -> bool:
    """Whether it is a number that float32 holds."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(cast(float, value)) <= torch.finfo(torch.float32).max


def _is_positive(value: object) -> bool:
    return _is_number(value) and cast(float, value) >= torch.finfo(torch.float32).tiny


def _as_tuple(value: object) -> tuple[Any, ...]:
    """A list as JSON and YAML give it; anything else alone, for the checks to refuse."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


@dataclass(frozen=True)
class SelectorConfig:
    """Which patches are dropped, where, and how that is learned. Checked when built.

    Raises:
        ValueError: lists everything that is wrong, a setting that the chosen kind would ignore included.
    """

    kind: Literal["top_k", "threshold"] = "top_k"
    """Keep as many patches of every image (top_k, SViTE+) or those whose score exceeds a threshold (AS-ViT)."""
    stages: tuple[int, ...] | None = None
    """Patches are dropped before these blocks (0: right after the position embedding). null: [0] for top_k, [4, 7, 10]
    for threshold, which needs the attention of the block before and so starts at 1."""
    keep_ratio: float = 0.7
    """top_k: patches kept over patches that reach a stage."""
    gradient: Literal["factor", "attention"] = "factor"
    """top_k: by what the scorer learns that a kept patch was worth it. factor: what the loss would gain if the patch
    were multiplied by more than 1 (published). attention: if the other tokens looked at it more, in the block that
    follows. From a trained network the latter, without noise, chose far better than the former with it; from scratch at
    the input they could not be told apart."""
    noise: float = 1.0
    """top_k: of the Gumbel noise that scores get in training, which tries out other patches than evaluation takes (1:
    published; 0: none)."""
    tau_start: float = 10.0
    """top_k: softmax temperature at the start of training."""
    tau_end: float = 0.1
    """top_k: and at its end; linear in between."""
    zeroing: bool = False
    """top_k: zero the dropped patches and carry them along, as the published code does. Saves no time."""
    seed: int = 0
    """top_k: of the generator that draws the Gumbel noise."""
    thresholds: tuple[float, ...] | None = None
    """threshold: one initial value per stage, for 197 tokens. null: 0.001, 0.002, 0.003, ..."""
    temperature: float = 1e4
    """threshold: slope of the sigmoid that carries the gradient, for 197 tokens."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not isinstance(self.kind, str) or self.kind not in _DEFAULT_STAGES:
            raise ValueError(f"selector.kind is {self.kind!r}; choose one of {', '.join(_DEFAULT_STAGES)}")

        stages = _as_tuple(self.stages) if self.stages is not None else _DEFAULT_STAGES[self.kind]
        object.__setattr__(self, "stages", stages)
        lowest = 0 if self.kind == "top_k" else 1
        if not stages or any(isinstance(stage, bool) or not isinstance(stage, int) for stage in stages):
            problems.append(f"stages is {stages}; give one or more block numbers")
        elif list(stages) != sorted(set(stages)) or stages[0] < lowest:
            needs = "" if lowest == 0 else " (the threshold reads the attention of the block before)"
            problems.append(f"stages is {stages}; give ascending block numbers from {lowest}{needs}")

        if self.kind == "threshold":
            default = tuple(round(0.001 * (stage + 1), 6) for stage in range(len(stages)))
            thresholds = _as_tuple(self.thresholds) if self.thresholds is not None else default
            object.__setattr__(self, "thresholds", thresholds)
            if len(thresholds) != len(stages):
                problems.append(f"thresholds is {thresholds}; give one for each of the {len(stages)} stages")
            if not all(map(_is_number, thresholds)):
                problems.append(f"thresholds is {thresholds}; give numbers")
            if not _is_positive(self.temperature):
                problems.append(f"temperature is {self.temperature!r}; give a positive number")
        else:
            if not (_is_positive(self.keep_ratio) and self.keep_ratio <= 1):
                problems.append(f"keep_ratio is {self.keep_ratio!r}; give a number above 0 and at most 1")
            for key in ("tau_start", "tau_end"):
                if not _is_positive(getattr(self, key)):
                    problems.append(f"{key} is {getattr(self, key)!r}; give a positive number")
            if self.gradient not in ("factor", "attention"):
                problems.append(f"gradient is {self.gradient!r}; choose factor or attention")
            if not (_is_number(self.noise) and self.noise >= 0):
                problems.append(f"noise is {self.noise!r}; give 0 (none) or a positive number (1: as published)")
            if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
                problems.append(f"seed is {self.seed!r}; give a whole number from 0 to 2^63 - 1")
            if not isinstance(self.zeroing, bool):
                problems.append(f"zeroing is {self.zeroing!r}; give true or false")
            if self.zeroing and self.gradient != "factor":
                problems.append("zeroing multiplies by the mask; it needs gradient: factor")
            if self.zeroing and len(stages) > 1:
                problems.append(f"zeroing is there for one stage; stages is {stages}")

        other = "threshold" if self.kind == "top_k" else "top_k"
        defaults = {f.name: f.default for f in fields(self)}
        for key in _ONLY_FOR[other]:
            if getattr(self, key) != defaults[key]:
                problems.append(f"{key} is {getattr(self, key)}, but only kind {other!r} reads it")
        if problems:
            raise ValueError("selector: " + "; ".join(problems))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SelectorConfig:
        """Inverse of :meth:`to_dict`; a key that is missing takes its default.

        Raises:
            ValueError: no mapping, an unknown key, or a value that :class:`SelectorConfig` refuses.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"selector is {values!r}; give a mapping with some of {', '.join(known)}")
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ValueError(f"selector: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))


@dataclass(frozen=True)
class Selection:
    """What the selector chose for a batch of B images with N patches each."""

    stages: tuple[int, ...]  #: block before which each choice was made
    #: per stage ``[B, N]`` over the original patch grid, row-major: 1 kept, 0 dropped (here or before).
    #: In training it carries the straight-through gradient; of a top-k selector that of kept patches alone.
    masks: tuple[Tensor, ...]
    num_prefix_tokens: int
    removes: bool = True  #: dropped patches leave the computation (False: they are zeroed and carried along)

    @property
    def counts(self) -> Tensor:
        """Kept patches ``[B, stages]``, whole numbers."""
        return torch.stack([(mask > 0.5).sum(dim=1) for mask in self.masks], dim=1)

    def kept(self, stage: int) -> list[Tensor]:
        """Per image, the ascending positions on the patch grid that stage number ``stage`` kept."""
        return [row.nonzero().flatten() for row in self.masks[stage] > 0.5]


def tokens_per_block(selection: Selection, depth: int) -> Tensor:
    """Tokens that enter each block, prefix tokens included: ``[B, depth]``.

    Differentiable in the masks, so that a MACs formula over it can train the thresholds.
    """
    first = selection.masks[0]
    every = first.new_full((first.shape[0],), selection.num_prefix_tokens + first.shape[1])
    columns = []
    tokens = every
    for block in range(depth):
        if selection.removes and block in selection.stages:
            mask = selection.masks[selection.stages.index(block)]
            tokens = selection.num_prefix_tokens + mask.sum(dim=1)
        columns.append(tokens)
    return torch.stack(columns, dim=1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def _wide(x: Tensor) -> Tensor:
    """At least float32: scores near a threshold must not depend on the precision of autocast."""
    return x if x.dtype == torch.float64 else x.float()


def perturb(logits: Tensor, noise: Tensor | None) -> Tensor:
    """``log_softmax(logits) + noise`` over the patches ``[B, N]``, whose softmax over ``tau`` is SViTE+'s."""
    log_shares = F.log_softmax(_wide(logits), dim=1)
    return log_shares if noise is None else log_shares + noise


def top_k_indices(scores: Tensor, count: int) -> Tensor:
    """Positions ``[B, count]``, ascending, of the ``count`` greatest of ``scores`` ``[B, N]``.

    Of equal scores the first positions win: a choice that an image's neighbours in the batch cannot change.
    (A stable sort would say so in one line, but cannot be exported to ONNX.)
    """
    # After a step that diverged the loss should be nan, not this an index error.
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    least = scores.topk(count, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    missing = count - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1) <= missing))
    patches = scores.shape[1]
    places = torch.arange(patches, device=scores.device)
    return torch.where(keep, places, patches).sort(dim=1).values[:, :count]


def kept_count(keep_ratio: float, patches: int) -> int:
    """``round(keep_ratio * patches)``, at least 1."""
    return max(1, round(keep_ratio * patches))


def as_many_at_random(keep: Tensor, live: Tensor, generator: torch.Generator) -> Tensor:
    """For every image as many of its live patches as ``keep`` has, drawn at random.

    Args:
        keep: bool ``[B, N]``, within ``live``.
        live: bool ``[B, N]``.
        generator: on the CPU, so that a seed draws the same everywhere.

    Returns:
        bool ``[B, N]``.
    """
    noise = torch.rand(keep.shape, generator=generator).to(keep.device).masked_fill(~live, 2.0)
    return noise.argsort(dim=1).argsort(dim=1) < keep.sum(dim=1, keepdim=True)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """``tokens`` ``[B, N, C]`` at ``indices`` ``[B, K]``: ``[B, K, C]``."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class TopKSelector(nn.Module):
    """Keeps the ``keep_ratio`` best patches by a learned linear score, at each of its stages."""

    tau: Tensor

    def __init__(self, config: SelectorConfig, width: int) -> None:
        super().__init__()
        assert config.kind == "top_k"
        assert config.stages is not None
        self.config = config
        self.stages = config.stages
        self.scorers = nn.ModuleList(nn.Linear(width, 1) for _ in config.stages)
        for scorer in self.scorers:
            assert isinstance(scorer, nn.Linear)
            nn.init.trunc_normal_(scorer.weight, std=0.02)
            nn.init.zeros_(scorer.bias)
        # On the CPU whatever the model's device: the same seed draws the same noise everywhere.
        self.generator = torch.Generator().manual_seed(config.seed)
        #: (rank, size): of the processes that share each batch. Each draws the noise of the whole and takes its own
        #: part, in the order of the ranks, so that the batch is given the same noise however it is shared.
        self.share = (0, 1)
        #: In evaluation: draw as many patches at random in place of the best. What a score is worth is what it is worth
        #: beyond that.
        self.chance: torch.Generator | None = None
        # A tensor, so that a compiled training step is not compiled again for each temperature.
        self.register_buffer("tau", torch.tensor(float(config.tau_start)), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Fill what no state dict holds, for a model that was built without memory (timm's convention)."""
        self.tau = torch.tensor(float(self.config.tau_start), device=self.tau.device if not self.tau.is_meta else None)

    def set_progress(self, fraction: float) -> None:
        """Set the temperature for this fraction of training, 0 to 1."""
        self.tau.fill_(self.config.tau_start + fraction * (self.config.tau_end - self.config.tau_start))

    def get_extra_state(self) -> Tensor:
        """State of the noise generator, as bytes."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        # The file may be a stranger's; torch would read beyond its 624 words where these two do not go together.
        left, _, following = struct.unpack("<iiQ", bytes(state[8:24].cpu().numpy()))
        if left + following not in (1, 625):
            raise ValueError(f"selector: a random state at word {following} of 624 with {left} left, which cannot be")
        self.generator.set_state(state.cpu())

    @torch.compiler.disable
    def _noise(self, like: Tensor) -> Tensor:
        """Standard Gumbel noise in the shape of ``like``."""
        rank, size = self.share
        images, patches = like.shape
        uniform = torch.rand(size * images, patches, generator=self.generator, dtype=like.dtype)
        uniform = uniform[rank * images : (rank + 1) * images]
        tiny = torch.finfo(uniform.dtype).tiny
        return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log().to(like.device)

    def forward(self, patches: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Choose among the patches ``[B, N, C]`` that reach stage number ``stage``.

        Returns:
            positions ``[B, K]``, ascending, and the factor ``[B, N]`` that carries the gradient: its value is
            1 where kept, 0 elsewhere. In evaluation there is no noise, and it carries no gradient.
        """
        scorer = cast(nn.Linear, self.scorers[stage])
        with torch.autocast(patches.device.type, enabled=False):
            logits = F.linear(_wide(patches), _wide(scorer.weight), _wide(scorer.bias)).squeeze(-1)
        count = kept_count(self.config.keep_ratio, logits.shape[1])
        if self.training:
            noise = self.config.noise * self._noise(logits) if self.config.noise else None
            perturbed = perturb(logits, noise)
            soft = F.softmax(perturbed / self.tau, dim=1)
            # Not of soft: at a low temperature most of it is 0, and the first of equal patches would win.
            indices = top_k_indices(perturbed.detach(), count)
            hard = torch.zeros_like(soft).scatter(1, indices, 1.0)
            return indices, straight_through(hard, soft)
        if self.chance is not None:
            logits = torch.rand(logits.shape, generator=self.chance).to(logits)
        indices = top_k_indices(logits, count)
        return indices, torch.zeros_like(logits).scatter(1, indices, 1.0)


def class_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """One row of the attention after softmax, in time and memory proportional to the tokens.

    Args:
        query: ``[B, H, dh]`` of the class token.
        keys: ``[B, H, N, dh]``.
        scale: of the scores, ``dh ** -0.5``.

    Returns:
        ``[B, H, N]``, in at least float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = (_wide(keys) @ (_wide(query) * scale).unsqueeze(-1)).squeeze(-1)
        return logits.softmax(dim=-1)


def head_weighted_scores(class_row: Tensor, context: Tensor, tokens: int) -> Tensor:
    """How much the class token looks at each patch, a head counting by its part in what the patch became.

    ``S_i = sum_h R_hi A_h(class, i)`` with ``R_hi = |C_hi| / (sum_h |C_hi| + 1e-8)`` (AS-ViT). A row of
    attention sums to 1, so scores shrink as the tokens grow in number. They are returned in units of 197
    tokens, ``S_i * tokens / 197``: one threshold (and one temperature) then fits every image and patch size,
    and to compare with ``theta`` is to compare ``S_i`` with ``theta * 197 / tokens``.

    Args:
        class_row: attention of the class token to the patches, ``[..., H]`` (heads last).
        context: attention output of the patches before the projection, ``[..., H, dh]``.
        tokens: tokens of an image before any were dropped, prefix tokens included.

    Returns:
        ``[...]``, in at least float32.
    """
    norms = torch.linalg.vector_norm(_wide(context), dim=-1)
    share = norms / (norms.sum(dim=-1, keepdim=True) + 1e-8)
    return (share * _wide(class_row)).sum(dim=-1) * (tokens / REFERENCE_TOKENS)


def above_threshold(scores: Tensor, threshold: Tensor, live: Tensor) -> Tensor:
    """Live patches whose score exceeds the threshold; the best live patch where none does.

    Args:
        scores: ``[B, N]``.
        threshold: scalar.
        live: ``[B, N]`` bool, at least one per image.

    Returns:
        ``[B, N]`` bool.
    """
    keep = live & (scores > threshold)
    best = scores.masked_fill(~live, -torch.inf).argmax(dim=1, keepdim=True)
    guard = torch.zeros_like(keep).scatter(1, best, ~keep.any(dim=1, keepdim=True))
    return keep | guard


class ThresholdSelector(nn.Module):
    """Keeps, per image, the patches whose score exceeds the learned threshold of the stage."""

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        assert config.kind == "threshold"
        assert config.stages is not None
        self.config = config
        self.stages = config.stages
        self.thresholds = nn.Parameter(torch.tensor(config.thresholds, dtype=torch.get_default_dtype()))
        #: In evaluation: as :attr:`TopKSelector.chance`, as many patches as lie above the threshold.
        self.chance: torch.Generator | None = None

    def set_progress(self, fraction: float) -> None:
        """Nothing here depends on the progress of training."""

    def choose(self, scores: Tensor, live: Tensor, stage: int) -> Tensor:
        """The patches ``[B, N]`` (bool) that stage number ``stage`` keeps among the live ones."""
        keep = above_threshold(scores, self.thresholds[stage], live)
        if self.chance is not None and not self.training:
            keep = as_many_at_random(keep, live, self.chance)
        return keep

    def forward(self, scores: Tensor, previous: Tensor | None, stage: int) -> Tensor:
        """The mask ``[B, N]`` after stage number ``stage``, with its straight-through gradient.

        Args:
            scores: ``[B, N]``.
            previous: mask of the stage before; what it dropped stays dropped.
            stage: counted from 0.
        """
        live = torch.ones_like(scores, dtype=torch.bool) if previous is None else previous > 0.5
        hard = self.choose(scores, live, stage).to(scores.dtype)
        soft = ((scores - self.thresholds[stage]) * self.config.temperature).sigmoid()
        mask = straight_through(hard, soft)
        return mask if previous is None else mask * previous


def masked_attention_weights(logits: Tensor, mask: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Attention that looks only at the kept tokens (and a token at itself), differentiable in the mask.

    ``(exp(a_ij - max) G_ij + eps / N) / (sum_k exp(a_ik - max) G_ik + eps)`` with ``G_ij = M_j`` and
    ``G_ii = 1`` (AS-ViT). For a hard mask it equals, up to ``eps``, the softmax over the kept tokens.

    Args:
        logits: scaled scores ``[B, H, N, N]``.
        mask: ``[B, N]``, 1 kept and 0 dropped.

    Returns:
        ``[B, H, N, N]``, in at least float32.
    """
    logits = _wide(logits)
    tokens = logits.shape[-1]
    itself = torch.eye(tokens, dtype=torch.bool, device=logits.device)
    gate = torch.where(itself, 1.0, mask[:, None, None, :].to(logits.dtype))
    # The maximum over what is kept: a large dropped score must not push the kept ones down to eps. What a
    # dropped token would weigh is bounded by 1 / eps, and with it the gradient that its mask receives.
    greatest = logits.detach().masked_fill(gate <= 0.5, -torch.inf).amax(dim=-1, keepdim=True)
    weights = (logits - greatest).clamp(max=-math.log(epsilon)).exp() * gate
    return (weights + epsilon / tokens) / (weights.sum(dim=-1, keepdim=True) + epsilon)
