"""The weight map of a recognised checkpoint, as source."""

from __future__ import annotations

from collections.abc import Iterator

from llmfw_cli.new import source
from llmfw_cli.new.experts import count_expression
from llmfw_cli.new.recognise import Recognition

QKV = "self_attn.qkv_proj"
EXPERTS = "model.layers.{i}.mlp.experts"
STOCK_LEAVES = ("gate_proj", "up_proj", "down_proj")
BUFFERS = {
    "bias": "the causal mask, computed here",
    "masked_bias": "the value of masked scores, computed here",
}


def weight_rules(found: Recognition) -> list[source.Rule]:
    """Each rule of the map, in order."""
    return [
        *_ignored(found),
        *_moved(found),
        *_stacked(found),
        *_transposed(found),
        *_reordered(found),
        *_renamed(found),
    ]


def _layer(found: Recognition, path: str, parameter: str = "{p}") -> str:
    return f"{found.modules.prefix}.{{i}}.{path}.{parameter}"


def _in_layer(found: Recognition) -> Iterator[tuple[str, str]]:
    for place, path in found.places.items():
        if path in found.modules.layer and not place.startswith(("model.", "lm_head")):
            yield place, path


def _ignored(found: Recognition) -> Iterator[source.Rule]:
    """Buffers that older checkpoints carry along, and layers behind the model's own."""
    for extra in range(found.modules.extra):
        number = "config.num_hidden_layers" + (f" + {extra}" if extra else "")
        name = f'f"{found.modules.prefix}.{{{number}}}.{{{{rest*}}}}"'
        yield source.rule("ignore", name, source.quoted("predicts further tokens"))
    for path, parameters in found.modules.layer.items():
        for parameter, shape in parameters.items():
            if "weight" not in parameters and parameter in BUFFERS and len(shape) != 1:
                name = source.quoted(_layer(found, path, parameter))
                yield source.rule("ignore", name, source.quoted(BUFFERS[parameter]))


def _moved(found: Recognition) -> Iterator[source.Rule]:
    """Tensors that are no module's weight or bias get the names of ours."""
    for place, path in found.tensors.items():
        old, new = f"{found.modules.prefix}.{{i}}.{path}", f"model.layers.{{i}}.{place}"
        if old != new:
            yield source.rule("rename", source.quoted(old), source.quoted(new))


def _stacked(found: Recognition) -> Iterator[source.Rule]:
    """Numbered experts become the stacked weights of ours."""
    mixture = found.experts
    if mixture is None or not mixture.leaves:
        return
    path = f"{found.modules.prefix}.{{i}}.{mixture.base}.{{e}}"
    names = [] if mixture.leaves == STOCK_LEAVES else [source.quoted(x) for x in mixture.leaves]
    count = count_expression(mixture, found.config)
    yield source.rule("stack_experts", source.quoted(EXPERTS), source.quoted(path), count, *names)


def _transposed(found: Recognition) -> Iterator[source.Rule]:
    if not found.transposed:
        return
    for _, path in _in_layer(found):
        if len(found.modules.layer[path]["weight"]) == 2:
            yield source.rule("transpose", source.quoted(_layer(found, path, "weight")))


def _reordered(found: Recognition) -> Iterator[source.Rule]:
    path = found.places.get(QKV)
    if path is None or found.qkv_order == "plain":
        return
    name = source.quoted(_layer(found, path))
    heads = "config.num_attention_heads"
    if found.qkv_order == "by head":
        yield source.rule("reorder", name, f"({heads}, 3, -1)", "(1, 0, 2)")
        return
    groups = kv_heads(found)
    own_width = getattr(found.config, "head_dim", None)
    width = "config.head_dim" if own_width else f"(config.hidden_size // {heads})"
    parts = [source.quoted(_layer(found, part)) for part in _split_paths(path).values()]
    sizes = [f"{count} * {width}" for count in (heads, groups, groups)]
    yield source.rule("reorder", name, f"({groups}, {heads} // {groups} + 2, -1)", "(1, 0, 2)")
    yield source.rule("split", name, parts, sizes)
    yield source.rule("reorder", parts[0], f"({heads} // {groups}, {groups}, -1)", "(1, 0, 2)")


def kv_heads(found: Recognition) -> str:
    """The number of key heads, as source."""
    if "num_kv_heads" in found.switches:
        return found.switches["num_kv_heads"]
    return "config.num_key_value_heads"


def _split_paths(path: str) -> dict[str, str]:
    """Where q, k and v of a fused module go, by place."""
    above = path.rpartition(".")[0]
    return {f"self_attn.{x}_proj": f"{above}.{x}_proj" for x in "qkv"}


def _renamed(found: Recognition) -> list[source.Rule]:
    table: dict[str, str] = {}
    for place, path in found.places.items():
        if place == "lm_head" or place.startswith("model."):
            table[f"{path}.{{p}}"] = f"{place}.{{p}}"
    parts = dict(_in_layer(found))
    if QKV in parts and found.qkv_order == "by group":
        parts |= _split_paths(parts.pop(QKV))
    same = [place for place, path in parts.items() if place == path]
    for place, path in parts.items():
        if place != path:
            table[_layer(found, path)] = f"model.layers.{{i}}.{place}.{{p}}"
    if same:
        table[f"{found.modules.prefix}.{{i}}.{{rest*}}"] = "model.layers.{i}.{rest*}"
    return source.renames(_ordered({old: new for old, new in table.items() if old != new}))


def _ordered(table: dict[str, str]) -> dict[str, str]:
    """Renames in an order in which no name is taken that another row still has to give away."""
    waiting, ordered = dict(table), dict[str, str]()
    while waiting:
        free = next(
            (old for old, new in waiting.items() if new not in waiting), next(iter(waiting))
        )
        ordered[free] = waiting.pop(free)
    return ordered
