"""`llmfw bench`: workloads, figures, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import run, tiny_arguments, tiny_model  # noqa: F401
from llmfw.errors import CheckpointError, ConfigError, EngineError, UsageError
from llmfw.plugins import unregister_local
from llmfw_cli.bench.lengths import Lengths, parse_lengths, parse_numbers
from llmfw_cli.bench.measure import (
    RequestTime,
    Timing,
    check_length,
    measure,
    percentile,
    percentiles_of,
)
from llmfw_cli.bench.workload import Workload, draw_workload, fixed


@pytest.fixture
def tiny(tiny_model: Path) -> Iterator[list[str]]:  # noqa: F811
    yield tiny_arguments(tiny_model)
    unregister_local("TinyForCausalLM")


def test_workloads_are_the_same_every_time() -> None:
    def drawn(seed: int) -> Workload:
        return draw_workload(4, parse_lengths("3..9"), parse_lengths("2..5"), 50, seed)

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    assert all(3 <= len(prompt) <= 9 and max(prompt) < 50 for prompt in first.prompts)
    assert all(2 <= new <= 5 for new in first.new_tokens)
    assert first.name == "4 x 3..9 + 2..5"
    assert first.first(2).prompts == first.prompts[:2]
    assert fixed(3, 7, 2, 50, 0).prompt_tokens == 21
    assert fixed(3, 7, 2, 50, 0).total_new_tokens == 6


def test_the_yardstick_others_use_is_drawn_alike() -> None:
    """256 requests of 100..1024 tokens, drawn by random.Random(0): prompts, then new tokens."""
    lengths = Lengths("100..1024", 100, 1024)
    work = draw_workload(256, lengths, lengths, 151_936, seed=0)
    assert (work.prompt_tokens, work.total_new_tokens) == (142_827, 133_966)
    half = work.first(128)
    assert (half.prompt_tokens, half.total_new_tokens) == (71_296, 67_348)


def test_lengths() -> None:
    rng = random.Random(0)
    assert parse_lengths("7").draw(rng) == 7
    assert parse_lengths("7").fixed
    drawn = [parse_lengths("normal(100, 10)").draw(rng) for _ in range(400)]
    assert 97 < sum(drawn) / len(drawn) < 103
    assert min(drawn) < 90 < 110 < max(drawn)
    assert min(parse_lengths("normal(1,50)").draw(rng) for _ in range(50)) == 1
    for wrong in ("", "0", "9..4", "0..4", "x", "normal(0,1)", "-3"):
        with pytest.raises(UsageError, match="is no length"):
            parse_lengths(wrong)
    assert parse_numbers("1,8,64", "--batch") == (1, 8, 64)
    for wrong in ("", "1,x", "0"):
        with pytest.raises(UsageError, match="--batch"):
            parse_numbers(wrong, "--batch")


def test_percentiles() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile([1, 2], 50) == 1.5
    assert percentile([5], 99) == 5
    times = [RequestTime(0.1, 1.1, 11), RequestTime(0.3, 0.3, 1)]
    found = percentiles_of(times)
    assert found["ttft"]["p50"] == pytest.approx(200)
    assert found["tpot"] == {name: pytest.approx(100) for name in ("p50", "p90", "p99")}
    assert found["latency"]["p99"] < 1100


class Fake:
    def __init__(self, *timings: Timing) -> None:
        self.timings = list(timings)

    def run(self, workload: Workload) -> Timing:
        return self.timings.pop(0)


def test_the_median_counts_and_warmups_do_not() -> None:
    workload = fixed(1, 100, 11, 50, 0)
    runs = Fake(Timing(9, 99), Timing(1, 3), Timing(2, 7), Timing(1.5, 4))
    figures = measure(runs, [workload] * 4, warmups=1)
    assert figures.runs == 3
    assert figures.first_token_s == 1.5
    assert figures.prefill_tokens_per_s == pytest.approx(100 / 1.5)
    assert figures.decode_tokens_per_s == pytest.approx(10 / 2.5)
    assert figures.tokens_per_s == pytest.approx(11 / 4)
    many = measure(Fake(Timing(1, 2)), [fixed(3, 2, 5, 50, 0)], warmups=0)
    assert many.prefill_tokens_per_s is None
    assert many.decode_tokens_per_s is None
    assert many.tokens_per_s == 7.5


def test_fewer_tokens_than_asked_are_refused() -> None:
    check_length(5, 5)
    with pytest.raises(EngineError, match="asked for 5 tokens and got 4"):
        check_length(4, 5)


@pytest.mark.parametrize(
    ("command", "load"),
    [
        ("latency", ("--prompt-len", "8", "--new-tokens", "4")),
        ("throughput", ("--num-prompts", "3", "--prompt-len", "4..9", "--new-tokens", "2..4")),
        ("decode", ("--batch", "2", "--context", "4", "--new-tokens", "4")),
        ("prefill", ("--prompt-len", "8")),
    ],
)
def test_no_figure_where_a_request_ends_early(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, command: str, load: tuple[str, ...]
) -> None:
    from llmfw import LLM

    generate = LLM.generate

    def cut(self: LLM, *arguments: Any, **more: Any) -> Any:
        outputs = generate(self, *arguments, **more)
        outputs[-1].outputs[0].token_ids.pop()
        return outputs

    monkeypatch.setattr(LLM, "generate", cut)
    done = run("bench", command, *tiny, *load, "--runs", "1", "--warmups", "0")
    assert done.exit_code == EngineError.exit_code
    assert "a benchmark asked for" in done.stderr
    assert done.stdout == ""


def test_latency(tiny: list[str]) -> None:
    load = ["--prompt-len", "8", "--new-tokens", "4", "--runs", "2"]
    done = run("bench", "latency", *tiny, *load, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    (figures,) = value["measured"]["llmfw"]
    assert figures["workload"] == "1 x 8 + 4"
    assert figures["decode_tokens_per_s"] > 0
    assert value["device"] == "cpu"
    assert value["decode_of_floor"] > 0
    assert set(figures["percentiles"]) == {"ttft", "tpot", "latency"}
    assert set(figures["percentiles"]["ttft"]) == {"p50", "p90", "p99"}
    assert value["hardware"]["threads"] >= 1


def test_throughput(tiny: list[str]) -> None:
    load = ["--num-prompts", "3", "--prompt-len", "4..9", "--new-tokens", "2..4"]
    done = run("bench", "throughput", *tiny, *load, "--runs", "1")
    assert done.exit_code == 0, done.stderr
    heads, row = done.stdout.splitlines()
    assert heads.split()[:2] == ["engine", "workload"]
    assert row.startswith("llmfw   3 x 4..9 + 2..4")
    facts = dict(line.split(": ", 1) for line in done.stderr.splitlines() if ": " in line)
    assert 0 < float(facts["of_floor"]) < 1
    assert float(facts["floor_s"]) > 0
    swapped = run("bench", "throughput", *tiny, "--prompt-len", "9..4")
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


@pytest.mark.slow
def test_compare_with_transformers() -> None:
    """Both engines, in one process, through the same three workloads."""
    from llmfw.testing.subject import Subject

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
    }
    with Subject("LlamaForCausalLM", shape) as subject:
        model = ["--model", str(subject.checkpoint()), "--device", "cpu", "--dtype", "float32"]
        done = run("bench", "compare", *model, "--runs", "1", "--warmups", "0", "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    workloads = ["1 x 128 + 128", "1 x 1024 + 1", "16 x 128..248 + 128"]
    for engine in ("llmfw", "transformers"):
        assert [each["workload"] for each in value["measured"][engine]] == workloads
        assert all(each["tokens_per_s"] > 0 for each in value["measured"][engine])
    assert set(value["ratios"]) == {"decode", "prefill", "concurrent"}
    assert value["decode_of_floor"] > 0
    assert {"torch", "transformers"} <= set(value["versions"])


def test_read_bandwidth_is_of_this_planet() -> None:
    import torch

    from llmfw_cli.bench.machine import read_bandwidth

    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13


def test_rates_of_this_machine() -> None:
    import torch

    from llmfw_cli.bench.machine import hardware, matrix_rate

    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e15
    assert hardware(torch.device("cpu"))["cores"] >= 1


def test_decode(tiny: list[str], tmp_path: Path) -> None:
    load = [
        "--batch",
        "1,2",
        "--context",
        "4,8",
        "--new-tokens",
        "24",
        "--runs",
        "1",
        "--warmups",
        "0",
    ]
    target = tmp_path / "decode.png"
    done = run("bench", "decode", *tiny, *load, "--json", "--chart", str(target))
    assert done.exit_code == 0, done.stderr
    points = json.loads(done.stdout)["decode"]
    assert [(p["batch"], p["context"]) for p in points] == [(1, 4), (2, 4), (1, 8), (2, 8)]
    for point in points:
        assert point["of_floor"] == pytest.approx(point["floor_ms"] / point["step_ms"], rel=1e-2)
        assert (point["runs"], point["spread"], point["steps"]) == (1, 0.0, 23)
    # one more request: 2 layers x 2 heads x 8 x K and V x float32, 4 + 24 / 2 tokens
    assert points[1]["read_gb"] - points[0]["read_gb"] == pytest.approx(16 * 256e-9, rel=0.05)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_prefill(tiny: list[str]) -> None:
    done = run("bench", "prefill", *tiny, "--prompt-len", "8,32", "--batch", "2", "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert [point["prompt"] for point in value["prefill"]] == [8, 32]
    assert all(0 < point["of_matrix_rate"] < 1 for point in value["prefill"])


def test_a_batch_that_the_cache_does_not_hold(tiny: list[str]) -> None:
    load = ["--batch", "8", "--context", "40", "--new-tokens", "16", "--runs", "1"]
    done = run("bench", "decode", *tiny, *load, "--kv-cache-memory", "70KiB")
    assert done.exit_code == 16
    assert "8 requests of 40 + 16 tokens need 32 blocks" in done.stderr
    assert done.stdout == ""
    long = run("bench", "decode", *tiny, "--context", "100000", "--new-tokens", "4")
    assert long.exit_code == 2
    assert "sequences have at most" in long.stderr
    assert "give --context, here at most" in long.stderr
    few = run("bench", "decode", *tiny, "--batch", "8", "--max-num-seqs", "4")
    assert few.exit_code == 2
    assert "--max-num-seqs" in few.stderr


def test_costs_of_a_model(tiny_model: Path) -> None:  # noqa: F811
    """Counted by hand: hidden 32, MLP of 64, 2 layers, 4 and 2 heads of 8, 10 words, tied."""
    from llmfw.models import build, prepare_model
    from llmfw_cli.bench.costs import ModelCosts

    plugin = str(tiny_model / "plugin.py")
    prepared = prepare_model(tiny_model, plugin_modules=[plugin], kernels="reference")
    costs = ModelCosts(build(prepared.model_config, prepared.host))
    unregister_local("TinyForCausalLM")
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64
    norms = 32 * 5
    assert costs.weight_bytes(1) == costs.weight_bytes(9) == 4 * (2 * layer + norms + 320)
    assert costs.cache_bytes(10) == 10 * 2 * 2 * 2 * 8 * 4
    assert costs.decode_bytes(3, 10) == costs.weight_bytes(3) + 3 * costs.cache_bytes(10)
    attention = 2 * (2 * 4 * 16 * (5 * 6 / 2))
    assert costs.prefill_operations(5) == 2 * 2 * layer * 5 + 2 * 320 + attention
    assert costs.prefill_operations(5, batch=3) == 3 * costs.prefill_operations(5)
    # prompts of 2 and 4 tokens: contexts of 3 and 4, and of 5, are read in two steps
    load = Workload("", ((1, 2), (1, 2, 3, 4)), (3, 2))
    nbytes = 2 * costs.weight_bytes(1) + 12 * costs.cache_bytes(1)
    operations = costs.prefill_operations(2) + costs.prefill_operations(4)
    assert costs.workload_seconds(load, 10.0, 4.0) == nbytes / 10 + operations / 4
    only_prompts = Workload("", load.prompts, (1, 1))
    assert costs.workload_seconds(only_prompts, 10.0, 4.0) == operations / 4


def test_costs_of_experts() -> None:
    """Few tokens are not expected to choose all experts."""
    from llmfw.testing.subject import Subject
    from llmfw_cli.bench.costs import ModelCosts

    with Subject("MixtralForCausalLM") as subject:
        model = subject.model()
        costs = ModelCosts(model)
        experts = [module for module in model.modules() if hasattr(module, "num_experts")]
        stacked = sum(p.nbytes for each in experts for p in each.parameters(recurse=False))
        count = experts[0].num_experts
        top_k = next(m.moe.top_k for m in model.modules() if hasattr(m, "moe"))
        lacking = costs.weight_bytes(10_000) - costs.weight_bytes(1)
        assert lacking == pytest.approx(stacked * (1 - top_k / count), rel=1e-6)


def test_dummy_weights_need_a_config_alone(tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    shape = tmp_path / "shape.json"
    shape.write_text((tiny_model / "config.json").read_text("utf-8"), "utf-8")
    try:
        arguments = ["--dummy-weights", str(shape), "--kernels", "reference", "--device", "cpu"]
        arguments += ["--plugin-module", str(tiny_model / "plugin.py")]
        load = ["--prompt-len", "8", "--new-tokens", "4", "--runs", "1", "--json"]
        done = run("bench", "latency", *arguments, *load)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["model"] == f"shape of {shape}"
        both = run("bench", "latency", *arguments, "--model", str(tiny_model))
        assert both.exit_code == 2
        assert "give one of --model" in both.stderr
    finally:
        unregister_local("TinyForCausalLM")
    missing = run("bench", "latency", "--dummy-weights", str(tmp_path / "none.json"))
    assert missing.exit_code == 2


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_a_random_checkpoint_loads(name: str, tmp_path: Path) -> None:
    """Sharded, with the names that are published: no tensor is missing, surplus or misshapen."""
    from llmfw.models import load_model
    from llmfw.testing.subject import Subject
    from llmfw.weights.safetensors_reader import open_safetensors

    with Subject(name) as subject:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(subject.written_config), "utf-8")
        published = open_safetensors(subject.checkpoint())
    target = tmp_path / "out"
    options = ["--dtype", "float32", "--shard-size", "20000", "--json"]
    done = run("bench", "make-checkpoint", str(config), str(target), *options)
    assert done.exit_code == 0, done.stderr
    made = open_safetensors(target)
    assert {n: made.info(n).shape for n in made.names()} == {
        n: published.info(n).shape for n in published.names()
    }
    written = json.loads(done.stdout)
    assert written["files"] == len(list(target.glob("*.safetensors"))) > 1
    assert written["nbytes"] == sum(made.info(n).nbytes for n in made.names())
    loaded = load_model(target, device="cpu", kernels="reference")
    weights = dict(loaded.model.named_parameters())
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    matrix = next(weight for key, weight in weights.items() if key.endswith("qkv_proj.weight"))
    assert 0.01 < float(matrix.std()) < 0.03
    assert not bool((matrix[0] == matrix[1]).all())
    again = run("bench", "make-checkpoint", str(config), str(target))
    assert again.exit_code == CheckpointError.exit_code


def test_a_checkpoint_of_an_unknown_type(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "none_such", "architectures": ["X"]}', "utf-8")
    done = run("bench", "make-checkpoint", str(config), str(tmp_path / "out"))
    assert done.exit_code == ConfigError.exit_code
    assert "--dummy-weights" in done.stderr


def test_startup(tiny: list[str]) -> None:
    done = run("bench", "startup", *tiny, "--runs", "1", "--json")
    assert done.exit_code == 0, done.stderr
    (start,) = json.loads(done.stdout)["startup"]
    assert start["page_cache"] == "none"
    names = ["imports", "resolve", "build", "weights", "cache", "rest", "first_token"]
    assert list(start["phases"]) == names
    assert sum(start["phases"].values()) == pytest.approx(start["total_s"], rel=0.05)


@pytest.mark.slow
def test_starts_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files evicted and files read before; each process has an empty cache of kernels."""
    from llmfw.testing.subject import Subject
    from llmfw_cli.bench import startup

    caches = []
    environment = startup._environment

    @contextmanager
    def noted(fresh_kernels: bool) -> Iterator[dict[str, str]]:
        with environment(fresh_kernels) as variables:
            caches.append(variables["LLMFW_CACHE"])
            yield variables

    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path))
    monkeypatch.setattr(startup, "_environment", noted)
    with Subject("LlamaForCausalLM") as subject:
        model = ["--model", str(subject.checkpoint()), "--device", "cpu", "--kernels", "reference"]
        kinds = ["--page-cache", "both", "--runs", "1", "--fresh-kernels"]
        done = run("bench", "startup", *model, *kinds, "--json")
        unknown = run("bench", "startup", *model, "--page-cache", "tepid")
    assert done.exit_code == 0, done.stderr
    starts = json.loads(done.stdout)["startup"]
    assert [start["page_cache"] for start in starts] == ["cold", "warm"]
    assert all(start["file_gb_per_s"] > 0 for start in starts)
    assert len({*caches, str(tmp_path)}) == 3
    assert unknown.exit_code == 2


