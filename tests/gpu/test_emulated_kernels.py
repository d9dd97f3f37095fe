"""The CuPy kernels' logic on a CPU: the same sources, launchers and cases, by the emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpu import kernel_cases
from gpu.emulated import emulator
from gpu.expert_cases import expert_cases, route_cases, router_cases
from gpu.kernel_cases import (
    FEATURES,
    Case,
    activation_cases,
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
from gpu.latent_cases import (
    CUTS,
    check_cut,
    expanded_attention_cases,
    head_linear_cases,
    latent_attention_cases,
    latent_rope_cases,
)
from gpu.recurrent_cases import recurrent_cases, recurrent_norm_cases
from gpu.sampling_cases import sampling_cases
from gpu.step_cases import embedding_cases, step_cases
from llmfw import MLA, MLAParams, ModelConfig, RopeParams
from llmfw.attention.metadata import LayerCache
from llmfw.kernels.cupy import (
    draw,
    expanded_attention,
    float32_linear,
    moe_experts,
    paged_plan,
    prefill,
)
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.latent_tiles import LatentTiles
from llmfw.kernels.cupy.paged_plan import Cut
from llmfw.kernels.cupy.tiled import Tiled
from llmfw.layers import stock_layer
from llmfw.models import bind_tree
from llmfw.models.build import finish_loading
from llmfw.models.weights import materialize
from llmfw.ops import reference
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo
from llmfw.ops.reference_moe import grouped_linear
from llmfw.ops.table import OpTable

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, root: Path) -> torch.device:
    folder = root / ".pytest_cache" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    return emulator.install(monkeypatch, folder)


def run(case: Case, device: torch.device) -> None:
    check(case, kernel_of(case, device).build(case.context(device)), device)


def small(cases: list[Case], every: int) -> list[object]:
    """Small cases as parameters; all but every so-many-th of bfloat16 are marked slow."""
    chosen = [case for case in cases if not case.wide]
    quick = [case for case in chosen if case.dtype == "bfloat16"][::every]
    return [
        pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow)
        for case in chosen
    ]


def few(cases: list[Case], quick: set[str]) -> list[object]:
    """Small cases that are named, and those of their ops in no other test, marked slow."""
    assert quick <= {str(case) for case in cases}
    return [
        pytest.param(case, id=str(case), marks=() if str(case) in quick else pytest.mark.slow)
        for case in cases
        if not case.wide and (str(case) in quick or case.op != "paged_attention")
    ]


COPIED = [case for case in attention_cases() if "kernel" in case.facts]  # tiles by tensor copies


@pytest.mark.parametrize(
    "case",
    small(
        [
            *norm_cases(),
            *activation_cases(),
            *rope_cases(),
            *latent_rope_cases(),
            *head_linear_cases(),
            *step_cases(),
            *embedding_cases(),
        ],
        7,
    ),
)
def test_elementwise_kernels_match_their_references(case: Case, device: torch.device) -> None:
    run(case, device)


SAMPLING = {
    "draw_tokens-bfloat16-101x77-cuts",
    "draw_tokens-bfloat16-9x5000",
    "draw_tokens-float32-2x4096-cuts",
    "penalise-float32-3x50-33",
    "copy_blocks-bfloat16-9x64",
    "paged_attention-float32-split-4/2x64b16",
    "paged_attention-float32-drafts-8/2x64b16w17cs",
}


@pytest.mark.parametrize("case", few([*sampling_cases(), *attention_cases()], SAMPLING))
def test_sampling_and_float32_match_their_references(case: Case, device: torch.device) -> None:
    run(case, device)


def test_a_draw_reads_the_row_again_where_its_list_is_full(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "ROOM", 32)
    run(next(case for case in sampling_cases() if "bfloat16-2x4096-cuts" in str(case)), device)


@pytest.mark.parametrize("case", small([*recurrent_cases(), *recurrent_norm_cases()], 11))
def test_recurrent_kernels_match_their_references(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("case", small([*route_cases(), *router_cases()], 25))
def test_routing_matches_its_reference(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("tile", float32_linear.TILES)
def test_every_tile_of_a_router(
    tile: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_linear, "TILES", (tile,))
    for label in ("33x64x64b", "5x520x5"):
        run(next(case for case in router_cases() if case.label == label), device)


def expert_parameters() -> list[object]:
    """Small cases of experts; those are quick that build the same kernels."""
    quick = {"moe_experts-bfloat16-1t-5x64x64f", "moe_experts-bfloat16-40t-5x64x64f"}
    return [
        pytest.param(
            case,
            id=f"{case}-{case.code}",
            marks=() if str(case) in quick and "silu" in case.code else pytest.mark.slow,
        )
        for case in expert_cases()
        if not case.wide
    ]


@pytest.mark.parametrize("case", expert_parameters())
def test_experts_match_their_reference(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize(
    "label",
    [
        "40t-5x64x64f",
        pytest.param("40t-16x128x192f", marks=pytest.mark.slow),
        pytest.param("5t-16x128x192", marks=pytest.mark.slow),
    ],
)
def test_experts_with_many_rows_go_through_the_library(
    label: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order, gathering, activation with bias and sum around torch's product, here a loop."""

    def product(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, weight.transpose(1, 2), offs)

    monkeypatch.setattr(moe_experts, "MANY_ROWS", 0)
    monkeypatch.setattr(moe_experts.vendor, "grouped_product", lambda info: product)
    wanted = f"moe_experts-bfloat16-{label}"
    run(next(case for case in expert_cases() if str(case) == wanted), device)


