"""Cases of `draw_tokens`, in the manner of kernel_cases: every mix of parameters in one batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from gpu.kernel_cases import Arguments, Case
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.ops.reference_step import argmax

#: temperature, top_k, top_p, min_p
MIXES = list(itertools.product((1.0, 0.2, 3.0), (0, 1, 50, 10**7), (1.0, 0.9, 1e-6), (0.0, 0.05)))
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
    """Normal logits; some rows with equal values, with minus infinities, or not finite."""
    x = torch.randn(rows, vocab, generator=g) * spread
    x[3::7] = x[3::7].round()
    x[4::7] = 1.5
    x[5::7, 1::2] = -math.inf
    x[6:7, vocab // 2] = math.nan
    return x


def draw_cases() -> Iterator[Case]:
    """draw_tokens over odd and large vocabularies, cut and not, stored and not."""
    sizes = [(73, 77, False), (9, 5000, False), (2, 4096, False), (73, 2050, False)]
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


def sampling_cases() -> list[Case]:
    """Every case of this file."""
    return [*draw_cases()]
