# SPDX-License-Identifier: MIT
"""What runs the experiments: data, backbones, baselines, loop, metrics, results.

The three method files know nothing of this one. Backbones come from transformers, baselines
from PEFT, data from `datasets` and scikit-learn, devices and processes from accelerate.
"""

import ast
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

import eigenlorax
import hra
import resora

# ---------------------------------------------------------------- files, results, errors


def one_line_errors(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake ends it with one line and exit code 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: finished runs are kept, the same command continues from them")
    except (ValueError, OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {text or type(error).__name__}")


@contextmanager
def replacing(path: str | Path):
    """Give a temporary path beside `path` that takes its place if and when the block succeeds.

    For files and folders. Raises OSError if the place cannot be written; then, as after any
    error in the block, nothing is left behind.
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


def write_json(path: str | Path, value) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | Path):
    """Parsed JSON of a file. Raises ValueError that names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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
        if not (isinstance(found, dict) and isinstance(found.get("result"), dict)):
            raise ValueError(f"{file} holds no result; delete it, and it will be made again")
        return found["result"]

    def put(self, run: Mapping, result: Mapping) -> None:
        """Keep the result of a finished run."""
        write_json(self._file(run), {"run": dict(run), "result": dict(result)})


# ---------------------------------------------------------------- data and backbones


def load_task(name_or_folder: str, task: str | None = None):
    """A `datasets.DatasetDict`: a hub name with its configuration, FOLDER/TASK, or FOLDER.

    Raises ValueError if there is no such data set.
    """
    from datasets import disable_progress_bars, load_dataset, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    folder = Path(name_or_folder)
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
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"data {name_or_folder!r}: found neither a readable folder of data nor a hub data set"
            f" ({type(error).__name__}: {first})"
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
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else nn.init.zeros_(p)
    if missing:
        raise ValueError(f"backbone {name_or_folder!r}: found no weights for {missing[:3]}")
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if wrong := sorted(set(shapes) - head):
        raise ValueError(f"backbone {name_or_folder!r}: {wrong[:3]} do not fit its config.json")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"backbone {name_or_folder!r}: found a non-finite value in {name}")
    return model


def head_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters outside the pretrained trunk: the classification head."""
    prefix = f"{model.base_model_prefix}."
    return [(n, p) for n, p in model.named_parameters() if not n.startswith(prefix)]


def targets_of(model: nn.Module) -> list[str]:
    """The last names of the query and value projections, as LoRA's paper adapts them.

    Raises ValueError that lists the Linear layers if the model has neither pair of names.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
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


# ---------------------------------------------------------------- adapters on disk


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
        self.config = read_json(self.file.with_name("adapter_config.json"))
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
            pairs = eigenlorax.lora_pairs(tensors, self.config)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file}, with its adapter_config.json: {error}") from error
        for name, pair in pairs.items():
            if not all(factor.is_meta or factor.isfinite().all() for factor in pair):
                raise ValueError(f"{self.file}: {name} times its scaling is not finite")
        return pairs

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with self._open() as tensors:
            return self._pairs({k: tensors.get_tensor(k) for k in self._keys[name]})[name]

    def __iter__(self):
        return iter(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # without reading anything

    def __len__(self) -> int:
        return len(self._keys)


def save_bank(path: str | Path, subspaces: Mapping, modules: Mapping) -> None:
    """Write a recycled bank, the subspaces and every task's coefficients, to one safetensors.

    subspaces: {name: Subspace}, modules: {name: EigenLoRAxLinear}, as `recycle` and `adapt`
    return them. Raises ValueError if their names differ.
    """
    if set(subspaces) != set(modules):
        raise ValueError(f"found modules {sorted(modules)}; wanted {sorted(subspaces)}")
    tensors, about = {}, {}
    for name, module in modules.items():
        values = {f.name: getattr(subspaces[name], f.name) for f in fields(subspaces[name])}
        values |= {"alpha_A": module.alpha_A, "alpha_B": module.alpha_B}
        held = {k: v.detach() for k, v in values.items() if torch.is_tensor(v)}
        tensors |= {f"{name}:{k}": v.contiguous().clone() for k, v in held.items()}
        plain = {k: v for k, v in values.items() if k not in held}
        about[name] = {"scaling": module.scaling, "subspace": plain}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"bank": json.dumps(about)})


def load_bank(path: str | Path, model: nn.Module) -> tuple[dict, dict]:
    """Adapt `model` with a bank from `save_bank`: ({name: Subspace}, {name: EigenLoRAxLinear}).

    Raises ValueError if the file is not a bank or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["bank"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        subspaces, alphas = {}, {}
        for name, plain in about.items():
            mine = {k.rpartition(":")[2]: v for k, v in tensors.items() if k.startswith(f"{name}:")}
            alphas[name] = mine.pop("alpha_A"), mine.pop("alpha_B")
            subspaces[name] = eigenlorax.Subspace(**mine, **plain["subspace"])
        (tasks, rank), *others = {(len(a), a.shape[-1]) for pair in alphas.values() for a in pair}
        scalings = {name: float(plain["scaling"]) for name, plain in about.items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a bank written by save_bank: {error}") from error
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad or others:
        raise ValueError(f"{path}: found {bad or others}; wanted finite numbers, one rank for all")
    modules = eigenlorax.adapt(model, subspaces, rank, tasks=tasks)
    with torch.no_grad():
        for name, module in modules.items():
            module.scaling = scalings[name]
            for alpha, value in zip((module.alpha_A, module.alpha_B), alphas[name], strict=True):
                alpha.copy_(value)
    return subspaces, modules


# ---------------------------------------------------------------- training and scoring


class Diverged(ValueError):
    """Training reached a loss that is not finite."""


def accelerator(cpu: bool = False, mixed_precision: str | None = None):
    """An Accelerator whose processes share each batch, so that batch size means the same on any."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

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
    """
    from tqdm.auto import tqdm
    from transformers import get_linear_schedule_with_warmup, set_seed

    set_seed(seed)
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=collate)
    steps = epochs * len(loader)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    model, optimizer, loader, schedule = accelerate.prepare(model, optimizer, loader, schedule)
    losses, step = [], 0
    with tqdm(total=steps, desc=describe, disable=describe is None, leave=False) as bar:
        for epoch in range(epochs):
            model.train()
            total = torch.zeros((), device=accelerate.device)
            for batch in loader:
                task_loss = model(**batch).loss
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
    """`model` on `data` by scikit-learn: "accuracy" (0..1), "matthews" or "pearson" (−1..1)."""
    from sklearn.feature_selection import r_regression
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    loader = accelerate.prepare(DataLoader(data, batch_size, collate_fn=collate))
    model = model.to(accelerate.device).eval()
    outputs, labels = [], []
    for batch in loader:
        pair = accelerate.gather_for_metrics((model(**batch).logits, batch["labels"]))
        outputs.append(pair[0].float().cpu())
        labels.append(pair[1].cpu())
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    if metric == "pearson":
        return float(r_regression(outputs.view(-1, 1).numpy(), labels.numpy())[0])
    score = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric]
    return float(score(labels, outputs.argmax(-1)))


# ---------------------------------------------------------------- methods by name


def _peft(model: nn.Module, row: Mapping, seed: int) -> nn.Module:
    import peft

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    targets, rank = targets_of(model), row["rank"]
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
        modules = hra.adapt(model, targets_of(model), row["rank"], generator=generator, **start)
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
