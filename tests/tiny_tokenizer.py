"""A byte-level tokenizer of 97 tokens, as a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

ALPHABET = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,!?:;'-\n<>|/()[]{}=+*#@%&"
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_backend(*, bos: bool = False) -> tokenizers.Tokenizer:
    """One token a character; 95 is <s>, 96 </s>."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [byte_level.pre_tokenize_str(char)[0][0] for char in ALPHABET]
    symbols += [f"<filler{i}>" for i in range(95 - len(symbols))]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    )
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 95)]
        )
    return backend


def write_tokenizer(folder: Path, *, bos: bool = False, **config: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    tiny_backend(bos=bos).save(str(folder / "tokenizer.json"))
    fields = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": TEMPLATE,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder
