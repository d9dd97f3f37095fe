"""The names of the CuPy pack's own kernels, as a pattern for compute-sanitizer's --kernel-name:
`python tests/gpu/kernel_names.py`. What libraries launch is not ours to check.
"""

from __future__ import annotations

import re
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "core" / "src" / "llmfw" / "kernels" / "cupy"
_KERNEL = re.compile(
    r'extern "C" __global__ void\s*(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\('
)


def names() -> list[str]:
    """Every kernel of every source; they are extern "C", so these are the mangled names too."""
    return [name for path in sorted(SOURCES.glob("*.cu")) for name in names_of(path.read_text())]


def names_of(source: str) -> list[str]:
    """The kernels that one source defines."""
    return _KERNEL.findall(source)


if __name__ == "__main__":
    print(f"regex=^({'|'.join(names())})$")
