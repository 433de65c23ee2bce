"""What all plots share: colours, markers, how a figure is made and saved. matplotlib is loaded when one is drawn.

Figures are made without pyplot, so no global state; the same table gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from evenbits.errors import MissingExtra
from evenbits.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart under the common colour-vision deficiencies; yellow is left out on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
INK = "#333333"
DPI = 160  # of the PNG
LOOK = {
    "svg.fonttype": "none", "svg.hashsalt": "evenbits", "font.family": ["DejaVu Sans"], "font.size": 9,
    "text.parse_math": False,  # a $ in a name is no formula
}  # fmt: skip


def require_matplotlib() -> None:
    """Raises MissingExtra where it is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "plots") from None


def render(draw: Callable[[Figure], None], size: tuple[float, float]) -> dict[str, bytes]:
    """ "png" and "svg" of one figure of `size` inches, neither with a date in it. Raises MissingExtra.

    The layout is found once, at the PNG's resolution: savefig would find it anew for each kind, after drawing all.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found: dict[str, bytes] = {}
    with warnings.catch_warnings(), mpl.rc_context({**_defaults(mpl.rcParamsDefault), **LOOK}):
        # names in scripts that the font lacks are boxes in the PNG; in the SVG text stays text
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine(None)
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=facts)
            found[kind] = buffer.getvalue()
    return found


def _defaults(settings: Mapping[str, object]) -> dict[str, object]:
    """What a matplotlibrc may have changed. Backends are left alone: figures here have their own."""
    return {name: value for name, value in settings.items() if "backend" not in name}


def method_name(row: Row) -> str:
    return " + ".join([row.name, *row.recovery])


def legend_name(name: str) -> str:
    """Legends leave out what begins with an underscore: a space of no width before it brings it back."""
    return f"\u200b{name}" if name.startswith("_") else name


def method_looks(rows: Sequence[Row]) -> Mapping[str, tuple[str, str]]:
    """Method with its recovery -> colour and marker; a method keeps its colour through recovery."""
    plain = sorted({row.name for row in rows})
    names = {method_name(row): row.name for row in rows}
    return {
        name: (COLOURS[plain.index(names[name]) % len(COLOURS)], MARKERS[number % len(MARKERS)])
        for number, name in enumerate(sorted(names))
    }


def despine(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def file_name(words: str, taken: Container[str]) -> str:
    """A name for files without their ending: letters, digits, ._- alone, and none of the `taken` NAME.png."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-")
    unique, number = name, 2
    while f"{unique}.png" in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique
