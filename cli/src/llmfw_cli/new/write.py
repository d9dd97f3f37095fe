"""From a recognition to the template's answers and to what a person is told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmfw_cli.new import fields, source
from llmfw_cli.new.recognise import Recognition, knows
from llmfw_cli.new.rules import weight_rules
from llmfw_cli.new.settle import Settled
from llmfw_cli.new.shrink import names_of, shrink

_NUMBER = re.compile(r"\.\d+(?=\.)")
_ALIBI = "docs/plugins/layers.md tells how to add it"
_NEAREST = re.compile(r" \(nearest: [^)]*\)$", re.MULTILINE)
_ENDINGS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$")


def answers_of(found: Recognition) -> dict[str, str]:
    """The template's variables that a checkpoint answers."""
    spec = ""
    if found.switches:
        switches = [source.assigned(name, text, 12) for name, text in found.switches.items()]
        spec = source.call("DecoderSpec.from_config", ["config", *switches], 8, len("spec = "))
    named = ["DecoderSpec", "ModelConfig", "StockDecoderForCausalLM"]
    named += [name for name in ("MLAParams", "MoEParams", "RopeParams") if name in spec]
    rules = weight_rules(found)
    tiny = {"model_type": found.raw.get("model_type")}
    tiny |= {
        name: value
        for name, value in shrink(found.raw, names_of(found.config)).items()
        if value is not None and fields.shapes_computation(name)
    }
    return {
        "model_name": _ENDINGS.sub("", found.architecture) or found.architecture,
        "architecture": found.architecture,
        "base": "decoder",
        "config": "transformers" if knows(found.raw) else "own",
        "model_type": str(found.raw.get("model_type") or ""),
        "__spec": spec,
        "__imports": ", ".join(sorted(named, key=str.casefold)),
        "__weights": source.chain(rules, 4 if "config." in source.chain(rules) else 0),
        "__tiny_config": source.literal(tiny, 0),
    }


def report(settled: Settled, problems: str) -> dict[str, Any]:
    """What was recognised and what was not, for people and for programs."""
    found = settled.found
    return {
        "architecture": found.architecture,
        "tensors": len(found.shapes),
        "layers": found.modules.count,
        "extra_layers": found.modules.extra,
        "switches": dict(found.switches),
        "transposed": found.transposed,
        "tried": list(settled.tried),
        "agrees": settled.agrees,
        "difference": settled.distance,
        "no_trial": settled.reason,
        "unrecognised": unrecognised(found),
        "unread_fields": fields.unread(
            found.raw, found.switches, experts=found.experts is not None
        ),
        "mixes_layers": mixes_layers(found),
        "hints": list(_hints(found)),
        "problems": problems,
    }


def unrecognised(found: Recognition) -> list[str]:
    """Tensors that have no place in the stock decoder, the layers' with {i}."""
    placed = {*found.places.values(), *(found.experts.taken if found.experts else ())}
    names = [
        f"{found.modules.prefix}.{{i}}.{path}.{parameter} {list(shape)}"
        for path, parameters in found.modules.layer.items()
        for parameter, shape in parameters.items()
        if path not in placed and f"{path}.{parameter}" not in found.tensors.values()
        if "weight" in parameters or len(shape) == 1
    ]
    names += [
        f"{path}.{parameter} {list(shape)}"
        for path, parameters in found.modules.around.items()
        for parameter, shape in parameters.items()
        if path not in placed
    ]
    return [*names, *found.modules.uneven]


def _hints(found: Recognition) -> Iterator[str]:
    """Known reasons why a stock decoder may not be the model."""
    if mixes_layers(found):
        yield (
            "not every layer has attention: write the layers out, beginning from "
            "`llmfw new --from MODEL --base blank`; docs/plugins/layers.md tells of layers with a "
            "state"
        )
    elif _says_alibi(found.raw):
        yield f"config.json says alibi: the stock attention has no such bias; {_ALIBI}"
    elif not positions_known(found):
        yield (
            "nothing tells how positions enter: there is neither a table nor a rotary embedding; "
            f"if it is a bias by distance (ALiBi), {_ALIBI}"
        )
    if not fields.names_activation(found.config):
        yield "activation is a guess, silu: no field of config.json that is known names one"
    if "rope" in found.switches and not fields.tells_of_rope(found.raw):
        yield "rope is a guess: no field of config.json tells of a rotary embedding"
    if found.experts is None and any("expert" in path for path in found.modules.layer):
        yield "a mixture of experts: give the spec moe=MoEParams(...), stack the experts' weights"


