"""What the fallback recognises, refuses and says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from llmfw import LLM, SamplingParams
from llmfw.errors import (
    ConfigError,
    RequestError,
    UnknownArchitectureError,
    UsageError,
    WeightError,
)
from llmfw.layers import GatedMLP, LMHead, RMSNorm
from llmfw.models import load_model
from llmfw.testing.selection import model_entries, subjects_of
from llmfw.testing.tiny import shrunk_config, tiny_raw_config
from llmfw_transformers import modeling, plugin
from llmfw_transformers.architectures import configuration_of
from llmfw_transformers.probe import visible_keys
from llmfw_transformers.recognise import gated_mlp_of, norm_of
from llmfw_transformers.replace import Part, SharedProduct


def test_transformers_layers_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = checkpoint(tmp_path, "Olmo2ForCausalLM")
    monkeypatch.setenv("LLMFW_REPLACE_LAYERS", "off")
    kinds = {type(each).__module__ for each in load_model(folder).model.modules()}
    assert not any(
        module.startswith("llmfw.layers") for module in kinds - {"llmfw.layers.attention"}
    )
    monkeypatch.setenv("LLMFW_REPLACE_LAYERS", "no")
    with pytest.raises(UsageError, match="LLMFW_REPLACE_LAYERS is 'no'"):
        load_model(folder)


def checkpoint(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny random checkpoint."""
    raw = tiny_raw_config(architecture, {**shrunk_config(architecture), **changes})
    torch.manual_seed(0)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def refusal(folder: Path, architecture: str, **changes: Any) -> str:
    """What loading only the configuration says; no weights are made."""
    raw = tiny_raw_config(architecture, {**shrunk_config(architecture), **changes})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(UnknownArchitectureError) as caught:
        load_model(folder, load_format="dummy", plugin="llmfw-transformers")
    return str(caught.value)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path):
    folder = checkpoint(tmp_path, "Olmo2ForCausalLM")
    with LLM(folder, skip_tokenizer_init=True, device="cpu", kernels="reference") as llm:
        vocab = AutoConfig.from_pretrained(folder).vocab_size
        with pytest.raises(RequestError, match=f"token id {vocab} in prompt_token_ids"):
            llm.generate([3, vocab])
        assert llm.generate([3, vocab - 1], SamplingParams(max_tokens=2)).outputs[0].token_ids


def test_what_it_replaced_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    modeling._tell.cache_clear()
    folder = checkpoint(tmp_path, "Olmo2ForCausalLM")
    with caplog.at_level(logging.INFO, "llmfw.fallback"):
        model = load_model(folder).model
        load_model(folder)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "llmfw.fallback"]
    assert line.startswith("Olmo2ForCausalLM is served by the fallback llmfw-transformers: ")
    assert "attention in 2 layers, 2 gated MLPs, 8 linear layers, 2 fused products" in line
    assert "llmfw new --from MODEL" in line
    kinds = [type(each) for each in model.modules()]
    assert (kinds.count(GatedMLP), kinds.count(Part), kinds.count(LMHead)) == (2, 6, 1)
    assert kinds.count(RMSNorm) == 9
    assert set(model.cache_specs()) == {0, 1}


def test_a_removed_or_renamed_tensor_is_named(tmp_path: Path):
    folder = checkpoint(tmp_path, "Olmo2ForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors["model.layers.1.self_attn.key.weight"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError) as caught:
        load_model(folder)
    assert name in str(caught.value)
    assert "model.layers.1.self_attn.key.weight" in str(caught.value)


def test_a_missing_expert_is_named(tmp_path: Path):
    folder = checkpoint(tmp_path, "OlmoeForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"experts\.\d\.up_proj\.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("Glm4MoeForCausalLM", "bfloat16"),
        ("Glm4MoeForCausalLM", "float16"),
        ("Ernie4_5_MoeForCausalLM", "bfloat16"),
    ],
)
def test_other_dtypes_run(tmp_path: Path, architecture: str, dtype: str):
    folder = checkpoint(tmp_path, architecture)
    with LLM(folder, dtype=dtype, skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)
        outputs = llm.generate([[1, 2, 3], [4, 5, 6, 7]], params)
        state = llm.loaded.model.state_dict()
        corrections = [each.dtype for name, each in state.items() if "correction" in name]
    assert [len(each.outputs[0].token_ids) for each in outputs] == [4, 4]
    assert corrections
    assert set(corrections) == {torch.float32}


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("LlamaForSequenceClassification", "it is no causal language model"),
        ("NobodysForCausalLM", "transformers has no model of that name"),
    ],
)
def test_no_causal_model_of_transformers(architecture: str, reason: str):
    with pytest.raises(UnknownArchitectureError, match=reason):
        configuration_of({"architectures": [architecture], "model_type": "llama"})


