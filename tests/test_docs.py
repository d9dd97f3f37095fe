"""The documents hold true: their Python runs, their commands parse, their links lead somewhere.

Every ```python block of README.md and docs/ is run; the blocks of one page share a namespace, in
a process of its own. A block whose first line is a comment with a file name (`# my_model.py`) is
saved under that name, too. `<!-- not run: REASON -->` on the line before a block leaves it out.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *(ROOT / folder / "README.md" for folder in ("core", "cli", "plugin_template")),
    *sorted(ROOT.glob("builtin_models/*/README.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"(?:python3?|bash) (tests/[\w/]+\.(?:py|sh))((?: +[\w.:=/-]+)*)")
FILE_NAME = re.compile(r"# ([\w/]+\.py)\n")
RUNNER = """
import json, pathlib, sys
page, blocks = json.load(sys.stdin)
for line, name, text in blocks:
    if name:
        pathlib.Path(name).write_text(text, encoding="utf-8")
    exec(compile("\\n" * line + text, page, "exec"), globals())
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is the line number of its fence."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, left-out ones too."""
    source = page.read_text("utf-8")
    found: list[Block] = []
    for match in BLOCK.finditer(source):
        if match["language"] == language:
            line = source.count("\n", 0, match.start("text"))
            found.append(Block(name_of(page), line, language, match["text"], match["reason"]))
    return found


def python_pages() -> list[Path]:
    return [page for page in PAGES if any(not block.reason for block in blocks_of(page, "python"))]


@pytest.mark.parametrize("page", python_pages(), ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(page, "python") if not block.reason]
    runner = tmp_path / "run_blocks.py"
    runner.write_text(RUNNER, "utf-8")
    names = [FILE_NAME.match(block.text) for block in blocks]
    rows = [
        (block.line, name[1] if name else None, block.text)
        for block, name in zip(blocks, names, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, runner],
        input=json.dumps((name_of(page), rows)),
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a shell block as lists of words, pipelines taken apart."""
    commands: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        current: list[str] = []
        for word in [*words, ";"]:
            if word in {"|", "||", "&&", ";", "&"}:
                commands.append(current)
                current = []
            elif re.match(r"\d?[<>]", word):
                commands.append(current)
                current = ["<redirection>"]
            elif current or not re.match(r"[A-Z_]+=", word):
                current.append(word)
    return [command for command in commands if command]


def shell_commands(program: str) -> list[Any]:
    """Every use of a program in the pages' shell blocks, as test parameters."""
    return [
        pytest.param(command[1:], id=f"{block.page}:{block.line}: {' '.join(command)}")
        for page in PAGES
        for block in blocks_of(page, "bash")
        for command in commands_of(block)
        if command[0].split("/")[-1] == program
    ]


@pytest.mark.parametrize("arguments", shell_commands("llmfw"))
def test_commands_parse(arguments: list[str]) -> None:
    from typer.main import get_command

    from llmfw_cli.app import app

    command: Any = get_command(app)
    context = command.context_class(command, info_name="llmfw")
    rest = arguments
    while hasattr(command, "get_command"):
        _, rest, _ = command.make_parser(context).parse_args(list(rest))
        if not rest:
            return
        name, *rest = rest
        child = command.get_command(context, name)
        assert child is not None, f"llmfw has no command {name!r}"
        settings = child.context_settings
        command = child
        context = child.context_class(child, info_name=name, parent=context, **settings)
    words = command.in_our_words(rest) if hasattr(command, "in_our_words") else list(rest)
    _, left, _ = command.make_parser(context).parse_args(words)
    assert left == [] or context.allow_extra_args, "arguments that the command does not take"


@pytest.mark.parametrize("arguments", shell_commands("make"))
def test_make_targets_exist(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def script_commands() -> list[Any]:
    """Every use of a script of tests/ in the pages, in blocks and in sentences."""
    found: list[Any] = []
    for page in PAGES:
        source = page.read_text("utf-8").replace("\\\n", " ")
        for script, words in SCRIPT.findall(source):
            what = f"{name_of(page)}: {script}{words}"
            found.append(pytest.param(script, words.split(), id=what))
    return found


@pytest.mark.parametrize(("script", "words"), script_commands())
def test_scripts_and_what_they_are_told_exist(script: str, words: list[str]) -> None:
    """Figures stand beside commands that nobody runs here: they need a GPU, or much time."""
    source, gpu = (ROOT / script).read_text("utf-8"), ROOT / "tests" / "gpu"
    assert [word for word in words if word.startswith("--") and word not in source] == []
    works = [word for word in words if ":" in word]
    if script.endswith(".sh"):
        stages = source + (gpu / "kernels.sh").read_text("utf-8")
        for stage in set(words) - set(works):
            assert re.search(rf'\*" {stage} "\*|^ +{stage}\)$', stages, re.MULTILINE), stage
    elif script.endswith("bench_kernels.py"):
        assert set(words[1:]) <= keys_of(gpu / "bench_kernels.py", "SECTIONS")
    shapes = {file.stem for file in (ROOT / "docs" / "benchmarks" / "shapes").glob("*.json")}
    for shape, work in (word.split(":") for word in works):
        assert shape in shapes | keys_of(gpu / "workloads.py", "NAMES")
        assert work in keys_of(gpu / "workloads.py", "DECODE") | {"W3", "P8"}


def keys_of(source: Path, name: str) -> set[str]:
    """The keys of a module's dict, read from its source: importing it may need a GPU."""
    for node in ast.parse(source.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(getattr(node, "value", None), ast.Dict):
            return {ast.literal_eval(key) for key in node.value.keys}  # type: ignore[attr-defined]
    raise AssertionError(f"{source} has no dict {name}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text("utf-8"))
    broken: list[str] = []
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings."""
    prose = BLOCK.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_found_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    seen: set[Path] = set()
    waiting = [index]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(page.read_text("utf-8"))]
        linked = {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
        waiting += [file for file in linked - seen if file.is_relative_to(ROOT / "docs")]
    assert [name_of(page) for page in set(ROOT.glob("docs/**/*.md")) - seen] == []


def test_every_block_left_out_says_why() -> None:
    left_out = [b for page in PAGES for b in blocks_of(page, "python") if b.reason]
    assert [f"{b.page}:{b.line}" for b in left_out if len(b.reason or "") < 10] == []
