"""Inputs for the kernels around the model in a decode step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.ops.kernel import DTYPE_NAMES


def embedding_cases() -> Iterator[Case]:
    """embedding: a whole table, a part of one, each with a factor and without."""
    sizes = [(1, 7, 64, False), (5, 9, 72, False), (3, 6, 2568, False), (2, 40, 1024, False)]
    sizes += [(1, 999, 4096, True), (300, 5000, 5376, True), (8200, 5000, 4096, True)]
    for dtype in DTYPE_NAMES:
        for tokens, rows, width, wide in sizes:
            for first, scale in [(None, None), (None, 33.5), (rows, None), (3 * rows, 0.3)]:

                def draw(
                    d: torch.device,
                    t: torch.dtype,
                    g: torch.Generator,
                    n=tokens,
                    r=rows,
                    w=width,
                    f=first,
                    s=scale,
                ) -> Arguments:
                    bounds = (0, r) if f is None else (-1, 5 * r)
                    ids = torch.randint(*bounds, (n,), generator=g)
                    if f is not None:  # the part's borders
                        borders = torch.tensor([f, f - 1, f + r - 1, f + r, 1 << 40])
                        ids[: len(borders)] = borders[:n]
                    table = randn(r, w, device=d, dtype=t, generator=g)
                    return (ids.to(d), table, f, s), {}

                label = f"{tokens}x{width}" + "p" * bool(first) + "s" * bool(scale)
                shape = {"num_embeddings": rows, "embedding_dim": width}
                facts = {"rows": tokens}
                yield Case("embedding", dtype, shape, draw, label, wide=wide, facts=facts)


def step_cases() -> Iterator[Case]:
    """prepare_decode and argmax, with logits that are not finite, stored and not."""
    for count, width, wide in [(1, 5, False), (7, 40, False), (250, 300, True)]:

        def prepare(
            d: torch.device, t: torch.dtype, g: torch.Generator, n=count, w=width
        ) -> Arguments:
            rows, length, size = n + 3, w * 16 - 5, 16
            tokens = torch.randint(0, 9999, (rows * length,), generator=g, dtype=torch.int32)
            blocks = torch.randint(0, 9999, (rows, w + 3), generator=g, dtype=torch.int32)
            positions = torch.randint(0, length - 1, (n,), generator=g)
            chosen = torch.randperm(rows, generator=g)[:n]
            advance = torch.arange(n) % 2
            tensors = [x.to(d) for x in (chosen, positions, advance, tokens, blocks)]
            return (*tensors[:4], tensors[4][:, :w], length, size), {}

        label = f"{count}x{width}"
        yield Case("prepare_decode", "bfloat16", {}, prepare, label, (1,), wide=wide, tolerance=0)
    sizes = [(1, 5000, False), (6, 77, False), (3, 4098, False)]
    sizes += [(1, 151936, True), (33, 128256, True), (300, 50257, True)]
    for dtype in DTYPE_NAMES:
        for rows, vocab, wide in sizes:
            for store in (False, True):

                def logits(
                    d: torch.device, t: torch.dtype, g: torch.Generator, r=rows, v=vocab, s=store
                ) -> Arguments:
                    x = torch.randn(r, v, generator=g)
                    for row, value in enumerate((float("nan"), float("inf"), float("-inf"))):
                        x[row + 1 : row + 2, (v // 3) * row : (v // 3) * row + 9] = value
                    x[4:5] = -x[4:5].abs()
                    x[4:5, v // 2], x[4:5, -1] = -0.0, 0.0  # equals
                    x[5:6] = float("-inf")
                    x[0, -1], x[0, v // 2] = 9.0, 9.0  # the first of equals counts
                    tokens = torch.full((2 * r + 1,), -7, dtype=torch.int32, device=d)
                    places = torch.randperm(2 * r, generator=g)[:r].to(d)
                    return (x.to(d, t), *((tokens, places) if s else ())), {}

                label = f"{rows}x{vocab}" + "s" * store
                yield Case(
                    "argmax",
                    dtype,
                    {"vocab_size": vocab},
                    logits,
                    label,
                    mutated=(1,) if store else (),
                    wide=wide,
                    tolerance=0,
                )
