"""Ways to damage a file, blindly and with knowledge: bytes, the header, and what both say.

Who mutates bytes alone is found by the checksums. Who means harm computes them anew, so :func:`seal` does that too and
the reader's other checks are all that is left. Everything random is drawn from the ``random.Random`` that is given.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
from torch import Tensor

from models import create_model
from sparse_trainer.files.checkpoint import SparseInfo
from sparse_trainer.files.rebuild import build_without_memory

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
#: Elements of a model that is made up.
MOST_FORGED = 300_000
RESERVED = ("format", "version", "data_sha256", "header_sha256")

#: JSON that Python cannot write; each stands for itself between the marks until the text is made.
MARK = "\ue000"
RAW = {
    "nan": "NaN",
    "infinity": "-Infinity",
    "huge_float": "1e999",
    "tiny_float": "1e-999",
    "huge_integer": "9" * 5000,
    "large_integer": "9" * 400,
    "deep_list": "[" * 3000 + "]" * 3000,
    "deeper_list": "[" * 200_000 + "]" * 200_000,
    "deep_object": '{"a":' * 100 + "1" + "}" * 100,
    "twice": '{"a":1,"a":2}',
}

#: What is put where something else was.
VALUES: tuple[Any, ...] = (
    *(0, 1, 2, 3, -1, 7, 255, 256, 4096, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200),
    *(0.0, -0.0, 0.5, 1.0, 1e9, 1e-300, 1e308, -1e308, True, False, None),
    *("", "x", "a" * 300, "\x00", "\x1b[2J", "\u202e", "\ud800", "é", "[/bold]", "%s{}", "\n", "NaN", "1"),
    *("../../etc/passwd", "/dev/zero", "hf-hub:a/b", "local-dir:/tmp", "file:///etc/passwd", "os.system", "Linear"),
    *([], {}, [0] * 300, [[[[1]]]], {"a": {"a": {"a": 1}}}, [None], [1, 1], [-1], ["x"], [0.5], {"": 0}),
    *(f"{MARK}{name}{MARK}" for name in RAW),
)

#: What a model could be asked for. Many of these are allowed; the file then holds other tensors.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "img_size": (1, 8, 17, 64, 8192, [16, 16], [8192, 1], [1] * 3, 1 << 40),
    "patch_size": (1, 2, 4, 8, 16, 8192, [1, 4], 0),
    "embed_dim": (1, 3, 24, 48, 65_535, 65_536, 10**9),
    "depth": (1, 2, 3, 256, 10**6, 0),
    "num_heads": (1, 2, 3, 4, 4096, 0, -3),
    "num_classes": (0, 1, 5, 1000, 1 << 24, 1 << 40),
    "in_chans": (1, 3, 4096),
    "mlp_ratio": (0.0, 0.001, 4.0, 1000.0, 1e300),
    "reg_tokens": (0, 1, 4096),
    "init_values": (0.0, 1e-5, 1000.0),
    "drop_rate": (0.0, 1.0),
    "drop_path_rate": (0.0, 0.5, 1.0),
    "class_token": (True, False),
    "qkv_bias": (True, False),
    "qk_norm": (True,),
    "dynamic_img_size": (True,),
    "dynamic_img_pad": (True,),
    "global_pool": ("", "avg", "map", "token", "max", "avgmax", "x"),
    "pos_embed": ("learn", "none", "", "sincos", "rope"),
    "act_layer": ("gelu", "relu", "swish", "prelu", "x", "torch.nn.Linear", "__import__('os')"),
    "norm_layer": ("layernorm", "batchnorm2d", "groupnorm", "rmsnorm", "x", "os.system"),
    "weight_init": ("skip", "jax", "moco", "reset", "x"),
    "pretrained": (True, False),
    "checkpoint_path": ("/etc/passwd", "https://localhost/x.pth"),
    "pretrained_cfg": ({"url": "https://localhost/x.pth"}, "x"),
    "pretrained_cfg_overlay": ({"file": "/etc/passwd"},),
    "cache_dir": ("/tmp",),
    "scriptable": (True,),
    "features_only": (True,),
    "block_fn": ("Block",),
    "device": ("cuda", "cpu"),
}
NAMES = (
    *("deit_tiny_patch16_224", "deit_base_patch16_224", "deit3_small_patch16_224", "vit_tiny_patch16_224.augreg_in21k"),
    *("deit_tiny_distilled_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "vit_gigantic_patch14_224"),
    *("hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp", "/etc/passwd", "../x", "", "deit_tiny_patch16_224.nosuch"),
)


@dataclass
class Document:
    """A file of this project taken apart."""

    kind: str  #: the ``format`` of its metadata
    version: str
    metadata: dict[str, Any]  #: parsed, without the reserved keys
    tensors: dict[str, Piece]  #: in the order of the file

    def copy(self) -> Document:
        """An independent one; the bytes are shared."""
        metadata = json.loads(json.dumps(self.metadata))
        tensors = {name: Piece(piece.dtype, list(piece.shape), piece.data) for name, piece in self.tensors.items()}
        return Document(self.kind, self.version, metadata, tensors)


@dataclass
class Piece:
    """One tensor of a file."""

    dtype: str
    shape: list[int] = field(default_factory=list)
    data: bytes = b""


def take_apart(content: bytes) -> Document:
    """The inverse of :func:`put_together` for a file that is whole."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    strings = header.pop("__metadata__")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        tensors[name] = Piece(entry["dtype"], entry["shape"], content[end + begin : end + stop])
    metadata = {key: json.loads(value) for key, value in strings.items() if key not in RESERVED}
    return Document(strings["format"], strings["version"], metadata, tensors)


