"""`llmfw check`: an installed plugin's health, its contract and its numbers, in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.commands.plugins import examined
from llmfw_cli.commands.verify import DIFFERENCE, ReferenceOption, show, tiny_settings
from llmfw_cli.completions import complete_distribution
from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption, ServingOptions
from llmfw_cli.output import write, write_json, write_table

if TYPE_CHECKING:
    from llmfw.testing.checks import CheckResult
    from llmfw.testing.subject import Subject


@takes_groups
def check(
    common: CommonOptions,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Distribution or architecture, or a model whose kind is checked.",
            autocompletion=complete_distribution,
        ),
    ],
    serving: ServingOptions,
    reference: ReferenceOption = None,
    wheel: Annotated[
        bool, typer.Option(help="Build the plugin's wheel and install it aside.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Check a plugin: doctor, the contract's checks, and verify --tiny.

    The exit code is 1 where a check found a difference, and doctor's where the plugin is broken.
    """
    from llmfw.plugins import Catalog
    from llmfw.plugins.choose import FALLBACK
    from llmfw.testing.selection import subjects_of

    subjects = subjects_of(name, reference=reference, **tiny_settings(serving))
    catalog = Catalog.scan()
    served = {subject.architecture for subject in subjects}
    named = [entry for each in served for entry in catalog.owners(each)]
    entries = named or list(catalog.models.get(FALLBACK, ()))  # what serves them is a fallback then
    chosen = {subject.distribution for subject in subjects} - {None}
    doctor = [examined(entry, catalog) for entry in entries if not chosen or entry.dist in chosen]
    if not json:
        _show_doctor(doctor)
    broken = next((int(row["exit_code"]) for row in doctor if int(row["exit_code"])), 0)
    found = [] if broken else [_check_one(each, wheel=wheel, quiet=json) for each in subjects]
    if json:
        write_json({"name": name, "doctor": doctor, "architectures": found})
    if broken:
        raise typer.Exit(broken)
    if not all(each["passed"] for each in found):
        raise typer.Exit(DIFFERENCE)


def _check_one(subject: Subject, *, wheel: bool, quiet: bool) -> dict[str, Any]:
    from llmfw.testing.checks import CHECKS, run_checks
    from llmfw.testing.verify import verify_tiny

    results: list[CheckResult] = []
    with subject:
        if not quiet:
            write(f"contract of {subject.architecture}\n")
        for result in run_checks(subject, [each for each in CHECKS if wheel or not each.slow]):
            results.append(result)
            if not quiet:
                _show_result(result)
        report = verify_tiny(subject)
        if not quiet:
            write("\nverify\n")
            show(report)
    return {
        "architecture": subject.architecture,
        "passed": report.passed and all(each.outcome != "failed" for each in results),
        "contract": [each.as_dict() for each in results],
        "verify": report.as_dict(),
    }


def _show_result(result: CheckResult) -> None:
    first, *rest = result.detail.splitlines() or [""]
    write(
        f"  {result.outcome:<8} {result.name:<26} {result.seconds:5.1f} s  {first}".rstrip() + "\n"
    )
    for line in rest:
        write(f"           {line}\n")


def _show_doctor(rows: list[dict[str, str]]) -> None:
    if rows:
        heads = ("name", "distribution", "version", "state", "seconds")
        table = [[r["name"], r["dist"], r["version"], r["state"], r["seconds"]] for r in rows]
        write_table(heads, table)
        write("\n")
