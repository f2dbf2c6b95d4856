"""The report's pictures, drawn by matplotlib: SVG for a light or a dark page."""

import io
from collections.abc import Callable
from typing import NamedTuple

from conure.errors import InputError

import numpy as np

try:
    import matplotlib
except ImportError:
    raise InputError("the report draws with matplotlib: run .venv/bin/python -m pip install matplotlib") from None
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.report.chain import Layer
from tools.report.history import History, Point


class Theme(NamedTuple):
    """Colours of a page; those of tp and ret differ for colour-blind readers too (Okabe and Ito)."""

    paper: str
    ink: str
    muted: str
    line: str
    tp: str
    ret: str
    free: str
    tasks: tuple[float, float]  # the part of TASK_COLOURS that stands out from the paper


LIGHT = Theme("#ffffff", "#1b2330", "#5a6473", "#d9dee5", "#0072b2", "#c24d00", "#e6e9ee", (0.1, 0.85))
DARK = Theme("#14181e", "#e8ebf0", "#a5afbd", "#343c47", "#56b4e9", "#f0a030", "#2b323c", (0.35, 1.0))
TASK_COLOURS = "viridis"  # from dark to light, in greyscale too


def style(theme: Theme) -> dict[str, object]:
    """matplotlib's settings for a theme."""
    return {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # names come from files, in which a dollar is a dollar
        "text.color": theme.ink,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid.axis": "y",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": theme.paper,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "svg.hashsalt": "report",  # so that the same numbers give the same file
    }


def svg(theme: Theme, size: tuple[float, float], draw: Callable[[Figure], None]) -> bytes:
    """An SVG with a transparent background, `size` in inches."""
    with matplotlib.rc_context(style(theme)):
        figure, file = Figure(size, layout="constrained"), io.BytesIO()
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()


def learning_curve(history: History, theme: Theme) -> bytes:
    return svg(theme, (4.2, 2.8), lambda figure: draw_history(figure.subplots(), history, theme))


def draw_history(axes: Axes, history: History, theme: Theme) -> None:
    """Validation scores of tp, the drop by pruning, those of ret; the selected epochs and their test scores."""
    axes.set_title(f"Task {history.task}")
    axes.set(xlabel="epochs of tp, then of ret", ylabel=f"{history.name} (0 to 1)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if history.pruned:
        axes.axvline(history.pruned[0], color=theme.line, linewidth=0.8, zorder=1)
    colours = {"tp": theme.tp, "ret": theme.ret}
    for state, curve in history.curves.items():
        axes.plot(*zip(*curve), color=colours[state], linewidth=1.8, marker=".", markersize=4)
    if history.pruned and "tp" in history.kept:
        (x, y), (end, low) = history.kept["tp"], history.pruned
        axes.plot([x, end, end], [y, y, low], color=theme.muted, linewidth=1.2, linestyle=(0, (3, 2)))
    for state, point in history.kept.items():
        mark(axes, point, "o", 8, colours[state], "none")
    for state, point in history.test.items():
        mark(axes, point, "D", 5.5, theme.paper, colours.get(state, theme.muted))
    axes.margins(y=0.12)


def mark(axes: Axes, point: Point, shape: str, size: float, edge: str, face: str) -> None:
    axes.plot(*point, shape, markersize=size, markeredgecolor=edge, markerfacecolor=face, zorder=3)


def ownership(layers: list[Layer], theme: Theme, width: float) -> bytes:
    size = width, 0.33 * len(layers) + 1
    return svg(theme, size, lambda figure: draw_ownership(figure, layers, theme))


def draw_ownership(figure: Figure, layers: list[Layer], theme: Theme) -> None:
    """A bar per layer, from its input side down: task 1, 2, …, and what is free."""
    axes = figure.subplots()
    owners = sorted({owner for layer in layers for owner in layer.counts} - {0})
    drawn = matplotlib.colormaps[TASK_COLOURS](np.linspace(*theme.tasks, len(owners)))
    colours = [*(matplotlib.colors.to_hex(colour) for colour in drawn), theme.free]
    room = 36 / (figure.get_figwidth() - 1.3)  # % of a bar that a number takes: 0.36 inches; the names take 1.3
    left = [0.0] * len(layers)
    for owner, colour in zip([*owners, 0], colours):
        shares = [layer.counts.get(owner, 0) / sum(layer.counts.values()) * 100 for layer in layers]
        label = f"task {owner}" if owner else "free"
        names = [layer.name for layer in layers]
        bars = axes.barh(names, shares, left=left, height=0.72, color=colour, edgecolor=theme.paper, label=label)
        written = [f"{share:.0f} %" if share >= room else "" for share in shares]
        axes.bar_label(bars, written, label_type="center", fontsize=8.5, color=readable_on(colour))
        left = [start + share for start, share in zip(left, shares)]
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlim=(0, 100), xlabel="% of the layer's weights")
    columns = max(3, int(figure.get_figwidth() * 0.85))
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1, handleheight=1, columnspacing=1.2)


def readable_on(colour: str) -> str:
    """Black or white, whichever stands out more by WCAG's contrast."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"  # where both have a contrast of 4.6
