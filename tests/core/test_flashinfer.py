"""The FlashInfer pack without FlashInfer: what it declares, refuses, and hands to the library."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flashinfer_stand_in import Wrapper
from llmfw.attention.metadata import CacheGroupView
from llmfw.errors import KernelError
from llmfw.kernels.cupy import attention as mixed
from llmfw.kernels.cupy.attention import context_batch
from llmfw.kernels.cupy.declarations import KERNELS as CUPY
from llmfw.kernels.cupy.prefill import ContextBatch, Prefill
from llmfw.kernels.flashinfer import attention, declarations, pack
from llmfw.kernels.flashinfer.attention import PagedPrefill
from llmfw.kernels.flashinfer.pages import indices_of, pages_of
from llmfw.ops import reference
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.table import OpTable

CPU = torch.device("cpu")
HOPPER = DeviceInfo(CPU, frozenset({"cuda", "cupy", "sm_80", "sm_89", "sm_90"}))
AMPERE = DeviceInfo(CPU, frozenset({"cuda", "cupy", "sm_80"}))
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 64, "block_size": 16}
SHAPE |= {"window": 0, "softcap": 0, "sinks": 0}
STREAMED, KERNEL = sorted(pack.llmfw_kernels(HOPPER), key=lambda kernel: -kernel.priority)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Wrapper]:
    """A module `flashinfer` with the wrapper; gives the wrappers that were made."""
    Wrapper.made = []
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return Wrapper.made


def context(info: DeviceInfo = HOPPER, dtype: torch.dtype = torch.bfloat16, **shape: int):
    return OpContext("paged_attention", dtype, info, {**SHAPE, **shape})


def arguments(
    ctx: OpContext, requests: tuple[tuple[int, int], ...], contexts: int, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    metadata, view, blocks = paged_batch(requests, contexts, ctx["block_size"], generator, CPU)
    kv_shape = (blocks, ctx["block_size"], ctx["num_kv_heads"], ctx["head_dim"])
    q_shape = (sum(n for n, _ in requests), ctx["num_heads"], ctx["head_dim"])
    q, k, v = (torch.randn(each, generator=generator) for each in (q_shape, kv_shape, kv_shape))
    sinks = torch.randn(ctx["num_heads"], generator=generator) if ctx["sinks"] else None
    extras = {
        "window": ctx["window"] or None,
        "softcap": 5.0 if ctx["softcap"] else None,
        "sinks": sinks,
    }
    parts = tuple(each.to(ctx.dtype) for each in (q, k, v))
    return (*parts, metadata, view, ctx["head_dim"] ** -0.5), extras


LAYOUTS: list[dict[str, int]] = [
    {},
    {"window": 20},
    {"softcap": 1},
    {"window": 7, "softcap": 1, "sinks": 1},
    {"block_size": 8, "num_kv_heads": 8, "sinks": 1},
    {"head_dim": 128, "v_head_dim": 128, "num_kv_heads": 1, "block_size": 24},
]
CONTEXTS = {
    "whole": ((37, 37),),
    "chunk": ((21, 90),),
    "one token": ((1, 1),),
    "last page full": ((16, 48), (5, 32)),
    "ragged": ((300, 300), (1, 17), (64, 129), (15, 16)),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONTEXTS)
def test_prompts_and_chunks_are_what_the_reference_says(
    library: list[Wrapper], layout: dict[str, int], name: str
) -> None:
    ctx = context(dtype=torch.float32, **layout)
    (q, k, v, metadata, view, scale), extras = arguments(ctx, CONTEXTS[name], len(CONTEXTS[name]))
    prefill = PagedPrefill(ctx)
    batch = context_batch(metadata)
    out = prefill(
        q, k, v, view.block_tables, batch, scale, extras["window"], extras["sinks"],
        extras["softcap"],
    )  # fmt: skip
    expected = reference.paged_attention(q, k, v, metadata, view, scale, **extras)
    torch.testing.assert_close(out.flatten(1), expected, rtol=1e-4, atol=1e-5)


class DecodeByReference:
    """Stands for the CuPy pack's kernel of generation requests."""

    def __init__(self, context: OpContext, copied: bool) -> None:
        self.heads = attention.Heads.of(context)
        self.copied = copied
        self.served: list[tuple[int, int]] = []

    def __call__(
        self, out, q, k, v, tables, cu_query_lens, kv_lens, *, first_request, requests, max_q,
        max_kv, scale, window, softcap, sinks, settled,
    ) -> None:  # fmt: skip
        self.served.append((first_request, requests))
        for row in range(first_request, first_request + requests):
            first, last = (int(each) for each in cu_query_lens[row : row + 2])
            view = CacheGroupView(tables[row : row + 1], torch.empty(0), self.heads.block_size)
            one = SimpleNamespace(query_lens=(last - first,), kv_lens=(int(kv_lens[row]),))
            out[first:last] = reference.paged_attention(
                q[first:last], k, v, one, view, scale, window, softcap, sinks
            )


