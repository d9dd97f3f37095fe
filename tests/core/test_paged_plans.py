"""How attention over the paged cache is divided: what needs no GPU to decide."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy import paged_decode
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.paged_plan import (
    ALIGNED_BYTES,
    COPYING_SHARED_BYTES,
    RESERVED_BYTES,
    SYSTEM_BYTES,
    Cut,
    Device,
    Heads,
    copied_cut,
    plan_launch,
    staged_cut,
)
from llmfw.ops.kernel import DeviceInfo, OpContext
from llmfw.ops.table import SELECT_VARIABLE, OpTable

SMS = 132
WIDE_HEADS = [(144, 144), (192, 192), (256, 128), (256, 256), (64, 256)]


def heads(head_dim: int, v_dim: int, group: int = 2) -> Heads:
    return Heads(4 * group, 4, head_dim, v_dim, 16, False)


@pytest.mark.parametrize("shared", [227, 163, 99])
@pytest.mark.parametrize(("head_dim", "v_dim"), WIDE_HEADS)
@pytest.mark.parametrize("blocks", [1, SMS, SMS + 1, 4096])
def test_tiles_under_way_fit_every_gpu_we_name(
    shared: int, head_dim: int, v_dim: int, blocks: int
) -> None:
    """In a block's shared memory, and as many blocks in a multiprocessor's, which has 1 KB more."""
    layer = heads(head_dim, v_dim)
    cut = staged_cut(layer, blocks, Device(SMS, shared << 10))
    block = cut.shared_bytes(layer) + RESERVED_BYTES - SYSTEM_BYTES
    assert block <= shared << 10
    assert cut.resident * (block + SYSTEM_BYTES) <= (shared + 1) << 10
    assert cut.warps * cut.resident <= 8
    assert 2 <= cut.stages <= (3 if blocks <= SMS else 2)


@pytest.mark.parametrize(
    ("shared", "few", "many"),
    [
        (227, Cut(4, 1, 3), Cut(4, 1, 2)),
        (163, Cut(4, 1, 2), Cut(4, 1, 2)),
        (99, Cut(2, 1, 3), Cut(2, 1, 2)),
    ],
)
def test_less_shared_memory_means_fewer_tiles_then_fewer_warps(
    shared: int, few: Cut, many: Cut
) -> None:
    device = Device(SMS, shared << 10)
    assert staged_cut(heads(256, 256), SMS, device) == few
    assert staged_cut(heads(256, 256), SMS + 1, device) == many


def test_smaller_tiles_let_more_warps_and_blocks_in() -> None:
    device = Device(SMS, 227 << 10)
    assert staged_cut(heads(144, 144), 8, device) == Cut(8, 1, 3)
    assert staged_cut(heads(144, 144), 300, device) == Cut(4, 2, 2)


@pytest.mark.parametrize(("head_dim", "v_dim"), [(64, 64), (128, 128), (192, 128), (192, 192)])
@pytest.mark.parametrize("few", [True, False])
def test_copied_tiles_fit_their_gpu(head_dim: int, v_dim: int, few: bool) -> None:
    """As many blocks as shall be resident, with what aligns tiles and what the system takes."""
    layer = heads(head_dim, v_dim)
    cut = copied_cut(layer, few)
    block = cut.shared_bytes(layer) + RESERVED_BYTES - SYSTEM_BYTES + ALIGNED_BYTES
    assert block <= COPYING_SHARED_BYTES
    assert cut.resident * (block + SYSTEM_BYTES) <= COPYING_SHARED_BYTES + 1024
    assert 2 <= cut.stages <= 6


@pytest.mark.parametrize(
    ("dim", "requests", "cut"),
    [(128, 256, Cut(4, 2, 3)), (128, 8, Cut(8, 1, 3)), (64, 256, Cut(4, 2, 6))],
)
def test_tensor_copies_bring_tiles_where_they_were_asked_for(
    dim: int, requests: int, cut: Cut
) -> None:
    device = Device(SMS, 227 << 10)
    plan = plan_launch(heads(dim, dim), requests, 1, 960, device, copied=True)
    assert plan.cut == replace(cut, copied=True)
    assert not plan_launch(heads(dim, dim), requests, 1, 960, device).cut.copied


HOPPER = ("sm_80", "sm_89", "sm_90")
STREAMED, PLAIN = "cupy.paged_streamed", "cupy.paged_attention"


def chosen(
    select: str = "auto", features: tuple[str, ...] = HOPPER, **shape: int
) -> tuple[str, dict[str, str]]:
    """What serves bfloat16 attention, and why not what was asked before; nothing is built."""
    info = DeviceInfo(torch.device("cpu"), frozenset({"cuda", "cupy", *features}))
    table = OpTable(info, tuple(each for each in KERNELS if each.name in {STREAMED, PLAIN}), select)
    static = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 128, "block_size": 16, **shape}
    context = OpContext("paged_attention", torch.bfloat16, info, static)
    refused: dict[str, str] = {}
    for kernel in table.ranked(context.op):
        reason = table.refusal(kernel, context)
        if reason is None:
            return kernel.name, refused
        refused[kernel.name] = reason
    return "reference", refused


def test_tensor_copies_are_switched_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == (STREAMED, {})
    assert chosen(f"-{PLAIN}") == (STREAMED, {})
    off = (PLAIN, {STREAMED: "switched off by name"})
    assert chosen(f"-{STREAMED}") == off
    monkeypatch.setenv(SELECT_VARIABLE, f"-{STREAMED}")
    assert chosen() == off
    assert chosen(PLAIN) == (PLAIN, {})
    assert chosen(f"-{STREAMED},-{PLAIN}")[0] == "reference"


@pytest.mark.parametrize(
    ("features", "shape", "reason"),
    [
        (("sm_80",), {}, "needs the tensor copies of compute capability 9.0"),
        ((*HOPPER, "sm_100"), {}, "needs the tensor copies of compute capability 9.0"),
        (HOPPER, {"head_dim": 80}, "head sizes 80 and 80 are not multiples of 64"),
        (HOPPER, {"v_head_dim": 112}, "head sizes 128 and 112 are not multiples of 64"),
        (HOPPER, {"block_size": 24}, "block size 24 is not a multiple of 16"),
        (HOPPER, {"head_dim": 256}, "too little for 2 tiles a warp of head sizes 256 and 256"),
    ],
)
def test_what_tensor_copies_cannot_bring_goes_the_plain_way(
    features: tuple[str, ...], shape: dict[str, int], reason: str
) -> None:
    name, refused = chosen(features=features, **shape)
    assert name == PLAIN
    assert reason in refused[STREAMED]


def test_too_little_shared_memory_is_an_error() -> None:
    with pytest.raises(KernelError, match="49152 bytes of shared memory are too few"):
        staged_cut(heads(256, 256), 1, Device(SMS, 48 << 10))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(64, 64), (128, 128), (96, 64), *WIDE_HEADS])
def test_plans_fill_the_device_once(head_dim: int, v_dim: int) -> None:
    layer, device = heads(head_dim, v_dim), Device(SMS, 227 << 10)
    for requests in (1, 8, 16, 17, 64, 300):
        for longest in (1, 192, 1024, 9000):
            plan = plan_launch(layer, requests, 1, longest, device)
            slots, blocks = SMS * plan.cut.resident, plan.columns * requests
            assert (plan.cut.stages > 0) == (max(head_dim, v_dim) > 128)
            assert plan.columns == 4
            assert 1 <= plan.splits <= max(1, -(-longest // (16 * plan.cut.warps)))
            if blocks <= slots // 2:
                assert blocks * plan.splits <= slots


def test_rows_of_drafts_share_a_block_as_far_as_registers_go() -> None:
    device = Device(SMS, 227 << 10)
    plans = [plan_launch(heads(dim, dim, 4), 1, 4, 100, device) for dim in (128, 256)]
    assert [(plan.rows, plan.columns) for plan in plans] == [(16, 4), (8, 8)]


def test_tiles_are_asked_for_ahead_up_to_two_waves_of_blocks() -> None:
    shape, device = heads(128, 128, 2), Device(SMS, 227 << 10)
    columns = plan_launch(shape, 1, 1, 960, device).columns
    two_waves = 2 * SMS * 2 // columns
    ahead = [
        plan_launch(shape, n, 1, 960, device).cut.ahead for n in (1, 8, two_waves, 2 * two_waves)
    ]
    assert ahead == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("head_dim", "source", "cut", "shared"),
    [
        (128, "paged_decode", Cut(8, 1, ahead=1), 0),
        (256, "paged_staged", Cut(4, 1, 3), 4 * 3 * 16 * 2 * 256 * 2),
        (64, "paged_streamed", Cut(8, 1, 6, copied=True), 8 * 6 * (16 * 2 * 64 * 2 + 8)),
    ],
)
def test_head_size_and_copies_choose_the_source(
    head_dim: int, source: str, cut: Cut, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(multi_processor_count=SMS, shared_memory_per_block_optin=227 << 10)
    loaded: list[object] = []

    def load(file: str, device: torch.device, dtype: torch.dtype, **defines: int) -> object:
        def launcher(name: str, signature: str, shared_bytes: int) -> object:
            loaded.append((file, name, defines["WARPS"], defines.get("STAGES", 0), shared_bytes))
            return object()

        return SimpleNamespace(launcher=launcher)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(paged_decode, "load", load)
    info = DeviceInfo(torch.device("cpu", 0), frozenset({"cuda", "cupy"}))
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": head_dim, "block_size": 16}
    context = OpContext("paged_attention", torch.bfloat16, info, shape)
    decode = paged_decode.PagedDecode(context, cut.copied)
    plan = decode.plan(1, 1, 192)
    assert plan.cut == cut
    first, second = (decode.launcher(plan.rows, plan.cut) for _ in range(2))
    assert first is second
    assert loaded == [(f"{source}.cu", source, cut.warps, cut.stages, shared)]
