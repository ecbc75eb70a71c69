"""Write generated tables between the marks in docs/ and README.md. `./run_tests.sh` does it before testing.

python tools/update_docs.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.paths import PROJECT
from config.command_line import Parser

PAGES = (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
NO_OPTIONS = ("architecture", "block")  # functions of the settings: they have no options


def table(kind: str) -> str:
    """Return the table of that name as Markdown."""
    return OTHERS[kind]() if kind in OTHERS else parts(kind)


def parts(kind: str) -> str:
    """Return one component registry as a table: name, description, options with their defaults."""
    from model import TABLES  # late: it imports PyTorch
    from models.parts import part_options

    rows = ["| name | what it is | options |", "|---|---|---|"]
    for name, part in TABLES[kind].items():
        options = {} if kind in NO_OPTIONS else part_options(part)
        shown = ", ".join(f"`{option}={default!r}`" for option, default in options.items())
        rows.append(f"| `{name}` | {(part.__doc__ or '').splitlines()[0]} | {shown} |")
    return "\n".join(rows)


def optimizers() -> str:
    """Return a table of the optimizers with their default parameters."""
    from config.optimizer_defaults import OPTIMIZER_PARAMS
    from optim.optimizers import OPTIMIZERS

    rows = ["| `optimizer.type` | what it is | `optimizer.params` it starts from |", "|---|---|---|"]
    for name, make in OPTIMIZERS.items():
        shown = ", ".join(f"`{key}={value!r}`" for key, value in OPTIMIZER_PARAMS[name].items())
        rows.append(f"| `{name}` | {(make.__doc__ or '').splitlines()[0]} | {shown} |")
    return "\n".join(rows)


def schedules() -> str:
    """Return a table of the learning-rate schedules and the settings that each uses besides the warmup's."""
    from config.setting_groups import SHAPES_USING, ScheduleSettings
    from optim.lr_schedule import SCHEDULES

    rows = ["| `schedule.shape` | factor of `optimizer.params.lr` after the warmup | settings |", "|---|---|---|"]
    for name, shape in SCHEDULES.items():
        used = {key: getattr(ScheduleSettings(), key) for key, shapes in SHAPES_USING.items() if name in shapes}
        shown = ", ".join(
            f"`{key}={[round(v, 3) for v in value] if isinstance(value, list) else value}`"
            for key, value in used.items()
        )
        rows.append(f"| `{name}` | {(shape.__doc__ or '').splitlines()[0]} | {shown} |")
    return "\n".join(rows)


def settings() -> str:
    """Return one table per group of settings, under its heading."""
    from tools.list_settings import markdown

    return markdown(None, [])


OTHERS = {"optimizer": optimizers, "schedule": schedules, "settings": settings}


def update(text: str) -> str:
    """Return `text` with the content between `<!-- table: KIND -->` and `<!-- end -->` replaced."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    Parser(
        "python tools/update_docs.py",
        "Write the tables of components, optimizers, schedules and settings into docs/.",
        example="python tools/update_docs.py",
    ).parse_args()
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = update(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"updated {page.relative_to(PROJECT)}")
