"""The skeletons of TensorRT-LLM's two guides, their dots filled in, build and run.

Only the import lines differ from what the guides ask an author to write.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig

from llmfw import (
    Attention,
    AttentionMetadata,
    ColumnLinear,
    DecoderLayer,
    DecoderLayerList,
    DecoderModel,
    DecoderModelForCausalLM,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    ModelConfig,
    PositionalEmbeddingParams,
    PositionEmbeddingType,
    PretrainedModel,
    RMSNorm,
    RopeParams,
    WeightMap,
    register_auto_model,
)
from llmfw.functional import add
from llmfw.layers import MLP
from llmfw.models import build, load_model
from llmfw.models.build import host_for
from llmfw.models.weights import load_into_model
from llmfw.plugins import unregister_local
from llmfw.testing import PackedSession
from parity import assert_same_logits, hf_logits, random_prompts, tiny_hf

MyConfig = LlamaConfig

# --- "Adding a New Model in PyTorch Backend" --------------------------------------------------


class MyAttention(Attention):
    def __init__(self, model_config: ModelConfig[MyConfig], layer_idx: int | None = None):
        config = model_config.pretrained_config
        super().__init__(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=config.attention_bias,
            pos_embd_params=PositionalEmbeddingParams(
                type=PositionEmbeddingType.rope_gpt_neox,
                rope=RopeParams.from_config(config),
            ),
            layer_idx=layer_idx,
            dtype=config.dtype,
            config=model_config,
        )


class MyDecoderLayer(DecoderLayer):
    def __init__(self, model_config: ModelConfig[MyConfig], layer_idx: int):
        super().__init__()
        config = model_config.pretrained_config
        self.input_layernorm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MyAttention(model_config, layer_idx)
        self.post_attention_layernorm = RMSNorm(
            hidden_size=config.hidden_size, eps=config.rms_norm_eps
        )
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            bias=config.mlp_bias,
            config=model_config,
        )

    def forward(
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.self_attn(
            position_ids=position_ids,
            hidden_states=hidden_states,
            attn_metadata=attn_metadata,
            **kwargs,
        )
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states) + residual


class MyModel(DecoderModel):
    def __init__(self, model_config: ModelConfig[MyConfig]):
        super().__init__(model_config)
        config = model_config.pretrained_config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [MyDecoderLayer(model_config, idx) for idx in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_states = inputs_embeds
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                position_ids=position_ids,
                hidden_states=hidden_states,
                attn_metadata=attn_metadata,
            )
        return self.norm(hidden_states)


@register_auto_model("GuideModelForCausalLM")
class MyModelForCausalLM(DecoderModelForCausalLM[MyModel, MyConfig]):
    def __init__(self, model_config: ModelConfig[MyConfig]):
        super().__init__(
            MyModel(model_config),
            config=model_config,
            hidden_size=model_config.pretrained_config.hidden_size,
            vocab_size=model_config.pretrained_config.vocab_size,
        )


# --- "Adding a Model" -------------------------------------------------------------------------


class OldDecoderLayer(Layer):
    def __init__(self, config: ModelConfig[GPTNeoXConfig], layer_idx: int):
        super().__init__()
        neox = config.pretrained_config
        self.layer_idx = layer_idx
        self.config = config
        self.input_layernorm = LayerNorm(neox.hidden_size, eps=neox.layer_norm_eps)
        self.attention = Attention(
            hidden_size=neox.hidden_size,
            num_attention_heads=neox.num_attention_heads,
            bias=True,
            rope=RopeParams.from_config(neox),
            out_name="dense",
            layer_idx=layer_idx,
            config=config,
        )
        self.post_layernorm = LayerNorm(neox.hidden_size, eps=neox.layer_norm_eps)
        self.mlp = MLP(
            hidden_size=neox.hidden_size,
            intermediate_size=neox.intermediate_size,
            activation=neox.hidden_act,
            up_name="dense_h_to_4h",
            down_name="dense_4h_to_h",
            config=config,
        )

    def forward(self, hidden_states, position_ids, attn_metadata):
        residual = hidden_states
        attended = self.attention(position_ids, self.input_layernorm(hidden_states), attn_metadata)
        fed = self.mlp(self.post_layernorm(hidden_states))
        return add(add(residual, attended), fed)


class OldModel(Layer):
    def __init__(self, config: ModelConfig[GPTNeoXConfig]):
        super().__init__()
        neox = config.pretrained_config
        self.vocab_embedding = Embedding(neox.vocab_size, neox.hidden_size)
        self.layers = DecoderLayerList(OldDecoderLayer, config)
        self.ln_f = LayerNorm(neox.hidden_size, eps=neox.layer_norm_eps)

    def forward(self, input_ids, position_ids, attn_metadata):
        hidden_states = self.vocab_embedding(input_ids)
        hidden_states = self.layers(
            hidden_states, position_ids=position_ids, attn_metadata=attn_metadata
        )
        return self.ln_f(hidden_states)


@register_auto_model("OldModelForCausalLM")
class OldModelForCausalLM(PretrainedModel[GPTNeoXConfig]):
    def __init__(self, config: ModelConfig[GPTNeoXConfig]):
        super().__init__(config)
        neox = config.pretrained_config
        self.transformer = OldModel(config)
        self.lm_head = ColumnLinear(neox.hidden_size, neox.vocab_size, bias=False)

    def forward(self, attn_metadata, input_ids, position_ids):
        hidden_states = self.transformer(input_ids, position_ids, attn_metadata)
        if attn_metadata.logits_indices is not None:
            hidden_states = hidden_states[attn_metadata.logits_indices]
        return self.lm_head(hidden_states)

    @staticmethod
    def weight_map(model_config, checkpoint):
        heads = model_config.pretrained_config.num_attention_heads
        layer = "gpt_neox.layers.{i}."
        qkv = layer + "attention.query_key_value.{p}"
        ours = "transformer.layers.{i}."
        return (
            WeightMap()
            .reorder(qkv, (heads, 3, -1), (1, 0, 2))
            .rename(qkv, ours + "attention.qkv_proj.{p}")
            .rename(layer + "post_attention_layernorm.{p}", ours + "post_layernorm.{p}")
            .rename(layer + "{rest*}", ours + "{rest*}")
            .rename("gpt_neox.embed_in.weight", "transformer.vocab_embedding.weight")
            .rename("gpt_neox.final_layer_norm.{p}", "transformer.ln_f.{p}")
            .rename("embed_out.weight", "lm_head.weight")
        )


TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_the_pytorch_guides_model_gives_transformers_logits():
    hf = tiny_hf(LlamaConfig(**TINY, num_key_value_heads=2), "GuideModelForCausalLM")
    model = build(ModelConfig(pretrained_config=hf.config, max_model_len=64, block_size=4))
    assert isinstance(model, MyModelForCausalLM)
    model.load_weights(hf.state_dict())
    assert_same_logits(hf, model, random_prompts(3, 128, 8, 40))


def test_the_older_guides_model_gives_transformers_logits():
    hf = tiny_hf(GPTNeoXConfig(**TINY, use_parallel_residual=True), "OldModelForCausalLM")
    config = ModelConfig(pretrained_config=hf.config, max_model_len=64, block_size=4)
    model = build(config)
    assert isinstance(model, OldModelForCausalLM)
    weight_map = host_for("OldModelForCausalLM").hook.llmfw_weight_map(
        model_config=config, checkpoint=None
    )
    load_into_model(model, hf.state_dict(), weight_map)
    assert_same_logits(hf, model, random_prompts(3, 128, 8, 40))


def test_from_hugging_face_loads_a_directory(tmp_path):
    hf = tiny_hf(LlamaConfig(**TINY, num_key_value_heads=2), "GuideModelForCausalLM")
    hf.save_pretrained(tmp_path)
    raw = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        raw.replace('"LlamaForCausalLM"', '"GuideModelForCausalLM"')
    )
    model = MyModelForCausalLM.from_hugging_face(tmp_path, kernels="reference")
    ids = random_prompts(1, 128, 10, 10)[0]
    got = PackedSession(model).step({"a": ids})["a"]
    torch.testing.assert_close(got, hf_logits(hf, ids), atol=1e-4, rtol=0)
    assert load_model(tmp_path).plugin_label.startswith("local plugin")


def teardown_module() -> None:
    for name in ("GuideModelForCausalLM", "OldModelForCausalLM"):
        unregister_local(name)
