"""The model that ours is held against: transformers' own, or one that the author names."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfw.errors import ConfigError, UsageError
from llmfw.weights import Checkpoint

ATTENTION = "eager"
"""transformers' plainest attention: its faster ones leave out soft caps and sinks."""

MOST_PARAMETERS = 20_000_000
"""Of a model that is made tiny for checks."""

ReferenceFactory = Callable[[Any], nn.Module]
"""Called with the pretrained configuration; its `state_dict` has the checkpoint's names, and
`forward(input_ids [1, tokens])` gives logits [1, tokens, vocab], bare, first of a tuple, or as
`.logits`."""


def load_factory(reference: str | ReferenceFactory) -> ReferenceFactory:
    """The factory that "module:factory" names.

    Raises:
        UsageError: If there is no such function.
    """
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise UsageError(
            f"reference {reference!r} cannot be imported: {exc}",
            hint="give it as module:factory, e.g. mymodel_plugin.reference:make",
        ) from exc
    return factory  # type: ignore[no-any-return]


def transformers_config(raw: Mapping[str, Any]) -> Any | None:
    """transformers' own reading of a raw configuration; None where it does not know the type."""
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    with quiet_transformers():
        return CONFIG_MAPPING[model_type].from_dict(dict(raw))


def require_tiny(config: Any) -> None:
    """Refuse a configuration that was meant to be tiny and is not; nothing is allocated.

    Raises:
        ConfigError: If transformers' model of it is larger than any tiny one.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
        except ValueError:
            return  # make_reference tells
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise ConfigError(
            f"the tiny configuration gives {type(model).__name__} {count / 1e6:.0f} million "
            f"parameters; {MOST_PARAMETERS // 1_000_000} are the most",
            hint="give smaller sizes in `tiny_config`: hidden size 64, two layers, vocabulary 128",
        )


def make_reference(
    config: Any, reference: str | ReferenceFactory | None = None, *, dtype: torch.dtype
) -> nn.Module:
    """A reference model of a configuration, its weights still random.

    Raises:
        ConfigError: If transformers has no such model and no reference is named.
    """
    if reference is not None:
        return load_factory(reference)(config).to(dtype).eval()
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
        except ValueError as exc:
            if "Unrecognized configuration class" in str(exc):
                raise no_reference(config) from exc
            raise
    return model.eval()  # type: ignore[no-any-return]


def no_reference(config: Any) -> ConfigError:
    """The error for a configuration that transformers has no model for."""
    return ConfigError(
        f"transformers has no causal model for {type(config).__name__}, so there is nothing to "
        "compare with",
        hint="name one: `reference = ...` in the contract, --reference module:factory in verify",
    )


def load_reference(
    config: Any,
    model_dir: Path,
    checkpoint: Checkpoint,
    reference: str | ReferenceFactory | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A reference model with a real checkpoint's weights."""
    if reference is None and checkpoint.format == "safetensors":
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, config=config, dtype=dtype, attn_implementation=ATTENTION
            )
        return model.eval().to(device)  # type: ignore[no-any-return]
    model = make_reference(config, reference, dtype=dtype)
    fill_reference(model, checkpoint)
    return model.to(device)


def fill_reference(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model of the same names, one at a time.

    Raises:
        ConfigError: If a parameter gets no tensor.
    """
    state = model.state_dict(keep_vars=True)
    names = set(checkpoint.names())
    filled = {state[name].data_ptr() for name in names & set(state)}
    left = [name for name, value in state.items() if value.data_ptr() not in filled]
    left = [name for name in left if isinstance(state[name], nn.Parameter)]
    if left:
        raise ConfigError(
            f"the reference {type(model).__name__} has parameters that the checkpoint does not: "
            + ", ".join(left[:5]),
            hint="its state_dict must have the checkpoint's names",
        )
    with torch.no_grad():
        for name in names & set(state):
            state[name].copy_(checkpoint.tensor(name))


def randomize(model: nn.Module, seed: int = 0, *, scale: float = 1.0) -> None:
    """Random weights, large enough that every one tells.

    Args:
        model: A reference model.
        seed: Equal seeds give equal weights.
        scale: Of matrices and biases. Small ones make hidden states so faint that the constants
            in norms decide.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15 * scale)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3 * scale)
            else:
                parameter.add_(noise.to(parameter.dtype) * 0.2)


def write_checkpoint(model: nn.Module, raw: Mapping[str, Any], folder: Path) -> None:
    """Write a reference model as a checkpoint, in the names that its files have on disk.

    Args:
        model: transformers' or the author's.
        raw: What config.json says beside the model's own fields; `architectures` above all.
        folder: Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save: Any = getattr(model, "save_pretrained", None)
    if save is not None:
        with quiet_transformers():
            save(folder)
        written = json.loads((folder / "config.json").read_text("utf-8"))
    else:
        from safetensors.torch import save_file

        tensors = {name: value.detach().clone() for name, value in _untied(model)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        written = {}
    (folder / "config.json").write_text(json.dumps({**written, **raw}, indent=2), "utf-8")


def _untied(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield name, value


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while it builds, loads or saves."""
    from transformers.utils import logging as their_logging

    bars = their_logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers")
    level = logger.level
    their_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            their_logging.enable_progress_bar()
