"""`llmfw verify` and `llmfw check`, on tiny models and on the real SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_helpers import run
from contract_plugins import KINDS, planted
from llmfw.testing import Subject
from llmfw.testing.verify import verify_model, verify_tiny
from planted_faults import FAULTS

SCALED = KINDS["scaled"]
FAULT = FAULTS["wrong rope base"]
STAGES = [
    "tensor accounting",
    "prefill logits",
    "cached decode logits",
    "batch against single",
    "greedy tokens",
]


def test_low_memory_finds_the_same() -> None:
    with planted(SCALED, FAULT.plugin), Subject(SCALED.architecture, SCALED.config) as subject:
        both = verify_tiny(subject)
        one = verify_tiny(subject, low_memory=True)
    assert both.divergence is not None
    assert both.divergence == one.divergence
    assert list(both.rows()) == list(one.rows())


def test_a_checkpoint_on_disk_is_verified(tmp_path: Path) -> None:
    """The way of a real model: the checkpoint is loaded by both, in float32 and in bfloat16."""
    with planted(SCALED, SCALED.plugin), Subject(SCALED.architecture, SCALED.config) as subject:
        folder = str(subject.checkpoint())
        (subject.checkpoint() / "tokenizer.json").write_text(TOKENIZER, "utf-8")
        for dtype in ("float32", "bfloat16"):
            report = verify_model(folder, dtype=dtype, num_prompts=3, max_tokens=4, device="cpu")
            assert report.passed, list(report.rows())
            assert [stage.name for stage in report.stages] == STAGES
    with planted(SCALED, FAULT.plugin), Subject(SCALED.architecture, SCALED.config) as subject:
        (subject.checkpoint() / "tokenizer.json").write_text(TOKENIZER, "utf-8")
        report = verify_model(str(subject.checkpoint()), max_tokens=4, device="cpu")
    assert report.divergence is not None
    assert report.divergence.module == FAULT.module


def test_the_command_prints_a_table_and_ends_with_zero() -> None:
    done = run("verify", "LlamaForCausalLM", "--tiny", "--max-tokens", "4")
    assert done.exit_code == 0, done.output
    for stage in STAGES:
        assert stage in done.stdout
    assert "diverging" not in done.stdout


def test_the_command_names_the_module_and_ends_with_one() -> None:
    with planted(SCALED, FAULT.plugin):
        done = run("verify", SCALED.architecture, "--tiny", "--json")
        told = run("verify", SCALED.architecture, "--tiny")
    assert done.exit_code == told.exit_code == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert report["divergence"]["module"] == "model.layers.0.self_attn"
    assert report["divergence"]["reference"] == "model.layers.0.self_attn"
    assert report["divergence"]["stage"] == "q"
    assert "first diverging module  model.layers.0.self_attn" in told.stdout
    assert "rope base" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "LlamaForCausalML", "--tiny"), "did you mean"),
        (("verify", "LlamaForCausalLM", "--tiny", "--dtype", "bfloat16"), "float32"),
        (("verify", "LlamaForCausalLM", "--tiny", "--reference", "nowhere:make"), "nowhere:make"),
        (("check", "nobody-has-this"), "nobody-has-this"),
    ],
)
def test_mistakes_are_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr


def test_check_runs_doctor_contract_and_verify() -> None:
    done = run("check", "Qwen3ForCausalLM", "--no-wheel", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["state"] for row in found["doctor"]] == ["ok"]
    (one,) = found["architectures"]
    assert one["passed"]
    assert one["verify"]["passed"]
    outcomes = {each["name"]: each["outcome"] for each in one["contract"]}
    assert outcomes["matches_reference"] == "passed"
    assert "wheel_builds_and_installs" not in outcomes


def test_check_ends_with_one_where_a_check_fails() -> None:
    with planted(SCALED, FAULT.plugin):
        done = run("check", SCALED.architecture, "--no-wheel")
    assert done.exit_code == 1
    assert "failed   matches_reference" in done.stdout
    assert "first diverging module" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_smollm2_is_verified(low_memory: bool) -> None:
    report = verify_model("smollm2", num_prompts=4, max_tokens=6, low_memory=low_memory)
    assert report.passed, list(report.rows())
    assert [stage.name for stage in report.stages] == STAGES


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "WordLevel",
            "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "the": 1, "of": 2, "is": 3, "in": 4, "a": 5},
        },
        "pre_tokenizer": {"type": "Whitespace"},
    }
)


def test_a_checkpoint_without_a_tokenizer_is_verified_on_random_ids() -> None:
    with planted(SCALED, SCALED.plugin), Subject(SCALED.architecture, SCALED.config) as subject:
        report = verify_model(str(subject.checkpoint()), num_prompts=2, max_tokens=4)
    assert report.passed, list(report.rows())
