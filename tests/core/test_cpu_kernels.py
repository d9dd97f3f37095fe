"""The CPU kernel pack: against torch's references, and how it is built, cached and done without."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfw.kernels.cpu import launch, library, pack
from llmfw.ops import reference, reference_moe
from llmfw.ops.check import check_kernel, relative_error
from llmfw.ops.device import device_info
from llmfw.ops.inputs import paged_batch
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.table import OpTable

INFO = device_info(torch.device("cpu"))
KERNELS = {kernel.name: kernel.from_pack("cpu") for kernel in pack.llmfw_kernels(INFO)}
native = pytest.mark.skipif(
    not {"avx2", "compiler"} <= INFO.features, reason="needs AVX2 and a C++ compiler"
)

# A pack's worth of C++ that compiles at once: one function that adds two integers.
TINY = """
#include "binding.h"
static void store_sum(int64_t* out, int64_t a, int64_t b) { *out = a + b; }
extern "C" MethodDef llmfw_methods[] = {
    {"store_sum", llmfw::call<&store_sum>, 0x80, nullptr}, {nullptr, nullptr, 0, nullptr}};
"""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Builds of a tiny source in its own cache; the compiler notes each of its runs in `runs`."""
    real = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if real is None:
        pytest.skip("needs a C++ compiler")
    sources = tmp_path / "sources"
    sources.mkdir()
    shutil.copy(library.SOURCES / "binding.h", sources)
    (sources / "module.cpp").write_text(TINY)
    compiler = tmp_path / "noting-compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/runs\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "SOURCES", sources)
    library.forget()
    yield tmp_path
    library.forget()


def compilations(folder: Path) -> int:
    return sum("module.cpp" in line for line in (folder / "runs").read_text().splitlines())


def store_sum() -> int:
    out = torch.zeros(1, dtype=torch.int64)
    library.functions()["store_sum"](out.data_ptr(), 40, 2)
    return int(out)


@native
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_against_the_reference(name: str) -> None:
    report = check_kernel(KERNELS[name], INFO)
    assert report.passed, "\n".join(map(str, report.failures))
    assert not report.declined


def resolve(op: str, dtype: torch.dtype = torch.float32, **shape: int) -> Callable[..., object]:
    context = OpContext(op, dtype, INFO, shape)
    return KERNELS[f"cpu.{op}"].build(context)


@native
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 90),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_linear_of_any_shape(
    rows: int, width: int, outs: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(outs, width).to(dtype)
    b = torch.randn(outs).to(dtype) if bias else None
    run = resolve("linear", dtype, in_features=width, out_features=outs, bias=int(bias))
    wanted = torch.nn.functional.linear(
        x.double(), weight.double(), None if b is None else b.double()
    )
    got = run(x, weight, b)
    assert isinstance(got, torch.Tensor)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    size = x.double().norm(dim=1).max() * weight.double().norm(dim=1).max()
    size += 0.0 if b is None else b.double().abs().max()
    assert float((got.double() - wanted).abs().max()) <= allowed * float(size)


@native
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 150)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (9, 3)]),
    st.integers(1, 70),
    st.sampled_from([None, 1, 7, 64]),
    st.sampled_from([1, 4, 16]),
)
def test_attention_of_any_batch(
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    block_size: int,
) -> None:
    generator = torch.Generator().manual_seed(len(requests))
    lengths = tuple((new, new + past) for new, past in requests)
    metadata, view, blocks = paged_batch(lengths, 0, block_size, generator, INFO.device)
    q = torch.randn(sum(metadata.query_lens), heads[0], head_dim, generator=generator)
    k, v = torch.randn(2, blocks, block_size, heads[1], head_dim, generator=generator).unbind()
    run = resolve("paged_attention", num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    arguments = (q, k, v, metadata, view, head_dim**-0.5, window)
    got = run(*arguments)
    assert isinstance(got, torch.Tensor)
    assert relative_error(got, reference.paged_attention(*arguments)) < 1e-5


@native
def test_thread_count_changes_nothing_and_no_second_pool_appears(threads: None) -> None:
    x, weight = torch.randn(4, 512), torch.randn(4096, 512)
    run = resolve("linear", in_features=512, out_features=4096, bias=0)
    torch.set_num_threads(3)
    torch.randn(2000, 2000).sum()  # torch's own pool is up
    before = len(list(Path("/proc/self/task").iterdir()))
    results: list[torch.Tensor] = []
    for count in (3, 1, 2, 3):
        torch.set_num_threads(count)
        out = run(x, weight, None)
        assert isinstance(out, torch.Tensor)
        results.append(out)
    assert all(torch.equal(results[0], result) for result in results)
    torch.randn(2000, 2000).sum()
    assert len(list(Path("/proc/self/task").iterdir())) <= before
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"\S*/lib[^/\s]*omp[^/\s]*\.so\S*", maps))) <= 1