@pytest.mark.parametrize("case", small([c for c in attention_cases() if not c.facts], 7))
def test_paged_attention_matches_its_reference(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("warps", [2, 4])
@pytest.mark.parametrize("case", small(COPIED, 5))
def test_paged_attention_by_tensor_copies_matches_its_reference(
    case: Case, warps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two warps and tiles, rings go round."""
    if warps == 2:
        cut = Cut(2, 1, 2, copied=True)
        monkeypatch.setattr(paged_plan, "copied_cut", lambda *_: cut)
    run(case, device)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize(
    "label",
    [
        "paged_attention-bfloat16-few-2/2x80b16",
        pytest.param("paged_attention-float16-few-10/1x64b8", marks=pytest.mark.slow),
        pytest.param("paged_attention-float16-split-8/2x128b16", marks=pytest.mark.slow),
    ],
)
def test_tiles_are_asked_for_ahead(
    label: str, ahead: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_plan, "AHEAD", ahead)
    run(next(case for case in attention_cases() if str(case) == label), device)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("label", ["split-4/2x144v112b8", "drafts-4/1x256b8w17c"])
def test_paged_attention_keeps_any_number_of_tiles_under_way(
    label: str, warps: int, stages: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_plan, "staged_cut", lambda *_: Cut(warps, 1, stages))
    case = next(
        case for case in attention_cases() if str(case) == f"paged_attention-float16-{label}"
    )
    run(case, device)


@pytest.mark.parametrize("case", small(list(latent_attention_cases()), 5))
def test_latent_attention_matches_its_reference(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(cut, marks=() if (cut.rows, cut.cluster) == (16, 3) else pytest.mark.slow)
        for cut in CUTS
    ],
    ids=str,
)
def test_latent_tiles_are_the_same_however_they_are_cut(
    cut: Any, groups: int, device: torch.device
) -> None:
    case = next(c for c in latent_attention_cases() if "few-latent4x128+64" in c.label)
    case = replace(case, dtype="bfloat16", shape={**case.shape, "num_heads": 24})
    check_cut(LatentTiles(case.context(device)), case, cut, groups, device)


@pytest.mark.parametrize("case", small([*linear_cases(), *gated_linear_cases()], 25))
def test_every_product_variant_matches_its_reference(case: Case, device: torch.device) -> None:
    context = case.context(device)
    for call in product_variants(context, int(case.facts["rows"])):
        check(case, call, device)


@pytest.mark.parametrize(("share", "parts"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    "label",
    [
        "linear-bfloat16-65x192-50b",  # a tile's chunks all fit at once, and the next one's
        pytest.param("linear-bfloat16-256x1024-40", marks=pytest.mark.slow),  # and do not
        "gated_linear-bfloat16-200x192-56b",
    ],
)
def test_blocks_walk_over_tiles(
    label: str, share: int, parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in (*linear_cases(), *gated_linear_cases()) if str(c) == label)
    gated = case.op == "gated_linear"
    cut = Tiled(8 * (1 + gated), share, gated=gated, parts=parts)
    rows = case.shape["intermediate_size"] * 2 if gated else case.shape["out_features"]
    assert cut.clusters(rows) > cut.at_once(emulator.SMS)
    monkeypatch.setattr(kernel_cases, "TILED_CUTS", ((cut.tile, share, 1, parts),))
    (call,) = product_variants(case.context(device), int(case.facts["rows"]))
    check(case, call, device)


@pytest.mark.parametrize(
    "label", ["linear-bfloat16-65x192-50b", "gated_linear-bfloat16-200x192-56b"]
)
def test_blocks_of_a_split_store_unlike_parts(
    label: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five eights of results by three blocks, all of which have some."""
    case = next(c for c in (*linear_cases(), *gated_linear_cases()) if str(c) == label)
    gated = case.op == "gated_linear"
    monkeypatch.setattr(kernel_cases, "TILED_CUTS", ((40 * (1 + gated), 1, 3, 1),))
    (call,) = product_variants(case.context(device), int(case.facts["rows"]))
    check(case, call, device)


def test_contexts_go_through_packed_keys_and_values(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering, and the split of a mixed batch, with flash attention played by the reference."""
    monkeypatch.setattr(prefill, "LEAST_WORK", 0)
    monkeypatch.setattr(prefill, "LEAST_ROWS", 0)
    monkeypatch.setattr(prefill, "flash_attention", packed_attention)
    cases = [case for case in attention_cases() if case.label.startswith("mixed")]
    cases = [case for case in cases if case.dtype == "bfloat16" and not case.shape["softcap"]]
    for case in [*cases[:4], *(case for case in cases if case.shape["sinks"])]:
        run(case, device)


@pytest.mark.parametrize("case", small(list(expanded_attention_cases()), 2))
def test_expanded_attention_makes_keys_and_values(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanded_attention, "flash_attention", packed_attention)
    run(case, device)


def test_a_latent_layer_is_the_same_whichever_way_its_prompts_go(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By references, by kernels that absorb, and with keys and values made: a mixed batch."""
    batches: list[prefill.ContextBatch] = []

    def flash(q: Any, k: Any, v: Any, batch: prefill.ContextBatch, *more: Any) -> torch.Tensor:
        batches.append(batch)
        return packed_attention(q, k, v, batch, *more)

    monkeypatch.setattr(expanded_attention, "flash_attention", flash)
    outs = []
    for select, least_gain in (("reference", 0), ("auto", float("inf")), ("auto", float("-inf"))):
        monkeypatch.setattr(expanded_attention, "LEAST_GAIN", least_gain)
        outs.append(latent_layer(device, select))
    assert [batch.tokens for batch in batches] == [14]
    for out, cache in outs[1:]:
        assert relative_error(out, outs[0][0]) < 1e-2
        assert relative_error(cache, outs[0][1]) < 1e-2


def latent_layer(device: torch.device, select: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A small layer's output and cache after a batch of prompts and single tokens."""
    ops = ("latent_rope_and_cache", "head_linear", "paged_attention", "expanded_attention")
    table = OpTable(DeviceInfo(device, FEATURES), tuple(k for k in KERNELS if k.op in ops), select)
    config: ModelConfig = ModelConfig(
        pretrained_config=None, dtype=torch.bfloat16, device=device, ops=table, layer_factory=stock
    )
    sizes = MLAParams(kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    rope = RopeParams(dim=16, max_positions=128, interleaved=True)
    layer = MLA(
        hidden_size=32, num_attention_heads=3, mla=sizes, config=config, layer_idx=0, rope=rope
    )
    bind_tree(layer, config)
    materialize(layer, device)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    finish_loading(layer)
    requests = ((9, 9), (5, 37), (1, 70), (1, 1))
    metadata, _, blocks = paged_batch(requests, 2, config.block_size, generator, device)
    cache = torch.randn(blocks, config.block_size, 1, 80, generator=generator).bfloat16()
    metadata = replace(metadata, caches={0: LayerCache(cache, cache[..., :64])})
    hidden = torch.randn(16, 32, generator=generator).bfloat16()
    return layer(metadata.positions, hidden, metadata), cache


def stock(kind: str, role: str, config: ModelConfig, index: int | None, spec: Any) -> nn.Module:
    return stock_layer(kind, role, config, index, spec)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: prefill.ContextBatch,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    assert len(q) == batch.tokens
    assert len(k) == len(v) == batch.keys
    assert not k.isnan().any()
    outs = []
    for i in range(batch.requests):
        queries, keys = (slice(int(cu[i]), int(cu[i + 1])) for cu in (batch.cu_q, batch.cu_k))
        past = int(batch.cu_k[i + 1] - batch.cu_k[i] - batch.cu_q[i + 1] + batch.cu_q[i])
        parts = [x.transpose(0, 1) for x in (q[queries], k[keys], v[keys])]
        out = reference._attend(*parts, past, scale, window, None, sinks)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
