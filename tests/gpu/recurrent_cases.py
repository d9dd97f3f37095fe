"""Inputs for the CuPy kernels of recurrent layers: batches whose state lies in slots, and norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.attention.metadata import AttentionMetadata
from llmfw.ops.kernel import DTYPE_NAMES
from recurrent_batches import BATCHES

WIDE_BATCHES = {
    "crowd": ((1,) * 67, 0),
    "prompts": ((700, 300, 1, 64, 513, *(1,) * 40), 5),
    "long": ((4096,), 1),
}
Lengths = tuple[tuple[int, ...], int]  # of requests, and how many are context requests


def metadata_of(
    lengths: Lengths, device: torch.device, generator: torch.Generator
) -> AttentionMetadata:
    """A batch of such requests, each with a slot; two slots are nobody's."""
    lens, contexts = lengths
    ends = torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32)
    slots = torch.randperm(len(lens) + 2, generator=generator)[: len(lens)]
    return AttentionMetadata(
        query_lens=lens,
        kv_lens=lens,
        num_contexts=contexts,
        cu_query_lens=ends.to(device),
        kv_lens_device=torch.tensor(lens, dtype=torch.int32).to(device),
        positions=torch.zeros(sum(lens), dtype=torch.int64).to(device),
        groups=(),
        caches={},
        max_query_len=max(lens),
        max_kv_len=max(lens),
        state_slots=slots.to(device),
    )