@pytest.mark.slow
def test_a_start_that_fails_says_why(tiny: list[str]) -> None:
    done = run("bench", "startup", *tiny, "--runs", "1", "--dtype", "float7")
    assert done.exit_code == 16
    assert "float7" in done.stderr


def test_page_cache(tmp_path: Path) -> None:
    from llmfw_cli.bench.page_cache import evict, read_rate, resident

    file = tmp_path / "weights"
    file.write_bytes(b"x" * (8 << 20))
    evict([file])
    cold = resident([file])
    assert read_rate([file]) > 0
    warm = resident([file])
    assert warm in (None, 1.0)
    assert cold is None or 0 <= cold <= 1
    assert resident([]) is None


def test_chart_of_what_was_measured(tmp_path: Path) -> None:
    from llmfw_cli.bench.chart import series_in

    points = [
        {"batch": b, "context": c, "step_ms": b + c / 1000, "floor_ms": b / 2}
        for c in (128, 1024)
        for b in (8, 1)
    ]
    single = {"batch": 1, "step_ms": 1.0, "floor_ms": 0.5}
    results = {"gpu": "Imaginary", "S": {"W1": single, "Wb": points}, "L": [single]}
    found = dict(series_in(results))
    assert list(found) == ["S Wb, context 128", "S Wb, context 1024"]
    assert [point["batch"] for point in found["S Wb, context 128"]] == [1, 8]
    file, target = tmp_path / "results.json", tmp_path / "chart.svg"
    file.write_text(json.dumps(results), "utf-8")
    assert run("bench", "chart", str(file), str(target)).exit_code == 0
    assert "<svg" in target.read_text("utf-8")
    file.write_text(json.dumps({"L": [single]}), "utf-8")
    empty = run("bench", "chart", str(file), str(target))
    assert empty.exit_code == 2
    assert "nothing to draw" in empty.stderr
    file.write_text(json.dumps(results), "utf-8")
    assert run("bench", "chart", str(file), str(tmp_path / "chart.nothing")).exit_code == 2


@pytest.mark.parametrize(
    ("shape", "weights", "a_token"),
    [("qwen3-0.6b", 1.192e9, 114_688), ("llama-3.1-8b", 15.010e9, 131_072)],
)
def test_floors_are_those_of_the_published_figures(
    shape: str, weights: float, a_token: int, tmp_path: Path
) -> None:
    """What docs/benchmarks.md says a step reads, from the shapes that lie beside it."""
    from llmfw.models import build, prepare_model
    from llmfw_cli.bench.costs import ModelCosts

    config = Path(__file__).parent.parent / "docs" / "benchmarks" / "shapes" / f"{shape}.json"
    (tmp_path / "config.json").write_text(config.read_text("utf-8"), "utf-8")
    prepared = prepare_model(tmp_path, kernels="reference", device="cpu")
    costs = ModelCosts(build(prepared.model_config, prepared.host))
    assert costs.weight_bytes(1) == pytest.approx(weights, rel=1e-3)
    assert costs.cache_bytes(1) == a_token
