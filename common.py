# SPDX-License-Identifier: MIT
"""What runs the experiments: data, backbones, baselines, loop, metrics, tables, results.

The three method files know nothing of this one. Backbones come from transformers, baselines
from PEFT, data from `datasets` and scikit-learn, devices and processes from accelerate.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, default_collate

import eigenlorax
import hra
import resora

# ---------------------------------------------------------------- files, results, errors


def one_line_errors(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake ends it with one line and exit code 1."""
    try:
        if torch.distributed.is_torchelastic_launched():  # before anything is written
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available())
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: finished runs are kept, the same command continues from them")
    except (ValueError, OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {text or type(error).__name__}")


def first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def meet() -> None:
    """Wait for the other processes, if there are any: what the first one wrote is there then."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def replacing(path: str | Path):
    """Give a temporary path beside `path` that takes its place if and when the block succeeds.

    For files and folders. Of several processes only the `first` one's takes its place. Raises
    OSError if the place cannot be written; then, as after any error in the block, nothing is left
    behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"cannot write in {path.parent}: found {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    temporary.unlink()
    try:
        yield temporary
        if not first():
            return
        if temporary.is_dir() and path.is_dir():  # of a run that was killed, or is in parallel
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            with suppress(FileNotFoundError):
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            finally:
                shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises OSError, before any work is done, if a file could not be written at `path`."""
    if Path(path).is_dir():
        raise OSError(f"cannot write {path}: found a folder; wanted the name of a file")
    with suppress(FileNotFoundError), replacing(path):
        pass  # nothing was written, so nothing takes its place


def check_places(config, embedded: bool) -> None:
    """Raises an error if results cannot be written where `config` says.

    OSError as `check_writable`; ValueError for a place in the folder of the data or the backbone,
    which results would edit, unless both are `embedded` in the script.
    """
    places = [path for path in (config.out, config.runs) if path]
    for path, key in itertools.product(places, () if embedded else ("backbone", "data")):
        folder = Path(getattr(config, key)).resolve()
        if folder.is_dir() and Path(path).resolve().is_relative_to(folder):
            raise ValueError(f"found {path} in --{key} {folder}; wanted results elsewhere")
    for path in filter(None, (config.out, f"{config.runs}/any")):
        check_writable(path)


def write_json(path: str | Path, value) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part.

    Indented, but for lists of numbers, which take a line each.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    numbers = r"\[\n([-+.\deE,\n ]+)\n *\]"  # no string has a line break of its own
    text = re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | Path):
    """Parsed JSON of a file. Raises ValueError that names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # digits beyond a limit, depth
        raise ValueError(f"{path} is not valid JSON ({error}); delete or mend it") from error


def bootstrap(differences: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences."""
    import numpy as np

    pick = np.random.default_rng(0).integers(0, len(differences), (draws, len(differences)))
    low, high = np.percentile(np.asarray(differences)[pick].mean(1), [2.5, 97.5])
    return float(low), float(high)


def over_seeds(data: dict, row: str, field: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds of a field's mean over tasks."""
    by_seed = {}
    for run in data["runs"]:
        if run["row"] == row:
            by_seed.setdefault(run["seed"], []).append(run[field])
    means = [statistics.fmean(scores) for scores in by_seed.values()]
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def gain(
    data: dict, rows: list[str], others: list[str], score: Callable[[dict], float]
) -> tuple[float, float, float]:
    """Mean `score` of the runs of `rows` minus that of `others`, and its 95 % interval.

    The differences are paired by task and seed.
    """

    def mean(names: list[str]) -> dict[tuple, float]:
        """{(task, seed): the mean over rows}."""
        found = {}
        for run in data["runs"]:
            if run["row"] in names:
                found.setdefault((run["task"], run["seed"]), []).append(score(run))
        return {pair: statistics.fmean(values) for pair, values in found.items()}

    ours, theirs = mean(rows), mean(others)
    if ours.keys() != theirs.keys():
        raise ValueError(f"found runs of {rows} that have no pair among {others}, or the reverse")
    differences = [ours[pair] - theirs[pair] for pair in ours]
    return statistics.fmean(differences), *bootstrap(differences)


def verdict(low: float, high: float, least: float = 0.0) -> str:
    """What an interval of a difference says of the claim that it is above `least`."""
    if low > least:
        return "supported here"
    return "not supported here" if high < least else "undecided"


def points(run: dict) -> float:
    """The test score of a run, × 100."""
    return 100 * run["test"]


def log_loss(run: dict) -> float:
    """Minus the logarithm of a run's training loss, mean over its epochs: higher is faster."""
    return -math.log(statistics.fmean(run["losses"]))


def judge(
    data: dict,
    claim: str,
    rows: list[str],
    others: list[str],
    score: Callable[[dict], float] = points,
    least: float = 0.0,
) -> tuple[str, str, str]:
    """The claim that `rows` beat `others` by more than `least`: (claim, difference, verdict).

    The difference, with its 95 % interval, is in points, or for `log_loss` in per cent.
    """
    mean, low, high = gain(data, rows, others, score)
    said, unit = verdict(low, high, least), "points"
    if score is log_loss:
        mean, low, high = (100 * (math.exp(-x) - 1) for x in (mean, high, low))
        unit = "% training loss (− is faster)"
    return claim, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {unit}", said


def claims_table(claims: list[tuple[str, str, str]]) -> str:
    """What `judge` returned for each claim, as a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in claims]
    return "\n".join(["| claim | difference, 95 % interval | |", "|---|---:|---|", *lines])


def plotting():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, source: str | Path) -> Path:
    """Save a figure as PNG beside the JSON it was drawn from; returns its path."""
    target = Path(source).with_suffix(".png")
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    plotting().close(figure)
    return target


def environment() -> dict:
    """Versions and hardware that a result depends on."""
    packages = "torch numpy transformers peft accelerate datasets scikit-learn".split()
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": platform.system(),
        "device": device,
        "cpus": os.cpu_count(),
    }


def fingerprint(value) -> str:
    """Sixteen hexadecimal digits that change with any part of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code_fingerprint(*modules) -> str:
    """The same for source files: their syntax trees, so that comments and layout do not count."""
    trees = [ast.dump(ast.parse(Path(m.__file__).read_text(encoding="utf-8"))) for m in modules]
    return fingerprint(trees)


class Results:
    """Finished runs of one configuration, a JSON file each, in runs/NAME-FINGERPRINT.

    A run is a dict that names itself (row, task, seed …). `put` writes atomically, so a
    process that is killed at any moment loses at most the run it was in.
    """

    def __init__(self, folder: str | Path, name: str, config: dict):
        """config: all that the runs depend on, JSON-like. Raises OSError if not writable."""
        self.config = config
        self.folder = Path(folder) / f"{name}-{fingerprint(config)}"
        write_json(self.folder / "config.json", config)

    def _file(self, run: Mapping) -> Path:
        return self.folder / "finished" / f"{fingerprint(dict(run))}.json"

    def get(self, run: Mapping) -> dict | None:
        """The result of a run, or None if it has not finished yet."""
        file = self._file(run)
        if not file.exists():
            return None
        found = read_json(file)
        result = found.get("result") if isinstance(found, dict) else None
        if not (result and isinstance(result, dict)):
            raise ValueError(f"{file} holds no result; delete it, and it will be made again")
        return result

    def put(self, run: Mapping, result: Mapping) -> None:
        """Keep the result of a finished run."""
        write_json(self._file(run), {"run": dict(run), "result": dict(result)})
        meet()


# ---------------------------------------------------------------- data and backbones


def load_task(name_or_folder: str, task: str | None = None):
    """A `datasets.DatasetDict`: a hub name with its configuration, FOLDER/TASK, or FOLDER.

    Raises ValueError if there is no such data set.
    """
    from datasets import disable_progress_bars, load_dataset, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    folder = inner = Path(name_or_folder)
    try:
        if folder.is_dir():
            inner = folder / (task or "")
            if not inner.is_dir():
                found = sorted(child.name for child in folder.iterdir())
                raise ValueError(f"no folder {task!r} in {folder}; found {found}")
            return load_dataset(str(inner))
        return load_dataset(name_or_folder, task)
    except Exception as error:  # datasets, pyarrow and hub raise each their own kinds
        if isinstance(error, ValueError) and str(error).startswith("no folder"):
            raise
        cause = error.__cause__ or error
        first = str(cause).strip().partition("\n")[0]
        raise ValueError(
            f"data {str(inner)!r}: found neither a readable folder of data nor a hub data set"
            f" ({type(cause).__name__}: {first})"
        ) from error


def load_backbone(name_or_folder: str, labels: int) -> nn.Module:
    """A pretrained transformers classifier with a fresh head of `labels` outputs, in float32.

    A hub name or a folder with config.json and safetensors; pickles are never read. Raises
    ValueError if there is none, if a tensor of the trunk is missing, or if one is not finite.
    """
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        utils,
    )

    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    wanted = "a folder with config.json and model.safetensors, or a model of the hub"
    try:
        config = AutoConfig.from_pretrained(name_or_folder, num_labels=labels)
        vision = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        kind = AutoModelForImageClassification if vision else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(
            name_or_folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, hub and safetensors raise each their own kinds
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"backbone {name_or_folder!r}: wanted {wanted}; found {first}") from error
    head = {name for name, _ in head_of(model)}
    unused = {n for n, _ in model.named_parameters() if n.endswith("mask_token")}  # pretraining's
    missing = sorted(set(info["missing_keys"]) - head - unused)
    for name, p in head_of(model):  # a fresh head, whatever the checkpoint had
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear):
            std = getattr(config, "initializer_range", 0.02)  # T5 has none; BERT's otherwise
            nn.init.normal_(p, std=std) if p.dim() > 1 else nn.init.zeros_(p)
    if missing:
        raise ValueError(f"backbone {name_or_folder!r}: found no weights for {missing[:3]}")
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if wrong := sorted(set(shapes) - head):
        raise ValueError(f"backbone {name_or_folder!r}: {wrong[:3]} do not fit its config.json")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"backbone {name_or_folder!r}: found a non-finite value in {name}")
    return model


