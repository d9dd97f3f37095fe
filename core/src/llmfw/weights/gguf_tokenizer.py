"""A GGUF file's vocabulary as HF's `tokenizer.json` and `tokenizer_config.json`.

With the pre-tokenizer that `tokenizer.ggml.pre` names: without it numbers get other ids than the
model was trained with, and nothing else would show it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmfw.errors import TokenizerError
from llmfw.weights.gguf_tables import (
    BYTE_LEVEL,
    DEFAULT_PRE,
    PRE_TOKENIZERS,
    PRE_WITH_BOS,
    PRE_WITH_NFC,
    SENTENCEPIECE,
)

logger = logging.getLogger("llmfw.weights")

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def tokenizer_of(file: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata describe.

    Raises:
        TokenizerError: If there is none, or its kind or pre-tokenizer is not in the format tables.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        raise _refused(file, "it has no vocabulary")
    if kind == BYTE_LEVEL:
        tokenizer = _byte_level(file, metadata)
    elif kind == SENTENCEPIECE:
        tokenizer = _sentencepiece(metadata)
    else:
        known = f"{BYTE_LEVEL} and {SENTENCEPIECE}"
        raise _refused(file, f"tokenizer model {kind!r} is not served; {known} are")
    _add_special_tokens(tokenizer, metadata)
    if _adds_bos(metadata):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def tokenizer_config_of(metadata: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The `tokenizer_config.json`: special tokens, chat template, and the model's own length."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
    }
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and 0 <= index < len(tokens):
            config[f"{ours}_token"] = tokens[index]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _byte_level(file: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE with stored merges."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        logger.warning("%s names no pre-tokenizer; %s is taken", file, DEFAULT_PRE)
        name = DEFAULT_PRE
    if name not in PRE_TOKENIZERS:
        raise _refused(
            file, f"pre-tokenizer {name!r} is not known; these are: {', '.join(PRE_TOKENIZERS)}"
        )
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", ())]
    whole_words = name in PRE_WITH_BOS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    if name in PRE_WITH_NFC:
        tokenizer.normalizer = normalizers.NFC()
    steps = [_splitter(step) for step in PRE_TOKENIZERS[name]]
    if "bytes" not in PRE_TOKENIZERS[name]:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitter(step: str) -> pre_tokenizers.PreTokenizer:
    if step == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if step == "bytes":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Split(Regex(step), behavior="isolated")


def _pair(merge: str) -> tuple[str, str]:
    """The two halves of a merge (byte-level BPE writes a space as another letter)."""
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: merges by the pieces' scores, bytes for what is not there."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in halves:
            if left in vocabulary and right in vocabulary:
                rank = (-scores[index], vocabulary[left], vocabulary[right])
                found.append((*rank, (left, right)))
    return [pair for *_, pair in sorted(found)]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    added = {
        token: AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_tokens([token for token in added.values() if not token.special])
    tokenizer.add_special_tokens([token for token in added.values() if token.special])


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says; where it is silent, what its kind of tokenizer does."""
    default = (
        metadata.get("tokenizer.ggml.model") == SENTENCEPIECE
        or metadata.get("tokenizer.ggml.pre") in PRE_WITH_BOS
    )
    has_bos = "tokenizer.ggml.bos_token_id" in metadata
    return has_bos and bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _prepend_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    index = metadata["tokenizer.ggml.bos_token_id"]
    bos = metadata["tokenizer.ggml.tokens"][index]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, index)],
    )


def _refused(file: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{file}: {what}",
        hint="use the model's directory with its tokenizer.json, or add the row to gguf_tables.py",
    )
