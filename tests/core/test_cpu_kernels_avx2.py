"""The CPU pack as CPUs without AVX-512 compile it, run on whatever CPU there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmfw.ops.device import cpu_features, cpu_flags

AS_AVX2 = """
import sys
from llmfw.kernels.cpu import library
from llmfw.ops import device

flags = frozenset(f for f in device.cpu_flags() if not f.startswith(("avx512", "avx_", "amx")))
device.cpu_flags = library.cpu_flags = lambda: flags
native, least = "-march=native", "-march=x86-64-v3"
assert native in library.FLAGS
library.FLAGS = tuple(least if flag == native else flag for flag in library.FLAGS)

from llmfw_cli.app import app

app(["kernels", "check", "--kernel", "cpu", "--device", "cpu"])
"""


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in cpu_features(cpu_flags()), reason="the CPU has no AVX2")
def test_every_kernel_equals_its_reference_with_avx2_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_AVX2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) >= 9, done.stdout
    assert all(row.rstrip().endswith("ok") for row in rows), done.stdout
