"""Every CUDA source compiles for every architecture we name, with nvcc or NVRTC, without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfw.kernels.cupy.compile import FOLDER, options_for

BF16, F16, F32 = 0, 1, 2
USES: dict[str, list[dict[str, int | str]]] = {
    "norm.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HIDDEN": 576, "THREADS": 64},
        {"DTYPE": F32, "HIDDEN": 128, "THREADS": 32, "ROWS": 4},
    ],
    "embedding.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HIDDEN": 72, "THREADS": 32, "ROWS": 4},
        {"DTYPE": F32, "HIDDEN": 2568, "EACH": 1},
    ],
    "float32_linear.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "IN": 520, "ROWS": 1, "OUTPUTS": 1}],
    "activation.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "WIDTH": 1000}, {"DTYPE": F32}],
    "rope_cache.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEAD_DIM": 80, "ROTARY_DIM": 32, "INTERLEAVED": 1},
        {"DTYPE": F32, "WIDTH": 4, "LANES": 16},
    ],
    "paged_decode.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEAD_DIM": 80, "ROWS": 16, "BLOCK_SIZE": 8, "SOFTCAP": 1},
        {"DTYPE": F16, "HEAD_DIM": 96, "V_DIM": 64},
        {"DTYPE": BF16, "WARPS": 8, "MIN_BLOCKS": 1},
    ],
    "paged_staged.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEAD_DIM": 192, "V_DIM": 128, "WARPS": 8, "STAGES": 2, "SOFTCAP": 1},
        {"DTYPE": BF16, "HEAD_DIM": 144, "V_DIM": 112, "BLOCK_SIZE": 8, "STAGES": 1},
    ],
    "paged_streamed.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEAD_DIM": 192, "V_DIM": 128, "ROWS": 16, "STAGES": 2, "SOFTCAP": 1},
        {"DTYPE": BF16, "HEAD_DIM": 64, "WARPS": 8, "MIN_BLOCKS": 1, "BLOCK_SIZE": 32},
    ],
    "paged_simt.cu": [
        {"DTYPE": F32},
        {"DTYPE": F32, "HEAD_DIM": 256, "MIN_BLOCKS": 1, "SOFTCAP": 1},
        {"DTYPE": F32, "HEAD_DIM": 576, "V_DIM": 512, "ROWS": 2, "GROUP": 16, "MIN_BLOCKS": 1},
        {"DTYPE": F32, "HEAD_DIM": 80, "ROWS": 8, "MIN_BLOCKS": 1, "BLOCK_SIZE": 24},
    ],
    "latent_attention.cu": [
        {"DTYPE": BF16, "MIN_BLOCKS": 2},
        {"DTYPE": BF16, "KEYS": 64},
        {"DTYPE": BF16, "ROWS": 64, "HEADS": 128},
        {"DTYPE": F16, "HEAD_DIM": 64, "V_DIM": 48, "HEADS": 3, "BLOCK_SIZE": 24, "KEYS": 16},
    ],
    "latent_tiles.cu": [
        {"DTYPE": BF16, "CLUSTER": 2},
        {"DTYPE": BF16, "ROWS": 64, "WARPGROUPS": 2, "HEADS": 128},
        {"DTYPE": F16, "HEAD_DIM": 192, "V_DIM": 128, "HEADS": 3, "BLOCK_SIZE": 24, "CLUSTER": 3},
    ],
    "merge_latent.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "V_DIM": 48, "HEADS": 3, "ROWS": 64}],
    "latent_rope.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEADS": 5, "LATENT_DIM": 27, "ROTARY_DIM": 6, "WIDTH": 1},
        {"DTYPE": F32, "INTERLEAVED": 0},
    ],
    "head_linear.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "IN": 512, "OUT": 128, "SHARERS": 4}],
    "expand_latents.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "HEADS": 3, "V_DIM": 64}],
    "gather_cache.cu": [
        {"DTYPE": BF16, "V_PACKS": 0},
        {"DTYPE": F16, "BLOCK_SIZE": 24, "K_PACKS": 10},
    ],
    "causal_conv1d.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "CHANNELS": 77, "WIDTH": 1, "TAPS": 2, "TILE": 1},
        {"DTYPE": F32, "TAPS": 9},
    ],
    "selective_scan.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "CHANNELS": 33, "STATE": 256},
        {"DTYPE": F32, "STATE": 4},
    ],
    "ssd_chunks.cu": [{"DTYPE": BF16}, {"DTYPE": BF16, "GROUPS": 8, "STATE": 32}],
    "ssd_scan.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "HEAD_DIM": 9, "STATE": 16, "ROWS": 1, "WARPS": 1},
        {"DTYPE": F32, "STATE": 512},
    ],
    "prepare_decode.cu": [{"DTYPE": BF16}],
    "argmax.cu": [{"DTYPE": BF16}, {"DTYPE": F32, "WIDTH": 1, "VOCAB": 77}],
    "draw_cut.cu": [{"DTYPE": BF16}, {"DTYPE": F32, "WIDTH": 1, "VOCAB": 77}],
    "draw_tokens.cu": [{"DTYPE": BF16}, {"DTYPE": F32, "WIDTH": 1, "VOCAB": 77}],
    "copy_blocks.cu": [{"DTYPE": BF16}],
    "penalise.cu": [{"DTYPE": F32}],
    "gemv.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "IN": 1000, "ROWS": 4, "SHARERS": 1, "IN_FLIGHT": 4},
        {"DTYPE": F32, "ROWS": 2},
        {"DTYPE": BF16, "ROWS": 4, "GATED": 1, "OUTPUTS": 1},
        {"DTYPE": BF16, "ADDS": 1},
        {"DTYPE": BF16, "GATED": 1, "OUTPUTS": 1, "NORMED": 1, "IN": 1000},
    ],
    "streamed.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "ROWS": 64, "WARPS": 8, "CHUNK": 64, "SPLIT": 8},
        {"DTYPE": BF16, "ROWS": 8, "GATED": 1, "SPLIT": 2},
        {"DTYPE": BF16, "ROWS": 64, "SPLIT": 4, "ADDS": 1},
        {"DTYPE": BF16, "ROWS": 64, "WARPS": 8, "GATED": 1, "NORMED": 1},
    ],
    "tiled.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "ROWS": 256, "TILE": 208, "STAGES": 3},
        {
            "DTYPE": BF16,
            "ROWS": 256,
            "TILE": 224,
            "SHARE": 2,
            "GATED": 1,
            "X_STAGES": 3,
            "PACKED": 1,
        },
        {"DTYPE": BF16, "ROWS": 256, "TILE": 144, "SPLIT": 4, "X_STAGES": 3, "BIAS": 0},
        {"DTYPE": BF16, "ROWS": 128, "TILE": 160, "SHARE": 2, "SPLIT": 4},
        {"DTYPE": BF16, "ROWS": 128, "TILE": 96, "SPLIT": 2, "PARTS": 2, "STAGES": 8},
        {"DTYPE": F16, "ROWS": 64, "TILE": 192, "GATED": 1, "GROUPS": 1, "PARTS": 4},
    ],
    "moe_route.cu": [{"DTYPE": BF16}, {"DTYPE": F32, "EXPERTS": 1000}],
    "moe_order.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "EXPERTS": 1000, "ROWS": 64}],
    "moe_gemv.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "GATED": 0, "OUTPUTS": 2, "SHARERS": 8},
        {"DTYPE": BF16, "IN": 2880, "ACTIVATION": "fminf(gate, 7.0f) * (up + 1.0f)"},
    ],
    "moe_grouped.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "UP": 0, "GATED": 0, "WIDE": 128, "ROWS": 64},
        {"DTYPE": BF16, "IN": 2880, "ACTIVATION": "fminf(gate, 7.0f) * (up + 1.0f)"},
    ],
    "moe_activation.cu": [
        {"DTYPE": BF16},
        {"DTYPE": F16, "WIDTH": 2880, "ACTIVATION": "gate + up"},
    ],
    "moe_combine.cu": [{"DTYPE": BF16}, {"DTYPE": F16, "HIDDEN": 2880}],
}
QUICK = ("sm_80", "sm_90a")
THOROUGH = ("sm_89", "sm_90", "sm_100")
Compiler = Callable[[str, str, dict[str, int | str]], None]


def test_every_source_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.cu")} == set(USES)


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    if nvcc := shutil.which("nvcc"):

        def with_nvcc(source: str, arch: str, defines: dict[str, int | str]) -> None:
            number = arch.removeprefix("sm_")
            command = [
                nvcc,
                "-cubin",
                f"-gencode=arch=compute_{number},code=sm_{number}",
                "-Werror",
                "all-warnings",
                *[
                    option.replace(",", "\\,")  # at a bare one nvcc, not NVRTC, parts an option
                    for option in options_for(arch, defines)
                    if not option.startswith(("-arch", "-default"))
                ],
                str(FOLDER / source),
                "-o",
                str(tmp_path / "out.cubin"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        return with_nvcc
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as exc:
        pytest.skip(f"neither nvcc nor NVRTC here: {exc}")

    def with_nvrtc(source: str, arch: str, defines: dict[str, int | str]) -> None:
        from llmfw.kernels.cupy.compile import _run_nvrtc

        assert _run_nvrtc(source, options_for(arch, defines))

    return with_nvrtc


def uses(all_of_them: bool) -> list[tuple[str, dict[str, int | str]]]:
    """Each source with its first constants, or with all."""
    return [
        (source, defines)
        for source, variants in USES.items()
        for defines in (variants if all_of_them else variants[:1])
    ]


def as_shipped(arch: str, defines: dict[str, int | str]) -> dict[str, int | str]:
    """Launches overlap from compute capability 9.0 on."""
    return {**defines, "PDL": int(int(arch.strip("sm_a")) >= 90)}


@pytest.mark.parametrize("arch", QUICK)
@pytest.mark.parametrize("source", USES)
def test_source_compiles(source: str, arch: str, compiler: Compiler) -> None:
    compiler(source, arch, as_shipped(arch, USES[source][0]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", QUICK + THOROUGH)
@pytest.mark.parametrize(("source", "defines"), uses(all_of_them=True), ids=str)
def test_source_compiles_for_every_use(
    source: str, defines: dict[str, int | str], arch: str, compiler: Compiler
) -> None:
    compiler(source, arch, as_shipped(arch, defines))