def load_tokenizer(name_or_folder: str):
    """A backbone's tokenizer, as transformers loads it.

    Raises ValueError if there is none, or none that can pad.
    """
    from transformers import AutoTokenizer, utils

    utils.logging.set_verbosity_error()
    wanted = f"backbone {name_or_folder!r}: wanted a tokenizer beside the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except Exception as error:  # transformers, hub and tokenizers raise each their own kinds
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{wanted}; found {first}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one of nothing
        raise ValueError(f"{wanted}; found none")
    if tokenizer.pad_token is None:
        raise ValueError(f"{wanted} that has a padding token; found one that has none")
    return tokenizer


def positions_of(model: nn.Module) -> int:
    """The longest text, in tokens, that a model has positions for."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = -1 if module.padding_idx is None else module.padding_idx  # as RoBERTa counts
            return module.num_embeddings - before - 1
    return model.config.max_position_embeddings


def head_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters outside the pretrained trunk: the classification head."""
    prefix = f"{model.base_model_prefix}."
    return [(n, p) for n, p in model.named_parameters() if not n.startswith(prefix)]


def targets_of(model: nn.Module, every: bool = False) -> list[str]:
    """The last names of the query and value projections, as LoRA's paper adapts them.

    every: the names of all Linear layers of the numbered blocks, as in HRA's Table 2. Raises
    ValueError that lists the Linear layers if the model has neither pair of names.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if every:
        return [name for name in names if re.search(r"\.\d+\.", name)]
    last = {name.rpartition(".")[2] for name in names}
    for pair in (["query", "value"], ["q_proj", "v_proj"], ["query_proj", "value_proj"]):
        if last.issuperset(pair):
            return pair
    raise ValueError(
        "wanted Linear layers named query/value, q_proj/v_proj or query_proj/value_proj;"
        f" found {sorted(last)} in {type(model).__name__}"
    )


class ImageTask(Dataset):
    """Images (uint8, (n, channels, height, width)) and labels (n,), normalised by `collate`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, mean, std):
        self.images, self.labels = images, labels
        self.mean = torch.as_tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.as_tensor(std).view(-1, 1, 1) * 255

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch as transformers' image classifiers take it."""
        pixels = (self.images[indices].float() - self.mean) / self.std
        return {"pixel_values": pixels, "labels": self.labels[indices]}


