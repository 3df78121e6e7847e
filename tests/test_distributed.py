"""Two processes under torchrun, on the CPU by gloo, against one: common.py, the scripts, FSDP2.

A case is a function that every process calls and that returns something JSON-like. This file is
also the program that torchrun starts: `-m tests.test_distributed CASE FILE` writes what the case
returned, by the first process only, so a case must be equal to itself on one process.
"""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import common
import resora
import train_vit
from tests.checks import normal, seeded
from tests.test_common import command, save_lora, tiny_task, tiny_vit
from tests.test_layers import METHODS, adapt, fill, trained

ROOT = Path(__file__).parents[1]
# Adam divides by √v + 1e-8: where a gradient is 0 but for rounding, 1e-17 of it is 1e-9 of a step.
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def torchrun(*arguments: str, seconds: float = 300) -> str:
    """What a program prints on two processes. (With --master_port 0 they would wait for ever.)"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launch, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        process.terminate()  # which torchrun passes on; a kill would leave its children behind
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
        raise
    assert process.returncode == 0, err[-3000:]
    return out


def on_two(case: str, folder: Path, *arguments: str):
    """What a case returns on two processes."""
    out = folder / f"{case}.json"
    torchrun("-m", "tests.test_distributed", case, str(out), *arguments)
    count, result = json.loads(out.read_text())
    assert count == 2
    return result


# ---------------------------------------------------------------- training and scoring

ROWS = {
    "full": {"method": "full"},
    "LoRA": {"method": "lora", "rank": 2},
    "HRA": {"method": "hra", "rank": 2, "lam": 0.1},
    "EigenLoRAx": {"method": "eigenlorax", "components": 3, "rank": 2},
    "ReSoRA": {"method": "resora", "rank": 2, "metric": "linear", "level": "weight", "lam": 0.1},
}
PICTURES = [tiny_task(15)[i] for i in range(15)]


def train(folder: str) -> dict:
    """{row: losses, trained weights, score}: 15 images in batches of 6, of which 3 are left out."""
    found = {}
    data = [{**example, "pixel_values": example["pixel_values"].double()} for example in PICTURES]
    adapters = [common.LazyAdapter(Path(folder) / str(i)) for i in range(2)]
    for name, row in ROWS.items():
        accelerate = common.accelerator()
        torch.manual_seed(0)
        model, penalty = common.build(tiny_vit(), row, adapters)
        options = dict(epochs=2, batch_size=6, lr=1e-2, seed=3)
        losses = common.train(model.double(), data, accelerate, penalty=penalty, **options)
        score = common.evaluate(model, data, accelerate, batch_size=5)
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        found[name] = [losses, torch.cat(trained).tolist(), score]
    return found | {"processes": accelerate.num_processes}


def test_two_processes_train_as_one(tmp_path):
    for i in range(2):
        save_lora(tmp_path / str(i), seed=i)
    one, two = train(str(tmp_path)), on_two("train", tmp_path, str(tmp_path))
    assert (one["processes"], two["processes"]) == (1, 2)  # not two, each on its own
    for name in ROWS:
        (losses, weights, score), (losses_2, weights_2, score_2) = one[name], two[name]
        assert np.isfinite(weights).all() and score == score_2, name
        np.testing.assert_allclose(weights_2, weights, **TOLERANCE, err_msg=name)
        np.testing.assert_allclose(losses_2, losses, rtol=4 * 2**-23, err_msg=name)  # float32 sums


def redundancies() -> list[list[float]]:
    """Of each process: ReSoRA's R in its first step of training, and its sum of weights after."""
    model, accelerate, seen = tiny_vit(), common.accelerator(), []
    resora.adapt(model, common.targets_of(model), rank=2, generator=seeded(1))
    regularizer = resora.ReSoRA(fill(model), "linear")

    def penalty(progress: float) -> torch.Tensor:
        seen.append(regularizer.penalty())
        return seen[-1]

    options = dict(epochs=1, batch_size=8, lr=1e-2, seed=3)
    common.train(model, tiny_task(8), accelerate, penalty=penalty, **options)
    weights = sum(p.detach().double().sum() for p in trained(model).values())
    return accelerate.gather(torch.stack([seen[0].detach().double(), weights])[None]).tolist()


@pytest.mark.slow
def test_each_process_sees_the_redundancy_of_its_own_rows(tmp_path):
    """R of a batch is no mean of the R of its halves; the gradients are averaged all the same."""
    (first, weights), (second, same_weights) = on_two("redundancies", tmp_path)
    assert weights == same_weights
    ((whole, other_weights),) = redundancies()
    assert abs((first + second) / 2 - whole) > 1e-3 and first != second and weights != other_weights


