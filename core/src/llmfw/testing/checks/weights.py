"""Is every parameter filled once, every tensor taken or rightly ignored, and nothing lost?"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfw.errors import WeightError
from llmfw.models import PreparedModel, PretrainedModel, build, prepare_model
from llmfw.models.weights import CheckpointTensors, has_own_load_weights, load_by_author
from llmfw.testing.compare import logits_tolerance, reference_logits
from llmfw.testing.failure import CheckFailure, CheckSkipped
from llmfw.testing.subject import Subject
from llmfw.weights import (
    Checkpoint,
    LoadPlan,
    WeightMap,
    load_weights,
    open_checkpoint,
    plan_weights,
    save_checkpoint,
)

WEIGHT_MAP = "the plugin's weight map (llmfw_weight_map) and `llmfw inspect MODEL --weights`"


@dataclass(frozen=True)
class Parts:
    """What a load plan is made from: ours on the meta device, its checkpoint and its weight map."""

    model: PretrainedModel[Any]
    checkpoint: Checkpoint
    weight_map: WeightMap | None

    def plan(self) -> LoadPlan:
        """The plan.

        Raises:
            WeightError: Listing all that does not fit.
        """
        mapping = self.model.model_config.mapping
        return plan_weights(self.model, self.checkpoint, self.weight_map, mapping)


def parts_of(prepared: PreparedModel) -> Parts:
    """Build a prepared model on the meta device and ask for its weight map.

    Raises:
        CheckSkipped: If the model loads its weights itself.
    """
    model = build(prepared.model_config, prepared.host)
    if has_own_load_weights(model):
        raise CheckSkipped(f"{type(model).__name__} has its own load_weights: there is no plan")
    checkpoint = open_checkpoint(prepared.source.checkpoint_path)
    weight_map = prepared.host.hook.llmfw_weight_map(
        model_config=model.model_config, checkpoint=checkpoint
    )
    return Parts(model, checkpoint, weight_map)


def tiny_parts(subject: Subject) -> Parts:
    """The parts of the tiny checkpoint."""
    return parts_of(prepare_model(subject.checkpoint(), **subject.settings))


def accounts_for_every_tensor(subject: Subject) -> None:
    """Each parameter is filled exactly once; each tensor is taken, or ignored and not needed.

    A tensor is not needed when the reference's logits stay as they are while it is changed. An
    author's own `load_weights` ignores what it does not read.

    Raises:
        CheckFailure: Listing what does not fit, or naming the tensor ignored by mistake.
    """
    try:
        left_out = _ignored(prepare_model(subject.checkpoint(), **subject.settings))
    except WeightError as exc:
        raise misfit(exc) from exc
    ids = subject.prompts[0]
    reference = subject.reference_model()
    before = reference_logits(reference, ids)
    for name, (reason, where) in left_out.items():
        changed = _change(reference, name, ids)
        if changed is not None and changed > logits_tolerance(before):
            raise CheckFailure(
                f"a tensor is ignored ({reason!r}) that the reference needs",
                tensor=name,
                expected="a parameter that it fills",
                got=f"nothing takes it; the reference's logits change by {changed:.2g} with it",
                look=f"{where};\ndoes the module that should hold it have that parameter (a bias)?",
            )


def _ignored(prepared: PreparedModel) -> dict[str, tuple[str, str]]:
    """Tensors that fill nothing: why, and where that is said."""
    model = build(prepared.model_config, prepared.host)
    if has_own_load_weights(model):
        checkpoint = open_checkpoint(prepared.source.checkpoint_path)
        unread = load_by_author(model, CheckpointTensors(checkpoint))
        where = f"load_weights of {type(model).__name__}"
        return dict.fromkeys(unread, ("never read", where))
    plan = parts_of(prepared).plan()
    return {
        each.name: (each.reason, f"ignore({each.name}) in {WEIGHT_MAP}") for each in plan.ignored
    }


def misfit(exc: WeightError) -> CheckFailure:
    """Loading's own error as a failure: it lists every parameter and tensor that does not fit."""
    problems = getattr(exc, "problems", ())
    first = problems[0].name if problems else None
    return CheckFailure(
        "tensors and parameters do not fit", tensor=first, got=exc.message, look=WEIGHT_MAP
    )


def _change(reference: nn.Module, name: str, ids: list[int]) -> float | None:
    """How far the reference's logits move when one of its tensors is changed."""
    state = reference.state_dict(keep_vars=True)
    if name not in state or not state[name].is_floating_point():
        return None
    before = reference_logits(reference, ids)
    value = state[name].detach().clone()
    with torch.no_grad():
        state[name].copy_(value + torch.ones_like(value) * (value.abs().max() + 0.1))
        after = reference_logits(reference, ids)
        state[name].copy_(value)
    difference = float((after - before).abs().max())
    return difference if difference == difference else float("inf")


def save_load_round_trip(subject: Subject) -> None:
    """Saved and loaded again, the checkpoint has the same names and bits.

    Raises:
        CheckFailure: Naming the first tensor that differs.
    """
    parts = tiny_parts(subject)
    plan = parts.plan()
    load_weights(parts.model, plan, parts.checkpoint, dtype="stored")
    folder = subject.folder / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(parts.model, plan, folder, checkpoint=parts.checkpoint)
    _require_same_tensors(subject.checkpoint(), folder)


def _require_same_tensors(first: Path, second: Path) -> None:
    a, b = open_checkpoint(first), open_checkpoint(second)
    for name in sorted({*a.names()} | {*b.names()}):
        if name not in a.names() or name not in b.names():
            raise CheckFailure(
                "saving does not give back the checkpoint's tensors",
                tensor=name,
                expected="there" if name in a.names() else "not there",
                got="there" if name in b.names() else "not there",
                look=WEIGHT_MAP,
            )
        before, after = a.tensor(name), b.tensor(name)
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise CheckFailure(
                "a tensor is not the same after load and save",
                tensor=name,
                expected=f"{before.dtype} {list(before.shape)}, bit for bit",
                got=f"{after.dtype} {list(after.shape)}, "
                + (
                    f"max |difference| {float((before - after).abs().max()):.2e}"
                    if before.shape == after.shape
                    else "another shape"
                ),
                look="post_load() of its module: it must not change a parameter in place",
            )
