"""Run every kernel's smallest shapes once, for compute-sanitizer: all of them, or one of N parts.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py [PART/PARTS] [OP ...]

Results are not compared, as the tests do that: a sanitizer would watch the references too.
Sources named in WITHOUT, in the environment, are left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu.expert_cases import expert_cases, route_cases, router_cases
from gpu.kernel_cases import Case, all_cases, kernel_of, product_variants
from gpu.latent_cases import latent_cases
from gpu.normed_cases import OPS as NORMED
from gpu.normed_cases import normed_cases, normed_variants
from gpu.recurrent_cases import OPS as RECURRENT
from gpu.recurrent_cases import recurrent_cases, recurrent_norm_cases
from gpu.sampling_cases import sampling_cases
from gpu.step_cases import embedding_cases, step_cases
from llmfw.kernels.cupy.products import bucket_of
from llmfw.ops.kernel import DTYPE_NAMES

ENVIRONMENT = {
    "LLMFW_TUNE": "off",
    # torch's allocator hands out parts of large blocks, whose ends memcheck does not know.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
}
PRODUCTS = ("linear", "gated_linear", *NORMED)
SWITCHED = (
    "argmax",
    "copy_blocks",
    "draw_tokens",
    "embedding",
    "moe_route",
    "penalise",
    "prepare_decode",
)


# Of kernels that may be left out.
SOURCES = {"cupy.latent_tiles": "latent_tiles.cu", "cupy.paged_streamed": "paged_streamed.cu"}


def smallest_cases() -> list[Case]:
    """One case for each op, dtype and static shape, and each way in which a kernel can go."""
    found: dict[tuple[object, ...], Case] = {}
    for case in (
        *all_cases(),
        *normed_cases(),
        *step_cases(),
        *embedding_cases(),
        *latent_cases(),
        *recurrent_cases(),
        *recurrent_norm_cases(),
        *sampling_cases(),
        *route_cases(),
        *router_cases(),
        *expert_cases(),
    ):
        if not case.wide and (case.dtype != "float16" or case.op == "paged_attention"):
            found.setdefault((*build_of(case), way_of(case)), case)
    return list(found.values())


def build_of(case: Case) -> tuple[object, ...]:
    """Cases that are equal here run the same machine code."""
    return (case.op, case.dtype, tuple(case.shape.items()), case.code, case.facts.get("kernel"))


def way_of(case: Case) -> object:
    """What tells cases of one build apart: arguments, the batch's kind, or the number of rows."""
    if case.op in SWITCHED:
        return case.label
    if case.op in ("paged_attention", *RECURRENT):
        return case.label.split("-")[0]
    rows = case.facts.get("rows")
    if has_variants(case):
        return bucket_of(int(str(rows)))
    return rows if rows in (1, 4, 5) else None


def has_variants(case: Case) -> bool:
    """Whether all variants of a product are run with the case's inputs."""
    return case.op in PRODUCTS and case.shape["in_features"] == 192 and case.dtype != "float32"


def part_of(cases: Iterable[Case], part: int, parts: int) -> list[Case]:
    """The cases of one part (from 1). Those of a build are together, as it is compiled for them."""
    builds: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        builds.setdefault(build_of(case), []).append(case)
    return [case for group in list(builds.values())[part - 1 :: parts] for case in group]


def chosen(words: list[str]) -> list[Case]:
    """The cases that a command line names: [PART/PARTS] [OP ...].

    Raises:
        SystemExit: If the part is none, an op has no cases, or there are too many parts.
    """
    part, parts = 1, 1
    if words and "/" in words[0]:
        first, _, last = words[0].partition("/")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise SystemExit(f"{words[0]!r} is no part: use 1/7 to 7/7, for example")
        part, parts, words = int(first), int(last), words[1:]
    cases = smallest_cases()
    ops = {case.op for case in cases}
    unknown = [word for word in words if word not in ops]
    if unknown:
        raise SystemExit(f"no cases of {', '.join(unknown)}: there are {', '.join(sorted(ops))}")
    mine = part_of([case for case in cases if case.op in (words or ops)], part, parts)
    if not mine:
        raise SystemExit(f"no cases in part {part} of {parts}: ask for fewer parts")
    return mine


def run(case: Case, device: torch.device) -> None:
    """Draw a case's inputs and call what serves it with them."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs = case.draw(device, DTYPE_NAMES[case.dtype], generator)
    for call in calls(case, device):
        call(*args, **kwargs)


def calls(case: Case, device: torch.device) -> Iterator[Callable[..., Any]]:
    """The case's kernel, and all variants of a product."""
    context, without = case.context(device), os.environ.get("WITHOUT", "").split()
    kernel = kernel_of(case, device)
    if SOURCES.get(kernel.name) in without:
        return
    yield kernel.build(context)
    if has_variants(case):
        variants = normed_variants if case.op in NORMED else product_variants
        yield from variants(context, int(str(case.facts["rows"])), without)


def main(words: list[str]) -> None:
    """Tell of each case that it runs and that it ran, so that a log shows where a tool stopped."""
    os.environ.update(ENVIRONMENT)
    cases = chosen(words)
    device = torch.device("cuda", 0)
    for case in cases:
        print(f"run {case}", flush=True)
        run(case, device)
        torch.cuda.synchronize()
        print(f"ran {case}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
