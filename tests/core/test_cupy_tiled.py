"""How tiled.cu is cut to blocks and clusters, and which cuts are worth measuring."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmfw.engine.cuda_graphs import batch_sizes
from llmfw.kernels.cupy import tile_plan
from llmfw.kernels.cupy.products import BUCKETS, TILED_ROWS, bucket_of, by_rows
from llmfw.kernels.cupy.tile_plan import ALIKE, KINDS, MEASURED, Product, best_cuts, cuts, estimate
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
    uneven = Tiled(160, best.share, gated=True)
    assert estimated(best, product) < estimated(uneven, product)


def estimated(cut: Tiled, product: Product) -> float:
    time = estimate(cut, product, SMS)
    assert time is not None
    return time


def test_sums_are_split_where_there_are_few_tiles() -> None:
    def splits(in_features: int, weight_rows: int) -> set[int]:
        return {cut.split for cut in best_cuts(Product(256, in_features, weight_rows), SMS, 2)}

    assert splits(14336, 4096) == {4}
    assert splits(4096, 128256) == {1}
    assert splits(128, 64) == {1}  # two chunks are too few for four blocks


def test_blocks_of_a_split_run_at_the_same_time() -> None:
    product = Product(128, 4096, 4096)
    assert estimate(Tiled(144, split=4), product, SMS) is not None
    assert estimate(Tiled(128, split=4), product, SMS) is None  # 32 clusters, of which 30 run
    assert estimate(Tiled(64, split=1), product, 16) is not None


def test_cuts_that_compete_differ() -> None:
    found = best_cuts(Product(256, 4096, 6144), SMS, 6)
    assert len(found) == 6
    for kind in KINDS:
        tiles = sorted(cut.tile for cut in found if (cut.share, cut.split) == kind)
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


def test_what_lost_everywhere_is_not_measured() -> None:
    """Cuts won for gate and up in one, and for long sums."""
    promising = tile_plan.is_promising
    assert promising(Product(256, 4096, 28672, gated=True))
    assert promising(Product(128, 14336, 4096))
    assert promising(Product(256, 14336, 4096))
    assert promising(Product(128, 3072, 1024))
    assert not promising(Product(256, 3072, 1024))
    assert not promising(Product(256, 4096, 4096))
    assert not promising(Product(128, 4096, 6144))
    assert not promising(Product(128, 4096, 128256))


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
