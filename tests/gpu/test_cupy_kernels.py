"""Every kernel of the CuPy pack against its reference on a GPU, and under CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu.expert_cases import expert_cases, route_cases, router_cases
from gpu.kernel_cases import (
    Batch,
    Case,
    activation_cases,
    attention_arguments,
    attention_cases,
    check,
    gated_linear_cases,
    kernel_of,
    linear_cases,
    norm_cases,
    product_variants,
    relative_error,
    rope_cases,
)
from gpu.recurrent_cases import recurrent_cases, recurrent_norm_cases
from gpu.sampling_cases import sampling_cases
from gpu.step_cases import embedding_cases, step_cases
from llmfw.kernels.cupy.attention import plan_batch
from llmfw.kernels.cupy.prefill import Prefill
from llmfw.ops.reference import REFERENCES

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


def built(case: Case, device: torch.device) -> Callable[..., Any]:
    return kernel_of(case, device).build(case.context(device))


@pytest.mark.parametrize(
    "case",
    [
        *norm_cases(),
        *activation_cases(),
        *rope_cases(),
        *attention_cases(),
        *recurrent_cases(),
        *recurrent_norm_cases(),
        *step_cases(),
        *embedding_cases(),
        *sampling_cases(),
    ],
    ids=str,
)
def test_kernel_matches_its_reference(case: Case, device: torch.device) -> None:
    check(case, built(case, device), device)


@pytest.mark.parametrize("case", [*route_cases(), *router_cases(), *expert_cases()], ids=str)
def test_experts_match_their_references(case: Case, device: torch.device) -> None:
    check(case, built(case, device), device)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_in_a_graph_follow_choices_that_change(tokens: int, device: torch.device) -> None:
    case = next(
        c for c in expert_cases() if c.label == f"{tokens}t-16x128x192f" and c.dtype == "bfloat16"
    )
    call = built(case, device)
    draws = [
        case.draw(device, torch.bfloat16, torch.Generator().manual_seed(seed))[0]
        for seed in range(3)
    ]
    held = draws[0]
    call(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*held)
    for drawn in draws[1:]:
        for old, new in zip(held[:3], drawn[:3], strict=True):
            old.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first)
        assert relative_error(out, REFERENCES["moe_experts"](*held)) <= 8e-3


@pytest.mark.parametrize("case", [*linear_cases(), *gated_linear_cases()], ids=str)
def test_every_product_variant_matches_cublas(case: Case, device: torch.device) -> None:
    check(case, built(case, device), device)
    for call in product_variants(case.context(device), int(case.facts["rows"])):
        check(case, call, device)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("sinks", [0, 1])
def test_flash_attention_serves_contexts(
    sinks: int, window: int | None, device: torch.device
) -> None:
    case = next(c for c in attention_cases() if "prompts-8/2x128" in c.label)
    prefill = Prefill(case.context(device))
    shape = {**case.shape, "window": window or 0, "sinks": sinks}
    batch = Batch(((700, 700), (300, 1500), (1, 33), (512, 513)), contexts=4)
    args, kwargs = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(7), shape, batch
    )
    q, k, v, metadata, view, scale = args
    plan = plan_batch(metadata, prefill)
    assert plan.contexts is not None
    assert not plan.parts
    logits = kwargs.get("sinks")
    out = prefill(q, k, v, view.block_tables, plan.contexts, scale, window, logits)
    expected = REFERENCES["paged_attention"](*args, **kwargs)
    assert relative_error(out.flatten(1), expected) <= 8e-3


def attention_case(label: str) -> Case:
    """One in bfloat16; the test is skipped where its kernel does not serve the GPU."""
    wanted = f"paged_attention-bfloat16-{label}"
    found = [case for case in attention_cases() if str(case) == wanted]
    if not found:
        pytest.skip("needs the tensor copies of compute capability 9.0")
    return found[0]


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("label", ["prompts-8/2x128b16", "prompts-8/2x128b16-copies"])
def test_contexts_and_generations_write_one_output(
    label: str, sinks: int, device: torch.device
) -> None:
    """Flash attention takes the contexts' rows, a kernel of ours the others."""
    case = attention_case(label)
    context = case.context(device)
    shape = {**case.shape, "sinks": sinks}
    batch = Batch(((700, 700), (300, 1500), (1, 33), (1, 1200), (1, 1)), contexts=2)
    args, kwargs = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(7), shape, batch
    )
    plan = plan_batch(args[3], Prefill(context))
    assert plan.contexts is not None
    assert plan.parts
    expected = REFERENCES["paged_attention"](*args, **kwargs)
    assert relative_error(built(case, device)(*args, **kwargs), expected) <= 8e-3


@pytest.mark.parametrize("op", ["rms_norm", "silu_and_mul"])
def test_inputs_that_are_not_aligned_or_not_contiguous_are_served(
    op: str, device: torch.device
) -> None:
    cases = {
        case.op: case for case in [*norm_cases(), *activation_cases()] if case.dtype == "bfloat16"
    }
    case = cases[op]
    call = built(case, device)
    (x, *rest), _ = case.draw(device, torch.bfloat16, torch.Generator().manual_seed(1))
    expected = REFERENCES[op](x, *rest)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x)
    strided = torch.empty(x.shape[0], x.shape[1] + 8, dtype=x.dtype, device=device)[
        :, : x.shape[1]
    ].copy_(x)
    for view in (shifted, strided):
        assert relative_error(call(view, *rest), expected) <= 8e-3
    assert call(x[:0], *rest).shape == expected[:0].shape


@pytest.mark.parametrize("label", ["few-8/2x128b16", "few-8/2x128b16-copies"])
def test_attention_in_a_graph_follows_lengths_that_change(label: str, device: torch.device) -> None:
    case = attention_case(label)
    call = built(case, device)
    long = Batch(((1, 900), (1, 640), (1, 33), (1, 1500)))
    args, kwargs = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(3), case.shape, long
    )
    q, k, v, metadata, view, scale = args
    call(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args, **kwargs)
    for lengths in ((900, 640, 33, 1500), (1, 640, 2, 1499), (65, 64, 17, 3)):
        metadata.kv_lens_device.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        now = type(metadata)(**{**vars(metadata), "kv_lens": lengths})
        expected = REFERENCES["paged_attention"](q, k, v, now, view, scale, **kwargs)
        assert relative_error(out, expected) <= 8e-3


@pytest.mark.parametrize("layout", ["8/2x128b16", "8/2x128b16-copies", "8/4x256b16"])
def test_splits_do_not_change_the_result_and_repeats_are_equal(
    layout: str, device: torch.device
) -> None:
    from llmfw.kernels.cupy.paged_decode import PagedDecode

    case = attention_case(f"few-{layout}")
    decode = PagedDecode(case.context(device), copied="kernel" in case.facts)
    batch = Batch(((1, 4000), (1, 100), (1, 2049)))
    args, _ = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(5), case.shape, batch
    )
    q, k, v, metadata, view, scale = args
    expected = REFERENCES["paged_attention"](*args)
    for splits in (1, 2, 3, 7, 16, 33, 64):
        outs = []
        for _ in range(3):
            out = torch.full_like(expected, float("nan"))
            decode(
                out,
                q,
                k,
                v,
                view.block_tables,
                metadata.cu_query_lens,
                metadata.kv_lens_device,
                first_request=0,
                requests=3,
                max_q=1,
                max_kv=4000,
                scale=scale,
                splits=splits,
            )
            outs.append(out)
        assert relative_error(outs[0], expected) <= 8e-3, splits
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
