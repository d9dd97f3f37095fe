"""What the CuPy pack offers: one `Kernel` for each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext, load_object
from llmfw.plugins import hookimpl

REQUIRES = ("cuda", "sm_80", "cupy")
HALVES = ("bfloat16", "float16")
ALL = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
EXACT = dict.fromkeys(ALL, 0.0)
FLOAT32 = dict.fromkeys(ALL, 1e-5)  # results are float32 whatever the inputs
PRIORITY = 100
FOLDER = "llmfw.kernels.cupy"


def _supports(module: str) -> Callable[[OpContext], str | None]:
    """The predicate `supports` of a launcher's module, imported when first asked."""

    def predicate(context: OpContext) -> str | None:
        reason: str | None = load_object(f"{FOLDER}.{module}:supports")(context)
        return reason

    return predicate


def _lacks_copies(info: DeviceInfo) -> str | None:
    """None on compute capability 9.0, for whose tensor copies some sources are written."""
    has_them = load_object(f"{FOLDER}.streamed:has_tile_products")(info)
    return None if has_them else "needs the tensor copies of compute capability 9.0"


def _kernel(
    op: str,
    module: str,
    function: str,
    dtypes: tuple[str, ...],
    supports: str | None = None,
    name: str | None = None,
    priority: int = PRIORITY,
    tolerance: Mapping[str, float] = TOLERANCE,
    available: Callable[[DeviceInfo], str | None] | None = None,
) -> Kernel:
    return Kernel(
        op=op,
        name=f"cupy.{name or op}",
        factory=f"{FOLDER}.{module}:{function}",
        requires=REQUIRES,
        dtypes=dtypes,
        supports=_supports(supports or module),
        priority=priority,
        tolerance=tolerance,
        available=available,
    )


KERNELS: tuple[Kernel, ...] = (
    _kernel("embedding", "embedding", "embedding", ALL, tolerance=EXACT),
    _kernel("rms_norm", "norm", "rms_norm", ALL),
    _kernel("add_rms_norm", "norm", "add_rms_norm", ALL),
    _kernel("layer_norm", "norm", "layer_norm", ALL),
    _kernel("gated_rms_norm", "norm", "gated_rms_norm", ALL),
    _kernel("silu_and_mul", "activation", "gated_activation", ALL),
    _kernel("gelu_and_mul", "activation", "gated_activation", ALL),
    _kernel("gelu_tanh_and_mul", "activation", "gated_activation", ALL),
    _kernel("rope_and_cache", "rope_cache", "rope_and_cache", ALL),
    _kernel("latent_rope_and_cache", "latent_rope", "latent_rope_and_cache", ALL),
    _kernel("paged_attention", "attention", "paged_attention", HALVES, supports="paged_decode"),
    _kernel(
        "paged_attention",
        "paged_streamed",
        "paged_streamed",
        HALVES,
        name="paged_streamed",
        priority=PRIORITY + 1,
        available=_lacks_copies,
    ),
    _kernel("paged_attention", "paged_simt", "paged_attention", ("float32",), name="paged_simt"),
    _kernel(
        "paged_attention",
        "latent_attention",
        "latent_attention",
        HALVES,
        name="latent_attention",
    ),
    _kernel(
        "paged_attention",
        "latent_tiles",
        "latent_tiles",
        HALVES,
        name="latent_tiles",
        priority=PRIORITY + 1,
        available=_lacks_copies,
    ),
    _kernel("expanded_attention", "expanded_attention", "expanded_attention", HALVES),
    _kernel("head_linear", "head_linear", "head_linear", HALVES),
    _kernel("linear", "linear", "linear", ALL),
    _kernel("float32_linear", "float32_linear", "float32_linear", HALVES, tolerance=FLOAT32),
    _kernel("gated_linear", "gated_linear", "gated_linear", ALL),
    *(
        _kernel(op, "normed_linear", op, ("bfloat16",))
        for op in ("add_linear", "normed_linear", "normed_gated_linear")
    ),
    _kernel("causal_conv1d", "causal_conv", "causal_conv1d", ALL),
    _kernel("selective_scan", "scans", "selective_scan", ALL),
    _kernel("ssd_scan", "scans", "ssd_scan", ALL),
    _kernel(
        "ssd_scan",
        "ssd_chunks",
        "ssd_scan",
        ("bfloat16",),
        name="ssd_chunks",
        priority=PRIORITY + 1,
    ),
    _kernel("moe_route", "moe_route", "moe_route", ALL),
    _kernel("moe_experts", "moe_experts", "moe_experts", HALVES),
    _kernel("prepare_decode", "step", "prepare_decode", ALL),
    _kernel("argmax", "step", "argmax", ALL),
    _kernel("draw_tokens", "draw", "draw_tokens", ALL),
    _kernel("penalise", "penalise", "penalise", ("float32",)),
    _kernel("copy_blocks", "copy_blocks", "copy_blocks", ALL),
)


class CupyPack:
    """The plugin object of the entry point `cupy`."""

    @hookimpl
    def llmfw_kernels(self, device: DeviceInfo) -> list[Kernel]:
        """All kernels; each says itself what it requires."""
        return list(KERNELS)
