"""The torch reference of every op: the meaning that all kernels are checked against.

Shapes: T packed tokens, Hq query heads, Hkv key/value heads, D head size.
All references accept float32, bfloat16 and float16 and compute where it matters in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmfw.ops.reference_draw import draw_tokens, penalise
from llmfw.ops.reference_moe import grouped_linear, moe_experts, moe_route
from llmfw.ops.reference_normed import add_linear, normed_gated_linear, normed_linear
from llmfw.ops.reference_state import causal_conv1d, gated_rms_norm, selective_scan, ssd_scan
from llmfw.ops.reference_step import argmax, copy_blocks, prepare_decode

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata, CacheGroupView


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in] @ weight [out, in]^T + bias [out] -> [T, out]."""
    return F.linear(x, weight, bias)


def float32_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """linear in float32 for x [T, in] of another dtype; weight and bias are float32 already."""
    return F.linear(x.float(), weight, bias)


def head_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each head's rows times its own weight: x [T, H, in], weight [H, out, in] -> [T, H, out].

    out: where the result is written, of any strides; a fresh tensor when left out.
    """
    product = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return product if out is None else out.copy_(product)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu_and_mul(linear(x, weight, bias)): weight [2I, in] and bias [2I] are gate, then up."""
    return silu_and_mul(linear(x, weight, bias))


def embedding(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    first: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Rows of weight [rows, hidden] at input_ids [T], times scale -> [T, hidden].

    first: where the table is one of several parts of a vocabulary, the id of its first row; ids of
    other parts give zeros, so that the parts' results add up to those of the whole. With None the
    table is whole, and every id has to be one of its rows; kernels read none beside it. The product
    with scale is rounded once.
    """
    if first is None:
        rows = F.embedding(input_ids, weight)
    else:
        own = input_ids - first
        others = (own < 0) | (own >= weight.shape[0])
        rows = F.embedding(own.masked_fill(others, 0), weight)
        rows = rows.masked_fill(others[..., None], 0)
    return rows if scale is None else rows * scale


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension (arXiv:1910.07467).

    Computed in float32. With offset 0 the normalised value is rounded to x's dtype before the
    product with weight; with an offset the product is in float32.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). Kernels may write both results into their inputs.

    The residual may be float32 beside another x: then the sum is, and its norm has x's dtype.
    """
    total = x + residual
    return rms_norm(total.to(x.dtype), weight, eps, offset), total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Layer normalisation over the last dimension (arXiv:1607.06450)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2I] = gate | up -> silu(gate) * up [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2I] = gate | up -> gelu(gate) * up [T, I], gelu by erf."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2I] = gate | up -> gelu(gate) * up [T, I], gelu by tanh."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the first 2 * cos.shape[-1] features of x [T, H, D]; cos, sin [T, R/2] in float32.

    Half layout (GPT-NeoX): feature i pairs with i + R/2. Interleaved (GPT-J): 2i pairs with 2i + 1.
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> torch.Tensor:
    """Split packed qkv, normalise and rotate q and k, write K and V to the paged cache, return q.

    qkv: [T, (Hq + 2 Hkv) * D]. positions: int64 [T]. cos_sin: float32 [max_positions, R], cosines
        then
    sines (R/2 each), or None for no rotation. k_cache, v_cache: [blocks, block_size, Hkv, D].
    slots: int64 [T]; a negative slot writes nothing. q_norm, k_norm: RMS norm weights [D] or None.
    Returns q [T, Hq, D].
    """
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    q, k, v = qkv.split(widths, dim=-1)
    q = q.unflatten(-1, (num_heads, head_dim))  # [tokens, heads, head_dim]
    k = k.unflatten(-1, (num_kv_heads, head_dim))
    v = v.unflatten(-1, (num_kv_heads, head_dim))
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, norm_offset)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, norm_offset)
    if cos_sin is not None:
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        q = apply_rope(q, cos, sin, interleaved)
        k = apply_rope(k, cos, sin, interleaved)
    write_cache(k, v, k_cache, v_cache, slots)
    return q  # type: ignore[no-any-return]


