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
from torch.utils.data import default_collate

import common
import eigenlorax
import hra
import resora
import train_vit
from tests.test_common import command, save_lora, tiny_task, tiny_vit

ROOT = Path(__file__).parents[1]
# Adam divides by √v + 1e-8: where a gradient is 0 but for rounding, 1e-17 of it is 1e-9 of a step.
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def torchrun(*arguments: str, seconds: float = 300) -> subprocess.CompletedProcess:
    """A program on two processes. Not --master_port 0: they would wait at port 0 for each other."""
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
    return subprocess.CompletedProcess(launch, process.returncode, out, err)


def on_two(case: str, folder: Path, *arguments: str):
    """What a case returns on two processes."""
    out = folder / f"{case}.json"
    done = torchrun("-m", "tests.test_distributed", case, str(out), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
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


def pictures(n: int = 8) -> tuple[nn.Module, common.ImageTask, resora.ReSoRA]:
    model, data = tiny_vit(), tiny_task(n)
    modules = resora.adapt(model, common.targets_of(model), rank=2)
    generator = torch.Generator().manual_seed(1)
    for module in modules.values():
        nn.init.normal_(module.A, generator=generator)
        nn.init.normal_(module.B, generator=generator)
    return model, data, resora.ReSoRA(model, "linear")


def statistics() -> list[float]:
    """ReSoRA's R in the first step of training, one for each process."""
    model, data, regulariser = pictures()
    accelerate, seen = common.accelerator(), []

    def penalty(progress: float) -> torch.Tensor:
        seen.append(regulariser.penalty())
        return seen[-1]

    options = dict(epochs=1, batch_size=8, lr=1e-2, seed=3)
    common.train(model, data, accelerate, penalty=penalty, **options)
    return accelerate.gather(seen[0].detach().view(1)).tolist()


@pytest.mark.slow
def test_each_process_sees_the_redundancy_of_its_own_rows(tmp_path):
    """As R is no mean over tokens, the mean of the processes' R is not R of the whole batch."""
    found = on_two("statistics", tmp_path)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))  # seed 3, epoch 0
    model, data, regulariser = pictures()
    model.train()

    def R(rows: torch.Tensor) -> float:
        model(**default_collate([data[i] for i in rows.tolist()]))
        return regulariser.penalty().item()

    np.testing.assert_allclose(found, [R(order[:4]), R(order[4:])], rtol=1e-5)  # float32
    assert abs(np.mean(found) - R(order)) > 1e-3


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
    "command, name, count",
    [
        ("train_vit.py --seeds 1 --epochs 1 --batch-size 60", "vit_digits", 9 * 6),
        ("train_glue.py --quick --epochs 1", "glue_eigenlorax", 5 * 6),
    ],
)
def test_a_script_on_two_processes_is_the_script(tmp_path, command, name, count):
    """A table whose rows recycle adapters that earlier rows wrote."""
    options = [*command.split(), "--runs"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = torchrun(*options, str(two), seconds=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Random subspace") == 1  # one table
    # One process goes on from their backbones and LoRA adapters. Its own would differ in the last
    # digits of float32, and their components in signs and rotation, where training starts.
    shutil.copytree(two, one)
    for file in one.glob("*/finished/*.json"):
        if json.loads(file.read_text())["run"]["row"] not in ("backbone", "LoRA r=4"):
            file.unlink()
    launch = [sys.executable, *options, str(one), "--jobs", "1"]
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


def blocks(method: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Three blocks in float64 with adapted Linears, and their adapters."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3))
    model, generator = nn.Sequential(*layers).double(), torch.Generator().manual_seed(1)
    if method == "EigenLoRAx":
        normal = lambda *size: torch.randn(*size, generator=generator).double()  # noqa: E731
        shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        recycled = [
            {n: (normal(o, 2), normal(2, d)) for n, (o, d) in shapes.items()} for _ in range(3)
        ]
        subspaces = eigenlorax.recycle(recycled, k=4)
        return model, eigenlorax.adapt(model, subspaces, rank=3, generator=generator)
    make = {"HRA": hra.adapt, "LoRA": resora.adapt}[method]
    return model, make(model, ["0", "2"], rank=4, generator=generator)


def fsdp() -> dict[str, list[float]]:
    """{method: trained numbers after five steps}, sharded by FSDP2 where there are processes."""
    found = {}
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    index, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for method in ("HRA", "LoRA", "EigenLoRAx"):
        model, modules = blocks(method)
        if dist.is_initialized():
            for block in model:  # penalty() needs the parameters after forward
                fully_shard(block, reshard_after_forward=method != "HRA")
            fully_shard(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        x, y = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for _ in range(5):
            loss = (model(x[index::count]) - y[index::count]).square().mean()
            if method == "HRA":
                loss = loss + 0.1 * sum(m.penalty() for m in modules.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = [p.full_tensor() if dist.is_initialized() else p for p in trained]
        found[method] = torch.cat([p.detach().flatten() for p in whole]).tolist()
    return found


@pytest.mark.slow
def test_fsdp2_around_every_method_trains_as_one_process(tmp_path):
    one, two = fsdp(), on_two("fsdp", tmp_path)
    for method, wanted in one.items():
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(two[method], wanted, **TOLERANCE, err_msg=method)


CASES = {case.__name__: case for case in (train, statistics, files, fsdp)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = CASES[sys.argv[1]](*sys.argv[3:])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps([dist.get_world_size(), result]))
    dist.destroy_process_group()
