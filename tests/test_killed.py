"""A table whose script is killed at random moments ends as an uninterrupted one.

`python -m tests.test_killed 20 --jobs 2` kills twenty times and prints what it found.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNS = 9 * 6  # rows and tasks of the smallest table


def table(folder: Path, jobs: int) -> subprocess.Popen:
    """train_vit.py, as short as it gets, with runs/ in a folder."""
    options = ["--seeds", "1", "--epochs", "1", "--batch-size", "100", "--jobs", str(jobs)]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, ROOT / "train_vit.py", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path) -> list[Path]:
    return list(folder.glob("runs/vit-*/finished/*.json"))


def whole(folder: Path, jobs: int) -> bytes:
    """The results file of a table that nobody disturbs."""
    process = table(folder, jobs)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-2000:]
    (out,) = folder.glob("runs/vit-*/vit_digits.json")
    assert len(finished(folder)) == len(json.loads(out.read_text())["runs"]) == RUNS
    return out.read_bytes()


def kill(folder: Path, jobs: int, draw: random.Random) -> dict:
    """Start a table, kill it a moment after a random number of runs; what is left on disk."""
    before = len(finished(folder))
    wanted = draw.randint(before, min(before + 12, RUNS))
    process = table(folder, jobs)
    with process:
        while process.poll() is None and len(finished(folder)) < wanted:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        with suppress(subprocess.TimeoutExpired):  # from here on to a few runs later
            process.wait(draw.choice((0.01, 0.1, 1.0)) * draw.random() + 4 * (wanted == before))
        process.send_signal(signal.SIGKILL)
    left = [path for path in folder.rglob("*.json") if path.is_file()]
    for path in left:
        if not path.name.startswith("."):
            json.loads(path.read_text())  # none is cut off
    hidden = len([path for path in folder.rglob(".*")])
    return {"runs": len(finished(folder)), "killed": process.returncode < 0, "temporary": hidden}


def killed_and_resumed(folder: Path, kills: int, jobs: int, seed: int) -> list[dict]:
    """What each of the kills left; asserts that the table then ends as if there had been none."""
    draw, found = random.Random(seed), []
    wanted = whole(folder / "whole", jobs)
    while sum(one["killed"] for one in found) < kills:
        chain = folder / f"killed{sum(one['runs'] == RUNS for one in found)}"
        found.append(kill(chain, jobs, draw))
    for chain in folder.glob("killed*"):
        assert whole(chain, jobs) == wanted
    return found


@pytest.mark.slow
def test_a_table_killed_three_times_ends_as_an_uninterrupted_one(tmp_path):
    found = killed_and_resumed(tmp_path, kills=3, jobs=2, seed=0)
    assert sum(one["killed"] for one in found) == 3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/killed"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    for one in killed_and_resumed(options.folder, options.kills, options.jobs, options.seed):
        print(one)
