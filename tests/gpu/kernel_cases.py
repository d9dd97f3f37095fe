"""Inputs for every kernel of the CuPy pack, and the check against the reference.

Shared by the tests on a GPU, by their emulation on a CPU, by the sanitizer's run and by the
benchmark. A case is small by default; `wide` ones are for a real device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llmfw.attention.metadata import AttentionMetadata, CacheGroupView
from llmfw.kernels.cupy import gated_linear, linear
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.products import GEMV_ROWS, STREAMED_ROWS, Variant, bucket_of
from llmfw.kernels.cupy.streamed import CUTS, Streamed, servable
from llmfw.kernels.cupy.tiled import CHUNK, GROUP_ROWS, Tiled
from llmfw.ops.device import cuda_features
from llmfw.ops.inputs import INPUTS
from llmfw.ops.kernel import DTYPE_NAMES, DeviceInfo, Kernel, OpContext
from llmfw.ops.reference import REFERENCES

# rows of a tile, blocks that share x, that split the sum, that divide the rows of x
TILED_CUTS = ((224, 2, 1, 1), (144, 1, 4, 1), (64, 1, 1, 2), (96, 1, 2, 2), (128, 2, 1, 4))
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
FEATURES = frozenset({"cuda", "cupy"}) | cuda_features(*CAPABILITY)


@dataclass(frozen=True)
class Case:
    """One use of an op: static shape, dtype, and how its arguments are drawn."""

    op: str
    dtype: str
    shape: Mapping[str, int]
    draw: Callable[[torch.device, torch.dtype, torch.Generator], Arguments]
    label: str
    mutated: tuple[int, ...] = ()  # positions of arguments that the op writes besides its results
    wide: bool = False
    tolerance: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    code: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.dtype}-{self.label}"

    def context(self, device: torch.device) -> OpContext:
        """What the kernel's factory is given."""
        info = DeviceInfo(device, FEATURES)
        return OpContext(self.op, DTYPE_NAMES[self.dtype], info, self.shape, self.code)


