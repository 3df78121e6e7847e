#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Image classification with EigenLoRAx, HRA, ReSoRA and their baselines.

    python train_vit.py                         recycle adapters on real handwritten digits
    python train_vit.py --quick                 the same in a minute: one seed, fewer epochs
    python train_vit.py --table hra             another table of rows; --help lists them
    python train_vit.py --backbone google/vit-base-patch16-224 --data cifar100
                                                the setting of EigenLoRAx, Table 1

The embedded default needs no download. scikit-learn's 1,797 handwritten digits (8×8) are split
into 1,000 for training, 297 for validation and 500 for testing. A small ViT learns the upright
ones; the tasks are six fixed views of them (rotated, mirrored, …), each with 300 training images
that a run's seed draws. With --data, the tasks are disjoint subsets of a data set's classes,
which the seed draws as well. EigenLoRAx is leave-one-out: the principal components of a task come
from LoRA adapters of the other tasks, written by PEFT to disk and read from there.

Finished runs are kept in runs/ under a name that changes with the configuration, the code and
the versions; the same command continues from them.
"""

import argparse
import functools
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import common
import eigenlorax
import hra
import resora

VIEWS = {
    "rotate 90°": lambda x: x.rot90(1, (-2, -1)),
    "rotate 180°": lambda x: x.rot90(2, (-2, -1)),
    "mirror": lambda x: x.flip(-1),
    "transpose": lambda x: x.mT,
    "invert": lambda x: 240 - x,
    "shift": lambda x: x.roll((4, 4), (-2, -1)),
}


@dataclass(frozen=True)
class Config:
    """What a run depends on, and what a user may set. 0 or "" stands for the preset's value."""

    table: str = "eigenlorax"  # eigenlorax, eigenlorax-ablation, hra, resora or resora-lambda
    backbone: str = "digits"  # digits, a hub name, or a folder in the hub's layout
    data: str = "digits"  # digits, a hub name, or a folder in the hub's layout
    label: str = ""  # column of the class, where a data set has several
    subsets: int = 5  # tasks that the classes are split into (not digits)
    classes: int = 20  # classes of a task (not digits)
    images: int = 0  # training images of a class, at most; 0: all (not digits)
    image_size: int = 0  # pixels, height and width (not digits)
    seeds: int = 0  # runs of each row and task, with seeds 0, 1, …
    epochs: int = 0  # passes over a task's training images
    batch_size: int = 0  # images of a step, all processes together
    components: int = 0  # K of EigenLoRAx
    rank: int = 0  # r of EigenLoRAx's coefficients
    weight_decay: float = -1.0  # of AdamW; negative: the preset's
    mixed_precision: str = "no"  # no, bf16 or fp16
    lr: str = ""  # "ROW=RATE;…" instead of the preset's learning rates
    quick: bool = False  # one seed, fewer epochs
    tune: bool = False  # choose learning rates on the validation split, instead of testing
    jobs: int = 0  # runs at a time, a thread each; 0: one per core for digits, else one
    runs: str = "runs"  # folder for finished runs
    out: str = ""  # JSON file for the results; beside it goes the figure


