"""A mixture of experts in a checkpoint: where its tensors are, and the `MoEParams` they fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmfw_cli.new import fields, roles
from llmfw_cli.new.tensors import Modules, Shape

_NUMBERED = re.compile(r"(?P<base>.+)\.(?P<number>\d+)\.(?P<leaf>\w+)")
_SHARED = re.compile(r"shared_(expert|experts|mlp)")
_SCORE_BIAS = re.compile(r"score_correction_bias|expert_bias")
SCORE_BIAS = "mlp.e_score_correction_bias"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHARED_SIZES = (  # what a shared expert's width may be called
    "config.shared_expert_intermediate_size",
    "config.shared_intermediate_size",
    "config.n_shared_experts * config.moe_intermediate_size",
    "config.num_shared_experts * config.moe_intermediate_size",
    "config.moe_num_shared_experts * config.moe_intermediate_size",
    "config.moe_intermediate_size",
    "config.intermediate_size",
)


@dataclass(frozen=True)
class ExpertTensors:
    """The experts of a layer as a checkpoint has them.

    Args:
        base: Path of all experts in the layer.
        leaves: With numbered experts the names of gate, up and down.
        stacked: Where they are stacked, the tensors by our layer's parameter.
        places: Paths of the router and of a shared expert, by their place in our layer.
        taken: Every path that has its place here.
        count: How many experts there are.
        width: Intermediate size of one.
        shared_width: Of the shared expert, None without one.
        score_bias: The tensor that corrects the scores for the choice, "" where there is none.
    """

    base: str
    leaves: tuple[str, ...]
    stacked: Mapping[str, str]
    places: Mapping[str, str]
    taken: frozenset[str]
    count: int
    width: int
    shared_width: int | None = None
    score_bias: str = ""

    @property
    def tensors(self) -> dict[str, str]:
        """Tensors that are no module's weight or bias, by their place in our layer."""
        places = {f"mlp.experts.{name}": path for name, path in self.stacked.items()}
        return places | ({SCORE_BIAS: self.score_bias} if self.score_bias else {})


def experts_of_layer(modules: Modules, hidden: int) -> ExpertTensors | None:
    """The experts of the layers that have some; None where none are known."""
    found = _numbered(modules) or _stacked(modules)
    if found is None:
        return None
    shared = dict(_shared(modules))
    others = {**modules.layer}
    for path in (*found.taken, *shared.values()):
        del others[path]
    router = dict(_router(others, found.base, (found.count, hidden)))
    down = modules.layer.get(shared.get("mlp.shared_expert.down_proj", ""), {}).get("weight")
    return replace(
        found,
        places={**router, **shared},
        taken=frozenset({*found.taken, *router.values(), *shared.values()}),
        shared_width=down[1] if down else None,
        score_bias=_score_bias(modules, (found.count,)),
    )


def moe_switches(
    found: ExpertTensors, sparse: Sequence[bool], config: Any, base_spec: Any
) -> dict[str, str]:
    """`moe` and `moe_layers` of the spec, as expressions."""
    import llmfw

    changes: dict[str, str] = {}
    count = count_expression(found, config)
    if count not in [f"config.{name}" for name in _COUNTS[:3]]:  # those that MoEParams knows
        changes["num_experts"] = count
    if getattr(config, "num_experts_per_tok", None) is None:
        changes["top_k"] = _field(config, "moe_k", "moe_topk", "moe_top_k") or "2"
    width = getattr(config, "moe_intermediate_size", None) or base_spec.intermediate_size
    if width != found.width:
        changes["intermediate_size"] = fields.width_expression(config, found.width)
    if found.score_bias:
        changes |= {"scoring": '"sigmoid"', "score_bias": "True", "float32_router": "True"}
    if getattr(config, "routed_scaling_factor", None) is None:
        scale = _field(config, "router_scaling_factor", "route_scale")
        changes |= {"scale": scale} if scale else {}
    if (getattr(config, "n_group", None) or 1) > 1:
        changes |= {"num_groups": "config.n_group", "top_groups": "config.topk_group"}
        changes |= {"group_best": "2"} if found.score_bias else {}
    if found.shared_width is not None:
        changes["shared_size"] = _shared_expression(config, found.shared_width)
    if "mlp.shared_expert_gate" in found.places:
        changes["shared_gated"] = "True"
    given = "".join(f", {name}={text}" for name, text in changes.items())
    switches = {"moe": f"MoEParams.from_config(config{given})"}
    eval(switches["moe"], {"config": config, "MoEParams": llmfw.MoEParams})
    if not all(sparse):
        switches["moe_layers"] = _layers(sparse, config)
    return switches


