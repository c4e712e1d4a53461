"""Damaged files by the hundreds, the failures that such files once found, and whether the fuzzer would find others."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.trials import fuzz, readers
from experiments.trials.fuzz import Report, from_json, mutate, read_apart, read_files, to_json, to_markdown
from experiments.trials.mutations import MUTATIONS, header_of, places, put_together, seal, take_apart
from experiments.trials.readers import Broken, Source, judge, real_files
from sparse_trainer.files.checkpoint import CheckpointError, load_resume, save_resume


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    torch.set_num_threads(1)
    return real_files(tmp_path_factory.mktemp("real") / "files")


def test_sources_are_whole_and_always_the_same(sources: list[Source], tmp_path: Path) -> None:
    assert [source.content for source in real_files(tmp_path / "files")] == [source.content for source in sources]
    assert {source.kind for source in sources} == {"sparse", "resume", "timeline", "run"}
    for source in sources:
        assert judge(source, source.content, tmp_path, blind=True) == "same"


def test_taken_apart_and_put_together_it_is_the_same_file(sources: list[Source], tmp_path: Path) -> None:
    for source in sources:
        document = take_apart(source.content)
        assert take_apart(put_together(document)) == document
        assert judge(source, put_together(document), tmp_path, blind=True) == "same"


def test_hundreds_of_files(sources: list[Source], tmp_path: Path) -> None:
    report = read_files(sources, 1, range(250), tmp_path)
    assert report.failures == []
    assert report.files == 250 == report.outcomes.total()
    for outcome in ("refused", "same", "consistent"):
        assert sum(count for key, count in report.outcomes.items() if key.endswith(outcome)) > 10
    assert not list(tmp_path.glob("0*")), "nothing is left of files that did no harm"


def test_a_number_and_a_seed_make_a_file(sources: list[Source]) -> None:
    assert mutate(sources, 1, 7) == mutate(sources, 1, 7)
    assert mutate(sources, 1, 7) != mutate(sources, 2, 7)
    assert {mutate(sources, 0, number)[1] for number in range(50)} == set(MUTATIONS)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(draw=st.randoms(use_true_random=False), number=st.integers(0, 7), kind=st.sampled_from(list(MUTATIONS)))
def test_mutations_that_hypothesis_chooses(
    sources: list[Source], tmp_path: Path, draw: random.Random, number: int, kind: str
) -> None:
    source = sources[number]
    content = MUTATIONS[kind](source.content, sources[0].content, draw)
    judge(source, content, tmp_path, blind=kind == "bytes")  # raises if it finds fault


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.integers(0, 100) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["resnet18", "hf_hub:a/b", "avg"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_in_the_header(sources: list[Source], tmp_path: Path, data: st.DataObject) -> None:
    """One or two values of the metadata or of the tensors' entries, of any kind, in a file that is sealed again."""
    source = sources[data.draw(st.integers(0, len(sources) - 1))]
    document = take_apart(source.content)
    header, body = header_of(document)
    target = data.draw(st.sampled_from([document.metadata, header]))
    for _ in range(data.draw(st.integers(1, 2))):
        found = places(target)
        if not found:
            break
        *outer, last = data.draw(st.sampled_from(found))
        holder: Any = target
        for key in outer:
            holder = holder[key]
        holder[last] = data.draw(json_values)
    content = put_together(document) if target is document.metadata else seal(header, body)
    judge(source, content, tmp_path, blind=False)


def named(sources: list[Source], name: str) -> Source:
    return next(source for source in sources if source.name == name)


