"""The environment variables that llmfw reads; one with our prefix that nobody reads is told of."""

from __future__ import annotations

import os
from difflib import get_close_matches

#: Those read elsewhere than by an option: by core or the fallback, and by a checkout's set-up.
READ_BY_CORE = (
    "LLMFW_CACHE",
    "LLMFW_DISABLE_PLUGINS",
    "LLMFW_EXTENSIONS",
    "LLMFW_HUGE_PAGES",
    "LLMFW_PDL",
    "LLMFW_PINNED_LOADING",
    "LLMFW_PLUGINS",
    "LLMFW_PLUGIN_MODULES",
    "LLMFW_PREFER",
    "LLMFW_PRODUCT_ROWS",
    "LLMFW_REPLACE_LAYERS",
    "LLMFW_TRACE_HOOKS",
    "LLMFW_TUNE",
)
READ_BY_SETUP = ("LLMFW_TORCH", "LLMFW_TORCH_INDEX_URL")
READ_BY_OPTIONS = (
    "LLMFW_ATTN_BACKEND",
    "LLMFW_BLOCK_SIZE",
    "LLMFW_CHUNKED_PREFILL",
    "LLMFW_CUDA_GRAPHS",
    "LLMFW_DEBUG",
    "LLMFW_DEVICE",
    "LLMFW_DTYPE",
    "LLMFW_ENGINE_SEED",
    "LLMFW_FREQUENCY_PENALTY",
    "LLMFW_GENERATION_CONFIG",
    "LLMFW_KERNELS",
    "LLMFW_KV_CACHE_MEMORY",
    "LLMFW_LOAD_FORMAT",
    "LLMFW_LOG_LEVEL",
    "LLMFW_MAX_MODEL_LEN",
    "LLMFW_MAX_NUM_BATCHED_TOKENS",
    "LLMFW_MAX_NUM_SEQS",
    "LLMFW_MAX_TOKENS",
    "LLMFW_MIN_P",
    "LLMFW_MIN_TOKENS",
    "LLMFW_MODEL",
    "LLMFW_NUM_BEAMS",
    "LLMFW_NO_FALLBACK",
    "LLMFW_OVERLAP",
    "LLMFW_PREFIX_CACHING",
    "LLMFW_PRESENCE_PENALTY",
    "LLMFW_QUIET",
    "LLMFW_REPETITION_PENALTY",
    "LLMFW_SEED",
    "LLMFW_TEMPERATURE",
    "LLMFW_TOKENIZER",
    "LLMFW_TOP_K",
    "LLMFW_TOP_P",
)
KNOWN = frozenset((*READ_BY_CORE, *READ_BY_SETUP, *READ_BY_OPTIONS))


def unknown_variables() -> list[str]:
    """One line for each LLMFW_ variable that is set and read by nothing."""
    lines: list[str] = []
    for name in sorted(os.environ):
        if name.startswith("LLMFW_") and name not in KNOWN:
            near = get_close_matches(name, KNOWN, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"the environment variable {name} is not known and does nothing{meant}")
    return lines
