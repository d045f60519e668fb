"""Processes of one group without a launcher that would end the others: forks of this one, which has imported all.

Arguments: a folder, and JSON [[[argument, ...] of each rank, ...] of each case]; a rank whose first argument is
"killed" is, by itself, after step 3; with "srun" in its place it finds what Slurm says, and nothing of torchrun's.
With a third argument, "sgd", trainings have that optimiser in AdamW's place, which would make a step of what rounding
leaves of a gradient that is zero. Prints JSON, for each case {"statuses": of each rank, null where it had to be
ended, "errors": what each wrote to stderr, "seconds"}.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import copynce.training.trainer  # noqa: F401 - before the forks
from copynce import training
from copynce.cli import main

PATIENCE = 300.0  # seconds, for a first run that compiles on a busy machine; gloo's own time-out is longer


def child(arguments: list[str], rank: int, size: int, port: int, errors: Path) -> None:
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    if arguments[0] == "srun":
        arguments = arguments[1:]
        os.environ.update(SLURM_STEP_NUM_TASKS=str(size), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        os.environ.update(SLURM_STEP_NODELIST="127.0.0.1", SLURM_JOB_ID="7", MASTER_PORT=str(port))
    else:
        os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if arguments[0] == "killed":
        arguments, whole = arguments[1:], training.train
        training.train = lambda config: whole(
            config, on_step=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGKILL)
        )
    status = 1  # what Python ends with after a traceback
    try:
        status = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def run(case: list[list[str]], folder: Path) -> dict[str, object]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    running: dict[int, int] = {}  # process -> rank
    for rank, arguments in enumerate(case):
        process = os.fork()
        if process == 0:
            child(arguments, rank, len(case), port, folder / str(rank))
        running[process] = rank
    statuses: list[int | None] = [None] * len(case)
    while running and time.monotonic() - begin < PATIENCE:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    errors = [(folder / str(rank)).read_text() for rank in range(len(case))]
    return {"statuses": statuses, "errors": errors, "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    if sys.argv[3:] == ["sgd"]:
        torch.optim.AdamW = lambda groups, lr, betas, fused: torch.optim.SGD(groups, lr=lr, fused=fused)
    print(json.dumps([run(case, Path(sys.argv[1]) / str(i)) for i, case in enumerate(json.loads(sys.argv[2]))]))