class TextTask(Dataset):
    """Texts, or pairs of texts, and labels (n,), cut to `length` tokens and padded by `collate`.

    columns: one list of n texts, or two. `truncated` says how many were longer.
    """

    def __init__(self, columns: list[list[str]], labels: torch.Tensor, tokenizer, length: int):
        self.labels, self.tokenizer = labels, tokenizer
        self.rows = tokenizer(*columns, truncation=True, max_length=length)
        whole = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        self.truncated = sum(len(ids) > length for ids in whole)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch as transformers' text classifiers take it, as long as its longest text."""
        rows = {key: [values[i] for i in indices] for key, values in self.rows.items()}
        padded = self.tokenizer.pad(rows, return_tensors="pt", verbose=False)
        return {**padded, "labels": self.labels[indices]}


# ---------------------------------------------------------------- adapters on disk


LARGEST_CONFIG = 2**20  # bytes


class LazyAdapter(Mapping):
    """A PEFT LoRA folder as {module name: (B (o, r), A (r, d))}, read when asked for.

    Only safetensors: a pickle is refused, never opened. Raises ValueError, naming the file,
    if something is missing, truncated, not LoRA, or not finite (the last when it is read).
    """

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / "adapter_model.safetensors"
        if not self.file.is_file():
            found = sorted(child.name for child in Path(folder).glob("*"))
            raise ValueError(f"wanted {self.file}; found {found or 'no such folder'}")
        about = self.file.with_name("adapter_config.json")
        if about.is_file() and about.stat().st_size > LARGEST_CONFIG:
            size = about.stat().st_size
            raise ValueError(f"{about} has {size:,} bytes; wanted at most {LARGEST_CONFIG:,}")
        self.config = read_json(about) if about.is_file() else None
        if not isinstance(self.config, dict):
            raise ValueError(f"wanted a JSON object in {about}; found {self.config or 'none'}")
        patterns = self.config.get("alpha_pattern")
        for pattern in patterns if isinstance(patterns, dict) else ():  # PEFT takes it as a regex
            if re.search(r"[)*+?}][*+?{]", pattern) or len(pattern) > 200:
                raise ValueError(f"{about}: alpha_pattern has {pattern!r:.80}; wanted a name")
        with self._open() as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        names = self._pairs(empty)
        bare = {key: key.removeprefix("base_model.model.") for key in shapes}
        self._keys = {n: [k for k in bare if bare[k].startswith(f"{n}.lora_")] for n in names}

    def _open(self):
        try:
            return safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} is not a whole safetensors file: {error}") from error

    def _pairs(self, tensors: dict) -> dict:
        try:
            return eigenlorax.lora_pairs(tensors, self.config)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise ValueError(f"{self.file}, with its adapter_config.json: {error}") from error

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with self._open() as tensors:
            copies = {k: tensors.get_tensor(k).clone() for k in self._keys[name]}  # no mapped file
        return self._pairs(copies)[name]

    def __iter__(self):
        return iter(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # without reading anything

    def __len__(self) -> int:
        return len(self._keys)


def adapters_of_one_base(folders: Iterable[str | Path]) -> list[LazyAdapter]:
    """The adapters in these folders. Raises ValueError if two were trained on different models."""
    adapters = [LazyAdapter(folder) for folder in folders]
    bases = {a.config.get("base_model_name_or_path"): a.file for a in adapters}
    if len(bases) > 1:
        found = "; ".join(f"{file}: {base}" for base, file in list(bases.items())[:2])
        raise ValueError(f"found adapters of {len(bases)} base models ({found}); wanted one")
    return adapters


# ---------------------------------------------------------------- training and scoring


class Diverged(ValueError):
    """Training reached a loss that is not finite."""


def accelerator(cpu: bool = False, mixed_precision: str | None = None):
    """An Accelerator whose processes share each batch, so that batch size means the same on any."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    cpu = cpu or not torch.accelerator.is_available()  # else torchrun's processes would not meet
    sharing = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, dataloader_config=sharing)


def train(
    model: nn.Module,
    data: Dataset,
    accelerate,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    collate: Callable | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    penalty: Callable[[float], torch.Tensor] | None = None,
    describe: str | None = None,
) -> list[float]:
    """AdamW on the parameters that require grad, linear warm-up and decay; mean loss per epoch.

    penalty(progress) is added to every step's loss; progress and warmup are fractions of all
    steps. With `describe`, a progress bar of that name counts the steps. Raises Diverged, a
    ValueError, if the loss is not finite.

    Several processes share each batch of `batch_size` rows and give the weights that one would,
    to rounding, for a loss that is a mean over rows and without dropout, which each draws on its
    own. ReSoRA's penalty then is the mean of theirs: each sees the tokens of its own rows.
    """
    from accelerate.data_loader import prepare_data_loader
    from tqdm.auto import tqdm
    from transformers import get_linear_schedule_with_warmup, set_seed

    set_seed(seed)
    index, count = accelerate.process_index, accelerate.num_processes

    def part(rows: list) -> dict:
        """This process's rows of a batch; one at least, which then counts nothing."""
        return collated(rows[index::count] or rows[:1])

    collated = collate or default_collate
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=part)
    loader = prepare_data_loader(  # whole batches, in an order of the seed's and the epoch's
        loader, accelerate.device, 1, 0, put_on_device=True, use_seedable_sampler=True
    )
    steps = epochs * len(loader)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    model, optimizer, schedule = accelerate.prepare(model, optimizer, schedule)
    if index:
        set_seed(seed + index)  # of its dropout
    losses, step = [], 0
    silent = describe is None or not first()
    with tqdm(total=steps, desc=describe, disable=silent, leave=False) as bar:
        for epoch in range(epochs):
            model.train()
            total = torch.zeros((), device=accelerate.device)
            for i, batch in enumerate(loader):
                rows = min(batch_size, len(data) - i * batch_size)
                share = len(range(index, rows, count)) * count / rows
                task_loss = share * model(**batch).loss
                extra = penalty(step / steps) if penalty else 0.0
                accelerate.backward(task_loss + extra)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += task_loss.detach()
                step += 1
                bar.update()
            losses.append(accelerate.reduce(total, "mean").item() / len(loader))
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"found loss {losses[-1]} in epoch {epoch + 1} at learning rate {lr}"
                )
    return losses


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    accelerate,
    *,
    collate: Callable | None = None,
    metric: str = "accuracy",
    batch_size: int = 256,
) -> float:
    """`model` on `data` by scikit-learn: "accuracy" (0..1), "matthews" or "pearson" (−1..1).

    Raises Diverged if an output is not finite.
    """
    from sklearn.feature_selection import r_regression
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    batch_size *= accelerate.num_processes
    loader = accelerate.prepare(DataLoader(data, batch_size, collate_fn=collate))
    model = model.to(accelerate.device).eval()
    outputs, labels = [], []
    for batch in loader:
        pair = accelerate.gather_for_metrics((model(**batch).logits, batch["labels"]))
        outputs.append(pair[0].float().cpu())
        labels.append(pair[1].cpu())
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    if not torch.isfinite(outputs).all():
        raise Diverged(f"found a non-finite output among {len(outputs)} after training")
    if metric == "pearson":  # centred before: r_regression subtracts squares, which cancel
        x, y = (v.double().flatten() - v.double().mean() for v in (outputs, labels))
        return float(r_regression(x[:, None].numpy(), y.numpy(), center=False)[0])
    score = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric]
    return float(score(labels, outputs.argmax(-1)))


