"""Rendering the template as cookiecutter does, without its dependencies."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmfw.errors import UsageError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).resolve().parent.parent / "template"


def variables() -> dict[str, Any]:
    """The template's variables with their defaults: text to render, or a list of choices."""
    found: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text("utf-8"))
    return found


def environment() -> Environment:
    """Jinja as cookiecutter sets it up for this template."""
    from jinja2 import Environment, StrictUndefined

    settings = variables()["_jinja2_env_vars"]
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True, **settings)


def complete(answers: Mapping[str, str]) -> dict[str, str]:
    """All variables: those answered, and the others' defaults, which may refer to earlier ones."""
    jinja = environment()
    context: dict[str, str] = {}
    for name, default in variables().items():
        if name == "__prompts__" or (name.startswith("_") and not name.startswith("__")):
            continue
        value = default[0] if isinstance(default, list) else default
        rendered = jinja.from_string(value).render(cookiecutter=context)
        context[name] = answers.get(name) or rendered
    return context


def render(answers: Mapping[str, str], parent: Path) -> Path:
    """Write the plugin's tree into a new folder of `parent`, named like the distribution.

    A file whose name renders to nothing is left out: this is how the template chooses files.

    Raises:
        UsageError: If the folder exists already.
    """
    jinja, context = environment(), complete(answers)

    def fill(text: str) -> str:
        return jinja.from_string(text).render(cookiecutter=context)

    (top,) = TEMPLATE.glob("{{*")
    target = parent / fill(top.name)
    if target.exists():
        raise UsageError(f"{target} exists already", hint="remove it, or take another --output")
    for source in sorted(path for path in top.rglob("*") if path.is_file()):
        parts = [fill(part) for part in source.relative_to(top).parts]
        if not all(parts):
            continue
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(source.read_text("utf-8")), "utf-8", newline="\n")
    return target


def own_config_class(model_type: str) -> Any:
    """The class that a rendered `configuration.py` defines."""
    context = complete({"config": "own", "model_type": model_type})
    (path,) = TEMPLATE.rglob("*configuration.py*")
    module = ModuleType("llmfw_cli.new.rendered_configuration")
    text = environment().from_string(path.read_text("utf-8")).render(cookiecutter=context)
    sys.modules[module.__name__] = module  # transformers looks the annotations up there
    exec(text, module.__dict__)
    return getattr(module, context["__config_class"])
