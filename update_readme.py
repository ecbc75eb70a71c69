"""Write the tables of parts into README.md, between their marks. `./run_tests.sh` does it before testing.

    python update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from model import TABLES
from parts import part_options

README = Path(__file__).resolve().parent / "README.md"
NO_OPTIONS = ("architecture", "block")  # functions of the settings, not parts with options of their own


def table(kind: str) -> str:
    """One table of parts as Markdown: name, what it is, options with their defaults."""
    rows = ["| name | what it is | options |", "|---|---|---|"]
    for name, part in TABLES[kind].items():
        options = {} if kind in NO_OPTIONS else part_options(part)
        shown = ", ".join(f"`{option}={default!r}`" for option, default in options.items())
        rows.append(f"| `{name}` | {(part.__doc__ or '').splitlines()[0]} | {shown} |")
    return "\n".join(rows)


def update(text: str) -> str:
    """`text` with what stands between `<!-- table: KIND -->` and `<!-- end -->` made anew."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = update(old)
    if new != old:
        README.write_text(new, encoding="utf-8")
        print(f"updated {README.name}")
