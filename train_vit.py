#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Image classification with EigenLoRAx, HRA, ReSoRA and their baselines.

    python train_vit.py                         recycle adapters on real handwritten digits
    python train_vit.py --quick                 the same in a minute: one seed, fewer epochs
    python train_vit.py --table hra             another table of rows
    python train_vit.py --rows lora hra         one row for each of some methods
    python train_vit.py --backbone google/vit-base-patch16-224 --data cifar100
                                                the setting of EigenLoRAx, Table 1
    python train_vit.py --table claims --backbone FOLDER --data FOLDER --images 50 --validation 25
                                                what the verdicts of figures/claims.json rest on

The embedded default needs no download. scikit-learn's 1,797 handwritten digits (8×8) are split
into 1,000 for training, 297 for validation and 500 for testing. A small ViT learns the upright
ones; the tasks are six fixed views of them (rotated, mirrored, …), each with 300 training images
that a run's seed draws. With --data, the tasks are disjoint subsets of a data set's classes, the
same for every seed; training images are mirrored at random. EigenLoRAx is leave-one-out: the
principal components of a task come from LoRA adapters of the other tasks, written by PEFT to disk
and read from there.

The table "claims" first tunes every row on one task, with a seed of its own. In it every head
starts from a logistic probe that has converged on the features that the row starts with, and every
row is scored twice: with its head as trained, and with such a probe on its final features.

A data set of your own is a folder that `datasets` can load, such as FOLDER/SPLIT/CLASS/IMAGE with
the splits train and test, or FOLDER/SPLIT.parquet with a column of images and one of classes.

Finished runs are kept in runs/ under a name that changes with the configuration, the code and
the versions; the same command continues from them. Under torchrun the processes share each batch,
with gloo where there is no accelerator: torchrun --standalone --nproc_per_node 2 train_vit.py
"""

import functools
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import common
import eigenlorax
import resora
from common import row
from figures import claims

# -------------------------------------------------------------------- rows of the tables

LORA = row("LoRA r=4", "lora", rank=4)  # its adapters are the ones that EigenLoRAx recycles


def eigenlorax_rows(config) -> list[dict]:
    """EigenLoRAx, Table 1, with a random subspace of the same size as control."""
    embedded = config.data == "digits"
    size = {"components": config.components, "rank": config.rank}
    recycling = {"method": "eigenlorax", "recycle": LORA, **size}
    few = min(8, config.components)  # directions of two rank-4 adapters
    total = config.components if embedded else 21  # the paper's "+1K"
    augmented = {**recycling, "components": few, "adapters": 2, "pseudo": total - few}
    return [
        row("Full", "full"),
        row("Base", "head"),
        LORA,
        row("LoRA r=1", "lora", rank=1),
        row("VeRA", "vera", rank=64 if embedded else 2),
        row("EigenLoRAx-AUG", **augmented),
        row("EigenLoRAx", **recycling),
        row("EigenLoRAx-ZS", **recycling, frozen=True),
        row("Random subspace", "random", **size),
    ]


def ablation_rows(config) -> list[dict]:
    """EigenLoRAx against K, r, the number of recycled adapters, noise in them, and its recipes."""

    def recycling(name: str, components: int = 16, rank: int = 4, **options) -> dict:
        """A row at EigenLoRAx's rate."""
        options |= {"components": components, "rank": rank, "recycle": LORA}
        return row(name, "eigenlorax", rate="EigenLoRAx", **options)

    rows = [
        LORA,
        row("PiSSA r=4", "pissa", rank=4, init_lora_weights="pissa"),
        row("VeRA", "vera", rank=64),
    ]
    for k in (1, 2, 4, 8, 12, 16, 20):
        rows.append(recycling(f"K={k}", k))
        control = {"components": k, "rank": 4, "rate": "Random subspace"}
        rows.append(row(f"K={k}, random", "random", **control))
    for r in (1, 2, 8):
        rows.append(recycling(f"K=16, r={r}", rank=r))
    for n in (1, 2, 3, 4):
        rows.append(recycling(f"{n} recycled", 4 * n, adapters=n))
        more = {"adapters": n, "pseudo": 20 - 4 * n}
        rows.append(recycling(f"{n} recycled, augmented", 4 * n, **more))
    for noise in (0.05, 0.15, 0.3, 1.0):
        rows.append(recycling(f"noise {100 * noise:.0f} %", noise=noise))
    start = recycling("K=16")
    rows.append(recycling("components trained too", free=16))
    rows.append(recycling("4 free directions added", pseudo=4, free=4))
    rows.append(recycling("coefficients twice as long", start=start))
    rows.append(recycling("coefficients, then components too", start=start, free=16))
    return rows


