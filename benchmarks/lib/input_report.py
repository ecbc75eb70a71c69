"""The report of `input_pipeline.py`: its goals, and the tables of speeds, CPU times and ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.lib import tables
from benchmarks.lib.loader_tasks import JOBS, OURS
from benchmarks.lib.timing import spread


@dataclass(frozen=True)
class Goal:
    """A speed to reach: `least` times the images/s of `baseline`, or `least` images/s without a baseline."""

    text: str
    job: str
    device: str
    baseline: str | None
    least: float


GOALS = (
    Goal("at least FFCV's speed", "crop", "cpu", "ffcv", 1),
    Goal("20 times ImageFolder + DataLoader", "crop", "cpu", "imagefolder", 20),
    Goal("8 times an in-memory Dataset + DataLoader", "rand_augment", "cpu", "memory", 8),
    Goal("at most twice the time of a whole-batch torch loader", "crop", "cpu", "whole_batch", 0.5),
    Goal("more than 1,000,000 images/s on the GPU", "crop", "cuda", None, 1e6),
)


def judge(goal: Goal, report: dict[str, Any]) -> dict[str, Any] | None:
    """Compare the fastest of our loaders with a goal; None for a goal of another device or job."""
    if goal.device != report["settings"]["device"].partition(":")[0] or goal.job not in report["jobs"]:
        return None
    job = report["jobs"][goal.job]
    speeds = {name: spread(facts["images_per_second"]).median for name, facts in job["loaders"].items() if name in OURS}
    answer = {"goal": goal.text, "job": goal.job, "least": goal.least, "met": None, "loader": None}
    if not speeds or goal.baseline and goal.baseline not in job["loaders"]:
        return answer
    best = max(speeds, key=speeds.get)
    values = spread(job["ratios"][best][goal.baseline] if goal.baseline else job["loaders"][best]["images_per_second"])
    met = values.median > goal.least if goal.baseline is None else values.median >= goal.least
    return {**answer, "met": met, "loader": best, **values._asdict()}


def goal_line(verdict: dict[str, Any]) -> str:
    if verdict["met"] is None:
        return f"not measured: {verdict['goal']} ({verdict['job']})"
    number = "{:,.0f} images/s" if verdict["least"] >= 1e4 else "{:.2f} times the speed"
    median, *ends = (
        number.format(verdict[key]) if key == "median" else f"{verdict[key]:,.{0 if verdict['least'] >= 1e4 else 2}f}"
        for key in ("median", "minimum", "maximum")
    )
    outcome = "met" if verdict["met"] else "NOT met"
    return f"{outcome}: {verdict['goal']} ({verdict['job']}): {verdict['loader']}, {median} ({' .. '.join(ends)})"


def job_tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]], list[str]]]:
    """Return title, table rows (header first) and notes for each job: one table of speeds, two of ratios."""
    result = []
    for name, job in report["jobs"].items():
        measured = job["loaders"]
        rows = [["loader", "images/s: min", "median", "max", "CPU us/image: min", "median", "max"]]
        for loader, facts in measured.items():
            speeds, costs = spread(facts["images_per_second"]), spread(facts["cpu_us_per_image"])
            rows.append([label(loader), *(f"{speed:,.0f}" for speed in speeds), *(f"{cost:.1f}" for cost in costs)])
        notes = [f"{label(loader)}: skipped: {reason}" for loader, reason in job["skipped"].items()]
        notes += [
            f"{label(loader)}: another job: its output differs in mean or standard deviation"
            for loader in job["unlike"]
        ]
        result.append((JOBS[name], rows, notes))
        baselines = [loader for loader in measured if loader not in OURS]
        for key, title in (
            ("ratios", "images/s, ours / baseline"),
            ("cpu_ratios", "CPU time per image, ours / baseline"),
        ):
            rows = [["median (min .. max)", *baselines]]
            rows += [
                [label(ours), *(tables.cell(spread(job[key][ours][other])) for other in baselines)] for ours in job[key]
            ]
            if baselines and len(rows) > 1:
                result.append((f"{JOBS[name]}: {title}, round by round", rows, []))
    return result


def label(loader: str) -> str:
    return f"ours, {loader}" if loader in OURS else loader


def as_text(report: dict[str, Any]) -> str:
    parts = [headline(report)]
    for title, rows, notes in job_tables(report):
        parts.append("\n".join([title, tables.as_text(rows), *notes]))
    return "\n\n".join([*parts, "\n".join(map(goal_line, report["goals"]))])


def as_markdown(report: dict[str, Any]) -> str:
    parts = ["# Input pipelines", headline(report)]
    for title, rows, notes in job_tables(report):
        parts += [f"## {title}", tables.as_markdown(rows), *notes]
    return "\n\n".join([*parts, "## Goals", "\n".join(f"- {goal_line(verdict)}" for verdict in report["goals"])]) + "\n"


def headline(report: dict[str, Any]) -> str:
    where, settings = report["machine"], report["settings"]
    return (
        f"{settings['images_per_epoch']:,} images per epoch of {settings['side']} x {settings['side']} pixels, "
        f"batch size {settings['batch_size']}, on {where['gpu'] or 'the CPU'}; {where['cpu']}, {where['cores']} cores, "
        f"{settings['threads']} threads or workers; {settings['rounds']} rounds. {tables.made_by(report)}"
    )
