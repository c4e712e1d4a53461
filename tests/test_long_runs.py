"""``docs/long-runs.md`` is true: its commands run as printed, with fewer images; its lists are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.config.reading import load_config
from experiments.run_folder.lock import NAME
from experiments.training.continuation import MAY_DIFFER
from sparse_trainer.files.checkpoint import read_info

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "long-runs.md"
TEXT = PAGE.read_text(encoding="utf-8")
#: Of the first command: the others take it from the run.
SHORT = [
    "--selector=null", "--losses.macs_target=null", "--data.train_subset=260", "--data.eval_subset=20",
    "--model.kwargs={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 7}", "--data.batch_size=20",
    "--training.epochs=2", "--schedule.warmup_epochs=0.5", "--training.device=cpu", "--sparsity.updates=1",
    "--sparsity.head_density=0.5",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:no update fits")
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    begin, again, longer, larger = lines
    assert main([*begin, *SHORT]) == 0
    assert main(again) == 0
    assert "the run is complete" in capsys.readouterr().out
    assert main([*longer, "--training.eval_every=40"]) == 0
    assert main([*larger, "--training.eval_every=40"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["larger", "long", "long-2"]
    assert load_config(Path("runs/long-2/config.yaml")).training.epochs == 40
    assert read_info(Path("runs/long-2/sparse.safetensors")).step == 40 * 13
    assert read_info(Path("runs/larger/sparse.safetensors")).step == 30
    assert Path("runs/long-2", NAME).is_file()
    assert f"`{NAME}`" in TEXT


def test_the_settings_that_may_change() -> None:
    section = TEXT.split("What may change:\n")[1].split("Anything else")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", section)) == MAY_DIFFER


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
    assert "docs/long-runs.md" in (ROOT / "README.md").read_text(encoding="utf-8")