def hra_rows(config) -> list[dict]:
    """HRA against r and λ, beside LoRA, OFT and BOFT of about the same size."""
    rows = [row("LoRA r=1", "lora", rank=1), row("LoRA r=2", "lora", rank=2, rate="LoRA r=4"), LORA]
    rows += [row("OFT", "oft", rank=16), row("BOFT", "boft", rank=8)]
    for r in (2, 4, 8):
        rows.append(row(f"HRA r={r}, λ=0", "hra", rank=r, rate="HRA r=8, λ=0"))
        for power in (6, 5, 4, 3, 2, 1):
            name = f"HRA r={r}, λ=1e-{power}"
            rows.append(row(name, "hra", rank=r, lam=10.0**-power, rate="HRA r=8, λ=0"))
        rows.append(row(f"HRA r={r}, λ=∞", "hra", rank=r, strict=True, rate="HRA r=8, λ=∞"))
    return rows


LAMBDAS = {  # λ of ReSoRA, chosen on validation by --table resora-lambda, figures/vit_lambda.json
    ("euclidean", "feature"): 1e-3,
    ("cosine", "feature"): 0.1,
    ("linear", "feature"): 1.0,
    ("nonlinear", "feature"): 1e-3,
    ("euclidean", "weight"): 1.0,
    ("cosine", "weight"): 1e-2,
    ("linear", "weight"): 1e-3,
    ("nonlinear", "weight"): 1e-3,
}


def resora_row(name: str, rank: int, **options) -> dict:
    """A row of LoRA with or without ReSoRA, at LoRA's rate."""
    return row(f"r={rank}, {name}", "resora", rank=rank, rate="LoRA r=4", **options)


def resora_rows(config) -> list[dict]:
    """LoRA, its second stage with λ = 0 and re-gauged (the controls), and with each metric."""
    rows = []
    linear = {"metric": "linear", "level": "feature", "lam": LAMBDAS["linear", "feature"]}
    for r in (2, 4, 8):
        start = resora_row("stage 1", r)
        rows += [start, resora_row("λ=0", r, start=start)]
        rows.append(resora_row("re-gauged", r, start=start, regauge=True))
        rows.append(resora_row("linear, one stage", r, stages=2, ramp=0.5, **linear))
        for (metric, level), lam in LAMBDAS.items():
            if level == "feature" or r == 4:
                options = {"metric": metric, "level": level, "lam": lam, "start": start}
                rows.append(resora_row(f"{metric}, {level}", r, **options))
    return rows


def resora_lambda_rows(config) -> list[dict]:
    """The second stage at r = 4 with every metric, level and λ: to choose λ on validation."""
    start = resora_row("stage 1", 4)
    rows = [start, resora_row("λ=0", 4, start=start)]
    for metric, level in LAMBDAS:
        for lam in (1e-3, 1e-2, 1e-1, 1.0):
            options = {"metric": metric, "level": level, "lam": lam, "start": start}
            rows.append(resora_row(f"{metric}, {level}, λ={lam:g}", 4, **options))
    return rows


# The table of claims. Its rows name what their heads start from: the "frozen" trunk's probe where
# the row begins as that trunk, else the probe of its "own" features. No stage: no training.


def claims_rows(chosen: dict[str, dict]) -> list[dict]:
    """The rows that figures/claims.json compares; chosen: {row: the options that it got}."""
    lora = {**LORA, "head": "frozen"}
    size = {"components": 16, "rank": 4}
    size |= {key: chosen.get("EigenLoRAx", {}).get(key, size[key]) for key in size}
    recycled = {"method": "eigenlorax", "recycle": lora, **size}
    merged = {"mean": True, "recycle": lora, "head": "own"}
    second = {"method": "resora", "rank": 4, "lam": 0.0, "start": lora, "head": "own"}
    linear = {"metric": "linear", "level": "feature", "lam": 1.0}
    rows = [
        row("Probe", "head", stages=0, head="frozen"),
        row("Full", "full", head="frozen"),
        lora,
        row("VeRA", "vera", rank=256, head="frozen"),
        row("EigenLoRAx", **recycled, head="frozen"),
        row("EigenLoRAx K=2, r=1", **{**recycled, "components": 2, "rank": 1}, head="frozen"),
        row("EigenLoRAx from the mean", **recycled, mean=True, head="own"),
        row("Random coefficients", **recycled, frozen=True, stages=0, head="own"),
        row("Random subspace", "random", **size, head="frozen"),
        row("Mean adapter", "head", **merged, stages=0),
        row("LoRA on the mean", "lora", rank=4, **merged),
        row("HRA λ=0", "hra", rank=8, head="frozen"),
        row("HRA λ=∞", "hra", rank=8, strict=True, head="own"),
        row("OFT", "oft", rank=16, head="frozen"),
        row("LoRA, second stage", **second),
        row("ReSoRA, second stage", **{**second, **linear}),
        row("Re-gauged, second stage", **second, regauge=True),
    ]
    return [with_options(r, chosen.get(r["row"], {})) for r in rows]