def count_expression(found: ExpertTensors, config: Any) -> str:
    """The number of experts: the field that has it, else the number."""
    names = [name for name in _COUNTS if getattr(config, name, None) == found.count]
    own = [name for name in names if name in vars(config)]  # rather than another's alias of it
    return f"config.{(own or names)[0]}" if names else str(found.count)


def _numbered(modules: Modules) -> ExpertTensors | None:
    matches = {path: match for path in modules.layer if (match := _NUMBERED.fullmatch(path))}
    bases = {match["base"] for match in matches.values() if "expert" in match["base"]}
    if len(bases) != 1:
        return None
    (base,) = bases
    inside = {path: match for path, match in matches.items() if match["base"] == base}
    by_role = {roles.in_mlp(match["leaf"]): match["leaf"] for match in inside.values()}
    if set(by_role) != {"gate_proj", "up_proj", "down_proj"}:
        return None
    numbers = {match["number"] for match in inside.values()}
    down = modules.layer[f"{base}.{min(numbers)}.{by_role['down_proj']}"].get("weight", ())
    if len(down) != 2:
        return None
    leaves = tuple(by_role[role] for role in ("gate_proj", "up_proj", "down_proj"))
    return ExpertTensors(base, leaves, {}, {}, frozenset(inside), len(numbers), down[1])


def _stacked(modules: Modules) -> ExpertTensors | None:
    """Tensors [experts, 2 * width, hidden] and [experts, hidden, width] of one module or two."""
    tensors = {
        f"{path}.{parameter}": shape
        for path, parameters in modules.layer.items()
        for parameter, shape in parameters.items()
        if len(shape) == 3
    }
    for gate_up, rows in tensors.items():
        for down, columns in tensors.items():
            if rows[0] == columns[0] and rows[1] == 2 * columns[2] and rows[2] == columns[1]:
                base = gate_up.partition(".")[0]
                paths = {name.rpartition(".")[0] for name in (gate_up, down)}
                stacked = {"gate_up_proj": gate_up, "down_proj": down}
                taken = frozenset(paths)
                return ExpertTensors(base, (), stacked, {}, taken, columns[0], columns[2])
    return None


def _router(
    modules: Mapping[str, Mapping[str, Shape]], base: str, shape: Shape
) -> Iterator[tuple[str, str]]:
    """The matrix beside the experts that has a row for each."""
    above = base.partition(".")[0]
    for path, parameters in modules.items():
        if path.startswith(above) and parameters.get("weight") == shape:
            yield "mlp.gate", path
            return


def _score_bias(modules: Modules, shape: Shape) -> str:
    names = (
        f"{path}.{parameter}"
        for path, parameters in modules.layer.items()
        for parameter, has in parameters.items()
        if has == shape and _SCORE_BIAS.search(parameter)
    )
    return next(names, "")


def _shared(modules: Modules) -> Iterator[tuple[str, str]]:
    for path, parameters in modules.layer.items():
        above, _, leaf = path.rpartition(".")
        if not _SHARED.search(path):
            continue
        role = roles.in_mlp(leaf)
        if parameters.get("weight", ())[:1] == (1,):
            yield "mlp.shared_expert_gate", path
        elif role and _SHARED.search(above):
            yield f"mlp.shared_expert.{role}", path


def _shared_expression(config: Any, width: int) -> str:
    for expression in _SHARED_SIZES:
        try:
            if eval(expression, {"config": config}) == width:
                return expression
        except (AttributeError, TypeError):  # the configuration has no such fields
            continue
    return str(width)


def _field(config: Any, *names: str) -> str | None:
    return next((f"config.{name}" for name in names if getattr(config, name, None)), None)


def _layers(sparse: Sequence[bool], config: Any) -> str:
    """Which layers have experts: after the first few where a field says so, else all named."""
    first = getattr(config, "first_k_dense_replace", None)
    if isinstance(first, int) and tuple(sparse) == tuple(i >= first for i in range(len(sparse))):
        return "tuple(i >= config.first_k_dense_replace for i in range(config.num_hidden_layers))"
    return repr(tuple(sparse))