# ---------------------------------------------------------------- methods by name


def _peft(model: nn.Module, row: Mapping, seed: int) -> nn.Module:
    import peft

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    warnings.filterwarnings("ignore", module=r"peft\.tuners\.boft")  # about CUDA, on every run
    targets, rank = targets_of(model, row.get("every", False)), row["rank"]
    config = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        "pissa": lambda: peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="pissa"
        ),
        "vera": lambda: peft.VeraConfig(r=rank, target_modules=targets, projection_prng_key=seed),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=rank, target_modules=targets),
        "boft": lambda: peft.BOFTConfig(
            boft_block_size=rank, boft_n_butterfly_factor=2, target_modules=targets
        ),
    }[row["method"]]()
    return peft.get_peft_model(model, config)


class Below(nn.Module):
    """Puts trained rows below fixed ones."""

    def __init__(self, fixed: torch.Tensor):
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fixed, rows])


def _eigenlorax(model: nn.Module, row: Mapping, generator, adapters: list[Mapping]) -> dict:
    k = row["components"]
    options = {"rank": row["rank"], "generator": generator}
    if "recycle" in row:
        pseudo = row.get("pseudo", 0)
        subspaces = eigenlorax.recycle(adapters, k=k, pseudo=pseudo, generator=generator)
    else:  # a random subspace of the same size
        subspaces = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(tuple(targets_of(model))):
                o, d = layer.weight.shape
                A, B = (
                    torch.randn(k, d, generator=generator),
                    torch.randn(o, k, generator=generator),
                )
                subspaces |= eigenlorax.recycle([{name: (B, A)}], k=k)
    if extra := row.get("random"):  # unit directions, not made orthogonal to anything
        for side in (side for s in subspaces.values() for side in (s.A, s.B)):
            noise = torch.randn(extra, side.V.shape[1], generator=generator)
            side.V = torch.cat([side.V, nn.functional.normalize(noise).to(side.V)])
    if row.get("frozen"):
        options["init"] = "random"
    modules = eigenlorax.adapt(model, subspaces, **options)
    if free := row.get("free"):  # the last rows of V train as well
        for module, side in ((m, side) for m in modules.values() for side in ("V_A", "V_B")):
            V = module._buffers.pop(side)
            module.register_parameter(side, nn.Parameter(V[-free:].contiguous()))
            parametrize.register_parametrization(module, side, Below(V[:-free]), unsafe=True)
    if row.get("frozen"):
        for module in modules.values():
            module.requires_grad_(False)
    return modules


