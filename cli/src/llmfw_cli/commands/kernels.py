"""`llmfw kernels`: the kernels of the installed packs, what a model runs by, and their check."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmfw_cli.groups import takes_groups
from llmfw_cli.options import CommonOptions, JsonOption
from llmfw_cli.output import note, progress, write, write_json, write_table

if TYPE_CHECKING:
    import torch

    from llmfw.ops.check import KernelReport
    from llmfw.ops.kernel import DeviceInfo, Kernel
    from llmfw.ops.table import Choice, OpTable
    from llmfw.plugins import PackProblem

app = typer.Typer(help="Show, check and time the kernels at hand.", no_args_is_help=True)

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
        str, typer.Option(envvar="LLMFW_DTYPE", help="auto: the model's; without one any.")
    ] = "auto",
    kernels: Annotated[
        str,
        typer.Option(
            envvar="LLMFW_KERNELS",
            help="auto, reference, or packs and kernels to take or (-name) to leave out.",
        ),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """List the kernels of the installed packs, and the packs that were left out with the reason.

    Of each op the kernel that is asked first stands first; `state` tells what lets one serve
    nothing here.
    """
    from llmfw.ops.table import OpTable

    if model is not None:
        _list_choices(model, device, dtype, kernels, json)
        return
    info, found, dropped = _at_hand(device, kernels.split(","))
    table = OpTable(info, tuple(found), kernels)
    kind = None if dtype == "auto" else _dtype(dtype)
    ops = sorted({kernel.op for kernel in found})
    rows = [_row(kernel, table, kind) for op in ops for kernel in table.ranked(op)]
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
    serving = [each for each in found if each.missing(info) is None]
    if not serving:
        raise UsageError(f"no such kernel serves {info.device}", hint="see llmfw kernels list")
    reports = []
    for each in serving:
        start = time.perf_counter()
        with progress(f"checking {each.name}"):
            report = check_kernel(each, info)
        seconds = time.perf_counter() - start
        note(f"checking {each.name}: {len(report.results)} cases, {seconds:.1f} s")
        reports.append(report)
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


@app.command()
@takes_groups
def bench(
    common: CommonOptions,
    device: Device = "auto",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Time what this model runs by, at its own shapes."),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="Time kernels of this op alone; may be repeated.")
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", help="Time this kernel or pack alone; may be repeated."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(envvar="LLMFW_DTYPE", help="auto: the model's, or bfloat16.")
    ] = "auto",
    tokens: Annotated[
        str, typer.Option(help="Tokens of a call, a comma list; above 64 they are one prompt.")
    ] = "1,32,512",
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of each request in the cache.")
    ] = 1024,
    large: Annotated[
        bool,
        typer.Option(
            help="Instead: kernels that wait for memory, at calls that no cache holds, alone."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Time kernels beside torch's references, with achieved rates and the share of the floor.

    The floor of a call is the longer of moving its bytes at the measured bandwidth of reading and
    of doing its operations at the measured matrix rate. Arguments are rotated past the caches.
    """
    from llmfw.errors import UsageError
    from llmfw_cli.bench.kernels import (
        pairs_of_kernels,
        pairs_of_model,
        pairs_with_large_calls,
        row_of,
        time_large_calls,
        time_pairs,
    )
    from llmfw_cli.bench.lengths import parse_numbers
    from llmfw_cli.bench.machine import copy_bandwidth, hardware, matrix_rate, read_bandwidth

    counts = parse_numbers(tokens, "--tokens")
    if model is not None:
        from llmfw.models import build, prepare_model

        prepared = prepare_model(model, device=device, dtype=dtype)
        config = prepared.model_config
        build(config, prepared.host)
        info, kind, pairs = config.ops.info, config.dtype, pairs_of_model(config.ops)
    else:
        info, found, _ = _at_hand(device)
        kind = _dtype(dtype)
        serving = [each for each in found if each.missing(info) is None]
        pairs = pairs_of_kernels(serving, info, kind)
    pairs = [
        (each, context_)
        for each, context_ in pairs
        if (not op or context_.op in op)
        and (not kernel or (each is not None and {each.name, each.pack} & set(kernel)))
    ]
    if not pairs:
        raise UsageError(f"no such kernel serves {info.device}", hint="see llmfw kernels list")
    if large:
        pairs = pairs_with_large_calls(pairs)
    bandwidth, rate = read_bandwidth(info.device), matrix_rate(info.device, kind)
    times = time_large_calls(pairs) if large else time_pairs(pairs, counts, context)
    rows = [row_of(each, bandwidth, rate) for each in times]
    facts = {
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "copy_gb_per_s": round(copy_bandwidth(info.device) / 1e9, 2),
        "matrix_gflops": round(rate / 1e9, 1),
        "hardware": hardware(info.device),
    }
    if json:
        write_json({"device": str(info.device), **facts, "kernels": rows})
        return
    heads = list(rows[0]) if rows else ["kernel"]
    write_table(heads, [[str(row[head]) for head in heads] for row in rows])
    for name, value in facts.items():
        note(f"{name}: {value}")


def _dtype(name: str) -> torch.dtype:
    from llmfw.models.settings import choose_dtype

    return choose_dtype("bfloat16" if name == "auto" else name, {})


def _verdict(report: KernelReport) -> dict[str, Any]:
    worst = report.worst
    differ = f"{len(report.failures)} differ" if report.results else "nothing checked"
    return {
        "kernel": report.kernel,
        "cases": len(report.results),
        "worst error": float(f"{worst.error:.3g}") if worst else 0.0,
        "tolerance": worst.tolerance if worst else 0.0,
        "state": "ok" if report.passed else differ,
    }


def _at_hand(
    device: str, wanted: Sequence[str] = ()
) -> tuple[DeviceInfo, list[Kernel], list[PackProblem]]:
    """The device, the kernels of the packs that may serve it, and the packs left out.

    What is wrong with a pack that is `wanted` by name is an error.
    """
    from llmfw.models.settings import choose_device
    from llmfw.ops.device import device_info
    from llmfw.plugins import Catalog, collect_kernels, load_kernel_packs

    info = device_info(choose_device(device))
    packs, dropped = load_kernel_packs(info.features, Catalog.scan(), wanted)
    found, more = collect_kernels(packs, info, wanted)
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
    for row in rows:
        if row["details"]:
            write(f"{row['op']} {row['shape']}: {row['details']}\n")


def _choice(choice: Choice) -> dict[str, Any]:
    shape = " ".join(f"{name}={value}" for name, value in choice.context.shape.items())
    return {
        "op": choice.context.op,
        "shape": shape,
        "dtype": str(choice.context.dtype).removeprefix("torch."),
        "chosen": choice.chosen,
        "details": choice.details,
        "passed over": "; ".join(f"{name}: {reason}" for name, reason in choice.refused),
    }


def _row(kernel: Kernel, table: OpTable, dtype: torch.dtype | None) -> dict[str, Any]:
    lacks = kernel.missing(table.info) or table.ruled_out(kernel) or kernel.other_dtype(dtype)
    return {
        "op": kernel.op,
        "kernel": kernel.name,
        "pack": kernel.pack,
        "priority": kernel.priority,
        "dtypes": ", ".join(kernel.dtypes),
        "state": lacks or "at hand",
    }
