"""What a call of an op has to do at least, and calls worth timing: declared once for each op.

Where an op declares nothing, its cost is reading every tensor that it is given and writing every
one that it gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmfw.ops import costs_state
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference import silu_and_mul

Arguments = Sequence[Any]
MOST_REQUESTS = 64  # a timed batch of up to so many tokens has one of each request


@dataclass(frozen=True)
class Cost:
    """Bytes moved between memory and chip, and operations (a multiplication and an addition: 2)."""

    nbytes: float
    operations: float = 0.0


CostOf = Callable[[OpContext, Arguments, Sequence[torch.Tensor]], Cost]


@dataclass(frozen=True)
class OpBench:
    """How an op is timed.

    Args:
        shapes: Static shapes worth timing where no model names them.
        arguments: Draws one call of (context, tokens, tokens in the cache).
        cost: Of a call, from (context, arguments, results).
    """

    shapes: tuple[Mapping[str, int], ...]
    arguments: Callable[[OpContext, int, int], Arguments]
    cost: CostOf


def moved(context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]) -> Cost:
    """Every tensor given is read, every result written; no operations worth counting."""
    given = (each for each in arguments if isinstance(each, torch.Tensor))
    return Cost(sum(each.nbytes for each in given) + sum(each.nbytes for each in results))


def _product_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    x, weight = arguments[0], arguments[1]
    rows = x.numel() // x.shape[-1]
    return Cost(moved(context, arguments, results).nbytes, 2.0 * rows * weight.numel())


def _grouped_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    """Only groups that have rows read their weights."""
    x, weight, ends = arguments[:3]
    counts = torch.diff(ends.cpu(), prepend=torch.zeros(1, dtype=ends.dtype))
    used = int((counts > 0).sum())
    nbytes = x.nbytes + used * weight[0].nbytes + sum(each.nbytes for each in results)
    return Cost(nbytes, 2.0 * x.shape[0] * weight[0].numel())


def _experts_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    """Only experts that a token goes through are read."""
    x, _, experts, *weights = arguments[:7]
    used = experts.unique().numel()
    each = sum(weight[0].nbytes for weight in weights if weight is not None)
    values = 3 * context["hidden_size"] * context["intermediate_size"]
    return Cost(2 * x.nbytes + used * each, 2.0 * experts.numel() * values)


def _embedding_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    return Cost(arguments[0].nbytes + 2 * sum(each.nbytes for each in results))


def _rope_cost(context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]) -> Cost:
    """qkv is read once; q is written, and K and V into the cache."""
    return Cost(2 * arguments[0].nbytes + arguments[5].nbytes)


def _attention_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    """Each request's keys and values are read once, within the window; causal pairs are counted."""
    q, k, _, metadata = arguments[:4]
    head_dim, v_head_dim, window = context["head_dim"], context["v_head_dim"], context["window"]
    width = head_dim if context.shape.get("latent") else head_dim + v_head_dim
    keys = pairs = 0
    for new, total in zip(metadata.query_lens, metadata.kv_lens, strict=True):
        seen = [min(total - new + i + 1, window or total) for i in range(new)]
        pairs += sum(seen)
        keys += min(total, (window or total) + new - 1)
    nbytes = keys * context["num_kv_heads"] * width * k.itemsize
    operations = 2.0 * pairs * context["num_heads"] * (head_dim + v_head_dim)
    return Cost(nbytes + q.nbytes + sum(each.nbytes for each in results), operations)


def _state_cost(context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]) -> Cost:
    """The state is read and written."""
    return Cost(costs_state.state_bytes(context.op, arguments, results))


def _normal(context: OpContext, *size: int) -> torch.Tensor:
    return torch.randn(size, device=context.info.device).to(context.dtype)


