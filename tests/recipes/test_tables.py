"""The paper's ablation tables."""

from __future__ import annotations

import pytest

from copynce.recipes import RECIPES
from copynce.recipes.tables import TABLES


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_runs_that_exist_each_once(name: str) -> None:
    table = TABLES[name]
    assert {row.run for row in table.rows} <= set(RECIPES)
    assert len({row.name for row in table.rows}) == len({row.label for row in table.rows}) == len(table.rows)
    assert all((row.run.startswith(("matcher", "ablation-matcher"))) == (table.kind == "matcher") for row in table.rows)


def test_every_ablation_stands_in_a_table() -> None:
    shown = {row.run for table in TABLES.values() for row in table.rows}
    assert {name for name in RECIPES if name.startswith("ablation")} <= shown


def test_figures_are_the_papers() -> None:
    figures = {row.run: row.paper for table in TABLES.values() for row in table.rows if not row.without}
    some = {"descriptor": 70.5, "ablation-cosine": 68.6, "ablation-feature-nce-4": 42.6, "matcher": 83.5,
            "ablation-matcher-split-6-6": 84.0, "ablation-matcher-location-nce": 78.7,
            "ablation-matcher-feature-nce": "fails"}  # fmt: skip
    assert some.items() <= figures.items()
    unmined = [(row.name, row.paper) for row in TABLES["descriptor-mining"].rows if row.without]
    assert unmined == [("descriptor-unmined", 61.8), ("ablation-weight-0-unmined", 57.7)]
