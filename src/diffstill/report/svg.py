"""One look for every plot: inline SVG whose text and colours follow the page, in light and in dark.

Plots are drawn with matplotlib's object API in stand-in colours; ``Panel.svg`` replaces those by the page's CSS
variables, so one drawing serves both modes and the colours are stated once, in ``style.css``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from textwrap import fill
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, MUTED, LINE = "#010203", "#040506", "#070809"
SERIES = tuple(f"#a1b2{i:02x}" for i in range(8))
"""Series colours; 0 is the subject of a report. The teacher is drawn in ``INK``."""
_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(SERIES)
}
_COLOUR = re.compile("|".join(_COLOURS))

REFERENCE: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1.5}


def plain(text: str) -> str:
    """A user's string as matplotlib text: no mathtext, and no leading underscore, which hides a legend entry."""
    text = text.replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


LETTERS = 10.0
"""Of a title, to an inch."""
MANY_NAMES = 7
"""Named lines of one plot, over which their legend would hide them."""


class Panel:
    """One plot: a single axes in the house style.

    Args:
        title: what is plotted, above the axes.
        x: what the horizontal axis counts.
        size: inches; a panel is shown about 100 CSS pixels an inch.
        note: what a reader who does not see the plot is told; by default the title.
        headroom: points between axes and title; more leaves room for the names of vertical reference lines.
    """

    def __init__(
        self,
        title: str,
        x: str = "",
        *,
        size: tuple[float, float] = (4.9, 3.2),
        note: str = "",
        headroom: float = 9,
    ) -> None:
        self.note = note or title
        self.figure = Figure(figsize=size, layout="constrained")
        self.figure.patch.set_alpha(0)
        self.axes: Axes = self.figure.add_subplot()
        axes = self.axes
        axes.patch.set_alpha(0)
        lines = plain(fill(title, int(LETTERS * size[0])))
        axes.set_title(lines, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=headroom)
        axes.set_xlabel(plain(x), fontsize=9, color=MUTED)
        axes.tick_params(which="both", color=LINE, labelcolor=MUTED, labelsize=9, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)

    def legend(self) -> None:
        """A frameless legend, where there is more than one named line; under the axes where there are many."""
        handles, labels = self.axes.get_legend_handles_labels()
        look: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.6}
        if len(handles) > MANY_NAMES:
            rows = -(-len(handles) // 2)
            self.figure.set_figheight(self.figure.get_figheight() + 0.19 * rows)
            self.figure.legend(handles, labels, loc="outside lower center", ncols=2, **look)
        elif len(handles) > 1:
            self.axes.legend(handles, labels, **look)

    def level(self, value: float, label: str) -> None:
        """A dashed line at a height, named in the legend."""
        self.axes.axhline(value, label=plain(label), **REFERENCE)

    def upright(self, value: float, label: str, side: str = "center") -> None:
        """A dashed line across the rows of a horizontal plot, named above its end; ``side``: where the name hangs."""
        self.axes.axvline(value, **REFERENCE)
        place: dict[str, Any] = {"xycoords": self.axes.get_xaxis_transform(), "textcoords": "offset points"}
        text = self.axes.annotate(plain(label), (value, 1.0), (0, 3), ha=side, va="bottom", **place)
        text.set(fontsize=8.5, color=MUTED)

    def log_axis(self, axis: str, written: Callable[[float], str] = "{:g}".format) -> None:
        """A log scale with plain numbers: at 1, 2 and 5 of each decade, fewer where they would touch."""
        getattr(self.axes, f"set_{axis}scale")("log")
        low, high = getattr(self.axes, f"get_{axis}lim")()
        ticks = getattr(self.axes, f"{axis}axis")
        # Numbers side by side need more room than numbers above each other.
        spans = high / low * (10 if axis == "x" else 1)
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if spans < 300 else (1, 3) if spans < 3000 else (1,)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
        ticks.set_minor_locator(NullLocator())

    def category_ticks(self, labels: Sequence[str]) -> None:
        """Named places 0, 1, 2 ... on the x axis, slanted where the names would touch."""
        every = -(-len(labels) // 20)  # of a hundred classes, every fifth is named
        shown = labels[::every]
        slanted = sum(map(len, shown)) > 44
        self.axes.set_xticks(range(0, len(labels), every), shown)
        for text in self.axes.get_xticklabels():
            text.set(rotation=35 if slanted else 0, ha="right" if slanted else "center", rotation_mode="anchor")

    def mark(self, text: str, place: tuple[float, float], shift: tuple[float, float], colour: str = MUTED) -> None:
        """A small text beside a point; ``shift`` in points."""
        self.axes.annotate(text, place, shift, textcoords="offset points", fontsize=8.5, color=colour, va="center")

    def bare(self) -> None:
        """No grid, no frame, no x axis: for bars that carry their own numbers."""
        self.axes.grid(False)
        self.axes.spines[:].set_visible(False)
        self.axes.xaxis.set_visible(False)
        self.axes.tick_params(axis="y", length=0, labelcolor=INK)

    def svg(self) -> Markup:
        """The plot as an ``<svg>`` element for a page that defines the colour variables; equal data, equal bytes."""
        buffer = StringIO()
        # Text stays text (searchable, in the page's font); the salt keeps ids of several plots on one page apart.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.note}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawing = buffer.getvalue()
        drawing = drawing[drawing.index("<svg") :]
        drawing = re.sub(r"\s*<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
        drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
        opening = re.search(r'viewBox="[^"]*"', drawing)
        assert opening is not None  # matplotlib always writes one
        head = f'<svg class="plot" role="img" aria-label="{escape(self.note)}" {opening.group()}'
        head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        drawing = head + drawing[drawing.index(">") + 1 :]
        return Markup(_COLOUR.sub(lambda match: _COLOURS[match.group()], drawing))
