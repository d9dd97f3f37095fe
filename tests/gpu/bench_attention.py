"""Sections of the benchmark: attention of generation and of context requests."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from gpu.bench_common import (
    ATTENTION,
    BF16,
    COLD,
    COPIED,
    DEVICE,
    MODELS,
    Run,
    attention_shape,
    context_of,
    kernel,
    randn,
    report,
)
from gpu.kernel_cases import Batch, attention_arguments
from llmfw.kernels.cupy import prefill as prefill_module
from llmfw.kernels.cupy import tune
from llmfw.kernels.cupy.attention import Part
from llmfw.kernels.cupy.latent_attention import LatentAttention
from llmfw.kernels.cupy.latent_tiles import LatentTiles
from llmfw.kernels.cupy.paged_decode import PagedDecode

LatentKernel = LatentAttention | LatentTiles
LATENT_POINTS = [(1, 192), (1, 1024), (8, 8192), (32, 1024), (64, 192), (64, 1024), (256, 1024)]


def attention() -> None:
    """Paged decode: the plan's splits and the best of a sweep."""
    for name, (_, _, heads, kv_heads, dim, _, _) in MODELS.items():
        decode = PagedDecode(context_of("paged_attention", attention_shape(name)), COPIED)
        for batch, length in [
            (1, 128),
            (1, 256),
            (1, 512),
            (1, 1024),
            (1, 8192),
            (8, 1024),
            (16, 1024),
            (32, 1024),
            (32, 4096),
            (64, 1024),
            (256, 1024),
        ]:
            nbytes = batch * length * kv_heads * dim * 4
            layers = int(min(24, max(1, -(-COLD // nbytes))))
            caches, tables = decode_caches(batch, length, kv_heads, dim, layers)
            q = randn(batch, heads, dim)

            plan = decode.plan(batch, 1, length)
            us = tune.graph_time(decode_runs(decode, caches, tables, q, length, None))
            sweep = {
                splits: round(
                    tune.graph_time(
                        decode_runs(decode, caches, tables, q, length, splits),
                        launches=12,
                        repeats=3,
                    ),
                    2,
                )
                for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
                if splits <= max(1, length // 64) and splits * batch <= 256
            }
            best = min(sweep, key=lambda s: sweep[s])
            label = f"{name} decode {batch} x {length}"
            report(
                "attention",
                label,
                us,
                nbytes,
                splits=plan.splits,
                warps=plan.cut.warps,
                best=f"{best}: {sweep[best]}",
                sweep=sweep,
            )
            if batch in (1, 32) and length <= 1024:  # as a graph for long sequences runs it
                runs = decode_runs(decode, caches, tables, q, length, None, max_kv=8192)
                us = tune.graph_time(runs)
                splits = decode.plan(batch, 1, 8192).splits
                report("attention", f"{label} of at most 8192", us, nbytes, splits=splits)
            del caches


def decode_runs(
    decode: PagedDecode,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    tables: torch.Tensor,
    q: torch.Tensor,
    length: int,
    splits: int | None,
    max_kv: int | None = None,
) -> list[Run]:
    """One decode launch for each layer's cache; all requests have `length` keys."""
    batch, heads, dim = q.shape
    out = torch.empty(batch, heads * dim, dtype=BF16, device=DEVICE)
    cumulative = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    return [
        functools.partial(
            decode,
            out,
            q,
            k,
            v,
            tables,
            cumulative,
            lens,
            first_request=0,
            requests=batch,
            max_q=1,
            max_kv=max_kv or length,
            scale=dim**-0.5,
            splits=splits,
            settled=True,
        )
        for k, v in caches
    ]


def decode_caches(
    batch: int, length: int, kv_heads: int, dim: int, layers: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Caches of some layers with shuffled blocks, and their block table."""
    blocks = -(-length // 16)
    total = batch * blocks
    tables = torch.randperm(total, device=DEVICE).int().view(batch, blocks)
    caches = [
        (randn(total, 16, kv_heads, dim), randn(total, 16, kv_heads, dim)) for _ in range(layers)
    ]
    return caches, tables


def latent() -> None:
    """Attention of generation requests over a latent cache of 512 + 64 values a token."""
    for heads in (16, 128):
        shape = latent_shape(heads)
        context = context_of("paged_attention", shape)
        kernels: list[tuple[str, LatentKernel]] = [("warps", LatentAttention(context))]
        if COPIED:
            kernels.append(("tiles", LatentTiles(context)))
        for batch, length in LATENT_POINTS:
            nbytes = batch * length * shape["head_dim"] * 2
            flops = 2 * batch * length * heads * (shape["head_dim"] + shape["v_head_dim"])
            for name, attend in kernels:
                us = tune.graph_time(latent_runs(attend, batch, length))
                facts = {"tflops": round(flops / us / 1e6), "plan": attend.plan(batch, 1, length)}
                label = f"{heads} heads {name} {batch} x {length}"
                report("latent", label, us, nbytes, **{k: str(v) for k, v in facts.items()})


def latent_shape(heads: int) -> dict[str, int]:
    """The context of a latent layer's paged_attention."""
    return {
        "num_heads": heads,
        "num_kv_heads": 1,
        "head_dim": 576,
        "v_head_dim": 512,
        "window": 0,
        "softcap": 0,
        "sinks": 0,
        "block_size": 16,
        "latent": 1,
    }


def latent_runs(attend: LatentKernel, batch: int, length: int, **overrides: Any) -> list[Run]:
    """One launch for each of some layers' caches; all requests have `length` keys."""
    heads = attend.heads
    blocks = -(-length // 16)
    layers = int(min(24, max(1, -(-COLD // (batch * length * heads.head_dim * 2)))))
    tables = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
    q = randn(batch, heads.num_heads, heads.head_dim)
    out = torch.empty(batch, heads.num_heads * heads.v_dim, dtype=BF16, device=DEVICE)
    cumulative = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    part = Part(0, batch, 1, length, settled=True)
    scale = heads.head_dim**-0.5
    return [
        functools.partial(attend, out, q, cache, tables, cumulative, lens, part, scale, **overrides)
        for cache in (randn(batch * blocks, 16, 1, heads.head_dim) for _ in range(layers))
    ]


def prefill() -> None:
    """Context requests: torch's varlen attention, the op through it, and through paged_decode."""
    from torch.nn.attention import varlen

    for name, (_, _, heads, kv_heads, dim, _, _) in MODELS.items():
        tokens, each = 8 * 2048, 2048
        q, k, v = (randn(tokens, h, dim) for h in (heads, kv_heads, kv_heads))
        cu = torch.arange(0, tokens + 1, each, dtype=torch.int32, device=DEVICE)
        call = functools.partial(
            varlen.varlen_attn, q, k, v, cu, cu, each, each, window_size=(-1, 0)
        )
        us = tune.graph_time([call], launches=4)
        flops = 8 * each * each * heads * dim * 2  # causal: half of 4 n^2 d
        rate = round(flops / us / 1e6, 1)
        report("prefill", f"{name} varlen_attn 8 x 2048", us, 0, tflops=rate)
        host_time(f"{name} varlen_attn", call)
        shape = attention_shape(name)
        for count, new, length in ((8, 2048, 2048), (4, 128, 1024), (1, 128, 128), (1, 960, 960)):
            batch = Batch(tuple((new, length) for _ in range(count)), contexts=count)
            generator = torch.Generator().manual_seed(0)
            args, kwargs = attention_arguments(DEVICE, BF16, generator, shape, batch)
            flops = 4 * count * heads * dim * (new * length - new * new // 2)
            least = prefill_module.LEAST_WORK, prefill_module.LEAST_ROWS
            prefill_module.LEAST_ROWS = 0
            for kind, threshold in (("flash", 0.0), ("paged_decode", float("inf"))):
                if kind == "paged_decode" and new * length > 1 << 20:
                    continue
                prefill_module.LEAST_WORK = threshold
                attend = kernel("paged_attention", shape, ATTENTION)
                call = functools.partial(attend, *args, **kwargs)
                call()
                us = tune.graph_time([call], launches=4)
                label = f"{name} {kind} {count} x {new}/{length}"
                report("prefill", label, us, 0, tflops=round(flops / us / 1e6, 1))
                host_time(label, call)
            prefill_module.LEAST_WORK, prefill_module.LEAST_ROWS = least


def host_time(label: str, call: Run) -> None:
    """Microseconds that one eager call keeps the host."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    us = (time.perf_counter() - start) / 50 * 1e6
    torch.cuda.synchronize()
    report("prefill", f"{label}, host", us, 0)
