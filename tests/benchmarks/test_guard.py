"""The guard of the throughput."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.guard import fastest_rounds, main, read_baseline, slowdowns

NAMES = [f"bench[{i}]" for i in range(9)]


def results(path: Path, seconds: dict[str, float]) -> Path:
    rows = [{"fullname": name, "stats": {"min": value, "median": 9 * value}} for name, value in seconds.items()]
    path.write_text(json.dumps({"machine_info": {"gpu": "X"}, "commit_info": {"id": "abc"}, "benchmarks": rows}))
    return path


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    first = results(tmp_path / "first.json", {name: 0.001 * (k + 1) for k, name in enumerate(NAMES)})
    assert main([str(first), str(tmp_path / "base.json"), "--write"]) == 0
    return tmp_path / "base.json"


def changed(path: Path, pace: float, **factors: float) -> Path:
    return results(
        path, {n: pace * s * factors.get(n, 1.0) for n, s in read_baseline(path.parent / "base.json").items()}
    )


def test_baseline_keeps_times_and_machine(stored: Path) -> None:
    assert read_baseline(stored) == {name: pytest.approx(0.001 * (k + 1)) for k, name in enumerate(NAMES)}
    about = json.loads(stored.read_text())
    assert (about["machine"], about["commit"]) == ("X", "abc")
    assert [path.name for path in stored.parent.iterdir() if "tmp" in path.name] == []


def test_another_machine_passes_and_one_slower_benchmark_does_not(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(changed(tmp_path / "a.json", 2.5)), str(stored)]) == 0
    assert "in the median 2.50 times" in capsys.readouterr().out
    slower = changed(tmp_path / "b.json", 2.5, **{NAMES[3]: 1.5})
    assert main([str(slower), str(stored)]) == 1
    assert f"slower     {NAMES[3]}: 1.50 times" in capsys.readouterr().out
    assert main([str(slower), str(stored), "--slowdown", "1.6"]) == 0
    assert main([str(changed(tmp_path / "c.json", 1.4)), str(stored), "--same-machine"]) == 1


def test_missing_benchmarks_are_missed_and_new_ones_listed(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = read_baseline(stored)
    del seconds[NAMES[0]]
    assert main([str(results(tmp_path / "a.json", {**seconds, "other": 1.0})), str(stored)]) == 1
    printed = capsys.readouterr().out
    assert f"missing    {NAMES[0]}" in printed
    assert "new        other" in printed


def test_bad_files_are_named(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, complaint in (
        ("no json", "is no JSON file"),
        ("{}", "is no results file"),
        ('{"benchmarks": []}', "no benchm"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=f"bad.json.*{complaint}"):
            fastest_rounds(tmp_path / "bad.json")
        assert main([str(tmp_path / "bad.json"), str(stored)]) == 2
    with pytest.raises(ValueError, match=r"bad\.json is no baseline"):
        read_baseline(tmp_path / "bad.json")
    assert main([str(tmp_path / "none.json"), str(stored)]) == 2
    with pytest.raises(ValueError, match="share no benchmark"):
        slowdowns({"a": 1.0}, {"b": 1.0})
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "benchmarks/baselines").glob("*.json")), ids=str)
def test_stored_baselines_are_readable(path: Path) -> None:
    assert all(seconds > 0 for seconds in read_baseline(path).values())
