"""A checkpoint's tensors by place: the repeated layers, and what stands around them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
_NUMBERED = re.compile(r"(?P<prefix>.*?)\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Modules:
    """Modules by path, each with the shapes of its parameters.

    Args:
        prefix: Where the layers are, e.g. "model.layers".
        layer: The modules of one layer, by path inside it.
        around: All other modules, by full path.
        uneven: Tensors that some layers have and others lack.
        count: How many layers there are.
        sparse: Which layers have experts, in order. Where only some have, `layer` holds the modules
            of both kinds.
        extra: How many more layers stand behind the model's own; they predict further tokens.
    """

    prefix: str
    layer: Mapping[str, Mapping[str, Shape]]
    around: Mapping[str, Mapping[str, Shape]]
    uneven: tuple[str, ...]
    count: int
    sparse: tuple[bool, ...] = ()
    extra: int = 0


def sort_tensors(shapes: Mapping[str, Shape], num_layers: int) -> Modules:
    """Sort tensors, given by name and shape, into the model's own layers and the rest."""
    matches = {name: found for name in shapes if (found := _NUMBERED.fullmatch(name))}
    votes = Counter(found["prefix"] for found in matches.values())
    prefix = votes.most_common(1)[0][0] if votes else ""
    layers: dict[str, dict[str, Shape]] = {}
    for name, found in matches.items():
        if found["prefix"] == prefix:
            layers.setdefault(found["index"], {})[found["rest"]] = shapes[name]
    extra = [index for index in layers if int(index) >= num_layers]
    for index in extra:
        del layers[index]
    by_number = [layers[index] for index in sorted(layers, key=int)]
    sparse = tuple(
        any("expert" in rest or (len(shape) == 3 and shape[1] > 1) for rest, shape in layer.items())
        for layer in by_number
    )
    shared: dict[str, Shape] = {}
    for kind in (False, True):
        alike = [layer for layer, has in zip(by_number, sparse, strict=True) if has is kind]
        if alike:
            common = set.intersection(*(set(layer) for layer in alike))
            shared |= {rest: shape for rest, shape in alike[0].items() if rest in common}
    uneven = tuple(
        f"{prefix}.{index}.{rest}"
        for index, layer in layers.items()
        for rest in layer
        if rest not in shared
    )
    around = [
        name for name in shapes if not (name in matches and matches[name]["prefix"] == prefix)
    ]
    return Modules(
        prefix=prefix,
        layer=_by_module(shared.items()),
        around=_by_module((name, shapes[name]) for name in around),
        uneven=uneven,
        count=len(layers),
        sparse=sparse,
        extra=len(extra),
    )


def _by_module(tensors: Iterable[tuple[str, Shape]]) -> dict[str, dict[str, Shape]]:
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in tensors:
        path, _, parameter = name.rpartition(".")
        modules.setdefault(path, {})[parameter] = shape
    return modules
