"""What all figures share: colors, fonts, units of time, and how a figure is made and written.

Figures are made without pyplot, which keeps every figure in memory and looks for a display.
"""

from __future__ import annotations

import base64
import io
import logging
import sys
import textwrap
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RunError
from common.text import listed, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors of Okabe and Ito, distinguishable by color-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, PURPLE, AMBER, BLACK = "#56B4E9", "#CC79A7", "#E69F00", "#000000"
GRAY = "#777777"  # for data in the background
INK = "#1b1f24"  # text and axes, as in page.css
COLORS = [BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK]
DARK_MODE = {INK: "#e3e8ee", BLACK: "#e3e8ee", BLUE: "#3d9be0", SKY: "#a6d8f7"}  # other colors are readable on both
SPLITS = {"validation": GREEN, "test": ORANGE}
DPI = 110
FONT = "DejaVu Sans"  # comes with matplotlib
_reported: set[str] = set()  # characters without a font, each reported once
warnings.filterwarnings("ignore", "Creating legend with loc", UserWarning)  # matplotlib's advice on a slow machine
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # under a read-only HOME it suggests MPLCONFIGDIR


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of `width` x `height` inches and its axes, an array (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "runs",  # the same figure gives the same SVG
            "text.parse_math": False,  # a $ in a class name or a run name is not a formula
            "axes.facecolor": "none",
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG or SVG, whichever the suffix of `path` names. Raises RunError where it is not writable."""
    use_installed_fonts(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}). Check the disk and its permissions") from error
    return path


def embed(figure: Figure) -> str:
    """Return the figure as a data URI: a transparent SVG that follows the light or dark mode of the browser."""
    use_installed_fonts(figure)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    rules = "".join(
        f'[style*="{what}: {light.lower()}"]{{{what}:{dark}!important}}'
        for light, dark in DARK_MODE.items()
        for what in ("fill", "stroke")
    )
    svg = file.getvalue().decode()
    svg = svg.replace("</style>", f"@media (prefers-color-scheme: dark){{{rules}}}</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def use_installed_fonts(figure: Figure) -> None:
    """Let the texts of a figure use installed fonts for characters that matplotlib's own font lacks, such as Chinese.

    Where no installed font has a character, one warning names it and the figure shows a box.
    """
    from matplotlib.text import Text

    warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font", category=UserWarning)
    texts = figure.findobj(Text)
    missing = {ord(character) for text in texts for character in text.get_text()} - _characters_of(FONT) - {10}
    if not missing:
        return
    families, missing = _fonts_for(missing)
    for text in texts:
        text.set_fontfamily([FONT, *families])
    unknown = {chr(code) for code in missing} - _reported
    if unknown:
        _reported.update(unknown)
        print(
            f"warning: no installed font has the characters {listed(sorted(unknown))}; pictures show boxes instead. "
            "Install a font that has them, for example: apt-get install fonts-noto-cjk",
            file=sys.stderr,
        )


@cache
def _characters_of(family: str) -> frozenset[int]:
    """Return the code points that the font of a family has."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(family)).get_charmap())


def _fonts_for(missing: set[int]) -> tuple[list[str], set[int]]:
    """Return installed families that together have as many of the code points as possible, and the code points left."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    families: list[str] = []
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not missing:
            break
        if entry.name in families or entry.name.startswith((".", "Last Resort", FONT)):
            continue  # "Last Resort" draws a placeholder for every character
        try:
            found = missing & set(FT2Font(entry.fname).get_charmap())
        except (OSError, RuntimeError):  # listed in matplotlib's cache, but removed or unreadable
            continue
        if found:
            families.append(entry.name)
            missing = missing - found
    return families, missing


def short_names(names: Iterable[str], length: int = 28) -> dict[str, str]:
    """Return name -> how a picture shows it: at most `length` letters, a mark " *" besides, and no two alike."""
    shown: dict[str, str] = {}
    for name in names:
        bare, mark, _ = name.partition(" *")
        text, number = shorten(bare, length), 1
        while text + mark in shown.values():
            number += 1
            text = f"{shorten(bare, length - 4)} ({number})"
        shown[name] = text + mark
    return shown


def set_title(figure: Figure, title: str, right: float = 0.0) -> None:
    """Set a title that may be a long sentence, wrapped to the width of the figure without `right` inches of legend."""
    width = figure.get_figwidth() - right
    figure.suptitle("\n".join(textwrap.wrap(title, int(11 * width))), fontsize=11, x=width / 2 / figure.get_figwidth())


def finish(axes: Any, **labels: Any) -> None:
    """Set labels and a light grid, remove the box, and add a legend where there are several lines."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)


def set_epoch_axis(axes: Any, last: float) -> None:
    """Make the x axis one of epochs from 0 to `last`, with ticks at integers where there are at least two epochs."""
    axes.set(xlabel="epoch", xlim=(0, last * 1.02))
    axes.xaxis.get_major_locator().set_params(integer=last >= 2)


def in_time_unit(seconds: list[float]) -> tuple[list[float], str]:
    """Return the times in the unit that suits the longest of them, and the name of the unit."""
    longest = max(seconds, default=0.0)
    size, name = next(
        (size, name)
        for limit, size, name in ((180, 1, "seconds"), (3 * 3600, 60, "minutes"), (float("inf"), 3600, "hours"))
        if longest <= limit
    )
    return [value / size for value in seconds], name