STRUCTURES = {
    "a float that is no text": b'{"dict":[["a",{"float":1}]]}',
    "an integer too large for a float": b'{"dict":[["a",{"float":' + b"9" * 400 + b"}]]}",
    "a number too large": b'{"dict":[["a",1e999]]}',
    "text for pairs": b'{"dict":"ab"}',
    "a dictionary for pairs": b'{"dict":{"ab":1}}',
    "text for a tuple": b'{"dict":[["a",{"tuple":"ab"}]]}',
    "a key twice": b'{"dict":[[1,2],[true,3]]}',
    "an integer too long": b'{"dict":[["a",' + b"9" * 5000 + b"]]}",
    "half a character": b'{"dict":[["\\ud800",{"tensor":"\\ud800"}]]}',
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_a_structure_that_once_got_through(sources: list[Source], tmp_path: Path, structure: bytes) -> None:
    source = named(sources, "resume bundle")
    document = take_apart(source.content)
    document.tensors["structure"].data, document.tensors["structure"].shape = structure, [len(structure)]
    assert judge(source, put_together(document), tmp_path, blind=True) == "refused"


@pytest.mark.parametrize("shape", [[0, 1 << 62], [0, 1 << 40, 1 << 40], [1 << 62, 0, 2]])
def test_shapes_of_nothing_that_cannot_be_counted(sources: list[Source], tmp_path: Path, shape: list[int]) -> None:
    for source in sources:
        document = take_apart(source.content)
        piece = next(iter(document.tensors.values()))
        piece.shape, piece.data = shape, b""
        assert judge(source, put_together(document), tmp_path, blind=True) == "refused"


@pytest.mark.parametrize(
    "change",
    [
        {"live_heads": {"blocks.0": ["1"]}},
        {"live_heads": {"\x1b[2J": [1]}},
        {"live_neurons": {"blocks.0": 0.5}},
        {"update": {"step": 2}},
        {"update": 7},
        {"step": 3},
        {"shapes": {"blocks.0.attn.qkv.weight": [1 << 70, 0]}},
        {"shapes": {"blocks.0.attn.qkv.weight": ["x"]}},
        {"shapes": []},
    ],
)
def test_a_record_that_once_got_through(sources: list[Source], tmp_path: Path, change: dict[str, Any]) -> None:
    source = named(sources, "mask timeline")
    document = take_apart(source.content)
    document.metadata.update(change)
    assert judge(source, put_together(document), tmp_path, blind=True) == "refused"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("warnings",), ["\x1b[2J"]),
        (("seconds",), "1"),
        (("budget", "live"), 0.5),
        (("layers", "head.weight", "live"), True),
        (("layers",), {"a\nb": {}}),
        (("blocks", "blocks.0", "live_heads"), [0.5]),
    ],
)
def test_a_report_of_the_wrong_types(
    sources: list[Source], tmp_path: Path, part: tuple[str, ...], value: object
) -> None:
    source = named(sources, "mask timeline")
    document = take_apart(source.content)
    holder = document.metadata["update"]
    for key in part[:-1]:
        holder = holder[key]
    holder[part[-1]] = value
    assert judge(source, put_together(document), tmp_path, blind=True) == "refused"


@pytest.mark.parametrize(
    "place",
    [("config", "data.mean"), ("config", "model.name"), ("ema", "blocks.0.mlp.fc1.weight"), ("tried",), ("running",)],
)
def test_a_tensor_whose_text_has_many_lines(sources: list[Source], tmp_path: Path, place: tuple[str, ...]) -> None:
    source = named(sources, "bundle of a run")
    path = tmp_path / "bundle"
    path.write_bytes(source.content)
    state = load_resume(path)
    holder = state["trainer"]
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = [torch.rand(40, 40)]
    save_resume(path, state)
    assert judge(source, path.read_bytes(), tmp_path, blind=True) == "refused"


@pytest.mark.parametrize("value", ["\x00", "\ud800", "\x1b[2J", "x" * 5000])
def test_a_value_that_once_came_into_the_message_as_it_is(sources: list[Source], tmp_path: Path, value: str) -> None:
    source = named(sources, "weights")
    for key in ("image_size", "in_chans", "mean", "std"):
        document = take_apart(source.content)
        document.metadata["input"][key] = value
        assert judge(source, put_together(document), tmp_path, blind=True) == "refused"
    for key in set(document.metadata) - {"input"}:
        document = take_apart(source.content)
        document.metadata[key] = value
        assert judge(source, put_together(document), tmp_path, blind=True) == "refused"
        document.metadata[key] = {value: value}
        assert judge(source, put_together(document), tmp_path, blind=True) == "refused"


