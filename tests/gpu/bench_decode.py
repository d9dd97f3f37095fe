"""Section of the benchmark: the attention half of decode steps as a model runs it, in one graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gpu.bench_attention import decode_caches
from gpu.bench_common import (
    COLD,
    COPIED,
    DEVICE,
    MODELS,
    attention_shape,
    kernel,
    randn,
    report,
    rope_shape,
)
from llmfw.attention.metadata import AttentionMetadata, CacheGroupView
from llmfw.kernels.cupy import tune

KEYS = 960
BATCHES = (1, 8, 32, 64, 256)
KINDS = {"copies": "cupy.paged_streamed"} if COPIED else {}
KINDS["registers"] = "cupy.paged_attention"


def decode() -> None:
    """Norm, product, rotation, attention, product: tiles of keys by copies, and in registers."""
    for name in MODELS:
        for batch in BATCHES:
            layers = layers_of(name, batch)
            for kind, attention in KINDS.items():
                runs = [functools.partial(layer, attend_by(name, attention)) for layer in layers]
                us = tune.graph_time(runs, launches=24)
                nbytes = layers[0].keywords["nbytes"]
                report("decode", f"{name} {kind} {batch} x {KEYS}", us, nbytes)
            del layers, runs


Attend = Callable[..., torch.Tensor]


def attend_by(name: str, kind: str) -> Attend:
    """rope_and_cache, then paged_attention by the kernel of that name."""
    rope = kernel("rope_and_cache", rope_shape(name))
    attention = kernel("paged_attention", attention_shape(name), kind)
    _, _, heads, kv_heads, dim, _, _ = MODELS[name]

    def attend(qkv: Any, cos_sin: Any, k: Any, v: Any, batch: Any, norm: Any) -> torch.Tensor:
        view = batch.groups[0]
        sizes = (heads, kv_heads, dim)
        q = rope(qkv, batch.positions, cos_sin, k, v, view.slots, *sizes, False, norm, norm)
        return attention(q, k, v, batch, view, dim**-0.5)

    return attend


def layers_of(name: str, batch: int) -> list[functools.partial[torch.Tensor]]:
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
        max_kv_len=KEYS,
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
