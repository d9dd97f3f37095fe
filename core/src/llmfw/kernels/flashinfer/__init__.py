"""FlashInfer's attention of prompts over the paged cache: the kernel pack "flashinfer".

Imports FlashInfer only when the pack's kernel is chosen.
"""

from __future__ import annotations

from llmfw.kernels.flashinfer.declarations import FlashInferPack

pack = FlashInferPack()
