"""`llmfw new`: what it asks, what it refuses, and what it reads from a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cli_helpers import run
from llmfw_cli.new import write as writing
from llmfw_cli.new.recognise import Recognition, recognise
from llmfw_cli.new.settle import Settled, settle
from llmfw_cli.new.shrink import shrink
from llmfw_cli.new.source import call, chain, renames, rule
from test_plugin_template import command

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96}

# Kinds that transformers has and the stock decoder serves: their fields, and what must be seen.
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "stablelm": (GROUPED, {}),
    "qwen2": (GROUPED, {"qkv_bias": "True"}),
    "qwen3": ({**GROUPED, "head_dim": 16}, {"qk_norm": "True"}),
    "phi3": (GROUPED, {}),
    "gemma2": (
        {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
        {"block": '"sandwich"', "norm_offset": "1.0", "embed_scale": "config.hidden_size**0.5"},
    ),
    "granite": (
        {**GROUPED, "attention_multiplier": 0.2},
        {"residual_scale": "config.residual_multiplier"},
    ),
    "glm4": ({**GROUPED, "head_dim": 16}, {"block": '"sandwich"'}),
    "cohere2": (
        {**GROUPED, "num_hidden_layers": 4, "sliding_window": 8},
        {"rope": "None", "local_rope": "RopeParams.from_config(config, interleaved=True)"},
    ),
    "cohere": (GROUPED, {"block": '"parallel"', "norm_bias": "False"}),
    "exaone4": (GROUPED, {"block": '"post_norm"', "qk_norm": "True"}),
    "gptj": ({"rotary_dim": 8}, {"block": '"parallel"', "lm_head_bias": "True"}),
    "phi": ({"intermediate_size": 96}, {"block": '"parallel"'}),
    "falcon": ({}, {"num_kv_heads": "1", "activation": "config.activation"}),
    "gpt_neox": ({"intermediate_size": 96}, {"block": '"parallel_norms"'}),
    "gpt2": ({}, {"learned_positions": "config.max_position_embeddings"}),
    "gpt_bigcode": ({}, {"learned_positions": "config.max_position_embeddings"}),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, {"position_offset": "2"}),
    "starcoder2": (GROUPED, {"o_bias": "True"}),
    "olmo2": (GROUPED, {"block": '"post_norm"', "qk_norm": '"full"'}),
    "olmo3": (
        {**GROUPED, "num_hidden_layers": 4, "sliding_window": 8},
        {"block": '"post_norm"', "qk_norm": '"full"'},
    ),
}

FILE = "model.safetensors"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "olmoe": (
        {**GROUPED, **EXPERTS},
        {"qk_norm": '"full"', "moe": "MoEParams.from_config(config)"},
    ),
    "qwen2_moe": (
        {
            **GROUPED,
            **EXPERTS,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
        {"moe_layers": "(True, False, True, True)"},
    ),
    "mixtral": (LOCAL, {"moe": "MoEParams.from_config(config, renormalize=True)"}),
    "glm4_moe": (
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "first_k_dense_replace": 1,
        },
        {
            "moe_layers": "tuple(i >= config.first_k_dense_replace "
            "for i in range(config.num_hidden_layers))"
        },
    ),
    "minimax_m2": (
        {**LOCAL, "head_dim": 16},
        {
            "moe": 'MoEParams.from_config(config, scoring="sigmoid", score_bias=True, '
            "float32_router=True, renormalize=True)"
        },
    ),
    "granitemoeshared": (
        {**LOCAL, "shared_intermediate_size": 48},
        {
            "moe": "MoEParams.from_config(config, shared_size=config.shared_intermediate_size, "
            "renormalize=True)"
        },
    ),
}
LATENT = {
    **GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LATENTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "minicpm3": (
        LATENT,
        {
            "mla": "MLAParams.from_config(config)",
            "residual_scale": "config.scale_depth / config.num_hidden_layers**0.5",
        },
    ),
    "glm4_moe_lite": (
        {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"rope": "RopeParams.from_config(config, interleaved=True)"},
    ),
}
KINDS |= {
    "biogpt": ({"intermediate_size": 96}, {"embed_scale": "config.hidden_size**0.5"}),
    "granite_swa": (
        {**GROUPED, "num_hidden_layers": 4, "sliding_window": 8},
        {"sinks": "True"},
    ),
    "kolibri1": (
        {**GROUPED, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2},
        {"block": '"sandwich"'},
    ),
}
KINDS |= MIXTURES | LATENTS


def saved(folder: Path, model_type: str, *, alone: bool = False, **fields: Any) -> Path:
    """A tiny random checkpoint, as transformers saves it; `alone` leaves the usual sizes out."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**({} if alone else SIZES), **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_decoder_is_recognised_whole(kind: str, tmp_path: Path) -> None:
    fields, expected = KINDS[kind]
    found = recognise(saved(tmp_path, kind, **fields))
    settled = settle(found)
    assert settled.agrees, settled
    assert expected.items() <= settled.found.switches.items()
    assert writing.unrecognised(found) == []


