"""Section of the benchmark: the attention half of decode steps as a model runs it, in one graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gpu.bench_attention import decode_caches
from gpu.bench_common import (
    BF16,
    COLD,
    DEVICE,
    MODELS,
    attention_shape,
    context_of,
    kernel,
    randn,
    report,
    rope_shape,
)
from llmfw.attention.metadata import AttentionMetadata, CacheGroupView
from llmfw.kernels.cupy import paged_plan, tune
from llmfw.kernels.cupy.compile import compile_ahead
from llmfw.kernels.cupy.rope_decode import RopeAndAttend
from llmfw.kernels.cupy.streamed import Streamed

KEYS = 960
BATCHES = (1, 8, 32, 64, 256)
# tiles ahead, kept up in the loop, begun before the kernel before is done
WAYS = ((0, 0, 1), (1, 1, 1), (1, 1, 0), (2, 1, 1))
WIDE, STAGES = paged_plan.registers_cut, Streamed.stages


def narrow(heads: Any, rows: int, blocks: int, device: Any) -> Any:
    """Blocks of four warps."""
    return WIDE(heads, rows, 1 << 20, device)


def lean(self: Any, bucket: int, in_features: int) -> int:
    """No more stages than chunks."""
    chunks = -(-in_features // self.chunk(bucket) // self.split)
    return max(1, min(STAGES(self, bucket, in_features), chunks))


def setting(way: tuple[int, int, int], cut: Any = WIDE) -> None:
    """Constants of the kernels that are built from now on."""
    paged_plan.AHEAD, paged_plan.KEEP, paged_plan.EARLY = way
    paged_plan.registers_cut = cut


def decode() -> None:
    """Norm, product, rotation, attention, product: rotation apart, and as one with attention."""
    compile_all()
    for name in MODELS:
        for batch, longest in (
            (32, KEYS),
            (32, 4096),
            (1, KEYS),
            (8, KEYS),
            (64, KEYS),
            (256, KEYS),
        ):
            for stages in (STAGES, lean) if batch == 8 and name == "S" else (STAGES,):
                Streamed.stages = stages
                layers = layers_of(name, batch, longest)
                for way in WAYS:
                    for kind in ("two", "one", "narrow"):
                        if (kind == "narrow" and batch > 8) or (
                            kind == "two" and way not in WAYS[:2]
                        ):
                            continue
                        setting(way, narrow if kind == "narrow" else WIDE)
                        attend = (two_ops if kind == "two" else one_op)(name)
                        runs = [functools.partial(layer, attend) for layer in layers]
                        us = tune.graph_time(runs, launches=24, repeats=6)
                        label = f"{name} {kind} {batch} x {KEYS}/{longest} {way}"
                        label += " lean" if stages is lean else ""
                        report("decode", label, us, layers[0].keywords["nbytes"])
                del layers, runs
            Streamed.stages = STAGES


def compile_all() -> None:
    """All ways at once, on several cores."""
    uses = []
    for name in MODELS:
        one = RopeAndAttend(context_of("rope_and_attend", rope_shape(name) | attention_shape(name)))
        for way in WAYS:
            for batch in BATCHES:
                for cut in (WIDE, narrow):
                    setting(way, cut)
                    plan = one.decode.plan(batch, 1, KEYS)
                    constants = one.decode.constants(plan.rows, plan.cut)
                    uses.append(("rope_decode.cu", constants | one._rotation))
                    if cut is WIDE and way in WAYS[:2]:
                        uses.append(("paged_decode.cu", constants))
    unique = {(source, tuple(sorted(each.items()))): (source, each) for source, each in uses}
    compile_ahead(DEVICE, BF16, unique.values())


Attend = Callable[..., torch.Tensor]


def two_ops(name: str) -> Attend:
    """rope_and_cache, then paged_attention."""
    rope = kernel("rope_and_cache", rope_shape(name))
    attention = kernel("paged_attention", attention_shape(name))
    _, _, heads, kv_heads, dim, _, _ = MODELS[name]

    def attend(qkv: Any, cos_sin: Any, k: Any, v: Any, batch: Any, norm: Any) -> torch.Tensor:
        view = batch.groups[0]
        sizes = (heads, kv_heads, dim)
        q = rope(qkv, batch.positions, cos_sin, k, v, view.slots, *sizes, False, norm, norm)
        return attention(q, k, v, batch, view, dim**-0.5)

    return attend


def one_op(name: str) -> Attend:
    """rope_and_attend."""
    fused = kernel("rope_and_attend", rope_shape(name) | attention_shape(name))
    dim = MODELS[name][4]

    def attend(qkv: Any, cos_sin: Any, k: Any, v: Any, batch: Any, norm: Any) -> torch.Tensor:
        scale, view = dim**-0.5, batch.groups[0]
        return fused(qkv, batch.positions, cos_sin, k, v, batch, view, scale, False, norm, norm)

    return attend


def layers_of(name: str, batch: int, longest: int) -> list[functools.partial[torch.Tensor]]:
    """Layers with weights and caches of their own, together larger than what L2 holds."""
    hidden, _, heads, kv_heads, dim, _, _ = MODELS[name]
    width, out = (heads + 2 * kv_heads) * dim, heads * dim
    weights = 2 * hidden * (width + out)
    nbytes = weights + 4 * batch * KEYS * kv_heads * dim
    count = int(min(12, max(3, -(-COLD // nbytes))))
    caches, tables = decode_caches(batch, KEYS, kv_heads, dim, count)
    last = torch.full((batch,), KEYS - 1, device=DEVICE)
    slots = tables[:, (KEYS - 1) // 16].long() * 16 + (KEYS - 1) % 16
    metadata = AttentionMetadata(
        query_lens=(1,) * batch,
        kv_lens=(KEYS,) * batch,
        num_contexts=0,
        cu_query_lens=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
        kv_lens_device=(last + 1).int(),
        positions=last,
        groups=(CacheGroupView(tables, slots, 16),),
        caches={},
        max_query_len=1,
        max_kv_len=longest,
    )
    shape = {"in_features": hidden, "out_features": width, "bias": 0}
    qkv = kernel("linear", shape)
    o = kernel("linear", {"in_features": out, "out_features": hidden, "bias": 0})
    rms = kernel("rms_norm", {"hidden_size": hidden})
    norm = randn(dim) if name == "S" else None
    cos_sin = torch.rand(9000, dim, device=DEVICE)
    x, weight = randn(batch, hidden), randn(hidden)

    def layer(attend: Attend, k: Any, v: Any, w: Any, u: Any, nbytes: float) -> torch.Tensor:
        packed = qkv(rms(x, weight, 1e-6), w, None)
        return o(attend(packed, cos_sin, k, v, metadata, norm), u, None)

    return [
        functools.partial(
            layer, k=k, v=v, w=randn(width, hidden), u=randn(hidden, out), nbytes=nbytes
        )
        for k, v in caches
    ]
