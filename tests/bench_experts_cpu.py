"""Times one mixture of experts on the CPU beside its floor: `python tests/bench_experts_cpu.py`.

Ours as it is, ours with one product a group, torch's references and transformers' own layer take
turns in one process, so that other work on the machine meets all of them; of each the best counts.
The floor is reading the chosen experts' weights at the bandwidth measured between the turns.
`--one-thread` counts the processor time of a single thread, which says most on a busy machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llmfw import ModelConfig
from llmfw.kernels import cpu
from llmfw.kernels.cpu.launch import linear
from llmfw.layers import MoE, MoEParams, stock_layer
from llmfw.models import bind_tree
from llmfw.ops.device import device_info
from llmfw.ops.kernel import OpContext
from llmfw.ops.table import OpTable

DEVICE, DTYPE = torch.device("cpu"), torch.bfloat16
SECONDS = 12.0  # of turns for each shape
# Hidden size, experts, how many a token goes through, and their intermediate size.
SHAPES = {
    "64 x 2048 x 768, 8 a token": (2048, MoEParams(64, 8, 768, renormalize=True)),
    "32 x 512 x 256, 4 a token": (512, MoEParams(32, 4, 256, renormalize=True)),
}
Call = Callable[[torch.Tensor], torch.Tensor]


def ours(hidden: int, moe: MoEParams, select: str, weights: dict[str, torch.Tensor]) -> MoE:
    """Our layer with these weights."""
    info = device_info(DEVICE)
    table = OpTable(info, tuple(cpu.pack.llmfw_kernels(info)), select)
    config: ModelConfig = ModelConfig(
        pretrained_config=None, dtype=DTYPE, ops=table, layer_factory=factory
    )
    layer = MoE(hidden_size=hidden, moe=moe, config=config)
    bind_tree(layer, config)
    layer.load_state_dict(weights, assign=True)
    return layer


def factory(kind: str, role: str, config: ModelConfig, index: int | None, spec: dict):
    return stock_layer(kind, role, config, index, spec)


def one_by_one(layer: MoE) -> MoE:
    """The layer with one product for each group that has rows."""
    experts = layer.experts
    sizes = {"_up": (experts.hidden_size, 2 * experts.intermediate_size)}
    sizes["_down"] = (experts.intermediate_size, experts.hidden_size)
    for name, (width, outs) in sizes.items():
        shape = {"in_features": width, "out_features": outs}
        product = linear(OpContext("linear", DTYPE, device_info(DEVICE), shape))

        def grouped(x, weight, ends, product=product):
            out, start = x.new_empty(x.shape[0], weight.shape[1]), 0
            for group, end in enumerate(ends.tolist()):
                if end > start:
                    out[start:end] = product(x[start:end], weight[group])
                start = end
            return out

        setattr(experts, name, grouped)
    return layer


def theirs(hidden: int, moe: MoEParams, weights: dict[str, torch.Tensor], kind: str) -> Call:
    """transformers' layer with these weights and one of its products."""
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.intermediate_size,
        norm_topk_prob=True,
    )
    config._experts_implementation = kind
    with torch.device("meta"):
        layer = Qwen3MoeSparseMoeBlock(config).to(DTYPE)
    layer.load_state_dict(weights, assign=True)
    return lambda x: layer(x[None])[0]


def measure(
    hidden: int, moe: MoEParams, tokens: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each, and of the floor."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "gate.weight": (moe.num_experts, hidden),
        "experts.gate_up_proj": (moe.num_experts, 2 * moe.intermediate_size, hidden),
        "experts.down_proj": (moe.num_experts, hidden, moe.intermediate_size),
    }
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.05).to(DTYPE)
        for name, shape in shapes.items()
    }
    calls: dict[str, Call] = {
        "ours": ours(hidden, moe, "auto", weights),
        "a product a group": one_by_one(ours(hidden, moe, "auto", weights)),
        "references": ours(hidden, moe, "reference", weights),
        "transformers (eager)": theirs(hidden, moe, weights, "eager"),
        "transformers (grouped_mm)": theirs(hidden, moe, weights, "grouped_mm"),
    }
    x = torch.randn(tokens, hidden, generator=generator).to(DTYPE)
    layer = calls["ours"]
    chosen = layer._route(layer.gate(x), moe.top_k, "softmax", True)[1].unique().numel()
    nbytes = chosen * 3 * hidden * moe.intermediate_size * DTYPE.itemsize
    memory = torch.ones(1 << 25, dtype=torch.int64)
    best = dict.fromkeys([*calls, "memory"], float("inf"))
    outputs = {name: call(x) for name, call in calls.items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["references"], atol=0.05, rtol=0.05, msg=name)
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        for name, call in calls.items():
            start = clock()
            memory.sum()  # also puts the weights out of the caches, as other layers do
            read = clock()
            call(x)
            best[name] = min(best[name], clock() - read)
            best["memory"] = min(best["memory"], read - start)
    bandwidth = memory.nbytes / best.pop("memory")
    found = {name: round(seconds * 1e3, 3) for name, seconds in best.items()}
    return {
        "experts chosen": chosen,
        "GB/s": round(bandwidth / 1e9, 1),
        "floor": round(nbytes / bandwidth * 1e3, 3),
        **found,
    }


if __name__ == "__main__":
    one_thread = "--one-thread" in sys.argv[1:]
    if one_thread:
        torch.set_num_threads(1)
    timer = time.thread_time if one_thread else time.perf_counter
    with torch.inference_mode():
        for label, (hidden, moe) in SHAPES.items():
            for tokens in (1, 16):
                row = {"shape": label, "tokens": tokens, **measure(hidden, moe, tokens, timer)}
                print(json.dumps(row), flush=True)
