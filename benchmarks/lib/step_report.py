"""What `training_step.py` says of its measurements: speeds and their share of the peak, milliseconds by part, ratios, the goal."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.lib import tables
from benchmarks.lib.step_breakdown import PARTS
from benchmarks.lib.timing import ratios, spread

Report = dict[str, Any]
BACKWARD = 2  # matrix products in the backward pass for each of the forward pass
GOAL = 1.03  # of the bare loop's time that our engines may take, on a GPU
OURS = ("ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp")


def complete(report: Report) -> None:
    """Add to every row: operations a second, their share of the peaks, and the time beside the bare loop's, round by round."""
    rows = {row["label"]: row for row in report["rows"] if not row["left_out"]}
    for row in rows.values():
        peak = report["peaks"]["bf16" if row["bf16"] else "fp32"]
        speeds = [
            (1 + BACKWARD) * report["flops_per_image"] * value / report["settings"]["processes"]
            for value in row["images_per_second"]
        ]
        row["flops_per_second"] = speeds
        row["mfu"] = [value / peak["data_sheet"] for value in speeds] if peak["data_sheet"] else None
        row["of_measured"] = [value / peak["measured"] for value in speeds]
        row["against"] = bare_label(row)
        if row["against"] in rows:
            row["time_ratio"] = ratios(row["seconds"], rows[row["against"]]["seconds"])


def bare_label(row: Report) -> str:
    """The bare loop that computes as this contender does: ZeRO's bf16 keeps bf16 weights, the others autocast."""
    weights = row["bf16"] and row["name"].startswith("zero")
    return ("bare, bf16 weights" if weights else "bare, bf16" if row["bf16"] else "bare") + (
        ", compiled" if row["compiled"] else ""
    )


def speed_table(report: Report) -> list[list[str]]:
    table = [
        [
            "contender",
            "images/s",
            "ms a step",
            "TFLOP/s",
            "of the peak (MFU)",
            "of a large product",
            "memory MiB",
            "time by the bare loop's",
        ]
    ]
    for row in report["rows"]:
        if row["left_out"]:
            continue
        seconds = spread([1e3 * value / row["steps"] for value in row["seconds"]])
        mfu = f"{100 * statistics.median(row['mfu']):.1f} %" if row["mfu"] else "-"
        table.append(
            [
                row["label"],
                f"{statistics.median(row['images_per_second']):,.0f}",
                tables.cell(seconds),
                f"{statistics.median(row['flops_per_second']) / 1e12:.3g}",
                mfu,
                f"{100 * statistics.median(row['of_measured']):.1f} %",
                f"{row['memory_bytes'] / 2**20:,.0f}",
                tables.cell(spread(row["time_ratio"]), ".3f") if "time_ratio" in row else "-",
            ]
        )
    return table


def parts_table(report: Report) -> list[list[str]]:
    """Milliseconds of the further steps that were looked at closely."""
    table = [["ms a step", *PARTS, "sum", *(["of it communication"] if report["settings"]["processes"] > 1 else [])]]
    for row in report["rows"]:
        if row["left_out"] or not row["parts"]:
            continue
        whole = sum(row["parts"].values())
        shared = [f"{1e3 * whole * row['exposed_share']:.2f}"] if "exposed_share" in row else []
        table.append(
            [row["label"], *(f"{1e3 * row['parts'][part]:.2f}" for part in PARTS), f"{1e3 * whole:.2f}", *shared]
        )
    return table


def goals(report: Report) -> list[str]:
    """Whether our engines cost no more than they may; on a CPU there is no goal."""
    if not report["machine"]["gpu"]:
        return []
    lines = []
    for row in report["rows"]:
        if row["name"] in OURS and "time_ratio" in row:
            least, median, most = (f"{100 * (value - 1):+.1f}" for value in spread(row["time_ratio"]))
            verdict = "met" if statistics.median(row["time_ratio"]) <= GOAL else "NOT met"
            lines.append(
                f"{verdict}: at most {100 * (GOAL - 1):.0f} % more time than {row['against']}: {row['label']}, {median} % "
                f"({least} .. {most})"
            )
    return lines


def headline(report: Report) -> str:
    rows = [row for row in report["rows"] if not row["left_out"]]
    if not rows:
        return "No contender could be measured."
    chosen, where, row = report["settings"], report["machine"], rows[0]
    cpu = "" if where["gpu"] else f", {chosen['threads']} threads a process"
    return (
        f"Preset {' '.join([chosen['preset'], *chosen['set']])}: {row['num_parameters']:,} parameters, "
        f"{report['flops_per_image'] / 1e6:,.1f} MFLOPs an image forward, {BACKWARD + 1} times that in training; batches of {row['batch']}, "
        f"{chosen['processes']} process{'es' * (chosen['processes'] > 1)}, {row['source']} source; {where['gpu'] or where['cpu']}{cpu}. "
        f"{chosen['rounds']} turns of {chosen['steps']} steps after {chosen['warm_up']}: medians (least .. most). "
        f"{tables.made_by(report)}"
    )


def notes(report: Report) -> list[str]:
    lines = [
        f"peak {kind}: "
        + (f"{peak['data_sheet'] / 1e12:,.0f} TFLOP/s ({peak['source']})" if peak["data_sheet"] else peak["source"])
        + f"; a large product of matrices here: {peak['measured'] / 1e12:,.3g} TFLOP/s"
        for kind, peak in report["peaks"].items()
    ]
    lines += [f"{row['label']}: left out: {row['left_out']}" for row in report["rows"] if row["left_out"]]
    without = [row["label"] for row in report["rows"] if not row["left_out"] and not row["parts"]]
    return lines + ([f"without parts: {', '.join(without)}: their loops are their own"] if without else [])


def as_text(report: Report) -> str:
    parts = [headline(report), tables.as_text(speed_table(report))]
    if len(parts_table(report)) > 1:
        parts.append(tables.as_text(parts_table(report)))
    return "\n\n".join([*parts, "\n".join([*goals(report), *notes(report)])])


def as_markdown(report: Report) -> str:
    parts = ["# The training step", headline(report), tables.as_markdown(speed_table(report))]
    if len(parts_table(report)) > 1:
        parts += ["## Where the milliseconds go", tables.as_markdown(parts_table(report))]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in [*goals(report), *notes(report)])]) + "\n"