def mixes_layers(found: Recognition) -> bool:
    """Whether some layers have attention and others something else."""
    modules, path = found.modules, found.places.get("self_attn.o_proj")
    if path is None:
        return bool(modules.uneven)
    names = (f"{modules.prefix}.{index}.{path}.weight" for index in range(modules.count))
    return any(name not in found.shapes for name in names)


def _says_alibi(raw: Mapping[str, Any]) -> bool:
    """Whether config.json, or an object in it, asks for a bias by distance."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, Mapping))]
    return any(part.get("alibi") is True for part in parts)


def positions_known(found: Recognition) -> bool:
    """Whether there is a table of positions, or a rotary embedding in the configuration."""
    from llmfw_cli.new.trial import spec_of

    spec = spec_of(found, found.config)
    return spec.rope is not None or spec.learned_positions is not None


def collapsed(text: str) -> list[str]:
    """Lines that differ in numbers of layers or experts alone, once."""
    general = [_NUMBER.sub(".{i}", line) for line in text.splitlines()]
    return list(dict.fromkeys(general))


def _other_problems(told: Mapping[str, Any]) -> list[str]:
    """The problems beside what is listed as not recognised."""
    listed = {name.split()[0] for name in collapsed("\n".join(told["unrecognised"]))}
    kept = []
    first, *rest = collapsed(_NEAREST.sub("", told["problems"]))
    for line in rest:
        kind, name, *_ = line.split()
        if kind != "surplus" or name.rstrip(":") not in listed:
            kept.append(line)
    return [
        first,
        *kept,
        *(["  surplus    what is not recognised"] if len(kept) < len(rest) else []),
    ]


def lines(told: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    text = [f"read {told['tensors']} tensors, {told['layers']} layers of {told['architecture']}"]
    switches = ", ".join(f"{name}={value}" for name, value in told["switches"].items())
    decoder = "NOT a stock decoder; begun as one" if told["mixes_layers"] else "stock decoder"
    text.append(f"{decoder} with {switches}" if switches else f"{decoder}, as its config says")
    if told["extra_layers"]:
        text.append(
            f"{told['extra_layers']} more than config.json says: ignored, as such layers predict "
            "further tokens"
        )
    if told["transposed"]:
        text.append("matrices are stored as [in, out] and transposed while loading")
    text += [f"found by trying: {each}" for each in told["tried"]]
    if told["agrees"]:
        text.append(
            "a tiny random model of this kind gives transformers' logits "
            f"(greatest difference {told['difference']:.1e})"
        )
    elif told["difference"] is not None:
        text.append(
            "NOT RIGHT YET: a tiny random model of this kind differs from transformers' by "
            f"{told['difference']:.1e}"
        )
    else:
        text.append(f"not compared with transformers: {told['no_trial']}")
    if not told["agrees"]:
        text += told["hints"]
    if told["unrecognised"]:
        names = collapsed("\n".join(told["unrecognised"]))
        text += ["not recognised:", *(f"  {name}" for name in names)]
    if told["unread_fields"]:
        text.append("fields of config.json that nobody looked at:")
        text += [f"  {name}: {value}" for name, value in told["unread_fields"].items()]
    if told["problems"]:
        text += ["the checkpoint does not load yet:", *_other_problems(told)]
    else:
        text.append("every tensor of the checkpoint is accounted for")
    return text


def notes(told: dict[str, Any]) -> str:
    """What is left to do, for the plugin's README; empty when nothing is."""
    if told["agrees"] and not told["problems"]:
        return ""
    body = "\n".join(lines(told))
    return f"\n## What `llmfw new` found\n\n```text\n{body}\n```\n"
