"""How a built model is filled: by its plugin's weight map, or from a converted checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from llmfw.errors import WeightError
from llmfw.models.converted import identity_of
from llmfw.models.prepare import PreparedModel
from llmfw.models.pretrained import PretrainedModel
from llmfw.weights import Checkpoint, LoadPlan, open_checkpoint, plan_weights
from llmfw.weights.converted import ConvertedCheckpoint
from llmfw.weights.converted_config import is_converted
from llmfw.weights.converted_plan import plan_converted
from llmfw.weights.layout import layout_digest
from llmfw.weights.safetensors_reader import SafetensorsCheckpoint
from llmfw.weights.source_record import read_source

logger = logging.getLogger("llmfw.models")


def open_weights(prepared: PreparedModel) -> Checkpoint:
    """The checkpoint of a prepared model, headers only; of a converted one, this rank's tensors."""
    path = prepared.source.checkpoint_path
    if is_converted(path):
        return ConvertedCheckpoint(path, prepared.model_config.mapping.rank)
    return open_checkpoint(path)


def plan_of(
    prepared: PreparedModel, model: PretrainedModel[Any], checkpoint: Checkpoint
) -> LoadPlan:
    """How a built model is filled: by its plugin's weight map, or from a converted checkpoint.

    Args:
        prepared: What the model was built from.
        model: The model, on the meta device.
        checkpoint: From `open_weights`, or the headers that a converted checkpoint has kept.

    Raises:
        WeightError: If tensors and parameters do not fit, or a converted checkpoint was made for
            other modules.
    """
    config = model.model_config
    if isinstance(checkpoint, ConvertedCheckpoint):
        source_plan = checked_layout(prepared, model, checkpoint)
        return plan_converted(model, checkpoint, config.mapping, source_plan)
    weight_map = prepared.host.hook.llmfw_weight_map(model_config=config, checkpoint=checkpoint)
    try:
        return plan_weights(model, checkpoint, weight_map, config.mapping)
    except WeightError as exc:
        method = quantised_by(prepared.raw_config)
        if method is None or checkpoint.format != SafetensorsCheckpoint.format:
            raise
        raise WeightError(
            f"{checkpoint.path}: its weights are quantised by {method}; "
            "of quantised weights, MXFP4, float8 with scales by blocks, and GGUF files are read",
            hint="take the model in bfloat16 or float16, or as a GGUF file",
        ) from exc


def quantised_by(raw: Mapping[str, Any]) -> str | None:
    """The method that a raw config.json says its weights are quantised by; None: it says none."""
    for part in (raw, raw.get("text_config")):
        quantised = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(quantised, Mapping) and quantised.get("quant_method"):
            return str(quantised["quant_method"])
    return None


def checked_layout(
    prepared: PreparedModel, model: PretrainedModel[Any], checkpoint: ConvertedCheckpoint
) -> LoadPlan | None:
    """Hold a converted checkpoint against the modules of another version than it was made with.

    The plan is made anew from the source's headers: where it is the same, so are the weights.

    Returns:
        That plan, where it was made: also where tensors stay packed, which are read by it.

    Raises:
        WeightError: If the modules want their weights otherwise.
    """
    ours, theirs = identity_of(prepared.resolved), checkpoint.config.plugin
    core = version("llmfw-core")
    same_version = (theirs, checkpoint.config.core_version) == (ours, core)
    if same_version and checkpoint.packed is None:
        return None
    made = f"{theirs.label} and llmfw-core {checkpoint.config.core_version}"
    here = f"{ours.label} and llmfw-core {core} are here"
    source = read_source(checkpoint.path)
    comparable = source is not None and bool(checkpoint.config.layouts)
    if not comparable and not same_version:
        logger.warning("%s was made with %s; %s", checkpoint.path, made, here)
    if source is None or not (comparable or checkpoint.packed):
        return None
    plan = plan_of(prepared, model, source.headers())
    if comparable and layout_digest(plan) != checkpoint.config.layouts[checkpoint.rank]:
        raise WeightError(
            f"{checkpoint.path}: was made with {made}; {here}, "
            "and their modules want the weights otherwise",
            hint="convert the model again: llmfw convert MODEL OUT",
        )
    if comparable and not same_version:
        logger.info("%s was made with %s; %s, and fill alike", checkpoint.path, made, here)
    return plan
