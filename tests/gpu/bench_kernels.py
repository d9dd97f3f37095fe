"""Time every kernel of the CuPy pack: `python tests/gpu/bench_kernels.py OUT.json [SECTION ...]`.

Times are those of CUDA graph replays over rotated buffers that are together larger than the L2, so
memory is really read. `of floor` is the time that the least bytes take at the read bandwidth, over
the time measured.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu.kernel_cases import FEATURES, Batch, attention_arguments
from llmfw.kernels.cupy import linear, tune
from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.kernels.cupy.paged_decode import PagedDecode
from llmfw.ops.kernel import DeviceInfo, OpContext, load_object
from llmfw.ops.reference import REFERENCES

READ = 3.12e12  # bytes a second, gpu.md's H100
DEVICE = torch.device("cuda", 0)
COLD = 192 << 20
BF16 = torch.bfloat16
RESULTS: list[dict[str, Any]] = []
Run = Callable[[], object]
# name: hidden, intermediate, heads, kv heads, head dim, vocabulary, layers
MODELS = {"L": (4096, 14336, 32, 8, 128, 128256, 32), "S": (1024, 3072, 16, 8, 128, 151936, 28)}


def report(section: str, label: str, us: float, nbytes: float, **more: object) -> None:
    """One line on the screen, one entry in the file."""
    floor = nbytes / READ * 1e6
    RESULTS.append(
        {
            "section": section,
            "case": label,
            "us": round(us, 3),
            "tb_s": round(nbytes / us / 1e6, 3),
            "of_floor": round(floor / us, 3),
            **more,
        }
    )
    extra = "  ".join(f"{k} {v}" for k, v in more.items())
    rate = f"{nbytes / us / 1e6:6.2f} TB/s {floor / us:6.1%}"
    print(f"{section:10} {label:34} {us:9.2f} us {rate}  {extra}")


def kernel(op: str, shape: dict[str, int]) -> Callable[..., Any]:
    """The pack's callable for an op and static shape."""
    context = OpContext(op, BF16, DeviceInfo(DEVICE, FEATURES), shape)
    return load_object(next(k for k in KERNELS if k.op == op).factory)(context)  # type: ignore[no-any-return]


