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

ROOT = Path(__file__).parents[1]
RUNS = 9 * 6  # rows and tasks of the smallest table


def table(folder: Path) -> subprocess.Popen:
    """train_vit.py, as short as it gets, with runs/ in a folder and a process group of its own."""
    options = ["--seeds", "1", "--epochs", "1", "--batch-size", "100", "--jobs", "2"]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, ROOT / "train_vit.py", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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


STOPS = {  # how, and the last line that the user reads
    "Ctrl-C": (lambda process: os.killpg(process.pid, signal.SIGINT), "interrupted: finished"),
    "a signal": (lambda process: process.send_signal(signal.SIGINT), "interrupted: finished"),
    "no worker": (kill_a_worker, "a worker was killed (out of memory?)"),
    "no power": (lambda process: process.kill(), ""),
}


def stop(folder: Path, how: str, draw: random.Random) -> None:
    """Start a table and stop it some runs later; what is left on disk is whole."""
    wanted = len(finished(folder)) + draw.randint(2, 8)
    process = table(folder)
    while process.poll() is None and len(finished(folder)) < wanted:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    act, message = STOPS[how]
    act(process)
    if message:
        _, errors = process.communicate(timeout=60)
        last = errors.strip().splitlines()[-1]
        assert process.returncode == 1 and last.startswith(message), errors[-2000:]
        assert "Traceback" not in errors, errors[-2000:]
    else:
        process.wait()
        process.stderr.close()
    for file in finished(folder):
        json.loads(file.read_text())


@pytest.mark.slow
def test_a_table_stopped_in_every_way_ends_as_an_uninterrupted_one(tmp_path):
    wanted, draw = whole(tmp_path / "whole"), random.Random(0)
    for how in STOPS:
        stop(tmp_path / "stopped", how, draw)
    assert 8 <= len(finished(tmp_path / "stopped")) < RUNS
    assert whole(tmp_path / "stopped") == wanted