def latent_rope_and_cache(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise the latent, rotate q and the shared key, write latent and key to a latent cache.

    q: [T, Hq, R], those features of the queries that are rotated. kv: [T, L + R], the latent, then
    the key that all heads share. positions, cos_sin, slots: as in `rope_and_cache`. cache:
    [blocks, block_size, 1, L + R]. norm: RMS norm weight [L] or None. out: where q is written, of
    any strides; a tensor of its own when left out. Returns q [T, Hq, R].
    """
    rotary_dim = q.shape[-1]
    latent, key = kv[:, None].split([kv.shape[-1] - rotary_dim, rotary_dim], dim=-1)
    if norm is not None:
        latent = rms_norm(latent, norm, eps)
    if cos_sin is not None:
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        q = apply_rope(q, cos, sin, interleaved)
        key = apply_rope(key, cos, sin, interleaved)
    write_rows(torch.cat((latent, key), dim=-1), cache, slots)
    return q if out is None else out.copy_(q)


def write_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write k, v [T, Hkv, D] to their slots of the paged cache; a negative slot writes nothing."""
    write_rows(k, k_cache, slots)
    write_rows(v, v_cache, slots)


def write_rows(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows [T, H, D] to their slots of cache [blocks, block_size, H, D], none if negative."""
    if bool((slots < 0).any()):
        kept = slots >= 0
        rows, slots = rows[kept], slots[kept]
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    view: CacheGroupView,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over the paged cache, request by request.

    v_cache may be a view of k_cache (a latent cache's first Dv features).
    q: [T, Hq, D]; query t of a request with n new tokens and kv_len keys stands at kv_len - n + t
        and sees
    the keys up to its own position, with a window only the last `window` of them. softcap: scores
        become
    softcap * tanh(scores / softcap). sinks: float [Hq], one extra logit a head that takes
    probability and gives nothing. Softmax in float32. Returns [T, Hq * Dv].
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    v_dim = v_cache.shape[-1]
    heads = q.shape[1]
    out = q.new_empty(q.shape[0], heads, v_dim)
    start = 0
    for request, (query_len, kv_len) in enumerate(
        zip(metadata.query_lens, metadata.kv_lens, strict=True)
    ):
        blocks = view.block_tables[request, : -(-kv_len // block_size)].long()
        keys = (
            k_cache[blocks].reshape(-1, kv_heads, head_dim)[:kv_len].transpose(0, 1)
        )  # [kv_heads, keys, D]
        values = v_cache[blocks].reshape(-1, kv_heads, v_dim)[:kv_len].transpose(0, 1)
        queries = q[start : start + query_len].transpose(0, 1)  # [heads, queries, D]
        out[start : start + query_len] = _attend(
            queries, keys, values, kv_len - query_len, scale, window, softcap, sinks
        ).transpose(0, 1)
        start += query_len
    return out.flatten(1)


def expanded_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    weight: torch.Tensor,
    metadata: AttentionMetadata,
    view: CacheGroupView,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the batch's context requests with keys and values made of their latents.

    The other way to attend over a latent cache is `paged_attention` of queries that were brought
    into the latent's space. Here keys and values of all heads are made anew for every key: that
    multiplies less where there are many queries. q: [Tc, Hq, N + R], rotated, of the context
    requests' tokens. cache: [blocks, block_size, 1, L + R]. weight: [Hq * (N + V), L]: each head's
    rows for the key, then for the value. Returns [Tc, Hq * V].
    """
    heads, latent_dim, block_size = q.shape[1], weight.shape[1], cache.shape[1]
    rotary_dim = cache.shape[-1] - latent_dim
    key_dim = q.shape[-1] - rotary_dim
    outs, start = [], 0
    for request in range(metadata.num_contexts):
        query_len, kv_len = metadata.query_lens[request], metadata.kv_lens[request]
        blocks = view.block_tables[request, : -(-kv_len // block_size)].long()
        rows = cache[blocks].reshape(-1, cache.shape[-1])[:kv_len]
        latent, shared = rows.split([latent_dim, rotary_dim], dim=-1)
        made = F.linear(latent, weight).unflatten(-1, (heads, -1))  # [keys, heads, N + V]
        k = torch.cat((made[..., :key_dim], shared[:, None].expand(-1, heads, -1)), dim=-1)
        queries = q[start : start + query_len].transpose(0, 1)
        parts = queries, k.transpose(0, 1), made[..., key_dim:].transpose(0, 1)
        outs.append(_attend(*parts, kv_len - query_len, scale, None, None, None).transpose(0, 1))
        start += query_len
    return torch.cat(outs).flatten(1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads, queries, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    mask = None
    if queries > 1 or window is not None:
        q_pos = torch.arange(past, past + queries, device=q.device)[:, None]
        k_pos = torch.arange(keys, device=q.device)[None, :]
        mask = k_pos <= q_pos
        if window is not None:
            mask &= q_pos - k_pos < window
    if softcap is None and sinks is None and mask is None:
        # one query: the heads that share keys are to them as so many queries
        grouped = q.reshape(kv_heads, heads // kv_heads * queries, head_dim)
        attended = F.scaled_dot_product_attention(grouped[None], k[None], v[None], scale=scale)
        return attended.reshape(heads, queries, v.shape[-1])
    if softcap is None and sinks is None:
        whole = past == 0 and queries > 1 and (window is None or window >= keys)
        return F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if whole else mask,
            is_causal=whole,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )[0]
    k = k.repeat_interleave(heads // kv_heads, dim=0)
    v = v.repeat_interleave(heads // kv_heads, dim=0)
    scores = (q.float() @ k.float().transpose(1, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, queries, 1)), dim=-1)
    probs = scores.softmax(-1)[..., :keys]
    return (probs @ v.float()).to(q.dtype)


REFERENCES: dict[str, Callable[..., object]] = {
    "linear": linear,
    "float32_linear": float32_linear,
    "grouped_linear": grouped_linear,
    "head_linear": head_linear,
    "gated_linear": gated_linear,
    "add_linear": add_linear,
    "normed_linear": normed_linear,
    "normed_gated_linear": normed_gated_linear,
    "embedding": embedding,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "gated_rms_norm": gated_rms_norm,
    "silu_and_mul": silu_and_mul,
    "gelu_and_mul": gelu_and_mul,
    "gelu_tanh_and_mul": gelu_tanh_and_mul,
    "rope_and_cache": rope_and_cache,
    "latent_rope_and_cache": latent_rope_and_cache,
    "paged_attention": paged_attention,
    "expanded_attention": expanded_attention,
    "moe_route": moe_route,
    "moe_experts": moe_experts,
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "ssd_scan": ssd_scan,
    "prepare_decode": prepare_decode,
    "argmax": argmax,
    "draw_tokens": draw_tokens,
    "penalise": penalise,
    "copy_blocks": copy_blocks,
}
