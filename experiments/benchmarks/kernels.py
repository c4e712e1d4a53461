"""Where dead weights save time on a CPU, and where not: kernels that compute with live weights only.

A dense kernel multiplies by the zeros as well; these skip them. Ours compute ``Y = X W^T`` as a network needs it. Those
of scipy and torch compute ``Y^T = W X^T`` and get ``X^T`` laid out as they want it, which a network would have to
arrange: what they show is what they can reach at best.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import scipy.sparse
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.setting import Setting, make_model
from experiments.benchmarks.timing import paired, timed
from experiments.config.records import naming
from experiments.errors import ConfigError
from sparse_trainer.kernels.library import KernelError, Library, load_library
from sparse_trainer.kernels.packed import pack
from sparse_trainer.kernels.packed import product as multiply
from sparse_trainer.masks import random_mask
from sparse_trainer.units import find_blocks

CPU = torch.device("cpu")
LEAST_SECONDS = 0.01
"""A timing holds as many calls as the dense kernel needs to fill it."""

HEIGHT = 16
"""Outputs of a block of our kernel."""

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Kernels:
    """Which products are timed."""

    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95)
    """Shares of dead weights."""
    batches: tuple[int, ...] = (1, 16)
    """Images whose tokens are multiplied at once."""
    block: int = 16
    """Side of the square blocks of BSR."""

    def __post_init__(self) -> None:
        problems = [f"sparsities: {value} is not in (0, 1)" for value in self.sparsities if not 0 < value < 1]
        problems += [f"batches: {value} is not positive" for value in self.batches if value < 1]
        if self.block < 1:
            problems.append(f"block: {self.block} is not positive")
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class KernelTime:
    """One sparse kernel on one layer against the dense one, timed in alternation."""

    layer: str
    outputs: int
    inputs: int
    rows: int  #: tokens of all images
    kernel: str
    sparsity: float  #: of the weight as it was drawn
    seconds: float
    dense_seconds: float
    speed: float  #: dense over sparse, median of the pairs: below 1 the sparse kernel is the slower one
    ideal: float  #: if only the live weights counted


def ours(weight: Tensor, rows: Tensor, library: Library, height: int) -> Product:
    """The kernel of :mod:`sparse_trainer.kernels` for blocks of ``height`` outputs, on torch's threads."""
    packed = pack(weight, weight != 0, rows=height)
    return lambda: multiply(library, rows, packed).T


@contextmanager
def _quiet_beta() -> Iterator[None]:
    """Without torch's notice that compressed sparse tensors are in beta; any other warning is heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Sparse (CSR|BSR) tensor support is in beta", category=UserWarning)
        yield


def scipy_csr(weight: Tensor, columns: Tensor) -> Product:
    """``scipy.sparse`` CSR, on one thread. ``weight`` ``[out, in]`` with zeros, ``columns`` ``[in, rows]``."""
    matrix, dense = scipy.sparse.csr_array(weight.numpy()), columns.numpy()
    return lambda: torch.from_numpy(matrix @ dense)


def torch_csr(weight: Tensor, columns: Tensor) -> Product:
    """``torch.sparse`` CSR, on torch's threads."""
    with _quiet_beta():
        matrix = weight.to_sparse_csr()
    return lambda: matrix @ columns


def torch_bsr(weight: Tensor, columns: Tensor, block: int) -> Product:
    """``torch.sparse`` BSR, on torch's threads: square blocks that are live or dead as a whole."""
    with _quiet_beta():
        matrix = weight.to_sparse_bsr((block, block))
    return lambda: matrix @ columns