PEFT_METHODS = ("lora", "pissa", "vera", "oft", "boft")
OUR_METHODS = ("eigenlorax", "hra", "resora")


def build(model: nn.Module, row: Mapping, seed: int, adapters: Iterable[Mapping] = ()):
    """Adapt `model` as `row["method"]` says; returns (model, modules of ours by name, penalty).

    The trunk is frozen but for the method's own parameters; the head trains in every method.
    penalty(progress) is what to add to the loss at a fraction 0..1 of training, or None.
    """
    method, modules, penalty = row["method"], {}, None
    generator = torch.Generator().manual_seed(seed)
    head = [p for _, p in head_of(model)]
    model.requires_grad_(method == "full")
    if method in PEFT_METHODS:
        model = _peft(model, row, seed)
    elif method == "eigenlorax":
        modules = _eigenlorax(model, row, generator, list(adapters))
    elif method == "hra":
        strict = row.get("strict", False)
        start = {"strict": strict, "init": "random" if strict else "identity"}
        targets = targets_of(model, row.get("every", False))
        modules = hra.adapt(model, targets, row["rank"], generator=generator, **start)
        if lam := row.get("lam"):
            penalty = lambda _: lam * sum(m.penalty() for m in modules.values())  # noqa: E731
    elif method == "resora":
        modules = resora.adapt(model, targets_of(model), row["rank"], generator=generator)
        if lam := row.get("lam"):
            regulariser = resora.ReSoRA(model, row["metric"], row["level"])
            ramp = row.get("ramp", 0.0)  # the fraction of training over which λ grows from 0
            weight = lambda t: lam * min(1.0, t / ramp) if ramp else lam  # noqa: E731
            penalty = lambda t: weight(t) * regulariser.penalty()  # noqa: E731
    elif method not in ("full", "head"):
        wanted = ["full", "head", *PEFT_METHODS, *OUR_METHODS]
        raise ValueError(f"found method {method!r}; wanted one of {wanted}")
    for p in head:
        p.requires_grad_(True)
    return model, modules, penalty


# ---------------------------------------------------------------- the command line


def parse(kind: type, arguments: list[str] | None = None):
    """The command line as an instance of the dataclass `kind`: an option per field.

    Help is the comment on the field's line; the description is the docstring of its module.
    """
    module = sys.modules[kind.__module__]
    parser = argparse.ArgumentParser(
        description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comments = {}
    for line in Path(module.__file__).read_text(encoding="utf-8").splitlines():
        name, _, comment = line.strip().partition("  # ")
        comments[name.partition(":")[0]] = comments.get(name.partition(":")[0], comment)
    for f in fields(kind):
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
    return kind(**vars(parser.parse_args(arguments)))


def filled(config, preset: Mapping):
    """`config` with the preset's values where the user left the default."""
    unset = {f.name: f.default for f in fields(config)}
    return replace(config, **{k: v for k, v in preset.items() if getattr(config, k) == unset[k]})


def check_options(config, least: Mapping[str, int], known: Mapping[str, list[str]]) -> None:
    """Raises ValueError for an option below its least value, or not one of those known."""
    for name, wanted in least.items():
        if getattr(config, name) < wanted:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"found {option} {getattr(config, name)}; wanted {wanted} or more")
    if not math.isfinite(config.weight_decay):
        raise ValueError(f"found --weight-decay {config.weight_decay}; wanted a finite number")
    for name, choices in {**known, "mixed_precision": ["no", "bf16", "fp16"]}.items():
        if getattr(config, name) not in choices:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"found {option} {getattr(config, name)}; wanted one of {choices}")
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("found --mixed-precision fp16 without a GPU; wanted no or bf16")
    if config.jobs > 1 and torch.distributed.is_initialized():
        raise ValueError(f"found --jobs {config.jobs} under torchrun; wanted 1")
    if config.seeds > TUNING_SEEDS[0]:
        raise ValueError(f"found --seeds {config.seeds}; wanted at most {TUNING_SEEDS[0]}")
    if config.out and Path(config.out).suffix != ".json":
        raise ValueError(f"found --out {config.out}; wanted a name that ends in .json")


