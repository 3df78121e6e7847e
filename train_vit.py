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
the versions; the same command continues from them. Under torchrun the processes share each batch,
with gloo where there is no accelerator: torchrun --standalone --nproc_per_node 2 train_vit.py
"""

import functools
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import common
from common import row

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
    out: str = ""  # JSON file for the results; the figure and its .md go beside it


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
    some = {"seeds": 1} if config.quick else {}
    config = common.filled(config, {**PRESETS[preset(config)], **some})
    if config.quick:
        config = replace(config, epochs=max(1, config.epochs // 3))
    if not config.jobs:
        config = replace(config, jobs=common.cores() if preset(config) == "digits" else 1)
    least = dict.fromkeys(("seeds", "epochs", "batch_size", "components", "rank", "jobs"), 1)
    least |= {"subsets": 2, "classes": 2, "images": 0, "image_size": 0}
    common.check_options(config, least, {"table": list(TABLES)})
    others = len(VIEWS) - 1 if preset(config) == "digits" else config.subsets - 1
    common.check_components(config.components, LORA["rank"], others)
    return config


# ---------------------------------------------------------------- rows of the tables


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
    return common.read_rates(config.lr, LEARNING_RATES[preset(config)])


def specify(rows: list[dict], config: Config, rates: dict, seeds: Iterable[int]) -> list[dict]:
    """Every run of the rows: row × task × seed, with its learning rate."""
    return common.specify(rows, rates, tasks(config), seeds)


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
    common.meet()
    return folder


def run(spec: dict, config: Config, backbone: str, folder: Path) -> dict:
    """Train and score one row on one task with one seed: accuracies and sizes, JSON-like."""
    from transformers import set_seed

    names = tasks(config)
    seed = 1000 * spec["seed"] + names.index(spec["task"])
    data = load(config, spec["task"], spec["seed"])
    set_seed(seed)  # of the head
    trunk = common.load_backbone(backbone, 10 if config.data == "digits" else config.classes)
    model, modules, result = common.fit(
        spec,
        trunk,
        data,
        names,
        folder,
        seed,
        mixed_precision=config.mixed_precision,
        epochs=config.epochs * spec.get("stages", 1),
        batch_size=config.batch_size,
        lr=spec["lr"],
        weight_decay=config.weight_decay,
    )
    if spec["method"] == "resora":
        result["correlations"] = correlations(model, modules, data["validation"])
    if config.data == "digits":  # what the adapted trunk still knows of the upright digits
        trunk.classifier.load_state_dict(load_file(Path(backbone) / "head.safetensors"))
        upright = digit_task(None, None)["test"]
        accelerate = common.accelerator(mixed_precision=config.mixed_precision)
        result["source"] = common.evaluate(model, upright, accelerate, collate=upright.collate)
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
    common.check_places(config, embedded=config.data == "digits")
    backbone, made = config.backbone, {}
    if config.data == "digits":
        torch.set_num_threads(1)  # so small a model is no faster with two; --jobs changes nothing
        backbone = str(digits_backbone(config))
        made = {"backbone": Path(backbone).name, "data": config.data}
    return backbone, common.results_of(config, "vit", sys.modules[__name__], **made)


def compare(config: Config) -> None:
    """Make every run of the table; print it, write the JSON and draw the figure."""
    specs = specify(TABLES[config.table](config), config, rates_of(config), range(config.seeds))
    backbone, results = prepare(config)
    other = config.table == "eigenlorax" and preset(config) == "paper"
    figure = "vit_cifar" if other else FIGURES[config.table]
    out = Path(config.out or results.folder / f"{figure}.json")
    note = f"Accuracy in per cent on the test split, mean over {config.seeds} seed(s)."
    runs = finish(specs, config, backbone, results)
    means = mean_correlations(runs)
    about = {"correlations": means} if figure == "vit_resora" else {}
    common.report(config, out, runs, figure, note, **about)


def tune(config: Config) -> None:
    """Choose every row's learning rate on the validation split."""
    backbone, results = prepare(config)
    out = Path(config.out or results.folder / "vit_tune.json")
    rows = [r for table in TABLES.values() for r in table(config)]
    make = functools.partial(finish, config=config, backbone=backbone, results=results)
    common.tune(config, out, rows, LEARNING_RATES[preset(config)], GRID, tasks(config), make)


def main() -> None:
    """Read the command line and do what it says."""
    config = complete(common.parse(Config))
    (tune if config.tune else compare)(config)


if __name__ == "__main__":
    common.one_line_errors(main)
