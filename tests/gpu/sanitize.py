"""Run every kernel's smallest shapes once, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py [OP ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["LLMFW_TUNE"] = "off"

from gpu.expert_cases import expert_cases, route_cases
from gpu.kernel_cases import Case, all_cases, check, kernel_of, product_variants
from gpu.latent_cases import latent_cases
from gpu.recurrent_cases import OPS as RECURRENT
from gpu.recurrent_cases import recurrent_cases, recurrent_norm_cases
from gpu.sampling_cases import sampling_cases
from gpu.step_cases import step_cases


def main(ops: list[str]) -> None:
    """One case for each op (or those named), dtype and static shape, in the order of all_cases."""
    device = torch.device("cuda", 0)
    seen: set[tuple[object, ...]] = set()
    experts = (*route_cases(), *expert_cases())
    for case in (
        *all_cases(),
        *step_cases(),
        *latent_cases(),
        *recurrent_cases(),
        *recurrent_norm_cases(),
        *sampling_cases(),
        *experts,
    ):
        batch = case.label.split("-")[0] if case.op in ("paged_attention", *RECURRENT) else ""
        rows = case.facts.get("rows") if case.facts.get("rows") in (1, 4, 5) else 0
        named = case.facts.get("kernel")
        key = (case.op, case.dtype, tuple(case.shape.items()), batch, rows, named)
        if ops and case.op not in ops:
            continue
        if case.wide or key in seen or (case.dtype == "float16" and case.op != "paged_attention"):
            continue
        seen.add(key)
        check(case, kernel_of(case, device).build(case.context(device)), device)
        if case.op in ("linear", "gated_linear"):
            products(case, device)
    torch.cuda.synchronize()
    print(f"{len(seen)} cases ran")


def products(case: Case, device: torch.device) -> None:
    """All variants of a product, with the case's inputs."""
    if case.shape["in_features"] == 192 and case.dtype != "float32":
        for call in product_variants(case.context(device), int(case.facts["rows"])):
            check(case, call, device)


if __name__ == "__main__":
    main(sys.argv[1:])