def files(folder: str) -> list:
    """What is left of a file and of a folder that every process wrote in its own words."""
    common.accelerator()
    mine = str(dist.get_rank()) if dist.is_initialized() else "0"
    for name in ("a", "b"):  # b is there already the second time
        with common.replacing(Path(folder) / f"{name}.txt") as temporary:
            temporary.write_text(mine)
        with common.replacing(Path(folder) / "b") as temporary:
            temporary.mkdir()
            (temporary / mine).touch()
    common.check_writable(Path(folder) / "c.json")
    common.meet()
    left = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
    return [left, (Path(folder) / "a.txt").read_text(), common.cores() == 1]


@pytest.mark.slow
def test_only_the_first_process_writes(tmp_path):
    (folder := tmp_path / "written").mkdir()
    assert on_two("files", tmp_path, str(folder)) == [["a.txt", "b", "b.txt", "b/0"], "0", True]


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, name, count",
    [
        ("train_vit.py --seeds 1 --epochs 1 --batch-size 60", "vit_digits", 9 * 6),
        ("train_glue.py --quick --epochs 1", "glue_eigenlorax", 5 * 6),
    ],
)
def test_a_script_on_two_processes_is_the_script(tmp_path, line, name, count):
    """A table whose rows recycle adapters that earlier rows wrote."""
    one, two = tmp_path / "one", tmp_path / "two"
    printed = torchrun(*line.split(), "--runs", str(two), seconds=900)
    assert printed.count("Random subspace") == 1  # one table
    # One process goes on from their backbones and LoRA adapters. Its own would differ in the last
    # digits of float32, and their components in signs and rotation, where training starts.
    shutil.copytree(two, one)
    for file in one.glob("*/finished/*.json"):
        if json.loads(file.read_text())["run"]["row"] not in ("backbone", "LoRA r=4"):
            file.unlink()
    launch = [sys.executable, *line.split(), "--runs", str(one), "--jobs", "1"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (sorted(str(f.relative_to(n)) for f in n.rglob("*")) for n in (one, two))
    assert left == right and "/." not in " ".join(right)
    left, right = (json.loads(next(n.glob(f"*/{name}.json")).read_text()) for n in (one, two))
    assert len(left["runs"]) == len(right["runs"]) == count
    for a, b in zip(left["runs"], right["runs"], strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in ("row", "task", "trainable"))
        np.testing.assert_allclose(b["losses"], a["losses"], rtol=1e-3)  # float32, four steps
        for split in {"validation", "test", "source"} & a.keys():
            assert abs(a[split] - b[split]) <= 0.01


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--jobs", "2"], "found --jobs 2 under torchrun; wanted 1"),
        (["--batch-size", "75"], "found --batch-size 75 on 2 processes; wanted a multiple"),
    ],
)
def test_torchrun_refuses_what_two_processes_cannot_do(monkeypatch, tmp_path, option, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = command(monkeypatch, train_vit, *option, "--runs", str(tmp_path))
    assert line == f"train_vit.py: error: {message}"


# ---------------------------------------------------------------- FSDP2


def fsdp() -> dict[str, list[float]]:
    """{method: trained numbers after five steps}, sharded by FSDP2 where there are processes."""
    found, count, index = {}, 1, 0
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        count, index = dist.get_world_size(), dist.get_rank()
    for method in METHODS:
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3))
        model = nn.Sequential(*blocks).double()
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        layers = adapt(method, model, names)
        if count > 1:
            for block in model:  # penalty() needs the parameters after forward
                fully_shard(block, reshard_after_forward=method != "hra")
            fully_shard(model)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        x, y = normal(2, 2, 6, 8)
        for _ in range(5):
            loss = (model(x[index::count]) - y[index::count]).square().mean()
            if method == "hra":
                loss = loss + 0.1 * sum(m.penalty() for m in layers.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = [p.full_tensor() if count > 1 else p for p in trained(model).values()]
        found[method] = torch.cat([p.detach().flatten() for p in whole]).tolist()
    return found


@pytest.mark.slow
def test_fsdp2_around_every_method_trains_as_one_process(tmp_path):
    one, two = fsdp(), on_two("fsdp", tmp_path)
    for method, wanted in one.items():
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(two[method], wanted, **TOLERANCE, err_msg=method)


CASES = {case.__name__: case for case in (train, redundancies, files, fsdp)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = CASES[sys.argv[1]](*sys.argv[3:])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps([dist.get_world_size(), result]))
    dist.destroy_process_group()
