"""From an article to the token ids that both engines are given."""

from __future__ import annotations

from collections.abc import Callable

from llmfw.engine.tokenizer import Tokenizer
from llmfw.errors import UsageError

PLAIN = "{article}\nTL;DR:"
CHAT = "Summarize the following text in a few sentences.\n\n{article}"


class Prompts:
    """Makes prompts of at most so many tokens.

    Args:
        tokenizer: The model's.
        longest: Tokens of a prompt; an article is cut at its end until its prompt fits.
        template: The prompt's text; `{article}` stands for the article.
        chat: Whether the chat template is put around it.

    Raises:
        UsageError: If the template has no `{article}`, or does not fit with an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int, template: str, *, chat: bool) -> None:
        if "{article}" not in template:
            raise UsageError(
                f"--prompt-template {template!r} has no {{article}}", hint=f"such as {PLAIN!r}"
            )
        self._tokenizer = tokenizer
        self._longest = longest
        self._template = template
        self._encode: Callable[[str], list[int]] = self._chat if chat else tokenizer.encode
        if len(self._whole("")) >= longest:
            raise UsageError(
                f"a prompt of {longest} tokens has no room for an article",
                hint="raise --max-input-length",
            )

    def ids(self, article: str, share: float = 1.0) -> list[int]:
        """The prompt's tokens.

        Args:
            article: The text.
            share: How much of what fits of it is taken, from its beginning on.
        """
        ids = self._whole(article)
        if len(ids) <= self._longest and share >= 1:
            return ids
        tokens = self._tokenizer.encode(article, add_special_tokens=False)
        fitting = len(tokens) - max(0, len(ids) - self._longest)
        for kept in range(int(fitting * share), -1, -1):
            ids = self._whole(self._tokenizer.decode(tokens[:kept]))
            if len(ids) <= self._longest:  # cut text may take a token or two more than it had
                break
        return ids

    def _whole(self, article: str) -> list[int]:
        return self._encode(self._template.replace("{article}", article))

    def _chat(self, text: str) -> list[int]:
        made = self._tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return self._tokenizer.encode(made, add_special_tokens=False)
