"""What a plot is, whoever draws it: series and heat maps, in views of which a person chooses one.

Some of the views stand side by side on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OURS = 0  # number of the colour that is kept for rosaq
MUTED = -1  # likewise for references and limits


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend; "" keeps it out.
        x: numbers, or names of categories.
        y: numbers, as many.
        style: "line", "points" (joined by a thin line), "bars", or "rule" (a dashed line without points).
        colour: number of a colour, `OURS` and `MUTED` among them.
        notes: what a pointer over each point says, instead of its numbers.
        spread: half of the error bar of each point.
        bold: it is what the plot is about.
    """

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    style: str = "line"
    colour: int = OURS
    notes: Sequence[str] = ()
    spread: Sequence[float] = ()
    bold: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers as colours.

    Attributes:
        x: names of the columns.
        y: names of the rows, from the top.
        values: by row; None where there is no number.
        unit: what the numbers are.
        middle: the ratio that is neither good nor bad, where the numbers are ratios: above it is good, and they are written into the cells.
    """

    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    middle: float | None = None


@dataclass(frozen=True)
class Axis:
    """One axis: its title, whether it is logarithmic, whether it has names rather than numbers."""

    title: str = ""
    log: bool = False
    names: bool = False


View = tuple[Series, ...] | HeatMap


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: of its files.
        title: a few words.
        caption: what is to be seen, in a sentence or two.
        x: axis.
        y: axis.
        choices: what a person chooses, such as "site".
        views: one for each combination of choices.
        panels: views that stand side by side where nobody can choose.
    """

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    choices: tuple[str, ...]
    views: dict[tuple[str, ...], View]
    panels: tuple[tuple[str, ...], ...]
