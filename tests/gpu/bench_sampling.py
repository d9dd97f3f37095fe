"""Sections of the benchmark: draws, penalties, copies of blocks, attention of float32 models."""

from __future__ import annotations

import functools

import torch

from gpu.bench_common import BF16, DEVICE, MODELS, Run, attention_shape, kernel, report, rotated
from gpu.kernel_cases import FEATURES
from gpu.sampling_cases import parameters_of
from llmfw.kernels.cupy import paged_simt, penalise, tune
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, OpContext

#: temperature, top_k, top_p, min_p
KINDS = {
    "temperature": (0.8, 0, 1.0, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
    "top_k": (0.8, 50, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "top_k, top_p": (0.8, 50, 0.9, 0.0),
}
BLOCK = 16
Requests = tuple[tuple[int, int], ...]


def draws() -> None:
    """draw_tokens after argmax; the floor reads the logits once, twice where they are cut."""
    for name, (*_, vocab, _) in MODELS.items():
        draw, best = (kernel(op, {"vocab_size": vocab}) for op in ("draw_tokens", "argmax"))
        for rows in (1, 32, 256):
            for kind, mix in KINDS.items():
                uniform = torch.rand(rows, dtype=torch.float64)
                parameters = parameters_of([mix] * rows, uniform).to(DEVICE)
                cuts = "top" in kind

                def make(draw=draw, best=best, r=rows, v=vocab, p=parameters, c=cuts) -> Run:
                    logits = (2.5 * torch.randn(r, v, device=DEVICE)).to(BF16)
                    return functools.partial(draw, logits, best(logits), p, c)

                nbytes = 2 * rows * vocab
                us = tune.graph_time(rotated(nbytes, make), launches=24)
                report("sampling", f"{name} {kind} x{rows}", us, nbytes * (2 if cuts else 1))


def penalties() -> None:
    """penalise of sequences of one length."""
    call = penalise.penalise(_context("penalise", {}))
    vocab = MODELS["S"][5]
    for rows, length in ((1, 1000), (32, 1000), (256, 1000), (1, 30_000)):
        logits = torch.randn(rows, vocab, device=DEVICE)
        tokens = torch.randint(0, vocab, (rows, length), dtype=torch.int32, device=DEVICE)
        which = torch.arange(rows, device=DEVICE)
        lens, strengths = which * 0 + length, torch.full((3, rows), 1.1, device=DEVICE)
        arguments = (logits, which, which, tokens, lens, lens // 2, strengths, length)
        us = tune.graph_time([functools.partial(call, *arguments)], launches=8)
        report("sampling", f"penalise {rows} x {length}", us, rows * length * 12)


def copies() -> None:
    """copy_blocks of all of L's caches, read and written."""
    *_, kv_heads, dim, _, layers = MODELS["L"]
    call = kernel("copy_blocks", {})
    shape = (1100, BLOCK, kv_heads, dim)
    caches = [torch.zeros(shape, dtype=BF16, device=DEVICE) for _ in range(2 * layers)]
    order = torch.randperm(shape[0], device=DEVICE)
    for pairs in (1, 8, 64, 512):
        run = functools.partial(call, order[:pairs].clone(), order[pairs : 2 * pairs].clone())
        us = tune.graph_time([functools.partial(run, *caches)], launches=8)
        report("copies", f"{pairs} blocks", us, 2 * pairs * len(caches) * caches[0][0].nbytes)


def float32_attention() -> None:
    """paged_attention of float32 models: decoding and prompts."""
    batches: dict[str, tuple[Requests, int]] = {
        "1x200": (((1, 200),), 0),
        "1x1024": (((1, 1024),), 0),
        "32x1024": (((1, 1024),) * 32, 0),
        "1x8192": (((1, 8192),), 0),
        "prompt 128": (((128, 128),), 1),
        "prompt 2048": (((2048, 2048),), 1),
    }
    for name in MODELS:
        shape = attention_shape(name)
        call = paged_simt.paged_attention(_context("paged_attention", shape))
        heads, kv_heads, dim = (shape[n] for n in ("num_heads", "num_kv_heads", "head_dim"))
        for label, (requests, contexts) in batches.items():
            generator = torch.Generator().manual_seed(0)
            metadata, view, blocks = paged_batch(requests, contexts, BLOCK, generator, DEVICE)
            tokens, keys = sum(new for new, _ in requests), sum(total for _, total in requests)

            def make(call=call, t=tokens, b=blocks, m=metadata, v=view, s=shape) -> Run:
                heads, kv_heads, dim = (s[n] for n in ("num_heads", "num_kv_heads", "head_dim"))
                q = torch.randn(t, heads, dim, device=DEVICE)
                k, values = torch.randn(2, b, BLOCK, kv_heads, dim, device=DEVICE)
                return functools.partial(call, q, k, values, m, v, dim**-0.5)

            nbytes = keys * kv_heads * dim * 8
            runs = [make()] if contexts else rotated(nbytes, make)
            us = tune.graph_time(runs, launches=4 if contexts else 16)
            pairs = sum(new * total - new * (new - 1) / 2 for new, total in requests)
            tflops = round(4 * heads * dim * pairs / us / 1e6, 1)
            report("float32", f"{name} {label}", us, nbytes, tflops=tflops)


def _context(op: str, shape: dict[str, int]) -> OpContext:
    return OpContext(op, torch.float32, DeviceInfo(DEVICE, FEATURES), shape)
