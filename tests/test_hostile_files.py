"""Every command that reads a file, on every kind of bad file: exit code 2 and one line that names it."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from experiments.__main__ import main
from experiments.config.reading import to_yaml
from experiments.run_folder.folder import RunFolder
from experiments.training.loop import Loop, Stopped
from experiments.trials.mutations import Document, Piece, header_of, put_together, seal, take_apart
from experiments.trials.readers import Source, real_files
from sparse_trainer.files.checkpoint import CheckpointError, load_resume, save_resume
from tests.test_losses import JOINT
from tests.test_training import StopAt, make_trainer, start
from tests.test_training import run as go_through


class Evil:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    torch.set_num_threads(1)
    return {source.name: source for source in real_files(tmp_path_factory.mktemp("real") / "files")}


def doctored(content: bytes, change: Callable[[Document], object]) -> bytes:
    """The file with a change that knows the checksums."""
    document = take_apart(content)
    change(document)
    return put_together(document)


def set_args(**arguments: Any) -> Callable[[Document], object]:
    return lambda document: document.metadata["model"]["args"].update(arguments)


def set_pieces(change: Callable[[Piece], object]) -> Callable[[Document], object]:
    return lambda document: [change(piece) for piece in document.tensors.values() if piece.dtype == "F32"]


def fill_with_nan(piece: Piece) -> None:
    piece.data = b"\x00\x00\xc0\x7f" * (len(piece.data) // 4)


def widen(piece: Piece) -> None:
    piece.dtype, piece.data = "F64", piece.data * 2


def lie_about_the_data(content: bytes) -> bytes:
    header, data = header_of(take_apart(content))
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"][1] += 1 << 40
            break
    return seal(header, data)


#: What becomes of a sparse checkpoint, and what the error says about it.
CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "truncated or no safetensors file: .* found a file of 0 bytes"),
    "one byte": (lambda content: b"\x00", "found a file of 1 bytes"),
    "truncated": (lambda content: content[:-100], r"truncated or too long: expected [\d,]+ bytes, found [\d,]+"),
    "truncated in the header": (lambda content: content[:500], "truncated or no safetensors file: expected a header"),
    "a flipped bit in the header": (
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        "header is damaged|header's entry|metadata|another|place|dtype|not one that",
    ),
    "an oversized header": (lambda content: (1 << 40).to_bytes(8, "little") + content[8:], "found 1,099,511,627,776"),
    "a claim of a terabyte": (lie_about_the_data, "the header's entry for .* go together"),
    "a wrong version": (lambda content: doctored(content, lambda d: setattr(d, "version", "99")), "found '99'"),
    "metadata of another model": (lambda content: doctored(content, set_args(num_heads=5)), "cannot be rebuilt: "),
    "a model of another size": (
        lambda content: doctored(content, set_args(embed_dim=48)),
        r"expected floating \(1, 1, 48\), found .*24|missing|expected",
    ),
    "a model that takes pretrained weights": (
        lambda content: doctored(content, set_args(pretrained=True)), "found 'pretrained'"
    ),
    "a model that reads a file": (
        lambda content: doctored(content, set_args(checkpoint_path="/etc/passwd")), "found 'checkpoint_path'"
    ),
    "a path for a name": (
        lambda content: doctored(content, lambda d: d.metadata["model"].update(name="../../etc/passwd")),
        r"expected the name of a registered .* found '../../etc/passwd'",
    ),
    "a hub for a name": (
        lambda content: doctored(content, lambda d: d.metadata["model"].update(name="hf-hub:timm/vit_tiny")),
        "expected the name of a registered .* found 'hf-hub",
    ),
    "a folder for a name": (
        lambda content: doctored(content, lambda d: d.metadata["model"].update(name="local-dir:/tmp")),
        "expected the name of a registered .* found 'local-dir",
    ),
    "a path for a tensor": (
        lambda content: doctored(content, lambda d: d.tensors.update({"../../x": Piece("U8", [1], b"1")})),
        "not in the model: '../../x'",
    ),
    "depth without end": (lambda content: doctored(content, set_args(depth=10**6)), "a whole number from 1 to 256"),
    "an image without end": (lambda content: doctored(content, set_args(img_size=10**5)), "1 to 8192 pixels"),
    "another type": (lambda content: doctored(content, set_pieces(widen)), "the dtype of|values"),
    "nothing but NaN": (
        lambda content: doctored(content, set_pieces(fill_with_nan)), "expected finite numbers, found NaN or infinity"
    ),
    "class names that control the terminal": (
        lambda content: doctored(content, lambda d: d.metadata.update(class_names=["\x1b[2J"] * 5)),
        r"printable strings, found \('\\x1b",
    ),
}  # fmt: skip


def make_other_files(folder: Path, witness: Path) -> dict[str, tuple[Path, str]]:
    """Files of other kinds, and what the error says about them."""
    weights = {"head.weight": torch.zeros(2, 2)}
    found: dict[str, tuple[Path, str]] = {}

    def add(name: str, message: str) -> Path:
        path = folder / name.replace(" ", "_")
        found[name] = (path, message)
        return path

    torch.save({"model": Evil(witness)}, add("a zip of torch.save.pth", "looks like a pickle .* never opened"))
    path = add("a legacy file of torch.save.pth", "looks like a pickle .* never opened")
    torch.save({"model": Evil(witness)}, path, _use_new_zipfile_serialization=False)
    add("a pickle.pkl", "looks like a pickle .* never opened").write_bytes(pickle.dumps(Evil(witness)))
    message = "a safetensors file, but not one that sparse-trainer wrote"
    safetensors.torch.save_file(weights, add("plain weights.safetensors", message))
    Image.new("L", (8, 8)).save(add("a picture.png", "truncated or no safetensors file"))
    add("a compressed file.gz", "truncated or no safetensors file").write_bytes(gzip.compress(b"x" * 1000))
    add("a text.txt", "truncated or no safetensors file").write_text("weights\n" * 100)
    add("JSON.json", "truncated or no safetensors file").write_text(json.dumps({"a": list(range(100))}))
    os.mkfifo(add("a pipe", "a device or a pipe, expected a regular file"))
    loop = add("a link to itself", "cannot be read: Too many levels of symbolic links")
    loop.symlink_to(loop)
    add("a link to nowhere", "there is no").symlink_to(folder / "nowhere")
    found["a device"] = (Path("/dev/zero"), "a device or a pipe, expected a regular file")
    found["below a file"] = (found["a text.txt"][0] / "x", "cannot be read: Not a directory|there is no")
    return found


SMALL = ["--training.epochs=1", "--schedule.warmup_epochs=0", "--data.train_subset=100", "--data.eval_subset=20"]
READERS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "FILE", "--device=cpu"],
    "inspect": ["inspect", "FILE", "--json"],
    "export": ["export", "FILE", "--format=dense", "--output=out"],
}
TRAINING: dict[str, list[str]] = {
    "start": ["train", "--model.start=FILE", *SMALL],
    "teacher": ["train", "--losses.teacher=FILE", "--losses.distillation_weight=1", *SMALL],
}


@pytest.fixture
def bad_files(
    tmp_path: Path, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Path, str]]:
    """All bad files by what they are, each with what the error says."""
    monkeypatch.chdir(tmp_path)
    found = make_other_files(tmp_path, tmp_path / "witness")
    contents = {name: (change(sources["weights"].content), message) for name, (change, message) in CONTENTS.items()}
    contents["a resume bundle"] = (sources["resume bundle"].content, "another kind of file: .* found a resume bundle")
    contents["a record of masks"] = (sources["mask timeline"].content, "another kind of file: .* found a record of the")
    for name, (content, message) in contents.items():
        path = tmp_path / f"{name.replace(' ', '_')}.safetensors"
        path.write_bytes(content)
        found[name] = (path, message)
    return found


def check_refusal(arguments: Sequence[str], path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("FILE", str(path)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.isprintable()
    assert line.startswith(f"sparse-trainer {arguments[0]}: error: ")
    assert str(path) in line
    assert re.search(message, line), f"{message!r} is not in {line!r}"


@pytest.mark.parametrize("command", READERS)
def test_one_line_says_what_is_wrong(
    bad_files: dict[str, tuple[Path, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = set(tmp_path.iterdir())
    for path, message in bad_files.values():
        check_refusal(READERS[command], path, message, capsys)
    assert set(tmp_path.iterdir()) == before, "nothing was executed, nothing was written"


@pytest.mark.parametrize("command", TRAINING)
def test_training_does_not_begin_with_it(
    bad_files: dict[str, tuple[Path, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name in ("a pickle.pkl", "a flipped bit in the header", "a path for a name", "a pipe"):
        check_refusal(TRAINING[command], *bad_files[name], capsys)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "witness").exists()


def test_a_file_that_may_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is for a user; an administrator may read everything, so it is the system call that says no."""
    path = tmp_path / "secret.safetensors"
    path.write_bytes(b"x" * 100)
    really_open = os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    for arguments in READERS.values():
        check_refusal(arguments, path, "cannot be read: Permission denied$", capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a joint run that was stopped after six steps, and its only bundle."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    loop = start(folder / "run", JOINT)
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    with pytest.raises(Stopped):
        go_through(loop, StopAt, at=6)
    for bundle in loop.folder.bundles()[1:]:
        bundle.unlink()
    return folder / "run"


def in_trainer(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a value in the trainer's state; a function gets the old one."""

    def change(state: dict[str, Any]) -> None:
        inner = state["trainer"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value(inner[keys[-1]]) if callable(value) else value

    return change


def with_position(state: torch.Tensor) -> torch.Tensor:
    """A generator's state with all words left, and the last one next."""
    position = torch.frombuffer(bytearray(struct.pack("<iiQ", 624, 1, 624)), dtype=torch.uint8)
    return torch.cat([state[:8], position, state[24:]])


HEADS = ("sparsity", "units", "blocks.0.head", "live")
NOT_OF_THIS_RUN = "is not of this run or version: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_trainer("model", "norm.bias", value=lambda t: t * math.nan), "model.norm.bias: expected finite .* NaN"),
        (in_trainer("ema", "norm.bias", value=lambda t: t / 0), "ema.norm.bias: expected finite numbers, found NaN"),
        (in_trainer("model", "norm.bias", value=lambda t: t.double()), r"expected torch.float32 \(24,\), .*float64"),
        (in_trainer("model", "norm.bias", value=lambda t: t[:-1]), r"expected .* \(24,\), found torch.float32 \(23,\)"),
        (in_trainer("model", "norm.bias", value=None), "model.norm.bias: expected .*, found None"),
        (in_trainer("model", value=lambda model: {**model, "x": torch.ones(1)}), "model: holds 'x'"),
        (in_trainer("optimizer", "state", 0, "exp_avg", value=lambda t: t.view(-1)[:1]), "exp_avg: expected .*, 1, 24"),
        (in_trainer("optimizer", "state", value=lambda s: {10**6: s[0]}), "state.1000000: expected moments of one of"),
        (in_trainer("optimizer", "state", 1, value=lambda s: {"step": s["step"]}), r"state.1: expected \['exp_avg"),
        (in_trainer("optimizer", "state", 1, "step", value=-1.0), "state.1.step: expected at most 20, found -1.0"),
        (in_trainer("optimizer", "param_groups", 0, "lr", value="fast"), "lr: expected float, found 'fast'"),
        (in_trainer("optimizer", "param_groups", 0, "lr", value=math.inf), "optimizer: found lr inf"),
        (in_trainer("optimizer", "param_groups", 0, "betas", value=(0.9, 2.0)), "optimizer: expected betas .*2.0"),
        (in_trainer("tried", value=10**30), "steps: expected at most 20, found"),
        (in_trainer("tried", value="6"), "steps: expected at most 20, found"),
        (in_trainer("step", value=-1), "steps: expected at most 20, found"),
        (in_trainer("sparsity", value=None), "sparsity: expected a dictionary, found None"),
        (in_trainer("sparsity", "weights", "masks", value=lambda m: {**m, "x": torch.ones(1)}), "masks: holds 'x'"),
        (in_trainer("sparsity", "weights", "generator", value=with_position), "word 624 of 624 with 624 left"),
        (in_trainer("sparsity", "weights", "growth", "mean", value={"x": torch.ones(1)}), "mean.x: expected the shape"),
        (in_trainer(*HEADS, value=lambda units: units[:1] * len(units)), "live and dormant heads are not all of them"),
        (in_trainer(*HEADS, value=lambda units: [9] * len(units)), "live and dormant heads are not all of them"),
        (in_trainer("model", "selector._extra_state", value=with_position), "word 624 of 624 with 624 left"),
        (in_trainer("random", 0, "numpy", 2, value=1 << 30), "at word 1073741824 of 624"),
        (in_trainer("random", 0, "torch", value="00"), "a random state of torch.uint8"),
        (in_trainer("random", 0, "python", 1, value=[-1] * 625), NOT_OF_THIS_RUN),
        (in_trainer("random", value={}), NOT_OF_THIS_RUN),
        (in_trainer("running", "sums", value={"train/loss": torch.ones(3)}), "running: found"),
        (in_trainer("tokens", value={"stages": "x"}), "tokens: found"),
        (in_trainer("config", value=None), "config: found"),
        (in_trainer("config", value={"\x1b[2J": 1}), "config: found"),
        (in_trainer("unreadable", value={"a": 1}), "unreadable: found"),
        (lambda state: state.update(history=[{"step": "x"}]), "history: found"),
        (lambda state: state.update(best=3), "best: found 3"),
        (lambda state: state.update(seconds=math.inf), "seconds: found inf"),
        (lambda state: state.pop("trainer"), "trainer: found None"),
        (lambda state: state["trainer"].pop("scaler"), "trainer: lacks 'scaler'"),
        (in_trainer("x", value=1), "trainer: holds 'x'"),
    ],
)  # fmt: skip
def test_a_bundle_that_lies(run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Whole and with right checksums, but no run can have saved it."""
    (original,) = RunFolder(run).bundles()
    state = load_resume(original)
    change(state)
    loop = start(tmp_path / "run", JOINT)
    path = loop.folder.checkpoints / original.name
    save_resume(path, state)
    with pytest.raises(CheckpointError, match=message) as error:
        loop.resume()
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["lamb", "adan", "muon", "madgrad", "nadam", "sgd"])
def test_every_optimizer_knows_its_own_bundle(name: str, tmp_path: Path) -> None:
    """Some count their steps beside their settings, some have moments of two kinds in one group."""
    loop = start(tmp_path / "run", JOINT, {"optimizer": {"name": name}})
    with pytest.raises(Stopped):
        go_through(loop, StopAt, at=6)
    again = Loop(make_trainer(JOINT, {"optimizer": {"name": name}}), loop.folder)
    again.resume()
    for trainer in (loop.trainer, again.trainer):
        trainer.train_step()
    pairs = zip(loop.trainer.model.parameters(), again.trainer.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_trainer("optimizer", "param_groups", 0, "step", value=-1), "param_groups.0.step: expected .* found -1"),
        (in_trainer("optimizer", "param_groups", 0, "step", value="x"), "param_groups.0.step: expected at most 20"),
        (in_trainer("optimizer", "param_groups", 0, "steps", value=1), "param_groups.0: holds 'steps'"),
        (in_trainer("optimizer", "param_groups", value=lambda groups: groups[:1]), "expected 2 groups of settings"),
        (in_trainer("optimizer", "param_groups", value=None), "expected 2 groups of settings, found None"),
        (in_trainer("optimizer", "state", 0, "exp_avg", value=lambda t: t.half()), "state.0.exp_avg: expected"),
    ],
)  # fmt: skip
def test_counts_beside_the_settings_that_lie(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    lamb = {"optimizer": {"name": "lamb"}}
    loop = start(tmp_path / "run", JOINT, lamb)
    with pytest.raises(Stopped):
        go_through(loop, StopAt, at=2)
    path = loop.folder.bundles()[0]
    state = load_resume(path)
    change(state)
    save_resume(path, state)
    with pytest.raises(CheckpointError, match=message):
        Loop(make_trainer(JOINT, lamb), loop.folder).resume()


def test_the_untouched_bundle_goes_on(run: Path, tmp_path: Path) -> None:
    loop = start(tmp_path / "run", JOINT)
    shutil.copy(RunFolder(run).bundles()[0], loop.folder.checkpoints)
    loop.resume()
    assert loop.trainer.tried == 6


def test_resume_from_bad_bundles(
    run: Path, tmp_path: Path, sources: dict[str, Source], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (bundle,) = RunFolder(tmp_path / "run").bundles()
    content = bundle.read_bytes()
    witness = tmp_path / "witness"
    bad = {
        "truncated or too long": content[:-1],
        "the tensor data is damaged: expected sha256": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "truncated or no safetensors file": b"",
        "looks like a pickle": pickle.dumps(Evil(witness)),
        "is another kind of file: expected a resume bundle, found a sparse checkpoint": sources["joint"].content,
        NOT_OF_THIS_RUN: sources["resume bundle"].content,
    }
    loop = Loop(make_trainer(JOINT), RunFolder(tmp_path / "run"))
    for message, other in bad.items():
        bundle.write_bytes(other)
        with pytest.raises(CheckpointError, match=message) as error:
            loop.resume()
        assert str(error.value).startswith(f"{bundle}: ")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sparse-trainer train: error: {bundle}: {NOT_OF_THIS_RUN}")
    bundle.unlink()
    os.mkfifo(bundle)
    with pytest.raises(CheckpointError, match="is a device or a pipe"):
        loop.resume()
    assert not witness.exists()