def state_of(
    metadata: AttentionMetadata,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    """[slots, *shape], other layers' state between the slots."""
    size = math.prod(shape)
    wide = randn(
        metadata.num_requests + 2, 16 + -(-size // 16) * 16, device=device, dtype=dtype,
        generator=generator,
    )  # fmt: skip
    return wide[:, 16 : 16 + size].unflatten(1, shape)


def conv_arguments(
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: Mapping[str, int],
    lengths: Lengths,
) -> Arguments:
    """Rows of x are parts of wider rows, as those of a projection that gives more than x."""
    channels, taps = shape["channels"], shape["kernel_size"]
    kinds = {"device": device, "dtype": dtype, "generator": generator}
    metadata = metadata_of(lengths, device, generator)
    tokens = sum(metadata.query_lens)
    x = randn(tokens, 2 * channels + 8, **kinds)[:, 8 : 8 + channels]  # type: ignore[arg-type]
    weight = randn(channels, taps, **kinds)  # type: ignore[arg-type]
    bias = randn(channels, **kinds) if tokens % 2 else None  # type: ignore[arg-type]
    state = state_of(metadata, (taps - 1, channels), device, dtype, generator)
    return (x, weight, bias, state, metadata, tokens % 3 > 0), {}


def selective_arguments(
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: Mapping[str, int],
    lengths: Lengths,
) -> Arguments:
    """x and its gate are halves of the same rows, b and c too."""
    channels, size = shape["channels"], shape["state_size"]
    kinds = {"device": device, "dtype": dtype, "generator": generator}
    metadata = metadata_of(lengths, device, generator)
    tokens = sum(metadata.query_lens)
    x, z = randn(tokens, 2 * channels, **kinds).chunk(2, dim=-1)  # type: ignore[arg-type]
    b, c = randn(tokens, 2 * size, **kinds).chunk(2, dim=-1)  # type: ignore[arg-type]
    dt = randn(tokens, channels, **kinds)  # type: ignore[arg-type]
    a = -16 * torch.rand(channels, size, generator=generator).to(device)
    d, dt_bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
    state = state_of(metadata, (channels, size), device, torch.float32, generator)
    return (x, dt, a, b, c, d, z, dt_bias, state, metadata), {}


def ssd_arguments(
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: Mapping[str, int],
    lengths: Lengths,
) -> Arguments:
    """x, b and c are parts of the same rows; slow and fast heads."""
    heads, head_dim = shape["num_heads"], shape["head_dim"]
    groups, size = shape["num_groups"], shape["state_size"]
    kinds = {"device": device, "dtype": dtype, "generator": generator}
    metadata = metadata_of(lengths, device, generator)
    tokens = sum(metadata.query_lens)
    widths = (heads * head_dim, groups * size, groups * size)
    x, b, c = randn(tokens, sum(widths), **kinds).split(widths, dim=-1)  # type: ignore[arg-type]
    dt = randn(tokens, heads + 4, **kinds)[:, :heads]  # type: ignore[arg-type]
    a = -16 * torch.rand(heads, generator=generator).square().to(device)
    d, dt_bias = (torch.randn(heads, generator=generator).to(device) for _ in range(2))
    state = state_of(metadata, (heads, head_dim, size), device, torch.float32, generator)
    b, c = (part.unflatten(1, (groups, size)) for part in (b, c))
    limit = (0.05, 2.0) if tokens % 2 else (0.0, math.inf)
    return (
        (x.unflatten(1, (heads, head_dim)), dt, a, b, c, d, dt_bias, limit, state, metadata),
        {},
    )


OPS = {
    "causal_conv1d": (
        conv_arguments,
        3,
        ("channels", "kernel_size"),
        [(77, 4), (64, 2), (1030, 9), (5376, 4)],
    ),
    "selective_scan": (
        selective_arguments,
        8,
        ("channels", "state_size"),
        [(37, 16), (40, 4), (6, 256), (8192, 16)],
    ),
    "ssd_scan": (
        ssd_arguments,
        8,
        ("num_heads", "head_dim", "num_groups", "state_size"),
        [
            (6, 16, 2, 8),
            (4, 9, 4, 16),
            (2, 24, 1, 160),
            (4, 64, 2, 128),
            (3, 64, 1, 64),
            (80, 64, 1, 128),
        ],
    ),
}


def recurrent_cases() -> Iterator[Case]:
    """causal_conv1d, selective_scan and ssd_scan; their last shapes for a real device alone."""
    for op, (arguments, written, names, sizes) in OPS.items():
        for dtype in DTYPE_NAMES:
            for size in sizes:
                shape = dict(zip(names, size, strict=True))
                for label, lengths in {**BATCHES, **WIDE_BATCHES}.items():

                    def draw(
                        d: torch.device, t: torch.dtype, g: torch.Generator,
                        make=arguments, s=shape, n=lengths,
                    ) -> Arguments:  # fmt: skip
                        return make(d, t, g, s, n)

                    case = Case(
                        op,
                        dtype,
                        shape,
                        draw,
                        f"{label}-{'x'.join(map(str, size))}",
                        mutated=(written,),
                        wide=label in WIDE_BATCHES or size is sizes[-1],
                        # roundings of thousands of steps add up, in another order
                        tolerance=1e-4 if label == "long" and dtype == "float32" else None,
                    )
                    yield case
                    if op == "ssd_scan" and dtype == "bfloat16" and shape["head_dim"] == 64:
                        named = {"kernel": "cupy.ssd_chunks"}
                        yield replace(case, label=f"{case.label}-chunks", facts=named)


def recurrent_norm_cases() -> Iterator[Case]:
    """gated_rms_norm by groups, and add_rms_norm to a float32 stream."""
    for dtype in DTYPE_NAMES:
        for tokens, hidden, groups, wide in [
            (3, 64, 2, False),
            (5, 576, 1, False),
            (2, 4096, 1, False),
            (33, 10240, 8, True),
            (257, 5120, 1, True),
        ]:

            def gated(
                d: torch.device, t: torch.dtype, g: torch.Generator, n=tokens, h=hidden, k=groups
            ) -> Arguments:
                x = randn(n, h, device=d, dtype=t, generator=g)
                gate = randn(n, 2 * h + 16, device=d, dtype=t, generator=g)[:, 16 : 16 + h]
                return (x, gate, randn(h, device=d, dtype=t, generator=g), 1e-5, k), {}

            def add(
                d: torch.device, t: torch.dtype, g: torch.Generator, n=tokens, h=hidden
            ) -> Arguments:
                x = randn(n, h, device=d, dtype=t, generator=g)
                stream = randn(n, h, device=d, dtype=torch.float32, generator=g)
                return (x, stream, randn(h, device=d, dtype=t, generator=g), 1e-5), {}

            shape = {"hidden_size": hidden, "num_groups": groups}
            label = f"{tokens}x{hidden}/{groups}"
            yield Case("gated_rms_norm", dtype, shape, gated, label, wide=wide)
            if groups == 1:
                shape = {"hidden_size": hidden}
                yield Case("add_rms_norm", dtype, shape, add, f"{label}-stream", wide=wide)