PRESETS = {  # digits: chosen here, learning rates by --tune; paper: EigenLoRAx, Tables 5 and 6
    "digits": dict(seeds=3, epochs=20, batch_size=25, components=16, rank=4, weight_decay=0.01),
    "paper": dict(
        seeds=5, epochs=10, batch_size=128, components=2, rank=1, weight_decay=0.1, image_size=224
    ),
}
LEARNING_RATES = {  # rows that name no rate of their own have that of the row they vary
    "digits": {  # figures/vit_tune.json has what they were chosen from
        "Full": 3e-3,
        "Base": 0.3,
        "LoRA r=4": 3e-2,
        "LoRA r=1": 3e-2,
        "VeRA": 0.1,
        "EigenLoRAx-AUG": 3e-2,
        "EigenLoRAx": 3e-2,
        "EigenLoRAx-ZS": 0.1,
        "Random subspace": 0.1,
        "PiSSA r=4": 1e-2,
        "OFT": 1e-2,
        "BOFT": 3e-2,
        "HRA r=8, λ=0": 3e-2,
        "HRA r=8, λ=∞": 3e-2,
    },
    "paper": {
        "Full": 1e-4,  # not in the paper
        "Base": 1e-2,  # not in the paper
        "LoRA r=4": 1e-4,
        "LoRA r=1": 1e-4,
        "VeRA": 1e-4,
        "EigenLoRAx-AUG": 1e-2,
        "EigenLoRAx": 1e-2,
        "EigenLoRAx-ZS": 1e-2,
        **dict.fromkeys(("Random subspace", "PiSSA r=4", "OFT", "BOFT"), 1e-2),  # not in the paper
        **dict.fromkeys(("HRA r=8, λ=0", "HRA r=8, λ=∞"), 1e-2),  # not in the paper
    },
}
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # learning rates that --tune tries
TUNING_SEEDS = (100,)


def preset(config: Config) -> str:
    """The name of the preset that fills what the user left open."""
    return "digits" if config.data == "digits" else "paper"


def complete(config: Config) -> Config:
    """`config` with nothing left open. Raises ValueError for values that make no sense."""
    if (config.data == "digits") != (config.backbone == "digits"):
        raise ValueError(
            f"found --backbone {config.backbone} with --data {config.data};"
            " wanted both to be digits, or neither"
        )
    unset = {f.name: f.default for f in fields(Config)}
    filled = {k: v for k, v in PRESETS[preset(config)].items() if getattr(config, k) == unset[k]}
    config = replace(config, **filled)
    if config.quick:
        config = replace(config, seeds=1, epochs=max(1, config.epochs // 3))
    if not config.jobs:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        config = replace(config, jobs=cores if preset(config) == "digits" else 1)
    least = dict.fromkeys(("seeds", "epochs", "batch_size", "components", "rank", "jobs"), 1)
    for name, wanted in {**least, "subsets": 2, "classes": 2, "images": 0, "image_size": 0}.items():
        if getattr(config, name) < wanted:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"found {option} {getattr(config, name)}; wanted {wanted} or more")
    known = {"table": list(TABLES), "mixed_precision": ["no", "bf16", "fp16"]}
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"found {option} {getattr(config, name)}; wanted one of {choices}")
    others = len(VIEWS) - 1 if preset(config) == "digits" else config.subsets - 1
    if config.components > LORA["rank"] * others:
        raise ValueError(
            f"found --components {config.components}; wanted at most {LORA['rank'] * others},"
            f" the directions of {others} adapters of rank {LORA['rank']}"
        )
    if config.seeds > TUNING_SEEDS[0]:
        raise ValueError(f"found --seeds {config.seeds}; wanted at most {TUNING_SEEDS[0]}")
    if config.out and Path(config.out).suffix != ".json":
        raise ValueError(f"found --out {config.out}; wanted a name that ends in .json")
    return config


# ---------------------------------------------------------------- rows of the tables


def row(name: str, method: str, **options) -> dict:
    """A line of a table: what it is called and how `common.build` makes it."""
    return {"row": name, "method": method, **options}


NEEDS = {"recycle", "start"}  # what a row builds on: its adapters, or the state it goes on from
LORA = row("LoRA r=4", "lora", rank=4)  # its adapters are the ones that EigenLoRAx recycles


def eigenlorax_rows(config: Config) -> list[dict]:
    """EigenLoRAx, Table 1, with a random subspace of the same size as control."""
    size = {"components": config.components, "rank": config.rank}
    recycled = dict(method="eigenlorax", recycle=LORA, **size)
    few = min(8, config.components)  # directions of two rank-4 adapters
    total = config.components if preset(config) == "digits" else 21  # the paper's "+1K"
    return [
        row("Full", "full"),
        row("Base", "head"),
        LORA,
        row("LoRA r=1", "lora", rank=1),
        row("VeRA", "vera", rank=64 if preset(config) == "digits" else 2),
        row("EigenLoRAx-AUG", **{**recycled, "components": few}, adapters=2, pseudo=total - few),
        row("EigenLoRAx", **recycled),
        row("EigenLoRAx-ZS", **recycled, frozen=True),
        row("Random subspace", "eigenlorax", **size),
    ]