def test_what_names_and_shapes_cannot_tell_is_tried_out(tmp_path: Path) -> None:
    settled = settle(recognise(saved(tmp_path, "cohere", **GROUPED)))
    assert settled.tried == ("rope=RopeParams.from_config(config, interleaved=True)",)


def test_a_written_plugin_is_well_formed_and_loads_the_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "gptj", rotary_dim=8)
    done = run("new", "--from", str(model), "--output", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["agrees"]
    assert told["problems"] == ""
    plugin = Path(told["path"])
    assert plugin.name == "gptj-plugin"
    command(plugin, "-m", "ruff", "check", "--select", "E,F,I", ".")
    command(plugin, "-m", "ruff", "format", "--check", ".")
    sys.path.insert(0, str(plugin / "src"))
    try:
        from gptj_plugin import plugin as made

        from llmfw import ModelConfig
        from llmfw.models import build
        from llmfw.models.build import CoreDefaults
        from llmfw.plugins import PluginHost
        from llmfw.weights import open_checkpoint, plan_weights

        host = PluginHost(made, name="gptj-plugin", defaults=CoreDefaults())
        found = recognise(model)
        config: ModelConfig[Any] = ModelConfig(pretrained_config=found.config, max_model_len=128)
        checkpoint = open_checkpoint(model)
        rules = host.hook.llmfw_weight_map(model_config=config, checkpoint=checkpoint)
        assert list(plan_weights(build(config, host), checkpoint, rules).rows())
    finally:
        sys.path.remove(str(plugin / "src"))


def test_what_is_not_recognised_is_told_with_its_tensors(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "cohere", use_qk_norm=True, **GROUPED)
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "model.layers.{i}.self_attn.q_norm.weight [4, 16]" in done.stdout
    assert "the checkpoint does not load yet" in (tmp_path / "cohere-plugin/README.md").read_text()


def test_a_bias_by_distance_is_told(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "falcon", alibi=True)
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert "config.json says alibi" in done.stdout
    assert "NOT RIGHT YET" in done.stdout
    assert "every tensor of the checkpoint is accounted for" in done.stdout


def test_a_router_of_its_own_kind_is_told(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "phimoe", **LOCAL)
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert "NOT RIGHT YET" in done.stdout
    assert "router_jitter_noise" in done.stdout
    assert "every tensor of the checkpoint is accounted for" in done.stdout


@pytest.mark.parametrize("kind", ["glm4_moe", "granitemoeshared", "qwen2_moe"])
def test_a_written_mixture_loads_its_checkpoint(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", kind, **MIXTURES[kind][0])
    done = run("new", "--from", str(model), "--output", str(tmp_path), "--json")
    told = json.loads(done.stdout)
    assert told["problems"] == ""
    assert told["unread_fields"] == {}
    command(Path(told["path"]), "-m", "ruff", "check", "--select", "E,F,I", ".")
    command(Path(told["path"]), "-m", "ruff", "format", "--check", ".")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "glm4_moe", **MIXTURES["glm4_moe"][0])
    weights = load_file(model / FILE)
    last = {name: value for name, value in weights.items() if name.startswith("model.layers.2.")}
    more = {name.replace(".2.", ".3.", 1): value.clone() for name, value in last.items()}
    save_file({**weights, **more, "model.layers.3.enorm.weight": torch.ones(64)}, model / FILE)
    done = run("new", "--from", str(model), "--output", str(tmp_path), "--json")
    told = json.loads(done.stdout)
    assert told["agrees"]
    assert told["problems"] == ""
    assert told["unrecognised"] == []
    assert (told["layers"], told["extra_layers"]) == (3, 1)
    assert "1 more than config.json says: ignored" in "\n".join(writing.lines(told))


def test_a_model_without_positions_is_told(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "model", "bloom", alone=True, hidden_size=64, vocab_size=160, n_layer=2, n_head=4
    )
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert "nothing tells how positions enter" in done.stdout
    assert "ALiBi" in done.stdout
    assert "activation is a guess" in done.stdout
    assert "transformer.word_embeddings_layernorm.bias [64]" in done.stdout
    assert done.stdout.count("word_embeddings_layernorm.bias") == 1
    assert "surplus    what is not recognised" in done.stdout


def test_a_bias_that_an_object_of_the_configuration_asks_for_is_told(tmp_path: Path) -> None:
    sizes = {"d_model": 64, "vocab_size": 160, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}
    model = saved(tmp_path / "model", "mpt", alone=True, **sizes)
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert "config.json says alibi" in done.stdout


HYBRID = {"hidden_size": 64, "vocab_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]}),
        ("jamba", {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    ],
)
def test_a_hybrid_is_told_without_a_long_list(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {**HYBRID, "num_key_value_heads": 2, "intermediate_size": 96, **sizes}
    model = saved(tmp_path / "model", kind, alone=True, **sizes)
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "NOT a stock decoder" in done.stdout
    assert "not every layer has attention: write the layers out" in done.stdout
    assert "not compared with transformers: its weights do not fit yet" in done.stdout
    assert "model.layers.{i}.mamba.D" in done.stdout
    assert done.stdout.count("mamba.D") == 1
    assert "nearest" not in done.stdout
    written = tmp_path / f"{kind}-plugin/src/{kind}_plugin/__init__.py"
    command(written.parent, written.name)  # Bamba's configuration has an infinite number
    assert ("rope is a guess" in done.stdout) is (kind == "jamba")


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "model", "mamba", alone=True, hidden_size=64, vocab_size=160, num_hidden_layers=2
    )
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert done.exit_code == 3
    assert "--base blank" in done.output


def test_a_model_that_transformers_lacks_gets_a_configuration(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama", **GROUPED)
    raw = json.loads((model / "config.json").read_text("utf-8"))
    raw |= {"model_type": "zebra", "architectures": ["ZebraForCausalLM"], "stripes": 7}
    (model / "config.json").write_text(json.dumps(raw), "utf-8")
    done = run("new", "--from", str(model), "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "stripes: 7" in done.stdout
    assert "every tensor of the checkpoint is accounted for" in done.stdout
    assert (tmp_path / "zebra-plugin/src/zebra_plugin/configuration.py").is_file()


def test_older_checkpoints_masks_are_ignored(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "gpt2")
    file = model / "model.safetensors"
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file({**load_file(file), **masks}, file)
    found = recognise(model)
    assert writing.unrecognised(found) == []
    assert "the causal mask" in writing.answers_of(found)["__weights"]


def test_elsewhere_than_on_a_terminal_a_name_is_needed() -> None:
    done = run("new")
    assert done.exit_code == 2
    assert "llmfw new NAME" in done.output


def test_on_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmfw_cli.commands.new._is_terminal", lambda: True)
    answers = "Zebra\n\n\n\nA Person\nblank\nown\n\n"
    done = run("new", "--output", str(tmp_path), input=answers)
    assert done.exit_code == 0, done.output
    plugin = tmp_path / "zebra-plugin"
    assert 'name = "A Person"' in (plugin / "pyproject.toml").read_text("utf-8")
    assert (plugin / "src/zebra_plugin/configuration.py").is_file()
    assert "GatedMLP" in (plugin / "src/zebra_plugin/modeling.py").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--architecture", "No Name"), "not a Python name"),
        (("--import-name", "class"), "not a Python name"),
        (("--distribution", "-x-"), "not a name that packages may have"),
        (("--base", "granite"), "known: decoder, blank"),
        (("--author", 'a"b'), "without quotes"),
    ],
)
def test_names_that_cannot_be_are_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = run("new", "Zebra", *arguments, "--output", str(tmp_path))
    assert done.exit_code == 2
    assert words in done.output
    assert list(tmp_path.iterdir()) == []


def test_without_a_trial_nothing_is_claimed(tmp_path: Path) -> None:
    found: Recognition = recognise(saved(tmp_path, "stablelm", **GROUPED))
    told = writing.lines(writing.report(Settled(found, None, "--no-trial"), ""))
    assert "not compared with transformers: --no-trial" in told


def test_shrink_keeps_switches_and_ratios() -> None:
    raw = {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "bos_token_id": 128000, "layer_types": ["full_attention"] * 32,
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8192},
        "architectures": ["A"],
    }  # fmt: skip
    small = shrink(raw)
    assert small["num_key_value_heads"] == 1
    assert small["intermediate_size"] == 224
    assert small["layer_types"] == ["full_attention"] * 4
    assert small["num_hidden_layers"] == 4
    assert small["bos_token_id"] is None
    assert small["rope_scaling"]["original_max_position_embeddings"] == 64
    assert small["rms_norm_eps"] == 1e-5
    assert "architectures" not in small


def test_source_is_broken_where_it_is_too_long() -> None:
    assert call("f", ["a", "b"], 0, 0) == "f(a, b)"
    assert call("f", ["a" * 60, "b" * 60], 0, 0) == f"f(\n    {'a' * 60},\n    {'b' * 60},\n)"
    assert chain([]) == ""
    assert chain([rule("transpose", '"x"')]) == 'WeightMap().transpose("x")'
    long = "y" * 90
    assert chain(renames({"a": "b", long: "c", "d": "e"})).count(".rename(") == 2


def test_more_key_heads_than_query_heads_are_not_divided_by_zero() -> None:
    raw = {"num_attention_heads": 4, "num_key_value_heads": 8, "hidden_size": 64}
    assert shrink(raw, {})["num_key_value_heads"] >= 1
