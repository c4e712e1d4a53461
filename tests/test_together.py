"""What fails on one of two processes ends both, in one line; what is damaged for one is left by both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.processes.processes import Processes
from experiments.processes.shared_failure import FailedElsewhere, speaks, together
from experiments.run_folder.folder import RunFolder
from experiments.trials.victims import STEP, start_victims

SMALL = [
    "--selector=null", "--losses.macs_target=null",
    "--model.kwargs={embed_dim: 24, depth: 2, patch_size: 7}", "--data.train_subset=60", "--data.eval_subset=20",
    "--data.batch_size=10", "--training.epochs=1", "--schedule.warmup_epochs=0", "--sparsity.updates=1",
    "--training.device=cpu", "--training.checkpoint_every=0.5",
]  # fmt: skip


def train(runs: Path, title: str, *arguments: str, kill_second: bool = False) -> dict[str, Any]:
    """Exit codes and output of two processes."""
    log = runs / f"{title}.log"
    victims = start_victims(2, [*SMALL, f"--output.runs={runs}", *arguments], log)
    if kill_second:
        assert victims[1].wait_for(STEP, 2, 60)
        victims[1].send(signal.SIGKILL)
    assert all(victim.wait(60) for victim in victims)
    said = [log.with_name(f"{log.name}.{rank}").read_text() for rank in range(2)]
    return {"codes": [victim.ended for victim in victims], "said": said}


def main(runs: Path) -> dict[str, Any]:
    """All that two processes are put through here, one after the other."""
    folder = RunFolder(runs / "run")
    found = {
        "whole": train(runs, "whole", "--output.name=run"),
        "taken": train(runs, "taken", "--output.name=run"),
        "typo": train(runs, "typo", "--output.nam=run"),
        "both": train(runs, "both", "--sparsity.updates=900"),
        "killed": train(runs, "killed", "--training.epochs=900", "--output.name=killed", kill_second=True),
    }
    folder.bundles()[0].write_bytes(b"")
    folder.sparse.unlink()
    found["damaged"] = train(runs, "damaged", f"--resume={folder.path}")
    folder.sparse.unlink()
    folder.metrics.unlink()
    folder.metrics.mkdir()
    for bundle in folder.bundles()[:1]:
        bundle.unlink()
    found["unwritable"] = train(runs, "unwritable", f"--resume={folder.path}")
    for bundle in folder.bundles():
        bundle.write_bytes(b"")
    found["none good"] = train(runs, "none good", f"--resume={folder.path}")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: it forks, which one that has trained must not."""
    runs = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_together", str(runs)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_first_process_alone_speaks(found: dict[str, Any]) -> None:
    assert found["whole"]["codes"] == [0, 0]
    assert "quickstart: done" in found["whole"]["said"][0]
    assert found["whole"]["said"][1] == ""


@pytest.mark.parametrize(
    ("title", "codes", "message"),
    [
        ("taken", [2, 1], "run exists; choose another name, or go on with it: --resume"),
        ("typo", [2, 1], "output.nam: unknown key; did you mean output.name?"),
        ("both", [2, 2], "sparsity.updates: 900 do not fit the"),
        ("none good", [2, 1], "is truncated or no safetensors file"),
    ],
)
def test_an_error_ends_both_in_one_line(title: str, codes: list[int], message: str, found: dict[str, Any]) -> None:
    assert found[title]["codes"] == codes
    said, nothing = found[title]["said"]
    assert nothing == ""
    (line,) = said.splitlines()
    assert line.startswith("sparse-trainer train: error: ")
    assert message in line


def test_one_that_is_killed_ends_the_other(found: dict[str, Any]) -> None:
    assert found["killed"]["codes"] == [1, -signal.SIGKILL]
    last = found["killed"]["said"][0].splitlines()[-1]
    assert last.startswith("sparse-trainer train: error: another process has ended, and this one cannot go on")
    assert "; go on from step " in last


def test_what_the_first_cannot_write_ends_both(found: dict[str, Any]) -> None:
    assert found["unwritable"]["codes"] == [1, 1]
    said, nothing = found["unwritable"]["said"]
    assert nothing == ""
    assert "error: cannot write the run: " in said.splitlines()[-1]
    assert "metrics.jsonl: Is a directory; go on from step 3 with torchrun --nproc-per-node 2 " in said.splitlines()[-1]


def test_both_go_on_from_the_checkpoint_that_is_good(found: dict[str, Any]) -> None:
    assert found["damaged"]["codes"] == [0, 0]
    said, nothing = found["damaged"]["said"]
    assert nothing == ""
    assert "at step 3\n" in said
    assert "step_00000006.resume: is truncated or no safetensors file" in said


class Two(Processes):
    """The first of two, with the second one's answers."""

    def __init__(self, *answers: bool) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "answers", list(answers))

    def any(self, flag: bool) -> bool:
        answers: list[bool] = self.answers  # type: ignore[attr-defined]
        return answers.pop(0) or flag


def test_together_alone() -> None:
    alone = Processes()
    with together(alone):
        pass
    with pytest.raises(KeyError, match="this"), together(alone):
        raise KeyError("this")
    assert speaks(alone)


def test_together() -> None:
    with together(Two(False)):
        pass
    with pytest.raises(FailedElsewhere), together(Two(True, False, True)):
        pass
    with pytest.raises(KeyError), together(Two(True, False)):  # both failed; the first one speaks
        raise KeyError

    class Gone(Two):
        def any(self, flag: bool) -> bool:
            raise RuntimeError("gloo: connection closed by peer")

    with pytest.raises(KeyError), together(Gone()):
        raise KeyError
    with pytest.raises(RuntimeError, match="gloo"), together(Gone()):
        pass


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
