"""Settings of a model that depend on its configuration: dtype, device and longest sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmfw.config import text_config
from llmfw.errors import CheckpointError, ConfigError, DeviceError, UsageError
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.weights import open_checkpoint

DTYPE_ALIASES = {
    **DTYPE_NAMES,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_SCALED_LENGTH = ("dynamic", "yarn", "longrope", "linear", "llama3")


def choose_dtype(
    wanted: str | torch.dtype,
    raw: dict[str, Any],
    stored: Callable[[], torch.dtype | None] = lambda: None,
) -> torch.dtype:
    """The dtype asked for; with "auto" the raw configuration's, or where it has none the files'.

    Args:
        wanted: A dtype, its name, or "auto".
        raw: config.json.
        stored: Called where the configuration names none: the dtype of the checkpoint's tensors;
            None, and so float32, where there are no files.

    Raises:
        UsageError: If the name is not a dtype that models run in.
    """
    if isinstance(wanted, torch.dtype):
        wanted = str(wanted).removeprefix("torch.")
    if wanted == "auto":
        text = raw.get("text_config") or {}
        wanted = (
            raw.get("dtype")
            or raw.get("torch_dtype")
            or text.get("dtype")
            or text.get("torch_dtype")
            or str(stored() or torch.float32).removeprefix("torch.")
        )
    if wanted not in DTYPE_ALIASES:
        raise UsageError(
            f"dtype {wanted!r} is not one that models run in",
            hint=f"known: auto, {', '.join(DTYPE_ALIASES)}",
        )
    return DTYPE_ALIASES[wanted]


def stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype that most tensors of a checkpoint have, of those that models run in.

    None where there is no checkpoint, or none that can be opened: loading it tells why.
    """
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return None
    found = Counter(checkpoint.info(name).dtype for name in checkpoint.names())
    kept = {dtype: count for dtype, count in found.items() if dtype in DTYPE_ALIASES.values()}
    return max(kept, key=lambda dtype: kept[dtype], default=None)


def choose_device(wanted: str | torch.device) -> torch.device:
    """The device asked for, or with "auto" the first GPU and else the CPU.

    Raises:
        DeviceError: If there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as exc:
        raise UsageError(
            f"device {wanted!r} is not known", hint="known: auto, cpu, cuda, cuda:N"
        ) from exc
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"there is no device {wanted}: torch sees {torch.cuda.device_count()} GPUs",
                hint="use --device cpu, or install torch with CUDA",
            )
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UsageError(
            f"device {wanted!r} is not supported", hint="known: auto, cpu, cuda, cuda:N"
        )
    return device


def choose_max_model_len(wanted: int | None, config: Any) -> int:
    """The longest sequence the engine will run: as asked, else max_position_embeddings.

    Raises:
        ConfigError: If it is more than the positions the model has.
    """
    limit = max_positions_of(config)
    if wanted is None:
        return _default_positions(config) or 2048
    if wanted < 1:
        raise UsageError(f"max_model_len {wanted} is not positive")
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"max_model_len {wanted} is more than the {limit} positions of the model",
            hint="lower max_model_len, or set a rope scaling in config.json",
        )
    return wanted


def max_positions_of(config: Any) -> int | None:
    """The most positions the model can run: max_position_embeddings, or more by rope scaling."""
    positions = _default_positions(config)
    if positions is None:
        return None
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _SCALED_LENGTH or not rope.get("factor"):
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * rope["factor"]))


def _default_positions(config: Any) -> int | None:
    value = getattr(text_config(config), "max_position_embeddings", None)
    return int(value) if value else None
