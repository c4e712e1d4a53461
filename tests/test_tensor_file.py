"""The file container: whole or absent, and checked before it is believed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from experiments.trials.mutations import put_together, take_apart
from sparse_trainer.files import whole_file
from sparse_trainer.files.tensor_file import (
    CheckpointError,
    parse_json,
    read_metadata,
    read_tensors,
    write_atomically,
    write_tensors,
)

MASKS: dict[str, Any] = {"format": "sparse-trainer-masks", "version": 1}


def tensors() -> dict[str, torch.Tensor]:
    grid = torch.arange(12.0).view(3, 4)
    return {
        "float64": torch.tensor([1.5, float("nan")], dtype=torch.float64),
        "transposed": grid.t(),
        "shared": grid,
        "half": torch.tensor([[0.1]], dtype=torch.float16),
        "bfloat": torch.tensor(3.0, dtype=torch.bfloat16),
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "bools": torch.tensor([True, False, True]),
        "long": torch.tensor(-(2**62)),
        "empty": torch.zeros(0, 5),
    }


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, tensors(), {"numbers": [1, 2.5], "name": "β"}, **MASKS)
    loaded, metadata = read_tensors(path, **MASKS)
    assert metadata == {"numbers": [1, 2.5], "name": "β"} == read_metadata(path, **MASKS)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(), tensor.nan_to_num())


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, tensors(), {"a": 1}, **MASKS)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(tensor.nan_to_num(), tensors()[name].nan_to_num())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "sparse-trainer-masks"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": torch.arange(5.0)}, {"a": "b"}, **MASKS)
    original = path.read_bytes()
    for bit in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_tensors(path, **MASKS)


def test_every_header_length_can_be_read(tmp_path: Path) -> None:
    """Also one that begins with the byte that a pickle begins with."""
    path = tmp_path / "file.safetensors"
    starts = set()
    for padding in range(260):
        write_tensors(path, {"w": torch.ones(1)}, {"a": "b" * padding}, **MASKS)
        assert torch.equal(read_tensors(path, **MASKS)[0]["w"], torch.ones(1))
        starts.add(path.read_bytes()[0])
    assert 0x80 in starts


def test_every_truncation_and_an_extra_byte_are_found(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": torch.arange(5.0)}, {"a": "b"}, **MASKS)
    original = path.read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(CheckpointError):
            read_tensors(path, **MASKS)
    path.write_bytes(original + b"\0")
    with pytest.raises(CheckpointError, match=r"too long: expected .* bytes, found"):
        read_tensors(path, **MASKS)


def raw(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors file: .*found a file of 0 bytes"),
        (b"\x80\x04\x95pickle", "pickle"),
        (b"PK\x03\x04 torch.save writes a zip", "pickle"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "at most 2 bytes, found 4,611,686,018,427,387,904"),
        (raw(b"\xff\xfe"), "header is damaged or no safetensors header: expected JSON"),
        (raw(b"[" * 100_000), "nested too deeply"),
        (raw([1]), "expected a JSON object, found list"),
        (raw(b'{"a": 1, "a": 2}'), "a key that occurs twice"),
        (raw(b'{"a": NaN}'), "NaN, which is no JSON number"),
        (raw({"__metadata__": {"a": 1}}), "expected an object of strings"),
        (raw({"w": entry()}, b"1234"), "not one that sparse-trainer wrote"),
        (raw({"w": entry(dtype="F8_E5M2")}, b"1234"), "dtype of 'w': expected .*F32"),
        (raw({"w": entry(dtype=["F32"])}, b"1234"), "dtype of 'w'"),
        (raw({"w": entry(shape=[2])}, b"1234"), "shape and data_offsets that go together"),
        (raw({"w": entry(shape=[-1], offsets=[0, -4])}), "go together"),
        (raw({"w": entry(shape=[True])}, b"1234"), "go together"),
        (raw({"w": entry(shape=[1] * 9)}, b"1234"), "go together"),
        (raw({"w": entry(shape=[1 << 40, 1 << 40], offsets=[0, 1 << 82])}, b"1234"), "go together"),
        (raw({"w": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, b"1234"), "truncated or too long"),
        (raw({"w": entry(offsets=[4, 8])}, b"12345678"), "place of 'w': expected byte 0, found 4"),
        (raw({"v": entry(), "w": entry()}, b"1234"), "place of 'w'"),
        (raw({"w": {**entry(), "more": 1}}, b"1234"), "entry for 'w'"),
        (raw({"w": 7}), "entry for 'w'"),
    ],
)
def test_hostile_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tensors(path, **MASKS)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 1000


def test_an_oversized_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with open(path, "wb") as file:  # a file with holes: large, yet takes no disk
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 32)
    with pytest.raises(CheckpointError, match="at most 8,388,608 bytes, found 1,073,741,824"):
        read_tensors(path, **MASKS)


def test_a_bool_that_is_neither(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": torch.tensor([2], dtype=torch.uint8)}, {}, **MASKS)
    document = take_apart(path.read_bytes())
    document.tensors["w"].dtype = "BOOL"
    path.write_bytes(put_together(document))
    with pytest.raises(CheckpointError, match="expected 0 or 1, as bool"):
        read_tensors(path, **MASKS)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_tensors(tmp_path / "none", **MASKS)
    with pytest.raises(CheckpointError, match=r"is a folder, expected a file$"):
        read_tensors(tmp_path, **MASKS)
    (tmp_path / "sparse.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"did you mean .*sparse.safetensors\?"):
        read_tensors(tmp_path, **MASKS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a device or a pipe"):
        read_tensors(tmp_path / "pipe", **MASKS)
    with pytest.raises(CheckpointError, match="null"):
        read_tensors("a\0b", **MASKS)


def test_another_kind_and_another_version(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {}, {}, format="sparse-trainer-resume", version=1)
    with pytest.raises(CheckpointError, match=r"expected a record of .* found a resume bundle \(for `sparse-tra"):
        read_metadata(path, **MASKS)
    write_tensors(path, {}, {}, format="sparse-trainer-masks", version=2)
    with pytest.raises(CheckpointError, match="expected format version 1, found '2'"):
        read_metadata(path, **MASKS)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(ValueError, match=r"w: a torch.strided tensor of torch.complex64 cannot be stored"):
        write_tensors(path, {"w": torch.zeros(1, dtype=torch.complex64)}, {}, **MASKS)
    with pytest.raises(ValueError, match=r"w: a torch.sparse_coo tensor"):
        write_tensors(path, {"w": torch.zeros(1).to_sparse()}, {}, **MASKS)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_tensors(path, {}, {"a": float("nan")}, **MASKS)
    with pytest.raises(ValueError, match="the header takes"):
        write_tensors(path, {}, {"a": "x" * (9 << 20)}, **MASKS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, [b"old"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def chunks() -> Any:
        yield b"new"
        if failing == "write":
            full()

    if failing != "write":
        monkeypatch.setattr(whole_file.os, failing, full)
    with pytest.raises(CheckpointError, match="No space left on device; the file that was there is unchanged"):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "the temporary file is gone"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, [b"old"])

    def chunks() -> Any:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_take_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written: No such file or directory$"):
        write_atomically(tmp_path / "none" / "file", [b""])
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be written: Is a directory$"):
        write_atomically(tmp_path / "folder", [b""])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device$"):
        write_atomically(path, [b"data"])
    assert not path.exists()


def test_parse_json_is_strict() -> None:
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for text in ("", "{", '{"a":1,"a":1}', "Infinity", "[" * 10_000, "1" * 5000):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)