def test_code_of_a_checkpoint_is_never_run():
    raw = {"architectures": ["TheirsForCausalLM"], "auto_map": {"AutoConfig": "theirs.Config"}}
    with pytest.raises(UnknownArchitectureError, match="never run"):
        configuration_of(raw)


def test_quantised_weights_are_refused():
    raw = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    with pytest.raises(ConfigError, match="quantised"):
        configuration_of({**raw, "quantization_config": {"quant_method": "awq"}})


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("JambaForCausalLM", "keeps state that is not keys and values"),
        ("BloomForCausalLM", "takes no position_ids"),
        ("FalconForCausalLM", "does not go through transformers' attention interface"),
        ("GPTNeoXJapaneseForCausalLM", "does not go through transformers' attention interface"),
        ("DiffLlamaForCausalLM", "attends more than once for a token"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, architecture: str, reason: str):
    assert reason in refusal(tmp_path, architecture)


def test_rope_that_grows_is_served_while_short(tmp_path: Path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = checkpoint(tmp_path, "Olmo2ForCausalLM", rope_parameters=rope)
    load_model(folder, max_model_len=128)
    with pytest.raises(UnknownArchitectureError, match="--max-model-len 128"):
        load_model(folder, max_model_len=200)


class Twice(nn.Module):
    """A norm by its name, and none by what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, device="meta"))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return 2 * x * rms * self.weight


class OffsetNorm(Twice):
    """An RMS norm that stores its weight less one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * rms * (1 + self.weight)


def test_norms_are_recognised_by_what_they_compute():
    assert norm_of(Twice()) is None
    norm = norm_of(OffsetNorm())
    assert norm is not None
    assert (norm.kind, norm.size, norm.eps, norm.offset) == ("rms", 8, 1e-6, 1.0)


class Gated(nn.Module):
    """Gate and up in the order that names tell, or not."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=False, device="meta")
        self.up_proj = nn.Linear(8, 16, bias=False, device="meta")
        self.down_proj = nn.Linear(16, 8, bias=False, device="meta")
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.swapped:
            gate, up = up, gate
        return self.down_proj(nn.functional.silu(gate) * up)


def test_gated_mlps_are_recognised_by_what_they_compute():
    assert gated_mlp_of(Gated(swapped=True)) is None
    found = gated_mlp_of(Gated(swapped=False))
    assert found is not None
    assert (found.hidden_size, found.intermediate_size, found.activation) == (8, 16, "silu")


def test_a_shared_product_is_made_once_for_each_input():
    made: list[torch.Tensor] = []

    class Product(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made.append(x)
            return super().forward(x)

    product = Product(4, 5)
    shared = SharedProduct(product, [2, 3])
    first, second = Part(shared, 0), Part(shared, 1)
    x, y = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    with torch.no_grad():
        for each in (x, y, x):
            both = torch.cat((first(each), second(each)), -1)
            torch.testing.assert_close(
                both, nn.functional.linear(each, product.weight, product.bias)
            )
        assert len(made) == 3
        second(x), first(y)  # one of two, then another input: nothing stale is given
        torch.testing.assert_close(
            second(y), nn.functional.linear(y, product.weight, product.bias)[..., 2:]
        )


def test_masks_are_read_by_what_they_let_through():
    assert visible_keys(lambda b, h, q, k: k <= q).window is None
    assert visible_keys(lambda b, h, q, k: (k <= q) & (k > q - 7)).window == 7
    assert "neither" in visible_keys(lambda b, h, q, k: k >= 0).refusal
    assert "neither" in visible_keys(lambda b, h, q, k: (k <= q) & (k // 64 == q // 64)).refusal


def test_what_is_checked_by_its_names():
    by_distribution = model_entries("llmfw-transformers")
    assert {each.name for each in by_distribution} == set(plugin.tiny_configs)
    assert {each.dist for each in by_distribution} == {"llmfw-transformers"}
    (subject,) = subjects_of("HeliumForCausalLM")
    with subject:
        assert subject.resolved.label.startswith("llmfw-transformers ")
    with pytest.raises(UsageError, match="no architecture or plugin"):
        subjects_of("NobodysForCausalLM")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_head_is_tied_to_an_embedding_of_transformers(tmp_path: Path, load_format: str):
    folder = checkpoint(tmp_path, "Gemma3ForCausalLM", tie_word_embeddings=True)
    model = load_model(folder, plugin="llmfw-transformers", load_format=load_format).model
    (head,) = [each for each in model.modules() if isinstance(each, LMHead)]
    embedding = model.get_submodule("model.embed_tokens")
    assert type(embedding).__module__.startswith("transformers.")
    assert head.weight is embedding.weight