def with_options(r: dict, options: dict) -> dict:
    """A row with other options; its learning rate is no part of it."""
    return r | {key: value for key, value in options.items() if key != "lr"}


TABLES = {  # name: (its rows, its figure)
    "eigenlorax": (eigenlorax_rows, "vit_digits"),
    "eigenlorax-ablation": (ablation_rows, "vit_ablation"),
    "hra": (hra_rows, "vit_hra"),
    "resora": (resora_rows, "vit_resora"),
    "resora-lambda": (resora_lambda_rows, "vit_lambda"),
}

# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Config(common.Options):
    """What a user may set."""

    table: Literal[(*TABLES, "claims")] = "eigenlorax"  # the rows to compare
    backbone: str = "digits"  # digits, a hub name, or a folder in the hub's layout
    data: str = "digits"  # digits, a hub name, or a folder that `datasets` can load
    label: str = ""  # column of the class, where a data set has several
    subsets: int = 5  # tasks that the classes are split into (not digits)
    classes: int = 20  # classes of a task (not digits)
    images: int = 0  # training images of a class, at most; 0: all the others (not digits)
    validation: int = 0  # validation images of a class; 0: a tenth of those there are (not digits)
    image_size: int | None = None  # pixels, height and width (not digits)
    others: tuple[str, ...] = ()  # claims: data sets on which to ask what an adapted trunk keeps


DIGITS = dict(seeds=3, epochs=20, batch_size=30, components=16, rank=4, weight_decay=0.01)
PAPER = dict(seeds=5, epochs=10, batch_size=128, components=2, rank=1, weight_decay=0.1)
PRESETS = {  # digits: chosen here, learning rates by --tune; paper: EigenLoRAx, Tables 5 and 6
    "digits": {**DIGITS, "image_size": 8},
    "paper": {**PAPER, "image_size": 224},
    "claims": {**DIGITS, "seeds": 2, "epochs": 6, "batch_size": 32, "image_size": 56},
}
NOT_IN_THE_PAPER = ("Random subspace", "PiSSA r=4", "OFT", "BOFT", "HRA r=8, λ=0", "HRA r=8, λ=∞")
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
        **dict.fromkeys(("LoRA r=4", "LoRA r=1", "VeRA"), 1e-4),
        **dict.fromkeys(("EigenLoRAx-AUG", "EigenLoRAx", "EigenLoRAx-ZS"), 1e-2),
        **dict.fromkeys(NOT_IN_THE_PAPER, 1e-2),
    },
}
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # learning rates that --tune tries


def preset(config: Config) -> str:
    """The name of the preset that fills what the user left open."""
    if config.data == "digits":
        return "digits"
    return "claims" if config.table == "claims" else "paper"


