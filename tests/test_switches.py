"""Every optimisation can be switched off alone, and the tokens stay what they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmfw import SamplingParams
from llmfw.testing.compare import random_prompts
from llmfw.testing.subject import Subject

SWITCHES = {
    "plain": {},
    "no CUDA graphs": {"cuda_graphs": False},
    "no overlap": {"overlap_scheduling": False},
    "overlap": {"overlap_scheduling": True},
    "reference kernels": {"kernels": "reference"},
    "vanilla attention": {"attn_backend": "vanilla"},
    "no prefix caching": {"enable_prefix_caching": False},
    "no chunked prefill": {"enable_chunked_prefill": False},
    "all off": {
        "cuda_graphs": False,
        "overlap_scheduling": False,
        "kernels": "reference",
        "attn_backend": "vanilla",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
    },
}


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with Subject("LlamaForCausalLM", settings={"kernels": "auto"}) as subject:
        yield subject


@pytest.fixture(scope="module")
def expected(subject: Subject) -> list[list[int]]:
    return answers(subject, SWITCHES["all off"])


def answers(subject: Subject, switches: dict[str, object]) -> list[list[int]]:
    prompts = random_prompts(4, subject.vocab_size, 3, 24, seed=3)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with subject.engine(**switches) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_tokens_do_not_depend_on_a_switch(subject, expected, switches) -> None:
    assert answers(subject, switches) == expected


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--no-cuda-graphs", "cuda_graphs", False),
        ("--no-overlap", "overlap_scheduling", False),
        ("--overlap", "overlap_scheduling", True),
        ("--kernels=reference", "kernels", "reference"),
        ("--attention-backend=vanilla", "attention_backend", "vanilla"),
        ("--attn-backend=vanilla", "attention_backend", "vanilla"),
        ("--no-prefix-caching", "enable_prefix_caching", False),
        ("--no-chunked-prefill", "enable_chunked_prefill", False),
    ],
)
def test_the_command_lines_switches_reach_the_engine(monkeypatch, option, name, value) -> None:
    assert reaches_the_engine(monkeypatch, option)[name] == value


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("LLMFW_CUDA_GRAPHS", "0", "cuda_graphs", False),
        ("LLMFW_OVERLAP", "0", "overlap_scheduling", False),
        ("LLMFW_KERNELS", "reference", "kernels", "reference"),
        ("LLMFW_ATTN_BACKEND", "vanilla", "attention_backend", "vanilla"),
        ("LLMFW_PREFIX_CACHING", "0", "enable_prefix_caching", False),
        ("LLMFW_CHUNKED_PREFILL", "0", "enable_chunked_prefill", False),
    ],
)
def test_so_do_the_variables(monkeypatch, variable, text, name, value) -> None:
    monkeypatch.setenv(variable, text)
    assert reaches_the_engine(monkeypatch)[name] == value


def reaches_the_engine(monkeypatch, *options: str) -> dict[str, object]:
    """The keywords with which `llmfw run` opens an engine."""
    from cli_helpers import run

    given = {}

    def noted(model, **arguments):
        given.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("llmfw.LLM", noted)
    assert run("run", "--model", "no-such-model", "--prompt", "x", *options).exit_code == 130
    return given
