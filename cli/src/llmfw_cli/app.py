"""The typer app `llmfw`: its commands, and what every one of them does with errors and Ctrl-C."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmfw_cli.errors import INTERNAL, INTERRUPTED, report, report_usage
from llmfw_cli.guide import GuideCommand, GuideSummarize


class Program(TyperGroup):
    """The root command: errors become a message and an exit code, never a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command and leave with its exit code."""
        extra["standalone_mode"] = False
        sys.exit(self._run(*args, **extra))

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            look_around()
            code = super().main(*args, **extra)
        except typer.TyperException as error:
            return report_usage(error)
        except (KeyboardInterrupt, typer.Abort):
            return INTERRUPTED
        except Exception as error:
            return report(error)
        return code if isinstance(code, int) else 0


app = typer.Typer(
    name="llmfw",
    cls=Program,
    help="Run language models through plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmfw.plugins import Catalog
        from llmfw_cli.output import write
        from llmfw_cli.versions import versions

        names = {entry.label for entry in Catalog.scan().entries}
        ours = {f"{name} {version}" for name, version in versions().items()}
        write("\n".join(sorted(names | ours)) + "\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print versions and leave.",
        ),
    ] = False,
) -> None:
    """Run language models through plugins."""


def look_around() -> None:
    """Say what is wrong around us before a command runs: unknown variables, the foreign package."""
    if "_LLMFW_COMPLETE" in os.environ:
        return
    from llmfw_cli.environment import unknown_variables

    for line in unknown_variables():
        sys.stderr.write(f"warning: {line}\n")
    if not _is_installed("llmfw"):
        return
    from llmfw.plugins.foreign import CURE, find_foreign

    foreign = find_foreign()
    if foreign is not None and foreign.hides_package:
        raise foreign.error()
    if foreign is not None:
        sys.stderr.write(f"warning: {foreign.message}\n")
        for line in CURE.splitlines():
            sys.stderr.write(f"  {line}\n")


def main() -> None:
    """The console script `llmfw`."""
    if find_spec("llmfw") is None or find_spec("llmfw.plugins") is None:
        if _is_installed("llmfw"):
            sys.exit(_tell_of_foreign())
        sys.stderr.write("error: llmfw-core is not installed\n  pip install llmfw-core\n")
        sys.exit(INTERNAL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="llmfw")


def _is_installed(distribution: str) -> bool:
    return next(iter(metadata.distributions(name=distribution)), None) is not None


def _tell_of_foreign() -> int:
    """Where our own package cannot be imported, the foreign one is the likely reason."""
    version = metadata.version("llmfw")
    sys.stderr.write(
        f"error: somebody else's distribution `llmfw` {version} hides our package\n"
        "  remove it and repair ours: pip uninstall llmfw && "
        "pip install --force-reinstall --no-deps llmfw-core llmfw-cli\n"
    )
    return 11


def _add_commands() -> None:
    from llmfw_cli.commands import (
        bench,
        build,
        chat,
        check,
        convert,
        env,
        eval,
        export,
        inspect,
        kernels,
        new,
        plugins,
        run,
        summarize,
        verify,
    )

    app.command(cls=GuideCommand)(run.run)
    app.command()(chat.chat)
    app.command()(inspect.inspect)
    app.command()(new.new)
    app.command()(convert.convert)
    app.command()(build.build)
    app.command()(export.export)
    app.command()(verify.verify)
    app.command()(check.check)
    app.command(cls=GuideSummarize)(summarize.summarize)
    app.command()(env.env)
    app.command(
        "eval",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(eval.evaluate)
    app.add_typer(plugins.app, name="plugins")
    app.add_typer(kernels.app, name="kernels")
    app.add_typer(bench.app, name="bench")


_add_commands()
