"""The one restrained style of all figures: colours, panels, frames, ticks, and how a figure becomes a PNG.

Figures are matplotlib ``Figure`` objects that no global state knows of: they need no display, may be made in any
thread and vanish with their last reference. ``png`` turns one into bytes.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.disk import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, FAINT = "#202124", "#5f6368", "#e6e8eb"
COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#8e5bd0", "#c2a01c", "#c43d6b", "#3aa6b9")
DENSITY = ("#ffffff", "#c9dbf8", "#6f9ee8", "#2f5fc4", "#17307a", "#0a1538")
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlepad": 6,
    "axes.edgecolor": "#9aa0a6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def png(figure: "Figure", path: str | Path | None = None) -> bytes:
    """A figure as PNG of 192 dots an inch, sharp on any screen; written to ``path`` where one is given."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=192)
    if path is not None:
        replace_file(Path(path), content.getvalue())
    return content.getvalue()


@contextmanager
def panels(count: int, size: float | tuple[float, float], columns: int = 5) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure with ``count`` panels of ``size`` inches, at most ``columns`` a row, in the style of all figures."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    width, height = size if isinstance(size, tuple) else (size, size + 0.3)
    columns = min(count, columns)
    rows = -(-count // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained", facecolor="white")
        axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[count:]:
            spare.remove()
        yield figure, axes[:count]


def frame(ax: "Axes", title: str) -> None:
    """An image with a thin frame all round and no ticks."""
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(FAINT)


def plain_log_ticks(ax: "Axes") -> None:
    """Numbers such as 0.02 and 50, not powers of ten, and enough of them on an axis that spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if ax.get_yscale() != "log":
        return
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    if decades < 0.8:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
