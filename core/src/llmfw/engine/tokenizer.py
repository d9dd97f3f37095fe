"""Text to tokens and back: a checkpoint's tokenizer.json, read by `tokenizers` alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfw.engine import chat_template
from llmfw.errors import ConfigError, RequestError, TokenizerError
from llmfw.weights import resolve_model

logger = logging.getLogger("llmfw.engine")

#: What transformers can make a tokenizer from where there is no tokenizer.json.
OLDER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_FILES = ("tokenizer.json", *OLDER_FILES)

_SPECIAL_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: A `tokenizers.Tokenizer`.
        config: tokenizer_config.json.
        templates: Chat templates by name; the usual one is "default".
    """

    def __init__(
        self,
        backend: Any,
        config: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        # Settings of the training set-up that some files carry; they would cut and fill prompts.
        backend.no_truncation()
        backend.no_padding()
        self._config = dict(config or {})
        self._templates = dict(templates or {})
        self.special_tokens = _special_tokens(self._config)

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token."""
        return self.token_id(self.special_tokens.get("eos_token"))

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence token."""
        return self.token_id(self.special_tokens.get("bos_token"))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can work without a template of the caller's."""
        return bool(self._templates)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The checkpoint's chat templates by name; the usual one is "default"."""
        return self._templates

    def token_id(self, token: str | None) -> int | None:
        """The id of a token given by its text in the vocabulary, if there is one."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; add_special_tokens adds what the checkpoint puts around one."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template_text: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the chat template makes of messages.

        Args:
            messages: Mappings with "role" and "content".
            chat_template_text: A template in place of the checkpoint's.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.
            **variables: Handed to the template.

        Raises:
            RequestError: If there is no template, or it refuses the messages.
            TokenizerError: If it cannot be read.
        """
        _check_messages(messages)
        template = chat_template_text or self._templates.get("tool_use" if tools else "default")
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                "the checkpoint has no chat template",
                hint="give one with chat_template=..., or use generate",
            )
        return chat_template.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **{**self.special_tokens, **variables},
        )


def find_tokenizer(named: str | Path) -> Tokenizer:
    """The tokenizer that a user names: a directory, or a model as `resolve_model` finds it.

    Raises:
        TokenizerError: If there is none, or it cannot be read.
    """
    folder = Path(named)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(folder)
    try:
        return load_tokenizer(resolve_model(named).model_dir)
    except ConfigError as exc:
        if folder.is_dir():
            return load_tokenizer(folder)  # which tells what is missing there
        raise TokenizerError(
            f"tokenizer '{named}' is neither a directory nor a model",
            hint="give a directory with tokenizer.json, or a model that has one",
        ) from exc


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's directory.

    Raises:
        TokenizerError: If there is none, or it cannot be read.
    """
    folder = Path(model_dir)
    config = _read_json(folder / "tokenizer_config.json")
    specials = _read_json(folder / "special_tokens_map.json")
    config = {**specials, **{name: value for name, value in config.items() if value is not None}}
    templates = _read_templates(folder, config)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _from_transformers(folder, config, templates)
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # tokenizers raises plain Exception
        raise TokenizerError(
            f"{path} cannot be read: {exc}",
            hint="fetch the file again, or give tokenizer=DIRECTORY (--tokenizer)",
        ) from exc
    return Tokenizer(backend, config, templates)


def _from_transformers(
    folder: Path, config: Mapping[str, Any], templates: Mapping[str, str]
) -> Tokenizer:
    """The slow way for checkpoints without tokenizer.json: transformers converts older files."""
    if not any((folder / name).is_file() for name in OLDER_FILES):
        raise TokenizerError(
            f"{folder} has no tokenizer.json",
            hint="give tokenizer=DIRECTORY (--tokenizer), or skip_tokenizer_init=True and prompts "
            "as token ids",
        )
    logger.warning(
        "%s has no tokenizer.json; transformers converts what is there, which takes a while", folder
    )
    try:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        backend = made.backend_tokenizer
    except Exception as exc:
        raise TokenizerError(
            f"the tokenizer in {folder} cannot be converted: {exc}",
            hint="save it once with transformers as tokenizer.json, or give tokenizer=DIRECTORY "
            "(--tokenizer)",
        ) from exc
    found = {name: str(token) for name in _SPECIAL_NAMES if (token := getattr(made, name, None))}
    return Tokenizer(backend, {**found, **config}, templates)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TokenizerError(f"{path} cannot be read: {exc}", hint="fetch the file again") from exc
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} is not a JSON object", hint="fetch the file again")
    return content


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates from the config; those in files of their own win."""
    inline = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        templates = {entry["name"]: entry["template"] for entry in inline}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            templates[name] = path.read_text(encoding="utf-8")
    return templates


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a token is a string or an object with its content."""
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    fine = isinstance(messages, (list, tuple)) and messages
    if not fine or not all(
        isinstance(message, Mapping) and "role" in message for message in messages
    ):
        raise RequestError(
            "messages must be a list of mappings, each with a role",
            hint='[{"role": "user", "content": "Hello"}]',
        )
