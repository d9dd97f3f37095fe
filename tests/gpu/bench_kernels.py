"""Time every kernel of the CuPy pack: `python tests/gpu/bench_kernels.py OUT.json [SECTION ...]`.

Times are those of CUDA graph replays over rotated buffers that are together larger than the L2, so
memory is really read. `of floor` is the time that the least bytes take at the read bandwidth, over
the time measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu.bench_attention import attention, latent, prefill
from gpu.bench_common import RESULTS
from gpu.bench_decode import decode
from gpu.bench_norms import norms
from gpu.bench_products import chain, layers, products
from gpu.bench_recurrent import recurrent
from gpu.bench_sampling import copies, draws, float32_attention, penalties
from gpu.bench_small import elementwise, launches, limits, step

SECTIONS: dict[str, Callable[[], None]] = {
    "limits": limits,
    "launch": launches,
    "elementwise": elementwise,
    "step": step,
    "attention": attention,
    "decode": decode,
    "latent": latent,
    "products": products,
    "norms": norms,
    "layers": layers,
    "chain": chain,
    "prefill": prefill,
    "recurrent": recurrent,
    "draws": draws,
    "penalties": penalties,
    "copies": copies,
    "float32": float32_attention,
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