def check_components(components: int, rank: int, others: int) -> None:
    """Raises ValueError if `others` adapters of a rank have fewer directions than components."""
    if components > rank * others:
        raise ValueError(
            f"found --components {components}; wanted at most {rank * others},"
            f" the directions of {others} adapters of rank {rank}"
        )


def cores() -> int:
    """How many processors this process may use; one of torchrun's processes: one."""
    if torch.distributed.is_initialized():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def resolved(name_or_folder: str) -> str:
    """A folder's full path and a fingerprint of its files' states; a hub name as it is."""
    folder = Path(name_or_folder)
    if not folder.is_dir():
        return name_or_folder
    inner = os.walk(folder.resolve(), followlinks=True)
    found = sorted(Path(parent, name) for parent, _, names in inner for name in names)
    files = [(str(f), f.stat()) for f in found if f.is_file()]
    state = fingerprint([(name, about.st_size, about.st_mtime_ns) for name, about in files])
    return f"{folder.resolve()} {state}"


# ---------------------------------------------------------------- tables of runs

NEEDS = {"recycle", "start"}  # what a row builds on: its adapters, or the state it goes on from
TUNING_SEEDS = (100,)


def row(name: str, method: str, **options) -> dict:
    """A line of a table: what it is called and how `build` makes it."""
    return {"row": name, "method": method, **options}


def read_rates(text: str, preset: Mapping) -> dict:
    """The preset's learning rates, or "ROW=RATE;…". Raises ValueError for unknown rows."""
    rates = dict(preset)
    for item in filter(None, text.split(";")):
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


def specify(
    rows: list[dict], rates: Mapping, tasks: Iterable[str], seeds: Iterable[int]
) -> list[dict]:
    """Every run of the rows: row × task × seed, with its learning rate.

    A row has the rate of its name, or that of the row it names as `rate`.
    """

    def rate(r: dict) -> dict:
        """The row with its rate, and so the rows that it builds on."""
        kept = {k: v for k, v in r.items() if k != "rate"} | {k: rate(r[k]) for k in NEEDS & set(r)}
        return {**kept, "lr": rates[r.get("rate", r["row"])]}

    rated = [rate(r) for r in rows]
    return [{**r, "task": t, "seed": s} for s in seeds for t in tasks for r in rated]


def waves(specs: list[dict]) -> list[list[dict]]:
    """The runs in groups, each of which builds on the groups before it and not on itself."""
    depth = lambda row: max((1 + depth(row[k]) for k in NEEDS & set(row)), default=0)  # noqa: E731
    groups = {}
    for spec in specs:
        groups.setdefault(depth(spec), []).append(spec)
    return [group for _, group in sorted(groups.items())]


def title(spec: dict) -> str:
    """How messages call a run."""
    return f"{spec['row']}, {spec['task']}, seed {spec['seed']}"


def adapter_folder(folder: Path, spec: dict) -> Path:
    """Where a run that others build on leaves what it trained."""
    return folder / "adapters" / fingerprint(spec)


def recycled(spec: dict, names: list[str], folder: Path) -> list[Mapping]:
    """The adapters of the other tasks, as PEFT left them on disk; with noise if the row says so."""
    others = [{**spec["recycle"], "task": t, "seed": spec["seed"]} for t in names]
    others.pop(names.index(spec["task"]))
    adapters = adapters_of_one_base(adapter_folder(folder, o) for o in others)
    adapters = adapters[: spec.get("adapters")]
    if noise := spec.get("noise"):  # a fraction of the root mean square of each matrix
        generator = torch.Generator().manual_seed(spec["seed"])

        def add(W: torch.Tensor) -> torch.Tensor:
            scale = noise * W.square().mean().sqrt()
            return W + scale * torch.randn(W.shape, generator=generator)

        adapters = [{name: (add(B), add(A)) for name, (B, A) in a.items()} for a in adapters]
    return adapters


