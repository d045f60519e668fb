"""Precision over recall as a picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from copynce.inspect.curves import CURVES, picture_of

_PRECISION = 0.9  # of RP90
_MOST = 2000  # points of a line: a picture shows no more


def draw_precision_recall(curves: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]]) -> Image.Image:
    """A line per result over the same axes, and the precision of RP90.

    curves: name -> (recall, precision) by rising recall, as `precision_recall_curve` gives them.
    """
    figure = Figure(figsize=(6.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(_PRECISION, color="#9aa1ad", linewidth=0.8, linestyle=(0, (4, 3)))
    for number, (name, (recall, precision)) in enumerate(curves.items()):
        shown = np.unique(np.linspace(0, max(len(recall) - 1, 0), min(len(recall), _MOST)).astype(np.int64))
        # `_` before a name would hide it from the legend.
        label = f"\u200b{name}" if name.startswith("_") else name
        axes.plot(recall[shown], precision[shown], color=CURVES[number % len(CURVES)], linewidth=1.8, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall", fontsize=9)
    axes.set_ylabel("precision", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=4)
    return picture_of(figure)
