"""`llmfw run`: where prompts come from, what is printed, how it ends."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw import LLM, SamplingParams
from llmfw.plugins import unregister_local
from llmfw_cli.engine_options import EngineOptions
from llmfw_cli.options import ServingOptions
from llmfw_cli.sampling_options import SamplingOptions

GREEDY = ["--temperature", "0", "--max-tokens", "5", "--ignore-eos"]


@pytest.fixture(autouse=True)
def forget_the_tiny_plugin() -> Iterator[None]:
    yield
    unregister_local("TinyForCausalLM")


@pytest.fixture
def tiny(tiny_model: Path) -> list[str]:  # noqa: F811
    return ["run", *tiny_arguments(tiny_model), *GREEDY]


def test_json_is_one_object_on_stdout_and_nothing_else(tiny: list[str]) -> None:
    done = run(*tiny, "--prompt", "hello world", "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert set(value) == {
        "text",
        "token_ids",
        "finish_reason",
        "stop_reason",
        "prompt_tokens",
        "timings",
        "model",
        "plugin",
        "dtype",
        "device",
        "versions",
    }
    assert len(value["token_ids"]) == value["timings"]["output_tokens"] == 5
    assert value["finish_reason"] == "length"
    assert value["prompt_tokens"] == 2
    assert value["plugin"].startswith("local plugin")
    assert {"llmfw-core", "llmfw-cli", "torch", "python"} <= set(value["versions"])
    assert value["timings"]["total_s"] >= value["timings"]["time_to_first_token_s"] > 0


def test_the_streamed_text_is_that_of_json(tiny: list[str]) -> None:
    text = json.loads(run(*tiny, "--prompt", "hello world", "--json").stdout)["text"]
    streamed = run(*tiny, "--prompt", "hello world")
    assert streamed.stdout == text + "\n"
    assert streamed.stderr == ""


@pytest.mark.parametrize("how", ["option", "argument", "pipe", "dash", "dash option", "file"])
def test_the_prompt_may_come_from_anywhere(tiny: list[str], how: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfhello world\r\n")
    arguments, piped = {
        "option": (["--prompt", "hello world"], None),
        "argument": (["hello world"], None),
        "pipe": ([], "hello world\n"),
        "dash": (["-"], "hello world\n"),
        "dash option": (["-p", "-"], "hello world\n"),
        "file": (["--prompt-file", str(file)], None),
    }[how]
    done = run(*tiny, "--json", *arguments, input=piped)
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    expected = json.loads(run(*tiny, "--json", "--prompt", "hello world").stdout)
    assert value["token_ids"] == expected["token_ids"]
    assert value["prompt_tokens"] == 2


def test_several_prompts_and_completions_are_a_list_of_outputs(tiny: list[str]) -> None:
    done = run(*tiny, "--prompt", "hello", "-p", "one two", "--n", "2", "--json")
    value = json.loads(done.stdout)
    assert [(o["prompt_index"], o["index"]) for o in value["outputs"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert value["prompt_tokens"] == [1, 2]
    assert value["timings"]["output_tokens"] == 20
    plain = run(*tiny, "--prompt", "hello", "-p", "one two")
    assert plain.stdout.startswith("--- prompt 1, completion 1 ---\n")
    assert "--- prompt 2, completion 1 ---\n" in plain.stdout


def test_one_prompt_that_cannot_be_served_fails_alone(tiny: list[str]) -> None:
    too_long = "hello " * 70
    done = run(*tiny, "--prompt", "hello", "--prompt", too_long, "--json")
    assert done.exit_code == 14
    good, bad = json.loads(done.stdout)["outputs"]
    assert good["finish_reason"] == "length"
    assert bad["finish_reason"] == "error"
    assert bad["error"] in done.stderr
    alone = run(*tiny, "--prompt", too_long)
    assert alone.exit_code == 14
    assert alone.stdout == ""


def test_chat_applies_the_template(tiny: list[str]) -> None:
    done = run(*tiny, "--chat", "--system", "three", "--prompt", "hello", "--json")
    assert done.exit_code == 0, done.stderr
    # "system three user hello assistant"
    assert json.loads(done.stdout)["prompt_tokens"] == 5


def test_log_probabilities_are_in_the_object(tiny: list[str]) -> None:
    value = json.loads(run(*tiny, "--prompt", "hello", "--logprobs", "2", "--json").stdout)
    assert len(value["logprobs"]) == 5
    chosen = [str(token) for token in value["token_ids"]]
    steps = zip(chosen, value["logprobs"], strict=True)
    assert all(token in step and max(step.values()) <= 0 for token, step in steps)


def test_the_prompt_and_the_logits_can_be_asked_and_moved(tiny: list[str]) -> None:
    more = ["--prompt-logprobs", "1", "--logit-bias", "5=1000", "--json"]
    value = json.loads(run(*tiny, "--prompt", "hello world", *more).stdout)
    assert value["token_ids"] == [5] * 5
    first, second = value["prompt_logprobs"]
    assert first is None
    assert "4" in second, "the token that came"
    wrong = run(*tiny, "--prompt", "hello", "--logit-bias", "5")
    assert wrong.exit_code == 2
    assert "--logit-bias '5' is not a token id and a number" in wrong.stderr


def test_every_setting_of_python_has_an_option() -> None:
    made = SamplingOptions().params()
    assert isinstance(made, SamplingParams)
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    source = inspect.getsource(SamplingOptions.params)
    own = {"n", "detokenize", "prompt_logprobs_start"}
    by_files = {"return_context_logits", "return_generation_logits"}
    assert {name for name in fields if f" {name}=" not in source} == own | by_files
    keywords = set(inspect.signature(LLM.__init__).parameters) - {"self", "model", "unknown"}
    given = set(dataclasses.asdict(EngineOptions())) | set(ServingOptions().arguments())
    given = given - {"attn_backend", "engine_seed"} | {"attention_backend", "seed"}
    own = {"generation_config", "progress", "skip_tokenizer_init"}
    assert keywords - given == own
    assert given - keywords == set()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--temperature", "nan"], "temperature=nan is out of range"),
        (["--max-tokens", "-1"], "max_tokens=-1 is out of range"),
        (["--top-p", "2"], "top_p=2.0 is out of range"),
        (["--system", "x"], "--system needs the chat template"),
        (["--kv-cache-memory", "much"], "kv_cache_memory='much' is no amount of memory"),
        (["--block-size", "0"], "block_size=0 is out of range"),
        (["--extension", "none-such"], "no installed plugin has the extension 'none-such'"),
        (["--plugin", "none-such"], "no plugin of that name is installed"),
    ],
)
def test_settings_that_cannot_be_are_usage_errors(
    tiny: list[str], arguments: list[str], text: str
) -> None:
    done = run(*tiny, "--prompt", "hello", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_utf8(tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    done = run(*tiny, "--prompt-file", str(file))
    assert done.exit_code == 2
    assert f"--prompt-file {file} is not UTF-8 text: byte 3 is 0xe9" in done.stderr
    missing = run(*tiny, "--prompt-file", str(tmp_path / "none"))
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory" in missing.stderr


def test_no_prompt_and_an_empty_one(tiny: list[str]) -> None:
    done = run(*tiny, input="")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "standard input is empty" in done.stderr
    empty = run(*tiny, "--prompt", "")
    assert empty.exit_code == 14
    twice = run(*tiny, "-", "-", input="hello")
    assert twice.exit_code == 2


def test_debug_shows_the_traceback(tiny: list[str]) -> None:
    done = run(*tiny, "--prompt", "hello", "--temperature", "nan", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_variables_set_options_and_flags_win(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFW_MAX_TOKENS", "3")
    monkeypatch.setenv("LLMFW_STOPP", "x")
    bare = [word for word in tiny if word not in ("--max-tokens", "5")]
    done = run(*bare, "--prompt", "hello", "--json")
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    assert "LLMFW_STOPP is not known and does nothing" in done.stderr
    assert len(json.loads(run(*tiny, "-p", "hello", "--json").stdout)["token_ids"]) == 5
    monkeypatch.setenv("LLMFW_MAX_TOKENS", "many")
    assert run(*bare, "--prompt", "hello").exit_code == 2


def start(arguments: list[str], **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmfw_cli", *arguments]
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        command, text=True, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c, **more
    )


def heed_ctrl_c() -> None:
    """Shells start what runs in the background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_cleanly(tiny_model: Path) -> None:  # noqa: F811
    endless = ["--max-tokens", "60", "--temperature", "0", "--ignore-eos", "--prompt", "hello"]
    process = start(
        ["chat", *tiny_arguments(tiny_model), *endless[:5]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline(), "it answers, then waits for the next message"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_a_reader_that_went_away_is_no_error(tiny_model: Path) -> None:  # noqa: F811
    read, write = os.pipe()
    os.close(read)
    process = start(["run", *tiny_arguments(tiny_model), "--prompt", "hello"], stdout=write)
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 141, errors
    assert errors == ""
