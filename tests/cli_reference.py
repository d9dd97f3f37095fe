"""The tables of commands, options and variables in docs/cli.md and docs/environment.md.

python tests/cli_reference.py       # write them anew between their markers
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from llmfw_cli.app import app

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "docs" / "cli.md"
ENVIRONMENT = ROOT / "docs" / "environment.md"
BEGIN = "<!-- reference: begin (python tests/cli_reference.py writes it) -->"
END = "<!-- reference: end -->"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    root: Any = get_command(app)
    yield "llmfw", root
    for name, command in root.commands.items():
        children = getattr(command, "commands", None)
        if children is None:
            yield f"llmfw {name}", command
        else:
            for child, below in children.items():
                yield f"llmfw {name} {child}", below


def parameters(command: Any) -> list[Any]:
    """A command's arguments and options, --help and typer's own left out."""
    own = {"help", "install_completion", "show_completion"}
    return [param for param in command.params if param.name not in own]


def flags(param: Any) -> str:
    """How a parameter is written."""
    if param.param_type_name == "argument":
        return f"`{param.metavar or param.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in param.opts)
    other = ", ".join(f"`{name}`" for name in param.secondary_opts)
    return f"{names} / {other}" if other else names


def default(param: Any) -> str:
    """What holds when it is left out."""
    value = getattr(param.default, "value", param.default)
    if param.required:
        return "required"
    if value is None or value is False or value == []:
        return ""
    return "on" if value is True else f"`{value}`"


def reference() -> str:
    """A table for each command."""
    lines: list[str] = []
    for name, command in commands():
        lines += [f"### {name}", "", (command.help or "").split("\n\n")[0].replace("\n", " "), ""]
        rows = parameters(command)
        if rows:
            lines += ["| | default | variable | |", "|---|---|---|---|"]
        for param in rows:
            variable = f"`{param.envvar}`" if param.envvar else ""
            told = (param.help or "").replace("|", "\\|")
            lines.append(f"| {flags(param)} | {default(param)} | {variable} | {told} |")
        lines += [""] if rows else []
    return "\n".join(lines).strip()


def variables() -> str:
    """A table of the variables that set options."""
    found: dict[str, tuple[str, str]] = {}
    for _, command in commands():
        for param in parameters(command):
            if param.envvar:
                told = f"`{param.opts[0]}`" if param.param_type_name == "option" else flags(param)
                found.setdefault(param.envvar, (told, param.help or ""))
    rows = [f"| `{name}` | {option} | {told} |" for name, (option, told) in sorted(found.items())]
    return "\n".join(["| variable | option | |", "|---|---|---|", *rows])


def current(page: Path) -> str:
    """What stands between the markers of a page."""
    text = page.read_text("utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def write(page: Path, table: str) -> None:
    """Put a table between the markers of a page."""
    text = page.read_text("utf-8")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{tail}", "utf-8")


if __name__ == "__main__":
    write(CLI, reference())
    write(ENVIRONMENT, variables())