def fit(
    spec: dict,
    model: nn.Module,
    data: Mapping[str, Dataset],
    names: list[str],
    folder: Path,
    seed: int,
    *,
    mixed_precision: str,
    metric: str = "accuracy",
    **training,
) -> tuple[nn.Module, dict, dict]:
    """Adapt, train and score a model as a run says: (model, modules of ours, result).

    data: the splits train, validation and test, each with a `collate`; names: of all tasks;
    folder: where runs leave what others build on; training: what `train` takes besides.
    """
    accelerate = accelerator(mixed_precision=mixed_precision)
    head = sum(p.numel() for _, p in head_of(model))
    adapters = recycled(spec, names, folder) if "recycle" in spec else []
    model, modules, penalty = build(model, spec, seed, adapters)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if "start" in spec:
        start = {**spec["start"], "task": spec["task"], "seed": spec["seed"]}
        file = adapter_folder(folder, start) / "state.safetensors"
        try:
            model.load_state_dict(load_file(file), False)
        except (SafetensorError, OSError) as error:
            remedy = f"delete {folder}, and its runs will be made again"
            raise ValueError(f"{file} is missing or damaged ({error}); {remedy}") from error
    if spec.get("regauge"):
        for module in modules.values():
            B, A = resora.regauge(module.B.data, module.A.data)
            module.B.data, module.A.data = B, A
    try:
        losses = train(
            model,
            data["train"],
            accelerate,
            seed=seed + ("start" in spec),
            collate=data["train"].collate,
            penalty=penalty,
            **training,
        )
        scores = {
            split: evaluate(
                model, data[split], accelerate, collate=data[split].collate, metric=metric
            )
            for split in ("validation", "test")
        }
    except Diverged as error:
        raise Diverged(f"{title(spec)}: {error}; lower its rate with --lr") from error
    trained = sum(p.numel() for p in trainable.values()) - head
    result = {"trainable": trained, "losses": losses, **scores}
    if spec["method"] == "lora":
        with replacing(adapter_folder(folder, spec)) as temporary:
            model.save_pretrained(temporary)
    if spec["method"] == "hra":  # ‖I − ÛᵀÛ‖_F, mean over layers
        orthogonality = [module.penalty().sqrt().item() for module in modules.values()]
        result["orthogonality"] = statistics.fmean(orthogonality)
    if spec["method"] in ("eigenlorax", "resora"):  # what a second stage starts from
        with replacing(adapter_folder(folder, spec)) as temporary:
            temporary.mkdir()
            save_file({n: p.data for n, p in trainable.items()}, temporary / "state.safetensors")
    return model, modules, result


def quiet_single_thread() -> None:
    """What a worker process starts with: one thread, Ctrl-C left to its parent, its end as well."""
    from tqdm.auto import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow = lambda: (parent_process().join(), os._exit(1))  # noqa: E731
    threading.Thread(target=follow, daemon=True).start()


def forgiving(spec: dict, work: Callable[[dict], dict]) -> dict:
    """`work(spec)`; where the training diverges, a score of 0."""
    try:
        return work(spec)
    except Diverged:
        return {"validation": 0.0}


def finish(specs: list[dict], work: Callable[[dict], dict], results: Results, config) -> list[dict]:
    """The results of all runs, in order: those on disk as they are, the others made by `work`.

    With config.jobs above one, each is a process of one thread. Raises OSError if one was killed,
    and Diverged, unless config.tune.
    """
    from tqdm.auto import tqdm

    work = functools.partial(forgiving, work=work) if config.tune else work
    missing = [spec for wave in waves(specs) for spec in wave if results.get(spec) is None]
    kept = len(specs) - len(missing)
    bar = tqdm(total=len(specs), initial=kept, unit="run", disable=not first())
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


def results_of(config, name: str, *scripts, **about) -> Results:
    """Where the runs of a configuration are kept, by all that they depend on.

    scripts: the modules that make them; about: what stands in for, or adds to, options.
    """
    alike = ("table", "seeds", "lr", "quick", "tune", "jobs", "runs", "out", "components", "rank")
    settings = {k: v for k, v in asdict(config).items() if k not in alike}
    for key in sorted({"backbone", "data"} - set(about)):
        settings[key] = resolved(settings[key])  # edited files begin anew
    code = code_fingerprint(sys.modules[__name__], eigenlorax, hra, resora, *scripts)
    return Results(config.runs, name, {**settings, **about, "code": code, **environment()})