def ablation_rows(config: Config) -> list[dict]:
    """EigenLoRAx against K, r, the number of recycled adapters, noise in them, and its recipes."""
    mine = lambda k, r, **o: dict(method="eigenlorax", components=k, rank=r, **o)  # noqa: E731
    rows = [LORA, row("PiSSA r=4", "pissa", rank=4), row("VeRA", "vera", rank=64)]
    for k in (1, 2, 4, 8, 12, 16, 20):
        rows.append(row(f"K={k}", **mine(k, 4), recycle=LORA, rate="EigenLoRAx"))
        rows.append(row(f"K={k}, random", **mine(k, 4), rate="Random subspace"))
    for r in (1, 2, 8):
        rows.append(row(f"K=16, r={r}", **mine(16, r), recycle=LORA, rate="EigenLoRAx"))
    for n in (1, 2, 3, 4):
        few = mine(4 * n, 4, adapters=n)
        rows.append(row(f"{n} recycled", **few, recycle=LORA, rate="EigenLoRAx"))
        few["pseudo"] = 20 - 4 * n
        rows.append(row(f"{n} recycled, augmented", **few, recycle=LORA, rate="EigenLoRAx"))
    for noise in (0.05, 0.15, 0.3, 1.0):
        name = f"noise {100 * noise:.0f} %"
        rows.append(row(name, **mine(16, 4, noise=noise), recycle=LORA, rate="EigenLoRAx"))
    recycled = dict(**mine(16, 4), recycle=LORA, rate="EigenLoRAx")
    start = row("K=16", **recycled)
    rows.append(row("components trained too", **recycled, free=16))
    rows.append(row("4 free directions added", **recycled, pseudo=4, free=4))
    rows.append(row("coefficients twice as long", **recycled, start=start))
    rows.append(row("coefficients, then components too", **recycled, start=start, free=16))
    return rows


def hra_rows(config: Config) -> list[dict]:
    """HRA against r and λ, beside LoRA, OFT and BOFT of about the same size."""
    rows = [row("LoRA r=1", "lora", rank=1), row("LoRA r=2", "lora", rank=2, rate="LoRA r=4"), LORA]
    rows += [row("OFT", "oft", rank=16), row("BOFT", "boft", rank=8)]
    for r in (2, 4, 8):
        rows.append(row(f"HRA r={r}, λ=0", "hra", rank=r, rate="HRA r=8, λ=0"))
        for lam in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            name = f"HRA r={r}, λ={lam:.0e}".replace("e-0", "e-")
            rows.append(row(name, "hra", rank=r, lam=lam, rate="HRA r=8, λ=0"))
        rows.append(row(f"HRA r={r}, λ=∞", "hra", rank=r, strict=True, rate="HRA r=8, λ=∞"))
    return rows


# λ of ReSoRA: the same for all, not tuned; --table resora-lambda is there to choose by validation
LAMBDAS = {(metric, level): 1e-2 for level in ("feature", "weight") for metric in resora.METRICS}


def _resora(name: str, rank: int, **options) -> dict:
    return row(f"r={rank}, {name}", "resora", rank=rank, rate="LoRA r=4", **options)


def resora_rows(config: Config) -> list[dict]:
    """LoRA, its second stage with λ = 0 and re-gauged (the controls), and with each metric."""
    rows = []
    for r in (2, 4, 8):
        start = _resora("stage 1", r)
        rows += [start, _resora("λ=0", r, start=start)]
        rows.append(_resora("re-gauged", r, start=start, regauge=True))
        once = dict(metric="linear", level="feature", lam=LAMBDAS["linear", "feature"])
        rows.append(_resora("linear, one stage", r, stages=2, ramp=0.5, **once))
        for (metric, level), lam in LAMBDAS.items():
            if level == "feature" or r == 4:
                options = dict(metric=metric, level=level, lam=lam, start=start)
                rows.append(_resora(f"{metric}, {level}", r, **options))
    return rows