def _linear(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    outs = context.shape.get("out_features") or 2 * context["intermediate_size"]
    width = context["in_features"]
    bias = _normal(context, outs) if context["bias"] else None
    return _normal(context, tokens, width), _normal(context, outs, width), bias


def _float32_linear(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    x, weight, bias = _linear(context, tokens, kv_len)
    return x, weight.float(), None if bias is None else bias.float()


def _grouped_linear(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    groups = context["num_groups"]
    chosen = torch.arange(tokens) * 7 % groups
    ends = torch.bincount(chosen, minlength=groups).cumsum(0).to(torch.int32)
    weight = _normal(context, groups, context["out_features"], context["in_features"])
    return _normal(context, tokens, context["in_features"]), weight, ends.to(weight.device)


def _moe_experts(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    """Each token goes through 8 experts, the next token through the next."""
    count, bias = context["num_experts"], context["bias"]
    hidden, inner = context["hidden_size"], context["intermediate_size"]
    top_k, device = min(8, count), context.info.device
    first = torch.arange(tokens, device=device)[:, None] * 7
    return (
        _normal(context, tokens, hidden),
        torch.full((tokens, top_k), 1 / top_k, device=device),
        (first + torch.arange(top_k, device=device)) % count,
        _normal(context, count, 2 * inner, hidden),
        _normal(context, count, hidden, inner),
        _normal(context, count, 2 * inner) if bias else None,
        _normal(context, count, hidden) if bias else None,
        silu_and_mul,
    )


def _rms_norm(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    hidden = context["hidden_size"]
    return _normal(context, tokens, hidden), _normal(context, hidden), 1e-5


def _add_rms_norm(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    x, weight, eps = _rms_norm(context, tokens, kv_len)
    return x, torch.zeros_like(x), weight, eps


def _add_rms_cost(
    context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]
) -> Cost:
    return Cost(4 * arguments[0].nbytes + arguments[2].nbytes)


def _layer_norm(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    hidden = context["hidden_size"]
    weight, bias = _normal(context, hidden), _normal(context, hidden)
    return _normal(context, tokens, hidden), weight, bias, 1e-5


def _act_and_mul(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    return (_normal(context, tokens, 2 * context["intermediate_size"]),)


def _embedding(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    rows = context["num_embeddings"]
    ids = (torch.arange(tokens) * 7919 % rows).to(context.info.device)
    return ids, _normal(context, rows, context["embedding_dim"])


def _argmax(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    return (_normal(context, tokens, context["vocab_size"]),)


def _draw_tokens(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    logits = 2.5 * _argmax(context, tokens, kv_len)[0]
    one = torch.ones(tokens, dtype=torch.float64, device=logits.device)
    columns = (1.25 * one, 0 * one, 0.9 * one, torch.inf * one, 0.5 * one)  # top_p
    return logits, logits.argmax(-1), torch.stack(columns), True


def _copy_blocks(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    """`tokens` blocks in each of four caches, half of whose blocks are copied to the other half."""
    order = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(0))
    blocks = order.to(context.info.device)
    caches = [_normal(context, 2 * tokens, 16, 8, 128) for _ in range(4)]
    return blocks[:tokens], blocks[tokens:], *caches


def _copy_cost(context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]) -> Cost:
    """The half of each cache that is copied is read, the other written."""
    return moved(context, arguments, ())


def _draw_cost(context: OpContext, arguments: Arguments, results: Sequence[torch.Tensor]) -> Cost:
    """The logits are read to draw, and before that to find the cut where there is one."""
    return Cost((2 if arguments[3] else 1) * arguments[0].nbytes)


def _batch(context: OpContext, tokens: int, kv_len: int) -> tuple[Any, Any, int]:
    """Generation requests of one token each, or one prompt where there are many tokens."""
    one_each = tokens <= MOST_REQUESTS
    requests = ((1, kv_len),) * tokens if one_each else ((tokens, tokens),)
    generator = torch.Generator().manual_seed(0)
    device = context.info.device
    return paged_batch(requests, int(not one_each), context["block_size"], generator, device)


def _paged_attention(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    metadata, view, blocks = _batch(context, tokens, kv_len)
    block_size, kv_heads = context["block_size"], context["num_kv_heads"]
    head_dim, device = context["head_dim"], context.info.device
    k = _normal(context, blocks, block_size, kv_heads, head_dim)
    v = k[..., : context["v_head_dim"]]
    return (
        _normal(context, tokens, context["num_heads"], head_dim),
        k,
        v if context.shape.get("latent") else _normal(context, *v.shape),
        metadata,
        view,
        head_dim**-0.5,
        context["window"] or None,
        50.0 if context["softcap"] else None,
        torch.zeros(context["num_heads"], device=device) if context["sinks"] else None,
    )


def _rope_and_cache(context: OpContext, tokens: int, kv_len: int) -> Arguments:
    metadata, view, blocks = _batch(context, tokens, kv_len)
    heads, kv_heads, head_dim = context["num_heads"], context["num_kv_heads"], context["head_dim"]
    longest = max(metadata.kv_lens)
    table = torch.ones(longest, context["rotary_dim"], device=context.info.device)
    norm = _normal(context, head_dim) if context["qk_norm"] else None
    cache = _normal(context, blocks, context["block_size"], kv_heads, head_dim)
    return (
        _normal(context, tokens, (heads + 2 * kv_heads) * head_dim),
        metadata.positions,
        table if context["rotary_dim"] else None,
        cache,
        torch.zeros_like(cache),
        view.slots,
        heads,
        kv_heads,
        head_dim,
        bool(context["interleaved"]),
        norm,
        norm,
        1e-5,
        0.0,
    )


def _shapes(names: str, *rows: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


_WIDTHS = ((1024, 3072), (4096, 14336))  # of models with 0.6 and 8 billion parameters
_HIDDEN = _shapes("hidden_size", *((hidden,) for hidden, _ in _WIDTHS))
_GATED = _shapes("intermediate_size", *((inner,) for _, inner in _WIDTHS))
_HEADS = "num_heads num_kv_heads head_dim"

BENCHES: dict[str, OpBench] = {
    "linear": OpBench(
        _shapes("in_features out_features bias", (1024, 4096, 0), (3072, 1024, 0), (4096, 6144, 0)),
        _linear,
        _product_cost,
    ),
    "gated_linear": OpBench(
        _shapes("in_features intermediate_size bias", *((*widths, 0) for widths in _WIDTHS)),
        _linear,
        _product_cost,
    ),
    "float32_linear": OpBench(
        _shapes("in_features out_features bias", (2048, 64, 0)), _float32_linear, _product_cost
    ),
    "grouped_linear": OpBench(
        _shapes("num_groups in_features out_features", (64, 1024, 512)),
        _grouped_linear,
        _grouped_cost,
    ),
    "moe_experts": OpBench(
        _shapes("num_experts hidden_size intermediate_size bias", (64, 1024, 512, 0)),
        _moe_experts,
        _experts_cost,
    ),
    "rms_norm": OpBench(_HIDDEN, _rms_norm, moved),
    "add_rms_norm": OpBench(_HIDDEN, _add_rms_norm, _add_rms_cost),
    "layer_norm": OpBench(_HIDDEN, _layer_norm, moved),
    "silu_and_mul": OpBench(_GATED, _act_and_mul, moved),
    "gelu_and_mul": OpBench(_GATED, _act_and_mul, moved),
    "gelu_tanh_and_mul": OpBench(_GATED, _act_and_mul, moved),
    "gated_rms_norm": OpBench(
        _shapes("hidden_size num_groups", (5120, 1), (8192, 8)), costs_state.gated_rms_norm, moved
    ),
    "causal_conv1d": OpBench(
        _shapes("channels kernel_size", (5376, 4), (8192, 4)),
        costs_state.causal_conv1d,
        _state_cost,
    ),
    "selective_scan": OpBench(
        _shapes("channels state_size", (8192, 16)), costs_state.selective_scan, _state_cost
    ),
    "ssd_scan": OpBench(
        _shapes("num_heads head_dim num_groups state_size", (80, 64, 1, 128), (128, 64, 8, 128)),
        costs_state.ssd_scan,
        _state_cost,
    ),
    "embedding": OpBench(
        _shapes("num_embeddings embedding_dim", (32_000, 1024)), _embedding, _embedding_cost
    ),
    "argmax": OpBench(_shapes("vocab_size", (32_000,), (128_256,)), _argmax, moved),
    "draw_tokens": OpBench(_shapes("vocab_size", (32_000,), (128_256,)), _draw_tokens, _draw_cost),
    "copy_blocks": OpBench(({},), _copy_blocks, _copy_cost),
    "rope_and_cache": OpBench(
        _shapes(
            f"{_HEADS} rotary_dim interleaved qk_norm block_size",
            (16, 8, 128, 128, 0, 1, 16),
            (32, 8, 128, 128, 0, 0, 16),
        ),
        _rope_and_cache,
        _rope_cost,
    ),
    "paged_attention": OpBench(
        _shapes(
            f"{_HEADS} v_head_dim window softcap sinks block_size latent",
            (16, 8, 128, 128, 0, 0, 0, 16, 0),
            (32, 8, 128, 128, 0, 0, 0, 16, 0),
            (16, 1, 576, 512, 0, 0, 0, 16, 1),
        ),
        _paged_attention,
        _attention_cost,
    ),
}
