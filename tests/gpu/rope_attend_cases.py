"""Inputs for kernels of rope_and_attend: batches in which every request generates one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from gpu.kernel_cases import Arguments, Batch, Case, attention_arguments, randn

NAMES = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rotary_dim",
    "interleaved",
    "qk_norm",
    "window",
    "softcap",
    "sinks",
)
LAYOUTS = [
    # facts in that order, norm 2 with an offset; block size
    ((16, 8, 128, 128, 0, 1, 0, 0, 0), 16),
    ((8, 2, 128, 128, 0, 0, 0, 0, 0), 16),
    ((4, 2, 64, 64, 0, 0, 0, 0, 1), 16),
    ((2, 2, 80, 32, 0, 0, 0, 0, 0), 16),
    ((12, 2, 96, 96, 1, 1, 0, 0, 0), 32),
    ((10, 1, 64, 16, 1, 0, 0, 0, 0), 8),
    ((40, 1, 64, 64, 0, 1, 17, 0, 0), 24),
    ((20, 1, 128, 64, 0, 1, 0, 1, 1), 16),
    ((4, 1, 128, 128, 0, 2, 33, 1, 0), 16),
    ((2, 2, 64, 0, 0, 0, 0, 0, 0), 16),
    ((2, 1, 32, 0, 0, 1, 5, 0, 1), 8),
]
LENGTHS = {
    # of all tokens, the new one included: at every place of a tile, of a block and of a split
    "one": ((1,), False),
    "few": ((17, 130, 16, 5, 1), False),
    "edges": ((8, 9, 15, 24, 25, 31, 32, 33, 48, 49, 64, 65), False),
    "split": ((700,), False),
    "halves": ((513, 449), False),
    "long": ((3000, 1, 777, 4096, 64, 4097), True),
    "crowd": (tuple(1 + 37 * i % 900 for i in range(70)), True),
}


def rope_attend_cases() -> Iterator[Case]:
    """rope_and_attend: all that can be asked of it, the newest key at every place."""
    for dtype in ("bfloat16", "float16"):
        for facts, block_size in LAYOUTS:
            shape = dict(zip(NAMES, facts, strict=True)) | {"block_size": block_size}
            shape["v_head_dim"] = shape["head_dim"]
            offset, shape["qk_norm"] = float(shape["qk_norm"] == 2), int(shape["qk_norm"] > 0)
            heads, kv_heads, dim, rotary, turned, norm, window, softcap, sinks = facts
            extras = "i" * turned + "n" * norm + f"w{window}" * bool(window)
            extras += "c" * softcap + "s" * sinks
            for name, (lengths, wide) in LENGTHS.items():

                def draw(
                    d: torch.device,
                    t: torch.dtype,
                    g: torch.Generator,
                    s=shape,
                    n=lengths,
                    o=offset,
                ) -> Arguments:
                    return rope_attend_arguments(d, t, g, s, n, o)

                label = f"{name}-{heads}/{kv_heads}x{dim}r{rotary}b{block_size}{extras}"
                yield Case("rope_and_attend", dtype, shape, draw, label, mutated=(3, 4), wide=wide)


def rope_attend_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    lengths: tuple[int, ...],
    offset: float = 0.0,
) -> Arguments:
    """Arguments of rope_and_attend; slots that nobody wrote yet hold NaN, which must not show."""
    heads, kv_heads, dim, rotary = (
        shape[n] for n in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")
    )
    batch = Batch(tuple((1, length) for length in lengths))
    (_, k, v, metadata, view, scale), more = attention_arguments(device, dtype, g, shape, batch)
    last = metadata.kv_lens_device.long() - 1
    size = view.block_size
    blocks = view.block_tables.gather(1, (last // size)[:, None]).long()[:, 0]
    view = replace(view, slots=blocks * size + last % size)
    for cache in (k, v):
        cache.view(-1, kv_heads, dim)[view.slots] = float("nan")
    angles = torch.rand(max(lengths) + 7, max(rotary, 2) // 2, generator=g) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device) if rotary else None
    norms = [
        randn(dim, device=device, dtype=dtype, generator=g) if shape["qk_norm"] else None
        for _ in range(2)
    ]
    width = (heads + 2 * kv_heads) * dim
    qkv = randn(len(lengths), width, device=device, dtype=dtype, generator=g)
    rotation = (bool(shape["interleaved"]), *norms, 1e-6, offset)
    return (qkv, last + 3, cos_sin, k, v, metadata, view, scale, *rotation), more
