"""One look for all figures: size, colours, fonts, and how a figure becomes a PNG."""

import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

WIDTH, HEIGHT, DPI = 5.6, 3.5, 200  # inches, inches, pixels an inch
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a94a3", "#1f2733"
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.parse_math": False,  # names of subsets and files come from data, and $ is a letter there
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b6bec9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e9ecf1",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
}

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")
COUNT = FuncFormatter(lambda value, _: f"{value:,.10g}")
SMALL = FuncFormatter(lambda value, _: f"{value:.3g}")


class Picture(NamedTuple):
    """One figure: `name` of its file without .png, what it shows in words, and the PNG."""

    name: str
    alt: str
    png: bytes


def draw(name: str, alt: str, paint: Callable[[Axes], None], height: float = HEIGHT) -> Picture:
    """The figure that `paint` makes of empty axes, `height` inches high."""
    with rc_context(_STYLE), warnings.catch_warnings():
        # A script that the font lacks is boxes in the figure; the page has the same name in the reader's own font.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        figure = Figure((WIDTH, height), dpi=DPI, layout="constrained")
        paint(figure.subplots())
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return Picture(name, alt, png.getvalue())


def over_steps(axes: Axes, title: str, unit: str, form: FuncFormatter) -> None:
    """Title and axes of something over optimizer steps."""
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(COUNT)
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(form)


def legend(axes: Axes) -> None:
    """A row under the title, above what is drawn; nothing where nothing has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=4, columnspacing=1.4, handlelength=1.5)
        axes.set_title(axes.get_title("left"), pad=24)


def marker(count: int) -> str:
    """A dot where few points make no line that is seen, else none."""
    return "o" if count <= 30 else ""


def shorten(text: str, most: int = 28) -> str:
    """`text` on one line, its middle left out where it is long."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    half = math.floor((most - 1) / 2)
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
