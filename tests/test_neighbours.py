"""``models`` and ``experiments`` are names of other projects too: installed, ours and theirs do each other no harm."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip puts our packages, of a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("sparse_trainer", "models", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's project with packages of these names."""
    for name in ("models", "experiments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    return tmp_path


def run(code: str, first: Path, installed: Path, folder: Path) -> str:
    """What a Python says that finds modules in ``first``, then in what is installed; it knows no editable installs."""
    paths = [str(first), str(installed), *site.getsitepackages()]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}; sys.path.remove(''); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_their_packages_are_theirs(project: Path, installed: Path) -> None:
    """``python train.py`` in their folder, with our engine imported."""
    code = "import models, experiments, sparse_trainer; print(models.MINE, experiments.MINE, sparse_trainer.__file__)"
    found = run(code, project, installed, project).split()
    assert found[:2] == ["models", "experiments"]
    assert Path(found[2]).is_relative_to(installed)


def test_our_command_is_ours(project: Path, installed: Path) -> None:
    """``sparse-trainer`` in their folder: a script finds modules beside itself, and not where one stands."""
    code = "from experiments.__main__ import main; import models; print(main(['--help']), models.__file__)"
    found = run(code, installed / "bin", installed, project)
    assert "train" in found
    assert Path(found.split()[-1]).is_relative_to(installed)


def test_the_engine_needs_neither(project: Path, installed: Path) -> None:
    shutil.rmtree(project / "models")
    code = "import sparse_trainer; print([name for name in ('models', 'experiments') if name in sys.modules])"
    assert run(code, project, installed, project).strip() == "[]"
