"""What a checkpoint's config and headers tell: switches of the stock decoder, places of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfw_cli.new import experts, fields, render, roles
from llmfw_cli.new.experts import ExpertTensors
from llmfw_cli.new.tensors import Modules, Shape, sort_tensors

if TYPE_CHECKING:
    from llmfw.models import DecoderSpec

ORDERS = ("plain", "by head", "by group")


@dataclass(frozen=True)
class Recognition:
    """A decoder as its checkpoint shows it.

    Args:
        raw: The contents of config.json.
        config: The configuration object.
        architecture: What config.json calls it.
        shapes: Every tensor's shape.
        modules: The tensors by place.
        places: Checkpoint paths by their place in our model; those of a layer by the place in it.
        switches: Changes to `DecoderSpec.from_config(config)`, as Python expressions.
        experts: The experts' tensors, where there are some.
        tensors: Tensors of a layer that are no module's weight or bias, by their place in ours.
        transposed: Whether matrices are stored as [in, out].
        qkv_order: How the rows of a fused q, k, v are ordered: "plain" (all of q, of k, of v),
            "by head" (q, k and v of each head), "by group" (the queries of a group, its k, its v).
    """

    raw: Mapping[str, Any]
    config: Any
    architecture: str
    shapes: Mapping[str, Shape]
    modules: Modules
    places: Mapping[str, str]
    switches: Mapping[str, str]
    experts: ExpertTensors | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    qkv_order: str = "plain"


def recognise(model: str | Path) -> Recognition:
    """Read config.json and the headers of a checkpoint; no tensor is read.

    Raises:
        ConfigError, CheckpointError: If either cannot be read.
    """
    from llmfw.config import architecture_of, read_config_json
    from llmfw.weights import open_checkpoint, resolve_model
    from llmfw.weights.sources import require_original

    source = resolve_model(str(model))
    require_original(source, "llmfw new")
    raw = read_config_json(source.model_dir)
    checkpoint = open_checkpoint(source.checkpoint_path)
    shapes = {name: checkpoint.info(name).shape for name in checkpoint.names()}
    return recognise_shapes(raw, configuration(raw), architecture_of(raw), shapes)


def recognise_shapes(
    raw: Mapping[str, Any], config: Any, architecture: str, shapes: Mapping[str, Shape]
) -> Recognition:
    """As `recognise`, from what was read."""
    base = _base_spec(config)
    modules = sort_tensors(shapes, base.num_layers)
    mixture = experts.experts_of_layer(modules, base.hidden_size)
    inner = roles.parts_of_layer(modules, mixture.taken if mixture else ())
    block, norms = roles.norms_of_layer(modules, inner)
    routed = mixture.places if mixture else {}
    places = {**inner, **routed, **norms, **roles.parts_around(modules)}
    transposed = _is_transposed(modules, inner, base.hidden_size)
    switches = {
        **dict(fields.switches_of(config)),
        **_block_switches(block, config),
        **_norm_switches(base, modules, norms, config, raw),
        **_layer_switches(base, modules, inner, config, transposed),
        **_model_switches(base, modules, places, config),
    }
    sinks = _sinks(modules, base.num_heads)
    if sinks:
        switches["sinks"] = "True"
    if mixture:
        switches |= experts.moe_switches(mixture, modules.sparse, config, base)
    return Recognition(
        raw=raw,
        config=config,
        architecture=architecture,
        shapes=shapes,
        modules=modules,
        places=places,
        switches=switches,
        experts=mixture,
        tensors={**sinks, **(mixture.tensors if mixture else {})},
        transposed=transposed,
        qkv_order=_likely_order(base.num_heads, _kv_heads(base, modules, inner, transposed), inner),
    )


def configuration(raw: Mapping[str, Any]) -> Any:
    """transformers' configuration object; the template's own class where transformers has none."""
    from llmfw.config import pretrained_config_from

    if knows(raw):
        return pretrained_config_from(dict(raw))
    return render.own_config_class(str(raw.get("model_type") or "model")).from_dict(dict(raw))


def knows(raw: Mapping[str, Any]) -> bool:
    """Whether transformers has the configuration's class."""
    from transformers import CONFIG_MAPPING

    return raw.get("model_type") in CONFIG_MAPPING


def _base_spec(config: Any) -> DecoderSpec:
    from llmfw.errors import ConfigError
    from llmfw.models import DecoderSpec

    try:
        return DecoderSpec.from_config(config)
    except AttributeError as exc:
        raise ConfigError(
            f"config.json has no {exc.name}: this is not a decoder that can be recognised",
            hint="write it from layers of its own: llmfw new NAME --base blank",
        ) from exc


def _block_switches(block: str, config: Any) -> dict[str, str]:
    if block == "sequential" and fields.is_parallel(config):
        return {"block": '"parallel_norms"'}
    return {} if block in ("sequential", "") else {"block": f'"{block}"'}


