"""The digest of a plan: the same for the same places, another for any other place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmfw.weights import MemoryCheckpoint, WeightMap, plan_weights
from llmfw.weights.layout import layout_digest
from weight_modules import module_of

TENSORS = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
MAPS: dict[str, Callable[[], WeightMap]] = {
    "as it is": lambda: WeightMap().ignore("b", "not needed"),
    "the other": lambda: WeightMap().rename({"a": "c", "b": "a"}).ignore("c", "not needed"),
    "transposed": lambda: WeightMap().transpose("a").ignore("b", "not needed"),
    "reordered": lambda: WeightMap().reorder("a", (2, 2), (1, 0)).ignore("b", "not needed"),
    "kept in float64": lambda: WeightMap().dtype("a", torch.float64).ignore("b", "not needed"),
    "parts": lambda: (
        WeightMap().split("a", ["x", "y"]).fuse("a", ["y", "x"]).ignore("b", "not needed")
    ),
}


def digest(weight_map: WeightMap, **tensors: torch.Tensor) -> str:
    model = module_of({"a": torch.zeros(4, 4)})
    return layout_digest(plan_weights(model, MemoryCheckpoint({**TENSORS, **tensors}), weight_map))


@pytest.mark.parametrize("name", MAPS)
def test_each_place_has_its_digest(name: str) -> None:
    ours = digest(MAPS[name]())
    assert ours == digest(MAPS[name]())
    assert all(ours != digest(other()) for key, other in MAPS.items() if key != name)


def test_values_and_dtypes_do_not_count() -> None:
    same = MAPS["as it is"]()
    assert digest(same) == digest(same, a=torch.zeros(4, 4, dtype=torch.bfloat16))


def test_stacks_count_their_parts() -> None:
    tensors = {f"e.{index}": torch.zeros(2, 3) for index in range(2)}
    model = module_of({"s": torch.zeros(2, 2, 3)})
    digests = set()
    for order in (("e.0", "e.1"), ("e.1", "e.0")):
        names = {old: f"f.{new}" for new, old in enumerate(order)}
        rules = WeightMap().rename(names).stack("s", "f.{i}", 2)
        digests.add(layout_digest(plan_weights(model, MemoryCheckpoint(tensors), rules)))
    assert len(digests) == 2
