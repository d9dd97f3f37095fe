"""Times layers of experts beside their bandwidth floor.

    python3 tests/gpu/bench_experts.py [cpu] [SHAPE ...]

SHAPE is one of SHAPES below, all when left out; bfloat16. Kernels are the best there are ("auto")
and the library's ("library": torch's grouped product between torch's own operations). The floor is
the time to read the weights of the experts that the batch chose; shared experts are left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from llmfw import GatedActivation, ModelConfig
from llmfw.kernels import cpu, cupy, vendor
from llmfw.layers import MoE, MoEParams, stock_layer
from llmfw.models import bind_tree
from llmfw.models.weights import materialize
from llmfw.ops.device import device_info
from llmfw.ops.table import OpTable


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activation of gpt-oss."""
    gate = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * (gate * torch.sigmoid(gate * 1.702))


CUT = "fminf(gate, 7.0f)"
CLAMPED = f"(fminf(fmaxf(up, -7.0f), 7.0f) + 1.0f) * {CUT} * sigmoid(1.702f * {CUT})"
SHAPES = {  # hidden size, parameters, activation
    "qwen3-30b-a3b": (2048, MoEParams(128, 8, 768, renormalize=True), "silu"),
    "gpt-oss-20b": (
        2880,
        MoEParams(32, 4, 2880, scoring="topk_softmax", bias=True),
        GatedActivation(clamped, CLAMPED),
    ),
    "deepseek-v2-lite": (2048, MoEParams(64, 6, 1408, float32_router=True), "silu"),
    "mixtral-8x7b": (4096, MoEParams(8, 2, 14336, scoring="topk_softmax"), "silu"),
}
SELECTIONS = {"auto": "auto", "library": "-cupy.moe_experts,-cupy.moe_route"}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
BANDWIDTH = {"cuda": 3.12e12, "cpu": 22e9}  # bytes a second: an H100's, two cores' of a server
INPUTS = 8  # other experts in turn, so that no cache keeps them


def layer_on(device: torch.device, shape: str, select: str) -> MoE:
    """The layer with random weights."""
    hidden, moe, activation = SHAPES[shape]
    info = device_info(device)
    packs = (cpu.pack, vendor.pack, cupy.pack)
    config: ModelConfig = ModelConfig(
        pretrained_config=None,
        dtype=torch.bfloat16,
        device=device,
        ops=OpTable(info, tuple(k for p in packs for k in p.llmfw_kernels(info)), select),
        layer_factory=lambda kind, role, cfg, index, spec: stock_layer(
            kind, role, cfg, index, spec
        ),
    )
    layer = MoE(hidden_size=hidden, moe=moe, activation=activation, config=config)
    bind_tree(layer, config)
    materialize(layer, device)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.02)
    layer.gate.weight.data.normal_(0.0, hidden**-0.5)
    print({choice.context.op: choice.chosen for choice in config.ops.choices.values()})
    return layer


def seconds(runs: list[Callable[[], object]], device: torch.device) -> float:
    """Of one run: the best of several rounds; on a GPU in one CUDA graph."""

    def turn() -> None:
        for run in runs:
            run()

    turn()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        turn = graph.replay
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        turn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / len(runs)


def routed(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The experts that a batch goes through."""
    moe = layer.moe
    logits = layer.gate(x)
    return layer._route(logits, moe.top_k, moe.scoring, moe.renormalize)[1]


def main() -> None:
    """Time each shape by each selection of kernels."""
    words = sys.argv[1:]
    device = torch.device("cpu" if "cpu" in words else "cuda")
    for shape in [word for word in words if word in SHAPES] or SHAPES:
        hidden, moe, _ = SHAPES[shape]
        for name, select in SELECTIONS.items():
            if device.type == "cpu" and name != "auto":
                continue
            with torch.inference_mode():
                layer = layer_on(device, shape, select)
                for tokens in TOKENS:
                    inputs = torch.randn(INPUTS, tokens, hidden, device=device).to(torch.bfloat16)
                    spent = seconds([partial(layer, x) for x in inputs], device)
                    used = sum(routed(layer, x).unique().numel() for x in inputs) / INPUTS
                    nbytes = used * 3 * hidden * moe.intermediate_size * 2
                    floor = nbytes / BANDWIDTH[device.type]
                    print(
                        f"{shape:17} {name:8} tokens {tokens:5} {spent * 1e6:9.1f} us, floor "
                        f"{floor * 1e6:7.1f} us, ratio {spent / floor:5.2f} ({used:.1f} experts)",
                        flush=True,
                    )
            del layer


if __name__ == "__main__":
    main()
