"""A table that is stopped, in each of the ways there are, ends as an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "train_vit.py"
RUNS = 9 * 6  # rows and tasks of the smallest table


def table(folder: Path) -> subprocess.Popen:
    """train_vit.py, as short as it gets, with runs/ in a folder and a process group of its own."""
    options = ["--seeds", "1", "--epochs", "1", "--batch-size", "100", "--jobs", "2"]
    folder.mkdir(exist_ok=True)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    launch = [sys.executable, SCRIPT, *options]
    # What a shell starts in the background ignores Ctrl-C, and so would its children.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(launch, cwd=folder, start_new_session=True, **pipes)


def finished(folder: Path) -> list[Path]:
    return list(folder.glob("runs/vit-*/finished/*.json"))


def whole(folder: Path) -> bytes:
    """The results file of a table that nobody disturbs."""
    process = table(folder)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-2000:]
    (out,) = folder.glob("runs/vit-*/vit_digits.json")
    assert len(finished(folder)) == len(json.loads(out.read_text())["runs"]) == RUNS
    return out.read_bytes()


def kill_a_worker(process: subprocess.Popen) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "popen_loky_posix" in " ".join(child.cmdline())]
    workers[0].kill()


STOPS = [  # how, and the last line that the user reads
    (lambda process: os.killpg(process.pid, signal.SIGINT), "interrupted: finished"),  # Ctrl-C
    (lambda process: process.send_signal(signal.SIGINT), "interrupted: finished"),
    (kill_a_worker, "a worker was killed (out of memory?)"),
    (lambda process: process.kill(), None),  # as without power
]


@pytest.mark.slow
def test_a_table_stopped_in_every_way_ends_as_an_uninterrupted_one(tmp_path):
    wanted, draw, folder = whole(tmp_path / "whole"), random.Random(0), tmp_path / "stopped"
    for stop, message in STOPS:
        count = len(finished(folder)) + draw.randint(2, 8)
        process = table(folder)
        while process.poll() is None and len(finished(folder)) < count:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        stop(process)
        if message:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 1 and "Traceback" not in errors, errors[-2000:]
            assert errors.strip().splitlines()[-1].startswith(message), errors[-2000:]
        else:
            process.wait()  # its workers have its pipe: they end with the run in hand
            process.stderr.close()
        for file in finished(folder):
            json.loads(file.read_text())  # what is left on disk is whole
    assert 8 <= len(finished(folder)) < RUNS
    assert whole(folder) == wanted
