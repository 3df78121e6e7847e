#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Language tasks with EigenLoRAx, HRA, ReSoRA and their baselines.

    python train_glue.py                        recycle adapters on real English, offline
    python train_glue.py --quick                five of its rows in a minute, trained less
    python train_glue.py --table hra            another table of rows
    python train_glue.py --rows lora hra        one row for each of some methods
    python train_glue.py --backbone roberta-base --data nyu-mll/glue
                                                the setting of EigenLoRAx, Table 2
    python train_glue.py --backbone FOLDER --data FOLDER --train 2500 --table gate
                                                few rows of GLUE, read from FOLDER/TASK

The embedded default needs no download. Its text is the docstrings of the Python that runs, parsed
from the source files and never imported; versions differ by some per cent, so results name the
version and a hash of the text. Modules are split into those for training, validation and testing. A
small RoBERTa, one for each seed, learns the training modules' text by masked language modelling;
the tasks have the inputs and metrics of GLUE's, 0 and 1 as there:

    mrpc-like   two sentences of one docstring: in their order (1), or swapped?    accuracy
    sst2-like   is the sentence about a function (0), or a class or module (1)?    accuracy
    cola-like   is this a sentence (1), or its words in another order?             Matthews
    qnli-like   is the sentence the summary that belongs to the name (0)?          accuracy
    rte-like    does the second sentence follow (0), or is a "not" in or out?      accuracy
    stsb-like   how much of the first sentence is left in the second, 0 to 5?      Pearson

Two of them ask for less than their models do, because a model of this size does not learn from a
thousand rows whether two texts belong together: mrpc-like asks for their order, and stsb-like for
the share of words left. Four can be answered by the words of one text alone, as well as full
training answers them or better: mrpc-, sst2-, qnli-like, and rte-like by its second text.

A table says something only where training does better than the frozen model: --table gate asks,
task by task, whether full training and LoRA are above the larger class, and above a linear model of
the frozen embeddings (`floor`). The head of a task that is a score starts at its labels' mean.

With --data, results are on GLUE's validation set, because the test labels are not public. What is
chosen, such as learning rates by --tune, is chosen on a tenth of the training set. EigenLoRAx's
authors monitor the reported set while they train; this script never does. A data set of your own is
FOLDER/TASK/SPLIT.parquet (or .csv, .json) for each of the six tasks, with the splits train and
validation, GLUE's columns of texts, and a column label.

