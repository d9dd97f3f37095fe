"""Does the configuration survive the way from config.json and back?"""

from __future__ import annotations

import json
from typing import Any

from llmfw.testing.failure import CheckFailure
from llmfw.testing.subject import Subject

_WRITTEN_BY_LIBRARY = ("transformers_version", "_name_or_path")


def config_round_trip(subject: Subject) -> None:
    """config.json -> object -> config.json -> object gives the same object, with every field.

    Raises:
        CheckFailure: Naming the first field that was lost or changed.
    """
    folder = subject.checkpoint()
    host = subject.host()
    first = host.hook.llmfw_config(raw=dict(subject.written_config), model_dir=folder)
    once = _fields(first)
    second = host.hook.llmfw_config(raw=json.loads(json.dumps(once)), model_dir=folder)
    twice = _fields(second)
    for field in sorted(once.keys() | twice.keys()):
        if once.get(field) != twice.get(field):
            raise _changed(first, field, once.get(field), twice.get(field))
    for field, value in subject.raw_config.items():
        if value is not None and not hasattr(first, field):
            raise CheckFailure(
                f"{type(first).__name__} lost a field of config.json",
                tensor=f"config.json: {field}",
                expected=repr(value),
                got="no such attribute",
                look=f"the __init__ of {type(first).__name__}, or llmfw_config of the plugin",
            )


def _fields(config: Any) -> dict[str, Any]:
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({k: v for k, v in fields.items() if k not in _WRITTEN_BY_LIBRARY}, default=str)
    )


def _changed(config: Any, field: str, expected: Any, got: Any) -> CheckFailure:
    return CheckFailure(
        f"{type(config).__name__} changes when it is written and read again",
        tensor=f"config.json: {field}",
        expected=repr(expected),
        got=repr(got),
        look=f"the __init__ of {type(config).__name__}: a field must accept its own value",
    )