def resora_lambda_rows(config: Config) -> list[dict]:
    """The second stage at r = 4 with every metric, level and λ: to choose λ on validation."""
    start = _resora("stage 1", 4)
    rows = [start, _resora("λ=0", 4, start=start)]
    for metric, level in LAMBDAS:
        for lam in (1e-3, 1e-2, 1e-1, 1.0):
            options = dict(metric=metric, level=level, lam=lam, start=start)
            rows.append(_resora(f"{metric}, {level}, λ={lam:g}", 4, **options))
    return rows


TABLES = {
    "eigenlorax": eigenlorax_rows,
    "eigenlorax-ablation": ablation_rows,
    "hra": hra_rows,
    "resora": resora_rows,
    "resora-lambda": resora_lambda_rows,
}
FIGURES = {
    "eigenlorax": "vit_digits",
    "eigenlorax-ablation": "vit_ablation",
    "hra": "vit_hra",
    "resora": "vit_resora",
    "resora-lambda": "vit_lambda",
}


def rates_of(config: Config) -> dict[str, float]:
    """Learning rate of every row: --lr, else the preset's. Raises ValueError for unknown rows."""
    rates = dict(LEARNING_RATES[preset(config)])
    for item in filter(None, config.lr.split(";")):
        name, _, rate = item.strip().rpartition("=")
        if name not in rates:
            raise ValueError(f"found row {name!r} in --lr; wanted one of {', '.join(rates)}")
        try:
            rates[name] = float(rate)
        except ValueError:
            rates[name] = -1.0
        if not 0 < rates[name] < math.inf:
            raise ValueError(f"found rate {rate!r} for {name} in --lr; wanted a number above 0")
    return rates


def specify(rows: list[dict], config: Config, rates: dict, seeds: Iterable[int]) -> list[dict]:
    """Every run of the rows: row × task × seed, with its learning rate."""

    def rate(r: dict) -> dict:
        """The row with its rate, and so the rows that it builds on."""
        kept = {k: v for k, v in r.items() if k != "rate"} | {k: rate(r[k]) for k in NEEDS & set(r)}
        return {**kept, "lr": rates[r.get("rate", r["row"])]}

    rated = [rate(r) for r in rows]
    return [{**r, "task": t, "seed": s} for s in seeds for t in tasks(config) for r in rated]


def waves(specs: list[dict]) -> list[list[dict]]:
    """The runs in groups, each of which builds on the groups before it and not on itself."""
    depth = lambda row: max((1 + depth(row[k]) for k in NEEDS & set(row)), default=0)  # noqa: E731
    groups = {}
    for spec in specs:
        groups.setdefault(depth(spec), []).append(spec)
    return [group for _, group in sorted(groups.items())]


# ---------------------------------------------------------------- tasks


@functools.cache
def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{split: (images uint8 (n, 1, 8, 8), labels (n,))} of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).mul(15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "validation", "test"), order.split((1000, 297, 500)), strict=True)
    return {name: (images[part], labels[part]) for name, part in parts}


def digit_task(view: str | None, seed: int | None) -> dict[str, common.ImageTask]:
    """A view's splits; 300 training images that the seed draws, or all 1,000 without one."""
    splits = {}
    for name, (images, labels) in digits().items():
        if name == "train" and seed is not None:
            draw = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:300]
            images, labels = images[draw], labels[draw]
        images = VIEWS[view](images).contiguous() if view else images
        splits[name] = common.ImageTask(images, labels, mean=[0.3], std=[0.35])
    return splits