EigenLoRAx is leave-one-out: the principal components of a task come from LoRA adapters of the
other tasks, written by PEFT to disk and read from there. Finished runs are kept in runs/ under a
name that changes with the configuration, data, code and versions; the same command continues.
Processes share each batch under torchrun --standalone --nproc_per_node 2 train_glue.py
"""

import ast
import functools
import gc
import itertools
import os
import random
import re
import statistics
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

import common
from common import row, transformers


class Shape(NamedTuple):
    """The columns of a task, its number of classes (1: a score from 0 to 5) and its metric."""

    columns: tuple[str, ...]
    classes: int
    metric: str


TASKS = {
    "mrpc": Shape(("sentence1", "sentence2"), 2, "accuracy"),
    "sst2": Shape(("sentence",), 2, "accuracy"),
    "cola": Shape(("sentence",), 2, "matthews"),
    "qnli": Shape(("question", "sentence"), 2, "accuracy"),
    "rte": Shape(("sentence1", "sentence2"), 2, "accuracy"),
    "stsb": Shape(("sentence1", "sentence2"), 1, "pearson"),
}

# ---------------------------------------------------------------- rows of the tables

ADAPTER_RANK = {"docs": 4, "few": 8, "paper": 8}  # Table 2 says 32, A.2 8 or 16, its scripts use 8


def lora(config) -> dict:
    """The row whose adapters EigenLoRAx recycles."""
    rank = ADAPTER_RANK[preset(config)]
    return row(f"LoRA r={rank}", "lora", rank=rank)


def recycling(name: str, config, **options) -> dict:
    """A row that recycles LoRA adapters."""
    size = {"components": config.components, "rank": config.rank}
    options = {"rate": "EigenLoRAx", "recycle": lora(config), **size, **options}
    return row(name, "eigenlorax", **options)


def eigenlorax_rows(config) -> list[dict]:
    """EigenLoRAx, Tables 2 and 3: the last three rows have two adapters' components, or none.

    The two are those of the first two other tasks, in the order of TASKS.
    """
    docs, rank = preset(config) == "docs", ADAPTER_RANK[preset(config)]
    total = 64 if preset(config) == "paper" else config.components  # Table 3: 24K trained numbers
    few = min(2 * rank, total)
    low = {"components": few, "adapters": 2}
    wide = rank if docs else 32  # Table 2: LoRA and PiSSA r=32, 1.2M trained numbers
    rows = [row("Full", "full"), row("Base", "head")]
    if not docs:
        rows.append(row("LoRA r=32", "lora", rank=32, rate="LoRA r=8"))
    rows += [
        lora(config),
        row("VeRA", "vera", rank=64 if docs else 256),
        row(f"PiSSA r={wide}", "pissa", rank=wide, init_lora_weights="pissa"),
        recycling("EigenLoRAx", config),
        recycling("EigenLoRAx-init", config, free=config.components, rate="EigenLoRAx-init"),
        recycling("EigenLoRAx-AUG", config, **low, pseudo=total - few),
        recycling("EigenLoRAx + random", config, **low, random=total - few),
        row("Random subspace", "random", components=total, rank=config.rank),
    ]
    if config.quick and config.table == "eigenlorax":
        quick = ("Full", "Base", lora(config)["row"], "EigenLoRAx", "Random subspace")
        return [r for r in rows if r["row"] in quick]
    return rows


def noise_rows(config) -> list[dict]:
    """EigenLoRAx, Table 13: noise in the recycled adapters."""
    noisy = [recycling(f"noise {100 * x:.0f} %", config, noise=x) for x in (0.05, 0.15, 0.3)]
    return [lora(config), recycling("EigenLoRAx", config), *noisy]


def hra_rows(config) -> list[dict]:
    """HRA, Table 2 and Figures 3 and 4: λ at r=8, r at λ=0, beside LoRA, OFT and BOFT.

    Like the paper's, the preset "paper" adapts every Linear layer of the encoder; other presets,
    and the table "all", query and value, as in all other rows.
    """
    paper = preset(config) == "paper"
    every = {"every": True} if paper and config.table == "hra" else {}
    plain, penalised, rate = every, every, "HRA r=8, λ=0"
    if paper:
        rate = "HRA r=8, λ=1e-5"
        if not config.epochs:
            plain = {**every, "epochs": HRA_EPOCHS}
            penalised = {**every, "epochs": HRA_PENALISED_EPOCHS}
    rows = [
        {**lora(config), **every},
        row("OFT", "oft", rank=16, **plain),
        row("BOFT", "boft", rank=8, **plain),
    ]
    for r in (2, 4, 8):
        rows.append(row(f"HRA r={r}, λ=0", "hra", rank=r, rate="HRA r=8, λ=0", **plain))
    for name, lam in {"1e-5": 1e-5, "1e-3": 1e-3, "1e-1": 1e-1}.items():
        rows.append(row(f"HRA r=8, λ={name}", "hra", rank=8, lam=lam, rate=rate, **penalised))
    return [*rows, row("HRA r=8, λ=∞", "hra", rank=8, strict=True, **plain)]


def resora_rows(config) -> list[dict]:
    """LoRA, and a second stage of it without ReSoRA and with it; λ as in train_vit.py."""
    rank = ADAPTER_RANK[preset(config)]
    mine = {"method": "resora", "rank": rank, "rate": f"LoRA r={rank}"}
    start = row("LoRA, stage 1", **mine)
    linear = {"metric": "linear", "level": "feature", "lam": 1.0}
    return [
        start,
        row("LoRA, stage 2", **mine, start=start),
        row("ReSoRA, stage 2", **mine, start=start, **linear),
    ]


def all_rows(config) -> list[dict]:
    """EigenLoRAx's Tables 2 and 3, HRA's Table 2, and ReSoRA."""
    swept = ("HRA r=2, λ=0", "HRA r=4, λ=0", "HRA r=8, λ=1e-1")
    rows = eigenlorax_rows(config) + [r for r in hra_rows(config) if r["row"] not in swept]
    return list({r["row"]: r for r in rows + resora_rows(config)}.values())


def gate_rows(config) -> list[dict]:
    """What has to be above the floors (`floor`) before any table can say something."""
    return [row("Full", "full"), lora(config)]


TABLES = {
    "gate": gate_rows,
    "eigenlorax": eigenlorax_rows,
    "noise": noise_rows,
    "hra": hra_rows,
    "resora": resora_rows,
    "all": all_rows,
}

# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Config(common.Options):
    """What a user may set."""

    table: Literal[tuple(TABLES)] = "eigenlorax"  # the rows to compare; gate: before any other
    backbone: str = "docs"  # docs, a hub name, or a folder in the hub's layout
    data: str = "docs"  # docs, a hub name, or a folder in the hub's layout, FOLDER/TASK
    train: int | None = None  # training rows of a task, at most, drawn by the seed (not docs)
    evaluate: int | None = None  # rows to score on, at most, the same for every seed (not docs)
    length: int | None = None  # tokens of a text, at most
    apart: bool = False  # encode the two texts of a pair apart, as a sentence encoder was made to


LENGTH = 64  # tokens of a text of the docstrings, at most
CHOSEN = dict(seeds=2, batch_size=16, weight_decay=0.01)
PRESETS = {  # docs, and few (with --train): chosen here; paper: EigenLoRAx, Tables 10 and 11
    "docs": dict(epochs=3, components=16, rank=4, train=800, evaluate=400, **CHOSEN),
    "few": dict(epochs=5, components=32, rank=8, evaluate=0, **CHOSEN),
    "paper": dict(seeds=5, batch_size=64, components=32, rank=8, train=0, evaluate=0),
}
PRESETS["docs"]["length"] = PRESETS["few"]["length"] = LENGTH
PRESETS["paper"] |= dict(length=512, weight_decay=0.1, epochs=0)  # 0: each task's own


def by_task(*values: float) -> dict[str, float]:
    """{task: value}, in the order of TASKS."""
    return dict(zip(TASKS, values, strict=True))


# The papers' epochs and learning rates. Their schedules differ from ours, which is linear with 6 %
# warm-up: EigenLoRAx lowers its rate on a plateau of the reported set's loss, HRA warms up for 50
# to 1,000 steps. HRA's scripts disagree with its Table 5: other epochs, rates 1.7 to 11 times
# smaller. EigenLoRAx's scripts have 64 components. OFT, BOFT and λ = ∞ are not in HRA's tables of
# rates, nor LoRA: they take the rates of λ = 0, and of EigenLoRAx's tables.
EPOCHS = by_task(30, 60, 80, 25, 80, 40)  # EigenLoRAx, Tables 10 and 11
HRA_EPOCHS = by_task(60, 10, 34, 12, 11, 39)  # HRA, Table 5, λ = 0
HRA_PENALISED_EPOCHS = by_task(35, 8, 12, 6, 44, 30)  # HRA, Table 5, λ > 0
TABLE_10 = by_task(4e-4, 5e-4, 4e-4, 4e-4, 5e-4, 4e-4)  # EigenLoRAx: LoRA, VeRA and PiSSA
TABLE_11 = by_task(4e-3, 5e-3, 4e-3, 4e-3, 5e-3, 4e-3)  # EigenLoRAx itself
HRA_TABLE_5 = by_task(6e-3, 3e-3, 9e-3, 1e-2, 5e-3, 5e-3)  # λ = 0
HRA_PENALISED = by_task(1e-3, 2e-3, 2e-3, 2e-3, 1e-3, 9e-4)  # Table 5, λ > 0
LEARNING_RATES = {  # rows that name no rate of their own have that of the row they vary
    "docs": {  # figures/glue_tune.json has what they were chosen from
        "Full": 3e-3,
        "Base": 3e-3,
        "LoRA r=4": 1e-2,
        "VeRA": 3e-2,
        "PiSSA r=4": 1e-2,
        "EigenLoRAx": 3e-2,
        "EigenLoRAx-init": 1e-2,
        "Random subspace": 3e-2,
        "OFT": 1e-2,
        "BOFT": 3e-2,
        "HRA r=8, λ=0": 1e-2,
        "HRA r=8, λ=∞": 1e-2,
    },
    "few": {  # first guesses: --tune chooses better ones
        "Full": 1e-4,
        "Base": 5e-2,
        "LoRA r=8": 2e-3,
        "VeRA": 5e-2,
        "PiSSA r=32": 2e-3,
        "EigenLoRAx": 1e-2,
        "EigenLoRAx-init": 2e-3,
        **dict.fromkeys(("Random subspace", "OFT", "BOFT", "HRA r=8, λ=0", "HRA r=8, λ=∞"), 1e-2),
    },
    "paper": {
        "Full": 2e-5,  # not in the paper
        "Base": 1e-3,  # not in the paper
        **dict.fromkeys(("LoRA r=8", "VeRA", "PiSSA r=32"), TABLE_10),
        **dict.fromkeys(("EigenLoRAx", "EigenLoRAx-init", "Random subspace"), TABLE_11),
        **dict.fromkeys(("OFT", "BOFT", "HRA r=8, λ=0", "HRA r=8, λ=∞"), HRA_TABLE_5),
        "HRA r=8, λ=1e-5": HRA_PENALISED,
    },
}
GRID = {  # learning rates that --tune tries
    "docs": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "few": (1e-4, 5e-4, 2e-3, 1e-2, 5e-2),
    "paper": (1e-5, 1e-4, 1e-3, 1e-2),
}
TUNED_ON = {"few": ["sst2", "stsb"]}  # short texts: minutes instead of hours on two cores


def preset(config: Config) -> str:
    """The name of the preset that fills what the user left open."""
    if config.data == "docs":
        return "docs"
    return "few" if config.train else "paper"


def complete(config: Config) -> Config:
    """`config` with nothing left open. Raises ValueError for values that make no sense."""
    if config.quick:
        few = {"train": min(config.train or 400, 400), "evaluate": min(config.evaluate or 200, 200)}
        config = common.filled(replace(config, **few), {"seeds": 1})
    name = preset(config)
    if name == "paper" and config.table == "hra":  # HRA, Table 5
        config = common.filled(config, {"batch_size": 32})
    jobs = common.cores() if name == "docs" else 1
    config = common.filled(config, {**PRESETS[name], "jobs": jobs})
    least = dict.fromkeys(("seeds", "batch_size", "components", "rank", "jobs"), 1)
    least |= {"train": 0, "evaluate": 0, "length": 8, "epochs": 0 if name == "paper" else 1}
    common.check_options(config, least, "docs")
    rank = ADAPTER_RANK[name]
    common.check_components(config.components, rank, len(TASKS) - 1)
    if config.evaluate == 1:
        raise ValueError("found --evaluate 1; wanted 2 or more: one row has no correlation")
    if config.table in ("eigenlorax", "all") and config.components <= 2 * rank:
        raise ValueError(  # EigenLoRAx-AUG would have nothing to add
            f"found --components {config.components}; wanted more than {2 * rank},"
            f" the directions of two adapters of rank {rank}"
        )
    return config


def rows_and_rates(config: Config) -> tuple[list[dict], dict]:
    """The rows to compare, and every row's learning rate. Raises ValueError for unknown rows."""
    rows = TABLES[config.table](config)
    return common.rows_and_rates(config, rows, lora(config), LEARNING_RATES[preset(config)])


