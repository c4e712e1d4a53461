"""The resume bundle: what goes in comes out, in every bit and type."""

from __future__ import annotations

import math
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_trainer.files.checkpoint import CheckpointError, load_resume, save_resume
from sparse_trainer.files.tensor_file import write_tensors

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)


def types(value: Any) -> Any:
    """The shape of a nested value in types: ``1 == 1.0 == True`` must not hide a changed type."""
    if isinstance(value, dict):
        return {(type(key), key): types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [types(item) for item in value]
    return type(value)


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text(), values, max_size=4))
def test_round_trip_of_any_nested_state(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("resume") / "last.ckpt"
    save_resume(path, state)
    loaded = load_resume(path)
    assert loaded == state
    assert types(loaded) == types(state)
    assert list(loaded) == list(state), "the order of keys is kept"


def test_floats_that_json_has_no_word_for(tmp_path: Path) -> None:
    state = {"best": -math.inf, "loss": math.nan, "zero": -0.0, "tiny": 5e-324}
    save_resume(tmp_path / "last.ckpt", state)
    loaded = load_resume(tmp_path / "last.ckpt")
    assert loaded["best"] == -math.inf
    assert math.isnan(loaded["loss"])
    assert math.copysign(1, loaded["zero"]) == -1
    assert loaded["tiny"] == 5e-324


def test_a_training_state_continues_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    state = {
        "model": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generators": {"torch": torch.get_rng_state(), "python": random.getstate()},
    }
    path = tmp_path / "last.ckpt"
    save_resume(path, state)
    train(model, optimizer)

    again, again_optimizer = make()
    loaded = load_resume(path)
    again.load_state_dict(loaded["model"])
    again_optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["generators"]["torch"])
    assert loaded["generators"]["python"] == state["generators"]["python"]
    train(again, again_optimizer)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_loaded_tensors_share_no_memory(tmp_path: Path) -> None:
    shared = torch.zeros(4)
    save_resume(tmp_path / "last.ckpt", {"a": shared, "b": shared})
    loaded = load_resume(tmp_path / "last.ckpt")
    loaded["a"] += 1
    assert loaded["b"].tolist() == [0, 0, 0, 0]


def test_types_of_tensors(tmp_path: Path) -> None:
    """As among the settings of timm's Adafactor."""
    state = {"momentum_dtype": torch.bfloat16, "b": [torch.float32, torch.bool]}
    save_resume(tmp_path / "last.ckpt", state)
    assert load_resume(tmp_path / "last.ckpt") == state


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"state.a.1: a numpy.ndarray cannot be stored; use tensors, types"):
        save_resume(path, {"a": [0, np.zeros(3)]})
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        save_resume(path, {"a": cycle})
    assert not path.exists()


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "last.ckpt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="a pickle"):
        load_resume(path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(CheckpointError, match="a pickle"):
        load_resume(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "structure",
    [
        b"",
        b"[1]",
        b"{}",
        b'{"dict": 1}',
        b'{"dict": [[1]]}',
        b'{"dict": [[{"dict": []}, 1]]}',
        b'{"dict": [["a", {"tensor": "none"}]]}',
        b'{"dict": [["a", {"tensor": []}]]}',
        b'{"dict": [["a", {"float": "x"}]]}',
        b'{"dict": [["a", {"dtype": "x"}]]}',
        b'{"dict": [["a", {"dtype": ["float32"]}]]}',
        b'{"dict": [], "tuple": []}',
        b'{"code": 1}',
        b'{"dict": [["a", ' + b'{"tuple": [' * 5000 + b"]}" * 5000 + b"]]}",
        b"\xff",
    ],
)
def test_a_lying_structure(tmp_path: Path, structure: bytes) -> None:
    path = tmp_path / "last.ckpt"
    tensors = {"structure": torch.frombuffer(bytearray(structure), dtype=torch.uint8) if structure else torch.zeros(0)}
    write_tensors(path, tensors, {}, format="sparse-trainer-resume", version=1)
    with pytest.raises(CheckpointError, match=r"last.ckpt: the structure of the bundle: expected .*, found"):
        load_resume(path)
    write_tensors(path, {}, {}, format="sparse-trainer-resume", version=1)
    with pytest.raises(CheckpointError, match="the structure of the bundle"):
        load_resume(path)
