"""The page of all runs, `runs/index.html`: table, filters, curves and differing settings, in one file.

The page needs no network connection: DataTables (from the package itables) and Plotly are written into it. Its content
security policy forbids every connection, and every script but those of this file.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.display import printable
from common.errors import RunError
from common.paths import PROJECT, RESULTS, RUNS, RUNS_OF_COMPARISON, near_path
from reports.run_list import summary
from reports.run_rows import CURVES, RUN, Row
from reports.run_table import BASE, intact_runs, read_table, replace_file, varied_columns
from reports.style import COLORS

INDEX = "index.html"
TEMPLATES = PROJECT / "reports" / "templates"
STYLE = PROJECT / "reports" / "page.css"
LIBRARIES = {  # package, file in it
    "plotly": ("plotly", "package_data/plotly.min.js"),
    "datatables": ("itables", "html/dt_bundle.js"),
    "datatables_css": ("itables", "html/dt_bundle.css"),
}
SHOWN = (
    *("name", "state", "date", "validation_accuracy", "test_accuracy", "train_loss", "epoch", "num_parameters"),
    *("training_seconds", "seeds_mean", "seeds_sd"),
)
SHOWN_SETTINGS = 6  # further columns at first: settings that differ between runs
COMPRESSION = 4  # of gzip: a higher level takes twice the time for a twentieth less


@dataclass(frozen=True)
class Index:
    """The page that was written, and the numbers of its rows in words."""

    path: Path
    summary: str

    def __str__(self) -> str:
        return f"{near_path(self.path)} ({self.summary})"


def write_index(runs: Path, results: Path | None = RESULTS, out: Path | None = None) -> Index:
    """Write the page of all runs below `runs` and all comparisons there and in `results`.

    Args:
        out: the file; by default index.html in the folder of runs.

    Raises:
        RunError: there is no row, a package is missing, or the file cannot be written.
    """
    rows = read_rows(runs, results)
    path = out or runs / INDEX
    text = page(rows, runs, path.parent)
    try:
        replace_file(path, text)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}). Write the page elsewhere: --out FILE.html"
        ) from error
    return Index(path, summary(rows))


def read_rows(runs: Path, results: Path | None = RESULTS) -> list[Row]:
    """Return the table of runs. Raises RunError where it has no row."""
    rows = read_table(runs, results)
    if not rows:
        raise RunError(f"there is no run in {runs} yet; start one with ./launch_local_train.sh")
    return rows


def index_of(run: Path) -> Path:
    """Return the folder of runs that a run folder belongs to: a run of a comparison lies one folder deeper."""
    folder, runs = run.resolve(), Path(os.environ.get(RUNS_OF_COMPARISON, RUNS))
    return runs if runs.resolve() in folder.parents else folder.parent


def page(rows: list[Row], runs: Path, folder: Path) -> str:
    """Return the HTML text of the page, whose links are relative to `folder`. Raises RunError: a package is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    data = json.dumps(payload(rows, runs, folder), separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(data.encode(), COMPRESSION, mtime=0)).decode()
    libraries = {name: _library(*place) for name, place in LIBRARIES.items()}
    own = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("index.css", "index.js", "charts.js")}
    return environment.get_template("index.html.j2").render(
        title=f"Runs in {printable(runs.resolve().name)}",
        summary=summary(rows),
        nonce=secrets.token_urlsafe(16),
        styles=[libraries["datatables_css"], STYLE.read_text(encoding="utf-8"), own["index.css"]],
        plotly=for_script(libraries["plotly"]),
        datatables=for_script(libraries["datatables"]),
        charts=for_script(own["charts.js"]),
        script=for_script(own["index.js"]),
        data=packed,
    )


def _library(package: str, file: str) -> str:
    """Return a file of an installed package, which need not be imported for it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise RunError(
            f"the page of all runs needs the package {package}, which is not installed: pip install {package}"
        )
    return (Path(found.origin).parent / file).read_text(encoding="utf-8")


def for_script(code: str) -> str:
    """Return JavaScript that does not end the script element that holds it; inside strings, `\\/` is `/`."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


# --- data of the page -----------------------------------------------------------------------------------------------


def payload(rows: list[Row], runs: Path, folder: Path) -> dict[str, Any]:
    """Return what the scripts of the page read: columns, rows and colors."""
    keys = varied_columns(rows)
    settings = [key for key in keys if "." in key and not key.startswith(("versions.", "augmentation."))]
    shown = {*SHOWN, *settings[:SHOWN_SETTINGS], *(("kind",) if any(row.kind != RUN for row in rows) else ())}
    columns = [{"key": key, "type": _type_of(key, rows), "shown": key in shown} for key in keys]
    if any(row.note for row in rows):
        columns.append({"key": "note", "type": "string", "shown": False})
    return {
        "columns": columns,
        "rows": [_row(row, keys, runs, folder) for row in rows],
        "constant": _constants(rows, keys),
        "colors": COLORS[:6],
        "metrics": [*CURVES, "step_loss"],
    }


def _type_of(key: str, rows: list[Row]) -> str:
    values = [row.values[key] for row in rows if key in row.values]
    if key == "date":
        return "date"
    is_number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return "num" if is_number and key not in BASE else "string"


def _constants(rows: list[Row], varied: list[str]) -> dict[str, Any]:
    """Return the values that all runs share."""
    first, *others = intact_runs(rows) or [{}]
    return {
        key: value
        for key, value in sorted(first.items())
        if key not in varied and all(key in values for values in others)
    }


def _row(row: Row, keys: list[str], runs: Path, folder: Path) -> dict[str, Any]:
    place = os.path.relpath(runs / row.path / row.page, folder)
    found: dict[str, Any] = {
        "kind": row.kind,
        "href": "./" + quote(os.fsencode(place)) + ("" if row.page else "/"),
        "values": [_shown(row.values.get(key)) for key in keys],
    }
    optional = {"note": printable(row.note), "setting": row.setting, "curves": row.curves, "variants": row.variants}
    return found | {key: value for key, value in optional.items() if value}


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return printable(value) if isinstance(value, str) else value