def task_names(config: Config) -> list[str]:
    """The names of the tasks."""
    return [f"{name}-like" for name in TASKS] if config.data == "docs" else list(TASKS)


def shape_of(task: str) -> Shape:
    """The shape of a task of GLUE, or of the docstrings' task like it."""
    return TASKS[task.removesuffix("-like")]


# ---------------------------------------------------------------- the docstrings' tasks

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
AUXILIARY = re.compile(r"\b(is|are|was|were|will|must|should|can|does|do|may|has)\b( not\b)?")


class Doc(NamedTuple):
    """A docstring: where it is, of what, whether of a function, and its sentences."""

    module: str
    name: str
    function: bool
    sentences: list[str]


def docstrings(root: Path) -> list[Doc]:
    """Every docstring of the source files below a folder, parsed and never imported."""
    files, found = [], []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - SKIPPED
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(files):
        parts = file.relative_to(root).with_suffix("").parts
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # broken on purpose
            continue
        for node in ast.walk(tree):
            kind = type(node).__name__
            if kind in ("Module", "ClassDef", "FunctionDef", "AsyncFunctionDef"):
                name, text = getattr(node, "name", parts[-1]), ast.get_docstring(node) or ""
                doc = Doc(".".join(parts), name, kind.endswith("FunctionDef"), sentences(text))
                if doc.sentences:
                    found.append(doc)
    return found


