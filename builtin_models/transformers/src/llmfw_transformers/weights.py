"""transformers' conversion of checkpoints, as the rules of a weight map."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from llmfw import ModelConfig, WeightMap
from llmfw.errors import WeightError
from llmfw.weights import Checkpoint
from llmfw_transformers.architectures import NAME, declared_model


def weight_map(model_config: ModelConfig[Any], checkpoint: Checkpoint) -> WeightMap:
    """Rules for exactly the tensors of a checkpoint: what transformers would do with each.

    Raises:
        WeightError: If transformers converts a tensor in a way that our rules cannot.
    """
    with torch.device("meta"):
        model = declared_model(model_config.pretrained_config)
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    state = model.state_dict()
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    rules = WeightMap()
    collected: dict[tuple[str, int], dict[str, list[str]]] = {}
    by_source = {source: n for n, each in enumerate(converters) for source in each.source_patterns}
    for name in sorted(checkpoint.names(), key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None:
            sources = collected.setdefault((target, by_source[pattern]), defaultdict(list))
            sources[pattern].append(name)
        elif target not in state and any(each.search(target) for each in ignored):
            rules = rules.ignore(name, "transformers leaves it out")
        elif target != name:
            rules = rules.rename(name, target)
    for (target, index), sources in collected.items():
        rules = _converted(rules, converters[index], target, sources)
    return rules


def _converted(
    rules: WeightMap, converter: Any, target: str, sources: dict[str, list[str]]
) -> WeightMap:
    """The rules of one converter for one parameter (the first, where it gives several)."""
    operations = list(converter.operations)
    parts = [sources[pattern] for pattern in converter.source_patterns if sources[pattern]]
    if operations and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0:
        stacked = []
        for index, names in enumerate(parts):
            stacked.append(target if len(parts) == 1 else f"{target}.part{index}")
            rules = _stack(rules, stacked[-1], names)
        parts = [[name] for name in stacked]
        operations = operations[1:]
    names = [name for each in parts for name in each]
    for operation in operations:
        if isinstance(operation, Concatenate):
            rules = rules.fuse(target, names, operation.dim)
            names = [target]
        elif isinstance(operation, Chunk):
            rules = rules.split(names[0], _targets(converter, target), dim=operation.dim)
            names = []
        elif isinstance(operation, Transpose) and (operation.dim0, operation.dim1) == (0, 1):
            rules = rules.transpose(names[0])
        else:
            raise WeightError(
                f"transformers makes {target} from {', '.join(names[:3])} by "
                f"{type(operation).__name__}, which the fallback {NAME} does not know",
                hint="save the model once by transformers' save_pretrained(save_original_format="
                "False), or write a plugin of its own: llmfw new --from MODEL",
            )
    if names and names != [target]:
        rules = rules.rename(names[0], target)
    return rules


def _targets(converter: Any, first: str) -> list[str]:
    """The parameters of a converter that gives several, from the first one's name."""
    own = converter.target_patterns[0]
    return [first.replace(own, pattern) for pattern in converter.target_patterns]


def _stack(rules: WeightMap, target: str, names: Sequence[str]) -> WeightMap:
    """Numbered tensors, one on the other; the number is the part in which their names differ."""
    split = [name.split(".") for name in names]
    differing = [n for n, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
    place = differing[0] if differing else next(n for n, p in enumerate(split[0]) if p.isdigit())
    pattern = ".".join("{e}" if n == place else part for n, part in enumerate(split[0]))
    return rules.stack(target, pattern, len(names))
