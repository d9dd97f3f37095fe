"""The environment variables that steer plugins; a value that cannot be is an error.

| variable | value | meaning |
|---|---|---|
| `LLMFW_PLUGINS` | distribution names, comma separated | only these plugins may serve |
| `LLMFW_DISABLE_PLUGINS` | distribution names | these may not |
| `LLMFW_PREFER` | distribution names, best first | which one serves where several could |
| `LLMFW_NO_FALLBACK` | 0 or 1 | only plugins that name an architecture may serve it |
| `LLMFW_PLUGIN_MODULES` | files or modules, comma separated | loaded as by `--plugin-module` |
| `LLMFW_TRACE_HOOKS` | 0 or 1 | log every hook call with its time |
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches

from packaging.utils import canonicalize_name

from llmfw.errors import UsageError


def read_flag(variable: str) -> bool:
    """The value of an on/off variable; unset and empty mean off.

    Raises:
        UsageError: If it is neither 0 nor 1.
    """
    value = os.environ.get(variable, "").strip()
    if value not in {"", "0", "1"}:
        raise UsageError(
            f"{variable}={value!r} is neither 0 nor 1", hint=f"set {variable}=1 or unset it"
        )
    return value == "1"


def read_list(variable: str) -> tuple[str, ...]:
    """The comma separated values of a variable; unset and empty mean none.

    Raises:
        UsageError: If a value between two commas is empty.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return ()
    values = tuple(value.strip() for value in text.split(","))
    if not all(values):
        raise UsageError(
            f"{variable}={text!r} has an empty value", hint="separate the values by single commas"
        )
    return values


def read_distributions(variable: str, installed: Collection[str]) -> tuple[str, ...]:
    """The distribution names in a variable, normalised as packaging does.

    Args:
        variable: The variable's name.
        installed: Normalised names of the distributions that have plugins.

    Raises:
        UsageError: If one of them is not installed.
    """
    names = tuple(str(canonicalize_name(value)) for value in read_list(variable))
    for name in names:
        if name not in installed:
            raise UsageError(
                f"{variable} names {name!r}, and no plugin of that name is installed",
                hint=nearest_hint(name, installed, "installed"),
            )
    return names


def nearest_hint(name: str, known: Collection[str], word: str) -> str:
    """A line that lists what is known, the nearest name first where one is near."""
    listed = ", ".join(sorted(known)) or "none"
    near = get_close_matches(name, sorted(known), n=1)
    return f"did you mean {near[0]!r}? {word}: {listed}" if near else f"{word}: {listed}"


@dataclass(frozen=True)
class PluginSwitches:
    """What the environment says about the installed distributions, by normalised name."""

    only: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    no_fallback: str = ""  # what rules fallbacks out

    @classmethod
    def from_environment(cls, installed: Collection[str]) -> PluginSwitches:
        """Read and validate the variables that choose plugins."""
        return cls(
            only=read_distributions("LLMFW_PLUGINS", installed),
            disabled=read_distributions("LLMFW_DISABLE_PLUGINS", installed),
            prefer=read_distributions("LLMFW_PREFER", installed),
            no_fallback="LLMFW_NO_FALLBACK" if read_flag("LLMFW_NO_FALLBACK") else "",
        )

    def refusal(self, dist: str) -> str | None:
        """Why the environment rules a distribution out, or None when it may serve."""
        name = canonicalize_name(dist)
        if name in self.disabled:
            return "switched off by LLMFW_DISABLE_PLUGINS"
        if self.only and name not in self.only:
            return "not in LLMFW_PLUGINS"
        return None
