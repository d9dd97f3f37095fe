"""`llmfw kernels`: the kernels of the installed packs, what a model runs by, and their check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import note, write, write_json, write_table

if TYPE_CHECKING:
    from llmfw.ops.check import KernelReport
    from llmfw.ops.kernel import DeviceInfo, Kernel
    from llmfw.ops.table import Choice
    from llmfw.plugins import PackProblem

app = typer.Typer(help="Show and check the kernels at hand.", no_args_is_help=True)

Device = Annotated[str, typer.Option(envvar="LLMFW_DEVICE", help="auto, cpu, cuda or cuda:N.")]


@app.command("list")
@takes_groups
def list_kernels(
    common: CommonOptions,
    device: Device = "auto",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Show what each part of this model runs by, and why."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(envvar="LLMFW_DTYPE", help="With --model: its dtype.")
    ] = "auto",
    kernels: Annotated[
        str, typer.Option(envvar="LLMFW_KERNELS", help="With --model: which kernels to take.")
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """List the kernels of the installed packs, and the packs that were left out with the reason."""
    if model is not None:
        _list_choices(model, device, dtype, kernels, json)
        return
    info, found, dropped = _at_hand(device)
    rows = [_row(kernel, info) for kernel in sorted(found, key=lambda k: (k.op, -k.priority))]
    problems = [
        {"pack": each.pack, "distribution": each.label, "reason": each.reason} for each in dropped
    ]
    if json:
        features = sorted(info.features)
        write_json(
            {
                "device": str(info.device),
                "features": features,
                "kernels": rows,
                "left_out": problems,
            }
        )
        return
    write(f"device {info.device}: {' '.join(sorted(info.features))}\n")
    heads = ("op", "kernel", "pack", "priority", "dtypes", "state")
    write_table(heads, [[str(row[head]) for head in heads] for row in rows])
    for problem in problems:
        write(f"left out: {problem['pack']} of {problem['distribution']}: {problem['reason']}\n")


@app.command()
@takes_groups
def check(
    common: CommonOptions,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", help="Check this kernel or pack alone; may be repeated."),
    ] = None,
    device: Device = "auto",
    json: JsonOption = False,
) -> None:
    """Run every kernel that serves the device against its reference; exit 1 on a difference.

    Inputs are drawn for many shapes, odd ones, single tokens and empty batches among them, and
    outputs are poisoned beforehand.
    """
    from llmfw.errors import UsageError
    from llmfw.ops.check import check_kernel

    info, found, _ = _at_hand(device)
    if kernel:
        found = [each for each in found if {each.name, each.pack} & set(kernel)]
    serving = [each for each in found if not set(each.requires) - info.features]
    if not serving:
        raise UsageError(f"no such kernel serves {info.device}", hint="see llmfw kernels list")
    reports = []
    for each in serving:
        note(f"checking {each.name}")
        reports.append(check_kernel(each, info))
    rows = [_verdict(report) for report in reports]
    if json:
        write_json({"device": str(info.device), "kernels": rows})
    else:
        heads = ("kernel", "cases", "worst error", "tolerance", "state")
        write_table(heads, [[str(row[head]) for head in heads] for row in rows])
        for report in reports:
            for failure in report.failures:
                write(f"{report.kernel}: {failure}\n")
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


def _verdict(report: KernelReport) -> dict[str, Any]:
    worst = report.worst
    return {
        "kernel": report.kernel,
        "cases": len(report.results),
        "worst error": float(f"{worst.error:.3g}") if worst else 0.0,
        "tolerance": worst.tolerance if worst else 0.0,
        "state": "ok" if report.passed else f"{len(report.failures)} differ",
    }


def _at_hand(device: str) -> tuple[DeviceInfo, list[Kernel], list[PackProblem]]:
    """The device, the kernels of the packs that may serve it, and the packs left out."""
    from llmfw.models.settings import choose_device
    from llmfw.ops.device import device_info
    from llmfw.plugins import Catalog, collect_kernels, load_kernel_packs

    info = device_info(choose_device(device))
    packs, dropped = load_kernel_packs(info.features, Catalog.scan())
    found, more = collect_kernels(packs, info)
    return info, found, [*dropped, *more]


def _list_choices(model: str, device: str, dtype: str, kernels: str, as_json: bool) -> None:
    """Build the model without its weights and tell what each op of it resolved to."""
    from llmfw.models import build, prepare_model

    prepared = prepare_model(model, device=device, dtype=dtype, kernels=kernels)
    build(prepared.model_config, prepared.host)
    rows = [_choice(each) for each in prepared.model_config.ops.choices.values()]
    rows.sort(key=lambda row: (row["op"], row["shape"]))
    if as_json:
        write_json({"model": model, "plugin": prepared.plugin_label, "choices": rows})
        return
    heads = ("op", "shape", "dtype", "chosen", "passed over")
    write_table(heads, [[str(row[head]) for head in heads] for row in rows])


def _choice(choice: Choice) -> dict[str, Any]:
    shape = " ".join(f"{name}={value}" for name, value in choice.context.shape.items())
    return {
        "op": choice.context.op,
        "shape": shape,
        "dtype": str(choice.context.dtype).removeprefix("torch."),
        "chosen": choice.chosen,
        "passed over": "; ".join(f"{name}: {reason}" for name, reason in choice.refused),
    }


def _row(kernel: Kernel, info: DeviceInfo) -> dict[str, Any]:
    missing = [feature for feature in kernel.requires if feature not in info.features]
    return {
        "op": kernel.op,
        "kernel": kernel.name,
        "pack": kernel.pack,
        "priority": kernel.priority,
        "dtypes": ", ".join(kernel.dtypes),
        "state": f"needs {', '.join(missing)}" if missing else "at hand",
    }
