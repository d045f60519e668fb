"""Looking at what a model sees: patch affinities, traced pixels, loss curves, and a report of it all."""

from __future__ import annotations

from copynce.inspect.curves import draw_curves, draw_loss_curves
from copynce.inspect.drawing import draw_affinity, draw_entropy, draw_traced_pixels
from copynce.inspect.report import Figure, Found, Report, Search, Section, Table, metrics_table, write_report
from copynce.losses.affinity import affinity, affinity_entropy

__all__ = [
    "Figure",
    "Found",
    "Report",
    "Search",
    "Section",
    "Table",
    "affinity",
    "affinity_entropy",
    "draw_affinity",
    "draw_curves",
    "draw_entropy",
    "draw_loss_curves",
    "draw_traced_pixels",
    "metrics_table",
    "write_report",
]
