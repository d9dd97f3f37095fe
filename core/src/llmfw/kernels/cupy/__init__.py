"""CuPy kernels: `.cu` sources compiled by NVRTC at first use, each with its thin launcher.

Imports neither CuPy nor a launcher until a kernel of the pack is chosen.
"""

from __future__ import annotations

from llmfw.kernels.cupy.declarations import CupyPack

pack = CupyPack()
