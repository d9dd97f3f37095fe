"""The answers that a plugin is made from, checked before anything is written."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping

from llmfw.errors import UsageError
from llmfw_cli.new.render import complete, variables

ASKED = (
    "model_name",
    "architecture",
    "distribution",
    "import_name",
    "author",
    "base",
    "config",
    "model_type",
)
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def question(name: str) -> str:
    """What to ask for a variable."""
    asked = variables()["__prompts__"][name]
    return str(asked["__prompt__"] if isinstance(asked, dict) else asked)


def choices(name: str) -> list[str]:
    """What a variable may be; empty where any text may."""
    default = variables()[name]
    return list(default) if isinstance(default, list) else []


def default(name: str, answers: Mapping[str, str]) -> str:
    """A variable's value where it is not answered, given the answers so far."""
    return complete({key: value for key, value in answers.items() if key != name})[name]


def check(answers: Mapping[str, str]) -> dict[str, str]:
    """All answers, defaults filled in.

    Raises:
        UsageError: If one cannot be: names that Python or packaging does not take.
    """
    full = complete(answers)
    for name in ASKED:
        if choices(name) and full[name] not in choices(name):
            raise UsageError(
                f"{name} {full[name]!r} is not known", hint=f"known: {', '.join(choices(name))}"
            )
    for name in ("architecture", "import_name"):
        if not full[name].isidentifier() or keyword.iskeyword(full[name]):
            raise UsageError(
                f"{name} {full[name]!r} is not a Python name",
                hint=f"give one: --{name.replace('_', '-')}",
            )
    if not _DISTRIBUTION.fullmatch(full["distribution"]):
        raise UsageError(
            f"distribution {full['distribution']!r} is not a name that packages may have",
            hint="letters, digits, '-', '_' and '.'; give one: --distribution",
        )
    for name in ("model_name", "author", "model_type"):
        if not full[name].strip() or set(full[name]) & set('"\\\n'):
            raise UsageError(
                f"{name} {full[name]!r} must be one line without quotes and backslashes"
            )
    return full
