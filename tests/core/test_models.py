"""Specs, building through hooks, registered classes, settings and loading by the author."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig

from llmfw import (
    DecoderSpec,
    Linear,
    ModelConfig,
    RMSNorm,
    StockDecoderForCausalLM,
    build,
    hookimpl,
)
from llmfw.errors import (
    ConfigError,
    DeviceError,
    PluginContractError,
    UsageError,
    WeightError,
)
from llmfw.models.build import CoreDefaults
from llmfw.models.settings import (
    choose_device,
    choose_dtype,
    choose_max_model_len,
    stored_dtype,
)
from llmfw.models.spec import BLOCKS, windows_of
from llmfw.models.weights import load_by_author, load_dummy
from llmfw.plugins import PluginHost
from llmfw.testing import PackedSession
from parity import hf_logits, ours_from, tiny_hf

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def host(plugin: object) -> PluginHost:
    return PluginHost(plugin, name="test plugin", defaults=CoreDefaults())


class Nothing:
    """A plugin without hooks: all is core's."""


def tiny_config(**changes) -> ModelConfig:
    return ModelConfig(
        pretrained_config=LlamaConfig(**{**TINY, **changes}), max_model_len=64, block_size=4
    )


def test_core_builds_a_stock_decoder_from_the_configuration_alone():
    model = build(tiny_config(tie_word_embeddings=True), host(Nothing()))
    assert isinstance(model, StockDecoderForCausalLM)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sorted(model.cache_specs()) == [0, 1]
    assert model.max_positions == 64


def test_a_hook_replaces_one_part_and_a_wrapper_sees_all():
    seen = []

    class Plugin:
        @hookimpl
        def llmfw_layer(self, kind, role, model_config, layer_idx, spec):
            if kind == "norm" and role == "post_attention_layernorm" and layer_idx == 1:
                return RMSNorm(spec["hidden_size"], eps=0.5)
            return None

    class Extension:
        @hookimpl(wrapper=True)
        def llmfw_layer(self, kind, role):
            layer = yield
            seen.append((kind, role))
            return layer

    extended = PluginHost(
        Plugin(), name="p", defaults=CoreDefaults(), extensions=[("e", Extension())]
    )
    model = build(tiny_config(), extended)
    assert model.model.layers[1].post_attention_layernorm.eps == 0.5
    assert model.model.layers[0].post_attention_layernorm.eps != 0.5
    kinds = {kind for kind, _ in seen}
    assert kinds == {"decoder", "attention", "mlp", "linear", "norm", "embedding", "lm_head"}


@pytest.mark.parametrize(
    ("hook", "value", "words"),
    [
        ("llmfw_model", "a string", "llmfw_model of p returned str"),
        ("llmfw_layer", 3, "llmfw_layer of p returned int for embedding 'embed_tokens'"),
    ],
)
def test_wrong_results_are_contract_errors(hook: str, value: object, words: str):
    class Model:
        @hookimpl
        def llmfw_model(self, model_config):
            return value

    class Part:
        @hookimpl
        def llmfw_layer(self, kind):
            return value

    plugin = Model() if hook == "llmfw_model" else Part()
    with pytest.raises(PluginContractError) as caught:
        build(tiny_config(), PluginHost(plugin, name="p", defaults=CoreDefaults()))
    assert words in str(caught.value)


def test_build_without_a_host_finds_the_plugin_of_the_architecture():
    cfg = tiny_config(architectures=["LlamaForCausalLM"])
    assert type(build(cfg)).__name__ == "LlamaForCausalLM"
    with pytest.raises(ConfigError, match="names no architecture"):
        build(tiny_config())


def test_spec_is_derived_and_adjusted_in_one_expression():
    spec = DecoderSpec.from_config(LlamaConfig(**TINY, attention_bias=True), qk_norm=True)
    assert (spec.qkv_bias, spec.o_bias, spec.qk_norm, spec.norm) == (True, True, True, "rms")
    assert spec.replace(o_bias=False).o_bias is False
    with pytest.raises(ConfigError, match="block 'spiral'"):
        spec.replace(block="spiral")
    with pytest.raises(ConfigError, match="3 windows for 2 layers"):
        spec.replace(windows=(1, 2, 3))


