"""Exact names with placeholders: the only way a weight map speaks of many tensors at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property

from llmfw.errors import UsageError

_FIELD = re.compile(r"\{(\w+)(\*?)\}")


class Pattern:
    """A tensor name in which `{i}` stands for one dotted segment and `{rest*}` for several.

    Everything else is literal and the whole name must match. The same placeholder twice must match
    the same text.
    """

    def __init__(self, text: str) -> None:
        leftover = _FIELD.sub("", text)
        if not text or "{" in leftover or "}" in leftover:
            raise UsageError(
                f"'{text}' is no pattern of tensor names",
                hint="write the exact name, with {i} for one segment or {rest*} for several",
            )
        self.text = text
        self.fields = tuple(dict.fromkeys(name for name, _ in _FIELD.findall(text)))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("".join(self._regex_parts()))

    def _regex_parts(self) -> Iterator[str]:
        seen: set[str] = set()
        end = 0
        for field in _FIELD.finditer(self.text):
            yield re.escape(self.text[end : field.start()])
            name, star = field.groups()
            yield f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if star else '[^.]+'})"
            seen.add(name)
            end = field.end()
        yield re.escape(self.text[end:])

    def match(self, name: str) -> dict[str, str] | None:
        """What each placeholder stands for in `name`, or None when it does not match."""
        found = self._regex.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with each placeholder replaced."""
        return _FIELD.sub(lambda field: values[field.group(1)], self.text)

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def require_same_fields(rule: str, one: Pattern, other: Pattern) -> None:
    """Both sides of a rule need the same placeholders, or two tensors would get one name.

    Raises:
        UsageError: If they differ.
    """
    if set(one.fields) != set(other.fields):
        raise UsageError(
            f"{rule}: '{one.text}' and '{other.text}' have different placeholders",
            hint="both sides need the same {placeholders}",
        )
