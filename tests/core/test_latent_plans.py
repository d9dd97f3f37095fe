"""How latent attention on a GPU is divided, refused and chosen: what needs no GPU to decide."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import (
    expanded_attention,
    head_linear,
    latent_attention,
    latent_rope,
    latent_tiles,
)
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.expanded_attention import ExpandedHeads
from llmfw.kernels.cupy.latent_attention import LatentAttention, Tile
from llmfw.kernels.cupy.latent_merge import LatentHeads
from llmfw.kernels.cupy.latent_tiles import KEYS, Cut, LatentTiles
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, OpContext
from llmfw.ops.table import OpTable

CUDA = DeviceInfo(torch.device("cuda", 0), frozenset({"cuda", "sm_80", "sm_90", "cupy"}))
ATTENTION = {
    "num_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 576,
    "v_head_dim": 512,
    "window": 0,
    "softcap": 0,
    "sinks": 0,
    "block_size": 16,
    "latent": 1,
}
TILES, ANY = (
    next(kernel for kernel in KERNELS if kernel.name == name)
    for name in ("cupy.latent_tiles", "cupy.latent_attention")
)
EXPANDED = {
    "num_heads": 16,
    "latent_dim": 512,
    "rotary_dim": 64,
    "key_dim": 128,
    "v_head_dim": 128,
    "block_size": 16,
}


def context(op: str, shape: dict[str, int]) -> OpContext:
    return OpContext(op, torch.bfloat16, CUDA, shape)


def attention(
    monkeypatch: pytest.MonkeyPatch, shared: int, heads: int = 16, sms: int = 132
) -> LatentAttention:
    """On a GPU with so much shared memory a block and so many multiprocessors."""
    facts = SimpleNamespace(multi_processor_count=sms, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    return LatentAttention(context("paged_attention", {**ATTENTION, "num_heads": heads}))


@pytest.mark.parametrize("shared", [227 << 10, 163 << 10, 99 << 10])
def test_every_gpu_we_name_has_tiles(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    attend = attention(monkeypatch, shared)
    assert attend.tile(16).shared_bytes(576) <= shared
    assert attend.tile(17).shared_bytes(576) <= shared


def test_too_little_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="49152 bytes of shared memory are too few"):
        attention(monkeypatch, 48 << 10).tile(64)


def test_shared_memory_is_counted_as_the_source_divides_it() -> None:
    tiles = 2 * 32 * (576 + 8) * 2  # stages, keys, padded rows of 16-bit values
    scores = 4 * 16 * (32 + 8) * 4  # four shares of the summed dimension, in float32
    assert Tile(16, 32, 2).shared_bytes(576) == tiles + scores + 16 * (32 + 8) * 2 + 16 * 4


def test_splits_fill_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention(monkeypatch, 227 << 10)
    for requests in (1, 2, 7, 64, 132, 133, 300):
        for longest in (1, 100, 1024, 9000):
            plan = attend.plan(requests, 1, longest)
            assert plan.columns == 1
            assert 1 <= plan.splits <= max(1, -(-longest // plan.tile.keys))
            if requests * 2 <= 132:
                slots = 132 * attend.resident_blocks(plan.tile)
                assert requests * plan.splits <= slots
    assert [attend.plan(n, 1, 4096).tile.keys for n in (1, 33, 34, 132, 133)] == [
        32,
        32,
        64,
        64,
        32,
    ]
    short, long = attend.plan(64, 1, 192), attend.plan(64, 1, 1024)
    assert (short.splits, long.splits, long.least_share * long.tile.keys) == (1, 2, 256)
    many = attention(monkeypatch, 227 << 10, heads=128).plan(3, 2, 1024)
    assert (many.tile.rows, many.columns) == (64, 4)
    assert attend.plan(3, 1, 1024, splits=5).splits == 5


@pytest.mark.parametrize("head_dim", [192, 576])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_a_multiprocessor_holds_two_tiles_of_keys_at_least(rows: int, head_dim: int) -> None:
    cut = Cut(rows)
    assert cut.stages(head_dim) >= 2
    assert cut.shared_bytes(head_dim) <= latent_tiles.SHARED_BYTES


def tiles_of(monkeypatch: pytest.MonkeyPatch, heads: int) -> LatentTiles:
    """On a GPU of 132 multiprocessors."""
    facts = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    return LatentTiles(context("paged_attention", {**ATTENTION, "num_heads": heads}))


@pytest.mark.parametrize("heads", [1, 16, 24, 128])
def test_parts_of_requests_fill_the_device_once(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = tiles_of(monkeypatch, heads)
    for requests in (1, 3, 16, 33, 38, 39, 64, 66, 67, 132, 133, 300):
        for longest in (1, 64, 65, 1024, 9000):
            for tokens in (1, 2, 300):
                plan = tiles.plan(requests, tokens, longest)
                blocks, parts = plan.columns * requests, plan.groups * plan.cut.cluster
                assert plan.columns * plan.cut.rows >= tokens * heads
                assert parts <= -(-longest // KEYS)
                if blocks <= 66:
                    assert parts * blocks <= 132
                    assert plan.groups == 1 or plan.cut.cluster == 1
                elif parts > 1:
                    assert plan.least_share * KEYS == latent_tiles.LONG_KEYS


@pytest.mark.parametrize(
    ("heads", "requests", "longest", "rows", "cluster", "groups"),
    [  # the best of what was timed on an H100, or within 5 % of it
        (16, 1, 192, 16, 1, 3),
        (16, 1, 1024, 16, 1, 16),
        (16, 16, 1024, 16, 1, 8),
        (16, 32, 1024, 16, 3, 1),
        (16, 64, 192, 16, 2, 1),
        (16, 64, 1024, 16, 2, 1),
        (16, 100, 1024, 16, 1, 1),
        (16, 256, 1024, 16, 1, 1),
        (16, 8, 8192, 16, 1, 16),
        (128, 1, 192, 16, 1, 3),
        (128, 1, 1024, 16, 1, 16),
        (128, 64, 1024, 64, 1, 1),
        (128, 8, 8192, 32, 1, 4),
    ],
)
def test_batches_are_divided_as_was_quickest(
    heads: int,
    requests: int,
    longest: int,
    rows: int,
    cluster: int,
    groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tiles_of(monkeypatch, heads).plan(requests, 1, longest)
    assert (plan.cut, plan.groups) == (Cut(rows, cluster), groups)


def test_latent_tiles_need_9_0_and_whole_spans() -> None:
    def told(features: str, **change: int) -> str | None:
        info = DeviceInfo(CUDA.device, frozenset({"cuda", "cupy", *features.split()}))
        shape = {**ATTENTION, **change}
        return TILES.refusal(OpContext("paged_attention", torch.bfloat16, info, shape))

    assert told("sm_80 sm_90") is None
    assert "latent caches only" in str(told("sm_80 sm_90", latent=0))
    assert "9.0" in str(told("sm_80"))
    assert "9.0" in str(told("sm_80 sm_90 sm_100"))
    assert "576 and 448" in str(told("sm_80 sm_90", v_head_dim=448))
    assert "544 and 512" in str(told("sm_80 sm_90", head_dim=544))


@pytest.mark.parametrize(
    ("select", "name"), [("auto", TILES.name), ("-cupy.latent_tiles", ANY.name)]
)
def test_latent_tiles_are_switched_off_alone(select: str, name: str) -> None:
    table = OpTable(CUDA, (ANY, TILES), select)
    subject = context("paged_attention", ATTENTION)
    ranked = table.ranked(subject.op)
    assert ranked == [TILES, ANY]
    assert next(each for each in ranked if table.refusal(each, subject) is None).name == name


def test_a_cache_in_pieces_is_left_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    class Kernel:
        def __init__(self, context: OpContext) -> None:
            self.heads = LatentHeads.of(context)

        def __call__(self, *args: object) -> None:
            served.append(type(self).__name__)

    for name in ("LatentTiles", "LatentAttention"):
        monkeypatch.setattr(latent_tiles, name, type(name, (Kernel,), {}))
    call = TILES.build(context("paged_attention", ATTENTION))
    generator = torch.Generator().manual_seed(0)
    metadata, view, blocks = paged_batch(((1, 20),), 0, 16, generator, torch.device("cpu"))
    layers = torch.zeros(blocks, 2, 16, 1, 576)  # a block of each of two layers, side by side
    for cache in (layers[:, 0], layers[:, 0].contiguous()):
        call(torch.zeros(1, 16, 576), cache, cache[..., :512], metadata, view, 1.0)
    assert served == ["LatentAttention", "LatentTiles"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"latent": 0}, "latent caches only"),
        ({"num_kv_heads": 2}, "2 KV heads"),
        ({"head_dim": 568}, "not multiples of 16"),
        ({"head_dim": 1088, "v_head_dim": 1024}, "up to 576"),
        ({"block_size": 4}, "block size 4"),
        ({"window": 100}, "no window"),
        ({"sinks": 1}, "no sinks"),
    ],
)
def test_what_absorbed_attention_serves(change: dict[str, int], reason: str | None) -> None:
    told = latent_attention.supports(context("paged_attention", {**ATTENTION, **change}))
    assert told is None if reason is None else reason in str(told)


def test_what_the_other_kernels_serve() -> None:
    def expanded(**change: int) -> str | None:
        return expanded_attention.supports(context("expanded_attention", {**EXPANDED, **change}))

    assert expanded() is None
    assert "multiples of 8" in str(expanded(v_head_dim=12))
    assert "up to 256" in str(expanded(key_dim=256))
    sizes = {"num_heads": 2, "in_features": 128, "out_features": 512}
    for change, reason in (
        ({}, None),
        ({"in_features": 512, "out_features": 128}, None),
        ({"in_features": 40}, "40 inputs"),
        ({"in_features": 1024}, "1024 inputs"),
        ({"out_features": 24}, "24 outputs"),
    ):
        told = head_linear.supports(context("head_linear", {**sizes, **change}))
        assert told is None if reason is None else reason in str(told)
    rope = {"num_heads": 2, "latent_dim": 512, "rotary_dim": 7, "interleaved": 1, "norm": 1}
    op = "latent_rope_and_cache"
    assert "not pairs" in str(latent_rope.supports(context(op, rope)))
    wide = {**rope, "rotary_dim": 64, "latent_dim": 8192}
    assert "too wide" in str(latent_rope.supports(context(op, wide)))
    assert latent_rope.supports(context(op, {**rope, "rotary_dim": 64})) is None


def lengths(*pairs: tuple[int, int]) -> SimpleNamespace:
    """Of a batch whose requests, all of them context requests, have (new tokens, all tokens)."""
    query_lens, kv_lens = zip(*pairs, strict=True)
    return SimpleNamespace(query_lens=query_lens, kv_lens=kv_lens, num_contexts=len(pairs))


def test_keys_and_values_are_made_for_long_prompts_that_find_room() -> None:
    heads = ExpandedHeads.of(context("expanded_attention", EXPANDED))
    long, short, chunk = lengths((4096, 4096)), lengths((64, 64)), lengths((16, 4096))
    assert heads.gain(long) > expanded_attention.LEAST_GAIN > heads.gain(short)
    assert heads.gain(chunk) < 0  # few queries: making 4096 keys costs more than it saves
    assert heads.nbytes(long, 2) < expanded_attention.MOST_BYTES
    assert heads.nbytes(lengths((4096, 65536)), 2) > expanded_attention.MOST_BYTES
