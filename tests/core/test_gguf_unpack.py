"""Unpacking a GGUF: the HF directory that comes out, and the cache that it goes into."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import TOKENS, decoder_tensors, to_ggml_pairs, write_gguf
from llmfw.errors import CheckpointError, ConfigError, TokenizerError
from llmfw.weights import open_checkpoint
from llmfw.weights.gguf_config import config_of, generation_config_of
from llmfw.weights.gguf_reader import GGUFCheckpoint
from llmfw.weights.gguf_tables import PRE_TOKENIZERS
from llmfw.weights.gguf_tokenizer import tokenizer_of
from llmfw.weights.gguf_unpack import unpack_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "cache"))


def read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def test_transformers_reads_the_directory_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    renamed: dict[str, torch.Tensor] = {}
    stems = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in stems.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):
                weight = to_ggml_pairs(weight, 4 if theirs == "attn_q" else 2)
            renamed[f"blk.{index}.{theirs}.weight"] = weight
    renamed["token_embd.weight"] = model.model.embed_tokens.weight.detach()
    renamed["output_norm.weight"] = model.model.norm.weight.detach()

    unpacked = unpack_gguf(write_gguf(tmp_path / "x.gguf", renamed))
    assert unpacked.checkpoint_path == unpacked.model_dir
    again = AutoModelForCausalLM.from_pretrained(unpacked.model_dir, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_config_agrees_with_transformers_own_reading(tmp_path: Path, arch: str) -> None:
    sizes = {"attention.key_length": 16, "attention.sliding_window": 32, "vocab_size": len(TOKENS)}
    if arch == "llama":
        sizes["rope.dimension_count"] = 16
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(tied=False), arch=arch, sizes=sizes)
    ours, theirs = config_of(GGUFCheckpoint(file)), load_gguf_checkpoint(file)["config"]
    for key in ("_model_name_or_path", "rms_norm_eps", "model_type"):
        theirs.pop(key, None)
    assert {key: ours.get(key) for key in theirs} == theirs
    assert ours["rms_norm_eps"] == 1e-5
    config = AutoConfig.for_model(**{key: v for key, v in ours.items() if key != "architectures"})
    assert config.head_dim == 16
    assert config.rope_parameters is not None


def test_rope_factors_become_the_scaling_they_stand_for(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=64, max_position_embeddings=1 << 17, rope_theta=1e4, rope_scaling=dict(scaling)
    )
    plain = 1 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    tensors = decoder_tensors() | {"rope_freqs.weight": factors}
    file = write_gguf(tmp_path / "x.gguf", tensors, sizes={"rope.dimension_count": 64})
    assert config_of(GGUFCheckpoint(file))["rope_scaling"] == scaling
    tensors["rope_freqs.weight"] = factors * 1.1
    with pytest.raises(ConfigError, match="not the factors of a rope scaling known here"):
        config_of(GGUFCheckpoint(write_gguf(tmp_path / "y.gguf", tensors)))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_of_the_metadata(
    tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(), metadata=metadata)
    assert config_of(GGUFCheckpoint(file)).get("rope_scaling") == expected


def test_metadata_that_make_no_config(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(), sizes={"attention.head_count": 0})
    with pytest.raises(ConfigError, match="no single number for num_attention_heads"):
        config_of(GGUFCheckpoint(file))
    odd = {"llama.rope.scaling.type": "spiral"}
    file = write_gguf(tmp_path / "y.gguf", decoder_tensors(), metadata=odd)
    with pytest.raises(ConfigError, match="rope scaling 'spiral'"):
        config_of(GGUFCheckpoint(file))
    tensors = decoder_tensors()
    del tensors["token_embd.weight"]
    with pytest.raises(ConfigError, match=r"no tensor 'token_embd\.weight'"):
        config_of(GGUFCheckpoint(write_gguf(tmp_path / "z.gguf", tensors)))


def test_latent_attention_without_the_sizes_of_a_head(tmp_path: Path) -> None:
    sizes = {"attention.kv_lora_rank": 16, "attention.key_length": 8, "attention.value_length": 8}
    for rotated in ({}, {"rope.dimension_count": 8}):
        file = write_gguf(
            tmp_path / "x.gguf", decoder_tensors(), arch="deepseek2", sizes=sizes | rotated
        )
        with pytest.raises(ConfigError, match="no sizes of a head of latent attention"):
            config_of(GGUFCheckpoint(file))


def test_the_files_of_the_directory(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "x.gguf", decoder_tensors(), metadata={"tokenizer.ggml.eot_token_id": 5}
    )
    folder = unpack_gguf(file).model_dir
    assert folder.is_relative_to(tmp_path / "cache")
    assert read(folder / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert read(folder / "config.json")["tie_word_embeddings"] is True
    generation = read(folder / "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    tokenizer = read(folder / "tokenizer_config.json")
    assert tokenizer["model_max_length"] == 64
    assert tokenizer["chat_template"] == "{{ messages[0]['content'] }}"
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<s>", "</s>")
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("abc12</s>")
    assert encoded.tokens == ["abc", "1", "2", "</s>"]
    weights = open_checkpoint(folder)
    assert {weights.info(name).dtype for name in weights.names()} == {torch.bfloat16}


def test_weights_above_the_limit_are_read_from_the_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors())
    unpacked = unpack_gguf(file, unpack_below=1)
    assert unpacked.checkpoint_path == file.resolve()
    assert not list(unpacked.model_dir.glob("*.safetensors"))


def test_unpacked_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors())
    first = unpack_gguf(file).model_dir
    made = (first / "config.json").stat().st_mtime_ns
    assert unpack_gguf(file).model_dir == first
    assert (first / "config.json").stat().st_mtime_ns == made
    os.utime(file, ns=(1, 1))
    second = unpack_gguf(file).model_dir
    assert second != first
    assert sorted(second.parent.iterdir()) == [second]  # the older one is gone, nothing half made


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    old, new = tmp_path / "cache" / "gguf" / ".new-old", tmp_path / "cache" / "gguf" / ".new-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    unpack_gguf(write_gguf(tmp_path / "x.gguf", decoder_tensors()))
    assert (old.exists(), new.exists()) == (False, True)


def test_several_processes_at_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors())
    code = (
        "import sys; from pathlib import Path; from llmfw.weights.gguf_unpack import unpack_gguf;"
        "print(unpack_gguf(Path(sys.argv[1])).model_dir)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (folder,) = folders
    assert len(open_checkpoint(folder).names()) == len(decoder_tensors())
    assert sorted(Path(folder).parent.iterdir()) == [Path(folder)]


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", decoder_tensors(), tokenizer=None)
    with pytest.raises(TokenizerError, match="it has no vocabulary"):
        unpack_gguf(file)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack_gguf(tmp_path / "none.gguf")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("LLMFW_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ConfigError, match="the cache cannot be written") as caught:
        unpack_gguf(write_gguf(tmp_path / "x.gguf", decoder_tensors()))
    assert "LLMFW_CACHE" in str(caught.value)


# --- tokenizers ---


def byte_level(pre: str | None) -> dict[str, Any]:
    words = ["a", "b", "1", "2", "3", "4", "ab", "12", "123", "1234", "\u0120", "<s>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [1] * 11 + [3],
        "tokenizer.ggml.merges": ["a b", "1 2", "12 3", "123 4"],
        "tokenizer.ggml.bos_token_id": 11,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["ab", "1", "2", "3", "4"]),
        ("gpt-2", ["ab", "1234"]),
        ("qwen2", ["ab", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "ab", "123", "4"]),
    ],
)
def test_the_named_pre_tokenizer_splits_digits(pre: str, tokens: list[str]) -> None:
    tokenizer = tokenizer_of(Path("x.gguf"), byte_level(pre))
    assert tokenizer.encode("ab1234").tokens == tokens
    assert tokenizer.decode(tokenizer.encode("ab1234 ab").ids) == "ab1234 ab"


TEXT = "fooBar don't 12345  x/\n"
BY_DIGIT, BY_THREE = [*"12345"], ["123", "45"]
END, BYTES_END = [" ", " x", "/\n"], [" ", " x", "/", "\n"]
PIECES = {
    "gpt-2": ["fooBar", " don", "'t", " 12345", *BYTES_END],
    "phi-2": ["fooBar", " don", "'t", " 12345", *BYTES_END],
    "starcoder": ["fooBar", " don", "'t", " ", *BY_DIGIT, *BYTES_END],
    "llama-bpe": ["fooBar", " don", "'t", " ", *BY_THREE, *END],
    "dbrx": ["fooBar", " don", "'t", " ", *BY_THREE, *END],
    "qwen2": ["fooBar", " don", "'t", " ", *BY_DIGIT, *END],
    "gpt-4o": ["foo", "Bar", " don't", " ", *BY_THREE, *END],
    "tekken": ["foo", "Bar", " don", "'t", " ", *BY_DIGIT, *END],
    "deepseek-v3": ["fooBar", " don", "'t", " ", *BY_THREE, *END],
    "deepseek-coder": ["fooBar", " don", "'", "t", " ", *BY_DIGIT, *BYTES_END],
}


def pieces_of(pre: str, text: str) -> list[str]:
    tokenizer = tokenizer_of(Path("x.gguf"), byte_level(pre))
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in found]


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_pre_tokenizer_does(pre: str) -> None:
    assert pieces_of(pre, TEXT) == PIECES[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_pre_tokenizer_loses_text(pre: str) -> None:
    text = TEXT + "\u4e2d\u6587ab \u00e9\u0301A, [b]\r\n\t..  "
    assert "".join(pieces_of(pre, text)) == text


def test_scripts_without_spaces_stand_apart_where_the_model_has_it_so() -> None:
    assert pieces_of("deepseek-v3", "\u4e2d\u6587ab") == ["\u4e2d\u6587", "ab"]
    assert pieces_of("llama-bpe", "\u4e2d\u6587ab") == ["\u4e2d\u6587ab"]


def test_what_names_no_known_pre_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TokenizerError, match="pre-tokenizer 'mystery' is not known"):
        tokenizer_of(Path("x.gguf"), byte_level("mystery"))
    tokenizer_of(Path("x.gguf"), byte_level(None))
    assert "names no pre-tokenizer" in caplog.text
    with pytest.raises(TokenizerError, match="tokenizer model 'rwkv' is not served"):
        tokenizer_of(Path("x.gguf"), byte_level("gpt-2") | {"tokenizer.ggml.model": "rwkv"})


def test_bos_is_added_as_the_file_says() -> None:
    silent = byte_level("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    assert tokenizer_of(Path("x.gguf"), silent).encode("ab").tokens == ["ab"]
    asked = byte_level("smollm") | {"tokenizer.ggml.add_bos_token": True}
    assert tokenizer_of(Path("x.gguf"), asked).encode("ab").tokens == ["<s>", "ab"]


SPACE = "\u2581"


def sentencepiece() -> dict[str, Any]:
    pieces = {
        "<unk>": (0.0, 2),
        "<s>": (0.0, 3),
        **{f"<0x{byte:02X}>": (0.0, 6) for byte in range(256)},
        **dict.fromkeys(f"{SPACE}abcd", (-100.0, 1)),
        "ab": (-3.0, 1),
        "bc": (-1.0, 1),
        "abc": (-2.0, 1),
        f"{SPACE}a": (-1.5, 1),
        f"{SPACE}abc": (-4.0, 1),
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [score for score, _ in pieces.values()],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def merged_by_score(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's rule: join the neighbours whose piece has the best score, leftmost first."""
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        joins = [(scores.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [(score, place) for score, place in joins if score is not None]
        if not known:
            return parts
        index = -max(known)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


@pytest.mark.parametrize("text", ["abc", "ab abc", "abcd  bcab", "dab cab", "a"])
def test_sentencepiece_merges_by_score(text: str) -> None:
    metadata = sentencepiece()
    tokenizer = tokenizer_of(Path("x.gguf"), metadata)
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<s>", *merged_by_score(text, metadata)]
    assert tokenizer.decode(encoded.ids) == text


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = tokenizer_of(Path("x.gguf"), sentencepiece())
    encoded = tokenizer.encode("a\u00e9")
    assert encoded.tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "a\u00e9"


def test_generation_config_without_special_tokens() -> None:
    assert generation_config_of({}, {}) == {}