def test_a_large_header_takes_no_more_than_it_may(sources: list[Source], tmp_path: Path) -> None:
    header, data = header_of(take_apart(sources[0].content))
    header["x"] = [[]] * 700_000
    content = seal(header, data)
    fuzz.reset_peak_memory()
    started, before = time.process_time(), fuzz.peak_memory()
    assert judge(sources[0], content, tmp_path, blind=False) == "refused"
    assert fuzz.peak_memory() - before < fuzz.MOST_MEMORY + fuzz.MEMORY_PER_BYTE * len(content)
    assert time.process_time() - started < fuzz.MOST_SECONDS


class TestTheFuzzerFinds:
    """Readers that do what they must not; the fuzzer is no use if it does not notice."""

    @pytest.fixture(autouse=True)
    def _one_source(self, sources: list[Source]) -> None:
        self.sources = [named(sources, "weights")]

    def read(self, tmp_path: Path, files: int = 4) -> Report:
        """Files that are not mutated at all."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzz, "mutate", lambda sources, seed, number: (sources[0], "bytes", sources[0].content))
            return read_files(self.sources, 0, range(files), tmp_path)

    def test_nothing_where_nothing_is_wrong(self, tmp_path: Path) -> None:
        assert self.read(tmp_path).failures == []

    def test_another_exception(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: object, **__: object) -> nn.Module:
            raise KeyError("head.weight")

        monkeypatch.setattr(readers, "load_sparse", load)
        report = self.read(tmp_path)
        assert [failure["problem"] for failure in report.failures] == ["KeyError: 'head.weight'"] * 4
        assert report.outcomes == {"weights / bytes / failed": 4}
        assert len(list(tmp_path.glob("000000?"))) == 4, "the files are kept"

    @pytest.mark.parametrize(
        ("message", "problem"),
        [
            ("there is something wrong", "does not name the file"),
            ("{path}: two\nlines", "cannot be shown"),
            ("{path}: w does not fit in memory", "an allocation that failed"),
        ],
    )
    def test_a_bad_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, problem: str) -> None:
        def load(path: Path, **_: object) -> nn.Module:
            raise CheckpointError(message.format(path=path))

        monkeypatch.setattr(readers, "load_sparse", load)
        assert all(problem in failure["problem"] for failure in self.read(tmp_path).failures)
        assert len(self.read(tmp_path).failures) == 4

    def test_other_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        really_load = readers.load_sparse

        def load(path: Path, **options: Any) -> nn.Module:
            model = really_load(path, **options)
            with torch.no_grad():
                model.get_parameter("norm.bias")[3] += 1e-6
            return model

        monkeypatch.setattr(readers, "load_sparse", load)
        (failure,) = self.read(tmp_path, 1).failures
        assert failure["problem"] == "Broken: norm.bias is not what the file holds"

    def test_a_change_that_no_checksum_found(self, tmp_path: Path) -> None:
        document = take_apart(self.sources[0].content)
        document.metadata["macs"] += 1
        content = put_together(document)
        assert judge(self.sources[0], content, tmp_path, blind=False) == "consistent"
        with pytest.raises(Broken, match="loaded, with another content than the original"):
            judge(self.sources[0], content, tmp_path, blind=True)

    def test_a_hang(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: object, **__: object) -> nn.Module:
            with contextlib.suppress(Exception):  # what a reader catches must not save it
                time.sleep(30)
            raise AssertionError

        monkeypatch.setattr(readers, "load_sparse", load)
        monkeypatch.setattr(fuzz, "PATIENCE", 0.1)
        assert [f["problem"] for f in self.read(tmp_path, 1).failures] == ["not done after 0.1 seconds"]

    def test_a_waste_of_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuzz, "MOST_SECONDS", 1e-6)
        assert all(failure["problem"].endswith(" seconds") for failure in self.read(tmp_path).failures)
        assert len(self.read(tmp_path).failures) == 4

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
    def test_a_waste_of_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        really_load = readers.load_sparse

        def load(path: Path, **options: Any) -> nn.Module:
            torch.ones(1 << 27, dtype=torch.uint8)  # 128 MiB, touched and given back
            return really_load(path, **options)

        monkeypatch.setattr(readers, "load_sparse", load)
        (failure,) = self.read(tmp_path, 1).failures
        assert "bytes of memory for a file of" in failure["problem"]


def test_a_process_that_dies_is_a_failure_of_the_file_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files 10 to 19 number 13 kills its process; all others are counted."""
    calls = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        options = dict(argument.removeprefix("--").split("=") for argument in command[3:])
        first, files = int(options["first"]), int(options["files"])
        calls.append((first, files))
        if first <= 13 < first + files:
            (tmp_path / "0000013").write_bytes(b"evil")
            return subprocess.CompletedProcess(command, -11, "", "Segmentation fault")
        report = Report(files)
        report.outcomes["weights / bytes / refused"] = files
        Path(options["json"]).write_text(to_json(report))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    report = read_apart(0, 10, 10, tmp_path)
    assert calls == [(10, 10), (10, 3), (14, 6)]
    assert report.files == 10
    assert report.outcomes == {"weights / bytes / refused": 9, "unknown / unknown / failed": 1}
    (failure,) = report.failures
    assert (failure["number"], failure["problem"]) == (13, "the process ended with code -11: Segmentation fault")
    (tmp_path / "0000013").unlink()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no torch"))
    with pytest.raises(RuntimeError, match="the process ended with code 1: no torch"):
        read_apart(0, 0, 5, tmp_path / "other")


