"""Errors on the command line: a message, a cure, an exit code, and no traceback."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import CONFIG, run, write_tiny_model
from llmfw import errors
from llmfw_cli.app import app
from llmfw_cli.errors import report
from llmfw_cli.logs import state

CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_its_exit_code(
    kind: type[errors.LlmfwError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(kind("what and where", hint="first\nsecond")) == kind.exit_code
    assert capsys.readouterr().err == "error: what and where\n  first\n  second\n"


def test_codes_of_the_tree_are_those_in_its_docstring() -> None:
    assert errors.__doc__ is not None
    drawn = {
        words[0]: int(next(word for word in words if word.isdigit()))
        for line in errors.__doc__.splitlines()
        if len(words := line.replace("|--", "").replace("`--", "").replace("|", "").split()) > 2
        and words[0].endswith("Error")
        and any(word.isdigit() for word in words)
    }
    assert drawn == {
        kind.__name__: kind.exit_code
        for kind in CLASSES
        if kind not in (errors.LlmfwError, errors.PluginError)
    }


def test_anything_else_is_an_internal_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = ZeroDivisionError("division by zero")
    fault.add_note("raised in llmfw_layer of core's defaults")
    monkeypatch.setattr(state, "debug", False)
    assert report(fault) == 16
    told = capsys.readouterr().err
    assert told.startswith("internal error: ZeroDivisionError: division by zero\n  raised in")
    assert "--debug shows the traceback" in told


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_is_no_internal_error(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(OSError(code, "it says why", "some/file")) == 2
    told, cure, _ = capsys.readouterr().err.split("\n")
    assert told == "error: some/file: it says why"
    assert "choose another place" in cure
    assert report(OSError(errno.EBADF, "ours")) == 16


def test_a_model_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path)

    def refuse(path: Path, *_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("read_text", "is_file"):  # the file, then its folder
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            done = run("inspect", str(folder))
        assert done.exit_code == 3
        assert f"{folder / 'config.json'} cannot be read: Permission denied\n  ask" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--promt", "x"], "No such option: --promt"),
        (["run"], "Missing option '--model'"),
        (["run", "--model"], "--model needs a value"),
        (["chat", "--model"], "'--model' requires an argument"),
        (["run", "--model", "x", "--top-k", "two"], "Invalid value for '--top-k'"),
        (["rum"], "No such command 'rum'"),
        (["plugins", "lst"], "No such command 'lst'"),
        (["plugins", "info", "llmfw-nothing"], "no plugin 'llmfw-nothing' is installed"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["bench", "latency", "--model", "x", "--runs", "0"], "Invalid value for '--runs'"),
    ],
)
def test_a_bad_command_line_is_exit_code_2(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 2, "the error and its cure"


def test_a_model_that_does_not_exist_is_exit_code_3() -> None:
    done = run("run", "--model", "no-such-model", "--prompt", "x")
    assert done.exit_code == 3
    assert "no-such-model" in done.stderr


def test_an_unknown_architecture_is_exit_code_6(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = {**CONFIG, "architectures": ["NobodyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    done = run("run", "--model", str(folder), "--prompt", "x")
    assert done.exit_code == 6
    unknown = "error: no installed plugin serves the architecture 'NobodyForCausalLM'\n"
    assert done.stderr.startswith(f"{unknown}the fallback llmfw-transformers does not serve it on ")
    assert "transformers has no model of that name\ninstalled: " in done.stderr
    off = run("run", "--model", str(folder), "--prompt", "x", "--no-fallback")
    assert off.exit_code == 6
    assert "a fallback, might, but is switched off by --no-fallback\ninstalled: " in off.stderr
    off = run("convert", str(folder), str(tmp_path / "out"), "--no-fallback")
    assert off.exit_code == 6
    assert "is switched off by --no-fallback" in off.stderr
    assert run("inspect", str(folder)).exit_code == 6


def test_a_broken_plugin_module_is_exit_code_8(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "plugin.py").write_text("import no_such_module_here\n", "utf-8")
    done = run("inspect", str(folder), "--plugin-module", str(folder / "plugin.py"))
    assert done.exit_code == 8
    assert "No module named 'no_such_module_here' (line 1)" in done.stderr


def test_the_foreign_distribution_is_told_of(tmp_path: Path) -> None:
    """Hidden in whole or in part, the command says why; installed beside ours, it warns."""
    site = tmp_path / "site"
    info = site / "llmfw-0.1.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: llmfw\nVersion: 0.1.1\n\n")
    (info / "RECORD").write_text("llmfw/__init__.py,,\n")
    (site / "llmfw").mkdir()
    (site / "llmfw" / "__init__.py").write_text("")
    code = "import sys; sys.path.insert(0, {!r}); from llmfw_cli.__main__ import main; main()"
    command = [sys.executable, "-c", code.format(str(site)), "plugins", "list"]
    hidden = subprocess.run(command, capture_output=True, text=True, check=False)
    assert hidden.returncode == 11, hidden.stderr
    assert hidden.stdout == ""
    assert "pip uninstall llmfw" in hidden.stderr

    shutil.rmtree(site / "llmfw")
    shutil.copytree(Path(errors.__file__).parent, site / "llmfw")
    (site / "llmfw" / "__init__.py").write_text("")
    written_over = subprocess.run(command, capture_output=True, text=True, check=False)
    assert written_over.returncode == 11, written_over.stderr
    assert "it hides the package `llmfw`" in written_over.stderr

    shutil.rmtree(site / "llmfw")
    beside = subprocess.run(command, capture_output=True, text=True, check=False)
    assert beside.returncode == 0, beside.stderr
    assert "it hides nothing of ours yet" in beside.stderr


def test_no_command_raises_past_the_program() -> None:
    assert app.info.cls is not None
    assert app.pretty_exceptions_enable is False


def test_a_model_without_its_option_is_told_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmfw_cli", "bench", "decode", "somewhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "a model is named with --model" in done.stderr
