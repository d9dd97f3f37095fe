"""Cases of draw_tokens, penalise and copy_blocks, in the manner of kernel_cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.ops.reference_step import argmax

#: temperature, top_k, top_p, min_p
MIXES = list(
    itertools.product((1.0, 0.2, 3.0), (0, 1, 50, 10**7), (1.0, 0.9, 1e-6, 1 - 1e-6), (0.0, 0.05))
)
MIXES += [(1.0, 0, 1.0, 1.0), (0.2, 0, 0.9, 1.0), (1.0, 50, 1.0, 1.0), (3.0, 50, 0.9, 1.0)]
MIXES.append((0.0, 0, 1.0, 0.0))  # greedy


def parameters_of(
    mixes: list[tuple[float, int, float, float]], draws: torch.Tensor
) -> torch.Tensor:
    """The op's parameters, float64 [5, rows], for (temperature, top_k, top_p, min_p) a row."""
    columns = [
        (
            math.log2(math.e) / temperature if temperature else 0.0,
            float(top_k),
            top_p,
            -math.log2(min_p) if min_p else math.inf,
        )
        for temperature, top_k, top_p, min_p in mixes
    ]
    numbers = torch.tensor(columns, dtype=torch.float32).double().T
    return torch.cat((numbers, draws[None])).contiguous()


def logits_of(rows: int, vocab: int, spread: float, g: torch.Generator) -> torch.Tensor:
    """Normal logits; some rows with equal values, with minus infinities, or not finite.

    In others both zeros are the greatest.
    """
    x = torch.randn(rows, vocab, generator=g) * spread
    x[2::7] = -x[2::7].abs()
    x[2::7, : vocab // 2] = 0.0
    x[2::7, 0] = -0.0
    x[3::7] = x[3::7].round()
    x[4::7] = 1.5
    x[5::7, 1::2] = -math.inf
    x[6:7, vocab // 2] = math.nan
    return x


def draw_cases() -> Iterator[Case]:
    """draw_tokens over odd and large vocabularies, cut and not, stored and not."""
    sizes = [(101, 77, False), (9, 5000, False), (2, 4096, False), (101, 2050, False)]
    sizes += [(1, 151936, True), (32, 128256, True), (256, 151936, True), (300, 50257, True)]
    for dtype in DTYPE_NAMES:
        for (rows, vocab, wide), cuts in itertools.product(sizes, (True, False)):

            def draw(
                d: torch.device, t: torch.dtype, g: torch.Generator, r=rows, v=vocab, c=cuts
            ) -> Arguments:
                mixes = [MIXES[(5 * i) % len(MIXES)] for i in range(r)]
                if not c:
                    mixes = [(temperature, 0, 1.0, low) for temperature, _, _, low in mixes]
                uniform = torch.rand(r, generator=g, dtype=torch.float64)
                uniform[1::9] = 1 - 2.0**-52
                uniform[2::9] = 0.0
                logits = logits_of(r, v, 3.0, g).to(d, t)
                tokens = torch.full((2 * r + 1,), -7, dtype=torch.int32, device=d)
                places = torch.randperm(2 * r, generator=g)[:r].to(d)
                numbers = parameters_of(mixes, uniform).to(d)
                return (logits, argmax(logits), numbers, c, tokens, places), {}

            label = f"{rows}x{vocab}" + "-cuts" * cuts
            shape = {"vocab_size": vocab}
            yield Case(
                "draw_tokens", dtype, shape, draw, label, mutated=(4,), wide=wide, tolerance=0
            )


def penalise_cases() -> Iterator[Case]:
    """penalise: tokens that repeat, sequences of one token, rows without penalties."""
    for count, vocab, longest, wide in [
        (1, 50, 1, False),
        (3, 50, 33, False),
        (2, 999, 700, False),
        (32, 128256, 5000, True),
    ]:

        def draw(
            d: torch.device, t: torch.dtype, g: torch.Generator, n=count, v=vocab, most=longest
        ) -> Arguments:
            lens = torch.randint(1, most + 1, (n,), generator=g)
            lens[0] = most
            strengths = torch.rand(3, n, generator=g) * 2 + 0.1
            tensors = (
                torch.randn(n + 2, v, generator=g),
                torch.randperm(n + 2, generator=g)[:n],
                torch.randperm(n + 1, generator=g)[:n],
                torch.randint(0, v, (n + 1, most + 3), generator=g, dtype=torch.int32),
                lens,
                (lens * torch.rand(n, generator=g)).long().clamp_min(1),
                strengths,
            )
            return (*(x.to(d) for x in tensors), most), {}

        label = f"{count}x{vocab}-{longest}"
        yield Case("penalise", "float32", {}, draw, label, mutated=(0,), wide=wide, tolerance=0)


def copy_cases() -> Iterator[Case]:
    """copy_blocks: caches of several sizes at once, one source for two targets."""
    for dtype in ("float32", "bfloat16"):
        for blocks, width, wide in [(9, 64, False), (70, 1024, True)]:

            def draw(
                d: torch.device, t: torch.dtype, g: torch.Generator, n=blocks, w=width
            ) -> Arguments:
                sizes = [(n, 16, 2, w), (n, 16, 1, 40), (n, 16, 3, w)]
                caches = [randn(*size, device=d, dtype=t, generator=g) for size in sizes]
                order = torch.randperm(n, generator=g).to(d)
                sources, targets = order[: n // 3].clone(), order[n // 3 : n // 3 * 2]
                sources[-1] = sources[0]
                return (sources, targets, *caches), {}

            label = f"{blocks}x{width}"
            yield Case(
                "copy_blocks",
                dtype,
                {},
                draw,
                label,
                mutated=(2, 3, 4),
                wide=wide,
                tolerance=0,
            )


def sampling_cases() -> list[Case]:
    """Every case of this file."""
    return [*draw_cases(), *penalise_cases(), *copy_cases()]
