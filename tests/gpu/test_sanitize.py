"""The sanitizers' run without a GPU: its cases and parts, and how kernels.sh judges the parts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from gpu import sanitize
from gpu.emulated import emulator
from gpu.kernel_cases import Case, kernel_of
from llmfw.kernels.cupy.declarations import KERNELS

CASES = sanitize.smallest_cases()


def test_every_kernel_has_a_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = emulator.install(monkeypatch, tmp_path)
    assert {kernel_of(case, device).name for case in CASES} == {kernel.name for kernel in KERNELS}


@pytest.mark.parametrize("parts", [1, 2, 7, 14])
def test_parts_cover_every_case_once(parts: int) -> None:
    all_parts = [sanitize.part_of(CASES, part, parts) for part in range(1, parts + 1)]
    assert Counter(id(case) for cases in all_parts for case in cases) == Counter(map(id, CASES))
    homes = Counter(build for cases in all_parts for build in {*map(sanitize.build_of, cases)})
    assert set(homes.values()) == {1}  # nothing is compiled for two parts
    sizes = [len(cases) for cases in all_parts]
    assert max(sizes) < 2 * min(sizes)


def test_a_command_line_names_a_part_and_ops() -> None:
    assert counted(sanitize.chosen([])) == counted(CASES)
    ops = ["moe_route", "penalise"]
    expected = counted([case for case in CASES if case.op in ops])
    assert counted(sanitize.chosen(ops)) == expected
    parts = [counted(sanitize.chosen([f"{part}/3", *ops])) for part in (1, 2, 3)]
    assert parts[0] + parts[1] + parts[2] == expected


def counted(cases: list[Case]) -> Counter[str]:
    """Cases by name, since the functions that draw them are made anew each time."""
    return Counter(f"{case} {case.code}" for case in cases)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["0/7"], "'0/7' is no part"),
        (["8/7"], "'8/7' is no part"),
        (["1/many"], "'1/many' is no part"),
        (["1/7", "moe_rout"], "no cases of moe_rout: there are .*moe_route"),
        (["2/2", "penalise"], "no cases in part 2 of 2: ask for fewer parts"),
    ],
)
def test_a_command_line_that_names_nothing_ends_the_run(words: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        sanitize.chosen(words)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_run_launches_and_tells_of_every_case(
    monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    device = emulator.install(monkeypatch, folder)
    launches: list[str] = []
    launch = emulator.EmulatedLauncher.__call__

    def call(self: emulator.EmulatedLauncher, *args: object) -> None:
        launches.append(self.name)
        launch(self, *args)

    monkeypatch.setattr(emulator.EmulatedLauncher, "__call__", call)
    monkeypatch.setattr(torch, "device", lambda *_: device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in sanitize.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    sanitize.main(["1/1", "prepare_decode"])
    cases = [case for case in CASES if case.op == "prepare_decode"]
    assert launches == ["prepare_decode"] * len(cases)
    expected = [f"{word} {case}" for case in cases for word in ("run", "ran")]
    assert capsys.readouterr().out.splitlines() == expected


TOOL = """#!/usr/bin/env bash
tool=$2 part=$(grep -oE '[0-9]+/[0-9]+' <<<"$*")
echo "========= COMPUTE-SANITIZER"
{behaviour}
echo "run a-case"
echo "ran a-case"
"""


def sanitized(tmp_path: Path, root: Path, behaviour: str, **env: str) -> tuple[int, str]:
    """Exit code and output of kernels.sh's stage, with a script in place of the tool."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(behaviour=behaviour))
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(root / "tests/gpu/kernels.sh"), "sanitize"],
        env={**os.environ, "PATH": path, "OUT": str(tmp_path), "PARTS": "3", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bash and timeout of Linux")
@pytest.mark.parametrize(
    ("behaviour", "code", "told"),
    [
        (":", 0, "memcheck: 3 cases ran in 3 parts, exit codes 0 0 0\n"),
        (
            '[ $tool$part = racecheck2/3 ] && echo "========= Race" && exit 9',
            1,
            "racecheck: 2 cases ran in 3 parts, exit codes 0 9 0\n",
        ),
        (
            "[ $tool$part = memcheck3/3 ] && echo run b-case && sleep 60",
            1,
            "exit codes 0 0 124\n-- {out}/memcheck-3.log: 0 cases, the last: run b-case\n",
        ),
        (
            "[ $tool$part = memcheck1/3 ] && exit 0",
            1,
            "exit codes 0 0 0\n-- {out}/memcheck-1.log: 0 cases, the last: \n",
        ),
    ],
    ids=["clean", "a report", "killed", "no case"],
)
def test_every_part_has_to_run_and_end_well(
    behaviour: str, code: int, told: str, tmp_path: Path, root: Path
) -> None:
    found, out = sanitized(tmp_path, root, behaviour, LIMIT="4")
    assert (found, f"== sanitize: {code}\n" in out) == (code, True)
    assert told.format(out=tmp_path) in out
    assert ("= Race" in out) == ("Race" in behaviour)


def test_named_ops_run_in_one_process_of_each_tool(tmp_path: Path, root: Path) -> None:
    echo = 'echo "words ${*: -3}"'
    code, out = sanitized(tmp_path, root, echo, OPS="moe_route penalise", PARTS="")
    assert code == 0
    assert "racecheck: 1 cases ran in 1 parts" in out
    assert "words 1/1 moe_route penalise" in (tmp_path / "racecheck-1.log").read_text()