def complete(config: Config) -> Config:
    """`config` with nothing left open. Raises ValueError for values that make no sense."""
    embedded = config.data == "digits"
    jobs = common.cores() if embedded else 1
    some = {"seeds": 1} if config.quick else {}
    config = common.filled(config, {**PRESETS[preset(config)], "jobs": jobs, **some})
    if config.quick:
        config = replace(config, epochs=max(1, config.epochs // 3))
    least = dict.fromkeys(("seeds", "epochs", "batch_size", "components", "rank", "jobs"), 1)
    least |= {"subsets": 2, "classes": 2, "images": 0, "validation": 0, "image_size": 1}
    common.check_options(config, least, "digits")
    common.check_components(config.components, LORA["rank"], len(task_names(config)) - 1)
    if config.table == "claims" and (config.rows or config.lr):
        raise ValueError("found --rows or --lr with --table claims; wanted none: it tunes its own")
    return config


def rows_and_rates(config: Config) -> tuple[list[dict], dict[str, float]]:
    """The rows to compare, and every row's learning rate. Raises ValueError for unknown rows."""
    rows = TABLES[config.table][0](config)
    return common.rows_and_rates(config, rows, LORA, LEARNING_RATES[preset(config)])


# ---------------------------------------------------------------- tasks

VIEWS = ("rotate 90°", "rotate 180°", "mirror", "transpose", "invert", "shift")


def view(images: torch.Tensor, name: str) -> torch.Tensor:
    """A view of images (n, 1, 8, 8)."""
    across = (-2, -1)
    if name == "rotate 90°":
        return images.rot90(1, across)
    if name == "rotate 180°":
        return images.rot90(2, across)
    if name == "mirror":
        return images.flip(-1)
    if name == "transpose":
        return images.mT
    if name == "invert":
        return 240 - images
    if name == "shift":
        return images.roll((4, 4), across)
    return images


@functools.cache
def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{split: (images uint8 (n, 1, 8, 8), labels (n,))} of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).mul(15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=seeded(0))
    parts = zip(("train", "validation", "test"), order.split((1000, 297, 500)), strict=True)
    return {name: (images[part], labels[part]) for name, part in parts}


def digit_task(name: str, seed: int | None) -> dict[str, common.ImageTask]:
    """A view's splits; 300 training images that the seed draws, or all 1,000 without one."""
    splits = {}
    for split, (images, labels) in digits().items():
        if split == "train" and seed is not None:
            draw = torch.randperm(len(labels), generator=seeded(seed))[:300]
            images, labels = images[draw], labels[draw]
        splits[split] = common.ImageTask(view(images, name), labels, mean=[0.3], std=[0.35])
    return splits


@functools.cache
def image_data(name: str):
    """The data set of a hub name or folder. Raises ValueError where there is none."""
    return common.load_task(name)


def label_column(data, wanted: str) -> str:
    """The column of the class: `wanted`, else fine_label or the first one there is."""
    found = [name for name, kind in data.features.items() if hasattr(kind, "num_classes")]
    if wanted in found:
        return wanted
    if wanted or not found:
        raise ValueError(f"found the class columns {found}; wanted {wanted or 'one'} (--label)")
    return "fine_label" if "fine_label" in found else found[0]


def columns_of(data, config: Config) -> tuple[str, str, str]:
    """The name of the reported split, and of the columns of images and classes."""
    held_out = [name for name in ("test", "validation", "valid", "val") if name in data]
    if "train" not in data or not held_out:
        raise ValueError(f"{config.data} has the splits {list(data)}; wanted train and test")
    kinds = {type(kind).__name__: name for name, kind in data["train"].features.items()}
    if "Image" not in kinds:
        found = data["train"].column_names
        raise ValueError(f"{config.data} has the columns {found}; wanted one of images")
    label = label_column(data["train"], config.label)
    found = data["train"].features[label].num_classes
    if config.subsets * config.classes > found:
        wanted = f"{config.subsets} × {config.classes}"
        raise ValueError(f"found {found} classes in {config.data}; wanted {wanted}")
    return held_out[0], kinds["Image"], label


def class_subset(config: Config, task: str, seed: int) -> dict[str, common.ImageTask]:
    """A subset of a data set's classes; the seed draws which images train and which validate."""
    data = image_data(config.data)
    held_out, image, label = columns_of(data, config)
    classes = torch.randperm(data["train"].features[label].num_classes, generator=seeded(0))
    start = task_names(config).index(task) * config.classes
    new_label = torch.full((len(classes),), -1)
    new_label[classes[start : start + config.classes]] = torch.arange(config.classes)
    labels = {split: new_label[torch.tensor(data[split][label])] for split in ("train", held_out)}
    order = torch.randperm(len(labels["train"]), generator=seeded(seed))
    train, validation = [], []
    for number in range(config.classes):
        mine = order[labels["train"][order] == number]  # the rows of a class, in the seed's order
        count = config.validation or max(1, len(mine) // 10)
        validation.append(mine[:count])
        train.append(mine[count:][: config.images or None])
    parts = {
        "train": ("train", torch.cat(train)),
        "validation": ("train", torch.cat(validation)),
        "test": (held_out, (labels[held_out] >= 0).nonzero().squeeze(1)),
    }
    statistics = image_statistics(config.backbone)
    splits = {}
    for name, (split, rows) in parts.items():
        kind = Mirrored if name == "train" else common.ImageTask
        pixels = decode(data[split], image, rows.tolist(), config.image_size)
        splits[name] = kind(pixels, labels[split][rows], *statistics)
    return splits


def seeded(seed: int) -> torch.Generator:
    """A generator that begins with a seed."""
    return torch.Generator().manual_seed(seed)


class Mirrored(common.ImageTask):
    """Images that are mirrored, left to right, with a probability of one half."""

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        examples = super().__getitems__(rows)
        for example, mirror in zip(examples, torch.rand(len(rows)) < 0.5, strict=True):
            if mirror:
                example["pixel_values"] = example["pixel_values"].flip(-1)
        return examples


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
    from PIL import Image, ImageOps

    images = []
    for i in rows:
        square = ImageOps.fit(
            data[i][column].convert("RGB"), (size, size), Image.Resampling.BICUBIC
        )
        images.append(np.asarray(square))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def task_names(config: Config) -> list[str]:
    """The names of the tasks."""
    if config.data == "digits":
        return list(VIEWS)
    return [f"subset {i + 1}" for i in range(config.subsets)]


def load(config: Config, task: str, seed: int) -> dict[str, common.ImageTask]:
    """The training, validation and test images of a task."""
    if config.data == "digits":
        return digit_task(task, 10 * seed + VIEWS.index(task))
    return class_subset(config, task, seed)


# ---------------------------------------------------------------- runs

PRETRAINING = {"epochs": 30, "batch_size": 50, "lr": 2e-3, "weight_decay": 0.05}


def digits_backbone(config: Config) -> Path:
    """The folder of a small ViT that knows the upright digits: made once, for all tables."""
    code = [common.source_of(common.__file__), common.source_of(__file__)]
    made_by = [PRETRAINING, config.mixed_precision, code, common.environment()]
    folder = Path(config.runs) / f"digits-vit-{common.fingerprint(made_by)}"
    if folder.exists():
        return folder
    common.transformers.set_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    sizes |= {"hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = common.transformers.ViTForImageClassification(common.transformers.ViTConfig(**sizes))
    images = digit_task("upright", None)["train"]
    accelerate = common.accelerator(config.mixed_precision)
    label = "pretraining on upright digits"
    common.train(model, images, accelerate, seed=0, label=label, **PRETRAINING)
    with common.replacing(folder) as temporary:
        model.base_model.save_pretrained(temporary)
        common.save_file(model.classifier.state_dict(), temporary / "head.safetensors")
    common.meet()
    return folder


# A head's weight and bias, and the features (n, width) that it reads: Dinov2's are its CLS token
# and the mean of its patches.
Head = tuple[torch.Tensor, torch.Tensor]
DECAYS = (1.0, 0.1, 1e-2, 1e-3, 1e-4)  # of a probe's weights; validation chooses


@torch.no_grad()
def features(model, head: torch.nn.Module, images: common.ImageTask) -> torch.Tensor:
    """What the head of a model reads of every image, none of them mirrored."""
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    found = []

    def record(module, inputs: tuple) -> None:
        found.append(inputs[0].double().cpu())

    hook = head.register_forward_pre_hook(record)
    model.to(device).eval()
    for pixels in images.images.split(256):
        model(pixel_values=((pixels - images.mean) / images.std).to(device))
    hook.remove()
    return torch.cat(found)


def converged_probe(X: torch.Tensor, labels: torch.Tensor, decay: float, classes: int) -> Head:
    """The logistic regression of labels on features X: mean loss + ½·decay·‖W‖², at its minimum.

    W weighs features of mean 0 and standard deviation 1; what is returned weighs X.
    """
    mean, std = X.mean(0), X.std(0).clamp_min(1e-6)
    Z = (X - mean) / std
    W = torch.zeros(classes, X.shape[1], dtype=X.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=X.dtype, requires_grad=True)
    options = {"max_iter": 1000, "tolerance_grad": 1e-6, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([W, bias], **options)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(Z @ W.T + bias, labels)
        value = value + decay / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    W, bias = W.detach() / std, bias.detach()
    return W, bias - W @ mean


def accuracy(head: Head, X: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of features that a head gives their label."""
    weight, bias = head
    return common.score(X @ weight.T + bias, labels, "accuracy")


def best_probe(model, head: torch.nn.Linear, data: dict[str, common.ImageTask]) -> Head:
    """The converged probe on a model's features, with the decay that validation chooses."""
    X, held_out = (features(model, head, data[split]) for split in ("train", "validation"))
    labels, truth = data["train"].labels, data["validation"].labels
    probes = [converged_probe(X, labels, decay, head.out_features) for decay in DECAYS]
    return max(probes, key=functools.partial(accuracy, X=held_out, labels=truth))


def put(probe: Head, head: torch.nn.Linear) -> None:
    """Make a probe a model's head."""
    head.weight.data, head.bias.data = (part.to(head.weight) for part in probe)


@functools.cache
def frozen_probe(config: Config, backbone: str, task: str, seed: int) -> Head:
    """The converged probe on the features of the frozen trunk: once for all rows of a task."""
    trunk = common.load_backbone(backbone, outputs(config))
    return best_probe(trunk, trunk.classifier, load(config, task, seed))


@functools.cache
def elsewhere(config: Config, backbone: str, data: str) -> tuple[Head, common.ImageTask]:
    """The frozen trunk's probe for all classes of another data set, and 500 of its test images."""
    label = label_column(image_data(data)["train"], "")
    classes = image_data(data)["train"].features[label].num_classes
    shape = {"label": "", "subsets": 1, "classes": classes, "images": 15, "validation": 5}
    other = replace(config, data=data, **shape)
    probe = frozen_probe(other, backbone, "subset 1", 0)
    test = load(other, "subset 1", 0)["test"]
    some = torch.randperm(len(test), generator=seeded(0))[:500]
    statistics = image_statistics(config.backbone)
    return probe, common.ImageTask(test.images[some], test.labels[some], *statistics)


def outputs(config: Config) -> int:
    """How many classes a task has."""
    return 10 if config.data == "digits" else config.classes


def mean_of(adapters: list) -> dict[str, torch.Tensor]:
    """{layer: the mean ΔW of some adapters}."""
    total = {}
    for adapter in adapters:
        for name, (B, A) in adapter.items():
            total[name] = total.get(name, 0) + B @ A / len(adapters)
    return total


def project(model, mean: dict[str, torch.Tensor], rank: int) -> None:
    """Start EigenLoRAx's coefficients at the best part of rank `rank` of a mean adapter."""
    pairs = {}
    for name, delta in mean.items():
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        root = S[:rank].sqrt()
        pairs[name] = U[:, :rank] * root, root[:, None] * V[:rank]
    layers = common.layers_of(model, eigenlorax.EigenLoRAxLinear)
    eigenlorax.set_task(layers, 0, pairs)


def run(spec: dict, config: Config, backbone: str, folder: Path) -> dict:
    """Train and score one row on one task with one seed: accuracies and sizes, JSON-like."""
    names = task_names(config)
    seed = 1000 * spec["seed"] + names.index(spec["task"])
    data = load(config, spec["task"], spec["seed"])
    common.transformers.set_seed(seed)  # of the head
    trunk = common.load_backbone(backbone, outputs(config))
    head, begin = trunk.classifier, None
    if "head" in spec:
        begin = functools.partial(set_out, spec, config, backbone, folder, data, trunk)
    if "mean" in spec and spec["method"] != "eigenlorax":
        for name, delta in mean_of(common.adapters_for(spec, names, folder)).items():
            trunk.get_submodule(name).weight.data += delta
    training = {
        "epochs": config.epochs * spec.get("stages", 1),
        "batch_size": config.batch_size,
        "lr": spec["lr"],
        "weight_decay": spec.get("weight_decay", config.weight_decay),
        "mixed_precision": config.mixed_precision,
        "begin": begin,
    }
    model, result = common.fit(spec, trunk, data, names, folder, seed, **training)
    if "head" in spec:
        return result | second_scores(spec, config, backbone, data, model, head)
    if spec["method"] == "resora":
        result["correlations"] = correlations(model, data["validation"])
    if config.data == "digits":  # what the adapted trunk still knows of the upright digits
        head.load_state_dict(common.load_file(Path(backbone) / "head.safetensors"))
        upright = digit_task("upright", None)["test"]
        accelerate = common.accelerator(config.mixed_precision)
        result["source"] = common.evaluate(model, upright, accelerate)
    return result


def set_out(spec: dict, config: Config, backbone: str, folder: Path, data, trunk, model) -> None:
    """Put in place what a row of the table of claims starts from: coefficients, then the head."""
    if "mean" in spec and spec["method"] == "eigenlorax":
        adapters = common.adapters_for(spec, task_names(config), folder)
        project(model, mean_of(adapters), spec["rank"])
    if spec["head"] == "frozen":
        probe = frozen_probe(config, backbone, spec["task"], spec["seed"])
    else:
        probe = best_probe(model, trunk.classifier, data)
    put(probe, trunk.classifier)


def second_scores(spec: dict, config: Config, backbone: str, data, model, head) -> dict:
    """The test accuracy with a converged probe on the final features, and what was kept.

    kept: the mean accuracy on other data sets, with the heads that the frozen trunk has for them.
    A run that only tunes has neither.
    """
    if spec["seed"] in common.TUNING_SEEDS:
        return {}
    test = features(model, head, data["test"])
    found = {"probe": accuracy(best_probe(model, head, data), test, data["test"].labels)}
    if config.others and spec["method"] in ("head", "lora", "hra", "oft"):
        kept = []
        for other in config.others:
            probe, images = elsewhere(config, backbone, other)
            kept.append(accuracy(probe, features(model, head, images), images.labels))
        found["kept"] = sum(kept) / len(kept)
    return found


@torch.no_grad()
def correlations(model, data: common.ImageTask) -> dict[str, list[list[float]]]:
    """{layer: squared correlations (r, r) of its codes on `data`, all tokens as samples}."""
    found, hooks = {}, []

    def record(name: str, module, inputs: tuple) -> None:
        codes = inputs[0].flatten(0, -2) @ module.A.T  # (tokens, r)
        squares = codes.T.corrcoef() ** 2
        found[name] = [[round(value, 4) for value in line] for line in squares.tolist()]

    for name, module in common.layers_of(model, resora.LoRALinear).items():
        hooks.append(module.register_forward_pre_hook(functools.partial(record, name)))
    images = torch.stack([example["pixel_values"] for example in data])
    model(images.to(model.device))
    for hook in hooks:
        hook.remove()
    return found


def mean_correlations(runs: list[dict]) -> dict[str, list]:
    """{row: `correlations` (layers, r, r), mean over tasks and seeds}, taken out of the runs."""
    rows = {}
    for run in runs:
        if "correlations" in run:
            layers = torch.tensor(list(run.pop("correlations").values()), dtype=torch.float64)
            rows.setdefault(run["row"], []).append(layers)
    return {row: torch.stack(found).mean(0).tolist() for row, found in rows.items()}


def finish(specs: list[dict], config: Config, backbone: str, results: common.Results) -> list[dict]:
    """The results of all runs, in order: those on disk as they are, the others made now."""
    work = functools.partial(run, config=config, backbone=backbone, folder=results.folder)
    return common.finish(specs, work, results, config)


def prepare(config: Config) -> tuple[str, common.Results]:
    """The backbone's folder or name, and where the runs of this configuration are kept."""
    common.check_places(config, "digits")
    backbone, made = config.backbone, {}
    if config.data == "digits":
        torch.set_num_threads(1)  # so small a model is no faster with two; --jobs changes nothing
        backbone = str(digits_backbone(config))
        made = {"backbone": common.hash_of(backbone), "data": config.data}
    return backbone, common.results_of(config, "vit", __file__, **made)


def compare(config: Config) -> None:
    """Make every run of the table; print it, write the JSON and draw the figure."""
    rows, rates = rows_and_rates(config)
    specs = common.specify(rows, rates, task_names(config), range(config.seeds))
    backbone, results = prepare(config)
    figure = TABLES[config.table][1]
    if config.rows or config.data != "digits":
        figure = "runs"
    name = "vit_rows" if config.rows else figure
    out = Path(config.out or results.folder / f"{name}.json")
    note = f"Accuracy in per cent on the test split, mean over {config.seeds} seed(s)."
    runs = finish(specs, config, backbone, results)
    means = mean_correlations(runs)
    about = {"correlations": means} if figure == "vit_resora" else {}
    common.report(config, out, runs, figure, note, weights=common.hash_of(backbone), **about)


def tune(config: Config) -> None:
    """Choose every row's learning rate on the validation split."""
    backbone, results = prepare(config)
    out = Path(config.out or results.folder / "vit_tune.json")
    rows = [r for table, _ in TABLES.values() for r in table(config)]
    make = functools.partial(finish, config=config, backbone=backbone, results=results)
    rates = LEARNING_RATES[preset(config)]
    weights = common.hash_of(backbone)
    common.tune(config, out, rows, rates, GRID, task_names(config), make, weights=weights)


# The table of claims: what to choose for each row, one option after the other, and then the runs.

RUNGS = {  # the values that an option may take; five are tried, and more while the best is an end
    "lr": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "components": (1, 2, 4, 8, 16),
    "rank": (1, 2, 4, 8, 16),
    "lam": (0.0, 1e-2, 1e-1, 1.0, 10.0, 100.0),
    "weight_decay": (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
}
QUESTIONS = (  # the row, its option, the lowest of the five values; LoRA first: others recycle it
    ("LoRA r=4", "lr", 3e-4),
    ("Full", "lr", 1e-6),
    ("EigenLoRAx", "lr", 3e-3),
    ("EigenLoRAx", "components", 1),
    ("EigenLoRAx", "rank", 1),
    ("EigenLoRAx", "lr", 3e-3),  # again, at the size chosen
    ("Random subspace", "lr", 1e-2),
    ("EigenLoRAx K=2, r=1", "lr", 1e-2),
    ("VeRA", "lr", 3e-3),
    ("HRA λ=0", "lr", 1e-3),
    ("OFT", "lr", 3e-4),
    ("HRA λ=∞", "lr", 1e-3),
    ("LoRA on the mean", "lr", 1e-4),
    ("EigenLoRAx from the mean", "lr", 1e-3),
    ("LoRA, second stage", "lr", 1e-4),
    ("LoRA, second stage", "weight_decay", 0.0),
    ("ReSoRA, second stage", "lr", 1e-4),
    ("ReSoRA, second stage", "lam", 0.0),
    ("ReSoRA, second stage", "lr", 1e-4),  # again, with the λ chosen
    ("Re-gauged, second stage", "lr", 1e-4),
)


def specs_of(chosen: dict, tasks: list[str], seeds, *names: str) -> list[dict]:
    """The runs of the table of claims with the options chosen so far; of all rows, or of some."""
    rows = claims_rows(chosen)
    rates = {r["row"]: chosen.get(r["row"], {}).get("lr", 0.0) for r in rows}
    some = [r for r in rows if not names or r["row"] in names]
    return common.specify(some, rates, tasks, seeds)


def needs(spec: dict, tasks: list[str]) -> list[dict]:
    """The runs of other rows whose adapters a run takes."""
    found = []
    if "start" in spec:
        found.append({**spec["start"], "task": spec["task"], "seed": spec["seed"]})
    if "recycle" in spec:
        others = [task for task in tasks if task != spec["task"]]
        found += [{**spec["recycle"], "task": task, "seed": spec["seed"]} for task in others]
    return found


KEPT = ("row", "task", "seed", *RUNGS, "trainable", "validation", "test", "probe", "kept")


class Ledger:
    """The runs of the table of claims: those that its file has, those on disk, those made now."""

    def __init__(self, config: Config):
        self.config = config
        self.backbone, self.results = prepare(config)
        for other in config.others:
            image_data(other)  # raises now what would stop the first run at its end
        self.tasks = task_names(config)
        self.out = Path(config.out or self.results.folder / "claims.json")
        self.name = Path(config.data).name
        others = tuple(Path(other).name for other in config.others)
        stated = common.stated(replace(config, others=others))
        setting = {key: value for key, value in stated.items() if key not in common.OF_NO_RUN}
        self.runs = claims.known_runs(self.out, self.name, setting)
        weights = common.hash_of(self.backbone)
        self.about = {"config": setting, "weights": weights, "environment": common.environment()}

    def make(self, specs: list[dict], tuning: bool = False) -> list[dict]:
        """The results of runs. One that only the file has is made anew if others build on it."""
        missing = [spec for spec in specs if common.fingerprint(spec) not in self.runs]
        before = [needed for spec in missing for needed in needs(spec, self.tasks)]
        wanted = {common.fingerprint(spec): spec for spec in [*before, *missing]}
        config = replace(self.config, tune=tuning)
        made = finish([*wanted.values()], config, self.backbone, self.results)
        for key, run in zip(wanted, made, strict=True):
            self.runs[key] = {fact: run[fact] for fact in KEPT if fact in run}
        if wanted:
            claims.keep(self.out, self.name, {**self.about, "runs": self.runs})
        return [self.runs[common.fingerprint(spec)] for spec in specs]


def choose(ledger: Ledger) -> dict[str, dict]:
    """{row: its options}, chosen on the first task by validation, with a seed of its own."""
    chosen = {}
    tasks = ledger.tasks
    largest = LORA["rank"] * (len(tasks) - 1)  # so many directions the other adapters have

    def score(name: str, options: dict) -> float:
        """Validation accuracy of a row with some of its options."""
        trial = {**chosen, name: {**chosen.get(name, {}), **options}}
        specs = specs_of(trial, tasks[:1], common.TUNING_SEEDS, name)
        (run,) = ledger.make(specs, tuning=True)
        return run["validation"]

    for name, option, lowest in QUESTIONS:
        rungs = RUNGS[option]
        if option == "components":
            rungs = [rung for rung in rungs if rung <= largest]
        low = rungs.index(lowest)
        more, scores = rungs[low : low + 5], {}
        while more:  # an end of what was tried is the best, and there is a rung beyond
            scores |= {rung: score(name, {option: rung}) for rung in more}
            best = max(scores, key=scores.get)
            i = rungs.index(best)
            around = rungs[max(i - 1, 0) : i + 2]
            more = [rung for rung in around if rung not in scores]
        chosen[name] = {**chosen.get(name, {}), option: best}
        if common.first():
            found = "  ".join(f"{rung:g}: {100 * s:.1f}" for rung, s in sorted(scores.items()))
            print(f"{name}, {option} {best:g} of {found}", flush=True)
    return chosen


def establish(config: Config) -> None:
    """Tune the rows of the table of claims, then make its runs; --tune stops between the two."""
    ledger = Ledger(config)
    ledger.about["chosen"] = choose(ledger)
    if not config.tune:
        for seed in range(config.seeds):
            for task in ledger.tasks:
                ledger.make(specs_of(ledger.about["chosen"], [task], [seed]))
    if common.first():
        claims.keep(ledger.out, ledger.name, {**ledger.about, "runs": ledger.runs})
        print(claims.table(common.read_json(ledger.out)))
        print(ledger.out)


def main() -> None:
    """Read the command line and do what it says."""
    config = complete(common.parse(Config, PRESETS))
    if config.table == "claims":
        establish(config)
    elif config.tune:
        tune(config)
    else:
        compare(config)


if __name__ == "__main__":
    import train_vit  # by its name, under which worker processes find what is in it

    common.one_line_errors(train_vit.main)
