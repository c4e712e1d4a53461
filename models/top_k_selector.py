"""As many patches of every image, by a linear score that is learned (SViTE+, arXiv 2106.04533)."""

from __future__ import annotations

import struct
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.choosing import kept_count, on_ramp, straight_through, top_k_indices
from models.scores import at_least_float32
from models.selector_config import SelectorConfig


def perturb(logits: Tensor, noise: Tensor | None) -> Tensor:
    """``log_softmax(logits) + noise`` over the patches ``[B, N]``, whose softmax over ``tau`` is SViTE+'s."""
    log_shares = F.log_softmax(at_least_float32(logits), dim=1)
    return log_shares if noise is None else log_shares + noise


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
        #: Of the patches that reach a stage, in training.
        self.keep_ratio = on_ramp(config.keep_ratio, config.ramp, 0.0)
        #: In evaluation: draw as many patches at random in place of the best. What a score is worth is what it is worth
        #: beyond that.
        self.chance: torch.Generator | None = None
        # A tensor, so that a compiled training step is not compiled again for each temperature.
        self.register_buffer("tau", torch.tensor(float(config.tau_start)), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Fill what no state dict holds, for a model that was built without memory (timm's convention)."""
        self.tau = torch.tensor(float(self.config.tau_start), device=self.tau.device if not self.tau.is_meta else None)

    def set_progress(self, fraction: float) -> None:
        """Set the temperature, and the patches to keep, for this fraction of training, 0 to 1."""
        self.keep_ratio = on_ramp(self.config.keep_ratio, self.config.ramp, fraction)
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
        return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log().to(like.device, non_blocking=True)

    def score(self, patches: Tensor, stage: int) -> Tensor:
        """Logits ``[B, N]`` of the patches ``[B, N, C]`` that reach stage number ``stage``, in at least float32."""
        scorer = cast(nn.Linear, self.scorers[stage])
        with torch.autocast(patches.device.type, enabled=False):
            weight, bias = at_least_float32(scorer.weight), at_least_float32(scorer.bias)
            return F.linear(at_least_float32(patches), weight, bias).squeeze(-1)

    def forward(self, patches: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Choose among the patches ``[B, N, C]`` that reach stage number ``stage``.

        Returns:
            positions ``[B, K]``, ascending, and the factor ``[B, N]`` that carries the gradient: its value is
            1 where kept, 0 elsewhere. In evaluation there is no noise, and it carries no gradient.
        """
        logits = self.score(patches, stage)
        count = kept_count(self.keep_ratio if self.training else self.config.keep_ratio, logits.shape[1])
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
