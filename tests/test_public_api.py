"""The author's API is what tests/public_api.txt says: names, signatures, hooks.

python tests/test_public_api.py     # write the list anew, when the promise is to change
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("public_api.txt")
MODULES = (
    "llmfw",
    "llmfw.plugins",
    "llmfw.layers",
    "llmfw.functional",
    "llmfw.weights",
    "llmfw.testing",
)
CURE = (
    "the public API changed: see docs/plugins/compatibility.md; if that is meant, run\n"
    "    python tests/test_public_api.py"
)


def public_names(module: Any) -> list[str]:
    """What a module's `__all__` names, else its own functions and values."""
    named = getattr(module, "__all__", None)
    if named is not None:
        return sorted(named)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (callable(value) or name.isupper())
        and getattr(value, "__module__", "").split(".")[0] not in ("typing", "collections")
        and name not in ("Any", "Sequence", "Tensor", "annotations")
    )


def signature_of(value: Any) -> str:
    """Parameters and result as written in the source."""
    signature = inspect.signature(value)
    shown: list[str] = []
    before: Any = None
    for parameter in signature.parameters.values():
        kind = parameter.kind
        if kind is parameter.KEYWORD_ONLY and before not in (kind, parameter.VAR_POSITIONAL):
            shown.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        text = stars + parameter.name + typed(": ", parameter.annotation)
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        shown.append(text)
        before = kind
    return f"({', '.join(shown)}){typed(' -> ', signature.return_annotation)}"


def typed(before: str, annotation: Any) -> str:
    """An annotation with what stands before it; nothing where there is none."""
    if annotation is inspect.Parameter.empty:
        return ""
    return before + (
        annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    )


def members(cls: type) -> Iterator[str]:
    """The public members that a class defines itself, one a line."""
    for name, value in sorted(vars(cls).items()):
        if name[0] == "_":
            continue
        if isinstance(value, property):
            yield f"  .{name}"
        elif isinstance(value, staticmethod | classmethod):
            yield f"  .{name}{signature_of(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"  .{name}{signature_of(value)}"


def described(path: str, value: Any) -> Iterator[str]:
    """A public name as lines of text."""
    if not isinstance(value, type):
        own = inspect.isfunction(value) and value.__module__.startswith("llmfw")
        yield path + (signature_of(value) if own else "")
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {path}({bases})"
    if issubclass(value, enum.Enum):
        yield f"  values: {', '.join(value.__members__)}"
        return
    if not issubclass(value, BaseException) and not getattr(value, "_is_protocol", False):
        yield f"  {signature_of(value)}"
    if dataclasses.is_dataclass(value):
        yield f"  fields: {', '.join(field.name for field in dataclasses.fields(value))}"
    yield from members(value)


def snapshot() -> str:
    """The whole list."""
    lines: list[str] = []
    seen: set[int] = set()
    for name in MODULES:
        module = import_module(name)
        lines += ["", f"# {name}"]
        for public in public_names(module):
            if public == "__version__":
                continue
            value = getattr(module, public)
            if id(value) in seen and isinstance(value, type):
                lines.append(f"class {name}.{public}: as above")
                continue
            seen.add(id(value))
            lines += described(f"{name}.{public}", value)
    from llmfw.plugins import hookspecs

    lines += ["", "# hooks"]
    for hook in hookspecs.HOOK_NAMES:
        function = getattr(hookspecs, hook)
        options = function.llmfw_spec
        kind = "first result" if options["firstresult"] else "all results"
        lines.append(f"{hook}{signature_of(function)}  [{kind}]")
    return "\n".join(lines).strip() + "\n"


def test_the_public_api_is_the_one_that_is_promised() -> None:
    if not LIST.exists() or LIST.read_text("utf-8") != snapshot():
        import difflib

        before = LIST.read_text("utf-8").splitlines() if LIST.exists() else []
        change = difflib.unified_diff(before, snapshot().splitlines(), "promised", "now", n=1)
        raise AssertionError(f"{CURE}\n" + "\n".join(change))


def test_every_public_name_can_be_imported() -> None:
    import llmfw

    missing = [name for name in llmfw.__all__ if not hasattr(llmfw, name)]
    assert missing == []


def test_the_page_names_the_modules_that_are_held() -> None:
    page = LIST.parent.parent / "docs" / "plugins" / "compatibility.md"
    text = page.read_text("utf-8")
    assert [name for name in MODULES[1:] if f"`{name}`" not in text] == []


if __name__ == "__main__":
    LIST.write_text(snapshot(), "utf-8")
