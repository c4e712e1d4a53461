"""What a run measured of itself since its last record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Running:
    """Sums since the last record, on the device: reading them every step would make the host wait."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by tag."""
    kept: Tensor | None = None
    """Mean patches kept ``[stages]``."""
    steps: int = 0

    def add(self, values: Mapping[str, Tensor], kept: Tensor | None) -> None:
        """One step that counted."""
        for tag, value in values.items():
            self.sums[tag] = self.sums[tag] + value if tag in self.sums else value
        if kept is not None:
            self.kept = kept if self.kept is None else self.kept + kept
        self.steps += 1

    def means(self, stages: tuple[int, ...]) -> dict[str, float]:
        """Means over the steps by tag; a loss and gradient norm that are NaN if there was none."""
        if not self.steps:
            return {"train/loss": math.nan, "train/grad_norm": math.nan}
        tags = [*self.sums, *(f"tokens/kept/{stage}" for stage in stages if self.kept is not None)]
        sums = torch.stack(list(self.sums.values()))
        values = sums if self.kept is None else torch.cat([sums, self.kept])
        return {tag: value / self.steps for tag, value in zip(tags, values.tolist(), strict=True)}
