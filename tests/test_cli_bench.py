"""`llmfw bench`: workloads, figures, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw.errors import ConfigError, EngineError
from llmfw.plugins import unregister_local
from llmfw_cli.bench.measure import Timing, check_length, measure
from llmfw_cli.bench.workload import Workload, many_prompts, one_prompt


@pytest.fixture
def tiny(tiny_model: Path) -> Iterator[list[str]]:  # noqa: F811
    yield tiny_arguments(tiny_model)
    unregister_local("TinyForCausalLM")


def test_workloads_are_the_same_every_time() -> None:
    first = many_prompts(4, 3, 9, 5, vocab_size=50, seed=1)
    assert first == many_prompts(4, 3, 9, 5, vocab_size=50, seed=1)
    assert first != many_prompts(4, 3, 9, 5, vocab_size=50, seed=2)
    assert all(3 <= len(prompt) <= 9 and max(prompt) < 50 for prompt in first.prompts)
    assert first.total_new_tokens == 20
    assert one_prompt(7, 2, 50, 0).prompt_tokens == 7


class Fake:
    def __init__(self, *timings: Timing) -> None:
        self.timings = list(timings)

    def run(self, workload: Workload) -> Timing:
        return self.timings.pop(0)


def test_the_median_counts_and_warmups_do_not() -> None:
    workload = one_prompt(100, 11, 50, 0)
    runs = Fake(Timing(9, 99), Timing(1, 3), Timing(2, 7), Timing(1.5, 4))
    figures = measure(runs, [workload] * 4, warmups=1)
    assert figures.runs == 3
    assert figures.first_token_s == 1.5
    assert figures.prefill_tokens_per_s == pytest.approx(100 / 1.5)
    assert figures.decode_tokens_per_s == pytest.approx(10 / 2.5)
    assert figures.tokens_per_s == pytest.approx(11 / 4)
    many = measure(Fake(Timing(1, 2)), [many_prompts(3, 2, 4, 5, 50, 0)], warmups=0)
    assert many.prefill_tokens_per_s is None
    assert many.decode_tokens_per_s is None
    assert many.tokens_per_s == 7.5


def test_fewer_tokens_than_asked_are_refused() -> None:
    check_length(5, 5)
    with pytest.raises(EngineError, match="asked for 5 tokens and got 4"):
        check_length(4, 5)


def test_latency(tiny: list[str]) -> None:
    load = ["--prompt-len", "8", "--new-tokens", "4", "--runs", "2"]
    done = run("bench", "latency", *tiny, *load, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    (figures,) = value["measured"]["llmfw"]
    assert figures["workload"] == "1 x 8 + 4"
    assert figures["decode_tokens_per_s"] > 0
    assert value["device"] == "cpu"


def test_throughput(tiny: list[str]) -> None:
    load = ["--num-prompts", "3", "--shortest", "4", "--longest", "9", "--new-tokens", "4"]
    done = run("bench", "throughput", *tiny, *load, "--runs", "1")
    assert done.exit_code == 0, done.stderr
    heads, row = done.stdout.splitlines()
    assert heads.split()[:2] == ["engine", "workload"]
    assert row.startswith("llmfw   3 x 4..9 + 4")
    swapped = run("bench", "throughput", *tiny, "--shortest", "9", "--longest", "4")
    assert swapped.exit_code == 2


def test_more_than_fits_is_an_error(tiny: list[str]) -> None:
    done = run("bench", "latency", *tiny, "--prompt-len", "60", "--new-tokens", "40")
    assert done.exit_code in (14, 16)
    assert done.stdout == ""


def test_the_peer_needs_safetensors(tmp_path: Path) -> None:
    import torch

    from llmfw_cli.bench.peer import Transformers

    with pytest.raises(ConfigError, match="has no safetensors"):
        Transformers(tmp_path, torch.float32, torch.device("cpu"))


def test_read_bandwidth_is_of_this_planet() -> None:
    import torch

    from llmfw_cli.bench.machine import read_bandwidth

    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13
