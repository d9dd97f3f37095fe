"""Run every kernel's smallest shapes once, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["LLMFW_TUNE"] = "off"

from gpu.kernel_cases import all_cases, check
from llmfw.kernels.cupy import linear
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.ops.kernel import load_object


def main() -> None:
    """One case for each op, dtype and static shape, in the order of all_cases."""
    device = torch.device("cuda", 0)
    seen: set[tuple[object, ...]] = set()
    for case in all_cases():
        batch = case.label.split("-")[0] if case.op == "paged_attention" else ""
        key = (case.op, case.dtype, tuple(case.shape.items()), batch)
        if case.wide or key in seen or (case.dtype == "float16" and case.op != "paged_attention"):
            continue
        seen.add(key)
        context = case.context(device)
        kernel = next(k for k in KERNELS if k.op == case.op)
        check(case, load_object(kernel.factory)(context), device)
        if case.op == "linear":
            products(case, device)
    torch.cuda.synchronize()
    print(f"{len(seen)} cases ran")


def products(case, device: torch.device) -> None:
    """All variants of a product for 1 and 5 rows."""
    context = case.context(device)
    if context["in_features"] != 192 or case.dtype == "float32":
        return
    for rows in (1, 5):
        bucket = linear.bucket_of(rows)
        x = torch.randn(rows, 192, dtype=context.dtype, device=device)
        weight = torch.randn(context["out_features"], 192, dtype=context.dtype, device=device)
        for variant in linear.variants(bucket, 192, context.dtype):
            out = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=device)
            linear.product(variant, bucket, context)(x, weight, None, out, rows)
            assert torch.allclose(out.float(), (x.float() @ weight.float().T), rtol=0.05, atol=0.5)


if __name__ == "__main__":
    main()
