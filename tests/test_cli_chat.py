"""`llmfw chat`: a conversation through pipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw.plugins import unregister_local


@pytest.fixture
def chat(tiny_model: Path) -> Iterator[list[str]]:  # noqa: F811
    greedy = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos"]
    yield ["chat", *tiny_arguments(tiny_model), *greedy]
    unregister_local("TinyForCausalLM")


def test_each_line_is_answered_on_stdout(chat: list[str]) -> None:
    done = run(*chat, input="hello\n\none two\n")
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_the_conversation_is_remembered_until_reset(chat: list[str]) -> None:
    first = run(*chat, input="hello\n").stdout
    again = run(*chat, input="hello\nhello\n/reset\nhello\n").stdout.splitlines()
    assert [again[0], again[2]] == [first.strip("\n")] * 2
    fed = run(*chat, "--log-level", "info", input="hello\nhello\n").stderr
    assert fed.count("tokens in") == 2


def test_exit_leaves(chat: list[str]) -> None:
    done = run(*chat, input="/exit\nhello\n")
    assert (done.exit_code, done.stdout) == (0, "")


def test_a_conversation_too_long_is_a_request_error(chat: list[str]) -> None:
    done = run(*chat, input="hello " * 70 + "\n")
    assert done.exit_code == 14
    assert "Traceback" not in done.stderr
