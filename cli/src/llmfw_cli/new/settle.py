"""Settling what neither config nor headers tell, by trying it against transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llmfw_cli.new.recognise import ORDERS, Recognition

logger = logging.getLogger("llmfw.new")

AGREES = 1e-3
_PATIENCE = 200


@dataclass(frozen=True)
class Settled:
    """A recognition after the trial.

    Args:
        found: The recognition, with what was settled.
        distance: Greatest difference of logits to transformers' tiny model; None without a trial.
        reason: Why there was none, or why it failed.
        tried: What was tried out and held, in words.
    """

    found: Recognition
    distance: float | None
    reason: str = ""
    tried: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the tiny model's logits are transformers'."""
        return self.distance is not None and self.distance < AGREES


def settle(found: Recognition) -> Settled:
    """Try the possible answers until the logits of a tiny random model are transformers'."""
    from llmfw_cli.new.trial import Reference

    try:
        reference = Reference(found)
    except Exception as exc:  # whatever an unknown model's code may raise
        return Settled(found, None, f"transformers could not build it small: {_told(exc)}")
    best: tuple[float, dict[str, Any]] | None = None
    reason = ""
    for number, changes in enumerate(alternatives(found)):
        if number >= _PATIENCE:
            break
        try:
            distance = reference.distance(changes)
        except Exception as exc:  # the tiny model does not load: nothing to compare
            reason = reason or _told(exc)
            continue
        logger.debug("%s: %.2e", changes, distance)
        if best is None or distance < best[0]:
            best = distance, changes
        if distance < AGREES:
            break
    if best is None:
        return Settled(found, None, reason)
    distance, changes = best
    if distance >= AGREES:
        return Settled(found, distance)
    return Settled(_changed(found, changes), distance, tried=tuple(_words(changes)))


def alternatives(found: Recognition) -> Iterator[dict[str, Any]]:
    """Changes to try, the fewest first."""
    open_questions = list(_questions(found))
    rows = product(*open_questions)
    for row in sorted(rows, key=lambda options: sum(bool(option) for option in options)):
        changes: dict[str, Any] = {"switches": {}}
        for option in row:
            changes["switches"].update(option.get("switches", {}))
            if "qkv_order" in option:
                changes["qkv_order"] = option["qkv_order"]
        yield changes


def _told(exc: Exception) -> str:
    from llmfw.errors import WeightError

    if isinstance(exc, WeightError):
        return "its weights do not fit yet"
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"


def _questions(found: Recognition) -> Iterator[list[dict[str, Any]]]:
    """What cannot be seen: for each question the answers, the likeliest first and empty."""
    switches = found.switches
    if "self_attn.qkv_proj" in found.places:
        others = [order for order in ORDERS if order != found.qkv_order]
        yield [{}, *({"qkv_order": order} for order in others)]
    rope = switches.get("rope", "RopeParams.from_config(config)")
    if rope != "None":
        turned = f"{rope[:-1]}, interleaved=True)"
        answers: list[dict[str, Any]] = [{}, {"switches": {"rope": turned}}]
        if getattr(found.config, "layer_types", None):  # rotation in layers with a window alone
            answers += [{"switches": {"rope": "None", "local_rope": r}} for r in (rope, turned)]
        yield answers
    norm = _norm(found)
    if norm == "layer, no bias":
        yield [{}, {"switches": {"norm": '"rms"', "norm_bias": ""}}]
    if norm == "rms":
        yield [{}, {"switches": {"norm_offset": "1.0"}}]
        yield [{}, {"switches": {"embed_scale": "config.hidden_size**0.5"}}]
    if "moe" in switches:
        yield list(_routings(switches["moe"]))
    if (
        "lm_head" in found.places
        and switches.get("tied") is None
        and found.config.tie_word_embeddings
    ):
        yield [{}, {"switches": {"tied": "False"}}]


def _routings(moe: str) -> Iterator[dict[str, Any]]:
    """How the router's logits may become weights."""
    yield {}
    sigmoid = 'scoring="sigmoid", '
    forms = [moe, moe.replace(sigmoid, "")] if sigmoid in moe else [moe]
    for form in forms[1:]:
        yield {"switches": {"moe": form}}
    for form in forms:
        for given in ("renormalize=True", "renormalize=False"):
            yield {"switches": {"moe": f"{form[:-1]}, {given})"}}
    if len(forms) == 1:
        yield {"switches": {"moe": f'{moe[:-1]}, scoring="topk_softmax")'}}


def _norm(found: Recognition) -> str:
    if found.switches.get("norm_bias") == "False":
        return "layer, no bias"
    named = getattr(found.config, "rms_norm_eps", None) is not None
    return "rms" if named and "norm" not in found.switches else "layer"


def _changed(found: Recognition, changes: Mapping[str, Any]) -> Recognition:
    switches = {**found.switches, **changes["switches"]}
    return replace(
        found,
        switches={name: text for name, text in switches.items() if text},
        qkv_order=changes.get("qkv_order", found.qkv_order),
    )


def _words(changes: Mapping[str, Any]) -> Iterator[str]:
    for name, text in changes["switches"].items():
        if text:
            yield f"{name}={text}"
    if "qkv_order" in changes:
        yield f"rows of the fused q, k, v are ordered {changes['qkv_order']}"
