"""Latent attention's kernels against their references on a GPU, and under CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu.kernel_cases import Batch, Case, attention_arguments, check, kernel_of, relative_error
from gpu.latent_cases import CUTS, check_cut, latent_attention_cases, latent_cases
from llmfw.kernels.cupy.attention import parts_of
from llmfw.kernels.cupy.latent_attention import TILES, WIDE, LatentAttention
from llmfw.kernels.cupy.latent_tiles import Cut, LatentTiles
from llmfw.ops.reference import REFERENCES

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def halves(ending: str = "") -> Case:
    """A batch of single tokens with DeepSeek's sizes, in bfloat16; "-tiles": by latent_tiles.cu."""
    wanted = f"paged_attention-bfloat16-few-latent16x512+64b16{ending}"
    found = [case for case in latent_attention_cases() if str(case) == wanted]
    if not found:
        pytest.skip("needs compute capability 9.0")
    return found[0]


@pytest.mark.parametrize("case", latent_cases(), ids=str)
def test_kernel_matches_its_reference(case: Case, device: torch.device) -> None:
    check(case, kernel_of(case, device).build(case.context(device)), device)


@pytest.mark.parametrize("ending", ["", "-tiles"])
def test_latent_attention_in_a_graph_follows_lengths_that_change(
    ending: str, device: torch.device
) -> None:
    case = halves(ending)
    call = kernel_of(case, device).build(case.context(device))
    long = Batch(((1, 900), (1, 640), (1, 33), (1, 1500)))
    args, _ = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(3), case.shape, long
    )
    q, cache, values, metadata, view, scale = args
    call(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    for lengths in ((900, 640, 33, 1500), (1, 640, 2, 1499), (65, 64, 17, 3)):
        metadata.kv_lens_device.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        now = type(metadata)(**{**vars(metadata), "kv_lens": lengths})
        expected = REFERENCES["paged_attention"](q, cache, values, now, view, scale)
        assert relative_error(out, expected) <= 8e-3


@pytest.mark.parametrize("heads", [16, 128])
def test_latent_tiles_and_splits_do_not_change_the_result(heads: int, device: torch.device) -> None:
    case = halves()
    case = replace(case, shape={**case.shape, "num_heads": heads})
    attend = LatentAttention(case.context(device))
    batch = Batch(((1, 4000), (1, 100), (1, 2049)))
    args, _ = attention_arguments(
        device, torch.bfloat16, torch.Generator().manual_seed(5), case.shape, batch
    )
    q, cache, _, metadata, view, scale = args
    expected = REFERENCES["paged_attention"](*args)
    (part,) = parts_of(metadata)
    lengths = view.block_tables, metadata.cu_query_lens, metadata.kv_lens_device
    for tile in (*TILES[16], WIDE, *TILES[64]):
        for splits in (1, 2, 7, 16, 64):
            outs = [torch.full_like(expected, float("nan")) for _ in range(2)]
            for out in outs:
                attend(out, q, cache, *lengths, part, scale, splits=splits, tile=tile)
            assert relative_error(outs[0], expected) <= 8e-3, (tile, splits)
            assert torch.equal(*outs)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_latent_tiles_are_the_same_however_they_are_cut(
    cut: Cut, groups: int, device: torch.device
) -> None:
    case = halves("-tiles")
    case = replace(case, shape={**case.shape, "num_heads": 24})
    check_cut(LatentTiles(case.context(device)), case, cut, groups, device)