def randn(
    *shape: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal values, drawn on the CPU so that they are equal on every device."""
    return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors of torch.empty hold NaN inside, so that an element nobody wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||; NaN where only one of them is."""
    out, expected = out.double().cpu(), expected.double().cpu()
    both = out.isnan() & expected.isnan()
    out, expected = out.masked_fill(both, 0), expected.masked_fill(both, 0)
    norm = expected.norm().item()
    error = (out - expected).norm().item()
    return error / norm if norm else error


def check(case: Case, call: Callable[..., Any], device: torch.device, seed: int = 0) -> float:
    """The greatest relative error over results and written arguments, within the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = case.draw(device, DTYPE_NAMES[case.dtype], generator)
    expected_args = copy.deepcopy(args)
    expected = REFERENCES[case.op](*expected_args, **kwargs)
    with poisoned():
        result = call(*args, **kwargs)
    compared = INPUTS[case.op].compared
    if compared is not None:
        result, expected = compared(args, result), compared(expected_args, expected)
    pairs = list(zip(as_tuple(result), as_tuple(expected), strict=True))
    pairs += [(args[i], expected_args[i]) for i in case.mutated]
    kernel = kernel_of(case, device)
    limit = kernel.tolerance[case.dtype] if case.tolerance is None else case.tolerance
    worst = 0.0
    for out, wanted in pairs:
        assert out.shape == wanted.shape, (case, out.shape, wanted.shape)
        assert out.dtype == wanted.dtype, (case, out.dtype, wanted.dtype)
        error = relative_error(out, wanted)
        assert error <= limit, f"{case}: relative error {error:.3g}, allowed {limit:.3g}"
        worst = max(worst, error)
    return worst


def kernel_of(case: Case, device: torch.device) -> Kernel:
    """The pack's kernel that a case names, else the first that serves it; others say why not."""
    context, name = case.context(device), case.facts.get("kernel")
    kernels = [each for each in KERNELS if each.op == case.op and name in (None, each.name)]
    serving = [kernel for kernel in kernels if kernel.refusal(context) is None]
    assert serving, [kernel.refusal(context) for kernel in kernels]
    return serving[0]


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    """A result as a tuple of tensors."""
    return value if isinstance(value, tuple) else (value,)


def norm_cases() -> Iterator[Case]:
    """rms_norm, add_rms_norm, layer_norm."""
    for dtype in DTYPE_NAMES:
        for hidden, rows, wide in [
            (64, 3, False),
            (72, 1, False),
            (576, 5, False),
            (1024, 2, False),
            (4096, 1, True),
            (5120, 33, True),
            (8192, 129, True),
            (16384, 7, True),
            (4096, 4099, True),
        ]:
            for offset in (0.0, 1.0):

                def rms(
                    d: torch.device, t: torch.dtype, g: torch.Generator, h=hidden, r=rows, o=offset
                ) -> Arguments:
                    x = randn(r, h, device=d, dtype=t, generator=g, scale=3.0)
                    return (x, randn(h, device=d, dtype=t, generator=g), 1e-6, o), {}

                def add(
                    d: torch.device, t: torch.dtype, g: torch.Generator, h=hidden, r=rows, o=offset
                ) -> Arguments:
                    x, residual = (randn(r, h, device=d, dtype=t, generator=g) for _ in range(2))
                    return (x, residual, randn(h, device=d, dtype=t, generator=g), 1e-5, o), {}

                label = f"{rows}x{hidden}-offset{offset:.0f}"
                yield Case("rms_norm", dtype, {"hidden_size": hidden}, rms, label, wide=wide)
                yield Case("add_rms_norm", dtype, {"hidden_size": hidden}, add, label, wide=wide)
            for affine in (0, 1, 2):

                def layer(
                    d: torch.device, t: torch.dtype, g: torch.Generator, h=hidden, r=rows, n=affine
                ) -> Arguments:
                    x = randn(r, h, device=d, dtype=t, generator=g) + 0.5
                    parts = [
                        randn(h, device=d, dtype=t, generator=g) if n > i else None
                        for i in range(2)
                    ]
                    return (x, *parts, 1e-5), {}

                yield Case(
                    "layer_norm",
                    dtype,
                    {"hidden_size": hidden},
                    layer,
                    f"{rows}x{hidden}-affine{affine}",
                    wide=wide,
                )


def activation_cases() -> Iterator[Case]:
    """silu_and_mul, gelu_and_mul, gelu_tanh_and_mul."""
    for dtype in DTYPE_NAMES:
        for op in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
            for width, rows, wide in [
                (64, 3, False),
                (1000, 2, False),
                (14336, 1, True),
                (3072, 257, True),
            ]:

                def draw(
                    d: torch.device, t: torch.dtype, g: torch.Generator, w=width, r=rows
                ) -> Arguments:
                    return (randn(r, 2 * w, device=d, dtype=t, generator=g, scale=2.0),), {}

                yield Case(
                    op, dtype, {"intermediate_size": width}, draw, f"{rows}x{width}", wide=wide
                )


def rope_cases() -> Iterator[Case]:
    """rope_and_cache: layouts, partial rotation, q/k norm, negative slots."""
    layouts = [
        (4, 2, 64, 64, 0, 0),
        (4, 1, 128, 128, 0, 1),
        (2, 2, 80, 80, 0, 0),
        (2, 2, 80, 32, 0, 0),
        (6, 2, 96, 96, 1, 1),
        (3, 1, 64, 16, 1, 0),
        (2, 1, 256, 64, 0, 1),
        (2, 2, 64, 0, 0, 0),
        (32, 8, 128, 128, 0, 0),
        (16, 8, 128, 128, 0, 1),
    ]
    for dtype in DTYPE_NAMES:
        for heads, kv_heads, dim, rotary, interleaved, norm in layouts:
            for tokens, wide in [(1, False), (5, False), (131, True)]:
                shape = {
                    "num_heads": heads,
                    "num_kv_heads": kv_heads,
                    "head_dim": dim,
                    "rotary_dim": rotary,
                    "interleaved": interleaved,
                    "qk_norm": norm,
                    "block_size": 16,
                }

                def draw(
                    d: torch.device, t: torch.dtype, g: torch.Generator, s=shape, n=tokens
                ) -> Arguments:
                    return rope_arguments(d, t, g, s, n)

                label = (
                    f"{tokens}t-{heads}/{kv_heads}x{dim}r{rotary}" + "i" * interleaved + "n" * norm
                )
                yield Case("rope_and_cache", dtype, shape, draw, label, mutated=(3, 4), wide=wide)


def rope_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    tokens: int,
) -> Arguments:
    """Arguments of rope_and_cache with caches full of old values and some negative slots."""
    heads, kv_heads, dim, rotary = (
        shape[n] for n in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")
    )
    blocks = tokens // 16 + 3
    both = randn(2, blocks, 16, kv_heads, dim, device=device, dtype=dtype, generator=g)
    slots = torch.randperm(blocks * 16, generator=g)[:tokens].to(device)
    if tokens > 3:
        slots[2] = -1
    angles = torch.rand(100, max(rotary, 2) // 2, generator=g) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device) if rotary else None
    norms = [
        randn(dim, device=device, dtype=dtype, generator=g) if shape["qk_norm"] else None
        for _ in range(2)
    ]
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype, generator=g)
    positions = torch.randint(0, 100, (tokens,), generator=g).to(device)
    args = (
        qkv,
        positions,
        cos_sin,
        both[0],
        both[1],
        slots,
        heads,
        kv_heads,
        dim,
        bool(shape["interleaved"]),
        *norms,
        1e-6,
        0.0,
    )
    return args, {}


