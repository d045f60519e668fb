"""The run's folder: one owner, nothing written before all is checked, a record that tells what happened."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from copynce.cli import main
from copynce.config import load_config, save_config
from copynce.errors import ConfigError, RunError, TrainingError, WriteError
from copynce.models import read_checkpoint_metadata
from copynce.training import DescriptorLossConfig, TrainConfig, checkpoints, find_model, read_events, read_log, train
from copynce.training.checkpoints import write_checkpoint
from copynce.training.log import RunLog
from copynce.training.run import FIXED, FREE, compare

Tiny = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 0, 2 and 4; copied by those who use it."""
    folder = tmp_path_factory.mktemp("finished")
    train(load_config(TrainConfig, None, [*settings(pictures, folder / "run"), "optim.steps=4"]))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def settings(pictures: Path, out: Path) -> list[str]:
    return [
        f"out={out}",
        f"data.train={pictures}",
        "data.batch_size=4",
        "data.threads=1",
        "model.img_size=32",
        "model.dim=16",
        "model.backbone_options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "checkpoint_every=2",
        "log_every=1",
        "threads=1",
        "tensorboard=false",
        "device=cpu",
    ]


@pytest.fixture
def go_on(pictures: Path, run: Path) -> Callable[..., Path]:
    """Continue ``run`` to six steps, with further overrides."""

    def go(*overrides: str) -> Path:
        return train(load_config(TrainConfig, None, [*settings(pictures, run), "optim.steps=6", *overrides]))

    return go


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# One owner


def test_a_second_training_in_a_folder_is_refused_and_told_who_holds_it(tiny: Tiny) -> None:
    config = tiny("optim.steps=2")
    refused = []

    def begin_another(step: int) -> None:
        with pytest.raises(RunError) as caught:
            train(config)
        refused.append(str(caught.value))

    train(config, on_step=begin_another)
    assert len(refused) == 2
    assert f"{config.out} is in use by process {os.getpid()} on {os.uname().nodename}, since 2" in refused[0]
    assert [line["step"] for line in read_log(Path(config.out) / "log.jsonl")] == [1, 2]
    assert train(config).name == "step-00000002", "the lock ended with its training"


def test_a_lock_file_that_a_killed_process_left_is_no_lock(run: Path, go_on: Callable[..., Path]) -> None:
    (run / ".lock").write_text("process 1 on elsewhere, since long ago\n")
    assert go_on().name == "step-00000006"


