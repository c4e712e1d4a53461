"""The compact network as one ONNX file, checked with onnxruntime before it gets its name.

One input ``images`` ``[batch, channels, height, width]``, normalised with the mean and std in the file's metadata,
one output ``logits`` ``[batch, classes]``, both float32; any batch size. Only heads and neurons that are live are in
it, and tokens that a selector drops are really dropped. Unstructured zeros are stored and multiplied as numbers.

Operator set 20 is the first with Gelu and LayerNormalization as single operators, which onnxruntime fuses with
their neighbours. No operator outside of the standard is used.

In float16 and bfloat16 the *weights* are stored in 16 bits and cast when the file is loaded: arithmetic, input and
output stay float32, because onnxruntime's CPU kernels for 16 bits are few and slow.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.errors import ConfigError
from experiments.exports.staging import staged
from sparse_trainer.files.checkpoint import CheckpointError

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

OPSET = 20
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4
"""Of the logits, where they are at most 1; relative to the greatest where it is more."""
BATCH_SIZES = (1, 3, 5)
"""That a file is checked with."""
MOST_BYTES = 2**31 - 1
"""Of one protobuf message."""


def require_onnx(option: str = "--format onnx") -> None:
    """Say what to install.

    Args:
        option: what was asked for.

    Raises:
        ConfigError: a library is missing.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{option} needs {', '.join(missing)}: pip install 'sparse-trainer[onnx]'")


def build_onnx(model: nn.Module, input_size: tuple[int, int, int]) -> ModelProto:
    """The graph of a model in eval mode, for any number of images ``input_size`` ``(C, H, W)``.

    Raises:
        CheckpointError: the exporter of this release of torch does not understand the model.
    """
    require_onnx()
    images = torch.zeros(2, *input_size)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model.eval(),
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        assert program is not None
        proto: ModelProto = program.model_proto
    except Exception as error:  # of many kinds, with pages of text
        raise CheckpointError(
            f"{type(model).__name__} cannot be written as ONNX by torch {torch.__version__}: {_reason(error)}"
        ) from error
    _strip(proto)
    return proto


def _reason(error: BaseException) -> str:
    """The first line of what an exporter stumbled over, which it wraps in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing about what the exporter does inside itself: no warnings, no log, and what some releases print."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(proto: ModelProto) -> None:
    """Take out the exporter's notes, with stack traces and so the folders of the machine it ran on."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""


def narrow_weights(proto: ModelProto, dtype: torch.dtype) -> None:
    """Store the weights in 16 bits, in place, each behind a cast that onnxruntime does once, when it loads the file.

    Tensors with a value that ``dtype`` cannot hold exactly, such as the scale of attention, stay as they are.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    kinds = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
        narrow = values.to(dtype)
        if values.dim() == 0 or not torch.equal(narrow.float(), values):
            continue
        name, stored = tensor.name, f"{tensor.name}.stored"
        raw = narrow.contiguous().view(torch.int16).numpy().tobytes()
        tensor.CopyFrom(helper.make_tensor(stored, kinds[dtype], list(values.shape), raw, raw=True))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"cast.{name}", to=TensorProto.FLOAT))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*casts, *nodes])


def onnx_session(source: str | os.PathLike[str] | bytes, threads: int | None = None) -> InferenceSession:
    """onnxruntime on the CPU, with all its optimisations.

    Args:
        source: a file, or its contents.
        threads: within one operator; None for as many as onnxruntime finds good.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    given = source if isinstance(source, bytes) else os.fspath(source)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run_onnx(session: InferenceSession, images: Tensor) -> Tensor:
    """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
    (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
    return torch.from_numpy(logits)


def random_images(input_size: tuple[int, int, int], count: int = sum(BATCH_SIZES)) -> Tensor:
    """Seeded standard normal images ``[count, C, H, W]``."""
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))


def compare_onnx(session: InferenceSession, expected: Tensor, images: Tensor) -> float:
    """The largest difference from the logits ``expected``, over several batch sizes.

    Args:
        images: ``[sum(BATCH_SIZES), C, H, W]``.

    Raises:
        CheckpointError: it is more than :data:`TOLERANCE`, or the shapes differ.
    """
    found = torch.cat([run_onnx(session, batch) for batch in images.split(list(BATCH_SIZES))])
    if found.shape != expected.shape:
        raise CheckpointError(f"onnxruntime gives logits {tuple(found.shape)}, PyTorch {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise CheckpointError(
            f"onnxruntime's logits differ from PyTorch's by {difference:.2g}, more than {limit:.2g}; nothing was "
            "written"
        )
    return difference


def export_onnx(
    model: nn.Module,
    path: Path | str,
    *,
    input_size: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> float:
    """Write a model as an ONNX file, if onnxruntime agrees with PyTorch about it.

    Args:
        model: in float32, with weights that ``dtype`` holds exactly; put into eval mode.
        input_size: ``(C, H, W)`` of one image.
        dtype: of the weights in the file.
        metadata: JSON values for the file's ``metadata_props``.

    Returns:
        the largest difference of the logits that was found.

    Raises:
        ConfigError: onnx, onnxruntime or onnxscript is missing.
        CheckpointError: the model cannot be exported, the logits differ, or the file cannot be written.
    """
    proto = build_onnx(model, input_size)
    if dtype != torch.float32:
        narrow_weights(proto, dtype)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=json.dumps(value, allow_nan=False))
    if proto.ByteSize() > MOST_BYTES:
        raise CheckpointError(f"{path}: takes {proto.ByteSize():,} bytes, and an ONNX file at most {MOST_BYTES:,}")
    images = random_images(input_size)
    with torch.inference_mode():
        expected = model(images)
    with staged(Path(path), overwrite=overwrite) as new:
        new.write_bytes(proto.SerializeToString())
        try:
            session = onnx_session(new)
        except Exception as error:  # of onnxruntime's own kinds
            raise CheckpointError(f"onnxruntime cannot run what was written: {str(error)[:300]}") from error
        return compare_onnx(session, expected, images)