def class_subset(config: Config, task: str, seed: int) -> dict[str, common.ImageTask]:
    """A subset of the classes of a data set: training (less a tenth), validation (it), test."""
    data = image_data(config.data)
    held_out = next((n for n in ("test", "validation", "valid", "val") if n in data), None)
    if "train" not in data or held_out is None:
        raise ValueError(f"{config.data} has the splits {list(data)}; wanted train and test")
    columns = data["train"].features
    image = next((n for n, f in columns.items() if type(f).__name__ == "Image"), None)
    if image is None:
        raise ValueError(f"{config.data} has the columns {list(columns)}; wanted one of images")
    label = label_column(data["train"], config.label)
    found = data["train"].features[label].num_classes
    if config.subsets * config.classes > found:
        raise ValueError(
            f"found {found} classes in {config.data}; wanted {config.subsets} × {config.classes}"
        )
    generator = torch.Generator().manual_seed(seed)
    part = tasks(config).index(task)
    kept = torch.randperm(found, generator=generator)[part * config.classes :][: config.classes]
    new_label = torch.full((found,), -1)
    new_label[kept] = torch.arange(config.classes)
    mean, std = image_statistics(config.backbone)
    splits = {}
    for name, source in {"train": "train", "test": held_out}.items():
        labels = new_label[torch.tensor(data[source][label])]
        chosen = (labels >= 0).nonzero().squeeze(1)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        parts = {name: chosen}
        if name == "train":
            if config.images:  # as many of each class as asked for
                rank_in_class = torch.nn.functional.one_hot(labels[chosen]).cumsum(0)
                chosen = chosen[
                    rank_in_class.gather(1, labels[chosen, None]).squeeze(1) <= config.images
                ]
            tenth = max(1, len(chosen) // 10)
            parts = {"train": chosen[tenth:], "validation": chosen[:tenth]}
        for split, rows in parts.items():
            pixels = decode(data[source], image, rows.tolist(), config.image_size)
            splits[split] = common.ImageTask(pixels, labels[rows], mean, std)
    return splits


@functools.cache
def image_data(name: str):
    """The data set of a hub name or folder. Raises ValueError where there is none."""
    return common.load_task(name)


def label_column(data, wanted: str) -> str:
    """The column of the class: `wanted`, else fine_label or the only one there is."""
    found = [name for name, feature in data.features.items() if hasattr(feature, "num_classes")]
    choice = wanted or ("fine_label" if "fine_label" in found else found[0] if found else "")
    if choice not in found:
        raise ValueError(f"found the class columns {found}; wanted {choice or 'one'} (--label)")
    return choice


def image_statistics(backbone: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a channel: the backbone's own, else ImageNet's."""
    from transformers.image_processing_base import ImageProcessingMixin

    with suppress(OSError):
        found, _ = ImageProcessingMixin.get_image_processor_dict(backbone)
        return found["image_mean"], found["image_std"]
    return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def decode(data, column: str, rows: list[int], size: int) -> torch.Tensor:
    """Images as uint8 (n, 3, size, size): the shorter side resized, the middle cut out."""
    import numpy as np
    from PIL import ImageOps

    fit = lambda image: ImageOps.fit(image.convert("RGB"), (size, size), method=3)  # noqa: E731
    images = [np.asarray(fit(data[i][column])) for i in rows]  # 3: bicubic
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def tasks(config: Config) -> list[str]:
    """The names of the tasks."""
    if config.data == "digits":
        return list(VIEWS)
    return [f"subset {i + 1}" for i in range(config.subsets)]


def load(config: Config, task: str, seed: int) -> dict[str, common.ImageTask]:
    """The training, validation and test images of a task."""
    if config.data == "digits":
        return digit_task(task, 10 * seed + tasks(config).index(task))
    return class_subset(config, task, seed)


# ---------------------------------------------------------------- runs


def digits_backbone(config: Config) -> Path:
    """The folder of a small ViT pretrained on upright digits; made where it is missing."""
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    epochs = max(2, 3 * config.epochs // 2)
    recipe = dict(epochs=epochs, batch_size=25, lr=2e-3, weight_decay=0.05)
    code = common.code_fingerprint(common, sys.modules[__name__])
    folder = Path(config.runs) / f"digits-vit-{common.fingerprint([recipe, code])}"
    if folder.exists():
        return folder
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    data = digit_task(None, None)["train"]
    common.train(
        model,
        data,
        common.accelerator(mixed_precision=config.mixed_precision),
        seed=0,
        collate=data.collate,
        describe="pretraining on upright digits",
        **recipe,
    )
    with common.replacing(folder) as temporary:
        model.base_model.save_pretrained(temporary)
        save_file(model.classifier.state_dict(), temporary / "head.safetensors")
    return folder


def adapter_folder(folder: Path, spec: dict) -> Path:
    """Where a run that others build on leaves what it trained."""
    return folder / "adapters" / common.fingerprint(spec)


def recycled(spec: dict, names: list[str], folder: Path) -> list[Mapping]:
    """The adapters of the other tasks, as PEFT left them on disk; with noise if the row says so."""
    others = [{**spec["recycle"], "task": t, "seed": spec["seed"]} for t in names]
    others.pop(names.index(spec["task"]))
    adapters = [common.LazyAdapter(adapter_folder(folder, o)) for o in others]
    adapters = adapters[: spec.get("adapters")]
    if noise := spec.get("noise"):  # a fraction of the root mean square of each matrix
        generator = torch.Generator().manual_seed(spec["seed"])

        def add(W: torch.Tensor) -> torch.Tensor:
            scale = noise * W.square().mean().sqrt()
            return W + scale * torch.randn(W.shape, generator=generator)

        adapters = [{name: (add(B), add(A)) for name, (B, A) in a.items()} for a in adapters]
    return adapters


def run(spec: dict, config: Config, backbone: str, folder: Path) -> dict:
    """Train and score one row on one task with one seed: accuracies and sizes, JSON-like."""
    from transformers import set_seed

    names = tasks(config)
    seed = 1000 * spec["seed"] + names.index(spec["task"])
    data = load(config, spec["task"], spec["seed"])
    accelerate = common.accelerator(mixed_precision=config.mixed_precision)
    score = functools.partial(common.evaluate, accelerate=accelerate)
    set_seed(seed)  # of the head
    model = common.load_backbone(backbone, 10 if config.data == "digits" else config.classes)
    head = sum(p.numel() for _, p in common.head_of(model))
    trunk = model
    adapters = recycled(spec, names, folder) if "recycle" in spec else []
    model, modules, penalty = common.build(model, spec, seed, adapters)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if "start" in spec:
        start = {**spec["start"], "task": spec["task"], "seed": spec["seed"]}
        model.load_state_dict(load_file(adapter_folder(folder, start) / "state.safetensors"), False)
    if spec.get("regauge"):
        for module in modules.values():
            B, A = resora.regauge(module.B.data, module.A.data)
            module.B.data, module.A.data = B, A
    try:
        losses = common.train(
            model,
            data["train"],
            accelerate,
            epochs=config.epochs * spec.get("stages", 1),
            batch_size=config.batch_size,
            lr=spec["lr"],
            weight_decay=config.weight_decay,
            seed=seed + ("start" in spec),
            collate=data["train"].collate,
            penalty=penalty,
        )
    except common.Diverged:
        if not config.tune:
            raise
        return {"validation": 0.0}
    result = {"trainable": sum(p.numel() for p in trainable.values()) - head, "losses": losses}
    for split in ("validation", "test"):
        result[split] = score(model, data[split], collate=data[split].collate)
    if spec["method"] == "lora":
        with common.replacing(adapter_folder(folder, spec)) as temporary:
            model.save_pretrained(temporary)
    if spec["method"] == "hra":  # ‖I − ÛᵀÛ‖_F, mean over layers
        orthogonality = [module.penalty().sqrt().item() for module in modules.values()]
        result["orthogonality"] = statistics.fmean(orthogonality)
    if spec["method"] in ("eigenlorax", "resora"):  # what a second stage starts from
        with common.replacing(adapter_folder(folder, spec)) as temporary:
            temporary.mkdir()
            save_file({n: p.data for n, p in trainable.items()}, temporary / "state.safetensors")
    if spec["method"] == "resora":
        result["correlations"] = correlations(model, modules, data["validation"])
    if config.data == "digits":  # what the adapted trunk still knows of the upright digits
        trunk.classifier.load_state_dict(load_file(Path(backbone) / "head.safetensors"))
        upright = digit_task(None, None)["test"]
        result["source"] = score(model, upright, collate=upright.collate)
    return result


@torch.no_grad()
def correlations(model, modules: dict, data: common.ImageTask) -> dict[str, list[list[float]]]:
    """{layer: squared correlations (r, r) of its codes on `data`, all tokens as samples}."""
    found = {}

    def record(name: str, module, inputs: tuple) -> None:
        codes = inputs[0].flatten(0, -2) @ module.A.T
        found[name] = [[round(c**2, 4) for c in row] for row in codes.T.corrcoef().tolist()]

    hooks = [
        module.register_forward_pre_hook(functools.partial(record, name))
        for name, module in modules.items()
    ]
    batch = data.collate(list(range(len(data))))
    model(**{k: v.to(model.device) for k, v in batch.items()})
    for hook in hooks:
        hook.remove()
    return found


def quiet_single_thread() -> None:
    """What a worker process starts with: one thread, Ctrl-C left to its parent, its end as well."""
    from tqdm.auto import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow = lambda: (parent_process().join(), os._exit(1))  # noqa: E731
    threading.Thread(target=follow, daemon=True).start()


def finish(specs: list[dict], config: Config, backbone: str, results: common.Results) -> list[dict]:
    """The results of all runs, in order: those on disk as they are, the others made now."""
    from tqdm.auto import tqdm

    missing = [spec for wave in waves(specs) for spec in wave if results.get(spec) is None]
    work = functools.partial(run, config=config, backbone=backbone, folder=results.folder)
    bar = tqdm(total=len(specs), initial=len(specs) - len(missing), unit="run")
    title = lambda spec: f"{spec['row']}, {spec['task']}, seed {spec['seed']}"  # noqa: E731
    if config.jobs == 1:
        for spec in missing:
            bar.set_description_str(title(spec))
            results.put(spec, work(spec))
            bar.update()
    elif missing:
        pool = ProcessPoolExecutor(
            min(config.jobs, len(missing)), get_context("spawn"), quiet_single_thread
        )
        try:
            for wave in waves(missing):
                waiting = {pool.submit(work, spec): spec for spec in wave}
                for done in as_completed(waiting):
                    results.put(waiting[done], done.result())
                    bar.set_description_str(title(waiting[done]))
                    bar.update()
        except BaseException as error:
            for process in pool._processes.values():
                process.terminate()
            bar.close()
            if isinstance(error, BrokenProcessPool):
                raise OSError(
                    "a worker was killed (memory?); the same command continues"
                ) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    bar.close()
    return [{**spec, **results.get(spec)} for spec in specs]


def prepare(config: Config) -> tuple[str, common.Results]:
    """The backbone's folder or name, and where the runs of this configuration are kept."""
    for path in filter(None, (config.out, f"{config.runs}/any")):
        common.check_writable(path)
    backbone, where = config.backbone, Path(config.backbone)
    name = str(where.resolve()) if where.is_dir() else backbone
    if config.data == "digits":
        torch.set_num_threads(1)  # so small a model is no faster with two; --jobs changes nothing
        backbone = str(digits_backbone(config))
        name = Path(backbone).name
    alike = ("table", "seeds", "lr", "quick", "tune", "jobs", "runs", "out", "components", "rank")
    settings = {k: v for k, v in asdict(config).items() if k not in alike}
    code = common.code_fingerprint(common, eigenlorax, hra, resora, sys.modules[__name__])
    settings |= {"backbone": name, "code": code, **common.environment()}
    return backbone, common.Results(config.runs, "vit", settings)


def summary(runs: list[dict], split: str = "test") -> list[dict]:
    """One entry per row: size, accuracy per task (mean over seeds), mean ± std over seeds."""
    rows = []
    for name in dict.fromkeys(run["row"] for run in runs):
        mine = [run for run in runs if run["row"] == name]
        by_task, by_seed = {}, {}
        for r in mine:
            by_task.setdefault(r["task"], []).append(r[split])
            by_seed.setdefault(r["seed"], []).append(r[split])
        means = [statistics.fmean(scores) for scores in by_seed.values()]
        rows.append(
            {
                "row": name,
                "trainable": mine[0]["trainable"],
                "tasks": {task: statistics.fmean(scores) for task, scores in by_task.items()},
                "mean": statistics.fmean(means),
                "std": statistics.stdev(means) if len(means) > 1 else 0.0,
            }
        )
    return rows


def as_table(rows: list[dict]) -> str:
    """The rows of `summary` as a Markdown table, accuracies in per cent."""
    heads = ["", "trainable", *rows[0]["tasks"], "mean ± std"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for r in rows:
        scores = [f"{100 * score:.1f}" for score in r["tasks"].values()]
        last = f"{100 * r['mean']:.1f} ± {100 * r['std']:.1f}"
        lines.append([r["row"], f"{r['trainable']:,}", *scores, last])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    pad = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])  # noqa: E731
    return "\n".join("| " + " | ".join(map(pad, x, range(len(x)))) + " |" for x in lines)


def compare(config: Config) -> None:
    """Make every run of the table; print it, write the JSON and draw the figure."""
    figure = import_module(f"figures.{FIGURES[config.table]}")
    specs = specify(TABLES[config.table](config), config, rates_of(config), range(config.seeds))
    backbone, results = prepare(config)
    out = Path(config.out or results.folder / f"{FIGURES[config.table]}.json")
    runs = finish(specs, config, backbone, results)
    rows = summary(runs)
    about = {"config": asdict(config), "environment": common.environment()}
    common.write_json(out, {**about, "rows": rows, "runs": runs})
    print(as_table(rows))
    print(f"\nAccuracy in per cent on the test split, mean over {config.seeds} seed(s).")
    if hasattr(figure, "table"):
        print(figure.table({"rows": rows, "runs": runs}))
    print(f"{out}\n{figure.draw(out)}")


def tune(config: Config) -> None:
    """Choose every row's learning rate on the validation split, with a seed that no table uses."""
    backbone, results = prepare(config)
    out = Path(config.out or results.folder / "vit_tune.json")
    rates, grid = dict(LEARNING_RATES[preset(config)]), {}
    rows = {r["row"]: r for table in TABLES.values() for r in table(config) if r["row"] in rates}
    for later in (False, True):  # the adapters first, at their best rate
        group = [r for r in rows.values() if ("recycle" in r) == later]
        specs = [
            spec
            for lr in GRID
            for spec in specify(group, config, rates | {r["row"]: lr for r in group}, TUNING_SEEDS)
        ]
        runs = finish(specs, config, backbone, results)
        for r in group:
            scores = {
                lr: statistics.fmean(
                    x["validation"] for x in runs if (x["row"], x["lr"]) == (r["row"], lr)
                )
                for lr in GRID
            }
            grid[r["row"]] = {str(lr): score for lr, score in scores.items()}
            rates[r["row"]] = max(scores, key=scores.get)
            print(f"{r['row']:20} {rates[r['row']]:<8g}", *(f"{s:.3f}" for s in scores.values()))
    common.write_json(
        out,
        {
            "config": asdict(config),
            "environment": common.environment(),
            "validation": grid,
            "chosen": rates,
        },
    )
    print(out)


def parse(arguments: list[str] | None = None) -> Config:
    """The command line as a Config: an option per field."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comments = {}
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        name, _, comment = line.strip().partition("  # ")
        comments[name.partition(":")[0]] = comments.get(name.partition(":")[0], comment)
    for f in fields(Config):
        option = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            parser.add_argument(option, action="store_true", help=comments[f.name])
        else:
            parser.add_argument(
                option,
                type=f.type,
                default=f.default,
                help=comments[f.name],
                metavar=f.type.__name__.upper(),
            )
    return Config(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Read the command line and do what it says."""
    config = complete(parse())
    (tune if config.tune else compare)(config)


if __name__ == "__main__":
    common.one_line_errors(main)
