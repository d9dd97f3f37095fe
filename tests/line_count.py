"""Lines of code of the built-in models, as the design counts them.

A line counts if, after `ruff format` at 100 columns, it holds code: blank lines, comments and
docstrings do not count.

    python tests/line_count.py                      # the table of the built-in models
    python tests/line_count.py path/to/src ...      # of other folders
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def count_source(source: str) -> int:
    """Lines of formatted `source` that hold code."""
    lines = source.splitlines()
    docstrings = docstring_lines(ast.parse(source))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            code.update(range(token.start[0], token.end[0] + 1))
    return sum(1 for number in code - docstrings if lines[number - 1].strip())


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines taken by docstrings of the module, its classes and functions."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and is_text(first.value):
            numbers.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return numbers


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a string constant."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def formatted(source: str) -> str:
    """`source` as `ruff format` writes it at 100 columns."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    return done.stdout


def count_folder(folder: Path) -> dict[str, int]:
    """Lines of each Python file under `folder`, by path relative to it."""
    return {
        path.relative_to(folder).as_posix(): count_source(formatted(path.read_text("utf-8")))
        for path in sorted(folder.rglob("*.py"))
    }


def table(folders: list[Path]) -> str:
    """The counts of several folders as text, a line a file and the sum of each folder."""
    rows: list[str] = []
    for folder in folders:
        counts = count_folder(folder)
        rows += [f"{lines:6}  {folder.parent.name}/{name}" for name, lines in counts.items()]
        rows.append(f"{sum(counts.values()):6}  {folder.parent.name}: total")
    return "\n".join(rows)


if __name__ == "__main__":
    named = [Path(argument) for argument in sys.argv[1:]]
    print(table(named or sorted(ROOT.glob("builtin_models/*/src"))))
