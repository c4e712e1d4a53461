"""Dead weights are 0 whoever writes: what came between a backward pass, the optimizer and the scheduler is put right.

The hooks of :mod:`sparse_trainer.weight_masks` zero the gradient of a dead weight as it arrives. That is not enough:
noise may be added to gradients later, gradients may be assigned from ``torch.autograd.grad``, and weights may be
written by an average, a perturbation or an optimizer around the optimizer.

Each tensor counts the writes to it (torch's version counter), so a step on which nobody else wrote costs no pass over
the weights. Writes through ``.data`` are not counted: for these one layer is looked at after every step, all of them in
turn, and all at once on the first steps and before whatever reports or saves. Where such a write is found, every step
is enforced from then on.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.kernels.library import Library
from sparse_trainer.kernels.masking import mask_gradient, masking_library
from sparse_trainer.masks import count_dead_nonzero, kill_dead, zero_dead
from sparse_trainer.optimizer_state import Optimizers, moments

FIRST_STEPS = 3
"""Steps after which all layers are looked at."""
SAMPLED_LAYERS, SAMPLED_WEIGHTS = 4, 64
LARGE = 1 << 20
"""Elements from which several threads are worth starting."""

Stamp = tuple[int, int]


def stamp(tensor: Tensor) -> Stamp:
    """Changes whenever somebody writes to the tensor, other than through ``.data``, or puts another in its place."""
    return tensor._version, tensor.data_ptr()


class Enforcement:
    """Holds the dead elements of weights, gradients and moments at exactly 0.

    Args:
        parameters: the prunable weights by name.
        masks: bool, by the same names; looked up at each use.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.parameters, self.masks = parameters, masks
        self.clean_gradients: dict[str, tuple[weakref.ref[Tensor], Stamp]] = {}
        self.always = False
        """Whether weights are enforced at every step: the optimizer or somebody else writes where masks are off."""
        self._clean_weights: dict[str, Stamp] = {}
        self._sample: list[Tensor] = []
        self._steps = 0
        self._found = 0  # dead weights that were not 0, told at the next opportunity
        self._found_on_device: Tensor | None = None
        self._told = False
        self._library: Library | None = None
        self._optimizers: Optimizers | None = None
        self._averages: Callable[[], Mapping[str, Tensor]] = dict

    def prepare(self, optimizers: Optimizers, averages: Callable[[], Mapping[str, Tensor]]) -> None:
        """Before gradients come: have the compiled loop ready where it is worth it.

        Args:
            optimizers: whose moments are zeroed where somebody else has written to dead weights, which a penalty on
                weights then lets in.
            averages: what averages the weights now, by the same names; it takes in what was written too.
        """
        self._optimizers, self._averages = optimizers, averages
        self.always = self._told or optimizers.updates_are_dense
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        if sizes:
            self._library = masking_library(sum(sizes), next(iter(self.parameters.values())).device)

    def gradient_arrived(self, name: str, gradient: Tensor) -> None:
        """Zero what is dead of a gradient that a backward pass has just brought."""
        mask_gradient(gradient, self.masks[name], self._library)
        self._remember_gradient(name, gradient)

    def is_clean(self, name: str, gradient: Tensor) -> bool:
        """Whether the gradient is as a backward pass brought it, with what is dead zeroed."""
        known = self.clean_gradients.get(name)
        # The place in memory of a gradient that is gone may be that of another one now.
        return known is not None and known[0]() is gradient and known[1] == stamp(gradient)

    def _remember_gradient(self, name: str, gradient: Tensor) -> None:
        self.clean_gradients[name] = (weakref.ref(gradient), stamp(gradient))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: what is clean is known of these tensors alone."""
        return {
            **self.__dict__,
            "clean_gradients": {},
            "_clean_weights": {},
            "_library": None,
            "_optimizers": None,
            "_averages": dict,
        }

    @torch.no_grad()
    def before_step(self) -> None:
        """Before the optimizer reads gradients and weights: zero what somebody else has written."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        odd = [name for name, gradient in gradients.items() if not self.is_clean(name, gradient)]
        self._zero([(gradients[name], self.masks[name]) for name in odd])
        for name in odd:
            self._remember_gradient(name, gradients[name])
        if self._told:  # also what was written through .data
            self._kill_all()
        else:
            self._put_right(self._written())

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer has written the weights."""
        names = list(self.parameters)
        if self.always:
            self._kill_all()
        elif self._steps < FIRST_STEPS:
            self._put_right(names)
        else:
            self._put_right([names[self._steps % len(names)]])
        self._steps += 1
        self.remember()

    def uncount(self, steps: int) -> None:
        """So many of the steps were skipped by the optimizer itself, and told only now."""
        self._steps -= steps

    def remember(self) -> None:
        """Take the weights as they are for clean."""
        self._clean_weights = {name: stamp(parameter) for name, parameter in self.parameters.items()}
        self._sample = self._take_sample()

    def _take_sample(self) -> list[Tensor]:
        """A few weights of a few layers: fused optimizers write without counting it."""
        names = list(self.parameters)[:: max(1, len(self.parameters) // SAMPLED_LAYERS)]
        flat = [self.parameters[name].detach().reshape(-1) for name in names]
        return [weights[:: max(1, weights.numel() // SAMPLED_WEIGHTS)].clone() for weights in flat]

    def count_revived(self) -> int:
        """Dead weights that are not 0 now; reads the device."""
        return sum(int(count_dead_nonzero(p, self.masks[name])) for name, p in self.parameters.items())

    @torch.no_grad()
    def look(self, *, everywhere: bool) -> None:
        """Put right what was written since the optimizer's last step: where that can be seen, or ``everywhere``."""
        if self._told:
            self._kill_all()
            self._clean_averages()
        else:
            self._put_right(list(self.parameters) if everywhere else self._written())

    def written_by_others(self) -> bool:
        """Whether weights of all layers were written since the last step that was seen; reads the device."""
        now = zip(self._sample, self._take_sample(), strict=True)
        return bool(self._sample) and not any(torch.equal(before, after) for before, after in now)

    @torch.no_grad()
    def enforce(self, optimizer: Optimizers | None) -> None:
        """Zero whatever is dead in weights, gradients and moments."""
        pairs = []
        for name, parameter in self.parameters.items():
            mask = self.masks[name]
            kill_dead(parameter, mask)
            if parameter.grad is not None:
                pairs.append((parameter.grad, mask))
            if optimizer is not None:
                pairs += [(value, mask) for _, value in moments(optimizer, parameter)]
        self._zero(pairs)
        self._clean_averages()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._remember_gradient(name, parameter.grad)
        self.remember()

    def note(self) -> str | None:
        """What was found since the last call, as one sentence, the first time; reads the device."""
        if self._found_on_device is not None:
            self._found += int(self._found_on_device)
            self._found_on_device = None
        found, self._found = self._found, 0
        if not found or self._told:
            return None
        self._told = self.always = True
        if self._optimizers is not None:
            self.enforce(self._optimizers)
        return (
            f"{found:,} dead weights were written to by something else than the optimizer's step (an average, noise, "
            "a perturbation) and are 0 again; from now on masks are applied at every step. Where you write to weights "
            "on purpose, call scheduler.enforce() after it"
        )

    def _clean_averages(self) -> None:
        for name, average in self._averages().items():
            if name in self.masks:
                zero_dead(average, self.masks[name].to(average.device))

    def _kill_all(self) -> None:
        for name, parameter in self.parameters.items():
            kill_dead(parameter, self.masks[name])

    def state_dict(self) -> dict[str, Any]:
        """What decides how often weights are looked at."""
        return {"steps": self._steps, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on looking as often."""
        self._steps = int(state["steps"])
        if state["told"]:
            self._told = self.always = True

    def _written(self) -> list[str]:
        clean = self._clean_weights
        return [
            name for name, parameter in self.parameters.items() if name in clean and stamp(parameter) != clean[name]
        ]

    def _put_right(self, names: list[str]) -> None:
        for name in names:
            parameter, mask = self.parameters[name], self.masks[name]
            found = count_dead_nonzero(parameter, mask)
            if isinstance(found, Tensor):  # on a device, which is not waited for
                self._found_on_device = found if self._found_on_device is None else self._found_on_device + found
                kill_dead(parameter, mask)
            elif found:
                if bool(parameter.isfinite().all()):  # else the step itself went wrong, and nobody wrote
                    self._found += found
                kill_dead(parameter, mask)
            if name in self._clean_weights:
                self._clean_weights[name] = stamp(parameter)
        if self._found:
            note = self.note()
            if note is not None:
                warnings.warn(note, stacklevel=3)

    @staticmethod
    def _zero(pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Zero the dead elements of many tensors: on a CPU by several threads, since NumPy uses one."""
        threads = min(len(pairs), torch.get_num_threads())
        on_host = all(tensor.device.type == "cpu" for tensor, _ in pairs)
        if threads > 1 and on_host and sum(tensor.numel() for tensor, _ in pairs) >= LARGE:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda pair: zero_dead(*pair), pairs))
        else:
            for tensor, mask in pairs:
                zero_dead(tensor, mask)