def rotated(nbytes: float, make: Callable[[], Run]) -> list[Run]:
    """Enough copies of a run, each with its own buffers, to leave the caches."""
    return [make() for _ in range(int(min(48, max(2, -(-COLD // max(nbytes, 1))))))]


def randn(*shape: int) -> torch.Tensor:
    """Random bf16 values on the device."""
    return torch.randn(*shape, dtype=BF16, device=DEVICE)


def limits() -> None:
    """Copy bandwidth, and the time of an empty dependent kernel in a graph."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    us = tune.graph_time([functools.partial(b.copy_, a)], launches=4)
    report("limits", "copy 2 GiB (read + write)", us, 2 * a.numel())
    del a, b
    x = randn(1, 64)
    call = kernel("rms_norm", {"hidden_size": 64})
    weight = randn(64)
    us = tune.graph_time([lambda: call(x, weight, 1e-6)], launches=200)
    report("limits", "smallest kernel in a graph", us, 256)


def launches() -> None:
    """Host time of one eager call."""
    x, weight = randn(1, 4096), randn(4096)
    ours = kernel("rms_norm", {"hidden_size": 4096})
    both = kernel("add_rms_norm", {"hidden_size": 4096})
    residual = randn(1, 4096)
    out = torch.empty_like(x)
    calls: list[tuple[str, Run]] = [
        ("llmfw rms_norm", lambda: ours(x, weight, 1e-6)),
        ("llmfw add_rms_norm (in place)", lambda: both(x, residual, weight, 1e-6)),
        ("torch.add out=", lambda: torch.add(x, x, out=out)),
        ("torch.empty", lambda: torch.empty_like(x)),
    ]
    for label, call in calls:
        for _ in range(200):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        us = (time.perf_counter() - start) / 500 * 1e6
        torch.cuda.synchronize()
        report("launch", label, us, 0)


def elementwise() -> None:
    """Norms, activation, rope: decode and prefill row counts, torch's reference beside."""
    for name, (hidden, inner, heads, kv_heads, dim, _, _) in MODELS.items():
        for rows in (1, 32, 256, 8192):
            weight = randn(hidden)
            rms = kernel("rms_norm", {"hidden_size": hidden})
            add = kernel("add_rms_norm", {"hidden_size": hidden})
            act = kernel("silu_and_mul", {"intermediate_size": inner})

            def rms_run(rms=rms, rows=rows, hidden=hidden, weight=weight) -> Run:
                x = randn(rows, hidden)
                return lambda: rms(x, weight, 1e-6)

            def add_run(add=add, rows=rows, hidden=hidden, weight=weight) -> Run:
                x, y = randn(rows, hidden), randn(rows, hidden)
                return lambda: add(x, y, weight, 1e-6)

            def act_run(act=act, rows=rows, inner=inner) -> Run:
                x = randn(rows, 2 * inner)
                return lambda: act(x)

            for op, make, nbytes in (
                ("rms_norm", rms_run, 4 * rows * hidden),
                ("add_rms_norm", add_run, 8 * rows * hidden),
                ("silu_and_mul", act_run, 6 * rows * inner),
            ):
                us = tune.graph_time(rotated(nbytes, make))
                report("elementwise", f"{name} {op} x{rows}", us, nbytes)

            shape = {
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": dim,
                "rotary_dim": dim,
                "interleaved": 0,
                "qk_norm": int(name == "S"),
                "block_size": 16,
            }
            rope = kernel("rope_and_cache", shape)
            norm = randn(dim) if name == "S" else None
            cos_sin = torch.rand(9000, dim, device=DEVICE)

            def rope_run(
                rope=rope, rows=rows, h=heads, kv=kv_heads, dim=dim, norm=norm, cs=cos_sin
            ) -> Run:
                qkv = randn(rows, (h + 2 * kv) * dim)
                k, v = (
                    torch.zeros(rows // 16 + 1, 16, kv, dim, dtype=BF16, device=DEVICE)
                    for _ in range(2)
                )
                positions = torch.arange(rows, device=DEVICE)
                slots = torch.randperm(rows, device=DEVICE)
                return lambda: rope(qkv, positions, cs, k, v, slots, h, kv, dim, False, norm, norm)

            nbytes = rows * (heads + 2 * kv_heads) * dim * 4
            report(
                "elementwise",
                f"{name} rope_and_cache x{rows}",
                tune.graph_time(rotated(nbytes, rope_run)),
                nbytes,
            )


def attention() -> None:
    """Paged decode: the plan's splits and the best of a sweep."""
    for name, (_, _, heads, kv_heads, dim, _, _) in MODELS.items():
        shape = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "v_head_dim": dim,
            "window": 0,
            "softcap": 0,
            "sinks": 0,
            "block_size": 16,
        }
        context = OpContext("paged_attention", BF16, DeviceInfo(DEVICE, FEATURES), shape)
        decode = PagedDecode(context)
        for batch, length in [
            (1, 128),
            (1, 1024),
            (1, 8192),
            (8, 1024),
            (32, 1024),
            (32, 4096),
            (64, 1024),
            (256, 1024),
        ]:
            nbytes = batch * length * kv_heads * dim * 4
            layers = int(min(24, max(1, -(-COLD // nbytes))))
            caches, tables = decode_caches(batch, length, kv_heads, dim, layers)
            q = randn(batch, heads, dim)

            planned = decode.grid(batch, 1, length)[2]
            us = tune.graph_time(decode_runs(decode, caches, tables, q, length, None))
            sweep = {
                splits: round(
                    tune.graph_time(
                        decode_runs(decode, caches, tables, q, length, splits),
                        launches=12,
                        repeats=3,
                    ),
                    2,
                )
                for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
                if splits <= max(1, length // 64) and splits * batch <= 2048
            }
            best = min(sweep, key=lambda s: sweep[s])
            label = f"{name} decode {batch} x {length}"
            report(
                "attention",
                label,
                us,
                nbytes,
                splits=planned,
                best=f"{best}: {sweep[best]}",
                sweep=sweep,
            )
            del caches


def decode_runs(
    decode: PagedDecode,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    tables: torch.Tensor,
    q: torch.Tensor,
    length: int,
    splits: int | None,
) -> list[Run]:
    """One decode launch for each layer's cache; all requests have `length` keys."""
    batch, heads, dim = q.shape
    out = torch.empty(batch, heads * dim, dtype=BF16, device=DEVICE)
    cumulative = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    return [
        functools.partial(
            decode,
            out,
            q,
            k,
            v,
            tables,
            cumulative,
            lens,
            first_request=0,
            requests=batch,
            max_q=1,
            max_kv=length,
            scale=dim**-0.5,
            splits=splits,
        )
        for k, v in caches
    ]


def decode_caches(
    batch: int, length: int, kv_heads: int, dim: int, layers: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Caches of some layers with shuffled blocks, and their block table."""
    blocks = -(-length // 16)
    total = batch * blocks
    tables = torch.randperm(total, device=DEVICE).int().view(batch, blocks)
    caches = [
        (randn(total, 16, kv_heads, dim), randn(total, 16, kv_heads, dim)) for _ in range(layers)
    ]
    return caches, tables


def products() -> None:
    """Every variant of every product of both models, cuBLAS beside; fills the tuning cache."""
    for name, shapes in product_shapes().items():
        for label, (inner, outer) in shapes.items():
            context = linear_context(inner, outer)
            start = time.perf_counter()
            tune.choices(context)
            took = time.perf_counter() - start
            key = f"bfloat16 {inner} -> {outer}"
            times = tune._Table.of(0).entries[key]
            for bucket, found in times.items():
                best = min(found, key=lambda n: found[n])
                own = {n: t for n, t in found.items() if n != "cublas"}
                ranked = dict(sorted(own.items(), key=lambda item: item[1])[:3])
                nbytes = inner * outer * 2
                report(
                    "products",
                    f"{name} {label} M={bucket}",
                    found[best],
                    nbytes,
                    best=best,
                    cublas=found["cublas"],
                    ranked=ranked,
                    tuning_s=round(took, 1),
                )


def product_shapes() -> dict[str, dict[str, tuple[int, int]]]:
    """(inputs, outputs) of each product, by model."""
    return {
        name: {
            "qkv": (hidden, (heads + 2 * kv) * dim),
            "o": (heads * dim, hidden),
            "gate_up": (hidden, 2 * inner),
            "down": (inner, hidden),
            "head": (hidden, vocabulary),
        }
        for name, (hidden, inner, heads, kv, dim, vocabulary, _) in MODELS.items()
    }


def linear_context(inner: int, outer: int) -> OpContext:
    """The context of one product."""
    shape = {"in_features": inner, "out_features": outer, "bias": 0}
    return OpContext("linear", BF16, DeviceInfo(DEVICE, FEATURES), shape)


def chain() -> None:
    """All products of one decode step as a dependent chain in one graph, own and torch's."""
    for name, shapes in product_shapes().items():
        layers = MODELS[name][-1]
        weights = [
            {
                label: torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
                for label, (inner, outer) in shapes.items()
                if label != "head"
            }
            for _ in range(layers)
        ]
        inner, outer = shapes["head"]
        head = torch.empty(outer, inner, dtype=BF16, device=DEVICE).normal_(0, 0.02)
        nbytes = sum(w.numel() * 2 for layer in weights for w in layer.values()) + head.numel() * 2
        own = {label: linear.linear(linear_context(*size)) for label, size in shapes.items()}
        for rows in (1, 2, 4, 8, 16, 32, 64):
            # One stream makes a chain of the graph's kernels, so each may have an input of its own.
            inputs = {label: randn(rows, size[0]) for label, size in shapes.items()}
            for kind, call in (("own", own), ("cublas", dict.fromkeys(shapes, F.linear))):
                order = [(label, weight) for layer in weights for label, weight in layer.items()]
                order.append(("head", head))
                step = functools.partial(products_of, call, inputs, order)
                us = tune.graph_time([step], launches=2, repeats=5)
                report("chain", f"{name} {kind} M={rows}", us, nbytes)
        del weights, head
        torch.cuda.empty_cache()


def products_of(
    call: dict[str, Callable[..., torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    order: list[tuple[str, torch.Tensor]],
) -> None:
    """All products of a step, one after another."""
    for label, weight in order:
        call[label](inputs[label], weight, None)


def prefill() -> None:
    """torch's varlen attention: its signature, and its time on 8 prompts of 2,048."""
    import inspect

    from torch.nn.attention import varlen

    print(inspect.signature(varlen.varlen_attn))
    for name, (_, _, heads, kv_heads, dim, _, _) in MODELS.items():
        tokens, each = 8 * 2048, 2048
        q, k, v = (randn(tokens, h, dim) for h in (heads, kv_heads, kv_heads))
        cu = torch.arange(0, tokens + 1, each, dtype=torch.int32, device=DEVICE)
        for options in ({"window_size": (-1, 0)}, {"is_causal": True}):
            try:
                call = functools.partial(varlen.varlen_attn, q, k, v, cu, cu, each, each, **options)
                us = tune.graph_time([call], launches=4)
            except Exception as exc:
                print(f"varlen_attn {options}: {type(exc).__name__}: {str(exc)[:200]}")
                continue
            flops = 8 * each * each * heads * dim * 2  # causal: half of 4 n^2 d
            report(
                "prefill",
                f"{name} varlen 8 x 2048 {options}",
                us,
                tokens * dim * 2,
                tflops=round(flops / us / 1e6, 1),
            )
        batch = Batch(tuple((128, 1024) for _ in range(4)), contexts=4)
        shape = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "v_head_dim": dim,
            "block_size": 16,
            "softcap": 0,
            "sinks": 0,
            "window": 0,
        }
        args, kwargs = attention_arguments(
            DEVICE, BF16, torch.Generator().manual_seed(0), shape, batch
        )
        call = functools.partial(kernel("paged_attention", shape), *args, **kwargs)
        report(
            "prefill",
            f"{name} paged_decode as prefill 4 x 128/1024",
            tune.graph_time([call], launches=4),
            0,
        )
        reference = functools.partial(REFERENCES["paged_attention"], *args, **kwargs)
        start = time.perf_counter()
        reference()
        torch.cuda.synchronize()
        print(f"reference (eager) {(time.perf_counter() - start) * 1e6:.0f} us")


SECTIONS: dict[str, Callable[[], None]] = {
    "limits": limits,
    "launch": launches,
    "elementwise": elementwise,
    "attention": attention,
    "products": products,
    "chain": chain,
    "prefill": prefill,
}


def main(target: str, wanted: Iterable[str]) -> None:
    """Run the sections named, or all; the file is rewritten after each."""
    torch.manual_seed(0)
    names = list(wanted) or list(SECTIONS)
    for name in names:
        start = time.perf_counter()
        try:
            SECTIONS[name]()
        except Exception as exc:
            print(f"section {name} failed: {type(exc).__name__}: {exc}")
            RESULTS.append({"section": name, "error": f"{type(exc).__name__}: {exc}"})
        torch.cuda.empty_cache()
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        facts = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
        Path(target).write_text(json.dumps({**facts, "results": RESULTS}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
