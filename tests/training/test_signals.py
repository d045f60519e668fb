"""Signals that ask a training to stop, sent for real; what continues equals what was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copynce.config import save_config
from copynce.errors import Stopped
from copynce.training import TrainConfig, checkpoints, read_events, read_log, train
from copynce.training.distributed import World
from copynce.training.run import RunFolder
from copynce.training.signals import StopRequest

Tiny = Callable[..., TrainConfig]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
STEPS = ("optim.steps=6", "checkpoint_every=4", "model.drop_path=0.2", "device=cpu")


@pytest.fixture(autouse=True)
def _python_takes_signals() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would the tests."""
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_equal(one: Path, other: Path) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    first, second = (read_log(folder.parents[1] / "log.jsonl") for folder in (one, other))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


#: The command itself, which after step 3 sends Ctrl-C to all processes of its group.
_COMMAND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

from copynce import training
from copynce.cli import main
from copynce.training import trainer

run = trainer.train
training.train = lambda config: run(config, on_step=lambda step: step == 3 and os.killpg(0, signal.SIGINT))
if __name__ == "__main__":
    sys.exit(main(["train", sys.argv[1]]))
"""


def command(config: TrainConfig) -> subprocess.Popen[str]:
    file = Path(f"{config.out}.yaml")
    save_config(config, file)
    script = file.with_suffix(".py")
    script.write_text(_COMMAND)
    return subprocess.Popen(
        [sys.executable, str(script), str(file)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def test_each_signal_saves_after_its_step_and_the_same_command_continues(tiny: Tiny) -> None:
    """To this process; Ctrl-C to another and its worker, with the tee that read its output gone."""
    interrupted = tiny(*STEPS, "data.processes=1", out="SIGINT")
    process = command(interrupted)
    assert process.stderr is not None
    process.stderr.close()

    whole = train(tiny(*STEPS, out="whole"))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and then a run ignores it
        config = tiny(*STEPS, out=number.name)
        with pytest.raises(Stopped) as caught:
            train(config, on_step=lambda step, number=number: step == 3 and os.kill(os.getpid(), number))  # type: ignore[misc]
        assert caught.value.exit_status == 75
        saved = f"{config.out}/checkpoints/step-00000003"
        said = f"stopped by {number.name} after step 3 of 6, saved as {saved}; the same command continues the run"
        assert str(caught.value) == said
        assert [(event["event"], event["step"]) for event in read_events(Path(config.out) / "log.jsonl")] == [
            ("stopped", 3)
        ]
        assert_equal(whole, train(config))
        assert not (Path(config.out) / "config-1.yaml").exists()

    assert process.wait(timeout=300) == 75
    (event,) = read_events(Path(interrupted.out) / "log.jsonl")
    assert event["text"] == "stopped by SIGINT after step 3 of 6"
    assert checkpoints(Path(interrupted.out))[-1].name == "step-00000003"
    assert_equal(whole, train(interrupted))


#: A rank, and with what it ends. Refused, it ends as done: else torchrun would end the other before it can tell.
_RANK = """
import os, sys
from copynce.errors import RunError, Stopped
from copynce.training import TrainConfig, load_config, train

config, rank = load_config(TrainConfig, sys.argv[1], []), os.environ["RANK"]
try:
    train(config)
except RunError as error:
    print(f"rank {rank} refused: {error}", file=sys.stderr, flush=True)
except Stopped as error:
    print(f"rank {rank} {error}", file=sys.stderr, flush=True)
    sys.exit(75)
"""


def test_two_processes_are_refused_together_and_stop_after_the_same_step(tiny: Tiny, tmp_path: Path) -> None:
    """One lock for both; torchrun passes SIGTERM on to both."""
    config = tiny("data.batch_size=5", "optim.steps=4000", "checkpoint_every=9000", "device=cpu")
    save_config(config, tmp_path / "two.yaml")
    (tmp_path / "rank.py").write_text(_RANK)

    def torchrun() -> subprocess.Popen[str]:
        script, settings = str(tmp_path / "rank.py"), str(tmp_path / "two.yaml")
        arguments = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, settings]
        return subprocess.Popen(
            [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
        )

    with RunFolder(Path(config.out), World(0, 1, torch.device("cpu"))):
        _, told = torchrun().communicate(timeout=300)
    refused = [line for line in told.splitlines() if " refused: " in line]
    assert {line.split(" refused")[0] for line in refused} == {"rank 0", "rank 1"}, told
    assert all(f"{config.out} is in use by process {os.getpid()} on " in line for line in refused)
    ranks = torchrun()
    assert ranks.stderr is not None
    for line in ranks.stderr:
        if line.startswith("step 1/"):
            break
    ranks.send_signal(signal.SIGTERM)
    ended = {
        line.split(" stopped")[0]: line.split(" after ")[1] for line in ranks.stderr if " stopped by SIGTERM" in line
    }
    ranks.wait(timeout=200)
    (event,) = read_events(Path(config.out) / "log.jsonl")
    step = event["step"]
    assert ended.keys() >= {"rank 0", "rank 1"}
    assert len({text for rank, text in ended.items() if rank.startswith("rank")}) == 1
    assert f"step {step} of 4000" in ended["rank 1"]
    assert checkpoints(Path(config.out))[-1].name == f"step-{step:08d}" != "step-00000000"
    assert read_log(Path(config.out) / "log.jsonl")[-1]["step"] == step


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            stop.defer()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT  # which a shell reports as 130


def test_before_the_first_step_a_signal_ends_the_run_where_it_arrives() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def wait() -> None:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
        wait()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """nohup's SIGHUP; and outside of the main thread Python gives no signals."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
        thread = threading.Thread(target=lambda: StopRequest().__enter__())
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_noted_signal_waits_until_the_loop_asks(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # some schedulers repeat it
        assert stop.name == "SIGTERM"
    assert capfd.readouterr().err.count("the run saves after this step") == 1
