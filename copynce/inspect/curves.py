"""Curves of trainings as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

LOSS_PARTS = {"loss": "total loss", "copynce": "CopyNCE", "info_nce": "InfoNCE", "koleo": "KoLeo", "bce": "BCE"}
"""Keys of a training log that `draw_loss_curves` shows, and their titles."""

CURVES = ("#20242c", "#d1495b", "#00798c", "#7d5ba6", "#edae49", "#5c8001")
"""Colours of lines that stand together."""

_STROKES = ("-", "--", ":")  # of the first lines of all colours, of the next, ...

_MOST_COLUMNS = 4


def draw_loss_curves(records: Sequence[Mapping[str, float]], parts: Mapping[str, str] | None = None) -> Image.Image:
    """The losses of a training log over its steps, one panel each, every value faint and their running mean strong.

    records: the lines of the log, each with `step`; parts: key -> title, those absent from every line are left out;
    None: `LOSS_PARTS`. Raises ValueError if no line has any of them.
    """
    return draw_curves({"": records}, parts or LOSS_PARTS)


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], parts: Mapping[str, str]) -> Image.Image:
    """The curves of one or several trainings over their steps, a panel for each of `parts`, up to four side by side.

    runs: name -> the lines of its log, each with `step`; parts: key -> title, those that no line has are left out.
    One run: a colour a panel; several: a colour a run, then the colours again, dashed; named below. Raises ValueError
    if no line has any of the parts.
    """
    lines = [record for records in runs.values() for record in records]
    shown = {key: title for key, title in parts.items() if any(key in record for record in lines)}
    if not shown:
        raise ValueError(f"records must hold at least one of {', '.join(parts)}, got {len(lines)} lines")
    columns = min(len(shown), _MOST_COLUMNS)
    rows = -(-len(shown) // columns)
    legend = 0.25 * -(-len(runs) // columns) if len(runs) > 1 else 0.0
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows + legend), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (axes, (key, title)) in enumerate(zip(panels, shown.items(), strict=False)):
        for number, (name, records) in enumerate(runs.items()):
            points = np.array([(record["step"], record[key]) for record in records if key in record], np.float64)
            if not len(points):
                continue
            colour = CURVES[(number if len(runs) > 1 else panel) % len(CURVES)]
            stroke = _STROKES[number // len(CURVES) % len(_STROKES)]
            axes.plot(points[:, 0], points[:, 1], stroke, color=colour, alpha=0.3, linewidth=1)
            axes.plot(points[:, 0], _running_mean(points[:, 1]), stroke, color=colour, linewidth=1.8, label=name)
            if len(points) < 2:
                axes.plot(points[:, 0], points[:, 1], "o", color=colour)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.remove()
    if len(runs) > 1:
        named: dict[str, Any] = {}
        for axes in panels[: len(shown)]:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(name, handle)
        figure.legend(named.values(), named.keys(), loc="outside lower left", fontsize=8, frameon=False, ncols=columns)
    return picture_of(figure)


def picture_of(figure: Figure) -> Image.Image:
    """The drawn figure, RGB."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a centred window of a tenth of the series, narrower at the ends; a short one is as it is."""
    half = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