@dataclass(frozen=True)
class Batch:
    """(query length, kv length) of each request of an attention batch, context requests first."""

    lengths: tuple[tuple[int, int], ...]
    contexts: int = 0


ATTENTION_LAYOUTS = [
    # heads, kv heads, dim, v dim, block size, window, softcap, sinks
    (4, 2, 64, 64, 16, 0, 0, 0),
    (8, 2, 128, 128, 16, 0, 0, 0),
    (2, 2, 80, 80, 16, 0, 0, 0),
    (12, 2, 96, 96, 32, 0, 0, 0),
    (10, 1, 64, 64, 8, 0, 0, 0),
    (8, 1, 256, 256, 16, 0, 0, 0),
    (40, 1, 64, 64, 24, 0, 0, 0),
    (4, 2, 64, 64, 16, 20, 0, 0),
    (4, 1, 128, 128, 16, 33, 1, 0),
    (8, 2, 64, 64, 16, 0, 0, 1),
    (8, 2, 64, 64, 16, 17, 1, 1),
    (4, 2, 144, 112, 8, 0, 0, 0),
    (6, 1, 192, 128, 16, 20, 0, 1),
    (8, 4, 256, 256, 16, 0, 0, 0),
    (4, 1, 256, 256, 8, 17, 1, 0),
]
BATCHES = [
    ("one", Batch(((1, 1),)), False),
    ("few", Batch(((1, 17), (1, 130), (1, 16), (1, 5))), False),
    ("drafts", Batch(((2, 40), (3, 3), (1, 200))), False),
    ("split", Batch(((1, 700),)), False),
    ("mixed", Batch(((9, 9), (5, 37), (1, 70), (1, 1)), contexts=2), False),
    ("long", Batch(((1, 3000), (1, 1), (1, 777), (1, 4096), (1, 64))), True),
    ("crowd", Batch(tuple((1, 1 + 37 * i % 900) for i in range(70))), True),
    ("prompts", Batch(((300, 300), (129, 1000), (1, 2000), (1, 500)), contexts=2), True),
]


def attention_cases() -> Iterator[Case]:
    """paged_attention: groups, head sizes, windows, caps, sinks, block sizes, batches."""
    for dtype in ("bfloat16", "float16", "float32"):
        for heads, kv_heads, dim, v_dim, block_size, window, softcap, sinks in ATTENTION_LAYOUTS:
            for name, batch, wide in BATCHES:
                shape = {
                    "num_heads": heads,
                    "num_kv_heads": kv_heads,
                    "head_dim": dim,
                    "v_head_dim": v_dim,
                    "window": window,
                    "softcap": softcap,
                    "sinks": sinks,
                    "block_size": block_size,
                }

                def draw(
                    d: torch.device, t: torch.dtype, g: torch.Generator, s=shape, b=batch
                ) -> Arguments:
                    return attention_arguments(d, t, g, s, b)

                extras = f"w{window}" * bool(window) + "c" * softcap + "s" * sinks
                narrow = f"v{v_dim}" * (v_dim != dim)
                label = f"{name}-{heads}/{kv_heads}x{dim}{narrow}b{block_size}{extras}"
                case = Case("paged_attention", dtype, shape, draw, label, wide=wide)
                yield from also_by("cupy.paged_streamed", case, "copies")


def also_by(name: str, case: Case, ending: str) -> Iterator[Case]:
    """A case, and where the kernel of that name serves it the same for that one."""
    yield case
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    if kernel.refusal(case.context(torch.device("cpu"))) is None:
        yield replace(case, label=f"{case.label}-{ending}", facts={"kernel": name})


