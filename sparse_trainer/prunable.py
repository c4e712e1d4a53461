"""Which weights are prunable, and which stay dense.

Prunable is every weight that multiplies: of ``Linear``, ``Bilinear`` and the convolutions, and the projections of
``nn.MultiheadAttention``. Never biases, norms, embeddings and tokens. A weight that is computed from others, as by
``weight_norm`` or ``torch.nn.utils.prune``, cannot be held at 0 and stays dense.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
NAMED = 4
"""Names that a message lists."""
WORTH_A_WORD = 0.01
"""Share of all matrices that may stay dense without a word."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where in a model a parameter was found."""

    module: nn.Module
    leaf: str
    parameter: nn.Parameter


class Standing:
    """Notices where a layer was replaced or wrapped: by looking at every step of the way to each parameter."""

    def __init__(self, model: nn.Module, places: Mapping[str, Place]) -> None:
        self._steps: dict[tuple[int, str], tuple[nn.Module, str, nn.Module, str]] = {}
        self._places = dict(places)
        for name in places:
            module = model
            for child_name in name.split(".")[:-1]:
                child = module._modules[child_name]
                assert child is not None
                self._steps.setdefault((id(module), child_name), (module, child_name, child, name))
                module = child

    def replaced(self) -> str | None:
        """What is wrong with a parameter that is no longer where it was, as a sentence; None if all are."""
        for module, child_name, child, name in self._steps.values():
            now = module._modules.get(child_name)
            if now is not child:
                if now is not None and any(part is child for part in now.modules()):
                    return (
                        f"{name} is in a layer that {type(now).__name__} wraps since the scheduler was built; wrap "
                        "layers before, or compile them in place, by layer.compile()"
                    )
                return self._another(name)
        for name, place in self._places.items():
            if place.module._parameters.get(place.leaf) is not place.parameter:
                return self._another(name)
        return None

    @staticmethod
    def _another(name: str) -> str:
        return (
            f"{name} is another parameter than the scheduler was built with; replace layers before the scheduler is "
            "built, or build a new one by resume_from=scheduler"
        )


def prunable_places(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, Place]:
    """Every prunable weight by name and where it is, in the model's order; a shared one under its first name.

    A pattern matches the parameter's name or its module's, as in a shell. ``exclude`` may also name what stays dense
    anyway (:func:`left_dense`).

    Raises:
        ValueError: if a pattern matches nothing, listing close names; or nothing is left to prune.
    """
    never = set(getattr(model, "no_sparsity", set)())
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf in _leaves(module):
            weight = module._parameters.get(leaf)
            if not isinstance(weight, nn.Parameter) or id(weight) in seen:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            seen.add(id(weight))
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in never):
                found[name] = Place(module, leaf, weight)
    if not found:
        raise ValueError(f"{type(model).__name__} has no weight to prune: no Linear, convolution or attention layer")
    others = set(_matrices_left(model, found))

    def matching(key: str, patterns: Sequence[str], known: set[str]) -> set[str]:
        hits: set[str] = set()
        for pattern in patterns:
            here = {name for name in known if any(fnmatch.fnmatchcase(n, pattern) for n in _names(name))}
            if not here:
                names = [n for name in known for n in _names(name)]
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(found)[:3]
                raise ValueError(f"{key}: {pattern!r} matches no prunable weight; close names: {', '.join(close)}")
            hits |= here
        return hits

    chosen = matching("include", include, set(found)) if include else set(found)
    chosen -= matching("exclude", exclude, set(found) | others) if exclude else set()
    if not chosen:
        raise ValueError("include and exclude leave no weight to prune")
    return {name: place for name, place in found.items() if name in chosen}


def prunable_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights of :func:`prunable_places` by name."""
    return {name: place.parameter for name, place in prunable_places(model, include, exclude).items()}


def matrices(name: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The matrices that a prunable tensor stands for: ``in_proj_weight`` of ``nn.MultiheadAttention`` holds three."""
    if name.rpartition(".")[2] == "in_proj_weight":
        return [(shape[0] // 3, *shape[1:])] * 3
    return [tuple(shape)]


def left_dense(model: nn.Module, prunable: Mapping[str, object], exclude: Sequence[str] = ()) -> dict[str, int]:
    """Matrices that no mask can hold, by name, and their sizes; those that ``exclude`` names are left out."""
    left = _matrices_left(model, prunable)
    return {
        name: size
        for name, size in left.items()
        if not any(fnmatch.fnmatchcase(n, pattern) for n in _names(name) for pattern in exclude)
    }


def describe_left_dense(left: Mapping[str, int], prunable: int) -> str | None:
    """One sentence on what stays dense, for a warning; None where it is too little to matter."""
    total = sum(left.values())
    if total <= WORTH_A_WORD * (prunable + total):
        return None
    most = sorted(left, key=lambda name: -left[name])[:NAMED]
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    patterns = ", ".join(repr(name) for name in most)
    return (
        f"{total:,} weights stay dense and are in no budget, beside {prunable:,} that are prunable: "
        f"{', '.join(most)}{more}. Masks work on the weights of Linear, Bilinear, convolutions and MultiheadAttention, "
        f"where they are plain parameters; exclude=({patterns},) says that this is meant"
    )


def _leaves(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, LAYERS):
        return ("weight",)
    return ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ()


def _names(name: str) -> Iterator[str]:
    """What a pattern may match: the name of the parameter and that of its module."""
    yield name
    yield name.removesuffix(".weight")


def _matrices_left(model: nn.Module, prunable: Mapping[str, object]) -> dict[str, int]:
    """Parameters with two or more dimensions that are not prunable.

    A leading dimension of 1 is that of a batch: class tokens and tables of positions are no matrices. What the model
    itself never prunes (``no_sparsity``) is meant to be dense.
    """
    never = set(getattr(model, "no_sparsity", set)())
    shared = {id(place.parameter) for place in prunable.values() if isinstance(place, Place)}
    shared |= {id(value) for value in prunable.values() if isinstance(value, Tensor)}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name not in prunable
        and id(parameter) not in shared
        and parameter.ndim >= 2
        and parameter.shape[0] > 1
        and math.prod(parameter.shape[1:]) > 1
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in never)
    }
