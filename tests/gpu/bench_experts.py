"""Times a mixture of experts beside its bandwidth floor: `python tests/gpu/bench_experts.py [cpu]`.

The shape is 128 experts of 2048 x 768, 8 a token, bfloat16. The floor is the time to read the
weights of the experts that the batch chose.
"""

from __future__ import annotations

import sys
import time

import torch

from llmfw import ModelConfig
from llmfw.kernels import cpu, vendor
from llmfw.layers import MoE, MoEParams, stock_layer
from llmfw.models import bind_tree
from llmfw.models.weights import materialize
from llmfw.ops.check import check_kernel
from llmfw.ops.device import device_info
from llmfw.ops.table import OpTable

HIDDEN, MOE = 2048, MoEParams(num_experts=128, top_k=8, intermediate_size=768)
BANDWIDTH = {"cuda": 3.35e12, "cpu": 22e9}  # bytes a second: an H100's, two cores' of a server


def layer_on(device: torch.device, select: str) -> MoE:
    """The layer with random weights."""
    info = device_info(device)
    kernels = [k for pack in (cpu.pack, vendor.pack) for k in pack.llmfw_kernels(info)]
    config: ModelConfig = ModelConfig(
        pretrained_config=None,
        dtype=torch.bfloat16,
        device=device,
        ops=OpTable(info, tuple(kernels), select),
        layer_factory=lambda kind, role, cfg, index, spec: stock_layer(
            kind, role, cfg, index, spec
        ),
    )
    layer = MoE(hidden_size=HIDDEN, moe=MOE, config=config)
    bind_tree(layer, config)
    materialize(layer, device)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.02)
    print({key[0]: choice.chosen for key, choice in config.ops.choices.items()})
    return layer


def seconds(layer: MoE, x: torch.Tensor) -> float:
    """The best of several calls; on a GPU as a graph where it can be captured."""
    run = lambda: layer(x)  # noqa: E731
    for _ in range(3):
        run()
    if x.is_cuda:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        except RuntimeError as exc:
            torch.cuda.synchronize()
            print(f"  not captured: {str(exc).splitlines()[0]}")
            run = lambda: layer(x)  # noqa: E731
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        run()
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Check the pack's kernels, then time the layer."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    info = device_info(device)
    for kernel in vendor.pack.llmfw_kernels(info):
        report = check_kernel(kernel, info)
        print(kernel.name, "passed" if report.passed else "FAILED", report.worst)
    for select in ("auto", "reference"):
        layer = layer_on(device, select)
        with torch.inference_mode():
            for tokens in (1, 4, 16, 64, 256, 2048):
                x = torch.randn(tokens, HIDDEN, device=device).to(torch.bfloat16)
                spent = seconds(layer, x)
                chosen = layer._route(layer.gate(x), MOE.top_k, "softmax", False)[1]
                used = chosen.unique().numel()
                floor = used * 3 * HIDDEN * MOE.intermediate_size * 2 / BANDWIDTH[device.type]
                print(
                    f"{select:10} tokens={tokens:5} {spent * 1e6:9.0f} us, "
                    f"floor {floor * 1e6:7.0f} us ({used} experts)"
                )


if __name__ == "__main__":
    main()