def attention_arguments(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    shape: Mapping[str, int],
    batch: Batch,
) -> Arguments:
    """Arguments of paged_attention; unused slots of the cache hold NaN, which must not show."""
    kv_heads, dim, block_size = (shape[n] for n in ("num_kv_heads", "head_dim", "block_size"))
    counts = [-(-kv // block_size) for _, kv in batch.lengths]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=g)
    tables = torch.full((len(counts), max(counts) + 1), 2**30, dtype=torch.int32)
    k = torch.full((total, block_size, kv_heads, dim), float("nan"))
    v = torch.full((total, block_size, kv_heads, shape["v_head_dim"]), float("nan"))
    taken = 0
    for i, (count, (_, kv)) in enumerate(zip(counts, batch.lengths, strict=True)):
        mine = order[taken : taken + count]
        taken += count
        tables[i, :count] = mine.int()
        for cache, spread in ((k, 1.0), (v, 0.5)):
            filled = torch.randn(count * block_size, *cache.shape[2:], generator=g) * spread
            filled[kv:] = float("nan")
            cache[mine] = filled.view(count, *cache.shape[1:])
    tokens = sum(q for q, _ in batch.lengths)
    cumulative = torch.tensor([0, *(q for q, _ in batch.lengths)]).cumsum(0).int()
    query_lens, kv_lens = zip(*batch.lengths, strict=True)
    view = CacheGroupView(
        tables.to(device), torch.zeros(tokens, dtype=torch.int64, device=device), block_size
    )
    metadata = AttentionMetadata(
        query_lens=query_lens,
        kv_lens=kv_lens,
        num_contexts=batch.contexts,
        cu_query_lens=cumulative.to(device),
        kv_lens_device=torch.tensor(kv_lens, dtype=torch.int32).to(device),
        positions=torch.zeros(tokens, dtype=torch.int64, device=device),
        groups=(view,),
        caches={},
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
    )
    q = randn(tokens, shape["num_heads"], dim, device=device, dtype=dtype, generator=g, scale=1.5)
    sinks = torch.randn(shape["num_heads"], generator=g).to(device) if shape["sinks"] else None
    k, v = k.to(device, dtype), v.to(device, dtype)
    if shape.get("latent"):
        v = k[..., : shape["v_head_dim"]]
    args = (q, k, v, metadata, view, dim**-0.5)
    return args, {
        "window": shape["window"] or None,
        "softcap": 20.0 if shape["softcap"] else None,
        "sinks": sinks,
    }


def product_cases(
    op: str, sizes: list[tuple[int, int, bool]], out: str, each: int
) -> Iterator[Case]:
    """Products at row counts of every bucket; `each` rows of the weight make a result."""
    for dtype in DTYPE_NAMES:
        for in_features, outputs, wide in sizes:
            if dtype != "bfloat16" and in_features != 192:
                continue
            for rows in (1, 2, 3, 4, 5, 9, 31, 64, 65, 200, 256):
                for bias in (0, 1):

                    def draw(
                        d: torch.device,
                        t: torch.dtype,
                        g: torch.Generator,
                        i=in_features,
                        o=outputs * each,
                        r=rows,
                        b=bias,
                    ) -> Arguments:
                        x = randn(r, i, device=d, dtype=t, generator=g)
                        weight = randn(o, i, device=d, dtype=t, generator=g, scale=i**-0.5)
                        biases = randn(o, device=d, dtype=t, generator=g) if b else None
                        return (x, weight, biases), {}

                    shape = {"in_features": in_features, out: outputs, "bias": bias}
                    label = f"{rows}x{in_features}-{outputs}" + "b" * bias
                    yield Case(op, dtype, shape, draw, label, wide=wide, facts={"rows": rows})


def linear_cases() -> Iterator[Case]:
    """linear over sizes that fit no tile."""
    sizes = [(64, 5, False), (192, 50, False), (1000, 24, False), (1024, 40, False)]
    yield from product_cases("linear", [*sizes, (4096, 6144, True)], "out_features", 1)


def gated_linear_cases() -> Iterator[Case]:
    """gated_linear over widths of whole packs."""
    sizes = [(64, 8, False), (192, 56, False), (1000, 24, False), (1024, 1536, True)]
    yield from product_cases("gated_linear", sizes, "intermediate_size", 2)


def product_variants(
    context: OpContext, rows: int, without: Collection[str] = ()
) -> Iterator[Callable[..., torch.Tensor]]:
    """Every variant that can serve so many rows, worth it or not, called as the op is.

    without: Sources whose variants are left out.
    """
    module, outputs, gated = linear, context.shape.get("out_features"), False
    if outputs is None:
        module, outputs, gated = gated_linear, context["intermediate_size"], True
    bucket = bucket_of(rows)
    if bucket is None:
        return
    found: tuple[Variant, ...] = ()
    if bucket in GEMV_ROWS:
        found = module.variants(bucket, context)
    elif servable(context) and bucket in STREAMED_ROWS:
        found = tuple(Streamed(*cut, gated=gated) for cut in CUTS)
    elif servable(context):
        cuts = (Tiled(*cut, gated, parts) for *cut, parts in TILED_CUTS)
        fits = (cut for cut in cuts if cut.split * CHUNK <= context["in_features"])
        found = tuple(cut for cut in fits if cut.parts * GROUP_ROWS <= bucket)
    for variant in (each for each in found if each.source not in without):
        product = variant.build(bucket, context, outputs)

        def call(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product=product
        ) -> torch.Tensor:
            out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
            product(x, weight, bias, out, x.shape[0])
            return out

        yield call


def all_cases() -> list[Case]:
    """Every case of every op."""
    products = (*linear_cases(), *gated_linear_cases())
    return [*norm_cases(), *activation_cases(), *rope_cases(), *attention_cases(), *products]