def attend(
    ctx: OpContext,
    monkeypatch: pytest.MonkeyPatch,
    least_work: float = 0.0,
    kernel: Kernel = KERNEL,
) -> tuple[Any, list[DecodeByReference]]:
    """The op with generation requests by the reference."""
    made: list[DecodeByReference] = []

    def decode(ctx: OpContext, copied: bool) -> DecodeByReference:
        made.append(DecodeByReference(ctx, copied))
        return made[-1]

    monkeypatch.setattr(mixed, "PagedDecode", decode)
    monkeypatch.setattr(attention, "LEAST_WORK", least_work)
    monkeypatch.setattr(attention, "fills_tiles", lambda heads, batch: True)
    return kernel.build(ctx), made


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_mixed_batches_are_what_the_reference_says(
    library: list[Wrapper], monkeypatch: pytest.MonkeyPatch, layout: dict[str, int], seed: int
) -> None:
    """Batches drawn at random: contexts by FlashInfer, generations by the other kernel."""
    ctx = context(dtype=torch.float32, **layout)
    call, made = attend(ctx, monkeypatch)
    draw = torch.Generator().manual_seed(100 + seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=draw))

    contexts, generations = number(4), number(3)
    requests = []
    for row in range(contexts + generations):
        new = number(50) if row < contexts else 1
        requests.append((new, new + number(90) - 1))
    args, extras = arguments(ctx, tuple(requests), contexts, seed)
    out = call(*args, **extras)
    expected = reference.paged_attention(*args, **extras)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert made[0].served == [(contexts, generations)]