def sentences(text: str) -> list[str]:
    """The sentences of 5 to 40 words of a docstring, without its code, lists and tables."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not re.search(r"^\s*(>>>|\.\.\.|[-=]{3})", paragraph, re.M):
            found += re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split()))
    return [s for s in found if 5 <= len(s.split()) <= 40 and is_prose(s)]


def is_prose(text: str) -> bool:
    """Whether most of a text is letters and spaces."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters >= 0.85 * len(text)


def split_of(module: str) -> str:
    """train, validation or test: the same for a module on every machine."""
    share = int(common.fingerprint(module), 16) / 16**16
    if share < 0.65:
        return "train"
    return "validation" if share < 0.75 else "test"


def words_of(name: str) -> str:
    """The words of an identifier, in lower case."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)).lower()


def negated(found: re.Match) -> str:
    """An auxiliary verb without its "not", or with one."""
    return found[1] if found[2] else f"{found[1]} not"


def examples(task: str, docs: list[Doc], rng: random.Random) -> Iterable[tuple[list[str], float]]:
    """(texts, label) of a task, from docstrings in random order; the labels take turns."""
    docs = rng.sample(docs, len(docs))
    single = [s for doc in docs for s in doc.sentences]
    several = [doc for doc in docs if len(doc.sentences) > 1]
    rng.shuffle(single)
    if task == "cola":
        for i, s in enumerate(single):
            words = s.rstrip(".:").split()
            yield [" ".join(words if i % 2 else rng.sample(words, len(words)))], i % 2
    elif task == "sst2":
        functions = [doc.sentences[0] for doc in docs if doc.function]
        others = [doc.sentences[0] for doc in docs if not doc.function]
        for one, other in zip(functions, others, strict=False):
            yield [one], 0
            yield [other], 1
    elif task == "mrpc":
        for i, doc in enumerate(several):
            pair = [doc.sentences[0], rng.choice(doc.sentences[1:])]
            yield pair if i % 2 else pair[::-1], i % 2
    elif task == "qnli":
        for i, doc in enumerate(several):
            answer = rng.choice(doc.sentences[1:]) if i % 2 else doc.sentences[0]
            yield [words_of(doc.name), answer], i % 2
    elif task == "rte":
        for i, s in enumerate(filter(AUXILIARY.search, single)):
            yield [s, AUXILIARY.sub(negated, s, count=1) if i % 2 else s], i % 2
    else:
        for i, s in enumerate(single):
            words = s.split()
            left = sorted(rng.sample(range(len(words)), round(i % 6 / 5 * len(words))))
            yield [s, " ".join(words[k] for k in left)], float(i % 6)


ROWS = {"train": 2000, "validation": 200, "test": 400}


def suite(docs: list[Doc]) -> dict[str, dict[str, dict[str, list]]]:
    """{task: {split: {column: values}}}, of sentences of at most 20 words.

    A sentence that an earlier split has, letter for letter, is left out. Raises ValueError if
    there are too few docstrings for a task.
    """
    seen, made = set(), {task: {} for task in TASKS}
    for split, rows in ROWS.items():
        part = []
        for doc in docs:
            new = [s for s in doc.sentences if s not in seen and len(s.split()) <= 20]
            if new and split_of(doc.module) == split:
                part.append(doc._replace(sentences=new))
        seen.update(s for doc in part for s in doc.sentences)
        for task, shape in TASKS.items():
            found = examples(task, part, random.Random(f"{task} {split}"))
            kept = list(itertools.islice(found, rows))
            if not kept:
                raise ValueError(
                    f"found no rows for {task}, {split} in {len(docs)} docstrings;"
                    " wanted the source of the standard library"
                )
            made[task][split] = {"label": [label for _, label in kept]}
            for i, column in enumerate(shape.columns):
                made[task][split][column] = [texts[i] for texts, _ in kept]
    return made


# ---------------------------------------------------------------- the docstrings' backbone


class Masked(nn.Module):
    """A masked language model that scores the masked tokens only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        hidden = self.model.base_model(input_ids).last_hidden_state[labels >= 0]
        logits = self.model.lm_head(hidden)
        loss = nn.functional.cross_entropy(logits, labels[labels >= 0])
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss)