def header_of(document: Document) -> tuple[dict[str, Any], bytes]:
    """The header, without checksums, and the data."""
    strings = {key: as_json(value) for key, value in document.metadata.items()}
    header: dict[str, Any] = {"__metadata__": {**strings, "format": document.kind, "version": document.version}}
    end = 0
    for name, piece in document.tensors.items():
        begin, end = end, end + len(piece.data)
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    return header, b"".join(piece.data for piece in document.tensors.values())


def seal(header: Mapping[str, Any], data: bytes, change: Callable[[str], str] = str) -> bytes:
    """The file of a header and data, with right checksums.

    Args:
        change: of the header's text, after the checksums are in it.
    """
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        metadata = {**metadata, "data_sha256": hashlib.sha256(data).hexdigest()}
        rest = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
        metadata["header_sha256"] = hashlib.sha256(rest.encode()).hexdigest()
        header = {**header, "__metadata__": metadata}
    text = change(as_json(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def put_together(document: Document) -> bytes:
    """The file of a document, with right checksums."""
    return seal(*header_of(document))


def as_json(value: Any) -> str:
    """JSON in which the names in :data:`RAW` stand for what they mean."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(f"{MARK}{name}{MARK}"), raw)
    return text


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in nested JSON: the keys that lead to each value, the whole left out."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:50]))
    inner = [place for key, item in items for place in places(item, (*path, key))]
    return [path, *inner] if path else inner


def change_value(value: Any, draw: random.Random) -> None:
    """Change nested JSON somewhere, in place."""
    found = places(value)
    if not found:
        return
    *outer, last = draw.choice(found)
    holder = value
    for key in outer:
        holder = holder[key]
    old = holder[last]
    how = draw.randrange(9)
    if how == 0:
        del holder[last]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "", "\u202e", "__class__", str(last) + "x"])] = holder.pop(last)
    elif how == 2 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[last] = draw.choice([old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old), [old]])
    elif how == 3 and isinstance(old, list) and old:
        holder[last] = draw.choice([old[:-1], old + old[:1], old[::-1], draw.sample(old, len(old)), old * 50])
    elif how == 4:
        *other_outer, other = draw.choice(found)
        source = value
        for key in other_outer:
            source = source[key] if isinstance(source, dict | list) else source
        try:
            holder[last] = json.loads(json.dumps(source[other]))
        except (LookupError, TypeError):
            holder[last] = None
    elif how == 5:
        holder[last] = {"a": old} if draw.random() < 0.5 else [old]
    else:
        holder[last] = draw.choice(VALUES)


def change_model(metadata: dict[str, Any], draw: random.Random) -> None:
    """Ask for another model, in place."""
    model = metadata.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("args"), dict):
        return
    if draw.random() < 0.3:
        names = timm.list_models() if draw.random() < 0.3 else NAMES
        model["name"] = draw.choice(names)
    for _ in range(draw.randrange(1, 4)):
        key = draw.choice(list(ARGUMENTS))
        model["args"][key] = draw.choice(ARGUMENTS[key])
    if draw.random() < 0.3:
        block = draw.choice(["blocks.0", "blocks.1", "blocks.9", "", "x"])
        kind = draw.choice(["live_heads", "live_neurons"])
        metadata[kind] = {block: draw.choice([[0], [1, 0], [5], list(range(96)), [1 << 20], [], [-1]])}
    if draw.random() < 0.2:
        stages = draw.choice([[0], [1], [0, 1], [10**6], [1, 0], [True], []])
        metadata["selector"] = {"kind": draw.choice(["top_k", "threshold", "x"]), "stages": stages}


def change_tensor(tensors: dict[str, Piece], draw: random.Random) -> None:
    """Change a tensor, in place: its type, shape, bits or name; or exchange two."""
    name = draw.choice(list(tensors))
    piece = tensors[name]
    width, count = WIDTHS[piece.dtype], len(piece.data) // WIDTHS[piece.dtype]
    how = draw.randrange(10)
    if how == 0:
        piece.dtype = draw.choice([dtype for dtype, other in WIDTHS.items() if other == width])
    elif how == 1:
        piece.shape = draw.choice(
            [[count], [1, count], [count, 1], piece.shape[::-1], [1, *piece.shape], [1] * 7 + [count]]
        )
    elif how == 2:
        del tensors[name]
    elif how == 3:
        new = draw.choice([f"{name}x", "evil\n", "\ud800", "", name.removesuffix(".mask"), name.upper(), "structure"])
        tensors[new] = tensors.pop(name)
    elif how == 4:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], piece
    elif how == 5 and piece.dtype in ("F16", "F32", "F64", "BF16"):
        bits = {"F16": 0x7C01, "BF16": 0x7F81, "F32": 0x7FC00000, "F64": 0x7FF0 << 48}[piece.dtype]
        special = draw.choice([bits, bits & ~1, 1 << (8 * width - 1), 1, (1 << 8 * width) - 1]).to_bytes(
            width, "little"
        )
        place = draw.randrange(max(count, 1)) * width
        piece.data = special * count if draw.random() < 0.3 else splice(piece.data, place, special)
    elif how == 6:
        keep = draw.randrange(count + 1)
        piece.shape, piece.data = [keep], piece.data[: keep * width]
    elif how == 7:
        piece.shape, piece.data = [0, *draw.choice([[], [5], [1 << 62], [1 << 40, 1 << 40]])], b""
    elif how == 8:
        piece.data = draw.choice([bytes(len(piece.data)), b"\xff" * len(piece.data), draw.randbytes(len(piece.data))])
    else:
        for _ in range(draw.choice([1, 1, 8])):
            piece.data = flip(piece.data, draw)


def change_structure(tensors: dict[str, Piece], draw: random.Random) -> None:
    """Change the JSON of a resume bundle, in place."""
    piece = tensors.get("structure")
    if piece is None or piece.dtype != "U8":
        return
    try:
        structure = json.loads(piece.data)
    except (ValueError, RecursionError):  # an earlier change has made it no JSON
        return
    for _ in range(draw.choice([1, 1, 1, 4])):
        change_value(structure, draw)
    piece.data = as_json(structure).encode("utf-8", "surrogatepass")
    piece.shape = [len(piece.data)]


def change_meaning(document: Document, draw: random.Random) -> bytes:
    """A sealed file that says something else than ``document``, which changes."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        how = draw.randrange(6)
        if how < 2 and document.metadata:
            change_value(document.metadata, draw)
        elif how == 2 and document.metadata:
            change_model(document.metadata, draw)
        elif how == 3 and document.tensors:
            change_structure(document.tensors, draw)
        elif document.tensors:
            change_tensor(document.tensors, draw)
    return put_together(document)


def change_header(document: Document, draw: random.Random) -> bytes:
    """A sealed file whose header lies about its data, or is odd JSON."""
    header, data = header_of(document)
    text: Callable[[str], str] = str
    how = draw.randrange(8)
    names = list(document.tensors)
    if how < 3 and names:
        entry = header[draw.choice(names)]
        begin, end = entry["data_offsets"]
        shift = draw.choice([1, 4, -1, 1 << 40, -(1 << 40), len(data)])
        entry["data_offsets"] = draw.choice(
            [[begin + shift, end + shift], [begin, end + shift], [end, begin], [0, end]]
        )
        if draw.random() < 0.5:
            entry["shape"] = draw.choice([[1 << 40], [1 << 31, 1 << 31], [math.prod(entry["shape"]) + shift], [-1]])
    elif how == 3 and names:
        header[draw.choice(names)] = draw.choice(VALUES)
    elif how == 4 and names:
        key = draw.choice(["dtype", "shape", "data_offsets"])
        header[draw.choice(names)][key] = draw.choice([*VALUES, "F8_E4M3", "F128", "f32"])
    elif how == 5:
        key = draw.choice([*header["__metadata__"], "__proto__"])
        header["__metadata__"][key] = draw.choice(VALUES)
    elif how == 6:
        change_value(header, draw)
    else:
        name = json.dumps(draw.choice([*names, "__metadata__"]))
        raw = draw.choice(list(RAW.values()))
        odd = [
            lambda text: text.replace(name, f"{name}:1,{name}", 1),
            lambda text: text[:-1] + f',"x":{raw}' + "}",
            lambda text: raw,
            lambda text: text + " " * 100,
            lambda text: "\ufeff" + text,
            lambda text: text.replace("{", "{ ", 3),
            lambda text: text[:-1] + ',"\ud800":1}',
            lambda text: text.replace('"F32"', '"\\u0046\\u0033\\u0032"'),
        ]
        text = draw.choice(odd)
    return seal(header, data, text)


def change_bytes(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """``content`` with a few bytes changed, moved, lost or added, and no checksum corrected."""
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice([1, 1, 2, 3])):
        place = draw.randrange(draw.choice([8, end, len(content)]) if len(content) > end else len(content) + 1)
        length = draw.choice([1, 4, 64, 4096])
        how = draw.randrange(9)
        if how == 0:
            content = flip(content, draw)
        elif how == 1:
            content = splice(content, place, draw.randbytes(length))
        elif how == 2:
            content = content[:place]
        elif how == 3:
            content += draw.choice([b"\0", draw.randbytes(length), content[:length]])
        elif how == 4:
            content = content[:place] + content[place + length :]
        elif how == 5:
            content = content[:place] + draw.randbytes(length) + content[place:]
        elif how == 6:
            content = splice(content, place, other[place : place + length])
        elif how == 7:
            declared = draw.choice([0, 1, end, end - 9, len(content), 1 << 23, 1 << 31, 1 << 63, draw.getrandbits(64)])
            content = declared.to_bytes(8, "little") + content[8:]
        else:
            content = splice(content, place, bytes(length))
        if not content:
            break
    return content


def splice(content: bytes, place: int, new: bytes) -> bytes:
    """``new`` over what lies at ``place``; no longer than before."""
    new = new[: max(0, len(content) - place)]
    return content[:place] + new + content[place + len(new) :]


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit flipped."""
    if not content:
        return content
    bits = np.frombuffer(content, np.uint8).copy()
    bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
    return bits.tobytes()


def forge(document: Document, draw: random.Random) -> bytes:
    """A file in which all agrees, but of another model than ``document`` was of: made up, and as small as that."""
    if document.kind != "sparse-trainer":
        return change_meaning(document, draw)
    metadata = document.metadata
    metadata["selector"], metadata["live_heads"], metadata["live_neurons"] = None, {}, {}
    for _ in range(draw.randrange(3)):
        change_model(metadata, draw)
    masked = metadata.pop("masked")
    try:
        model = build_without_memory(SparseInfo.from_metadata(metadata), create_model)
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    except Exception:  # there is no such model; the reader must find that too
        state = {}
    metadata["masked"] = masked
    if not state or sum(tensor.numel() for tensor in state.values()) > MOST_FORGED:
        return put_together(document)
    generator = np.random.default_rng(draw.getrandbits(32))
    metadata["masked"], document.tensors, live = {}, {}, 0
    for name, tensor in state.items():
        count, shape = tensor.numel(), list(tensor.shape)
        if not tensor.is_floating_point():
            dtype = {1: "U8", 8: "I64"}.get(tensor.element_size(), "I32")
            document.tensors[name] = Piece(dtype, shape, draw.randbytes(count * WIDTHS[dtype]))
        elif len(shape) > 1 and count and draw.random() < 0.5:
            mask = generator.random(count) < draw.choice([0.0, 0.1, 0.5, 1.0])
            values = generator.normal(0, draw.choice([1e-3, 1.0, 1e20]), int(mask.sum())).astype(np.float32)
            document.tensors[f"{name}.values"] = Piece("F32", [len(values)], values.tobytes())
            bits = np.packbits(mask, bitorder="little")
            document.tensors[f"{name}.mask"] = Piece("U8", [len(bits)], bits.tobytes())
            metadata["masked"][name], live = shape, live + len(values)
        else:
            values = generator.normal(0, 0.02, count).astype(np.float32)
            document.tensors[name] = Piece("F32", shape, values.tobytes())
    metadata["budget"] = {"live": live, "total": live}
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or (16, 16)
    channels = getattr(getattr(embed, "proj", None), "in_channels", 1)
    factor = draw.choice([1, 1, 1, 2, 8])
    metadata["input"] = {
        "image_size": [factor * side for side in size],
        "in_chans": channels,
        "mean": [0.5] * channels,
        "std": [0.5] * channels,
    }
    if draw.random() < 0.7:
        metadata["class_names"] = None
    return put_together(document)


#: By name; each takes a file, another one, and a generator.
MUTATIONS: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "bytes": change_bytes,
    "header": lambda content, _, draw: change_header(take_apart(content), draw),
    "meaning": lambda content, _, draw: change_meaning(take_apart(content), draw),
    "forged": lambda content, _, draw: forge(take_apart(content), draw),
}