def test_spec_has_two_ropes_where_the_configuration_has_one_for_each_layer_type():
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    config = SimpleNamespace(
        **TINY,
        rms_norm_eps=1e-6,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 9.0}},
    )
    spec = DecoderSpec.from_config(config)
    assert [spec.rope_of(layer).theta for layer in range(2)] == [9.0, 1000.0]
    config.rope_parameters = rope
    spec = DecoderSpec.from_config(config)
    assert [spec.rope_of(layer).theta for layer in range(2)] == [1000.0, 1000.0]


def test_windows_by_layer_type():
    cfg = SimpleNamespace(
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
    )
    assert windows_of(cfg) == (8, None)
    cfg.layer_types = None
    assert windows_of(cfg) == (8, 8)
    cfg.use_sliding_window = False
    assert windows_of(cfg) == ()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_every_block_runs_the_same_in_one_piece_and_in_steps(block: str, norm: str):
    class Plugin:
        @hookimpl
        def llmfw_model(self, model_config):
            spec = DecoderSpec.from_config(
                model_config.pretrained_config,
                block=block,
                norm=norm,
                gated=norm == "rms",
                qk_norm=True if norm == "rms" else "full",
                learned_positions=64,
                position_offset=2,
                embed_scale=2.0,
                residual_scale=0.5,
                logit_scale=0.5,
                logit_softcap=5.0,
                attn_softcap=3.0,
            )
            return StockDecoderForCausalLM(model_config, spec)

    model = build(tiny_config(), host(Plugin()))
    load_dummy(model, std=0.2)
    ids = [5, 9, 2, 60, 33, 7, 7, 12]
    whole = PackedSession(model).step({"a": ids})["a"]
    session = PackedSession(model)
    steps = torch.cat([session.step({"a": [token]})["a"] for token in ids])
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)
    assert whole.abs().max() <= 5.0
    assert whole.std() > 1e-3


def test_authors_own_load_weights_is_used_and_checked(caplog):
    hf = tiny_hf(LlamaConfig(**TINY), "LlamaForCausalLM")

    class Lazy(StockDecoderForCausalLM):
        skip = ""

        def load_weights(self, weights):
            for name, module in self.named_modules():
                if not list(module.parameters(recurse=False)) or name == self.skip:
                    continue
                shards = getattr(module, "weight_shards", ())
                parent = name.rpartition(".")[0]
                sources = [f"{parent}.{shard.name}" for shard in shards] or [name]
                module.load_weights([{"weight": weights[f"{s}.weight"]} for s in sources])

    def loaded(cls: type) -> StockDecoderForCausalLM:
        class Plugin:
            @hookimpl
            def llmfw_model(self, model_config):
                return cls(model_config)

        model = build(tiny_config(), host(Plugin()))
        assert load_by_author(model, weights) == unread
        return model

    weights, unread = hf.state_dict(), ()
    ids = [1, 2, 3, 4]
    got = PackedSession(loaded(Lazy)).step({"a": ids})["a"]
    torch.testing.assert_close(got, hf_logits(hf, ids), atol=1e-4, rtol=0)

    class Forgetful(Lazy):
        skip = "model.norm"

    with pytest.raises(WeightError, match=r"left 1 parameters unfilled: model\.norm\.weight"):
        loaded(Forgetful)

    weights, unread = {**weights, "model.extra.weight": torch.ones(1)}, ("model.extra.weight",)
    with caplog.at_level("WARNING", logger="llmfw.weights"):
        loaded(Lazy)
    assert "never read 1 tensors of the checkpoint: model.extra.weight" in caplog.text


def test_load_weights_of_a_model_takes_a_state_dict():
    hf = tiny_hf(LlamaConfig(**TINY), "LlamaForCausalLM")
    model = build(tiny_config(), host(Nothing()))
    model.load_weights(hf.state_dict())
    ids = [3, 1, 4, 1, 5]
    got = PackedSession(model).step({"a": ids})["a"]
    torch.testing.assert_close(got, hf_logits(hf, ids), atol=1e-4, rtol=0)


