"""The map of modules in docs/structure.md: one line a module, taken from its own docstring.

python tests/module_map.py          # write the map anew between its markers
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
BEGIN = "<!-- map: begin (python tests/module_map.py writes it) -->"
END = "<!-- map: end -->"


def source_folders() -> list[Path]:
    """The import packages of this repository, core first."""
    families = sorted(ROOT.glob("builtin_models/*/src/*/"))
    return [ROOT / "core/src/llmfw", ROOT / "cli/src/llmfw_cli", *families]


def modules() -> list[Path]:
    """Every module of the packages, a folder's own before the folders inside it."""
    files = [path for folder in source_folders() for path in folder.rglob("*.py")]
    order = source_folders()

    def place(path: Path) -> tuple[int, tuple[str, ...], bool, str]:
        package = next(number for number, top in enumerate(order) if path.is_relative_to(top))
        return package, path.parent.parts, path.name != "__init__.py", path.name

    return sorted((path for path in files if not is_empty(path)), key=place)


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing: an `__init__.py` that only marks its folder."""
    return not path.read_text("utf-8").strip()


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line; empty when there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def render() -> str:
    """The map as Markdown: a heading a folder, a line a module."""
    lines: list[str] = []
    folder: Path | None = None
    for path in modules():
        if path.parent != folder:
            folder = path.parent
            lines += ["", f"### {folder.relative_to(ROOT).as_posix()}", ""]
        lines.append(f"- `{path.name}`: {summary(path)}")
    return "\n".join(lines).strip() + "\n"


def current() -> str:
    """The map as the page has it now."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip() + "\n"


def write() -> None:
    """Put the map into the page."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{render()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write()