def _norm_switches(
    base: DecoderSpec,
    modules: Modules,
    norms: Mapping[str, str],
    config: Any,
    raw: Mapping[str, Any],
) -> dict[str, str]:
    found: dict[str, str] = {}
    parameters = modules.layer.get(next(iter(norms.values()), ""), {})
    if parameters and "bias" in parameters and base.norm == "rms":
        found["norm"] = '"layer"'
    if parameters and "bias" not in parameters and base.norm == "layer":
        found["norm_bias"] = "False"
    eps = fields.eps_field(raw)
    if eps and getattr(config, eps, base.norm_eps) != base.norm_eps:
        found["norm_eps"] = f"config.{eps}"
    return found


def _layer_switches(
    base: DecoderSpec, modules: Modules, inner: Mapping[str, str], config: Any, transposed: bool
) -> dict[str, str]:
    def has(parameter: str, *places: str) -> bool:
        return any(parameter in modules.layer.get(inner.get(place, ""), {}) for place in places)

    has_mlp = "mlp.down_proj" in inner
    gated = has("weight", "mlp.gate_proj", "mlp.gate_up_proj") if has_mlp else base.gated
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj")
    truth = {
        "qkv_bias": has("bias", *qkv),
        "o_bias": has("bias", "self_attn.o_proj"),
        "mlp_bias": has("bias", *mlp),
        "gated": gated,
    }
    found = {name: str(value) for name, value in truth.items() if getattr(base, name) != value}
    found |= _qk_norm(base, modules, inner)
    if "self_attn.kv_b_proj" in inner:
        found["mla"] = "MLAParams.from_config(config)"
    kv_heads = _kv_heads(base, modules, inner, transposed)
    if kv_heads != base.num_kv_heads:
        found["num_kv_heads"] = fields.count_expression(config, kv_heads)
    down = modules.layer.get(inner.get("mlp.down_proj", ""), {}).get("weight")
    width = down[0 if transposed else 1] if down else base.intermediate_size
    if width != base.intermediate_size:
        found["intermediate_size"] = fields.width_expression(config, width)
    return found


def _qk_norm(base: DecoderSpec, modules: Modules, inner: Mapping[str, str]) -> dict[str, str]:
    """A norm of the queries as wide as a head, or as all heads."""
    weight = modules.layer.get(inner.get("self_attn.q_norm", ""), {}).get("weight")
    if weight is None:
        return {}
    all_heads = base.num_heads * base.head_dim
    return {"qk_norm": '"full"' if weight[0] == all_heads != base.head_dim else "True"}


def _sinks(modules: Modules, heads: int) -> dict[str, str]:
    """The tensor of learned logits, one a head, by its place."""
    for path, parameters in modules.layer.items():
        for parameter, shape in parameters.items():
            if roles.is_sink(parameter) and shape == (heads,):
                return {"self_attn.sinks": f"{path}.{parameter}"}
    return {}


def _kv_heads(
    base: DecoderSpec, modules: Modules, inner: Mapping[str, str], transposed: bool
) -> int:
    """Key heads by the rows of k, or by what a fused q, k, v has beyond q."""
    out = 1 if transposed else 0
    single = modules.layer.get(inner.get("self_attn.k_proj", ""), {}).get("weight")
    fused = modules.layer.get(inner.get("self_attn.qkv_proj", ""), {}).get("weight")
    rows = single[out] if single else None
    if fused:
        rows = (fused[out] - base.num_heads * base.head_dim) // 2
    return rows // base.head_dim if rows and rows > 0 else base.num_kv_heads


def _model_switches(
    base: DecoderSpec, modules: Modules, places: Mapping[str, str], config: Any
) -> dict[str, str]:
    found: dict[str, str] = {}
    positions = modules.around.get(places.get("model.embed_positions", ""), {}).get("weight")
    if positions:
        limit = getattr(config, "max_position_embeddings", None) or positions[0]
        known = limit <= positions[0]
        found["learned_positions"] = (
            "config.max_position_embeddings" if known else str(positions[0])
        )
        if known and limit < positions[0]:
            found["position_offset"] = str(positions[0] - limit)
        if base.rope is not None:
            found["rope"] = "None"
    elif base.rope is None:
        dim = "config.rotary_dim" if getattr(config, "rotary_dim", None) else str(base.head_dim)
        limit = "config.max_position_embeddings"
        if getattr(config, "max_position_embeddings", None) and not getattr(config, "alibi", False):
            found["rope"] = f"RopeParams(dim={dim}, max_positions={limit})"
    head = modules.around.get(places.get("lm_head", ""))
    if head is None and not base.tied:
        found["tied"] = "True"
    if head and "bias" in head:
        found["lm_head_bias"] = "True"
    return found


def _is_transposed(modules: Modules, inner: Mapping[str, str], hidden: int) -> bool:
    """Whether matrices are [in, out]: seen where a matrix is not square."""
    for place, wanted in (("mlp.up_proj", 1), ("self_attn.qkv_proj", 1), ("mlp.down_proj", 0)):
        shape = modules.layer.get(inner.get(place, ""), {}).get("weight")
        if shape and shape[0] != shape[1] and hidden in shape:
            return shape[wanted] != hidden
    return False


def _likely_order(heads: int, kv_heads: int, inner: Mapping[str, str]) -> str:
    leaf = inner.get("self_attn.qkv_proj", "").rpartition(".")[2]
    if leaf not in ("query_key_value", "wqkv") or kv_heads == 1:
        return "plain"
    return "by head" if heads == kv_heads else "by group"
