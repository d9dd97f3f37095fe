"""The options of TensorRT-LLM's `run.py` and `summarize.py`, understood as ours.

A command of these classes takes `--name_with_underscores` for `--name-with-underscores`, and the
names of its table. What the guide gives to an option at once (`--stop_words " London" " chef"`)
becomes our option several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from typer.core import TyperCommand

#: The prompt of a run in the guide's style that gives none.
DEFAULT_PROMPT = "Born in north-east France, Soyer trained as a"
#: The option that prints the guide's lines.
LABELS = "--labels"


@dataclass(frozen=True)
class Alias:
    """One of the guide's options.

    ours: The option that it means. many: Whether it takes all the words up to the next option.
    labels: Whether a run that uses it prints the guide's lines.
    """

    ours: str
    many: bool = False
    labels: bool = False


ALIASES = {
    "--engine-dir": Alias("--model", labels=True),
    "--tokenizer-dir": Alias("--tokenizer"),
    "--input-text": Alias("--prompt", many=True, labels=True),
    "--input-file": Alias("--prompt-file", labels=True),
    "--max-output-len": Alias("--max-tokens"),
    "--stop-words": Alias("--stop", many=True),
    "--bad-words": Alias("--bad-word", many=True),
    "--random-seed": Alias("--seed"),
    "--min-length": Alias("--min-tokens"),
    "--end-id": Alias("--stop-token-id"),
    "--num-return-sequences": Alias("--n"),
    "--kv-cache-free-gpu-memory-fraction": Alias("--kv-cache-memory"),
    "--kv-cache-enable-block-reuse": Alias("--prefix-caching"),
    "--enable-chunked-context": Alias("--chunked-prefill"),
}
SUMMARIZE_ALIASES = {
    "--engine-dir": Alias("--model"),
    "--tokenizer-dir": Alias("--tokenizer"),
    "--data-type": Alias("--dtype"),
    "--test-trt-llm": Alias("--test-llmfw"),
}


class GuideCommand(TyperCommand):
    """A command that understands the guide's options beside its own."""

    aliases: ClassVar[Mapping[str, Alias]] = ALIASES

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what `in_our_words` makes of the arguments."""
        return super().parse_args(ctx, self.in_our_words(args))

    def in_our_words(self, args: Iterable[str]) -> list[str]:
        """The same arguments with our options only."""
        options = [param for param in self.params if param.param_type_name == "option"]
        valued = [param for param in options if not getattr(param, "is_flag", False)]
        names = {name for param in valued for name in param.opts}
        once = {name for param in valued if not param.multiple for name in param.opts}
        return list(_translated(args, names, once, self.aliases, self.name))


class GuideSummarize(GuideCommand):
    """`summarize`, with the options of the guide's `summarize.py`."""

    aliases = SUMMARIZE_ALIASES


def _translated(
    args: Iterable[str],
    valued: set[str],
    once: set[str],
    aliases: Mapping[str, Alias],
    command: str | None,
) -> Iterator[str]:
    words = iter(args)
    labels = False
    said: dict[str, str] = {}  # options of one value, as they were given
    many: str | None = None  # the option that the words to come belong to
    for word in words:
        if word == "--":
            yield word
            yield from words
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            alias = aliases.get(name, Alias(name))
            if alias.ours in once and said.setdefault(alias.ours, name) != name:
                _refuse(f"{said[alias.ours]} and {name} are the same option", "give one of them")
            if alias.labels and not labels:
                labels = True
                yield LABELS
            yield alias.ours + equals + value
            many = alias.ours if alias.many else None
            if not equals and alias.ours in valued:
                yield _value(word, words, command)
        elif word.startswith("-") and word != "-":
            many = None
            yield word
            if word in valued:
                yield _value(word, words, command)
        elif many is not None:
            yield from (many, word)
        else:
            yield word


def _value(option: str, words: Iterator[str], command: str | None) -> str:
    """The value that follows an option, whatever it looks like."""
    value = next(words, None)
    if value is None:
        _refuse(f"{option} needs a value", f"llmfw {command} --help shows what there is")
    return value


def _refuse(message: str, hint: str) -> NoReturn:
    from llmfw.errors import UsageError

    raise UsageError(message, hint=hint)
