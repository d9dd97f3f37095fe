"""A killed conversion leaves nothing that is taken for a checkpoint, and is gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfw.weights.staging import staging_path
from published_layouts import tensors_of, write
from published_packed import packed_gpt_oss

DRIVER = Path(__file__).with_name("killed_converts.py")
# A published checkpoint with a side file of ignored tensors.
ARCHITECTURE = "GPTNeoXForCausalLM"


def published(folder: Path) -> None:
    write(ARCHITECTURE, folder, tensors_of(ARCHITECTURE))


@pytest.mark.parametrize(
    ("make", "seed", "count"),
    [
        pytest.param(published, 0, 4, id="few"),
        pytest.param(packed_gpt_oss, 0, 2, id="packed, few"),
        pytest.param(published, 1, 150, id="many", marks=pytest.mark.slow),
        pytest.param(packed_gpt_oss, 1, 50, id="packed, many", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_points(
    make: Callable[[Path], object], seed: int, count: int, tmp_path: Path
):
    make(tmp_path / "source")
    command = [sys.executable, str(DRIVER), str(tmp_path / "source"), str(tmp_path)]
    done = subprocess.run(
        [*command, str(seed), str(count)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *killed, never = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(killed) == count
    assert {each["signal"] for each in killed} == {signal.SIGKILL}
    assert all(each["whole_if_there"] and each["half_refused"] for each in killed)
    assert all(each["accepted_then"] and each["same_then"] for each in killed)
    assert any(each["resumed"] for each in killed)
    assert not all(each["there"] for each in killed)
    assert never["signal"] == 0
    assert never["left"] == []


@pytest.mark.slow
def test_the_command_killed_at_random_times(tmp_path: Path):
    """The installed command on a real model, as a person would lose it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llmfw_cli", "convert", "smollm2", str(out)]
    drawn = random.Random(0)
    begin = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "whole")], check=True, capture_output=True)
    whole = time.monotonic() - begin
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(drawn.uniform(0.5, 1.0) * whole)
        process.kill()
        process.wait()
        if out.exists():
            break
        refused = subprocess.run(
            [sys.executable, "-m", "llmfw_cli", "inspect", str(staging_path(out))],
            capture_output=True,
            check=False,
        )
        assert refused.returncode != 0 or (staging_path(out) / "config.json").exists()
    if not out.exists():
        subprocess.run(command, check=True, capture_output=True)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            twin = out / path.relative_to(tmp_path / "whole")
            assert twin.read_bytes() == path.read_bytes(), path.name
    assert os.listdir(tmp_path).count(staging_path(out).name) == 0
