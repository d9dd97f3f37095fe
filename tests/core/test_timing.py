"""Costs of ops counted by hand, and times of kernels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from cli_helpers import run, tiny_model  # noqa: F401
from llmfw.errors import KernelError
from llmfw.ops import timing
from llmfw.ops.costs import BENCHES, Cost
from llmfw.ops.device import device_info
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.large_calls import LARGE_CALLS
from llmfw.ops.reference import REFERENCES
from llmfw.ops.timing import KernelTime, contexts_of, time_kernel, time_large

INFO = DeviceInfo(torch.device("cpu"), frozenset({"cpu"}))
FLOAT = torch.float32


def cost_of(op, tokens, kv_len=8, **shape) -> Cost:
    context = OpContext(op, FLOAT, INFO, shape)
    arguments = BENCHES[op].arguments(context, tokens, kv_len)
    result = REFERENCES[op](*arguments)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    return BENCHES[op].cost(context, arguments, results)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setattr(timing, "COLD_BYTES", 1)


def test_products():
    cost = cost_of("linear", 5, in_features=8, out_features=6, bias=1)
    assert cost == Cost(4 * (5 * 8 + 8 * 6 + 6 + 5 * 6), 2 * 5 * 8 * 6)
    # rows 0, 1 of 9 groups go to groups 0 and 7: the other weights are not read
    cost = cost_of("grouped_linear", 2, num_groups=9, in_features=4, out_features=3)
    assert cost == Cost(4 * (2 * 4 + 2 * 12 + 2 * 3), 2 * 2 * 12)


def test_experts_that_no_token_chose_are_not_read():
    cost = cost_of("moe_experts", 2, num_experts=20, hidden_size=4, intermediate_size=3, bias=0)
    used = 15  # tokens 0 and 1 go through 0 to 7 and 7 to 14
    assert cost == Cost(4 * (2 * 2 * 4 + used * 3 * 4 * 3), 2 * 16 * 3 * 4 * 3)


def test_rows():
    assert cost_of("rms_norm", 3, hidden_size=16).nbytes == 4 * (2 * 3 * 16 + 16)
    assert cost_of("add_rms_norm", 3, hidden_size=16).nbytes == 4 * (4 * 3 * 16 + 16)
    assert cost_of("silu_and_mul", 3, intermediate_size=16).nbytes == 4 * 3 * 3 * 16
    cost = cost_of("embedding", 3, num_embeddings=1000, embedding_dim=16)
    assert cost.nbytes == 3 * 8 + 2 * 3 * 16 * 4


ATTENTION = {
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 8,
    "softcap": 0, "sinks": 0, "block_size": 4, "latent": 0,
}  # fmt: skip


def test_attention():
    decode = cost_of("paged_attention", 3, kv_len=10, window=0, **ATTENTION)
    assert decode.nbytes == 4 * (3 * 10 * 2 * 16 + 2 * 3 * 4 * 8)
    assert decode.operations == 2 * 3 * 10 * 4 * 16
    windowed = cost_of("paged_attention", 3, kv_len=10, window=4, **ATTENTION)
    assert windowed.operations == decode.operations * 4 / 10
    prompt = cost_of("paged_attention", 70, window=0, **ATTENTION)
    assert prompt.operations == 2 * (70 * 71 / 2) * 4 * 16


@pytest.mark.parametrize("op", sorted(BENCHES))
def test_every_declared_call_runs(op):
    shape = {
        name: min(value, 256 if "num_embeddings" in name or "vocab" in name else 64)
        for name, value in BENCHES[op].shapes[0].items()
    }
    context = OpContext(op, FLOAT, INFO, shape)
    times = list(time_kernel(None, context, tokens=(1, 2, 65), kv_len=20))
    assert [each.case for each in times] == ["tokens=1", "tokens=2", "tokens=65"]
    for each in times:
        assert each.us > 0
        assert each.cost.nbytes > 0
        assert each.kernel == "reference"


def reference_itself(context: OpContext):
    return REFERENCES[context.op]


@pytest.mark.parametrize("op", sorted(LARGE_CALLS))
def test_large_calls_are_large_and_run(op, monkeypatch):
    on_meta = DeviceInfo(torch.device("meta"), frozenset())
    small = []
    for call in LARGE_CALLS[op]:
        arguments = BENCHES[op].arguments(
            OpContext(op, torch.bfloat16, on_meta, call.shape), call.tokens, call.kv_len
        )
        if call.changed is not None:
            arguments = call.changed(arguments)
        held = sum(each.nbytes for each in arguments if isinstance(each, torch.Tensor))
        assert held > 32 << 20, call
        shape = {
            name: min(value, 256 if "num_embeddings" in name or "vocab" in name else 32)
            for name, value in call.shape.items()
        }
        small.append(replace(call, shape=shape, tokens=3, kv_len=20, code=""))
    monkeypatch.setattr(timing, "LARGE_CALLS", {op: tuple(small)})
    kernel = Kernel(op, "own", f"{__name__}:reference_itself")
    times = list(time_large(kernel, FLOAT, INFO))
    assert len(times) == len(small)
    assert all(each.us > 0 and each.cost.nbytes > 0 for each in times)
    picky = Kernel(op, "own", f"{__name__}:reference_itself", requires=("cuda",))
    assert list(time_large(picky, FLOAT, INFO)) == []


def test_the_floor_is_the_longer_of_two():
    context = OpContext("linear", FLOAT, INFO, {})
    time = KernelTime("linear", "x", context, "", us=10.0, cost=Cost(1000, 4000))
    assert time.of_floor(bandwidth=1e9, rate=1e9) == pytest.approx(0.4)
    assert time.of_floor(bandwidth=1e8, rate=1e9) == pytest.approx(1.0)
    assert time.bytes_per_s == pytest.approx(1e8)
    assert time.operations_per_s == pytest.approx(4e8)


def test_ops_without_a_declaration_take_their_checks_largest_call():
    (name,) = {"moe_route"} & (set(INPUTS) - set(BENCHES))
    context = OpContext(name, FLOAT, INFO, INPUTS[name].shapes[-1])
    (time,) = time_kernel(None, context)
    assert time.case.startswith("tokens=33")


def own_op(context: OpContext):
    return lambda x: x * 2


def own_inputs(context: OpContext, generator: torch.Generator):
    yield (torch.ones(3),)
    yield (torch.ones(50),)


def own_cost(context, arguments, results) -> Cost:
    return Cost(1.0, arguments[0].numel())


def test_an_op_of_a_pack():
    here = __name__
    kernel = Kernel("twice", "own.twice", f"{here}:own_op", inputs=f"{here}:own_inputs")
    (context,) = contexts_of(kernel, FLOAT, OpContext("twice", FLOAT, INFO))
    (time,) = time_kernel(kernel, context)
    assert time.cost == Cost(400)
    declared = Kernel(
        "twice", "own.twice", f"{here}:own_op", inputs=f"{here}:own_inputs", cost=f"{here}:own_cost"
    )
    (time,) = time_kernel(declared, context)
    assert time.cost == Cost(1.0, 50)
    with pytest.raises(KernelError, match="cannot be timed"):
        list(time_kernel(Kernel("twice", "own.twice", f"{here}:own_op"), context))
    picky = Kernel("twice", "own.twice", f"{here}:own_op", requires=("cuda",))
    assert list(time_kernel(picky, context)) == []


def test_the_command():
    done = run(
        "kernels", "bench", "--op", "silu_and_mul", "--tokens", "1", "--device", "cpu", "--json"
    )
    if not {"avx2", "compiler"} <= device_info(torch.device("cpu")).features:
        pytest.skip("no pack serves a CPU without AVX2 or a compiler")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert {row["kernel"] for row in value["kernels"]} >= {"reference"}
    assert all(row["us"] > 0 and row["of_floor"] > 0 for row in value["kernels"])
    assert value["read_gb_per_s"] > 0
    assert run("kernels", "bench", "--op", "no_such_op", "--device", "cpu").exit_code == 2


def test_the_command_with_large_calls(monkeypatch):
    if not {"avx2", "compiler"} <= device_info(torch.device("cpu")).features:
        pytest.skip("no pack serves a CPU without AVX2 or a compiler")
    call = replace(LARGE_CALLS["silu_and_mul"][0], tokens=2, note="few")
    monkeypatch.setattr(timing, "LARGE_CALLS", {"silu_and_mul": (call,)})
    done = run("kernels", "bench", "--large", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    (row,) = value["kernels"]
    assert (row["kernel"], row["case"]) == ("cpu.silu_and_mul", "tokens=2 few")
    assert row["shape"] == "intermediate_size=14336"
    assert value["copy_gb_per_s"] > 0
    none = run("kernels", "bench", "--large", "--op", "grouped_linear", "--device", "cpu")
    assert none.exit_code == 2
    assert "grouped_linear has large calls" in none.stderr
    assert "rms_norm" in none.stderr


def test_the_command_of_a_model(tiny_model):  # noqa: F811
    from llmfw.plugins import load_plugin_module, unregister_local

    load_plugin_module(str(tiny_model / "plugin.py"))
    try:
        done = run(
            "kernels", "bench", "--model", str(tiny_model), "--op", "rms_norm", "--tokens", "1,2"
        )
    finally:
        unregister_local("TinyForCausalLM")
    assert done.exit_code == 0, done.stderr
    assert "hidden_size=32" in done.stdout
    assert "tokens=2" in done.stdout


def test_copies_leave_the_caches_and_fit_into_memory(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", 1000)
    small, table = torch.zeros(25), torch.zeros(10_000)
    assert timing._copies([small], Cost(100)) == 10
    assert timing._copies([table], Cost(100)) == 2
    assert timing._copies([torch.zeros(1)], Cost(1)) == timing.MOST_COPIES