def stated(config) -> dict:
    """The options that a results file names: not where files lie, and a folder by its name."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("runs", "out")}
    return settings | {k: Path(settings[k]).name for k in ("backbone", "data")}


def summary(runs: list[dict], split: str = "test") -> list[dict]:
    """One entry per row: size, score per task (mean over seeds), mean ± std over seeds."""
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
    """The rows of `summary` as a Markdown table, scores in per cent."""
    heads = ["", "trainable", *rows[0]["tasks"], "mean ± std"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for r in rows:
        scores = [f"{100 * score:.1f}" for score in r["tasks"].values()]
        last = f"{100 * r['mean']:.1f} ± {100 * r['std']:.1f}"
        lines.append([r["row"], f"{r['trainable']:,}", *scores, last])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    pad = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])  # noqa: E731
    return "\n".join("| " + " | ".join(map(pad, x, range(len(x)))) + " |" for x in lines)


def report(config, out: Path, runs: list[dict], figure: str, note: str, **about) -> None:
    """Print a table and its note, write its JSON and draw its figure, figures/FIGURE.py."""
    draws = import_module(f"figures.{figure}")
    setting = {"config": stated(config), "environment": environment(), **about}
    data = {**setting, "rows": summary(runs), "runs": runs}
    if not first():
        return
    write_json(out, data)
    print(f"{as_table(data['rows'])}\n\n{note}")
    if hasattr(draws, "verdicts"):
        print(draws.verdicts(data))
    print(f"{out}\n{draws.draw(out)}")


def tune(
    config,
    out: Path,
    rows: Iterable[dict],
    rates: Mapping,
    grid: Iterable[float],
    tasks: list[str],
    finish: Callable[[list[dict]], list[dict]],
    tuned_on: list[str] | None = None,
    **about,
) -> None:
    """Choose every row's learning rate on the validation split, with a seed that no table uses.

    rows: those of all tables; a row is tuned if `rates` has its name, and else has the rate of
    another. finish: makes the runs. tuned_on: the tasks whose mean score decides; all by default.
    """
    rates, validation = dict(rates), {}
    rows = {r["row"]: r for r in rows if r["row"] in rates}
    for later in (False, True):  # the adapters first, at their best rate
        group = [r for r in rows.values() if ("recycle" in r) == later]
        if later:
            adapters = {r["recycle"]["row"]: r["recycle"] for r in group}
            finish(specify(adapters.values(), rates, tasks, TUNING_SEEDS))
        specs = [
            spec
            for lr in grid
            for spec in specify(
                group, rates | {r["row"]: lr for r in group}, tuned_on or tasks, TUNING_SEEDS
            )
        ]
        runs = finish(specs)
        for r in group:
            scores = {
                lr: statistics.fmean(
                    x["validation"] for x in runs if (x["row"], x["lr"]) == (r["row"], lr)
                )
                for lr in grid
            }
            validation[r["row"]] = {str(lr): score for lr, score in scores.items()}
            rates[r["row"]] = max(scores, key=scores.get)
            if first():
                found = (f"{s:.3f}" for s in scores.values())
                print(f"{r['row']:20} {rates[r['row']]:<8g}", *found)
    setting = {"config": stated(config), "environment": environment(), **about}
    found = {"tuned_on": tuned_on or tasks, "validation": validation, "chosen": rates}
    write_json(out, {**setting, **found})
    if first():
        print(out)


def bars(axes, rows: list[dict]) -> None:
    """A bar per row of `summary`, dark for ours: mean ± std over seeds, and a stroke per task."""
    ours = ("EigenLoRAx", "HRA", "ReSoRA")
    axes.barh(
        range(len(rows)),
        [100 * r["mean"] for r in rows],
        xerr=[100 * r["std"] for r in rows],
        color=["0.45" if any(name in r["row"] for name in ours) else "0.8" for r in rows],
        capsize=3,
    )
    for i, r in enumerate(rows):
        scores = [100 * score for score in r["tasks"].values()]
        axes.plot(scores, [i] * len(scores), "|", color="black", markersize=8)
    axes.set_yticks(range(len(rows)), [f"{r['row']}  ({r['trainable']:,})" for r in rows])
    axes.invert_yaxis()
    axes.set_ylabel("method (trained numbers, head apart)")


def sweep(axes, data: dict, rows: Mapping[str, str], lora: str) -> None:
    """HRA's score at each {value: row}, mean ± std over seeds; lines for LoRA, OFT and BOFT."""
    found = [over_seeds(data, row, "test") for row in rows.values()]
    means, stds = ([100 * x for x in values] for values in zip(*found, strict=True))
    axes.errorbar(range(len(rows)), means, stds, fmt="D-", color="0.45", capsize=2, label="HRA")
    for other, style in {lora: "-.", "OFT": (0, (1, 3)), "BOFT": (0, (5, 5))}.items():
        height = 100 * over_seeds(data, other, "test")[0]
        axes.axhline(height, color="black", linewidth=0.8, linestyle=style, label=other)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_ylabel("score × 100, mean ± std")
    axes.legend(frameon=False, fontsize="small")


def draw_bars(source: str | Path, label: str, title: str, more: str = "") -> Path:
    """Draw a results file's rows as `bars` over `label`, write them, then `more`, as Markdown.

    Both go beside the file; returns the path of the PNG.
    """
    rows = read_json(source)["rows"]
    Path(source).with_suffix(".md").write_text(f"{as_table(rows)}\n{more}", encoding="utf-8")
    figure, axes = plotting().subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    bars(axes, rows)
    axes.set_xlabel(f"{label} (bar: mean ± std over seeds; strokes: the tasks)")
    axes.set_title(title, fontsize="medium", loc="right")
    return save_figure(figure, source)


def draw_rates(source: str | Path) -> Path:
    """Draw what `tune` wrote: validation score against learning rate, a line per row."""
    data = read_json(source)
    plt = plotting()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, scores) in enumerate(data["validation"].items()):
        rates = sorted(map(float, scores))
        heights = [100 * scores[str(rate)] for rate in rates]
        grey = str(0.7 * (i % 3) / 2)
        axes.plot(rates, heights, "os^D*"[i % 5], linestyle=("-", "--", ":")[i % 3], color=grey)
        axes.lines[-1].set_label(f"{name}: {data['chosen'][name]:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation score in %, mean of tasks")
    axes.set_title("Each method at the learning rate that validation chose", fontsize="medium")
    figure.legend(loc="outside right", frameon=False, fontsize="small")
    return save_figure(figure, source)
