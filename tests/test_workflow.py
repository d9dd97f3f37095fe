"""docs/workflow.md as one script on SmolLM2: new, convert, build, run, summarize."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from test_docs import BLOCK
from test_tutorial import environment

PAGE = Path(__file__).resolve().parent.parent / "docs" / "workflow.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_workflow_is_one_script(tmp_path: Path) -> None:
    blocks = BLOCK.finditer(PAGE.read_text("utf-8"))
    script = "".join(block["text"] for block in blocks if block["language"] == "bash")
    done = subprocess.run(
        ["bash", "-ex", "-c", script],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    answers = [
        json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        for name in ("direct", "checkpoint", "engine")
    ]
    assert len(answers[0]["token_ids"]) == 16
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert all(answer["plugin"].startswith("smollm-plugin") for answer in answers)
    assert answers[0]["text"] in done.stdout  # of the guide's options

    report = json.loads((tmp_path / "summaries" / "report.json").read_text("utf-8"))
    for name, difference in report["differences"].items():
        print(f"{name}: llmfw - hf {difference['mean']:+.6f}, margin {difference['margin']:.6f}")
        assert difference["verdict"] == "equivalent"
    assert set(report["differences"]) >= {"rouge1", "rougeL", "log perplexity"}
    assert report["same_summaries"] == report["samples"] == 3
