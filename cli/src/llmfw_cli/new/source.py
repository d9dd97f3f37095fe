"""Python source of what was recognised, as `ruff format` would write it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH = 100


Argument = str | Sequence[str]
Rule = Callable[[int], str]


def call(function: str, arguments: Sequence[Argument], indent: int, first: int) -> str:
    """A call on one line where it fits, else an argument a line.

    Args:
        function: What is called.
        arguments: The source of each; a list is one argument that is a list.
        indent: Spaces before the statement.
        first: Characters of the statement before the call.
    """
    plain = [each if isinstance(each, str) else f"[{', '.join(each)}]" for each in arguments]
    line = f"{function}({', '.join(plain)})"
    if indent + first + len(line) <= WIDTH:
        return line
    inner = " " * (indent + 4)
    joined = ", ".join(plain)
    if len(inner) + len(joined) <= WIDTH:
        return f"{function}(\n{inner}{joined}\n{' ' * indent})"
    rows = "".join(
        f"{inner}{_argument(each, text, indent + 4)},\n"
        for each, text in zip(arguments, plain, strict=True)
    )
    return f"{function}(\n{rows}{' ' * indent})"


def _argument(argument: Argument, text: str, indent: int) -> str:
    if isinstance(argument, str) or indent + len(text) < WIDTH:
        return text
    rows = "".join(f"{' ' * (indent + 4)}{each},\n" for each in argument)
    return f"[\n{rows}{' ' * indent}]"


def assigned(name: str, value: str, indent: int) -> str:
    """`name=value`, a call in it broken where it does not fit."""
    found = re.fullmatch(r"([\w.]+)\((.*)\)", value)
    if indent + len(name) + len(value) + 2 <= WIDTH or not found:
        return f"{name}={value}"
    return name + "=" + call(found[1], found[2].split(", "), indent, WIDTH)


def chain(rules: Sequence[Rule], indent: int = 0) -> str:
    """`WeightMap()` and its rules, for a statement indented so far; "" without rules."""
    if not rules:
        return ""
    if len(rules) == 1:
        return f"WeightMap().{rules[0](indent)}"
    space = " " * (indent + 4)
    rows = "".join(f"{space}.{rule(indent + 4)}\n" for rule in rules)
    return f"(\n{space}WeightMap()\n{rows}{' ' * indent})"


def rule(name: str, *arguments: Argument) -> Rule:
    """One rule of a weight map: its source by the indent of its line."""
    return lambda indent: call(name, arguments, indent, 1)


def renames(pairs: Mapping[str, str]) -> list[Rule]:
    """Renames as one table, a row a line; those too long for a row stand before it."""
    rows = {old: f"{quoted(old)}: {quoted(new)}," for old, new in pairs.items()}
    long = [old for old, row in rows.items() if 16 + len(row) > WIDTH]
    rules = [rule("rename", quoted(old), quoted(pairs[old])) for old in long]
    short = [old for old in pairs if old not in long]
    if len(short) == 1:
        rules.append(rule("rename", quoted(short[0]), quoted(pairs[short[0]])))
    elif short:
        rules.append(lambda indent: _table([rows[old] for old in short], indent))
    return rules


def _table(rows: Sequence[str], indent: int) -> str:
    space = " " * (indent + 4)
    body = "".join(f"{space}    {row}\n" for row in rows)
    return f"rename(\n{space}{{\n{body}{space}}}\n{' ' * indent})"


def literal(values: Mapping[str, Any], indent: int) -> str:
    """A dictionary, a key a line."""
    inner = " " * (indent + 4)
    rows = "".join(
        f"{inner}{quoted(key)}: {_value(each, indent + 4)},\n" for key, each in values.items()
    )
    return f"{{\n{rows}{' ' * indent}}}"


def quoted(text: str) -> str:
    """A string in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(value: Any, indent: int) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        inline = "{" + ", ".join(f"{quoted(k)}: {_value(v, 0)}" for k, v in value.items()) + "}"
        return inline if len(inline) < 60 else literal(value, indent)
    if isinstance(value, list):
        return "[" + ", ".join(_value(each, indent) for each in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
