"""How tiled.cu is cut to blocks and clusters, and which cuts are worth measuring."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmfw.engine.cuda_graphs import batch_sizes
from llmfw.kernels.cupy import tile_plan
from llmfw.kernels.cupy.products import BUCKETS, TILED_ROWS, bucket_of, by_rows
from llmfw.kernels.cupy.tile_plan import ALIKE, MEASURED, Product, best_cuts, cuts, estimate
from llmfw.kernels.cupy.tiled import SHARED_BYTES, Tiled
from llmfw.ops.device import cuda_features
from llmfw.ops.kernel import DeviceInfo, OpContext

SMS = 132


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", TILED_ROWS)
def test_every_cut_fits_a_multiprocessor_and_a_cluster(rows: int, gated: bool) -> None:
    found = list(cuts(Product(rows, 4096, 8192, gated)))
    assert len(found) == len({cut.name for cut in found}) > 10
    for cut in found:
        weight, x = cut.stages(rows)
        assert weight >= x >= 2
        assert cut.shared_bytes(rows) <= SHARED_BYTES
        assert cut.cluster <= 8
        assert rows // cut.share % 8 == 0
        assert cut.tile // 8 % (1 + gated) == 0


def test_tiles_fill_the_last_round() -> None:
    """Of two rounds of tiles the second is as full as the first; one that is half empty loses."""
    product = Product(256, 4096, 28672, gated=True)
    best, *_ = best_cuts(product, SMS, 1)
    clusters, at_once = best.clusters(product.weight_rows), best.at_once(SMS)
    assert clusters > 0.95 * -(-clusters // at_once) * at_once
    uneven = Tiled(160, best.share, best.split, True, best.parts)
    assert estimated(best, product) < estimated(uneven, product)


def estimated(cut: Tiled, product: Product) -> float:
    time = estimate(cut, product, SMS)
    assert time is not None
    return time


def test_sums_are_split_where_there_are_few_tiles() -> None:
    def splits(rows: int, in_features: int, weight_rows: int) -> set[int]:
        product = Product(rows, in_features, weight_rows)
        return {cut.split for cut in best_cuts(product, SMS, 2)}

    assert 1 not in splits(128, 14336, 4096)
    assert 1 not in splits(256, 3072, 1024)
    assert splits(256, 1024, 4096) == {1}
    assert splits(128, 64, 4096) == {1}  # one chunk cannot be split


def test_rows_of_x_are_divided_where_that_fills_the_device() -> None:
    """32 tiles of 128 rows of the weight become 128 with quarters of x, or 64 rows with halves."""
    small, *_ = best_cuts(Product(256, 1024, 4096), SMS, 1)
    assert small.parts * small.clusters(4096) * small.cluster > 0.9 * SMS
    assert small.parts > 1
    large, *_ = best_cuts(Product(256, 4096, 28672, gated=True), SMS, 1)
    assert large.parts == 1


@pytest.mark.parametrize("rows", TILED_ROWS)
def test_a_warp_of_its_own_asks_for_tiles_where_registers_are_left(rows: int) -> None:
    for cut in cuts(Product(rows, 4096, 8192)):
        brings = cut.block_rows(rows) <= 128
        assert cut.has_bringer(rows) == brings
        assert cut.threads(rows) == 128 * cut.groups(rows) + 32 * brings
        sums = cut.block_rows(rows) // cut.groups(rows) * cut.tile // 128
        warps = -(-cut.threads(rows) // 128)  # of a quarter of a multiprocessor, which has its own
        assert warps * 32 * (sums + 24) <= 1 << 14  # registers: 9 warps have 168 a thread, not 224


def test_blocks_of_a_split_run_at_the_same_time() -> None:
    product = Product(128, 4096, 4096)
    assert estimate(Tiled(144, split=4), product, SMS) is not None
    assert estimate(Tiled(128, split=4), product, SMS) is None  # 32 clusters, of which 30 run
    assert estimate(Tiled(64, split=1), product, 22) is not None  # three rounds


def test_cuts_that_compete_differ() -> None:
    found = best_cuts(Product(256, 4096, 6144), SMS, 8)
    assert len(found) == 8
    kinds = {(cut.parts, cut.share, cut.split) for cut in found}
    assert 1 < len(kinds) < 8
    for kind in kinds:
        tiles = sorted(c.tile for c in found if (c.parts, c.share, c.split) == kind)
        assert all(more - less >= ALIKE for less, more in pairwise(tiles))


def context(capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> OpContext:
    features = cuda_features(*capability) | {"cuda", "cupy"}
    info = DeviceInfo(torch.device("cuda", 0), features)
    return OpContext("linear", dtype, info, {"in_features": 1536, "out_features": 512, "bias": 0})


def test_other_tensor_cores_and_other_rows_are_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Properties:
        multi_processor_count = SMS

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert tile_plan.tiled_variants(128, context(capability), 512) == ()
    assert tile_plan.tiled_variants(64, context((9, 0)), 512) == ()
    assert tile_plan.tiled_variants(128, context((9, 0), torch.float32), 512) == ()
    assert len(tile_plan.tiled_variants(128, context((9, 0)), 512)) == MEASURED


def test_what_lost_everywhere_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, whose tiles go around too often, and long sums of many rows, behind in whole steps."""
    monkeypatch.setattr(tile_plan, "multiprocessors", lambda _: SMS)

    def offered(rows: int, in_features: int, outputs: int) -> int:
        base = context((9, 0))
        shape = {"in_features": in_features, "out_features": outputs, "bias": 0}
        wanted = OpContext("linear", base.dtype, base.info, shape)
        return len(tile_plan.tiled_variants(rows, wanted, outputs))

    for outputs in (4096, 6144, 28672):
        assert offered(128, 4096, outputs) == offered(256, 4096, outputs) == MEASURED
    assert offered(128, 14336, 4096) == MEASURED
    assert offered(256, 14336, 4096) == 0
    assert offered(256, 3072, 1024) == MEASURED
    for rows in TILED_ROWS:
        assert offered(rows, 4096, 128256) == offered(rows, 1024, 151936) == 0


def test_every_batch_of_a_graph_has_a_bucket() -> None:
    for size in batch_sizes(256):
        bucket = bucket_of(size)
        assert bucket is not None
        assert size <= bucket
    assert bucket_of(3) is None
    assert bucket_of(257) is None


def test_products_are_found_by_rows() -> None:
    def product(*_: object) -> None:
        """Stands for a compiled one."""

    table = by_rows(dict.fromkeys(BUCKETS, product))
    assert len(table) == 257
    assert [rows for rows, found in enumerate(table) if found is None] == [0, 3]
    assert len(by_rows({64: product})) == 65
    assert by_rows({}) == ()
