"""The conformance kit finds what authors of recurrent layers do wrong, planted in a sound one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfw import AttentionMetadata, hookimpl
from llmfw.plugins import register_local, resolve_plugin, unregister_local
from llmfw.testing import Subject
from llmfw.testing.checks import CHECKS, run_checks

ARCHITECTURE = "PlantedStateForCausalLM"
CONFIG = {
    "model_type": "mamba",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
}
QUICK = [check for check in CHECKS if not check.slow and not check.gpu]
Spoil = Callable[[AttentionMetadata], AttentionMetadata]


def begins_anew(metadata: AttentionMetadata) -> AttentionMetadata:
    """What earlier steps left is not read."""
    for state in metadata.states.values():
        for tensor in state.values():
            tensor[metadata.state_slots] = 0
    return metadata


def leaves_nothing(metadata: AttentionMetadata) -> AttentionMetadata:
    """What this step leaves is written to a copy."""
    states = {
        layer: {name: tensor.clone() for name, tensor in state.items()}
        for layer, state in metadata.states.items()
    }
    return replace(metadata, states=states)


def slots_by_order(metadata: AttentionMetadata) -> AttentionMetadata:
    """A request's place in the batch is taken for its slot."""
    return replace(metadata, state_slots=torch.arange(metadata.num_requests))


def neighbours_state(metadata: AttentionMetadata) -> AttentionMetadata:
    """Several requests of one token each begin from the first one's state."""
    if metadata.num_requests > 1 and metadata.num_contexts < metadata.num_requests:
        for state in metadata.states.values():
            for tensor in state.values():
                tensor[metadata.state_slots[1:]] = tensor[metadata.state_slots[0]].clone()
    return metadata


@dataclass(frozen=True)
class Planted:
    """The family's plugin, every mixer of which gets spoiled metadata."""

    spoil: Spoil | None
    sound: Any

    @hookimpl
    def llmfw_model(self, model_config: Any) -> Any:
        model = self.sound.llmfw_model(model_config)
        for layer in model.model.layers:
            if self.spoil is not None:
                layer.mixer.register_forward_pre_hook(self._before)
        return model

    @hookimpl
    def llmfw_weight_map(self) -> Any:
        return self.sound.llmfw_weight_map()

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, metadata = args
        return hidden, self.spoil(metadata)


@pytest.fixture(scope="module")
def reference() -> Iterator[Subject]:
    with Subject(ARCHITECTURE, CONFIG) as subject:
        yield subject


def first_failure(spoil: Spoil | None, reference: Subject) -> Any:
    sound = resolve_plugin("MambaForCausalLM").plugin
    register_local(ARCHITECTURE, Planted(spoil, sound), "planted state")
    try:
        results = run_checks(reference.again(), QUICK)
        return next(
            (each for each in results if each.outcome == "failed"), SimpleNamespace(name="")
        )
    finally:
        unregister_local(ARCHITECTURE)


def test_the_sound_one_passes(reference: Subject):
    assert first_failure(None, reference).name == ""


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (begins_anew, "step_by_step"),
        (leaves_nothing, "step_by_step"),
        (slots_by_order, "ragged_batch"),
        (neighbours_state, "ragged_batch"),
    ],
)
def test_the_right_check_catches_it(spoil: Spoil, check: str, reference: Subject):
    found = first_failure(spoil, reference)
    assert found.name == check, found
    assert "mixer" in found.detail
    if check == "step_by_step":
        assert "what it reads from its state and leaves" in " ".join(found.detail.split())
