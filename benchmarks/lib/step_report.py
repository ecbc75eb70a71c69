"""The report of `training_step.py`: throughput, shares of peak and memory floor, milliseconds by part, ratios, goal."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.lib import tables
from benchmarks.lib.step_breakdown import PARTS
from benchmarks.lib.timing import ratios, spread

Report = dict[str, Any]
BACKWARD = 2  # matrix products of the backward pass per matrix product of the forward pass
GOAL = 1.03  # largest time of our engines on a GPU, divided by the bare loop's
OURS = ("ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp")


def complete(report: Report) -> None:
    """Add to every row: FLOP/s, shares of peaks and memory floor, and the ratio to the bare loop, by round."""
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
        floor = floor_seconds(report, "bf16" if row["bf16"] else "fp32")
        row["of_memory_floor"] = [floor * row["steps"] / value for value in row["seconds"]] if floor else None
        row["against"] = bare_label(row)
        if row["against"] in rows:
            row["time_ratio"] = ratios(row["seconds"], rows[row["against"]]["seconds"])


def floor_seconds(report: Report, precision: str) -> float | None:
    """Return seconds that the counted bytes of a step take at the measured bandwidth; None if they were not counted."""
    memory = report["memory"]
    num_bytes = memory["bytes_per_step"].get(precision)
    return num_bytes / memory["copy_bytes_per_second"] if num_bytes else None


def bare_label(row: Report) -> str:
    """Return the bare loop with the same arithmetic: ZeRO's bf16 keeps bf16 weights, the others use autocast."""
    weights = row["bf16"] and row["name"].startswith("zero")
    return ("bare, bf16 weights" if weights else "bare, bf16" if row["bf16"] else "bare") + compiled_label(
        row["compile"]
    )


def compiled_label(mode: str) -> str:
    """Return the end of a label that names the torch.compile mode."""
    return "" if mode == "off" else ", compiled" if mode == "on" else f", {mode}"


def speed_table(report: Report) -> list[list[str]]:
    table = [
        [
            "system",
            "images/s",
            "ms per step",
            "TFLOP/s",
            "MFU",
            "of a large matmul",
            "of the memory floor",
            "memory MiB",
            "time / bare loop",
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
                f"{100 * statistics.median(row['of_memory_floor']):.1f} %" if row["of_memory_floor"] else "-",
                f"{row['memory_bytes'] / 2**20:,.0f}",
                tables.cell(spread(row["time_ratio"]), ".3f") if "time_ratio" in row else "-",
            ]
        )
    return table


def parts_table(report: Report) -> list[list[str]]:
    """Return milliseconds by part, from additional steps with marks."""
    table = [["ms per step", *PARTS, "sum", *(["communication"] if report["settings"]["processes"] > 1 else [])]]
    for row in report["rows"]:
        if row["left_out"] or not row["parts"]:
            continue
        total = sum(row["parts"].values())
        communication = [f"{1e3 * total * row['exposed_share']:.2f}"] if "exposed_share" in row else []
        table.append(
            [row["label"], *(f"{1e3 * row['parts'][part]:.2f}" for part in PARTS), f"{1e3 * total:.2f}", *communication]
        )
    return table


TURNS = {"alternate": "systems in turns", "sequential": "one system after the other"}


def goals(report: Report) -> list[str]:
    """Compare our engines with the goal; on a CPU there is none."""
    if not report["machine"]["gpu"]:
        return []
    lines = []
    for row in report["rows"]:
        if row["name"] in OURS and "time_ratio" in row:
            least, median, most = (f"{100 * (value - 1):+.1f}" for value in spread(row["time_ratio"]))
            verdict = "met" if statistics.median(row["time_ratio"]) <= GOAL else "NOT met"
            lines.append(
                f"{verdict}: {row['label']}: {median} % time against {row['against']} "
                f"(min .. max {least} .. {most} %; goal: at most +{100 * (GOAL - 1):.0f} %)"
            )
    return lines


def headline(report: Report) -> str:
    rows = [row for row in report["rows"] if not row["left_out"]]
    if not rows:
        return "No system could be measured."
    chosen, where, row = report["settings"], report["machine"], rows[0]
    cpu = "" if where["gpu"] else f", {chosen['threads']} threads per process"
    return (
        f"Preset {' '.join([chosen['preset'], *chosen['set']])}: {row['num_parameters']:,} parameters, "
        f"{report['flops_per_image'] / 1e6:,.1f} MFLOPs per image forward, {BACKWARD + 1} times that in training; "
        f"global batch size {row['batch']}, {chosen['processes']} process{'es' * (chosen['processes'] > 1)}, "
        f"source {row['source']}; {where['gpu'] or where['cpu']}{cpu}. "
        f"{chosen['rounds']} turns of {chosen['steps']} steps after {chosen['warm_up']} warm-up steps, "
        f"{TURNS[chosen['turns']]}: median (min .. max). "
        f"{tables.made_by(report)}"
    )


def notes(report: Report) -> list[str]:
    lines = [
        f"peak {kind}: "
        + (f"{peak['data_sheet'] / 1e12:,.0f} TFLOP/s ({peak['source']})" if peak["data_sheet"] else peak["source"])
        + f"; a large matmul here: {peak['measured'] / 1e12:,.3g} TFLOP/s"
        for kind, peak in report["peaks"].items()
    ]
    memory = report["memory"]
    bandwidth = f"{memory['copy_bytes_per_second'] / 1e9:,.0f} GB/s of a large copy here, read plus written"
    for kind, num_bytes in memory["bytes_per_step"].items():
        counted = (
            f"{num_bytes / 1e9:,.2f} GB per step and process" if num_bytes else f"not counted ({memory['problem']})"
        )
        floor = f": {1e3 * floor_seconds(report, kind):,.2f} ms" if num_bytes else ""
        lines.append(f"memory floor {kind}: {counted}, {bandwidth}{floor}")
    lines += [f"{row['label']}: skipped: {row['left_out']}" for row in report["rows"] if row["left_out"]]
    without = [row["label"] for row in report["rows"] if not row["left_out"] and not row["parts"]]
    return lines + ([f"not divided into parts: {', '.join(without)}"] if without else [])


def as_text(report: Report) -> str:
    parts = [headline(report), tables.as_text(speed_table(report))]
    if len(parts_table(report)) > 1:
        parts.append(tables.as_text(parts_table(report)))
    return "\n\n".join([*parts, "\n".join([*goals(report), *notes(report)])])


def as_markdown(report: Report) -> str:
    parts = ["# The training step", headline(report), tables.as_markdown(speed_table(report))]
    if len(parts_table(report)) > 1:
        parts += ["## Milliseconds by part", tables.as_markdown(parts_table(report))]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in [*goals(report), *notes(report)])]) + "\n"
