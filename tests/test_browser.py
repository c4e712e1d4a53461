"""TensorBoard in a real browser: the overview is the first thing that one sees."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from experiments.__main__ import main
from tests.test_cli import SMALL

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PLACE_OF_OVERVIEW = (340, 260, 820, 580)
WAIT = 60.0
"""Seconds for a server to come up, and for a page to be drawn."""
SIZE = (1600, 1000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows one small run."""
    assert main(["train", *SMALL, f"--output.runs={tmp_path / 'runs'}"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "runs"), "--port", str(port)]
    with subprocess.Popen(
        [*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            limit = time.monotonic() + WAIT
            while True:
                try:
                    with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                        if b"tensorboard" in answer.read():
                            break
                except OSError:
                    pass
                assert time.monotonic() < limit, "TensorBoard did not come up"
                time.sleep(0.3)
            yield address
        finally:
            process.terminate()


def look(address: str, *options: str) -> str:
    """What the browser says of a page once everything on it has come."""
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=30000", *options, address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=4 * WAIT, check=True).stdout


@pytest.mark.skipif(not BROWSER, reason="no browser: install chromium to look at TensorBoard's page")
def test_the_overview_is_the_first_thing_one_sees(server: str, tmp_path: Path) -> None:
    page = look(f"{server}/?darkMode=false#timeseries", "--dump-dom")
    groups = re.findall(r'class="group-title"[^>]*>([^<]*)<', page)
    groups = [group.strip() for group in groups if group.strip() != "Pinned"]
    assert groups, "no group of charts was drawn"
    assert groups[:2] == ["Overview", "eval"]
    assert "budget" not in groups
    look(f"{server}/?darkMode=false#timeseries", f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == SIZE
        colours = shot.convert("RGB").crop(PLACE_OF_OVERVIEW).getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 100, "the place of the overview is empty"
