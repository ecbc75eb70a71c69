"""The report of `strategies.py`: the table of an epoch, the projection to more hosts, and a plot of each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib import tables
from benchmarks.lib.link_model import Layout, Link, project, sent_by_process
from benchmarks.lib.timing import Spread, spread
from common.errors import SettingsError
from reports.style import AMBER, BLUE, COLORS, ORANGE, finish, make_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.lib.communication_trace import Exchange

Report = dict[str, Any]
COLUMNS = [
    "strategy",
    "processes",
    "data s",
    "training s",
    "communication s",
    "running s",
    "images/s",
    "speed-up",
    "MiB per process",
    "MB sent per step",
    "accuracy",
]


def epoch_seconds(row: Report) -> dict[str, float]:
    """Return the parts of an epoch in seconds, from the medians of the rounds; they add up to `running`."""
    scale = row["steps_per_epoch"] / row["steps"]
    running, data = (scale * statistics.median(row[key]) for key in ("running_seconds", "data_seconds"))
    communication = min(row["exposed_share"] * running, running - data)
    return {
        "data": data,
        "training": running - data - communication,
        "communication": communication,
        "running": running,
    }


def running_spread(row: Report) -> Spread:
    """Return the spread over the rounds, in seconds per epoch."""
    scale = epoch_seconds(row)["running"] / statistics.median(row["running_seconds"])
    return spread([scale * seconds for seconds in row["running_seconds"]])


def exchanges_of(row: Report) -> list[Exchange]:
    from benchmarks.lib.communication_trace import Exchange

    return [Exchange(**facts) for facts in row["exchanges"]]


def epoch_table(rows: Sequence[Report]) -> list[list[str]]:
    table = [COLUMNS]
    for row in rows:
        if row["failed"]:
            table.append([row["name"], str(row["processes"]), *["-"] * (len(COLUMNS) - 2)])
            continue
        parts = epoch_seconds(row)
        table.append(
            [
                row["name"],
                str(row["processes"]),
                *(f"{parts[key]:.2f}" for key in ("data", "training", "communication")),
                tables.cell(running_spread(row), ".1f"),
                f"{statistics.median(row['images_per_second']):,.0f}",
                tables.cell(spread(row["speed_up"])) if "speed_up" in row else "-",
                f"{row['memory_bytes'] / 2**20:,.0f}",
                f"{sent_by_process(exchanges_of(row)) / 1e6:.3g}",
                f"{100 * row['counts']['correct'] / row['counts']['seen']:.2f} %",
            ]
        )
    return table


def projection(rows: Sequence[Report], hosts: Sequence[int], links: Sequence[Link]) -> list[dict[str, Any]]:
    """Return, for each link, seconds per step by strategy and number of hosts (None: impossible), and the fastest."""
    most = max(row["processes"] for row in rows)
    able = [row for row in rows if not row["failed"] and row["processes"] == most > 1 and row["strategy"] != "dp"]
    result = []
    for link in links:
        seconds = {row["name"]: _projected(row, [1, *hosts], link) for row in able}
        best = [
            min(((times[i], name) for name, times in seconds.items() if times[i] is not None), default=(None, None))[1]
            for i in range(1 + len(hosts))
        ]
        result.append(
            {
                "gigabits": link.gigabits,
                "latency_seconds": link.latency_seconds,
                "hosts": [1, *hosts],
                "step_seconds": seconds,
                "best": best,
            }
        )
    return result


def _projected(row: Report, hosts: Sequence[int], link: Link) -> list[float | None]:
    step = statistics.median(row["running_seconds"]) / row["steps"]
    exposed = row["exposed_share"] * step
    measured, times = Layout(1, row["processes"], row["stages"], row["topology"]), []
    for count in hosts:
        try:
            times.append(project(exchanges_of(row), measured, count, step - exposed, exposed, link))
        except SettingsError:  # this topology does not allow this number of processes
            times.append(None)
    return times


def projection_tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    result = []
    for part in report["projection"]:
        head = ["ms per step", "here", *(f"{count} hosts" for count in part["hosts"][1:])]
        body = [
            [
                name,
                *(
                    "-" if seconds is None else f"{1e3 * seconds:,.1f}" + " *" * (best == name)
                    for seconds, best in zip(times, part["best"], strict=True)
                ),
            ]
            for name, times in part["step_seconds"].items()
        ]
        if body:
            result.append((str(Link(part["gigabits"], part["latency_seconds"])), [head, *body]))
    return result


def headline(report: Report) -> str:
    rows = [row for row in report["rows"] if not row["failed"]]
    chosen, where = report["settings"], report["machine"]
    if not rows:
        return "No strategy could be measured."
    sizes, first = rows[0]["batch"], rows[0]
    plural = "s" * (chosen["threads"] > 1)
    share = (
        ""
        if where["gpu"]
        else f", {chosen['threads']} thread{plural} per process{', each on its own cores' * chosen['pin']}"
    )
    return (
        f"Preset {' '.join([chosen['preset'], *chosen['set']])} ({first['num_parameters']:,} parameters, "
        f"{first['describe']}), "
        f"global batch size {sizes['total']}; {first['device']}{share}; {where['cpu']}, {where['cores']} cores. "
        f"Seconds per epoch of {first['steps_per_epoch']} steps, from {chosen['steps']} steps after "
        f"{chosen['warm_up']} warm-up steps; median (min .. max) of {chosen['rounds']} "
        f"round{'s' * (chosen['rounds'] > 1)} in turns; accuracy on the test split after these steps. "
        f"{tables.made_by(report)}"
    )


def notes(report: Report) -> list[str]:
    failed = [
        f"{row['name']} on {row['processes']} processes: {row['failed']}" for row in report["rows"] if row["failed"]
    ]
    gossips = any(row["strategy"] in ("gossip", "local") and not row["failed"] for row in report["rows"])
    return failed + (
        ["gossip and local train different steps from the others: their accuracy is that of the mean of all workers."]
        if gossips
        else []
    )


def projection_note(report: Report) -> str:
    return (
        "Projected, not measured: hosts like this one, the same global batch. The computation is divided evenly. "
        "The communication counted here runs on rings over all processes (benchmarks/lib/link_model.py), and none of "
        "it overlaps with computation. * marks the fastest. For gossip and local, the fastest step does not mean the "
        "shortest time to an accuracy."
    )


def as_text(report: Report) -> str:
    parts = [headline(report), tables.as_text(epoch_table(report["rows"])), *notes(report)]
    found = projection_tables(report)
    if found:
        parts.append(projection_note(report))
    return "\n\n".join([*parts, *(f"Between hosts {link}:\n{tables.as_text(rows)}" for link, rows in found)])


def as_markdown(report: Report) -> str:
    parts = ["# Strategies", headline(report), tables.as_markdown(epoch_table(report["rows"])), *notes(report)]
    if any(not row["failed"] for row in report["rows"]):
        parts.append("![Seconds per epoch](epoch.png)")
    found = projection_tables(report)
    if found:
        parts += ["## More hosts", projection_note(report)]
        parts += [f"### {link}\n\n{tables.as_markdown(rows)}" for link, rows in found]
        parts.append("![Milliseconds per step on more hosts](hosts.png)")
    return "\n\n".join(parts) + "\n"


# --- pictures ---------------------------------------------------------------------------------------------------------

PARTS = {"training": BLUE, "communication": ORANGE, "data": AMBER}


def draw(report: Report, folder: Path) -> None:
    """Write epoch.png, and hosts.png where there is something to project."""
    rows = [row for row in report["rows"] if not row["failed"]]
    if rows:
        save(epoch_figure(rows), folder / "epoch.png")
    if any(part["step_seconds"] for part in report["projection"]):
        save(hosts_figure(report["projection"]), folder / "hosts.png")


def epoch_figure(rows: Sequence[Report]) -> Figure:
    """Draw one stacked bar per strategy, with its speed-up at the end."""
    figure, ((axes,),) = make_figure(8.5, 1.2 + 0.36 * len(rows))
    finish(axes, xlabel="seconds per epoch; x: speed-up over one process")
    seconds = [epoch_seconds(row) for row in rows]
    begins = [0.0] * len(rows)
    for part, color in PARTS.items():
        axes.barh(range(len(rows)), [parts[part] for parts in seconds], left=begins, color=color, label=part)
        begins = [begin + parts[part] for begin, parts in zip(begins, seconds, strict=True)]
    for i, row in enumerate(rows):
        if "speed_up" in row:
            axes.annotate(
                f"{statistics.median(row['speed_up']):.2f} x",
                (begins[i], i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
    axes.set_yticks(
        range(len(rows)),
        [row["name"] + (f" x {row['processes']}" if row["processes"] > 1 or i else "") for i, row in enumerate(rows)],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(begins))
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS), frameon=False)
    return figure


def hosts_figure(parts: Sequence[dict[str, Any]]) -> Figure:
    """Draw milliseconds per step against the number of hosts, one panel per link."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, panels = make_figure(4.4 * len(parts) + 1.4, 4, 1, len(parts), sharey=True)
    for axes, part in zip(panels[0], parts, strict=True):
        finish(axes, xlabel="hosts (projected)")
        for i, (name, times) in enumerate(part["step_seconds"].items()):
            known = [
                (count, 1e3 * seconds)
                for count, seconds in zip(part["hosts"], times, strict=True)
                if seconds is not None
            ]
            axes.plot(
                *zip(*known, strict=True),
                color=COLORS[i % len(COLORS)],
                marker="osD^vP*Xph"[i % 10],
                ls="-" if i < len(COLORS) else "--",
                ms=5,
                lw=1.2,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(part["hosts"], [str(count) for count in part["hosts"]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_title(str(Link(part["gigabits"], part["latency_seconds"])), fontsize=10)
    panels[0, 0].set_ylabel("milliseconds per step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure
