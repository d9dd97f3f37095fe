"""Cases of latent attention: rotation and cache write, heads' products, both ways to attend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from gpu.kernel_cases import (
    BATCHES,
    Arguments,
    Batch,
    Case,
    also_by,
    attention_arguments,
    randn,
    relative_error,
)
from llmfw.kernels.cupy.attention import parts_of
from llmfw.kernels.cupy.latent_tiles import Cut, LatentTiles
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.ops.reference import REFERENCES


def latent_rope_cases() -> Iterator[Case]:
    """latent_rope_and_cache: both layouts of pairs, odd widths, no norm, no rotation."""
    layouts = [  # heads, latent, rotated, interleaved, norm, rotation
        (16, 512, 64, 1, 1, 1),
        (3, 48, 16, 0, 1, 1),
        (5, 27, 6, 1, 1, 1),
        (4, 640, 32, 1, 0, 1),
        (2, 64, 16, 0, 1, 0),
    ]
    for dtype in DTYPE_NAMES:
        for heads, latent, rotary, interleaved, norm, turns in layouts:
            for tokens, wide in [(1, False), (5, False), (131, True)]:
                shape = {
                    "num_heads": heads,
                    "latent_dim": latent,
                    "rotary_dim": rotary,
                    "interleaved": interleaved,
                    "norm": norm,
                    "block_size": 16,
                }

                def draw(
                    d: torch.device,
                    t: torch.dtype,
                    g: torch.Generator,
                    s=shape,
                    n=tokens,
                    rotated=turns,
                ) -> Arguments:
                    return latent_rope_arguments(d, t, g, s, n, bool(rotated))

                label = f"{tokens}t-{heads}x{latent}r{rotary}" + "i" * interleaved + "n" * norm
                label += "" if turns else "-still"
                yield Case(
                    "latent_rope_and_cache", dtype, shape, draw, label, mutated=(4,), wide=wide
                )


def latent_rope_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    tokens: int,
    rotated: bool,
) -> Arguments:
    """Queries as a view of a wider projection, a cache full of old values, a negative slot."""
    heads, latent, rotary = (shape[n] for n in ("num_heads", "latent_dim", "rotary_dim"))
    blocks = tokens // 16 + 3
    slots = torch.randperm(blocks * 16, generator=g)[:tokens].to(device)
    if tokens > 3:
        slots[2] = -1
    angles = torch.rand(100, rotary // 2, generator=g) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device) if rotated else None
    norm = randn(latent, device=device, dtype=dtype, generator=g) if shape["norm"] else None
    q = randn(tokens, heads, 24 + rotary, device=device, dtype=dtype, generator=g)
    return (
        q[..., 24:],
        randn(tokens, latent + rotary, device=device, dtype=dtype, generator=g),
        torch.randint(0, 100, (tokens,), generator=g).to(device),
        cos_sin,
        randn(blocks, 16, 1, latent + rotary, device=device, dtype=dtype, generator=g),
        slots,
        bool(shape["interleaved"]),
        norm,
        1e-6,
        *([torch.zeros_like(q)[..., 24:]] if tokens > 1 else []),
    ), {}


def head_linear_cases() -> Iterator[Case]:
    """head_linear: one and more warps a sum, tokens of several tiles, inputs as views."""
    sizes = [(16, 128, 512, False), (2, 512, 128, False), (3, 64, 48, False), (2, 96, 16, False)]
    for dtype in ("bfloat16", "float16"):
        for heads, width, outs, wide in sizes:
            for tokens in (1, 9, 41, 65):

                def draw(
                    d: torch.device,
                    t: torch.dtype,
                    g: torch.Generator,
                    n=tokens,
                    h=heads,
                    i=width,
                    o=outs,
                ) -> Arguments:
                    x = randn(n, h, i + 8, device=d, dtype=t, generator=g)[..., :i]
                    scale = i**-0.5
                    rows = randn(h, o + 8, i, device=d, dtype=t, generator=g, scale=scale)
                    out = torch.zeros(n, h, o + 16, device=d, dtype=t)[..., 16:]
                    return (x, rows[:, 8:], *([out] if n > 1 else [])), {}

                shape = {"num_heads": heads, "in_features": width, "out_features": outs}
                label = f"{tokens}t-{heads}x{width}-{outs}"
                yield Case("head_linear", dtype, shape, draw, label, wide=wide)


LATENT_LAYOUTS = [
    # heads, latent, rotated, block size
    (16, 512, 64, 16),
    (4, 128, 32, 16),
    (3, 48, 16, 24),
    (40, 64, 16, 8),
    (4, 128, 64, 24),
    (40, 128, 64, 32),
    (128, 128, 64, 64),
]


def latent_attention_cases() -> Iterator[Case]:
    """paged_attention over a latent cache: sizes, rows of one tile and of several, batches."""
    for dtype in DTYPE_NAMES:
        for heads, latent, rotary, block_size in LATENT_LAYOUTS:
            for name, batch, wide in BATCHES:
                shape = {
                    "num_heads": heads,
                    "num_kv_heads": 1,
                    "head_dim": latent + rotary,
                    "v_head_dim": latent,
                    "window": 0,
                    "softcap": 0,
                    "sinks": 0,
                    "block_size": block_size,
                    "latent": 1,
                }

                def draw(
                    d: torch.device, t: torch.dtype, g: torch.Generator, s=shape, b=batch
                ) -> Arguments:
                    return attention_arguments(d, t, g, s, b)

                label = f"{name}-latent{heads}x{latent}+{rotary}b{block_size}"
                case = Case("paged_attention", dtype, shape, draw, label, wide=wide)
                yield from also_by("cupy.latent_tiles", case, "tiles")


CUTS = [Cut(rows, cluster) for rows in (16, 32, 64) for cluster in (1, 2, 3)]
UNEVEN = Batch(((2, 900), (1, 100), (3, 67), (1, 1)))


def check_cut(attend: LatentTiles, case: Case, cut: Cut, groups: int, device: torch.device) -> None:
    """One way to divide requests of one and several tokens: near the reference, twice the same."""
    generator = torch.Generator().manual_seed(5)
    args, _ = attention_arguments(device, torch.bfloat16, generator, case.shape, UNEVEN)
    q, cache, _, metadata, view, scale = args
    expected = REFERENCES["paged_attention"](*args)
    (part,) = parts_of(metadata)
    lengths = view.block_tables, metadata.cu_query_lens, metadata.kv_lens_device
    outs = [torch.full_like(expected, float("nan")) for _ in range(2)]
    for out in outs:
        attend(out, q, cache, *lengths, part, scale, cut=cut, groups=groups)
    assert relative_error(outs[0], expected) <= 8e-3
    assert torch.equal(*outs)


EXPANDED_LAYOUTS = [
    # heads, latent, rotated, key, value, block size
    (16, 512, 64, 128, 128, 16),
    (3, 64, 16, 48, 32, 24),
]


def expanded_attention_cases() -> Iterator[Case]:
    """expanded_attention of the batches that have context requests."""
    for dtype in ("bfloat16", "float16"):
        for heads, latent, rotary, key_dim, v_dim, block_size in EXPANDED_LAYOUTS:
            for name, batch, wide in BATCHES:
                if not batch.contexts:
                    continue
                shape = {
                    "num_heads": heads,
                    "latent_dim": latent,
                    "rotary_dim": rotary,
                    "key_dim": key_dim,
                    "v_head_dim": v_dim,
                    "block_size": block_size,
                }

                def draw(
                    d: torch.device, t: torch.dtype, g: torch.Generator, s=shape, b=batch
                ) -> Arguments:
                    return expanded_arguments(d, t, g, s, b)

                label = f"{name}-{heads}x{latent}+{rotary}b{block_size}"
                yield Case("expanded_attention", dtype, shape, draw, label, wide=wide)


def expanded_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    batch: Batch,
) -> Arguments:
    """Arguments of expanded_attention: the cache as in attention_arguments."""
    latent, key_dim = shape["latent_dim"], shape["key_dim"]
    cached = {"num_kv_heads": 1, "head_dim": latent + shape["rotary_dim"], "v_head_dim": latent}
    whole = {**shape, **cached, "sinks": 0, "window": 0, "softcap": 0, "latent": 1}
    (_, cache, _, metadata, view, _), _ = attention_arguments(device, dtype, g, whole, batch)
    width = key_dim + shape["rotary_dim"]
    rows = shape["num_heads"] * (key_dim + shape["v_head_dim"])
    tokens = metadata.num_context_tokens
    q = randn(tokens, shape["num_heads"], width, device=device, dtype=dtype, generator=g)
    weight = randn(rows, latent, device=device, dtype=dtype, generator=g, scale=latent**-0.5)
    return (q, cache, weight, metadata, view, width**-0.5), {}


def latent_cases() -> list[Case]:
    """Every case of latent attention's ops."""
    return [
        *latent_rope_cases(),
        *head_linear_cases(),
        *latent_attention_cases(),
        *expanded_attention_cases(),
    ]