def draw_weight(
    outputs: int, inputs: int, sparsity: float, block: int, generator: torch.Generator, width: int | None = None
) -> Tensor:
    """A weight ``[outputs, inputs]`` of which ``sparsity`` is dead, in blocks ``block`` by ``width`` or ``block``."""
    width = block if width is None else width
    shape = (outputs // block, inputs // width)
    live = max(1, round((1 - sparsity) * math.prod(shape)))
    mask = random_mask(shape, live, generator).repeat_interleave(block, 0).repeat_interleave(width, 1)
    return torch.randn(outputs, inputs, generator=generator) * mask


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of the first block: fc1, fc2, qkv, proj (or what else there is), by name."""
    first = next(iter(find_blocks(model)))
    block = model.get_submodule(first)
    found = {name.rsplit(".", 1)[-1]: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    return dict(sorted(found.items()))


def benchmark_kernels(setting: Setting, kernels: Kernels) -> list[KernelTime]:
    """Products with live weights only, by our kernels, scipy and torch, against torch's dense one, on this CPU.

    Args:
        setting: the model whose layers are multiplied, and the number of pairs.
        kernels: sparsities, batches, and the blocks of BSR.

    Raises:
        ConfigError: there is no such model, or the blocks do not divide its layers.
    """
    model: Any = make_model(setting)
    with naming("model"):
        layers = layers_of(model)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for name, layer in layers.items():
        if layer.out_features % HEIGHT:
            raise ConfigError(f"model: {name} has {layer.out_features} outputs, which are no blocks of {HEIGHT}")
        if layer.in_features % kernels.block or layer.out_features % kernels.block:
            raise ConfigError(
                f"block: {kernels.block} does not divide {name}, {layer.out_features} x {layer.in_features}; "
                f"{math.gcd(layer.in_features, layer.out_features)} and what divides it does"
            )
    library = None
    try:
        library = load_library()
    except KernelError as error:
        warnings.warn(str(error), stacklevel=2)
    generator = torch.Generator().manual_seed(0)
    times: list[KernelTime] = []
    for name, layer in layers.items():
        for batch in kernels.batches:
            rows = torch.randn(batch * tokens, layer.in_features, generator=generator)
            for sparsity in kernels.sparsities:
                times += _time_layer(name, layer, rows, sparsity, kernels.block, setting.pairs, generator, library)
    return times


def _time_layer(
    name: str,
    layer: nn.Linear,
    rows: Tensor,
    sparsity: float,
    block: int,
    pairs: int,
    generator: torch.Generator,
    library: Library | None,
) -> Iterable[KernelTime]:
    """All kernels on one layer, tokens ``[rows, in]``, at one sparsity."""
    columns = rows.T.contiguous()
    outputs, inputs = layer.out_features, layer.in_features
    single = draw_weight(outputs, inputs, sparsity, 1, generator)
    blocks = draw_weight(outputs, inputs, sparsity, block, generator)
    columns_of_blocks = draw_weight(outputs, inputs, sparsity, HEIGHT, generator, 1)
    made: dict[str, tuple[Tensor, Callable[[], Product]]] = {}
    if library is not None:
        made |= {
            f"{HEIGHT}x1": (columns_of_blocks, lambda: ours(columns_of_blocks, rows, library, HEIGHT)),
            "1x1": (single, lambda: ours(single, rows, library, 1)),
        }
    made |= {
        "scipy CSR": (single, lambda: scipy_csr(single, columns)),
        "torch CSR": (single, lambda: torch_csr(single, columns)),
        f"torch BSR {block}": (blocks, lambda: torch_bsr(blocks, columns, block)),
    }
    with torch.inference_mode():
        for kernel, (weight, prepare) in made.items():
            product = prepare()
            dense = lambda weight=weight: F.linear(rows, weight)  # noqa: E731
            scale = float(dense().abs().max())
            assert torch.allclose(product(), dense().T, atol=1e-4 * scale), f"{kernel} computes something else"
            each = max(1, math.ceil(LEAST_SECONDS / max(timed(dense, CPU), 1e-7)))
            found = paired(dense, product, device=CPU, pairs=pairs, each=each)
            live = float(weight.count_nonzero()) / weight.numel()
            yield KernelTime(
                layer=name,
                outputs=outputs,
                inputs=inputs,
                rows=len(rows),
                kernel=kernel,
                sparsity=1 - live,
                seconds=found.second,
                dense_seconds=found.first,
                speed=1 / found.ratio,
                ideal=1 / live,
            )


def kernels_content(times: Sequence[KernelTime], machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON values."""
    return {"machine": machine, "settings": settings, "kernels": [asdict(time) for time in times]}


def show_kernels(
    console: Console, title: str, times: Sequence[KernelTime], kernels: Kernels, machine: dict[str, Any]
) -> None:
    """A line per layer, size and kernel, a column per sparsity; then how often each kernel was the faster one."""
    columns = [f"{sparsity:.0%}".replace("%", " %") for sparsity in kernels.sparsities]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer")
    table.add_column("rows", justify="right")
    table.add_column("dense", justify="right")
    table.add_column("kernel")
    for column in columns:
        table.add_column(column, justify="right")
    lines: dict[tuple[str, int, str], list[KernelTime]] = {}
    for time in times:
        layer = f"{time.layer} {time.outputs}x{time.inputs}"
        lines.setdefault((layer, time.rows, time.kernel), []).append(time)
    for (layer, rows, kernel), found in lines.items():
        dense = f"{1e3 * sum(time.dense_seconds for time in found) / len(found):.2f} ms"
        table.add_row(layer, f"{rows:,}", dense, kernel, *(f"{time.speed:.2f}" for time in found))
    console.print(table)
    console.print(
        "Speed over torch's dense product in the same run: below 1 the sparse kernel is slower. At best it is "
        f"{', '.join(f'{1 / (1 - sparsity):.3g}' for sparsity in kernels.sparsities)}. {HEIGHT}x1 and 1x1 are "
        "ours, for masks of these patterns; BSR is for square blocks. scipy runs on one thread. All in float32.",
        markup=False,
    )
    summary = Table(title="faster than dense", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    summary.add_column("kernel")
    for column in columns:
        summary.add_column(column, justify="right")
    for kernel in dict.fromkeys(time.kernel for time in times):
        of_kernel = [found for (_, _, name), found in lines.items() if name == kernel]
        wins = [sum(found[index].speed > 1 for found in of_kernel) for index in range(len(columns))]
        summary.add_row(kernel, *(f"{count} of {len(of_kernel)}" for count in wins))
    console.print(summary)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), markup=False)