def test_where_a_file_system_has_no_locks_the_run_goes_on_and_says_so(
    go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert go_on().name == "step-00000006"
    assert "has no locks (No locks available); the run goes on" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_and_left_as_it_is(
    run: Path, go_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played, for some users may write anywhere."""
    before, opened = content(run), os.open

    def read_only(path: object, flags: int, *others: int) -> int:
        if flags & os.O_RDWR and str(path).startswith(str(run)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(RunError, match=r"run cannot be written \(Read-only file system\); choose another out"):
        go_on()
    assert content(run) == before


# Every check before any write


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere", "nowhere: no such file or folder"),
        ("data.batch_size=30", "choose a smaller batch"),
        ("weights=nothing.safetensors", r"weights=nothing\.safetensors: no such file or folder"),
        ("weights=notes.txt", r"notes\.txt"),
        ("data.neighbours=nothing.npy", r"nothing\.npy"),
    ],
)
def test_a_wrong_input_leaves_nothing_behind_on_any_try(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no weights")
    config = tiny(override, out="a/b/run")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            train(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_leaves_nothing_behind(tiny: Tiny) -> None:
    config = tiny("device=gpu")
    with pytest.raises(ConfigError):
        train(config)
    assert not Path(config.out).exists()


def test_a_refusal_changes_no_file_of_a_run(run: Path, go_on: Callable[..., Path]) -> None:
    (run / ".lock").unlink()
    before = content(run)
    for override in ("seed=7", "resume=never", "weights=nothing.safetensors", "optim.steps=3", "data.train=nowhere"):
        with pytest.raises(ValueError, match=r".+"):
            go_on(override)
        assert content(run) == before, override


def test_a_file_in_the_run_folders_place_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="run is a file, expected a folder"):
        train(tiny())
    assert (tmp_path / "run").read_text() == "mine"


def test_missing_weights_never_end_well_though_the_run_began_without_them(run: Path, pictures: Path) -> None:
    """A run of no step, whose step 0 used to be taken for one that began with the weights."""
    shutil.rmtree(run)
    base = [*settings(pictures, run), "optim.steps=0"]
    assert main(["train", *base]) == 0
    for _ in range(2):
        assert main(["train", *base, f"weights={run.parent / 'nothing.safetensors'}"]) == 2
    # There, but not what the run began with.
    other = run / "checkpoints" / "step-00000000" / "model.safetensors"
    assert main(["train", *base, f"weights={other}"]) == 2


# Settings on resume


def test_every_setting_is_either_fixed_or_free(tiny: Tiny) -> None:
    """A new setting needs a decision: its name, or its section's, in FIXED, or its name in FREE."""

    def names(kind: Any, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(kind):
            value = getattr(kind, field.name)
            if dataclasses.is_dataclass(value):
                yield from names(value, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name

    every = set(names(tiny()))
    assert FREE.keys() <= every
    assert {name for name in every if name not in FREE and name.split(".")[0] not in FIXED} == set()
    assert {name for name in FIXED if "." in name and name not in every} == set()


@pytest.mark.parametrize(
    "override",
    [
        "model.dim=8",
        "model.img_size=64",
        "model.head=cls",
        "model.freeze_patch_embed=false",
        "model.drop_path=0.3",
        "optim.lr=1",
        "optim.betas=[0.8,0.9]",
        "ema=0.9",
        "loss.copynce_weight=0",
        "loss.temperature=0.1",
        "data.policy=light",
        "data.max_megapixels=5",
        "seed=7",
    ],
)
def test_a_setting_that_makes_the_run_is_refused_with_old_and_new(
    run: Path, go_on: Callable[..., Path], pictures: Path, override: str
) -> None:
    name = override.split("=")[0]
    before = load_config(TrainConfig, run / "config.yaml", [])
    now = load_config(TrainConfig, None, [*settings(pictures, run), "optim.steps=4", override])
    ((found, (old, new)),) = compare(before, now).items()
    assert found == name
    with pytest.raises(RunError) as caught:
        go_on(override)
    assert f"{name} was {old}, got {new} (" in str(caught.value)
    assert f"weights={run} gives the model trained so far" in str(caught.value)
    assert not (run / "config-1.yaml").exists()


def test_other_pictures_are_refused_by_their_place_or_by_their_names(
    run: Path, go_on: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    with pytest.raises(RunError, match=r"data\.train was .*if the same files only moved, write their new place into"):
        go_on(f"data.train={other}")
    moved = load_config(TrainConfig, run / "config.yaml", [f"data.train={other}"])
    save_config(moved, run / "config.yaml")
    first = min(other.iterdir())
    first.rename(first.with_stem("z"))
    with pytest.raises(RunError, match=r"pictures=[0-9a-f]+, got [0-9a-f]+"):
        go_on(f"data.train={other}")
    first.with_stem("z").rename(first)
    assert go_on(f"data.train={os.path.relpath(other)}/").name == "step-00000006", "the same place, written otherwise"


def test_harmless_settings_are_listed_logged_and_the_old_ones_kept(
    run: Path, go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old = (run / "config.yaml").read_bytes()
    last = go_on("data.processes=1", "checkpoint_every=1")
    error = capsys.readouterr().err
    (event,) = read_events(run / "log.jsonl")
    assert event["event"] == "settings changed"
    assert event["step"] == 4
    changes = {"optim.steps": [4, 6], "data.processes": [0, 1], "checkpoint_every": [2, 1]}
    assert {name: event["changes"][name] for name in changes} == changes
    assert "data.processes 0 -> 1" in error
    assert "optim.steps 4 -> 6" in error
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (run / "config-1.yaml").read_bytes() == old
    assert load_config(TrainConfig, run / "config.yaml", []).data.processes == 1
    # Nothing changed, nothing to do: nothing is written.
    before = content(run)
    assert go_on("data.processes=1", "checkpoint_every=1") == last
    assert content(run) == before


def test_fewer_steps_than_are_done_are_refused(go_on: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match="has 4 steps already, more than the 3"):
        go_on("optim.steps=3")


def test_weights_may_be_left_out_or_moved_but_not_exchanged(
    tiny: Tiny, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copy(finished / "checkpoints" / "step-00000004" / "model.safetensors", tmp_path / "w.safetensors")
    train(tiny(f"weights={mine}", "optim.steps=1"))
    assert f"{mine}: the encoder is taken; the head is taken" in capsys.readouterr().err
    assert read_events(tmp_path / "run" / "log.jsonl")[0]["event"] == "weights"
    moved = shutil.copy(mine, tmp_path / "moved.safetensors")
    train(tiny(f"weights={moved}", "optim.steps=2"))
    shutil.copy(finished / "checkpoints" / "step-00000002" / "model.safetensors", mine)
    with pytest.raises(RunError, match=r"weights was .*which holds others"):
        train(tiny(f"weights={mine}", "optim.steps=3"))
    Path(mine).unlink()
    with pytest.raises(ConfigError, match="a run that is continued needs them no more: leave weights out"):
        train(tiny(f"weights={mine}", "optim.steps=3"))
    assert train(tiny("optim.steps=3")).name == "step-00000003"


def test_a_run_gives_a_new_one_its_model_head_and_temperature(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    start = train(tiny(f"weights={finished}", "optim.steps=0", "seed=9"))
    last = finished / "checkpoints" / "step-00000004"
    trained = load_file(last / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in load_file(start / "model.safetensors").items())
    scales = [torch.load(folder / "state.pt", weights_only=True)["objective"]["log_scale"] for folder in (start, last)]
    assert scales[0] == scales[1] != DescriptorLossConfig().log_scale
    (event,) = read_events(tmp_path / "run" / "log.jsonl")
    assert "the head is taken" in event["text"]
    assert "temperature is taken" in event["text"]
    card = read_checkpoint_metadata(start / "model.safetensors")
    assert card["start"]["card"]["step"] == 4
    # What a run began with is told by its later checkpoints too.
    later = train(tiny("optim.steps=1", "seed=9"))
    assert read_checkpoint_metadata(later / "model.safetensors")["start"] == card["start"]


def test_a_damaged_config_is_named_and_a_missing_one_replaced(
    run: Path, go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text("::: not yaml")
    with pytest.raises(RunError, match=r"config\.yaml does not tell the settings of the run"):
        go_on()
    (run / "config.yaml").unlink()
    with pytest.raises(RunError, match="holds another model"):
        go_on("model.dim=8")
    go_on()
    assert "has no config.yaml, so the settings given now are taken" in capsys.readouterr().err
    assert (run / "config.yaml").exists()


# Checkpoints


def spoil(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "absent":
        path.unlink()
    elif how == "zeros":
        path.write_bytes(bytes(size))
    elif how == "one bit":
        data = bytearray(path.read_bytes())
        data[size // 2] ^= 1
        path.write_bytes(data)
    else:
        os.truncate(path, {"empty": 0, "half": size // 2, "nearly all": size - 10}[how])


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors", "checksums.json"])
@pytest.mark.parametrize("how", ["absent", "empty", "half", "nearly all", "zeros", "one bit"])
def test_damage_is_found(run: Path, file: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    from copynce.training.checkpoints import damage, newest_whole

    before, newest = checkpoints(run)[-2:]
    assert damage(newest) is None
    spoil(newest / file, how)
    found, damaged = newest_whole(run)
    if file == "checksums.json" and how in ("absent", "one bit"):
        # Without it the files are judged by reading them; a bit of it may fall on a space or a digit.
        assert found in (newest, before)
        return
    assert found == before
    assert [folder for folder, _ in damaged] == [newest]
    assert file in damaged[0][1]
    if file == "state.pt":
        assert find_model(run).parent == newest, "evaluation does not need the state"
        return
    assert find_model(run) == before / "model.safetensors"
    assert f"{newest} is damaged: {damaged[0][1]}; {before.name} is taken instead" in capsys.readouterr().err
    for named in (newest, newest / "model.safetensors"):
        if named.exists():
            with pytest.raises(RunError, match="step-00000004 is damaged"):
                find_model(named)


@pytest.mark.parametrize("what", ["a bit", "an empty folder", "a file"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_continues(
    run: Path, finished: Path, go_on: Callable[..., Path], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints(run)[-1]
    if what == "a bit":
        spoil(newest / "state.pt", "one bit")
    else:
        shutil.rmtree(newest)
        newest.mkdir() if what == "an empty folder" else newest.write_text("")
    last = load_file(go_on() / "model.safetensors")
    error = capsys.readouterr().err
    (event, _) = read_events(run / "log.jsonl")
    assert event["event"] == "checkpoint damaged"
    assert event["text"] in error
    assert f"{newest} is damaged" in error
    assert "the run continues from step 2, and it is now damaged-step-00000004" in error
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "damaged-step-00000004",
        "step-00000000",
        "step-00000004",
        "step-00000006",
    ]
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    # As if the damaged one had never been.
    shutil.rmtree(run)
    shutil.copytree(finished, run)
    shutil.rmtree(newest)
    again = load_file(go_on() / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in last.items())


def test_no_whole_checkpoint_is_an_error_and_no_new_beginning(run: Path, go_on: Callable[..., Path]) -> None:
    for folder in checkpoints(run):
        spoil(folder / "model.safetensors", "half")
    before = content(run)
    with pytest.raises(RunError, match=r"none of its checkpoints is whole .*4: model\.safetensors has"):
        go_on()
    with pytest.raises(RunError, match="none of its checkpoints is whole"):
        find_model(run)
    assert content(run).keys() == before.keys()


def test_checkpoints_of_before_there_were_checksums_continue(run: Path, go_on: Callable[..., Path]) -> None:
    for folder in checkpoints(run):
        (folder / "checksums.json").unlink()
    spoil(checkpoints(run)[-1] / "state.pt", "half")
    go_on()
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir()
    assert checkpoints(run)[-1].name == "step-00000006"


def test_what_a_kill_left_half_written_is_removed(run: Path, go_on: Callable[..., Path]) -> None:
    part = run / "checkpoints" / ".step-00000099.part"
    part.mkdir()
    (part / "model.safetensors").write_text("x")
    go_on()
    assert not part.exists()


@pytest.fixture
def little_room() -> Iterator[Callable[[int], None]]:
    """Files of this process cannot grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full_at", ["model.safetensors", "state.pt"])
def test_a_full_disk_while_saving_is_a_sentence_and_spoils_nothing(
    tiny: Tiny, little_room: Callable[[int], None], full_at: str
) -> None:
    config = tiny(out="full")
    model = 30_000
    checkpoint = train(tiny("optim.steps=1", out="full"))
    sizes = {name: (checkpoint / name).stat().st_size for name in ("model.safetensors", "state.pt")}
    assert sizes["model.safetensors"] < sizes["state.pt"]
    before = content(checkpoint)
    limit = sizes["model.safetensors"] + (-model if full_at == "model.safetensors" else 1000)

    def fill(step: int) -> None:
        little_room(limit)

    with pytest.raises(WriteError, match=r"step-00000003 cannot be written \(File too large\); the last checkpoint is"):
        train(config, on_step=fill)
    assert content(checkpoint) == before
    assert [path.name for path in sorted((Path(config.out) / "checkpoints").iterdir())] == [
        "step-00000000",
        "step-00000001",
    ]


def test_a_full_disk_while_logging_names_the_log(tiny: Tiny, little_room: Callable[[int], None]) -> None:
    config = tiny()
    with pytest.raises(WriteError, match=r"log\.jsonl cannot be written \(File too large\)"):
        train(config, on_step=lambda step: little_room((Path(config.out) / "log.jsonl").stat().st_size + 5))


def test_a_step_that_was_written_before_is_replaced_whole(finished: Path, tmp_path: Path) -> None:
    def save(path: Path) -> None:
        path.write_bytes(find_model(finished).read_bytes())

    first = write_checkpoint(tmp_path, 3, save, {"note": 1}, keep=1)
    again = write_checkpoint(tmp_path, 3, save, {"note": 2}, keep=1)
    assert again == first
    assert torch.load(again / "state.pt", weights_only=True) == {"note": 2}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


# The log


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text[:-20] + b"\0" * 40, "4"),
        (lambda text: b'{"loss": 1}\n' + text, "1"),
        (lambda text: text.replace(b"\n", b"\nnonsense\n", 1), "2"),
        (lambda text: text.replace(b'"step"', b"\xff\xfe", 1), "1"),
    ],
    ids=["zeros at the end", "no step", "no JSON", "no UTF-8"],
)
def test_a_spoiled_line_of_the_log_is_left_out_with_a_sentence(
    run: Path, change: Callable[[bytes], bytes], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "log.jsonl"
    log.write_bytes(change(log.read_bytes()))
    assert len(read_log(log)) in (3, 4)
    RunLog(run, first_step=3, total_steps=6)
    text = f"{log}: line {line} could not be read and was left out"
    assert text in capsys.readouterr().err
    assert read_events(log) == [{"step": 3, "event": "log repaired", "text": text}]
    assert read_log(log)[-1]["step"] == 3
    assert all("step" in json.loads(text) for text in log.read_text().splitlines())


def test_a_last_line_that_a_kill_cut_short_is_no_damage(run: Path) -> None:
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    RunLog(run, first_step=4, total_steps=6)
    assert read_events(log) == []
    assert [line["step"] for line in read_log(log)] == [1, 2, 3]


# Statuses


def test_success_bad_input_and_no_number_have_three_statuses(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*overrides: str, out: str) -> int:
        save_config(tiny("optim.steps=3", *overrides, out=out), tmp_path / f"{out}.yaml")
        return main(["train", str(tmp_path / f"{out}.yaml")])

    assert status(out="good") == 0
    assert status("data.batch_size=30", out="bad") == 2
    wild = ("optim.lr=1000", "optim.clip_norm=inf", "loss.koleo_weight=1e30")
    assert status(*wild, out="wild") == TrainingError.exit_status == 3
    error = capsys.readouterr().err
    assert "the gradient is not finite" in error
    assert f"weights={tmp_path / 'wild' / 'checkpoints' / 'step-00000000'}" in error
    assert "Traceback" not in error


def test_the_seed_of_a_step_is_the_same_everywhere() -> None:
    from copynce.training.gradients import step_seed

    assert step_seed(123, 7, 1) == 408692188110908570
    assert len({step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(5)}) == 1250
