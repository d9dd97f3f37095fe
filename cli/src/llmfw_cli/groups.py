"""Options that several commands share, declared once as dataclasses and taken as one argument each.

    @app.command()
    @takes_groups
    def run(model: ModelOptions, sampling: SamplingOptions, json: JsonOption = False) -> None: ...

typer sees one flat list of options; the function gets the dataclasses filled.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


class OptionGroup:
    """Base of the dataclasses whose fields become options."""

    def apply(self) -> None:
        """Called once the options are parsed, before the command runs."""


def takes_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of `function` that is an option group by the group's options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, OptionGroup):
            groups[name] = hint
            parameters += _parameters_of(hint)
        else:
            parameters.append(
                parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    def command(**values: Any) -> None:
        made: dict[str, OptionGroup] = {}
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]  # type: ignore[arg-type]
            made[name] = group(**{field: values.pop(field) for field in fields})
        for options in made.values():
            options.apply()
        function(**values, **made)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__module__ = function.__module__
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameters_of(group: type[OptionGroup]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
        )
        for field in dataclasses.fields(group)  # type: ignore[arg-type]
    ]
