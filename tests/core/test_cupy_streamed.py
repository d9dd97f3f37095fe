"""How streamed.cu is cut to blocks, and the maps that its copies read."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import tensor_map
from llmfw.kernels.cupy.compile import arch_of
from llmfw.kernels.cupy.products import STREAMED_ROWS, Role, serves
from llmfw.kernels.cupy.streamed import CUTS, SHARED_BYTES, Streamed, streamed_variants
from llmfw.ops.device import cuda_features
from llmfw.ops.kernel import DeviceInfo, OpContext

# The driver's function, as cuda.h declares it.
DRIVER = r"""
#include <stdint.h>
#include <string.h>
uint64_t seen[16];
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address,
    const uint64_t* sizes, const uint64_t* pitches, const uint32_t* box, const uint32_t* steps,
    int interleave, int swizzle, int promotion, int fill) {
  uint64_t all[] = {(uint64_t)map % 64, type, rank, (uint64_t)address, sizes[0], sizes[1],
                    pitches[0], box[0], box[1], swizzle, rank > 2 ? sizes[2] : 0,
                    rank > 2 ? pitches[1] : 0, rank > 2 ? box[2] : 0,
                    rank > 3 ? sizes[3] : 0, rank > 3 ? pitches[2] : 0, rank > 3 ? box[3] : 0};
  memcpy(seen, all, sizeof(all));
  memset(map, 7, 128);
  return pitches[0] % 16 ? 1 : 0;
}
"""


def linear_context(in_features: int, outputs: int, capability: tuple[int, int]) -> OpContext:
    features = cuda_features(*capability) | {"cuda", "cupy"}
    info = DeviceInfo(torch.device("cuda"), features)
    shape = {"in_features": in_features, "out_features": outputs, "bias": 0}
    return OpContext("linear", torch.bfloat16, info, shape)


@pytest.mark.parametrize("bucket", STREAMED_ROWS)
@pytest.mark.parametrize("in_features", [64, 1000, 4096, 14336])
@pytest.mark.parametrize("cut", CUTS)
def test_a_block_fits_the_memory_of_a_multiprocessor(
    cut: tuple[int, int], bucket: int, in_features: int
) -> None:
    for gated, role in itertools.product((False, True), Role):
        streamed = Streamed(*cut, gated=gated, role=role)
        assert streamed.stages(bucket, in_features) >= 1
        assert streamed.shared_bytes(bucket, in_features) <= SHARED_BYTES


def test_a_split_has_work_for_every_block() -> None:
    def splits(in_features: int, outputs: int) -> set[int]:
        found = streamed_variants(32, linear_context(in_features, outputs, (9, 0)), outputs)
        return {variant.split for variant in found}

    assert splits(2048, 1024) == {4}
    assert splits(512, 1024) == set()
    assert splits(4096, 4096) == {1, 2}
    assert splits(4096, 28672) == {1}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_tensor_cores_are_left_to_the_library(capability: tuple[int, int]) -> None:
    assert streamed_variants(32, linear_context(4096, 4096, capability), 4096) == ()
    assert streamed_variants(32, linear_context(4096, 4096, (9, 0)), 4096)
    assert streamed_variants(4, linear_context(4096, 4096, (9, 0)), 4096) == ()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_only_9_0_is_given_code_that_no_other_device_runs(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc = SimpleNamespace(getSupportedArchs=lambda: [80, 86, 87, 89, 90, 100, 120])
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert arch_of.__wrapped__(0) == arch


def test_only_aligned_rows_are_read_by_packs() -> None:
    x, weight = torch.zeros(64, dtype=torch.float16), torch.zeros(65, dtype=torch.float16)
    assert serves(x.view(1, 64), weight[:64].view(1, 64))
    assert not serves(x.view(1, 64), weight[1:].view(1, 64))
    assert not serves(x.view(2, 32).t(), weight[:64].view(2, 32))


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """One that notes what it is asked to encode, and refuses rows that are not aligned."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", "-w", "driver.c", "-o", "driver.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "driver.so"))
    monkeypatch.setattr(tensor_map, "driver", lambda: library)
    return library


ADDRESS = 0x7F0000001000


@pytest.fixture
def fresh() -> Iterator[None]:
    """No map of an earlier test."""
    for made in (tensor_map.tensor_map, tensor_map.cache_map):
        made.cache_clear()
    yield
    for made in (tensor_map.tensor_map, tensor_map.cache_map):
        made.cache_clear()


def seen_by(driver: ctypes.CDLL) -> list[int]:
    return list((ctypes.c_uint64 * 16).in_dll(driver, "seen"))


@pytest.mark.parametrize(
    ("box_rows", "whole", "expected"),
    [
        (64, False, [0, 9, 2, ADDRESS, 192, 50, 384, 64, 64, 3, 0, 0, 0, 0, 0, 0]),
        (8, True, [0, 9, 3, ADDRESS, 64, 50, 384, 64, 8, 3, 3, 128, 3, 0, 0, 0]),
    ],
)
def test_a_tensor_map_says_what_the_driver_needs(
    box_rows: int, whole: bool, expected: list[int], driver: ctypes.CDLL, fresh: None
) -> None:
    made = tensor_map.tensor_map(ADDRESS, 50, 192, torch.bfloat16, box_rows, whole)
    assert made == bytes([7]) * 128
    assert seen_by(driver) == expected


def test_a_cache_is_cut_to_a_heads_keys(driver: ctypes.CDLL, fresh: None) -> None:
    """5 blocks of 32 keys of 3 heads of 128 values, every other block of an allocation."""
    shape, strides = (5, 32, 3, 128), (2 * 32 * 3 * 128, 3 * 128, 128, 1)
    made = tensor_map.cache_map(ADDRESS, shape, strides, torch.bfloat16, 16)
    assert made == bytes([7]) * 128
    expected = [0, 9, 4, ADDRESS, 64, 32, 768, 64, 16, 3, 6, 128, 2, 5, 49152, 1]
    assert seen_by(driver) == expected


def test_rows_that_are_not_aligned_have_no_tensor_map(driver: ctypes.CDLL, fresh: None) -> None:
    with pytest.raises(KernelError, match="no tensor map"):
        tensor_map.tensor_map(ADDRESS, 50, 193, torch.bfloat16, 64)
