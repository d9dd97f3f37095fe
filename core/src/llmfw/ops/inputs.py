"""Inputs for checking kernels: for each op of core the static shapes worth trying and arguments
drawn for them.

Odd sizes, one token, none, thousands, tensors that are not aligned and ragged batches are among
them on purpose: that is where kernels go wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from llmfw.attention.metadata import AttentionMetadata, CacheGroupView
from llmfw.ops.drawn import Case, OpInputs, normal, shapes, unaligned
from llmfw.ops.inputs_moe import MOE_INPUTS
from llmfw.ops.inputs_normed import NORMED_INPUTS
from llmfw.ops.inputs_products import PRODUCT_INPUTS
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference_step import argmax


def _rms_norm(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    hidden = context["hidden_size"]
    weight = normal(context, generator, hidden)
    for tokens in (0, 1, 3, 65):
        for offset in (0.0, 1.0):
            x = normal(context, generator, tokens, hidden)
            yield Case(f"tokens={tokens} offset={offset}", (x, weight, 1e-5, offset))
    yield Case(
        "tokens=3 unaligned", (unaligned(normal(context, generator, 3, hidden)), weight, 1e-5)
    )
    yield Case("tokens=2050", (normal(context, generator, 2050, hidden), weight, 1e-5))


def _add_rms_norm(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    for case in _rms_norm(context, generator):
        x, *rest = case.arguments
        assert isinstance(x, torch.Tensor)
        residual = normal(context, generator, *x.shape)
        yield Case(case.label, (x, residual, *rest))
        if x.dtype is not torch.float32:
            yield Case(f"{case.label} wide", (x, residual.float() / 3, *rest))


def _gated_rms_norm(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    hidden, groups = context["hidden_size"], context["num_groups"]
    weight = normal(context, generator, hidden)
    for tokens in (0, 1, 3, 65):
        x = normal(context, generator, tokens, hidden)
        gate = normal(context, generator, tokens, 2 * hidden + 8)[:, 8 : 8 + hidden]
        yield Case(f"tokens={tokens}", (x, gate, weight, 1e-5, groups))
    x, gate = (normal(context, generator, 3, hidden) for _ in range(2))
    yield Case("tokens=3 unaligned", (unaligned(x), unaligned(gate), weight, 1e-5, groups))
    x, gate = (normal(context, generator, 2050, hidden) for _ in range(2))
    yield Case("tokens=2050", (x, gate, weight, 1e-5, groups))


def _layer_norm(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    hidden = context["hidden_size"]
    weight, bias = normal(context, generator, hidden), normal(context, generator, hidden)
    for tokens in (0, 1, 3, 65):
        x = normal(context, generator, tokens, hidden)
        yield Case(f"tokens={tokens}", (x, weight, bias, 1e-5))
        yield Case(f"tokens={tokens} no bias", (x, weight, None, 1e-5))
    x = unaligned(normal(context, generator, 3, hidden))
    yield Case("tokens=3 unaligned", (x, weight, bias, 1e-5))
    yield Case("tokens=2050", (normal(context, generator, 2050, hidden), weight, bias, 1e-5))


def _act_and_mul(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    width = 2 * context["intermediate_size"]
    for tokens in (0, 1, 3, 65, 2050):
        yield Case(f"tokens={tokens}", (3 * normal(context, generator, tokens, width),))
    yield Case("tokens=3 unaligned", (unaligned(normal(context, generator, 3, width)),))


def _embedding(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    rows, device = context["num_embeddings"], context.info.device
    weight = normal(context, generator, rows, context["embedding_dim"])
    for tokens in (0, 1, 37, 2050):
        ids = torch.randint(0, rows, (tokens,), generator=generator).to(device)
        yield Case(f"tokens={tokens}", (ids, weight))
        yield Case(f"tokens={tokens} scaled", (ids, weight, None, 1.75))
        of_all = torch.randint(-1, 4 * rows, (tokens,), generator=generator).to(device)
        yield Case(f"tokens={tokens} of a part", (of_all, weight, 2 * rows))
    yield Case("a part, scaled", (of_all, weight, rows, 0.3))


def _rope_and_cache(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    device = context.info.device
    heads, kv_heads, head_dim = context["num_heads"], context["num_kv_heads"], context["head_dim"]
    rotary_dim, block_size, positions = context["rotary_dim"], context["block_size"], 128
    q_norm = normal(context, generator, head_dim) if context["qk_norm"] else None
    k_norm = normal(context, generator, head_dim) if context["qk_norm"] else None
    angles = torch.rand(positions, rotary_dim // 2, generator=generator) * 6.28
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device) if rotary_dim else None
    for tokens in (0, 1, 5, 40, 2050):
        blocks = tokens // block_size + 2
        slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
        slots[1:2] = -1  # a padded token
        qkv = normal(context, generator, tokens, (heads + 2 * kv_heads) * head_dim)
        arguments = (
            qkv,
            torch.randint(0, positions, (tokens,), generator=generator).to(device),
            cos_sin,
            normal(context, generator, blocks, block_size, kv_heads, head_dim),
            normal(context, generator, blocks, block_size, kv_heads, head_dim),
            slots.to(device),
            heads,
            kv_heads,
            head_dim,
            bool(context["interleaved"]),
            q_norm,
            k_norm,
            1e-5,
            0.0,
        )
        yield Case(f"tokens={tokens}", arguments, written=(3, 4))
        if tokens == 5:
            yield Case("tokens=5 unaligned", (unaligned(qkv), *arguments[1:]), written=(3, 4))


def _latent_rope_and_cache(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    device, heads, block_size = context.info.device, context["num_heads"], context["block_size"]
    latent_dim, rotary_dim, positions = context["latent_dim"], context["rotary_dim"], 128
    width = latent_dim + rotary_dim
    norm = normal(context, generator, latent_dim) if context["norm"] else None
    angles = torch.rand(positions, rotary_dim // 2, generator=generator) * 6.28
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    for tokens in (0, 1, 5, 40):
        blocks = tokens // block_size + 2
        slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
        slots[1:2] = -1  # a padded token
        q = normal(context, generator, tokens, heads, 24 + rotary_dim)
        arguments = (
            q[..., 24:],  # a view of a wider projection, as the layer has it
            normal(context, generator, tokens, width),
            torch.randint(0, positions, (tokens,), generator=generator).to(device),
            cos_sin,
            normal(context, generator, blocks, block_size, 1, width),
            slots.to(device),
            bool(context["interleaved"]),
            norm,
            1e-5,
        )
        yield Case(f"tokens={tokens}", arguments, written=(4,))
        out = normal(context, generator, tokens, heads, 8 + rotary_dim)[..., 8:]
        yield Case(f"tokens={tokens} into a view", (*arguments, out), written=(4, 9))


# (new tokens, tokens in all) of each request; how many of them are context requests
BATCHES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "decode one": (((1, 1),), 0),
    "decode long": (((1, 403),), 0),
    "decode many": (tuple((1, 1 + 13 * i) for i in range(9)), 0),
    "decode huge": (((1, 5001), (1, 2)), 0),
    "whole prompt": (((37, 37),), 1),
    "chunk": (((21, 90),), 1),
    "mixed": (((20, 20), (33, 70), (1, 65), (1, 130)), 2),
    "long prompts": (((150, 150), (70, 200)), 2),
    "speculation": (((4, 50), (1, 17), (3, 3)), 0),
}


def paged_batch(
    requests: tuple[tuple[int, int], ...],
    num_contexts: int,
    block_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[AttentionMetadata, CacheGroupView, int]:
    """Metadata of a batch whose requests have (new tokens, tokens in all), in blocks dealt at
    random.

    Returns the metadata, the view of the one cache group, and how many blocks the cache must have.
    """
    counts = [-(-kv_len // block_size) for _, kv_len in requests]
    blocks = sum(counts) + 1
    order = torch.randperm(blocks, generator=generator).to(torch.int32)
    tables = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    positions, slots = [], []
    for row, (new, kv_len) in enumerate(requests):
        first = sum(counts[:row])
        tables[row, : counts[row]] = order[first : first + counts[row]]
        own = torch.arange(kv_len - new, kv_len)
        positions.append(own)
        slots.append(tables[row].long()[own // block_size] * block_size + own % block_size)
    new_lens, kv_lens = tuple(n for n, _ in requests), tuple(k for _, k in requests)
    cumulative = torch.tensor((0, *new_lens)).cumsum(0, dtype=torch.int32)
    view = CacheGroupView(tables.to(device), torch.cat(slots).to(device), block_size)
    metadata = AttentionMetadata(
        query_lens=new_lens,
        kv_lens=kv_lens,
        num_contexts=num_contexts,
        cu_query_lens=cumulative.to(device),
        kv_lens_device=torch.tensor(kv_lens, dtype=torch.int32).to(device),
        positions=torch.cat(positions).to(device),
        groups=(view,),
        caches={},
        max_query_len=max(new_lens),
        max_kv_len=max(kv_lens),
    )
    return metadata, view, blocks


def _paged_attention(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    heads, kv_heads, head_dim = context["num_heads"], context["num_kv_heads"], context["head_dim"]
    block_size, device = context["block_size"], context.info.device
    sinks = torch.randn(heads, generator=generator).to(device) if context["sinks"] else None
    for label, (requests, num_contexts) in BATCHES.items():
        metadata, view, blocks = paged_batch(requests, num_contexts, block_size, generator, device)
        q = normal(context, generator, sum(metadata.query_lens), heads, head_dim)
        k = normal(context, generator, blocks, block_size, kv_heads, head_dim)
        v = k[..., : context["v_head_dim"]]
        if not context.shape.get("latent"):
            v = normal(context, generator, *v.shape)
        arguments = (
            q,
            k,
            v,
            metadata,
            view,
            head_dim**-0.5,
            context["window"] or None,
            5.0 if context["softcap"] else None,
            sinks,
        )
        yield Case(label, arguments)


def _expanded_attention(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    heads, latent_dim, rotary_dim = (
        context[name] for name in ("num_heads", "latent_dim", "rotary_dim")
    )
    block_size, device = context["block_size"], context.info.device
    width = context["key_dim"] + rotary_dim
    rows = heads * (context["key_dim"] + context["v_head_dim"])
    weight = normal(context, generator, rows, latent_dim) * latent_dim**-0.5
    for label, (requests, num_contexts) in BATCHES.items():
        if not num_contexts:
            continue
        metadata, view, blocks = paged_batch(requests, num_contexts, block_size, generator, device)
        q = normal(context, generator, metadata.num_context_tokens, heads, width)
        cache = normal(context, generator, blocks, block_size, 1, latent_dim + rotary_dim)
        yield Case(label, (q, cache, weight, metadata, view, width**-0.5))


def _state_batches(
    context: OpContext, generator: torch.Generator, *shape: int, dtype: torch.dtype
) -> Iterator[tuple[str, int, torch.Tensor, AttentionMetadata]]:
    """Of each batch its label, packed tokens, recurrent state [slots, *shape] and metadata."""
    device = context.info.device
    for label, (requests, num_contexts) in BATCHES.items():
        metadata, _, _ = paged_batch(requests, num_contexts, 16, generator, device)
        count = len(requests) + 2
        slots = torch.randperm(count, generator=generator)[:-2].to(device)
        # Slots lie apart, with the state of other layers between them.
        wide = torch.randn(count, math.prod(shape) + 16, generator=generator)
        state = wide.to(device, dtype)[:, 16:].unflatten(1, shape)
        metadata = replace(metadata, state_slots=slots)
        yield label, sum(metadata.query_lens), state, metadata


def _causal_conv1d(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    channels, taps = context["channels"], context["kernel_size"]
    shape = (taps - 1, channels)
    batches = _state_batches(context, generator, *shape, dtype=context.dtype)
    for label, tokens, state, metadata in batches:
        x, weight = (normal(context, generator, n, channels) for n in (tokens, taps))
        bias = normal(context, generator, channels)
        arguments = (x, weight.t().contiguous(), bias, state, metadata, True)
        yield Case(label, arguments, written=(3,))
        yield Case(f"{label} plain", (*arguments[:2], None, state, metadata, False), written=(3,))


def _selective_scan(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    channels, width, device = context["channels"], context["state_size"], context.info.device
    a = -16 * torch.rand(channels, width, generator=generator).to(device)
    d, dt_bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
    batches = _state_batches(context, generator, channels, width, dtype=torch.float32)
    for label, tokens, state, metadata in batches:
        x, dt, z = (normal(context, generator, tokens, channels) for _ in range(3))
        b, c = (normal(context, generator, tokens, width) for _ in range(2))
        arguments = (x, dt, a, b, c, d, z, dt_bias, state, metadata)
        yield Case(label, arguments, written=(8,))


def _ssd_scan(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    heads, head_dim, device = context["num_heads"], context["head_dim"], context.info.device
    groups, width = context["num_groups"], context["state_size"]
    a = -16 * torch.rand(heads, generator=generator).to(device)
    d, dt_bias = (torch.randn(heads, generator=generator).to(device) for _ in range(2))
    batches = _state_batches(context, generator, heads, head_dim, width, dtype=torch.float32)
    for label, tokens, state, metadata in batches:
        x = normal(context, generator, tokens, heads, head_dim)
        dt = normal(context, generator, tokens, heads)
        b, c = (normal(context, generator, tokens, groups, width) for _ in range(2))
        limit = (0.05, 2.0) if label == "mixed" else (0.0, math.inf)
        arguments = (x, dt, a, b, c, d, dt_bias, limit, state, metadata)
        yield Case(label, arguments, written=(8,))


def _prepare_decode(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    device, rows, length, block_size = context.info.device, 9, 40, 8
    tokens = torch.randint(0, 1000, (rows * length,), generator=generator, dtype=torch.int32)
    blocks = torch.randint(0, 99, (rows, length // block_size + 2), generator=generator).int()
    for count in (1, 5):
        chosen = torch.randperm(rows, generator=generator)[:count]
        positions = torch.randint(0, length - 1, (count,), generator=generator)
        advance = torch.arange(count) % 2
        tensors = [x.to(device) for x in (chosen, positions, advance, tokens, blocks)]
        arguments = (*tensors[:4], tensors[4][:, :-2], length, block_size)
        yield Case(f"requests={count}", arguments, written=(1,))


def _argmax(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    vocab, device = context["vocab_size"], context.info.device
    for rows in (1, 3, 70):
        logits = normal(context, generator, rows, vocab)
        tokens = torch.zeros(2 * rows, dtype=torch.int32, device=device)
        places = torch.randperm(2 * rows, generator=generator)[:rows].to(device)
        yield Case(f"rows={rows}", (logits,))
        yield Case(f"rows={rows} stored", (logits, tokens, places), written=(1,))
    for label, value in (("NaN", float("nan")), ("inf", float("inf")), ("-inf", float("-inf"))):
        logits = normal(context, generator, 3, vocab)
        logits[1, vocab // 2] = value
        logits[2] = value
        yield Case(label, (logits,))


def _draw_tokens(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    vocab, device = context["vocab_size"], context.info.device
    for rows in (1, 24):
        logits = 4 * normal(context, generator, rows, vocab)
        logits[1::3] = logits[1::3].round()  # equal values
        kinds = torch.arange(rows, dtype=torch.float64)
        columns = (
            torch.tensor([1.5, 0.4, 8.0, 0.0])[torch.arange(rows) % 4].double(),  # float32 numbers
            torch.tensor([0, 7, 0, 10**6])[torch.arange(rows) // 2 % 4].double(),
            torch.where(kinds % 5 > 2, 0.75, 1.0),
            torch.where(kinds % 7 > 4, 3.5, math.inf),
            torch.rand(rows, generator=generator, dtype=torch.float64),
        )
        plain = torch.stack((columns[0], 0 * kinds, 0 * kinds + 1, *columns[3:]))
        best = argmax(logits)
        tokens = torch.zeros(2 * rows, dtype=torch.int32, device=device)
        places = torch.randperm(2 * rows, generator=generator)[:rows].to(device)
        cut = torch.stack(columns).to(device)
        yield Case(f"rows={rows}", (logits, best, cut, True))
        yield Case(f"rows={rows} stored", (logits, best, cut, True, tokens, places), written=(4,))
        yield Case(f"rows={rows} plain", (logits, best, plain.to(device), False))


def _penalise(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    device, vocab, width = context.info.device, 50, 40
    for count in (1, 4):
        rows = torch.randperm(6, generator=generator)[:count]
        lens = torch.randint(1, width, (count,), generator=generator)
        arguments = (
            torch.randn(6, vocab, generator=generator).to(device),
            rows.to(device),
            rows.flip(0).to(device),
            torch.randint(0, vocab, (7, width), generator=generator, dtype=torch.int32).to(device),
            lens.to(device),
            (lens // 2).to(device),
            (0.5 + torch.rand(3, count, generator=generator)).to(device),
            int(lens.max()),
        )
        yield Case(f"sequences={count}", arguments, written=(0,))


def _copy_blocks(context: OpContext, generator: torch.Generator) -> Iterator[Case]:
    for shape in ((9, 4, 2, 8), (9, 16, 1, 33)):
        cache = normal(context, generator, *shape)
        for count in (1, 4):
            blocks = torch.randperm(9, generator=generator).to(context.info.device)
            sources = blocks[count : 2 * count].clone()
            sources[-1] = sources[0]  # one may be copied to several places
            caches = (cache, cache.flip(0), cache[..., :1].clone())
            arguments = (sources, blocks[:count], *caches)
            yield Case(f"blocks={count}", arguments, written=(2, 3, 4))


_HIDDEN = shapes("hidden_size", (1,), (64,), (577,), (2048,))
_GATED = shapes("intermediate_size", (1,), (77,), (1536,))

INPUTS: dict[str, OpInputs] = {
    **PRODUCT_INPUTS,
    **NORMED_INPUTS,
    **MOE_INPUTS,
    "embedding": OpInputs(
        shapes("num_embeddings embedding_dim", (11, 33), (50, 64), (7, 2568)), _embedding
    ),
    "rms_norm": OpInputs(_HIDDEN, _rms_norm),
    "add_rms_norm": OpInputs(_HIDDEN, _add_rms_norm),
    "layer_norm": OpInputs(_HIDDEN, _layer_norm),
    "gated_rms_norm": OpInputs(
        shapes("hidden_size num_groups", (1, 1), (64, 4), (576, 2), (2048, 1)), _gated_rms_norm
    ),
    "silu_and_mul": OpInputs(_GATED, _act_and_mul),
    "gelu_and_mul": OpInputs(_GATED, _act_and_mul),
    "gelu_tanh_and_mul": OpInputs(_GATED, _act_and_mul),
    "rope_and_cache": OpInputs(
        shapes(
            "num_heads num_kv_heads head_dim rotary_dim interleaved qk_norm block_size",
            (9, 3, 64, 64, 0, 0, 16),
            (4, 4, 80, 40, 0, 1, 8),
            (3, 1, 34, 34, 1, 1, 16),
            (2, 2, 128, 64, 1, 0, 16),
            (2, 1, 33, 0, 0, 0, 4),
        ),
        _rope_and_cache,
    ),
    "latent_rope_and_cache": OpInputs(
        shapes(
            "num_heads latent_dim rotary_dim interleaved norm block_size",
            (16, 512, 64, 1, 1, 16),
            (3, 33, 6, 0, 1, 4),
            (1, 8, 16, 1, 0, 8),
        ),
        _latent_rope_and_cache,
    ),
    "paged_attention": OpInputs(
        shapes(
            "num_heads num_kv_heads head_dim v_head_dim window softcap sinks block_size latent",
            (9, 3, 64, 64, 0, 0, 0, 16, 0),
            (4, 4, 80, 80, 0, 0, 0, 8, 0),
            (7, 1, 128, 128, 24, 0, 0, 16, 0),
            (4, 2, 33, 17, 0, 1, 0, 4, 0),
            (6, 2, 40, 40, 16, 1, 1, 16, 0),
            (5, 5, 16, 16, 0, 0, 1, 32, 0),
            (4, 2, 256, 256, 40, 1, 0, 24, 0),
            (16, 1, 576, 512, 0, 0, 0, 16, 1),
            (5, 1, 27, 19, 0, 0, 0, 4, 1),
        ),
        _paged_attention,
    ),
    "expanded_attention": OpInputs(
        shapes(
            "num_heads latent_dim rotary_dim key_dim v_head_dim block_size",
            (16, 512, 64, 128, 128, 16),
            (3, 24, 8, 16, 12, 8),
        ),
        _expanded_attention,
    ),
    "causal_conv1d": OpInputs(
        shapes("channels kernel_size", (1, 2), (77, 4), (128, 3)), _causal_conv1d
    ),
    "selective_scan": OpInputs(
        shapes("channels state_size", (1, 1), (37, 16), (64, 5)), _selective_scan
    ),
    "ssd_scan": OpInputs(
        shapes(
            "num_heads head_dim num_groups state_size",
            (1, 1, 1, 1),
            (6, 16, 2, 8),
            (4, 9, 4, 16),
            (2, 64, 1, 64),
        ),
        _ssd_scan,
    ),
    "prepare_decode": OpInputs(({},), _prepare_decode),
    "argmax": OpInputs(shapes("vocab_size", (1,), (77,), (5000,)), _argmax),
    "draw_tokens": OpInputs(shapes("vocab_size", (1,), (77,), (5000,)), _draw_tokens),
    "penalise": OpInputs(({},), _penalise),
    "copy_blocks": OpInputs(({},), _copy_blocks),
}