def test_short_prompts_stay_with_the_kernel_for_generations(
    library: list[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(dtype=torch.float32)
    call, made = attend(ctx, monkeypatch, least_work=2e9)
    args, extras = arguments(ctx, ((20, 20), (1, 40)), 1)
    torch.testing.assert_close(call(*args, **extras), reference.paged_attention(*args, **extras))
    assert made[0].served == [(0, 1), (1, 1)]
    assert library[0].plans == 1  # that of one token, which loads the kernels


def test_prompts_in_between_are_gathered(
    library: list[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work counts the keys that are seen: of a whole prompt half of them, no more than a window."""
    monkeypatch.setattr(attention, "fills_tiles", lambda heads, batch: True)
    ctx = context(dtype=torch.float32)
    paged, served = PagedPrefill(ctx), []

    class Gathering:
        def serves(self, batch: ContextBatch) -> bool:
            return batch.max_kv >= 100

        def __call__(self, q: torch.Tensor, *rest: Any) -> torch.Tensor:
            served.append(len(q))
            return q

    first = attention.FirstOf(paged, Gathering())
    for requests, works in ((((100, 100),), 5000), (((10, 90), (20, 100)), 10 * 85 + 20 * 90)):
        (q, k, v, metadata, view, scale), _ = arguments(ctx, requests, len(requests))
        batch = context_batch(metadata)
        assert paged.work(batch) == 4 * works * 8 * 64
        for least, gathered in ((paged.work(batch), []), (paged.work(batch) + 1, [len(q)])):
            monkeypatch.setattr(attention, "LEAST_WORK", least)
            assert first.serves(batch)
            served.clear()
            first(q, k, v, view.block_tables, batch, scale, None)
            assert served == gathered
    windowed = PagedPrefill(context(dtype=torch.float32, window=30))
    assert windowed.work(batch) == 4 * 30 * 30 * 8 * 64
    assert not first.serves(context_batch(arguments(ctx, ((9, 9),), 1)[0][3]))


def test_few_queries_stay_where_keys_are_split(library: list[Wrapper]) -> None:
    """Of a short chunk after a long prefix, unless the other kernel is slow at it anyway."""
    long = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128}
    wide = {**long, "head_dim": 256, "v_head_dim": 256}
    for shape, requests, serves in (
        (long, ((64, 30_000),), False),
        (long, ((512, 8192),), True),
        (long, ((512, 512),), False),  # too little work
        (wide, ((64, 30_000),), True),
        (wide, ((512, 512),), False),
        ({**wide, "softcap": 1}, ((512, 512),), True),
        ({**wide, "softcap": 1}, ((128, 128),), False),
    ):
        ctx = context(**shape)
        metadata, _, _ = paged_batch(requests, 1, 16, torch.Generator(), CPU)
        assert PagedPrefill(ctx).serves(context_batch(metadata)) == serves, (shape, requests)


@pytest.mark.parametrize(
    ("requests", "serves"),
    [
        (((64, 8192),), False),
        (((128, 2176),), False),
        (((16, 2064),) * 8, False),
        (((512, 8192),), True),
        (((128, 128),) * 16, True),
        (((256, 256),), False),
    ],
)
def test_gathering_wants_queries_that_fill_its_tiles(
    requests: tuple[tuple[int, int], ...], serves: bool
) -> None:
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128}
    metadata, _, _ = paged_batch(requests, len(requests), 16, torch.Generator(), CPU)
    assert Prefill(context(**shape)).serves(context_batch(metadata)) == serves


def test_it_is_built_where_tensors_are_on_the_meta_device(library: list[Wrapper]) -> None:
    with torch.device("meta"):
        prefill = PagedPrefill(context(dtype=torch.float32))
    assert {each.device for each in library[0].indices} == {CPU}
    assert prefill.backend == "fa3"


def test_a_step_is_planned_once_for_all_layers(
    library: list[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(dtype=torch.float32)
    call, _ = attend(ctx, monkeypatch)
    args, extras = arguments(ctx, CONTEXTS["ragged"], 4)
    (wrapper,) = library
    before = wrapper.plans
    for _ in range(3):
        call(*args, **extras)
    assert wrapper.plans == before + 1
    *rest, scale = args
    call(*rest, 2 * scale, **extras)  # a layer that scales otherwise
    assert wrapper.plans == before + 2
    assert wrapper.limits[0] == 2 * scale
    metadata = args[3]
    call(*args[:3], replace(metadata), *args[4:], **extras)
    assert wrapper.plans == before + 3


def test_other_tables_are_other_pages(library: list[Wrapper]) -> None:
    """Two groups of layers of one batch: the same lengths, other blocks."""
    ctx = context(dtype=torch.float32)
    (q, k, v, metadata, view, scale), _ = arguments(ctx, CONTEXTS["ragged"], 4)
    prefill, batch = PagedPrefill(ctx), context_batch(metadata)
    moved = view.block_tables.flip(1).roll(1, 0).contiguous()
    for tables in (view.block_tables, moved, view.block_tables):
        out = prefill(q, k, v, tables, batch, scale, None)
        now = replace(view, block_tables=tables)
        expected = reference.paged_attention(q, k, v, metadata, now, scale)
        torch.testing.assert_close(out.flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_pages_are_in_one_list_with_the_length_of_each_last_one() -> None:
    pages = pages_of((1, 16, 17, 48), 16)
    assert pages.counts == (1, 1, 2, 3)
    assert pages.starts == (0, 1, 2, 4, 7)
    assert pages.last == (1, 16, 1, 16)
    tables = torch.tensor([[5, -1, -1], [4, -1, -1], [3, 2, -1], [8, 7, 6], [9, 9, 9]]).int()
    assert indices_of(pages, tables).tolist() == [5, 4, 3, 2, 8, 7, 6]
    narrow = torch.cat((tables, tables), dim=1)[:, :3]  # rows that lie apart
    assert indices_of(pages, narrow).tolist() == [5, 4, 3, 2, 8, 7, 6]


@pytest.mark.parametrize(("info", "backend"), [(HOPPER, "fa3"), (AMPERE, "fa2")])
def test_the_device_says_which_kernels(
    library: list[Wrapper], monkeypatch: pytest.MonkeyPatch, info: DeviceInfo, backend: str
) -> None:
    monkeypatch.setitem(attention.WORKSPACE, "fa2", 1 << 10)
    call, _ = attend(context(info), monkeypatch)
    assert library[0].backend == backend
    assert call.details == f"long prompts by FlashInfer's {backend}"


def test_it_goes_first_only_where_it_was_measured() -> None:
    newer = replace(HOPPER, features=HOPPER.features | {"sm_100"})
    cupy = max(each.priority for each in CUPY if each.name in declarations.BASES)
    for info, first in ((HOPPER, True), (AMPERE, False), (newer, False)):
        for kernel in pack.llmfw_kernels(info):
            assert (kernel.priority > cupy) == first
            assert (kernel.priority < 0) != first


def test_without_the_library_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    reason = "FlashInfer is not installed: pip install 'llmfw-core[flashinfer]'"
    assert KERNEL.missing(HOPPER) == KERNEL.refusal(context()) == reason
    assert KERNEL.missing(AMPERE) == reason
    assert KERNEL.missing(DeviceInfo(CPU, frozenset({"cpu"}))) == "needs cuda, sm_80, cupy"


@pytest.fixture
def installed(library: list[Wrapper], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """FlashInfer of a version that serves, in a folder, without any compiled kernel or tool."""
    folder = tmp_path / "flashinfer"
    sys.modules["flashinfer"].__spec__.submodule_search_locations = [str(folder)]  # type: ignore
    monkeypatch.setattr(importlib.metadata, "version", lambda name: declarations.OLDEST + ".2")
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(declarations, "CUDA_FOLDER", tmp_path / "cuda")
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in {"ninja", declarations.READY_MADE} else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return folder


def tool(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)


def test_without_a_compiler_the_reason_says_which_tools_it_lacks(
    installed: Path, tmp_path: Path
) -> None:
    assert "finds no nvcc, no ninja, no c++; install them" in str(KERNEL.missing(HOPPER))
    tool(tmp_path / "ninja")
    tool(tmp_path / "c++")
    assert "finds no nvcc; install them" in str(KERNEL.missing(HOPPER))
    tool(tmp_path / "cuda" / "bin" / "nvcc")
    assert KERNEL.missing(HOPPER) is None
    assert KERNEL.refusal(context()) is None


def test_kernels_that_are_ready_made_need_no_compiler(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KERNEL.missing(HOPPER) is not None
    (installed / "data" / "aot").mkdir(parents=True)
    assert KERNEL.missing(HOPPER) is None


def test_an_old_library_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / "data" / "aot").mkdir(parents=True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.9")
    assert KERNEL.missing(HOPPER) == "flashinfer-python 0.6.9 is older than 0.7"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 96, "v_head_dim": 96}, "serves one head size of 64, 128, 256, not 96 and 96"),
        ({"v_head_dim": 128}, "not 64 and 128"),
        ({"latent": 1}, "latent cache"),
        ({"block_size": 12}, "block size 12"),
    ],
)
def test_shapes_that_it_does_not_serve(
    installed: Path, changes: dict[str, int], reason: str
) -> None:
    (installed / "data" / "aot").mkdir(parents=True)
    assert reason in str(KERNEL.refusal(context(**changes)))
    assert "not float32" in str(KERNEL.refusal(context(dtype=torch.float32)))


def table(select: str) -> OpTable:
    bases = [k.from_pack("cupy") for k in CUPY if k.name in declarations.BASES]
    own = [k.from_pack("flashinfer") for k in (KERNEL, STREAMED)]
    return OpTable(HOPPER, (*own, *bases), select)


def choose(select: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:
    """What serves, and why not the others; the CuPy pack's kernels are not built."""
    monkeypatch.setattr(mixed, "PagedDecode", DecodeByReference)
    monkeypatch.setattr(mixed, "Prefill", lambda context: None)
    ops = table(select)
    ops.resolve("paged_attention", torch.bfloat16, **SHAPE)
    (choice,) = ops.choices.values()
    return choice.chosen, dict(choice.refused)


def test_where_it_is_missing_the_other_pack_serves_even_if_it_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    chosen, refused = choose("flashinfer", monkeypatch)
    assert chosen == STREAMED.builds_on
    assert refused[KERNEL.name].startswith("FlashInfer is not installed")


def test_kernels_that_do_not_compile_are_an_error_only_where_they_were_named(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "data" / "aot").mkdir(parents=True)
    assert choose("flashinfer", monkeypatch)[0] == STREAMED.name

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("nvcc: no space left on device")

    monkeypatch.setattr(Wrapper, "plan", fail)
    with pytest.raises(KernelError, match=f"{STREAMED.name} cannot be built: nvcc: no space left"):
        choose("flashinfer", monkeypatch)


def off(kernel: Kernel) -> dict[str, str]:
    """Why neither a kernel's base nor the kernel serves where the base was switched off."""
    return {
        kernel.name: f"builds on {kernel.builds_on}, which is switched off by name",
        kernel.builds_on: "switched off by name",
    }


def test_it_goes_before_the_kernels_that_it_builds_on(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn: what switches tensor copies off switches them off here, too."""
    (installed / "data" / "aot").mkdir(parents=True)
    assert [kernel.builds_on for kernel in (STREAMED, KERNEL)] == list(declarations.BASES)
    assert [kernel.name for kernel in table("auto").ranked("paged_attention")] == [
        STREAMED.name,
        KERNEL.name,
        STREAMED.builds_on,
        KERNEL.builds_on,
    ]
    assert choose("auto", monkeypatch) == (STREAMED.name, {})
    assert choose(f"-{STREAMED.builds_on}", monkeypatch) == (
        KERNEL.name,
        {STREAMED.name: off(STREAMED)[STREAMED.name]},
    )
    assert choose("-flashinfer", monkeypatch)[0] == STREAMED.builds_on
    both = f"-{STREAMED.builds_on},-{KERNEL.builds_on}"
    assert choose(both, monkeypatch) == ("reference", off(STREAMED) | off(KERNEL))


@pytest.mark.parametrize(("kernel", "copied"), [(STREAMED, True), (KERNEL, False)])
def test_other_requests_go_by_the_kernel_that_it_builds_on(
    kernel: Kernel, copied: bool, library: list[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (decode,) = attend(context(), monkeypatch, kernel=kernel)
    assert decode.copied == copied


def test_where_there_are_no_tensor_copies_it_builds_on_the_other_kernel(installed: Path) -> None:
    (installed / "data" / "aot").mkdir(parents=True)
    assert "tensor copies" in str(STREAMED.missing(AMPERE))
    assert KERNEL.missing(AMPERE) is None
    assert "block size 24" in str(STREAMED.refusal(context(block_size=24)))
    assert KERNEL.refusal(context(block_size=24)) is None


@pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed"
)
def test_the_library_takes_what_it_is_given() -> None:
    """The names of the real wrapper's arguments, which the stand-in above has taken over."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Real

    for name in ("__init__", "plan", "run"):
        theirs = inspect.signature(getattr(Real, name)).parameters
        ours = inspect.signature(getattr(Wrapper, name)).parameters
        assert set(ours) <= set(theirs)
        positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(theirs)[: len(positional)] == positional
