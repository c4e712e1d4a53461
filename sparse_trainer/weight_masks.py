"""The masks of single weights: their hooks, and one update of all layers.

Between updates the only memory beyond the dense network is one bool per prunable weight (and one bit for the
exploration rate). The dense growth gradient exists only on the steps that collect it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_trainer.budget import allocate
from sparse_trainer.following import hookable
from sparse_trainer.generators import restore_generator
from sparse_trainer.growth_gradient import GrowthGradient
from sparse_trainer.masks import MaskChange, count_bits, count_live, kill_dead, pack_bits, unpack_bits, zero_dead
from sparse_trainer.optimizer_state import Optimizers, carry_over
from sparse_trainer.patterns import SINGLE, Pattern, patterns_of, read_pattern, whole_blocks
from sparse_trainer.prunable import matrices
from sparse_trainer.report import LayerUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.weight_choice import choose, choose_globally


def allocation_of(
    shapes: Mapping[str, Sequence[int]], live: int, distribution: str, *, at_least_one: bool = False
) -> dict[str, int]:
    """Live elements of each prunable tensor (:func:`sparse_trainer.budget.allocate`); some hold several matrices.

    Raises:
        ValueError: if the budget does not fit.
    """
    parts = {
        (name, index): shape for name, whole in shapes.items() for index, shape in enumerate(matrices(name, whole))
    }
    names = {f"{name}[{index}]" if index else name: (name, index) for name, index in parts}
    matrix_shapes = {label: parts[key] for label, key in names.items()}
    counts = allocate(matrix_shapes, live, distribution, at_least_one=at_least_one)
    result = dict.fromkeys(shapes, 0)
    for label, (name, _) in names.items():
        result[name] += counts[label]
    return result


def fitting_patterns(
    shapes: Mapping[str, Sequence[int]], config: SparsityConfig, least: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Pattern]:
    """The pattern of each layer. A budget that falls needs one of single weights, to be met exactly at every step.

    Args:
        least: shapes that the layers have in steps of, where heads and neurons leave during training.
    """
    patterns = patterns_of(least or shapes, read_pattern(config.pattern))
    if (config.falls or config.unit_falls) and not any(pattern.single for pattern in patterns.values()):
        patterns[min(shapes, key=lambda name: math.prod(shapes[name]))] = SINGLE
    return patterns


def allocate_blocks(
    shapes: Mapping[str, Sequence[int]],
    live: int,
    config: SparsityConfig,
    patterns: dict[str, Pattern],
    *,
    at_least_one: bool = False,
) -> dict[str, int]:
    """:func:`allocation_of` in whole blocks of the layers' patterns.

    Raises:
        ValueError: if the budget cannot be met.
    """
    counts = allocation_of(shapes, live, config.distribution, at_least_one=at_least_one)
    return whole_blocks(counts, {name: math.prod(shape) for name, shape in shapes.items()}, patterns)[0]


def _masker(name: str, arrived: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    # A weak reference: torch never frees a parameter whose hook leads back to it.
    weak = weakref.WeakMethod(arrived)

    def mask_gradient(parameter: Tensor) -> None:
        method = weak()
        if method is not None and parameter.grad is not None:
            method(name, parameter.grad)

    return mask_gradient


class WeightMasks:
    """Masks over single weights under one exact count.

    Args:
        parameters: the prunable weights by name. Their dead elements are set to 0 here.
        live: live elements over all of them.
        config: distribution, growth and seed.
        masks: the first masks; drawn or chosen by ``config`` if None.
        patterns: of the layers; what divides their shapes if None.

    Raises:
        ValueError: if the budget does not fit.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        live: int,
        config: SparsityConfig,
        *,
        masks: Mapping[str, Tensor] | None = None,
        patterns: Mapping[str, Pattern] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.growth = GrowthGradient()
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.patterns = dict(patterns) if patterns is not None else fitting_patterns(shapes, config)
        self.allocation = allocate_blocks(shapes, live, config, self.patterns)
        self.masks = {name: self._first_mask(name) for name in shapes} if masks is None else dict(masks)
        self._ever_live = {name: pack_bits(mask) for name, mask in self.masks.items()}
        self._handles: list[RemovableHandle] = []
        self._collectors: list[RemovableHandle] = []
        self._reshaped = False  # whether shapes changed since the budget was spread over the layers
        self.apply()
        if masks is None and config.start == "random" and config.first_weights == "rescaled":
            self._rescale()

    @classmethod
    def of_masks(
        cls,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        config: SparsityConfig,
        patterns: Mapping[str, Pattern] | None = None,
    ) -> WeightMasks:
        """Go on with the masks that there are. A layer of another shape gets a new one of the same density.

        Raises:
            ValueError: if a mask is not of the configuration's pattern.
        """
        generator = torch.Generator().manual_seed(config.seed)
        first = {}
        for name, parameter in parameters.items():
            mask = masks.get(name)
            if mask is None:
                mask = torch.ones(parameter.shape, dtype=torch.bool)
            pattern = patterns_of({name: parameter.shape}, read_pattern(config.pattern))[name]
            if mask.shape != parameter.shape:
                count = round(count_live(mask.cpu()) / mask.numel() * parameter.numel() / pattern.size) * pattern.size
                mask = pattern.first_mask(parameter.detach(), max(pattern.size, count), generator)
            first[name] = mask.to(parameter.device).clone()
        made = cls(parameters, sum(map(count_live, first.values())), config, masks=first, patterns=patterns)
        odd = [name for name, mask in first.items() if not made.patterns[name].fits(mask)]
        if odd == [min(masks, key=lambda name: masks[name].numel())]:
            made.patterns[odd[0]] = SINGLE  # the one that met a budget exactly, which no whole blocks are
        elif odd:
            raise ValueError(
                f"resume_from: the mask of {odd[0]} is not of pattern {config.pattern}; give pattern='1x1', which "
                "every mask is of, or the pattern that it was trained with"
            )
        made.allocation = {name: count_live(mask) for name, mask in first.items()}
        return made

    def allocate(self, live: int) -> dict[str, int]:
        """How many weights of each layer live under a budget from now on, in whole blocks of their patterns.

        A layer that is frozen keeps as many as it has, where the others can meet the budget. Where only single weights
        can meet it exactly, those of frozen layers change next.
        """
        shapes = {name: p.shape for name, p in self.parameters.items()}
        frozen = {name: count_live(self.masks[name]) for name, p in self.parameters.items() if not p.requires_grad}
        in_blocks = {name: count for name, count in frozen.items() if not self.patterns[name].single}
        for held in (frozen, in_blocks):
            free = {name: shape for name, shape in shapes.items() if name not in held}
            patterns = {name: self.patterns[name] for name in free}
            if not held or not free:
                continue
            with contextlib.suppress(ValueError):
                counts = allocate_blocks(free, live - sum(held.values()), self.config, patterns, at_least_one=True)
                if all(counts[name] % self.patterns[name].size == 0 for name in free):
                    return {name: held[name] if name in held else counts[name] for name in shapes}
        return allocate_blocks(shapes, live, self.config, self.patterns, at_least_one=True)

    def _first_mask(self, name: str) -> Tensor:
        """As many live elements as were allocated: of greatest magnitude where the weights are trained, else random."""
        parameter, count = self.parameters[name], self.allocation[name]
        generator = None if self.config.start == "score" else self.generator
        return self.patterns[name].first_mask(parameter.detach().contiguous(), count, generator)

    @torch.no_grad()
    def _rescale(self) -> None:
        """Let each layer pass on the variance of a dense one: its weights were drawn for more inputs than live.

        Sparsity-aware initialisation (Evci et al. 2022, "Gradient flow in sparse neural networks and how lottery
        tickets win").
        """
        for name, parameter in self.parameters.items():
            parameter.mul_((parameter.numel() / self.allocation[name]) ** 0.5)

    @torch.no_grad()
    def apply(self) -> None:
        """Set every dead weight to 0 (exactly, whatever its value was)."""
        self.follow_device()
        for name, parameter in self.parameters.items():
            kill_dead(parameter, self.masks[name])

    def follow_device(self) -> None:
        """Move the masks to where their weights are."""
        for name, parameter in self.parameters.items():
            if self.masks[name].device != parameter.device:
                self.masks[name] = self.masks[name].to(parameter.device)

    def reshape(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """The parameter of a name gets another shape: so do its mask and all that is known of its weights.

        The next :meth:`update` brings the budget back to what it is.
        """
        if name not in self.masks:
            return
        mask = self.masks[name]
        ever = unpack_bits(self._ever_live[name], mask.numel()).view(mask.shape)
        self._ever_live[name] = pack_bits(change(ever))
        mask = change(mask)
        pattern = self.patterns[name]
        if not pattern.fits(mask):  # neurons left one by one, and others moved up into their blocks
            mask = pattern.expand(pattern.touched(mask), mask.shape)  # too many now, until the update prunes
        self.masks[name] = mask
        self.growth.reshape(name, change)
        self._reshaped = True

    @property
    def target(self) -> int:
        """Live elements that were asked for."""
        return sum(self.allocation.values())

    def live_count(self) -> int:
        """Live elements, counted on the masks."""
        return sum(count_live(mask) for mask in self.masks.values())

    def install(self, arrived: Callable[[str, Tensor], None]) -> None:
        """Hook the gradients, so that nothing after a backward pass sees a dead one.

        Args:
            arrived: zeroes what is dead in the gradient of a name.
        """
        for name, parameter in self.parameters.items():
            with hookable(parameter):
                self._handles.append(parameter.register_post_accumulate_grad_hook(_masker(name, arrived)))

    def remove(self) -> None:
        """Take the hooks away again."""
        self.collect(False)
        while self._handles:
            self._handles.pop().remove()

    def collect(self, now: bool) -> None:
        """Start or stop collecting the growth gradient, where the hooks are installed.

        Its hooks are there only meanwhile: between updates a backward pass meets none of them.
        """
        self.growth.collect(now)
        if now and self._handles and not self._collectors:
            for name, parameter in self.parameters.items():
                with hookable(parameter):  # a frozen one may train again meanwhile
                    self._collectors.append(parameter.register_hook(self._collector(name)))
        while not now and self._collectors:
            self._collectors.pop().remove()

    def _collector(self, name: str) -> Any:
        def collect(gradient: Tensor) -> None:
            self.growth.add(name, gradient, self.parameters[name].grad)

        return collect

    def take_assigned_gradients(self, arrived: Callable[[str, Tensor], bool]) -> None:
        """Collect gradients that no backward pass brought, such as those of ``torch.autograd.grad``: they are dense.

        Args:
            arrived: whether a gradient of a name came by a backward pass.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not self.growth.holds(name) and not arrived(name, parameter.grad):
                self.growth.add(name, parameter.grad, None)

    @contextlib.contextmanager
    def naming_divergence(self) -> Iterator[None]:
        """Around an update.

        Raises:
            FloatingPointError: weights are NaN or infinite, so that they could not be ranked.
        """
        try:
            yield
        except ValueError as error:
            broken = [name for name, weight in self.parameters.items() if not bool(weight.isfinite().all())]
            if not broken:
                raise
            raise FloatingPointError(
                f"{broken[0]} holds NaN or infinity, so that its weights cannot be ranked: the training has diverged"
            ) from error

    @torch.no_grad()
    def update(
        self,
        drop_fraction: float,
        optimizer: Optimizers,
        ema: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        live: int | None = None,
    ) -> dict[str, LayerUpdate]:
        """One prune-and-grow over all layers. Weights, gradients, moments and the EMA change together.

        Args:
            drop_fraction: share of the live elements to replace.
            ema: EMA copies of the weights by name; may be empty.
            frozen: bool masks by name of elements that this update must leave alone (units that just came).
            live: the budget from now on, where it falls.
        """
        budget = self.target if live is None else live
        if self._reshaped or budget != self.target:
            self.allocation, self._reshaped = self.allocate(budget), False
        # With a global distribution the share of each layer is what it has come to.
        fewer = {name: count_live(self.masks[name]) - count for name, count in self.allocation.items()}
        gradients = self.growth.take() if self.config.grow == "gradient" else {}
        eligible = {name: ~mask for name, mask in frozen.items()}
        changes: dict[str, MaskChange] = {}
        if self.config.distribution == "global":
            floors = {name: self.config.floor * count for name, count in self.allocation.items()}
            for pattern in dict.fromkeys(self.patterns.values()):  # blocks of a size compete with one another
                names = [name for name, own in self.patterns.items() if own == pattern]
                changes |= choose_globally(
                    pattern,
                    {name: self.parameters[name].detach() for name in names},
                    self.masks,
                    {name: self._growth_score(name, gradients) for name in names},
                    floors,
                    drop_fraction,
                    fewer=sum(fewer[name] for name in names),
                    regrow=self.config.regrow,
                    eligible=eligible,
                )

        def one(name: str) -> LayerUpdate:
            with torch.no_grad():  # which a thread does not inherit
                change = changes.get(name) or choose(
                    self.patterns[name],
                    self.parameters[name],
                    self.masks[name],
                    self._growth_score(name, gradients),
                    drop_fraction,
                    fewer=fewer[name],
                    regrow=self.config.regrow,
                    eligible=eligible.get(name),
                )
                return self._apply(name, change, optimizer, ema.get(name), gradients.get(name))

        names = list(self.parameters)
        first = self.parameters[names[0]]
        if first.device.type == "cpu" and self.config.grow == "gradient":
            # Selection runs on one core, so two layers at a time; random growth draws in order, one by one.
            with ThreadPoolExecutor(max(1, min(len(names), torch.get_num_threads()))) as pool:
                return dict(zip(names, pool.map(one, names), strict=True))
        return {name: one(name) for name in names}

    def _apply(
        self,
        name: str,
        change: MaskChange,
        optimizer: Optimizers,
        average: Tensor | None,
        gradient: Tensor | None,
    ) -> LayerUpdate:
        """Finish the transition of one layer: mask, weight, gradient, EMA and moments."""
        parameter, mask = self.parameters[name], self.masks[name]
        mask.copy_(change.live)
        kill_dead(parameter, mask)
        if parameter.grad is not None:
            zero_dead(parameter.grad, mask)
        if average is not None:
            zero_dead(average, mask.to(average.device))
        if gradient is not None:
            zero_dead(gradient, change.added)
        carry_over(optimizer, parameter, mask, change.added, self.config.weight_moments, gradient)
        self._ever_live[name] |= pack_bits(mask)
        return LayerUpdate(
            pruned=count_live(change.removed),
            grown=count_live(change.added),
            live=count_live(mask),
            total=mask.numel(),
            explored=count_bits(self._ever_live[name]),
            threshold=change.threshold,
        )

    def _growth_score(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """What ranks the dead elements of a layer; None where nothing does, so that the layer is left alone.

        A frozen layer is left alone too.

        Without a gradient all elements tie, and growing the first of them would ruin the layer's mask.
        """
        parameter = self.parameters[name]
        if not parameter.requires_grad:  # frozen meanwhile
            return None
        if self.config.grow == "gradient":
            if name not in gradients:
                return None
            score = gradients[name].abs().float()
            return score if float(score.amax()) > 0 else None
        return torch.rand(parameter.shape, generator=self.generator).to(parameter.device)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the hooks."""
        return {**self.__dict__, "_handles": [], "_collectors": []}

    def state_dict(self) -> dict[str, Any]:
        return {
            "pattern": self.config.pattern,
            "masks": {name: pack_bits(mask) for name, mask in self.masks.items()},
            "ever_live": {name: bits.clone() for name, bits in self._ever_live.items()},
            "allocation": dict(self.allocation),
            "generator": self.generator.get_state(),
            "growth": self.growth.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any], expected_live: int | None = None) -> dict[str, Tensor]:
        """The masks of a saved state, if it may take the place of these; changes nothing.

        Args:
            expected_live: the budget at the time of the state, where it falls.

        Raises:
            ValueError: if the state is of other layers, of another pattern or of another budget.
        """
        pattern = state.get("pattern", self.config.pattern)  # older states do not say
        if pattern != self.config.pattern:
            raise ValueError(
                f"the saved masks are of pattern {pattern}, the configuration's is {self.config.pattern}; go on with "
                f"pattern={pattern!r}"
            )
        expected, found = set(self.masks), set(state["masks"])
        if expected != found:
            odd = sorted(expected ^ found)
            raise ValueError(f"the saved masks are of other layers than the model's: {', '.join(odd[:4])}")
        masks = {
            name: unpack_bits(bits, self.masks[name].numel()).view(self.masks[name].shape)
            for name, bits in state["masks"].items()
        }
        odd = [name for name, mask in masks.items() if not self.patterns[name].fits(mask)]
        if odd:
            raise ValueError(f"the saved mask of {odd[0]} is not of pattern {self.patterns[odd[0]]}")
        live = sum(count_live(mask) for mask in masks.values())
        budget = self.target if expected_live is None else expected_live
        if live != budget:
            raise ValueError(f"the saved masks have {live:,} live elements, the budget is {budget:,}")
        return masks

    def load_state_dict(self, state: Mapping[str, Any], live: int | None = None) -> None:
        """Restore masks, exploration, generator and the growth gradient.

        Args:
            live: as for :meth:`check_state`.

        Raises:
            ValueError: as :meth:`check_state`.
        """
        masks = self.check_state(state, live)
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
            self._ever_live[name] = state["ever_live"][name].clone()
        allocation = {name: int(count) for name, count in state.get("allocation", {}).items()}
        if set(allocation) == set(masks) and sum(allocation.values()) == self.live_count():
            self.allocation = {name: allocation[name] for name in masks}
        elif live is not None and live != self.target:  # older states do not say
            self.allocation = self.allocate(live)
        restore_generator(self.generator, state["generator"])
        self.growth.load_state_dict(state["growth"], self.parameters)
        self.apply()
