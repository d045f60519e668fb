"""Groups of copies in files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from copynce.copies.scanning import CopyGroup, Member
from copynce.files import atomic_text

_FACTS = ["width", "height", "bytes", "changed", "taken", "camera"]
COLUMNS = ["group", "path", "source", "why", "probability", "same_bytes", *_FACTS]


def write_groups_csv(path: str | Path, groups: Sequence[CopyGroup]) -> None:
    """One row a picture under `COLUMNS`. source: whether it is the likely one, yes or no, empty where no fact tells;
    why stands with the first picture of a group. probability: of being a copy of that first one, which has none.
    same_bytes: as that one. A name comes back byte for byte, also where it is no UTF-8."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for number, group in enumerate(groups, start=1):
        for member in group.members:
            told = _facts(member)
            source = "" if group.source is None else "no" if member.pair is not None else "yes"
            rows.writerow([
                number,
                member.path,
                source,
                group.why if member.pair is None else "",
                "" if member.pair is None else f"{member.pair.probability:.4f}",
                "yes" if member.same_bytes else "no",
                *("" if told[name] is None else told[name] for name in _FACTS),
            ])  # fmt: skip
    with atomic_text(path) as file:
        file.write(text.getvalue())


def write_groups_jsonl(path: str | Path, groups: Sequence[CopyGroup]) -> None:
    """One JSON object a group: `group` (its number), `source` (a path, or null), `why`, `probability` (of its least
    probable pair), `members`, each with `path`, its facts, `same_bytes`, and `pair`, as `CopyPair.to_json`, with the
    first member as the reference, null for that one."""
    with atomic_text(path) as file:
        for number, group in enumerate(groups, start=1):
            told = {
                "group": number,
                "source": group.source,
                "why": group.why,
                "probability": round(group.probability, 4),
                "members": [
                    {
                        "path": member.path,
                        "same_bytes": member.same_bytes,
                        **_facts(member),
                        "pair": None if member.pair is None else member.pair.to_json(),
                    }
                    for member in group.members
                ],
            }
            file.write(json.dumps(told) + "\n")


def _facts(member: Member) -> dict[str, Any]:
    facts = member.facts
    return {
        "width": facts.width,
        "height": facts.height,
        "bytes": facts.size,
        "changed": datetime.fromtimestamp(facts.changed, UTC).isoformat(timespec="seconds"),
        "format": facts.format,
        "taken": None if facts.taken is None else facts.taken.isoformat(),
        "camera": facts.camera,
        "quantisation": None if facts.quantisation is None else round(facts.quantisation, 2),
    }