class Blocks(Dataset):
    """Blocks of running text (n, length), of which `collate` masks a fifth of the words."""

    def __init__(self, docs: list[Doc], tokenizer, length: int):
        texts = [text for doc in docs for text in (words_of(doc.name), *doc.sentences)]
        stream = []
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, tokenizer.sep_token_id, tokenizer.sep_token_id]
        inner = torch.tensor(stream[: len(stream) // (length - 2) * (length - 2)])
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.ids = nn.functional.pad(inner.view(-1, length - 2), (1, 0), value=first)
        self.ids = nn.functional.pad(self.ids, (0, 1), value=last)
        self.mask, self.words = tokenizer.mask_token_id, len(tokenizer.all_special_ids)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch for `Masked`; special tokens come first in the vocabulary and stay."""
        ids = self.ids[indices]
        chosen = (torch.rand(ids.shape, generator=self.generator) < 0.2) & (ids >= self.words)
        labels = ids.masked_fill(~chosen, -1)
        order = torch.rand(ids.shape, generator=self.generator) + chosen
        labels[:, 0] = labels.gather(1, order.argmax(1, keepdim=True)).squeeze(1)
        return {"input_ids": ids.masked_fill(chosen, self.mask), "labels": labels}


def docs_tokenizer(texts: list[str], length: int):
    """A tokenizer of 2,000 byte-level pieces in lower case, trained on the texts: as RoBERTa's.

    Byte pairs have one order; the trainer of word pieces breaks ties anew in each process.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel()
    pieces.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    pieces.train_from_iterator(texts, BpeTrainer(vocab_size=2000, **options))
    pieces.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = "bos_token pad_token eos_token unk_token mask_token".split()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=length,
        **dict(zip(names, special, strict=True)),
    )


def look_near(model: nn.Module) -> None:
    """Make tokens attend to their neighbours and their likes at first, which saves minutes.

    Positions start as sine waves, twice as large as words, and queries equal to keys.
    """
    with torch.no_grad():
        positions = model.base_model.embeddings.position_embeddings.weight
        angles = torch.arange(len(positions))[:, None] * 100 ** -torch.linspace(0, 1, 32)
        size = 2 * 2**0.5 * model.config.initializer_range
        positions.copy_(size * torch.cat([angles.sin(), angles.cos()], 1))
        for layer in model.base_model.encoder.layer:
            query, key = layer.attention.self.query, layer.attention.self.key
            nn.init.orthogonal_(query.weight, gain=2)
            key.weight.copy_(query.weight)


BACKBONE = {  # a RoBERTa that learns from a thousand rows
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": LENGTH + 2,  # two are RoBERTa's own
    "type_vocab_size": 1,
    "initializer_range": 0.1,  # about 1 / √64
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def pretrain(
    spec: dict, docs: list[Doc], folder: Path, mixed_precision: str, recipe: Mapping
) -> dict:
    """Put a small RoBERTa, pretrained with spec["seed"], and its tokenizer in `folder`/SEED."""
    transformers.set_seed(spec["seed"])
    read = [doc for doc in docs if split_of(doc.module) == "train"]
    tokenizer = docs_tokenizer([s for doc in read for s in doc.sentences], LENGTH)
    config = transformers.RobertaPreLayerNormConfig(vocab_size=len(tokenizer), **BACKBONE)
    model = transformers.RobertaPreLayerNormForMaskedLM(config)
    look_near(model)
    data = Blocks(read, tokenizer, LENGTH // 2)  # the tasks' texts are short
    accelerate = common.accelerator(mixed_precision)
    options = {"seed": spec["seed"], "label": "pretraining on docstrings", **recipe}
    losses = common.train(Masked(model), data, accelerate, **options)
    with common.replacing(folder / str(spec["seed"])) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return {"losses": losses}


def seeds_of(config: Config) -> Iterable[int]:
    """The seeds of all runs."""
    return common.TUNING_SEEDS if config.tune else range(config.seeds)


def docs_backbones(config: Config) -> Path:
    """A folder in config.runs: suite.json, and a backbone for each seed; made where missing.

    suite.json holds `suite` as "tasks" and, as "corpus", the version of Python and the size and
    hash of the text. Raises ValueError if a backbone was made and is gone.
    """
    recipe = {"epochs": 2 if config.quick else 10, "batch_size": 32, "lr": 4e-3}
    gc.freeze()  # else the collector looks at all of torch while parsing: 2 of 5 seconds
    docs = docstrings(Path(sysconfig.get_path("stdlib")))
    corpus = {
        "python": sys.version.split()[0],
        "docstrings": len(docs),
        "sentences": sum(len(doc.sentences) for doc in docs),
        "hash": common.fingerprint(docs),
    }
    code = [common.source_of(common.__file__), common.source_of(__file__)]
    made_by = {"recipe": recipe, "corpus": corpus, "mixed_precision": config.mixed_precision}
    about = {**made_by, "code": code, **common.environment()}
    results = common.Results(config.runs, "docs-roberta", about)
    common.write_json(results.folder / "suite.json", {"corpus": corpus, "tasks": suite(docs)})
    specs = [{"row": "backbone", "task": "docstrings", "seed": seed} for seed in seeds_of(config)]
    options = {"docs": docs, "folder": results.folder, "recipe": recipe}
    work = functools.partial(pretrain, mixed_precision=config.mixed_precision, **options)
    common.finish(specs, work, results, replace(config, tune=False))
    for seed in seeds_of(config):
        folder = results.folder / str(seed)
        if not folder.is_dir():
            remedy = f"delete {results.folder}, and it will be made again"
            raise ValueError(f"found no {folder}; wanted a backbone: {remedy}")
    return results.folder


# ---------------------------------------------------------------- data

Rows = tuple[list[list[str]], list]  # columns of texts, and labels


@functools.cache
def source(name: str, backbone: str, task: str) -> dict[str, Rows]:
    """A task's splits, of the hub or a folder, or of the suite beside the embedded backbone.

    Raises ValueError if a split is missing, or not as TASKS says.
    """
    shape = shape_of(task)
    if name == "docs":
        data = common.read_json(Path(backbone) / "suite.json")["tasks"][task.removesuffix("-like")]
        return {s: ([d[name] for name in shape.columns], d["label"]) for s, d in data.items()}
    data, splits = common.load_task(name, task), ("train", "validation")
    if not set(splits) <= set(data):
        raise ValueError(f"{task} has the splits {list(data)}; wanted {' and '.join(splits)}")
    return {split: checked(data[split], f"{task}, {split}", shape) for split in splits}


def checked(data, where: str, shape: Shape) -> Rows:
    """A data set's columns and labels.

    Raises ValueError with the value found and wanted if they are not as `shape` says.
    """
    wanted = [*shape.columns, "label"]
    if set(wanted) - set(data.column_names):
        raise ValueError(f"{where}: found the columns {data.column_names}; wanted {wanted}")
    columns = [data[name][:] for name in shape.columns]
    for name, column in zip(shape.columns, columns, strict=True):
        for text in column:
            if not isinstance(text, str):
                raise ValueError(f"{where}: found {text!r} in {name}; wanted text")
    labels, score = data["label"][:], shape.classes == 1
    for y in labels:
        known = isinstance(y, int | float) and (y in (0, 1) or (score and 0 <= y <= 5))
        if not known:
            kind = "a score from 0 to 5" if score else "0 or 1"
            raise ValueError(f"{where}: found the label {y!r}; wanted {kind}")
    if len(set(labels)) < 2:
        raise ValueError(f"{where}: found the labels {set(labels)} only; wanted two or more")
    return columns, [float(y) if score else int(y) for y in labels]


def shuffled(numbers: list[int], seed: int) -> list[int]:
    """The numbers in an order of the seed's."""
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return [numbers[i] for i in order]


def pick(rows: Rows, numbers: list[int]) -> Rows:
    """Some of the rows, by their numbers."""
    columns, labels = rows
    return [[texts[i] for i in numbers] for texts in columns], [labels[i] for i in numbers]


def load(config: Config, backbone: str, task: str, seed: int) -> dict[str, Rows]:
    """A task's splits: the seed draws the training rows, and nothing else.

    validation is the docs' own, or a tenth of the training set; test is the docs' own, or the
    set called validation.
    """
    data = source(config.data, backbone, task)
    some = slice(config.evaluate or None)
    rest = shuffled(range(len(data["train"][1])), seed=0)
    if config.data == "docs":
        held, reported = data["validation"], data["test"]
    else:
        tenth = max(2, len(rest) // 10)  # one row has no correlation
        held, reported = pick(data["train"], rest[:tenth][some]), data["validation"]
        rest = rest[tenth:]
    drawn = shuffled(rest, seed)[: config.train or None]
    scored = shuffled(range(len(reported[1])), seed=0)[some]
    return {
        "train": pick(data["train"], drawn),
        "validation": held,
        "test": pick(reported, scored),
    }


# ---------------------------------------------------------------- floors
#
# What is reached without training the backbone. A row of a table that is not above both floors has
# learned nothing that the frozen model did not know.

FLOORS = ("Majority", "Linear")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the linear floor; 1/C of its ridge


def mean_pooled(trunk: nn.Module, batch: Mapping) -> torch.Tensor:
    """Mean over tokens of a model's outputs: (n, d) of input_ids (n, tokens)."""
    hidden = trunk(**batch).last_hidden_state  # (n, tokens, d)
    kept = batch["attention_mask"][..., None]
    return (hidden * kept).sum(1) / kept.sum(1)


@torch.no_grad()
def embed(texts: list[str], trunk: nn.Module, tokenizer, length: int) -> torch.Tensor:
    """A frozen model's mean-pooled outputs (n, d), a row for each text."""
    trunk.eval()
    cut = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    starts = range(0, len(texts), 64)
    return torch.cat([mean_pooled(trunk, tokenizer(texts[i : i + 64], **cut)) for i in starts])


def features(columns: list[torch.Tensor]) -> torch.Tensor:
    """u of one text's embedding; |u − v| beside u·v, entry by entry, of two."""
    if len(columns) == 1:
        return columns[0]
    u, v = columns
    return torch.cat([(u - v).abs(), u * v], 1)


def floor_models(name: str, scalar: bool) -> list:
    """What is fitted for the floor called Majority, or for Linear: a model for each strength."""
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == "Majority":
        return [DummyRegressor() if scalar else DummyClassifier()]
    models = []
    for C in STRENGTHS:
        linear = Ridge(alpha=1 / C) if scalar else LogisticRegression(C=C, max_iter=10_000)
        models.append(make_pipeline(StandardScaler(), linear))
    return models


def floor(name: str, trunk: nn.Module, tokenizer, length: int, rows: dict, metric: str) -> tuple:
    """(scores on validation and test, the model) of a floor; it has converged, or this raises.

    Of several models it is the one that is best on validation.
    """
    from sklearn.exceptions import ConvergenceWarning

    scalar, x, found = metric == "pearson", {}, []
    for split, (columns, _) in rows.items():
        columns = [embed(texts, trunk, tokenizer, length) for texts in columns]
        x[split] = features(columns).double().numpy()
    for model in floor_models(name, scalar):
        with warnings.catch_warnings(action="error", category=ConvergenceWarning):
            model.fit(x["train"], rows["train"][1])
        predict = model.predict if scalar else model.predict_proba
        scores = {}
        for split in ("validation", "test"):
            outputs = torch.from_numpy(predict(x[split])).view(len(x[split]), -1)
            scores[split] = common.score(outputs, torch.tensor(rows[split][1]), metric)
        found.append((scores, model))
    return max(found, key=lambda pair: pair[0]["validation"])


# ---------------------------------------------------------------- texts apart


class Apart(nn.Module):
    """An encoder of each text, mean-pooled, and a linear head on u, or on (u, v, |u − v|, u·v)."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: nn.Module, texts: int, classes: int):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.head = nn.Linear(encoder.config.hidden_size * (4 if texts == 2 else 1), classes)

    def start_at(self, floor) -> None:
        """Let the head begin as the linear floor: z = w·(x − mean)/scale + b."""
        scaler, linear = floor[0], floor[1]
        w = torch.from_numpy(linear.coef_).view(1, -1) / torch.from_numpy(scaler.scale_)
        b = torch.as_tensor(linear.intercept_).view(1) - w @ torch.from_numpy(scaler.mean_)
        with torch.no_grad():
            for p in self.head.parameters():
                p.zero_()
            self.head.weight[-1:, -w.shape[1] :] = w  # of two classes, the first has logit 0
            self.head.bias[-1:] = b

    def forward(self, labels, **batch):
        """batch: input_ids and the like (n, texts, tokens)."""
        texts = batch["input_ids"].shape[1]
        pooled = mean_pooled(self.encoder, {key: x.flatten(0, 1) for key, x in batch.items()})
        columns = pooled.unflatten(0, (-1, texts)).unbind(1)
        x = features(columns)
        if texts == 2:
            x = torch.cat([*columns, x], 1)
        logits = self.head(x)
        if logits.shape[1] == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class ApartTask(Dataset):
    """As `common.TextTask`, for `Apart`: each text of a pair on its own."""

    def __init__(self, columns: list[list[str]], labels: list, tokenizer, length: int):
        self.parts = [common.TextTask([texts], labels, tokenizer, length) for texts in columns]
        self.truncated = sum(part.truncated for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, i: int) -> list[dict]:
        return [part[i] for part in self.parts]

    def collate(self, rows: list[list[dict]]) -> dict[str, torch.Tensor]:
        """A batch (n, texts, tokens)."""
        batch = self.parts[0].collate([text for row in rows for text in row])
        batch = {key: x.unflatten(0, (len(rows), -1)) for key, x in batch.items()}
        return {**batch, "labels": batch["labels"][:, 0]}


# ---------------------------------------------------------------- runs


def of_task(value, task: str):
    """A setting of one task, where tasks have each their own."""
    return value[task] if isinstance(value, Mapping) else value


def start_at_mean(model: nn.Module, labels: list[float]) -> None:
    """Let a head with one output begin at the mean of the labels, not at 0."""
    for _, p in common.head_of(model):
        if p.shape == (1,):
            nn.init.constant_(p, statistics.fmean(labels))


def run(spec: dict, config: Config, backbone: str, folder: Path) -> dict:
    """Train and score one row on one task with one seed: scores and sizes, JSON-like."""
    names, task = task_names(config), spec["task"]
    seed = 1000 * spec["seed"] + names.index(task)
    transformers.set_seed(seed)  # of the head
    pretrained = f"{backbone}/{spec['seed']}" if config.data == "docs" else backbone
    shape = shape_of(task)
    model = common.load_backbone(pretrained, shape.classes)
    tokenizer = common.load_tokenizer(pretrained)
    length = min(config.length, common.positions_of(model))
    rows = load(config, backbone, task, spec["seed"])
    sizes = {split: len(labels) for split, (_, labels) in rows.items()}
    if spec["method"] == "floor":
        found, _ = floor(spec["row"], model.base_model, tokenizer, length, rows, shape.metric)
        return {"trainable": 0, **found, "length": length, "rows": sizes}
    kind = common.TextTask
    if config.apart:
        kind, trunk = ApartTask, model.base_model
        _, linear = floor("Linear", trunk, tokenizer, length, rows, shape.metric)
        model = Apart(trunk, len(shape.columns), shape.classes)
        model.start_at(linear)
    elif shape.classes == 1:
        start_at_mean(model, rows["train"][1])
    data = {split: kind(*found, tokenizer, length) for split, found in rows.items()}
    training = {
        "epochs": of_task(spec.get("epochs", config.epochs or EPOCHS), task),
        "batch_size": config.batch_size,
        "lr": of_task(spec["lr"], task),
        "weight_decay": config.weight_decay,
        "mixed_precision": config.mixed_precision,
        "metric": shape.metric,
    }
    _, result = common.fit(spec, model, data, names, folder, seed, **training)
    truncated = {split: part.truncated for split, part in data.items()}
    return {**result, "length": length, "rows": sizes, "truncated": truncated}


def finish(specs: list[dict], config: Config, backbone: str, results: common.Results) -> list[dict]:
    """The results of all runs, in order: those on disk as they are, the others made now."""
    work = functools.partial(run, config=config, backbone=backbone, folder=results.folder)
    return common.finish(specs, work, results, config)


def check_backbone(backbone: str) -> None:
    """Raise ValueError for a backbone that is no model of text, or has another's tokenizer."""
    where = f"backbone {backbone!r}: "
    model = common.load_backbone(backbone, 2)
    words, kind = model.get_input_embeddings(), type(model).__name__
    if not isinstance(words, nn.Embedding):
        raise ValueError(f"{where}found {kind}; wanted a model of text")
    if model.config.pad_token_id is None:
        raise ValueError(f"{where}found no pad_token_id; {kind} wants one")
    found, most = len(common.load_tokenizer(backbone)), words.num_embeddings
    if found > most:
        wanted = f"at most {most}, those of the model"
        raise ValueError(f"{where}found {found} tokens in its tokenizer; wanted {wanted}")
    common.targets_of(model)  # which every table needs


def prepare(config: Config) -> tuple[str, common.Results, dict]:
    """The backbones' folder or name, where the runs are kept, and what the text is."""
    common.check_places(config, "docs")
    if config.data == "docs":
        torch.set_num_threads(1)  # so small a model is no faster with two; --jobs changes nothing
        folder = docs_backbones(config)
        made = {"backbone": folder.name, "data": config.data}
        weights = {str(seed): common.hash_of(folder / str(seed)) for seed in seeds_of(config)}
        about = {"corpus": common.read_json(folder / "suite.json")["corpus"], "weights": weights}
        return str(folder), common.results_of(config, "glue", __file__, **made), about
    check_backbone(config.backbone)  # what is wrong is said before anything is trained
    for task in TASKS:
        source(config.data, config.backbone, task)
    about = {"weights": common.hash_of(config.backbone)}
    return config.backbone, common.results_of(config, "glue", __file__), about


def compare(config: Config) -> None:
    """Make every run of the table; print it, write the JSON and draw the figure."""
    rows, rates = rows_and_rates(config)
    if config.table == "gate":
        rows = [row(name, "floor") for name in FLOORS] + rows
        rates |= dict.fromkeys(FLOORS, 0.0)
    specs = common.specify(rows, rates, task_names(config), range(config.seeds))
    backbone, results, about = prepare(config)
    figure = "glue_gate" if config.table == "gate" else "runs"
    name = "rows" if config.rows else config.table
    out = Path(config.out or results.folder / f"glue_{name}.json")
    runs = finish(specs, config, backbone, results)
    texts = [r for r in runs if r["row"] == rows[-1]["row"]]  # those of every row
    cut = sum(sum(r["truncated"].values()) for r in texts)
    note = f"Matthews, Pearson or accuracy × 100, mean over {config.seeds} seed(s)."
    note += f" Texts cut to {runs[0]['length']} tokens: {cut} of all tasks and seeds."
    common.report(config, out, runs, figure, note, **about)


def tune(config: Config) -> None:
    """Choose every row's learning rate on the validation split."""
    backbone, results, about = prepare(config)
    out = Path(config.out or results.folder / "glue_tune.json")
    name = preset(config)
    rows = [r for table in TABLES.values() for r in table(config)]
    make = functools.partial(finish, config=config, backbone=backbone, results=results)
    options = {"tuned_on": TUNED_ON.get(name), **about}
    rates = LEARNING_RATES[name]
    common.tune(config, out, rows, rates, GRID[name], task_names(config), make, **options)


def main() -> None:
    """Read the command line and do what it says."""
    config = complete(common.parse(Config, PRESETS))
    (tune if config.tune else compare)(config)


if __name__ == "__main__":
    import train_glue  # by its name, under which worker processes find what is in it

    common.one_line_errors(train_glue.main)
