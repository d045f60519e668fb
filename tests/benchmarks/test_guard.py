"""The guard of throughput and kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.guard import fastest_rounds, main, read_baseline, slowdowns

NAMES = [f"benchmarks/bench_{suite}.py::bench[{i}]" for suite in ("one", "two") for i in range(5)]
XEON = {"brand_raw": "Xeon", "family": 6, "model": 143, "count": 2, "flags": ["avx2", "avx512f"], "hz_actual": [2]}
Capsys = pytest.CaptureFixture[str]


def results(path: Path, seconds: dict[str, float], **machine: Any) -> Path:
    rows = [{"fullname": name, "stats": {"min": value, "median": 9 * value}} for name, value in seconds.items()]
    about = machine if "gpu" in machine else {"cpu": {**XEON, **machine}}
    path.write_text(json.dumps({"machine_info": about, "commit_info": {"id": "abc"}, "benchmarks": rows}))
    return path


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    first = results(tmp_path / "first.json", {name: 0.001 * (k + 1) for k, name in enumerate(NAMES)})
    assert main([str(first), str(tmp_path / "base.json"), "--write"]) == 0
    return tmp_path / "base.json"


def changed(stored: Path, name: str, pace: float, factors: dict[str, float] | None = None, **machine: Any) -> str:
    seconds = {n: pace * s * (factors or {}).get(n, 1.0) for n, s in read_baseline(stored).items()}
    return str(results(stored.with_name(name), seconds, **machine))


def test_baseline_keeps_times_and_machine(stored: Path) -> None:
    assert read_baseline(stored) == {name: pytest.approx(0.001 * (k + 1)) for k, name in enumerate(NAMES)}
    about = json.loads(stored.read_text())
    machine = {"processor": "Xeon", "family": 6, "model": 143, "cores": 2, "flags": "avx2 avx512f"}
    assert (about["machine"], about["commit"]) == (machine, "abc")
    assert [path.name for path in stored.parent.iterdir() if "tmp" in path.name] == []


def test_a_uniform_slowdown_on_the_same_machine_is_seen(stored: Path, capsys: Capsys) -> None:
    assert main([changed(stored, "a.json", 1.2), str(stored)]) == 0
    assert "in the median 1.20 times" in capsys.readouterr().out
    assert main([changed(stored, "b.json", 1.5), str(stored)]) == 1
    printed = capsys.readouterr().out
    assert "everything is slower" in printed
    assert all(f"slower     {name}: 1.50 times (" in printed for name in NAMES)
    assert main([changed(stored, "c.json", 1.5), str(stored), "--slowdown", "1.6"]) == 0


def test_one_benchmark_that_falls_behind_is_seen_even_where_all_got_faster(stored: Path, capsys: Capsys) -> None:
    assert main([changed(stored, "a.json", 0.6, {NAMES[3]: 1.5}), str(stored)]) == 1
    printed = capsys.readouterr().out
    assert f"slower     {NAMES[3]}: 0.90 times, 1.50 of the others (4 -> 3.6 ms)" in printed
    assert printed.count("slower ") == 1


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"brand_raw": "AMD EPYC"}, "another machine: processor Xeon; these results: processor AMD EPYC"),
        ({"model": 207}, "another machine: model 143; these results: model 207"),
        ({"count": 64}, "another machine: cores 2; these results: cores 64"),
        ({"flags": ["amx_bf16", "avx2", "avx512f"]}, "a machine with other instruction sets: amx_bf16"),
        ({"gpu": "X"}, "another machine: processor Xeon, family 6, model 143, cores 2; these results: processor ?"),
    ],
)
def test_a_baseline_of_another_machine_is_none(stored: Path, capsys: Capsys, machine: Any, message: str) -> None:
    assert main([changed(stored, "a.json", 1.0, **machine), str(stored)]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"no baseline: {stored} is of {message}" in printed.err
    about = json.loads(stored.read_text())
    stored.write_text(json.dumps({**about, "machine": "Xeon, 2 cores"}))
    assert main([changed(stored, "b.json", 1.0), str(stored)]) == 3
    assert "does not say which machine it is of" in capsys.readouterr().err


def test_clock_rates_are_no_other_machine(stored: Path) -> None:
    assert main([changed(stored, "a.json", 1.0, hz_actual=[3]), str(stored)]) == 0


def test_one_suite_is_compared_with_its_part(stored: Path, tmp_path: Path, capsys: Capsys) -> None:
    seconds = {name: value for name, value in read_baseline(stored).items() if "bench_two" in name}
    assert main([str(results(tmp_path / "two.json", seconds)), str(stored)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 benchmarks")
    assert "missing" not in printed
    del seconds[NAMES[-1]]
    assert (
        main([str(results(tmp_path / "two.json", {**seconds, "benchmarks/bench_two.py::other": 1.0})), str(stored)])
        == 1
    )
    printed = capsys.readouterr().out
    assert f"missing    {NAMES[-1]}" in printed
    assert "new        benchmarks/bench_two.py::other" in printed


def test_writing_one_suite_keeps_the_others_of_the_same_machine(stored: Path, tmp_path: Path) -> None:
    before = read_baseline(stored)
    assert main([str(results(tmp_path / "one.json", {NAMES[0]: 7.0})), str(stored), "--write"]) == 0
    assert read_baseline(stored) == {NAMES[0]: 7.0} | {n: s for n, s in before.items() if "bench_two" in n}
    assert main([str(results(tmp_path / "other.json", {NAMES[1]: 8.0}, count=9)), str(stored), "--write"]) == 0
    assert read_baseline(stored) == {NAMES[1]: 8.0}


def test_bad_files_are_named(stored: Path, tmp_path: Path, capsys: Capsys) -> None:
    for text, complaint in (
        ("no json", "is no JSON file"),
        ("[]", "holds no JSON object"),
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
def test_stored_baselines_are_readable_and_know_their_machine(path: Path) -> None:
    assert all(seconds > 0 for seconds in read_baseline(path).values())
    assert json.loads(path.read_text())["machine"].keys() & {"processor", "gpu"}


def kernel(name: str, arch: int, **numbers: int) -> dict[str, Any]:
    about = {"kernel": name, "arch": arch, "patches": 196, "channels": 384, "gamma": 3.0, "dtype": "bfloat16"}
    usual = {"registers": 98, "shared": 88_064, "instructions": 4_000, "stack": 0, "local": 0, "overwritten": 0}
    return {**about, **usual, "mma": 0, "wgmma": 25, "cp_async": 30, "vector_loads": 18, **numbers}


def resources(**changes: Any) -> dict[str, Any]:
    return {
        "versions": {"triton": "3.8.0"},
        "bytes": {"forward": 90.9e6},
        "triton_launches": 5,
        "aten_operators": ["sum"],
        "kernels": [kernel("copynce_bwd", 90), kernel("copynce_bwd", 80, wgmma=0, mma=104), kernel("copynce_fwd", 90)],
        "missed": [],
        **changes,
    }


def compared(tmp_path: Path, capsys: Capsys, after: dict[str, Any], before: dict[str, Any]) -> tuple[int, str]:
    for name, content in (("after", after), ("before", before)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    status = main([str(tmp_path / "after.json"), str(tmp_path / "before.json")])
    return status, capsys.readouterr().out


def test_kernels_before_and_after_side_by_side(tmp_path: Path, capsys: Capsys) -> None:
    before = resources()
    assert compared(tmp_path, capsys, before, before) == (0, "3 kernels in both, 0 changed\n")

    better = copy.deepcopy(before)
    better["kernels"][0] |= {"registers": 90, "instructions": 3_900, "wgmma": 13}
    status, printed = compared(tmp_path, capsys, better, before)
    assert status == 0
    line = "copynce_bwd sm_90 L=196 D=384 gamma=3 bfloat16   registers 98 -> 90   shared 88,064"
    assert printed.startswith(f"{line}   instructions 4,000 -> 3,900   wgmma 25 -> 13\n")
    assert "3 kernels in both, 1 changed" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 99}, "registers 98 -> 99"),
        ({"shared": 90_112}, "shared 88,064 -> 90,112"),
        ({"instructions": 4_001}, "instructions 4,000 -> 4,001"),
        ({"stack": 16, "local": 4}, "stack 0 -> 16"),
        ({"overwritten": 1}, "overwritten 0 -> 1"),
        ({"wgmma": 0, "mma": 64}, "wgmma 25 -> 0"),
        ({"cp_async": 0}, "cp_async 30 -> 0"),
        ({"vector_loads": 0}, "vector_loads 18 -> 0"),
    ],
)
def test_what_is_worse_in_a_kernel_is_named(
    tmp_path: Path, capsys: Capsys, changes: dict[str, int], message: str
) -> None:
    after = resources()
    after["kernels"][0] |= changes
    status, printed = compared(tmp_path, capsys, after, resources())
    assert status == 1
    assert f"worse      copynce_bwd sm_90 L=196 D=384 gamma=3 bfloat16: {message}" in printed


def test_what_is_worse_in_a_step_is_named(tmp_path: Path, capsys: Capsys) -> None:
    after = resources(bytes={"forward": 92e6}, triton_launches=6, aten_operators=["sum", "mul"], missed=["forward: 92"])
    after["kernels"] = [*after["kernels"][1:], kernel("copynce_new", 90)]
    after["versions"] = {"triton": "3.9.0"}
    status, printed = compared(tmp_path, capsys, after, resources())
    assert status == 1
    for line in (
        "compiled by Triton 3.8.0 before, by 3.9.0 now",
        "new        copynce_new sm_90",
        "missing    copynce_bwd sm_90",
        "worse      bytes of forward: 90,900,000 -> 92,000,000",
        "worse      triton_launches: 5 -> 6",
        "worse      aten_operators: 1 -> 2",
        "bar        forward: 92",
    ):
        assert line in printed, line


def test_kernels_and_times_are_not_mixed(stored: Path, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "aot.json").write_text(json.dumps(resources()))
    assert main([str(tmp_path / "aot.json"), str(stored)]) == 2
    assert "base.json is no file of benchmarks.kernels --aot" in capsys.readouterr().err
    assert main([str(tmp_path / "aot.json"), str(stored), "--write"]) == 2
    assert main([changed(stored, "a.json", 1.0), str(tmp_path / "aot.json")]) == 2
