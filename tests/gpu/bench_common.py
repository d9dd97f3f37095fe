"""What the sections of the benchmark share: the models' shapes, rotated buffers, reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu.kernel_cases import FEATURES
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.streamed import has_tile_products
from llmfw.ops.kernel import DeviceInfo, OpContext

READ = 3.12e12  # bytes a second, gpu.md's H100
DEVICE = torch.device("cuda", 0)
COLD = 192 << 20
BF16 = torch.bfloat16
COPIED = has_tile_products(DeviceInfo(DEVICE, FEATURES))  # how models of MODELS attend
ATTENTION = "cupy.paged_streamed" if COPIED else "cupy.paged_attention"
RESULTS: list[dict[str, Any]] = []
Run = Callable[[], object]
# name: hidden, intermediate, heads, kv heads, head dim, vocabulary, layers
MODELS = {"L": (4096, 14336, 32, 8, 128, 128256, 32), "S": (1024, 3072, 16, 8, 128, 151936, 28)}


def report(section: str, label: str, us: float, nbytes: float, **more: object) -> None:
    """One line on the screen, one entry in the file."""
    floor = nbytes / READ * 1e6
    RESULTS.append(
        {
            "section": section,
            "case": label,
            "us": round(us, 3),
            "tb_s": round(nbytes / us / 1e6, 3),
            "of_floor": round(floor / us, 3),
            **more,
        }
    )
    extra = "  ".join(f"{k} {v}" for k, v in more.items())
    rate = f"{nbytes / us / 1e6:6.2f} TB/s {floor / us:6.1%}"
    print(f"{section:10} {label:34} {us:9.2f} us {rate}  {extra}")


def context_of(op: str, shape: dict[str, int]) -> OpContext:
    """The context of one op and static shape."""
    return OpContext(op, BF16, DeviceInfo(DEVICE, FEATURES), shape)


def kernel(op: str, shape: dict[str, int], name: str | None = None) -> Callable[..., Any]:
    """The callable for an op and static shape, of the kernel of that name or the pack's first."""
    found = next(k for k in KERNELS if k.op == op and name in (None, k.name))
    return found.build(context_of(op, shape))


def rotated(nbytes: float, make: Callable[[], Run]) -> list[Run]:
    """Enough copies of a run, each with its own buffers, to leave the caches."""
    return [make() for _ in range(int(min(48, max(2, -(-COLD // max(nbytes, 1))))))]


def randn(*shape: int) -> torch.Tensor:
    """Random bf16 values on the device."""
    return torch.randn(*shape, dtype=BF16, device=DEVICE)


def rope_shape(name: str) -> dict[str, int]:
    """The context of a model's rope_and_cache."""
    _, _, heads, kv_heads, dim, _, _ = MODELS[name]
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "rotary_dim": dim,
        "interleaved": 0,
        "qk_norm": int(name == "S"),
        "block_size": 16,
    }


def attention_shape(name: str) -> dict[str, int]:
    """The context of a model's paged_attention."""
    _, _, heads, kv_heads, dim, _, _ = MODELS[name]
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "v_head_dim": dim,
        "window": 0,
        "softcap": 0,
        "sinks": 0,
        "block_size": 16,
    }