def test_the_report(tmp_path: Path) -> None:
    report = Report(3, most_seconds=0.5, most_memory=3 << 20)
    report.outcomes.update({"weights / bytes / refused": 2, "weights / bytes / failed": 1})
    report.failures.append({"number": 7, "source": "weights", "mutation": "bytes", "problem": "KeyError: 'x'"})
    assert from_json(to_json(report)) == report
    text = to_markdown(report, "the command")
    assert "| weights | bytes | 3 | 2 | 0 | 0 | 1 |" in text
    assert "3 files, 1 failures" in text
    assert "- 7 (weights, bytes): KeyError: 'x'" in text


def test_the_command(tmp_path: Path) -> None:
    """In a process of its own, since it bounds the memory of the one that it runs in."""
    results = tmp_path / "results" / "fuzz.md"
    command = [sys.executable, "-m", "experiments.trials.fuzz", "--files=30", "--seed=5", f"--results={results}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "30 files, 0 failures" in results.read_text()
    assert json.loads(results.with_suffix(".json").read_text())["files"] == 30


def test_loading_touches_no_network_and_no_other_file(sources: list[Source], tmp_path: Path) -> None:
    """Audited by the interpreter itself, over files that ask for pretrained weights, hubs and other files."""
    opened: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            opened.append(f"{event} {arguments[0]!r}")

    source = named(sources, "weights")
    judge(source, source.content, tmp_path, blind=True)  # what is imported once is imported now
    sys.addaudithook(hook)
    try:
        for args in (
            {"pretrained": True},
            {"checkpoint_path": str(tmp_path / "file")},
            {"pretrained_cfg": {"url": "http://localhost/x"}},
            {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
            {"cache_dir": str(tmp_path)},
            {"norm_layer": "os.system"},
            {"act_layer": "torch.nn.Linear"},
            {"features_only": True},
            {"scriptable": True},
        ):
            document = take_apart(source.content)
            document.metadata["model"]["args"].update(args)
            assert judge(source, put_together(document), tmp_path, blind=True) == "refused", args
        for name in ("hf-hub:timm/vit_tiny", "hf_hub:a/b", "local-dir:/", "timm/vit_tiny", "http://localhost/x"):
            document = take_apart(source.content)
            document.metadata["model"]["name"] = name
            assert judge(source, put_together(document), tmp_path, blind=True) == "refused", name
    finally:
        watching[0] = False
    assert {event for event in opened if str(tmp_path / "file") not in event} == set()
