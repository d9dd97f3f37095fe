from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llmfw.engine.detokenizer import Detokenizer, StopFinder, TextStream


class Bytes:
    """A tokenizer with a token for each byte; 256 is special."""

    def decode(self, token_ids, *, skip_special_tokens=True):
        special = b"" if skip_special_tokens else b"<s>"
        return b"".join(bytes([t]) if t < 256 else special for t in token_ids).decode(
            "utf-8", "replace"
        )


class Words:
    """Like sentencepiece: a token is a space and a word, the text's first space is dropped."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(" " + self.words[t] for t in token_ids).removeprefix(" ")


class Chars:
    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(map(chr, token_ids))


class Pieces:
    """Token i is the i-th piece of a text."""

    def __init__(self, pieces) -> None:
        self.pieces = pieces

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(self.pieces[t] for t in token_ids)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_whole_and_without_half_characters(text):
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=60))
def test_bytes_that_are_no_text_come_like_a_whole_decode(tokens):
    stream = TextStream(Bytes())
    text = "".join([stream.push(token) for token in tokens]) + stream.flush()
    assert text == Bytes().decode(tokens)


def test_characters_that_straddle_tokens_come_as_soon_as_they_are_whole():
    pieces = ["héllo ".encode(), "世界".encode()[:4], "世界".encode()[4:]]

    class Chunks:
        def decode(self, token_ids, *, skip_special_tokens=True):
            return b"".join(pieces[t] for t in token_ids).decode("utf-8", "replace")

    stream = TextStream(Chunks())
    assert [stream.push(i) for i in range(3)] == ["héllo ", "世", "界"]


def test_half_character_at_the_end_is_shown():
    stream = TextStream(Bytes())
    assert stream.push("é".encode()[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bytes_that_never_become_text_are_not_held_for_ever():
    stream = TextStream(Bytes())
    pieces = [stream.push(0x80) for _ in range(100)]
    assert any(pieces)
    assert "".join(pieces) + stream.flush() == "\ufffd" * 100


def test_the_space_after_the_prompt_is_kept():
    words = Words("The", "capital", "is")
    stream = TextStream(words, [0, 1])
    assert stream.push(2) == " is"
    assert TextStream(words).push(2) == "is"


def test_special_tokens_are_skipped_or_shown():
    assert TextStream(Bytes()).push(256) == ""
    assert TextStream(Bytes(), skip_special_tokens=False).push(256) == "<s>"


def test_special_tokens_are_no_context():
    class Spaced(Words):
        def decode(self, token_ids, *, skip_special_tokens=True):
            return super().decode([t for t in token_ids if t >= 0])

    stream = TextStream(Spaced("a", "b"), [0])
    assert [stream.push(t) for t in (-1, 1, -1, 0)] == ["", " b", "", " a"]


def oracle(text: str, stops, include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest of those."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


ABC = st.text("ab", max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_whatever_the_tokens(pieces, stops, include):
    finder = StopFinder(stops, include=include)
    shown = ""
    for piece in pieces:
        done = finder.push(piece)
        if done:
            break
        visible = finder.text[: finder.visible()]
        assert visible.startswith(shown)  # what was shown stays
        shown = visible
    text, stop = oracle("".join(pieces), stops, include)
    assert finder.text == text
    assert finder.found == stop
    assert text.startswith(shown)  # nothing of a stop string was ever shown


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_no_more_is_held_back_than_needed(text, stops):
    finder = StopFinder(stops)
    if finder.push(text):
        return
    held = text[finder.visible() :]
    assert not held or any(stop.startswith(held) for stop in stops)


def test_stop_string_over_tokens_with_and_without_it():
    for include, text in ((False, "one two "), (True, "one two STOP")):
        made = Detokenizer(
            Pieces(["one ", "two S", "TO", "Pping"]), stops=["STOP"], include_stop=include
        )
        assert [made.push(i) for i in range(3)] == [None, None, None]
        assert made.text[: made.visible] == "one two "
        assert made.push(3) == "STOP"
        assert made.text == text
        assert made.visible == len(text)
        assert made.finish() == "STOP"


def test_held_back_text_comes_out_at_the_end():
    made = Detokenizer(Pieces(["one ", "ST"]), stops=["STOP"])
    made.push(0)
    made.push(1)
    assert made.text[: made.visible] == "one "
    assert made.finish() is None
    assert made.text[: made.visible] == "one ST"


def test_no_stop_string_counts_before_min_tokens():
    made = Detokenizer(Pieces(["aX", "b", "cX"]), stops=["X"])
    assert made.push(0, search=False) is None
    assert made.push(1, search=False) is None
    assert made.push(2) == "X"
    assert made.text == "aXbc"


@pytest.mark.parametrize("text", ["Hello world", "日本語 text", "🎉🎊 emoji 👩‍👩‍👧", "tabs\t\nnew"])
def test_byte_level_tokenizer(text):
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    stream = TextStream(backend)
    ids = backend.encode(text).ids
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
