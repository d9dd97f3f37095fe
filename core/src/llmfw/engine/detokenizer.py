"""Tokens to text while they come: no half characters, stop strings found exactly."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
#: So many replacement characters in a row are no character in the making: the bytes are not UTF-8.
LONGEST_RUN = 32
_PROMPT_TOKENS = 6  # enough context for the first token's leading space


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the tokens."""


class TextStream:
    """The text of a growing list of tokens; what `push` and `flush` return, joined, is all of it.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: What comes before, for the space between prompt and first token.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._settled = list(prompt_token_ids[-_PROMPT_TOKENS:])  # context, its text already out
        self._fresh: list[int] = []
        self._context = self._decode(self._settled).rstrip(REPLACEMENT)
        self._shown = 0  # characters of the fresh tokens' text already out

    def push(self, token: int) -> str:
        """The text that is sure after one more token."""
        self._fresh.append(token)
        text = self._fresh_text()
        sure = text.rstrip(REPLACEMENT)
        unsure = len(text) - len(sure)
        if unsure == 0 or unsure > LONGEST_RUN:
            return self._settle(text)
        return self._show(sure)

    def clone(self) -> TextStream:
        """A stream that goes on from here without changing this one."""
        other = copy(self)
        other._fresh = list(self._fresh)
        return other

    def flush(self) -> str:
        """What is left at the end, half characters as they are."""
        return self._settle(self._fresh_text())

    def _fresh_text(self) -> str:
        whole = self._decode([*self._settled, *self._fresh])
        return whole[len(self._context) :]

    def _show(self, text: str) -> str:
        shown, self._shown = self._shown, max(self._shown, len(text))
        return text[shown:]

    def _settle(self, text: str) -> str:
        """Everything is out; the fresh tokens become the context of the next ones."""
        shown, self._shown = self._shown, 0
        if self._fresh:
            # Tokens without text (special ones) are no context by themselves.
            self._settled = self._fresh if text else (self._settled + self._fresh)[-LONGEST_RUN:]
            self._fresh = []
            self._context = self._decode(self._settled)
        return text[shown:]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=self._skip)


class StopFinder:
    """Finds the first stop string in a growing text, as if it came character by character.

    The match that ends first wins, of those that end together the longest; so the cut does not
    depend on how the text was split into tokens.

    Args:
        stops: The stop strings.
        include: Whether a found stop string stays in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.text = ""
        self.found: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)

    def push(self, piece: str, *, search: bool = True) -> bool:
        """Add text; True when (with `search`) a stop string is complete, the text then is cut."""
        before = len(self.text)
        self.text += piece
        if not self._stops or not piece or not search:
            return False
        matches = []
        for stop in self._stops:
            place = self.text.find(stop, max(0, before - len(stop) + 1))
            if place >= 0:
                matches.append((place + len(stop), place, stop))
        if not matches:
            return False
        end, place, self.found = min(matches)
        self.text = self.text[: end if self._include else place]
        return True

    def visible(self) -> int:
        """How many characters cannot become part of a stop string any more."""
        longest = min(self._longest - 1, len(self.text))
        for held in range(longest, 0, -1):
            tail = self.text[-held:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self.text) - held
        return len(self.text)


class Detokenizer:
    """The text of one completion.

    Args:
        decoder: The tokenizer.
        prompt_token_ids: The prompt.
        stops: Stop strings.
        include_stop: Whether a found stop string stays in the text.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._stream = TextStream(
            decoder, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._finder = StopFinder(stops, include=include_stop)
        self._ended = False

    @property
    def text(self) -> str:
        """All text so far, what is held back included."""
        return self._finder.text

    @property
    def visible(self) -> int:
        """How many characters of `text` are sure to stay."""
        return len(self.text) if self._ended else self._finder.visible()

    def push(self, token: int, *, search: bool = True) -> str | None:
        """Add a token; the stop string that it completes, if any, after which nothing may follow.

        search: False where stop strings do not count yet (min_tokens).
        """
        if self._finder.push(self._stream.push(token), search=search):
            self._ended = True
        return self._finder.found

    def clone(self) -> Detokenizer:
        """One that goes on from here without changing this one."""
        other = copy(self)
        other._stream, other._finder = self._stream.clone(), copy(self._finder)
        return other

    def finish(self) -> str | None:
        """No token follows: let out what was held back; returns a stop string in it, if any."""
        if not self._ended:
            self._ended = True
            self._finder.push(self._stream.flush())
        return self._finder.found
