"""Products that share an RMS norm on a GPU: against their references, and in a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu.kernel_cases import FEATURES, Case, check, kernel_of, randn, relative_error
from gpu.normed_cases import normed_cases, normed_variants
from llmfw.ops import reference
from llmfw.ops.kernel import DeviceInfo, OpContext

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLMFW_TUNE", "off")
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    yield
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize("case", normed_cases(), ids=str)
def test_products_that_share_a_norm(case: Case, device: torch.device) -> None:
    check(case, kernel_of(case, device).build(case.context(device)), device)
    for call in normed_variants(case.context(device), int(case.facts["rows"])):
        check(case, call, device)


@pytest.mark.parametrize("rows", [1, 4, 8, 33, 64])
def test_layers_with_norms_inside_their_products(rows: int, device: torch.device) -> None:
    """Launches that overlap, in a graph: equal at every replay, and near the kernels of norms."""
    hidden, inner, layers, eps = 1024, 3072, 6, 1e-6
    drawn = torch.Generator().manual_seed(11)

    def values(*size: int, scale: float = 1.0) -> torch.Tensor:
        return randn(*size, device=device, dtype=torch.bfloat16, generator=drawn, scale=scale)

    up = [values(2 * inner, hidden, scale=hidden**-0.5) for _ in range(layers)]
    down = [values(hidden, inner, scale=inner**-0.5) for _ in range(layers)]
    start, first, scales = values(rows, hidden), values(rows, inner), values(hidden)

    def expected() -> tuple[torch.Tensor, torch.Tensor]:
        residual = start.clone()
        x = reference.linear(first, down[0], None)
        for one, other in zip(up, down, strict=True):
            x, residual = reference.add_rms_norm(x, residual, scales, eps)
            gated = reference.gated_linear(x, one, None)
            x = reference.linear(gated, other, None)
        return gated, residual + x

    gate = {"in_features": hidden, "intermediate_size": inner, "bias": 0}
    end = {"in_features": inner, "out_features": hidden}
    info = DeviceInfo(device, FEATURES)
    joins = normed_variants(OpContext("normed_gated_linear", torch.bfloat16, info, gate), rows)
    adds = normed_variants(OpContext("add_linear", torch.bfloat16, info, end), rows)
    wanted, residual = expected(), start.clone()
    for join, add in zip(joins, adds, strict=False):

        def run(join=join, add=add) -> torch.Tensor:
            residual.copy_(start)
            scaled, squares = add(first, down[0], residual, scales)
            for one, other in zip(up, down, strict=True):
                gated = join(scaled, residual, squares, one, None, eps)
                scaled, squares = add(gated, other, residual, scales)
            return gated

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        graph.replay()
        kept = out.clone(), residual.clone()
        for result, like in zip(kept, wanted, strict=True):
            assert relative_error(result, like) <= 2e-2
        for _ in range(20):
            graph.replay()
            assert torch.equal(out, kept[0])
            assert torch.equal(residual, kept[1])
