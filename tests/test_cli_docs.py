"""docs/cli.md, environment.md and plugins/hooks.md say what the source says, all of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import cli_reference
from llmfw import errors
from llmfw.plugins import hookspecs
from llmfw_cli.environment import KNOWN
from llmfw_cli.guide import ALIASES

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ROOT / "docs" / "plugins" / "hooks.md"
VARIABLE = re.compile(r"\bLLMFW_[A-Z_]+[A-Z]\b")
STALE = "run: python tests/cli_reference.py"


def variables_in(*paths: Path) -> set[str]:
    return {name for path in paths for name in VARIABLE.findall(path.read_text("utf-8"))}


def test_the_reference_of_options_is_current() -> None:
    assert cli_reference.current(cli_reference.CLI) == cli_reference.reference(), STALE
    assert cli_reference.current(cli_reference.ENVIRONMENT) == cli_reference.variables(), STALE


def test_every_option_has_a_line_of_help() -> None:
    bare = [
        f"{name} {param.name}"
        for name, command in cli_reference.commands()
        for param in cli_reference.parameters(command)
        if not param.help
    ]
    assert bare == []


def test_options_named_in_the_text_exist() -> None:
    text = cli_reference.CLI.read_text("utf-8")
    prose = text[: text.index(cli_reference.BEGIN)] + text[text.index(cli_reference.END) :]
    options = {
        option
        for _, command in cli_reference.commands()
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", prose))
    known = options | {"--help", *ALIASES}
    assert {name for name in named if name.replace("_", "-") not in known} == set()


def test_every_variable_of_the_source_is_documented_and_the_reverse() -> None:
    folders = ("core/src", "cli/src", "builtin_models", ".ci")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    used = variables_in(*sources)
    documented = variables_in(cli_reference.ENVIRONMENT)
    assert used - documented == set(), "not in docs/environment.md"
    assert documented - used == set(), "read by nothing"
    assert used - KNOWN == set(), "not in llmfw_cli/environment.py, so the command warns of it"


def test_exit_codes_are_documented() -> None:
    text = cli_reference.CLI.read_text("utf-8")
    for kind in vars(errors).values():
        if isinstance(kind, type) and kind not in (errors.LlmfwError, errors.PluginError):
            assert re.search(rf"^\| {kind.exit_code} \| `{kind.__name__}` ", text, re.MULTILINE)


def test_every_hook_is_documented_with_its_signature() -> None:
    text = HOOKS.read_text("utf-8")
    assert re.findall(r"^### `(\w+)\(", text, re.MULTILINE) == list(hookspecs.HOOK_NAMES)
    for name in hookspecs.HOOK_NAMES:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        assert f"### `{name}({arguments})`" in text


def test_every_hook_says_since_when_and_whether_it_goes() -> None:
    """Page and hookspecs agree; a hook that warns its implementers says so in both."""
    text = HOOKS.read_text("utf-8")
    for name in hookspecs.HOOK_NAMES:
        spec = getattr(hookspecs, name)
        (since,) = re.findall(r"\.\. versionadded:: (\S+)", inspect.getdoc(spec) or "")
        goes = re.findall(r"\.\. deprecated:: (\S+)", inspect.getdoc(spec) or "")
        told = f"Deprecated since {goes[0]}" if goes else "Not deprecated"
        section = text.split(f"### `{name}(")[1].split("\n### ")[0]
        assert f"*Since {since}. {told}" in section, name
        assert bool(goes) == bool(spec.llmfw_spec["warn_on_impl"]), name
        kind = "First result" if spec.llmfw_spec["firstresult"] else "All results"
        assert kind in section, name
        documented = set(re.findall(r":param (\w+):", inspect.getdoc(spec) or ""))
        arguments = set(inspect.signature(spec).parameters)
        assert documented == arguments, name
        assert arguments <= set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)), name


def test_hooks_named_in_the_pages_exist() -> None:
    pages = [path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    readmes = [path.read_text("utf-8") for path in sorted(ROOT.glob("*/README.md"))]
    named = set(
        re.findall(
            r"\bllmfw_(?:config|model|layer|weight|kernel)\w*(?=[(`])", "".join(pages + readmes)
        )
    )
    assert named - set(hookspecs.HOOK_NAMES) == set()