def test_no_hook_is_called_while_decoding():
    counted = host(Nothing())
    model = build(tiny_config(), counted)
    load_dummy(model)
    before = counted.calls
    assert before > 0
    session = PackedSession(model)
    session.step({"a": [1, 2, 3]})
    session.step({"a": [4]})
    assert counted.calls == before


def test_vanilla_backend_gives_the_same_numbers():
    hf = tiny_hf(LlamaConfig(**TINY), "LlamaForCausalLM")
    ids = [3, 1, 4, 1, 5]
    logits = [
        PackedSession(ours_from(hf, attn_backend=name)).step({"a": ids})["a"]
        for name in ("paged", "vanilla")
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="attention backend 'flash9' is not known"):
        ours_from(hf, attn_backend="flash9")


def test_a_buffer_computed_while_declaring_is_refused():
    class Wrong(StockDecoderForCausalLM):
        def __init__(self, model_config):
            super().__init__(model_config)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    class Plugin:
        @hookimpl
        def llmfw_model(self, model_config):
            return Wrong(model_config)

    model = build(tiny_config(), host(Plugin()))
    with pytest.raises(ConfigError, match="buffer table has no values"):
        load_dummy(model)


def test_a_configuration_without_a_dtype_takes_the_files(tmp_path: Path):
    assert stored_dtype(tmp_path) is None
    half = {f"w{i}": torch.zeros(2, dtype=torch.bfloat16) for i in range(2)}
    whole = {"b": torch.zeros(9), **{f"n{i}": torch.zeros(2, dtype=torch.int64) for i in range(4)}}
    save_file({**half, **whole}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_dtype_is_as_asked_or_as_the_checkpoint_says():
    assert choose_dtype("auto", {"torch_dtype": "bfloat16"}) == torch.bfloat16
    assert choose_dtype("auto", {"text_config": {"dtype": "float16"}}) == torch.float16
    assert choose_dtype("auto", {}) == torch.float32
    assert choose_dtype("auto", {}, lambda: torch.bfloat16) == torch.bfloat16
    assert choose_dtype("auto", {"dtype": "float16"}, lambda: torch.bfloat16) == torch.float16
    assert choose_dtype(torch.float16, {"dtype": "bfloat16"}) == torch.float16
    with pytest.raises(UsageError, match="dtype 'int3'"):
        choose_dtype("int3", {})


def test_device_is_checked():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="device 'toaster' is not known"):
        choose_device("toaster")
    with pytest.raises(DeviceError, match="there is no device cuda:99"):
        choose_device("cuda:99")
    with pytest.raises(UsageError, match="is not supported"):
        choose_device("meta")


def test_max_model_len_stays_within_the_positions():
    plain = LlamaConfig(**TINY)
    assert choose_max_model_len(None, plain) == 64
    assert choose_max_model_len(8, plain) == 8
    with pytest.raises(ConfigError, match="max_model_len 65 is more than the 64 positions"):
        choose_max_model_len(65, plain)
    with pytest.raises(UsageError, match="not positive"):
        choose_max_model_len(0, plain)
    dynamic = LlamaConfig(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert choose_max_model_len(128, dynamic) == 128
    assert choose_max_model_len(None, PreTrainedConfig()) == 2048


def test_kernels_are_logged_by_choice():
    model = build(tiny_config(), host(Nothing()))
    choices = model.model_config.ops.choices.values()
    assert {choice.context.op for choice in choices} >= {"linear", "rms_norm", "paged_attention"}
    assert all(choice.chosen == "reference" for choice in choices)


def test_linear_names_its_shards_for_print():
    text = str(build(tiny_config(), host(Nothing())).model.layers[0].self_attn.qkv_proj)
    assert "q_proj" in text
    assert isinstance(Linear(2, 2), torch.nn.Module)
    logging.getLogger("llmfw").debug(text)


def test_positions_of_a_wrapper_are_its_text_parts():
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))
    assert ModelConfig(pretrained_config=config).max_positions == 77