@native
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_long_request_is_cut_into_spans_for_the_threads(count: int, threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    metadata, view, blocks = paged_batch(((2, 700),), 0, 16, generator, INFO.device)
    q = torch.randn(2, 4, 32, generator=generator)
    k, v = torch.randn(2, blocks, 16, 2, 32, generator=generator).unbind()
    sinks = torch.randn(4, generator=generator)
    run = resolve("paged_attention", num_heads=4, num_kv_heads=2, head_dim=32)
    for window in (None, 500):
        arguments = (q, k, v, metadata, view, 0.2, window, None, sinks)
        torch.set_num_threads(count)
        got = run(*arguments)
        torch.set_num_threads(1)
        assert isinstance(got, torch.Tensor)
        assert relative_error(got, reference.paged_attention(*arguments)) < 1e-5


@native
def test_the_work_is_shared_by_the_threads(threads: None) -> None:
    def ticks() -> dict[str, int]:
        stats = {
            task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()
        }
        return {name: int(stat.rpartition(")")[2].split()[11]) for name, stat in stats.items()}

    torch.set_num_threads(2)
    x, weight = torch.randn(64, 1024), torch.randn(4096, 1024)
    run = resolve("linear", in_features=1024, out_features=4096, bias=0)
    before, until = ticks(), time.monotonic() + 10
    while time.monotonic() < until:
        run(x, weight, None)
        if sum(spent > before.get(name, 0) for name, spent in ticks().items()) >= 2:
            return
    pytest.fail("one thread did all the work")


@native
def test_inputs_other_than_declared_go_to_the_reference() -> None:
    run = resolve("linear", in_features=8, out_features=4, bias=0)
    x, weight = torch.randn(3, 16)[:, ::2], torch.randn(4, 8)
    strided = run(x, weight, None)
    assert isinstance(strided, torch.Tensor)
    assert torch.equal(strided, x @ weight.T)
    double = run(x.double(), weight.double(), None)
    assert isinstance(double, torch.Tensor)
    assert double.dtype is torch.float64
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(torch.randn(3, 9), weight, None)
    heads = resolve("head_linear", num_heads=2, in_features=8, out_features=4)
    x, weight = torch.randn(3, 2, 16)[..., ::2], torch.randn(2, 4, 8)
    torch.testing.assert_close(heads(x, weight), torch.einsum("thi,hoi->tho", x, weight))
    norm = resolve("rms_norm", hidden_size=8)
    wide = torch.randn(2, 8, dtype=torch.float64)
    out = norm(wide, torch.ones(8, dtype=torch.float64), 1e-5)
    assert isinstance(out, torch.Tensor)
    assert out.dtype is torch.float64


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_many_rows_and_of_none(dtype: torch.dtype) -> None:
    """One group has more rows than our product takes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator).to(dtype)
    weight = torch.randn(4, 8, 64, generator=generator).to(dtype)
    run = resolve("grouped_linear", dtype, num_groups=4, in_features=64, out_features=8)
    for stops in ([0, 290, 290, 300], [3, 3, 9, 9], [0, 0, 0, 0]):
        ends = torch.tensor(stops, dtype=torch.int32)
        rows = x[: stops[-1]]
        expected = reference_moe.grouped_linear(rows.float(), weight.float(), ends)
        for stated in (ends, ends.long()):
            got = run(rows, weight, stated)
            assert isinstance(got, torch.Tensor)
            torch.testing.assert_close(got.float(), expected, atol=0.2, rtol=0.02)


@native
def test_values_whose_rows_are_not_regular_go_to_the_reference() -> None:
    shape = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 4, "block_size": 4}
    run = resolve("paged_attention", **shape, window=0, softcap=0, sinks=0)
    metadata, view, blocks = paged_batch(
        ((5, 5),), 1, 4, torch.Generator().manual_seed(0), INFO.device
    )
    q, k = torch.randn(5, 2, 8), torch.randn(blocks, 4, 2, 8)
    last = torch.randn(blocks, 4, 2, 8)[..., 4:]
    swapped = torch.randn(blocks, 2, 4, 4).transpose(1, 2)
    for v in (last, swapped):
        arguments = (metadata, view, 0.3)
        expected = reference.paged_attention(q, k, v, *arguments)
        torch.testing.assert_close(run(q, k, v, *arguments), expected, atol=1e-5, rtol=1e-5)


def test_row_limit_follows_the_cpu() -> None:
    def limit(dtype: torch.dtype, *features: str) -> int:
        info = DeviceInfo(torch.device("cpu"), frozenset(features))
        return launch.row_limit(OpContext("linear", dtype, info))

    assert limit(torch.bfloat16, "amx_bf16") < limit(torch.bfloat16) < limit(torch.float32)


def test_other_devices_and_older_cpus_are_not_served() -> None:
    assert pack.llmfw_kernels(DeviceInfo(torch.device("cuda"), frozenset({"cuda"}))) == []
    old = OpContext("rms_norm", torch.float32, DeviceInfo(torch.device("cpu"), frozenset({"cpu"})))
    assert KERNELS["cpu.rms_norm"].refusal(old) == "needs avx2"


def test_built_once_then_taken_from_the_cache(tiny: Path) -> None:
    assert library.problem() is None
    assert store_sum() == 42
    library.forget()
    assert store_sum() == 42
    assert compilations(tiny) == 1
    (built,) = library.cache_dir().iterdir()
    assert built.suffix == ".so"


def test_a_change_of_source_or_flags_builds_afresh(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_sum() == 42
    (library.SOURCES / "module.cpp").write_text(TINY.replace("a + b", "a - b"))
    library.forget()
    assert store_sum() == 38
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O1"))
    library.forget()
    assert store_sum() == 38
    assert compilations(tiny) == 3


@pytest.mark.parametrize(
    "rubbish", [b"", b"not an object", b"\x7fELF" + b"\0" * 60], ids=["empty", "text", "cut"]
)
def test_a_corrupt_cache_file_is_built_again(
    tiny: Path,
    rubbish: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert library.problem() is None
    (built,) = library.cache_dir().iterdir()
    monkeypatch.setenv("LLMFW_CACHE", str(tiny / "another"))  # a path that is not loaded yet
    library.cache_dir().mkdir(parents=True)
    (library.cache_dir() / built.name).write_bytes(rubbish)
    library.forget()
    assert store_sum() == 42
    assert "does not load and is built again" in caplog.text
    assert compilations(tiny) == 2


def test_builders_at_the_same_time_do_not_disturb_each_other(tiny: Path) -> None:
    path = library.cache_dir() / "kernels-x.so"
    compiler = str(tiny / "noting-compiler")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: library._compile(compiler, path), range(4)))
    assert [p.name for p in path.parent.iterdir()] == ["kernels-x.so"]
    assert "store_sum" in library.load_object_file(path)


def test_calls_are_checked(tiny: Path) -> None:
    function = library.functions()["store_sum"]
    with pytest.raises(TypeError, match="takes 3 arguments, not 2"):
        function(0, 1)
    with pytest.raises(TypeError):
        function("x", 1, 2)


def serves_reference() -> OpTable:
    table = OpTable(
        DeviceInfo(torch.device("cpu"), frozenset({"cpu", "avx2"})), tuple(KERNELS.values())
    )
    norm = table.resolve("rms_norm", torch.float32, hidden_size=4)
    assert norm is reference.rms_norm
    assert table.resolve("silu_and_mul", torch.float32) is reference.silu_and_mul
    return table


@pytest.fixture
def fallen_back(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.MonkeyPatch]:
    """The test breaks the build; after it one warning, and only one, must have been logged."""
    monkeypatch.delenv("LLMFW_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        yield monkeypatch
        (record,) = caplog.get_records("call")
        assert "torch's references serve in place of the CPU kernels" in record.message


def test_no_compiler(fallen_back: pytest.MonkeyPatch) -> None:
    fallen_back.setenv("CXX", "no-such-compiler")
    table = serves_reference()
    reasons = [reason for choice in table.choices.values() for _, reason in choice.refused]
    assert reasons == ["no C++ compiler (g++, clang++ or CXX)"] * 2


def test_a_compiler_that_fails(fallen_back: pytest.MonkeyPatch) -> None:
    (library.SOURCES / "module.cpp").write_text("int x = nothing;\n")
    serves_reference()
    assert "nothing" in str(library.problem()) or "nothing" in str(library.problem())


def test_a_compiler_that_cannot_be_run(tiny: Path, fallen_back: pytest.MonkeyPatch) -> None:
    broken = tiny / "broken"
    broken.write_bytes(b"\x7fELF rubbish")
    broken.chmod(0o755)
    fallen_back.setenv("CXX", str(broken))
    serves_reference()
    assert "cannot be run" in str(library.problem())


def test_an_object_that_needs_what_is_not_there(fallen_back: pytest.MonkeyPatch) -> None:
    source = 'extern "C" void missing_runtime();\nextern "C" int llmfw_methods;\n'
    source += "int llmfw_methods = (missing_runtime(), 1);\n"
    (library.SOURCES / "module.cpp").write_text(source)
    serves_reference()
    assert "missing_runtime" in str(library.problem())


def test_a_cache_that_cannot_be_written(fallen_back: pytest.MonkeyPatch) -> None:
    fallen_back.setenv("LLMFW_CACHE", "/dev/null/cache")
    serves_reference()
    assert "/dev/null/cache/kernels/cpu cannot be written" in str(library.problem())


def test_switched_off_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_KERNELS", "reference")
    serves_reference()


def test_declarations() -> None:
    assert all(isinstance(kernel, Kernel) and kernel.priority > 0 for kernel in KERNELS.values())
    assert {kernel.op for kernel in KERNELS.values()} < set(reference.REFERENCES)
