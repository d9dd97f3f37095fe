"""What a launch hands to the driver, read back by a C library in the driver's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import launch
from llmfw.kernels.cupy.float32_linear import TILES, tile_for

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

# The types of cuda.h, and what was seen at the last launch.
DRIVER = r"""
#include <stdint.h>
#include <string.h>
typedef union { char room[64]; int serialization; unsigned cluster[3]; } Value;
typedef struct { int id; char pad[4]; Value value; } Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
unsigned seen_sizes[7];
void* seen_stream;
int seen_attribute[3];
unsigned seen_cluster[4];
char seen_map[128];
int map_is_first;
struct { void* p; int64_t q; int i; float f; int last; } seen;
int result;
int cuLaunchKernelEx(const Config* config, void* function, void** args, void** extra) {
  memcpy(seen_sizes, config->grid, sizeof(seen_sizes));
  seen_stream = config->stream;
  seen_attribute[0] = config->count;
  if (config->count) {
    seen_attribute[1] = config->attributes[0].id;
    seen_attribute[2] = config->attributes[0].value.serialization;
  }
  if (config->count > 1) {
    seen_cluster[0] = config->attributes[1].id;
    memcpy(seen_cluster + 1, config->attributes[1].value.cluster, 12);
  }
  if (map_is_first) {
    memcpy(seen_map, args[0], 128);
    seen.last = *(int*)args[1];
    return result;
  }
  seen.i = *(int*)args[0];
  seen.p = *(void**)args[1];
  seen.f = *(float*)args[2];
  seen.q = *(int64_t*)args[3];
  seen.last = *(int*)args[4];
  int right = sizeof(Config) == 56 && sizeof(Attribute) == 72 && function == (void*)77 && !extra;
  return right ? result : -1;
}
int seen_allowed;
int cuFuncSetAttribute(void* function, int attribute, int value) {
  seen_allowed = attribute == 8 ? value : -1;
  return result;
}
int cuGetErrorName(int code, const char** text) { *text = "SOME_ERROR"; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", "driver.c", "-o", "driver.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "driver.so"))
    launch.declare(library)
    monkeypatch.setattr(launch, "driver", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x1000 + index, False)
    return library


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_launch_packs_what_the_driver_reads(driver: ctypes.CDLL, overlaps: bool) -> None:
    launcher = launch.Launcher(SimpleNamespace(ptr=77), "k", "iPfqi", 3, overlaps)
    launcher((7, 8, 9), (32, 2, 1), -5, 1 << 40, 0.5, -(1 << 50), 6)

    sizes = (ctypes.c_uint * 7).in_dll(driver, "seen_sizes")
    assert list(sizes) == [7, 8, 9, 32, 2, 1, 0]
    assert ctypes.c_void_p.in_dll(driver, "seen_stream").value == 0x1003
    attribute = (ctypes.c_int * 3).in_dll(driver, "seen_attribute")
    assert list(attribute) == ([1, launch.PROGRAMMATIC_SERIALIZATION, 1] if overlaps else [0, 0, 0])
    seen = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(driver, "seen")), 32)
    assert seen[:8] == (1 << 40).to_bytes(8, "little")
    assert int.from_bytes(seen[8:16], "little", signed=True) == -(1 << 50)
    assert int.from_bytes(seen[16:20], "little", signed=True) == -5
    assert seen[20:24] == bytes.fromhex("0000003f")
    assert int.from_bytes(seen[24:28], "little", signed=True) == 6


def test_a_launch_in_clusters_takes_tensor_maps(driver: ctypes.CDLL) -> None:
    ctypes.c_int.in_dll(driver, "map_is_first").value = 1
    launcher = launch.Launcher(SimpleNamespace(ptr=77), "k", "Ti", 0, True, 999, cluster=4)
    launcher((8, 1, 1), (32, 1, 1), bytes(range(128)), 5)

    assert list((ctypes.c_uint * 7).in_dll(driver, "seen_sizes"))[6] == 999
    assert bytes((ctypes.c_ubyte * 128).in_dll(driver, "seen_map")) == bytes(range(128))
    attributes = (ctypes.c_int * 3).in_dll(driver, "seen_attribute")
    assert list(attributes) == [2, launch.PROGRAMMATIC_SERIALIZATION, 1]
    cluster = (ctypes.c_uint * 4).in_dll(driver, "seen_cluster")
    assert list(cluster) == [launch.CLUSTER_DIMENSION, 4, 1, 1]
    seen = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(driver, "seen")), 32)
    assert int.from_bytes(seen[24:28], "little") == 5


@pytest.mark.parametrize(("shared", "allowed"), [(46 << 10, 0), (48 << 10, 48 << 10)])
def test_shared_memory_is_asked_for_before_the_sources_own_makes_it_too_much(
    driver: ctypes.CDLL, shared: int, allowed: int
) -> None:
    launch.Launcher(SimpleNamespace(ptr=77), "k", "i", 0, shared_bytes=shared)
    assert ctypes.c_int.in_dll(driver, "seen_allowed").value == allowed


def test_shared_memory_that_a_device_lacks_is_an_error(driver: ctypes.CDLL) -> None:
    ctypes.c_int.in_dll(driver, "result").value = 1
    with pytest.raises(KernelError, match="k needs 300000 bytes of shared memory"):
        launch.Launcher(SimpleNamespace(ptr=77), "k", "i", 0, shared_bytes=300_000)


def test_a_refused_launch_says_which(driver: ctypes.CDLL) -> None:
    launcher = launch.Launcher(SimpleNamespace(ptr=77), "k", "iPfqi", 0)
    ctypes.c_int.in_dll(driver, "result").value = 1
    with pytest.raises(KernelError, match=r"k with grid \(1, 1, 1\).* SOME_ERROR"):
        launcher((1, 1, 1), (32, 1, 1), 0, 0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "outputs", "tile"),
    [
        (1, 64, (1, 1)),
        (8, 64, (2, 1)),
        (32, 64, (4, 4)),
        (64, 64, (8, 4)),
        (128, 64, (16, 4)),
        (1000, 64, (16, 8)),
        (16, 256, (8, 4)),
        (64, 256, (16, 8)),
    ],
)
def test_the_largest_tile_of_a_router_that_leaves_no_multiprocessor_idle(
    rows: int, outputs: int, tile: tuple[int, int]
) -> None:
    assert TILES[tile_for(rows, outputs, 132)] == tile
