# SPDX-License-Identifier: MIT
"""What the experiments need around the three method files. The scripts use it; no method does.

  1 data and backbones    tasks as examples; models that know something already
  2 adapters on disk      PEFT's folders, and the pairs (B, A) that are in them
  3 methods by name       one registry; a method of your own is one entry
  4 train and evaluate    one loop
  5 runs that resume      a file for every finished run, named after all that it depends on

What is general comes from a library: models from transformers, baselines from PEFT, data from
`datasets` and scikit-learn, devices and processes from accelerate, runs side by side from joblib,
the command line from tyro.
"""

import ast
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

import eigenlorax
import hra
import resora

try:  # peft, datasets and scikit-learn take seconds to import: they are where they are used
    import joblib
    import transformers
    import tyro
    from accelerate import Accelerator, DataLoaderConfiguration, PartialState
    from accelerate.utils import set_seed
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
    from tqdm.auto import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing; the scripts need: pip install '.[scripts]'")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's
warnings.filterwarnings("ignore", module=r"peft\.tuners\.boft")  # about CUDA, on every run
tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a stopped worker would leak

# -------------------------------------------------------------------- 1. data and backbones
#
# A task is {"train": …, "validation": …, "test": …}. Each is a sequence of examples, and an
# example is what a transformers model takes: {"pixel_values": image, "labels": class}. A list
# will do. Data whose examples differ in length have a method `collate` that makes a batch of some.


class ImageTask(Dataset):
    """Images (uint8, (n, channels, height, width)) and labels (n,), normalised when asked for."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence, std: Sequence):
        self.images, self.labels = images, labels
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Tensor]]:
        """Several examples, as a DataLoader asks for them: a fifth of a run on digits faster."""
        pixels = (self.images[rows] - self.mean) / self.std
        pairs = zip(pixels, self.labels[rows], strict=True)
        return [{"pixel_values": image, "labels": label} for image, label in pairs]


class TextTask(Dataset):
    """Texts, or pairs of texts, and labels, cut to `length` tokens.

    columns: one list of n texts, or two. `truncated` says how many were longer.
    """

    def __init__(self, columns: list[list[str]], labels: Sequence, tokenizer, length: int):
        whole = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        self.truncated = sum(len(ids) > length for ids in whole)
        self.rows = tokenizer(*columns, truncation=True, max_length=length)
        self.labels = labels
        self.collate = transformers.DataCollatorWithPadding(tokenizer)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {key: values[i] for key, values in self.rows.items()} | {"labels": self.labels[i]}


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def load_task(name: str, task: str | None = None):
    """A `datasets.DatasetDict`: a hub name with its configuration, FOLDER/TASK, or FOLDER.

    Raises ValueError if there is no such data set.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = Path(name)
    inner = folder / (task or "")
    if folder.is_dir() and not inner.is_dir():
        found = sorted(child.name for child in folder.iterdir())
        raise ValueError(f"no folder {task!r} in {folder}; found {found}")
    try:
        if folder.is_dir():
            return datasets.load_dataset(str(inner))
        return datasets.load_dataset(name, task)
    except Exception as error:  # datasets, pyarrow and the hub raise each their own kinds
        cause = error.__cause__ or error
        raise ValueError(
            f"data {str(inner)!r}: found neither a readable folder of data nor a hub data set"
            f" ({type(cause).__name__}: {first_line(cause)})"
        ) from error


def load_backbone(name: str, labels: int) -> nn.Module:
    """A pretrained transformers classifier with a fresh head of `labels` outputs, in float32.

    name: of the hub, or a folder with config.json and safetensors; pickles are never read. Raises
    ValueError if there is none, if a tensor of the trunk is missing, or if one is not finite.
    """
    wanted = "a folder with config.json and model.safetensors, or a model of the hub"
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # the head of the checkpoint may be of another task
    try:
        config = transformers.AutoConfig.from_pretrained(name, num_labels=labels)
        kind = transformers.AutoModelForSequenceClassification
        if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            kind = transformers.AutoModelForImageClassification
        model, found = kind.from_pretrained(name, config=config, **options)
    except Exception as error:  # transformers, hub and safetensors raise each their own kinds
        found = first_line(error)
        raise ValueError(f"backbone {name!r}: wanted {wanted}; found {found}") from error
    check_trunk(model, found, f"backbone {name!r}: ")
    std = getattr(config, "initializer_range", 0.02)  # T5 has none; BERT's otherwise
    for parameter, p in head_of(model):  # a fresh head, whatever the checkpoint had
        if isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.Linear):
            nn.init.normal_(p, std=std) if p.dim() > 1 else nn.init.zeros_(p)
    return model


def check_trunk(model: nn.Module, found: Mapping, where: str) -> None:
    """Raise ValueError if what transformers loaded is not the whole trunk, and finite."""
    head = {name for name, _ in head_of(model)}
    missing = sorted(set(found["missing_keys"]) - head)
    missing = [key for key in missing if not key.endswith("mask_token")]  # of pretraining alone
    if missing:
        raise ValueError(f"{where}found no weights for {missing[:3]}")
    shapes = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    wrong = sorted(set(shapes) - head)
    if wrong:
        raise ValueError(f"{where}{wrong[:3]} do not fit its config.json")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{where}found a non-finite value in {name}")


def load_tokenizer(name: str):
    """A backbone's tokenizer. Raises ValueError if there is none, or none that can pad."""
    wanted = f"backbone {name!r}: wanted a tokenizer beside the model"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, hub and tokenizers raise each their own kinds
        raise ValueError(f"{wanted}; found {first_line(error)}") from error
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
    trunk = f"{model.base_model_prefix}."
    return [(name, p) for name, p in model.named_parameters() if not name.startswith(trunk)]


def targets_of(model: nn.Module, every: bool = False) -> list[str]:
    """The last names of the query and value projections, as LoRA's paper adapts them.

    every: the names of all Linear layers of the numbered blocks, as in HRA's Table 2. Raises
    ValueError that lists the Linear layers if the model has neither pair of names.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if every:
        return [name for name in names if any(part.isdigit() for part in name.split("."))]
    last = {name.rpartition(".")[2] for name in names}
    for pair in (["query", "value"], ["q_proj", "v_proj"], ["query_proj", "value_proj"]):
        if last.issuperset(pair):
            return pair
    raise ValueError(
        "wanted Linear layers named query/value, q_proj/v_proj or query_proj/value_proj;"
        f" found {sorted(last)} in {type(model).__name__}"
    )


# ----------------------------------------------------------------------- 2. adapters on disk
#
# PEFT keeps an adapter as a folder of two files: adapter_config.json says how it was made, and
# adapter_model.safetensors holds A and B. What the methods exchange is {module name: (B, A)}.

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
        self.config = adapter_config(self.file.with_name("adapter_config.json"))
        with self.open() as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        self.keys_of = {name: [] for name in self.pairs(empty)}
        for key in shapes:
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            if name in self.keys_of:
                self.keys_of[name].append(key)

    def open(self):
        """The file of tensors, opened."""
        try:
            return safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} is not a whole safetensors file: {error}") from error

    def pairs(self, tensors: dict) -> dict:
        """`eigenlorax.lora_pairs`, with errors that name the file."""
        try:
            return eigenlorax.lora_pairs(tensors, self.config)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise ValueError(f"{self.file}, with its adapter_config.json: {error}") from error

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        with self.open() as tensors:
            copies = {key: tensors.get_tensor(key).clone() for key in self.keys_of[name]}
        return self.pairs(copies)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __contains__(self, name: object) -> bool:
        return name in self.keys_of  # without reading anything

    def __len__(self) -> int:
        return len(self.keys_of)


def adapter_config(file: Path) -> dict:
    """The settings of an adapter. Raises ValueError for a file that holds none, or a trap."""
    config = None
    if file.is_file():
        size = file.stat().st_size
        if size > LARGEST_CONFIG:
            raise ValueError(f"{file} has {size:,} bytes; wanted at most {LARGEST_CONFIG:,}")
        config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"wanted a JSON object in {file}; found {config or 'none'}")
    patterns = config.get("alpha_pattern")
    for pattern in patterns if isinstance(patterns, dict) else ():
        repeats = sum(pattern.count(sign) for sign in "*+?{")
        if "(" in pattern or repeats > 3:  # PEFT searches for it: that might never end
            raise ValueError(f"{file}: alpha_pattern has {pattern!r:.80}; wanted a name")
    return config


def adapters_of_one_base(folders: Iterable[str | Path]) -> list[LazyAdapter]:
    """The adapters in these folders. Raises ValueError if two were trained on different models."""
    adapters = [LazyAdapter(folder) for folder in folders]
    bases = {}
    for adapter in adapters:
        bases[adapter.config.get("base_model_name_or_path")] = adapter.file
    if len(bases) > 1:
        found = "; ".join(f"{file}: {base}" for base, file in list(bases.items())[:2])
        raise ValueError(f"found adapters of {len(bases)} base models ({found}); wanted one")
    return adapters


def noisy(adapter: Mapping, noise: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter with normal noise: a fraction of the root mean square of each matrix."""

    def add(W: Tensor) -> Tensor:
        return W + noise * W.square().mean().sqrt() * torch.randn(W.shape)

    return {name: (add(B), add(A)) for name, (B, A) in adapter.items()}


# ------------------------------------------------------------------------ 3. methods by name
#
# A method is a function that changes a frozen model and says what to add to its loss:
#
#     adapt(model, targets, **options) → (model, penalty or None)
#
# penalty(progress) is a number to add, at a fraction 0 … 1 of training. Write such a function, give
# it an entry in METHODS, and it is a choice of --rows: a row of the table and of the figure.
# Whatever is random comes from torch's own generator, which a run seeds before it begins.


@dataclass(frozen=True)
class Method:
    """What --rows makes of a method: its row's name, how to adapt, rate, colour, options."""

    name: str
    adapt: Callable
    rate: float  # learning rate, where a preset has none for a row whose name begins like this
    colour: str  # the same in every figure; the first nine are Okabe and Ito's
    options: dict = field(default_factory=dict)
    recycles: bool = False  # whether adapt wants `adapters`: LoRA's, of the other tasks


def head(model: nn.Module, targets: list[str]):
    """Nothing but the head."""
    return model, None


def full(model: nn.Module, targets: list[str]):
    """Every weight."""
    return model.requires_grad_(True), None


def lora(model: nn.Module, targets: list[str], rank: int, **options):
    """PEFT's LoRA with s = 1."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options)
    return get_peft_model(model, config), None


def vera(model: nn.Module, targets: list[str], rank: int):
    """PEFT's VeRA."""
    from peft import VeraConfig, get_peft_model

    key = torch.initial_seed()  # of the matrices that all layers share
    config = VeraConfig(r=rank, target_modules=targets, projection_prng_key=key)
    return get_peft_model(model, config), None


def oft(model: nn.Module, targets: list[str], rank: int):
    """PEFT's OFT in blocks of size `rank`."""
    from peft import OFTConfig, get_peft_model

    return get_peft_model(model, OFTConfig(r=0, oft_block_size=rank, target_modules=targets)), None


def boft(model: nn.Module, targets: list[str], rank: int):
    """PEFT's BOFT in blocks of size `rank`, with two butterfly factors."""
    from peft import BOFTConfig, get_peft_model

    sizes = {"boft_block_size": rank, "boft_n_butterfly_factor": 2}
    return get_peft_model(model, BOFTConfig(target_modules=targets, **sizes)), None


def reflections(model: nn.Module, targets: list[str], rank: int, lam=0.0, strict=False):
    """HRA. λ = ∞ is strict and has no penalty."""
    init = "random" if strict else "identity"
    modules = hra.adapt(model, targets, rank, strict=strict, init=init)

    def penalty(progress: float) -> Tensor:
        """λ times the sum over layers."""
        return lam * sum(module.penalty() for module in modules.values())

    return model, penalty if lam else None


def regularised(model: nn.Module, targets: list[str], rank: int, lam=0.0, ramp=0.0, **options):
    """LoRA with λ·R of ReSoRA, λ growing from 0 over the fraction `ramp` of training.

    options: metric and level. With λ = 0 it is LoRA.
    """
    resora.adapt(model, targets, rank)
    if lam == 0:
        return model, None
    regulariser = resora.ReSoRA(model, **options)

    def penalty(progress: float) -> Tensor:
        """λ as it has grown, times R."""
        grown = min(1.0, progress / ramp) if ramp else 1.0
        return grown * lam * regulariser.penalty()

    return model, penalty


def recycled(
    model: nn.Module,
    targets: list[str],
    adapters: list[Mapping],
    components: int,
    rank: int,
    pseudo: int = 0,
    random: int = 0,
    free: int = 0,
    frozen: bool = False,
):
    """EigenLoRAx on the principal directions of other tasks' adapters.

    pseudo, random: how many directions to add, orthogonal to the components or merely drawn
    free: how many of the last directions to train as well;  frozen: random α, and only the head
    """
    subspaces = eigenlorax.recycle(adapters, k=components, pseudo=pseudo)
    for subspace in subspaces.values():
        for side in (subspace.A, subspace.B):
            drawn = torch.randn(random, side.V.shape[1])
            side.V = torch.cat([side.V, nn.functional.normalize(drawn).to(side.V)])
    modules = eigenlorax.adapt(model, subspaces, rank, init="random" if frozen else "zero")
    for module in modules.values():
        module.requires_grad_(not frozen)
        module.base.requires_grad_(False)
        if free:
            train_last_rows(module, "V_A", free)
            train_last_rows(module, "V_B", free)
    return model, None


def random_subspace(model: nn.Module, targets: list[str], components: int, rank: int):
    """The control of EigenLoRAx: as many directions, drawn and not recycled."""
    adapter = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(targets)):
            o, d = layer.weight.shape
            adapter[name] = torch.randn(o, components), torch.randn(components, d)
    return recycled(model, targets, [adapter], components, rank)


class Below(nn.Module):
    """Puts trained rows below fixed ones."""

    def __init__(self, fixed: Tensor):
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.fixed, rows])


def train_last_rows(module: nn.Module, name: str, count: int) -> None:
    """Make the last rows of a buffer a parameter, while the others stay as they are."""
    V = module.get_buffer(name)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(V[-count:].contiguous()))
    parametrize.register_parametrization(module, name, Below(V[:-count]), unsafe=True)


SUBSPACE = {"components": 16, "rank": 4}
LINEAR = {"rank": 4, "lam": 1.0, "metric": "linear", "level": "feature"}
METHODS = {  # what one types, and the row it stands for
    "full": Method("Full", full, 3e-3, "#000000"),
    "head": Method("Base", head, 0.3, "#999999"),
    "lora": Method("LoRA", lora, 3e-2, "#0072B2", {"rank": 4}),
    "hra": Method("HRA", reflections, 3e-2, "#D55E00", {"rank": 8, "lam": 0.0}),
    "resora": Method("ReSoRA", regularised, 3e-2, "#56B4E9", LINEAR),
    "eigenlorax": Method("EigenLoRAx", recycled, 3e-2, "#009E73", SUBSPACE, recycles=True),
    "random": Method("Random subspace", random_subspace, 0.1, "#CC79A7", SUBSPACE),
    "vera": Method("VeRA", vera, 0.1, "#E69F00", {"rank": 64}),
    "oft": Method("OFT", oft, 1e-2, "#F0E442", {"rank": 16}),
    "boft": Method("BOFT", boft, 3e-2, "#A68A00", {"rank": 8}),
    "pissa": Method(
        "PiSSA", partial(lora, init_lora_weights="pissa"), 1e-2, "#5D3A9B", {"rank": 4}
    ),
}

# A row of a table is a dict: its name, its method, the method's options, and what a run is to do:
OF_RUNS = {
    "row",  # the row's name
    "method",  # an entry of METHODS
    "task",
    "seed",
    "lr",  # learning rate
    "rate",  # the row whose learning rate this one has; its own if there is none
    "every",  # whether to adapt every Linear layer
    "epochs",  # instead of the table's
    "stages",  # how many times as long to train
    "recycle",  # the row whose adapters of the other tasks the method takes
    "adapters",  # how many of them; all if there is none
    "noise",  # in them
    "start",  # the row whose trained state to go on from
    "regauge",  # whether to write it in its balanced gauge first
    "weight_decay",  # instead of the table's
    "head",  # what the head starts from, where a script offers a choice
    "mean",  # whether to start from the mean of the recycled adapters
}


def row(name: str, method: str, **options) -> dict:
    """A row of a table; options: those of METHODS[method].adapt, and any of OF_RUNS."""
    return {"row": name, "method": method, **options}


def build(model: nn.Module, spec: Mapping, adapters: Sequence[Mapping] = ()) -> tuple:
    """(model, penalty): frozen, but for the head and what the method of `spec` trains."""
    method = METHODS[spec["method"]]
    options = {key: value for key, value in spec.items() if key not in OF_RUNS}
    if method.recycles:
        options["adapters"] = adapters
    trained = [p for _, p in head_of(model)]
    targets = targets_of(model, spec.get("every", False))
    model, penalty = method.adapt(model.requires_grad_(False), targets, **options)
    for p in trained:
        p.requires_grad_(True)
    return model, penalty


# --------------------------------------------------------------------- 4. train and evaluate
#
# accelerate puts models and batches on the device, and lets torchrun's processes share each batch:
# batch_size counts the rows of all of them, so it means the same on any number of processes, and
# has to be a multiple of it. An epoch's last batch is left out if it is not whole: the processes
# could not share it evenly.


class Diverged(ValueError):
    """Training reached a loss that is not finite."""


def accelerator(mixed_precision: str = "no") -> Accelerator:
    """A new one for each run, because it keeps hold of what it prepared."""
    sharing = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    cpu = not torch.accelerator.is_available()  # else torchrun's processes would not meet
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, dataloader_config=sharing)


def train(
    model: nn.Module,
    data: Sequence[Mapping],
    accelerate: Accelerator,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.01,
    penalty: Callable[[float], Tensor] | None = None,
    label: str | None = None,
) -> list[float]:
    """Train, in place, all that requires a gradient. Returns the mean task loss of every epoch.

    penalty(progress) is added to the loss of every step; label names a progress bar. Raises
    Diverged, a ValueError, if the loss is not finite.
    """
    transformers.set_seed(seed)
    batch_size = min(batch_size, len(data) - len(data) % accelerate.num_processes)
    collate = getattr(data, "collate", None)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    steps = epochs * len(loader)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    warmup = round(0.06 * steps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    model, optimizer, loader, schedule = accelerate.prepare(model, optimizer, loader, schedule)
    set_seed(seed, device_specific=True)  # of the dropout, which each process draws on its own
    losses = []
    quiet = label is None or not accelerate.is_main_process
    with tqdm(total=steps, desc=label, disable=quiet, leave=False) as bar:
        for epoch in range(epochs):
            model.train()
            total = torch.zeros((), device=accelerate.device)
            for step, batch in enumerate(loader, start=epoch * len(loader)):
                loss = model(**batch).loss
                total += loss.detach()
                if penalty is not None:
                    loss = loss + penalty(step / steps)
                accelerate.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
            losses.append(accelerate.reduce(total, "mean").item() / len(loader))
            if not math.isfinite(losses[-1]):
                found = f"loss {losses[-1]} in epoch {epoch + 1} at learning rate {lr}"
                raise Diverged(f"found {found}; wanted a finite one")
    return losses


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Sequence[Mapping],
    accelerate: Accelerator,
    metric: str = "accuracy",
    batch_size: int = 256,
) -> float:
    """The score of a model on all rows of `data`, each counted once on any number of processes.

    Raises Diverged if an output is not finite.
    """
    collate = getattr(data, "collate", None)
    loader = DataLoader(data, batch_size * accelerate.num_processes, collate_fn=collate)
    loader = accelerate.prepare(loader)
    model = model.to(accelerate.device).eval()
    outputs, labels = [], []
    for batch in loader:
        logits = model(**batch).logits
        logits, truth = accelerate.gather_for_metrics((logits, batch["labels"]))
        outputs.append(logits.float().cpu())
        labels.append(truth.cpu())
    return score(torch.cat(outputs), torch.cat(labels), metric)


def score(outputs: Tensor, labels: Tensor, metric: str) -> float:
    """Accuracy (0 … 1), Matthews' or Pearson's correlation (−1 … 1) of outputs (n, classes)."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    if not torch.isfinite(outputs).all():
        raise Diverged(f"found a non-finite output among {len(outputs)} after training")
    if metric == "pearson":
        x = outputs.double().flatten()
        y = labels.double() - labels.double().mean()
        x = x - x.mean()
        lengths = (x.norm() * y.norm()).item()
        return (x @ y).item() / lengths if lengths else 0.0
    function = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric]
    return float(function(labels, outputs.argmax(1)))


# ---------------------------------------------------------------------- 5. runs that resume
#
# A run is one row of a table on one task with one seed. When it has finished, its result is a file
# whose name is a hash of the run, in a folder whose name is a hash of all else that it depends on:
# options, libraries, data, and the source of every file here but the other script. So a table that
# was interrupted goes on where it stopped, and what was changed begins anew. Nothing ever has to
# be deleted. First the files; then what runs depend on; the runs; the command line; the table.


def first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def meet() -> None:
    """Wait for the other processes, if there are any: what the first one wrote is there then."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path` if the block succeeds: nobody ever sees a half.

    A folder that is there already stays: its name says what made it, so it is as good. Of several
    processes only the `first` one writes. Raises OSError if the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"cannot write in {path.parent}: found {error.strerror}") from error
    try:
        yield temporary
        if first() and not path.is_dir():
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError, before any work is done, if a file could not be written at `path`."""
    if Path(path).is_dir():
        raise OSError(f"cannot write {path}: found a folder; wanted the name of a file")
    with suppress(FileNotFoundError), replacing(path):
        pass  # nothing was written, so nothing takes its place


def write_json(path: str | Path, value) -> None:
    """Write JSON, all of it or nothing: indented, but for lists of numbers, which take a line."""
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


def fingerprint(value) -> str:
    """Sixteen hexadecimal digits that change with any part of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict:
    """Versions and hardware that a result depends on."""
    packages = "torch numpy transformers peft accelerate datasets scikit-learn".split()
    device = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                device = line.split(":")[1].strip()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {name: version(name) for name in packages}
    where = {"system": platform.system(), "device": device, "cpus": os.cpu_count()}
    return {"python": platform.python_version(), **versions, **where}


def source_of(file: str | Path) -> str:
    """A hash of a Python file, comments and layout apart."""
    return fingerprint(ast.dump(ast.parse(Path(file).read_text(encoding="utf-8"))))


def sources(script: str | Path) -> dict[str, str]:
    """The hash of a script and of every Python file beside it, but for the other scripts.

    The file of a method of your own is among them as soon as it is there.
    """
    beside = Path(script).parent.glob("*.py")
    files = [file for file in beside if not file.name.startswith("train_")]
    return {file.name: source_of(file) for file in sorted([*files, Path(script)])}


def state_of(name: str) -> str:
    """A folder's full path and a fingerprint of its files' states; a hub name as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    states = []
    for parent, _, names in os.walk(folder.resolve(), followlinks=True):
        for file in (Path(parent, name) for name in names):
            if file.is_file():
                states.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return f"{folder.resolve()} {fingerprint(sorted(states))}"


def hash_of(backbone: str | Path) -> str:
    """A hash of the weights in a folder; a hub name as it is."""
    weights = Path(backbone) / "model.safetensors"
    if weights.is_file():
        return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return str(backbone)


class Results:
    """The finished runs that depend on `config`, a JSON file each, in FOLDER/NAME-FINGERPRINT."""

    def __init__(self, folder: str | Path, name: str, config: dict):
        """config: all that the runs depend on, JSON-like. Raises OSError if not writable."""
        self.config = config
        self.folder = Path(folder) / f"{name}-{fingerprint(config)}"
        write_json(self.folder / "config.json", config)

    def file(self, spec: Mapping) -> Path:
        """Where the result of a run is kept."""
        return self.folder / "finished" / f"{fingerprint(spec)}.json"

    def get(self, spec: Mapping) -> dict | None:
        """The result of a run, or None if it has not finished yet."""
        file = self.file(spec)
        if not file.exists():
            return None
        found = read_json(file)
        result = found.get("result") if isinstance(found, dict) else None
        if not (result and isinstance(result, dict)):
            raise ValueError(f"{file} holds no result; delete it, and it will be made again")
        return result

    def make(self, spec: dict, work: Callable[[dict], dict]) -> dict:
        """Do a run and keep its result: here, in the worker, so that it outlives the parent."""
        write_json(self.file(spec), {"run": spec, "result": work(spec)})
        meet()
        return spec


NEEDS = {"recycle", "start"}  # what a run builds on: adapters, or the state it goes on from
TUNING_SEEDS = (100,)


def specify(rows: list[dict], rates: Mapping, tasks: list[str], seeds: Iterable[int]) -> list[dict]:
    """Every run of the rows: row × task × seed, with its learning rate.

    A row has the rate of its name, or that of the row it names as `rate`.
    """

    def rated(r: dict) -> dict:
        """The row with its rate, and so the rows that it builds on."""
        needed = {key: rated(r[key]) for key in NEEDS & set(r)}
        lr = rates[r.get("rate", r["row"])]
        return {key: value for key, value in r.items() if key != "rate"} | needed | {"lr": lr}

    whole = [rated(r) for r in rows]
    return [{**r, "task": task, "seed": seed} for seed in seeds for task in tasks for r in whole]


def depth(r: Mapping) -> int:
    """How many runs have to be made before this one, one after the other."""
    return max((1 + depth(r[key]) for key in NEEDS & set(r)), default=0)


def title(spec: Mapping) -> str:
    """How messages call a run."""
    return f"{spec['row']}, {spec['task']}, seed {spec['seed']}"


def finish(specs: list[dict], work: Callable[[dict], dict], results: Results, config) -> list[dict]:
    """The results of all runs, in order: those on disk as they are, the others made by `work`.

    Raises Diverged, unless config.tune: then the score of a run that diverges is 0.
    """
    if config.tune:
        work = partial(forgiving, work=work)
    missing = [spec for spec in specs if results.get(spec) is None]
    make = partial(results.make, work=work)
    done = len(specs) - len(missing)
    with tqdm(total=len(specs), initial=done, unit="run", disable=not first()) as bar:
        for level in sorted({depth(spec) for spec in missing}):  # those that others build on first
            wave = [spec for spec in missing if depth(spec) == level]
            bar.set_postfix(running=min(config.jobs, len(wave)))
            for count, spec in enumerate(side_by_side(wave, make, config.jobs), start=1):
                bar.set_description_str(title(spec), refresh=False)
                bar.set_postfix(running=min(config.jobs, len(wave) - count), refresh=False)
                bar.update()
    return [{**spec, **results.get(spec)} for spec in specs]


def forgiving(spec: dict, work: Callable[[dict], dict]) -> dict:
    """`work(spec)`; where the training diverges, a score of 0."""
    try:
        return work(spec)
    except Diverged:
        return {"validation": 0.0}


def side_by_side(specs: list[dict], make: Callable, jobs: int) -> Iterator[dict]:
    """Make runs, `jobs` at a time, in processes of one thread; yields each that has finished.

    A run is handed out when a worker is free, not before. So if this process is killed, a worker
    ends the run in hand, keeps its result, waits for another, and is gone within a minute.
    """
    if jobs == 1:
        yield from map(make, specs)
        return
    with joblib.parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=10):
        order = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": jobs}
        yield from joblib.Parallel(jobs, **order)(joblib.delayed(make)(spec) for spec in specs)


def adapter_folder(folder: Path, spec: Mapping) -> Path:
    """Where a run leaves what others build on."""
    return folder / "adapters" / fingerprint(spec)


def adapters_for(spec: dict, names: list[str], folder: Path) -> list[Mapping]:
    """The adapters of the other tasks, as PEFT left them on disk; with noise if the row says so."""
    if "recycle" not in spec:
        return []
    others = [{**spec["recycle"], "task": t, "seed": spec["seed"]} for t in names]
    others.pop(names.index(spec["task"]))
    adapters = adapters_of_one_base(adapter_folder(folder, other) for other in others)
    adapters = adapters[: spec.get("adapters")]
    if "noise" in spec:
        return [noisy(adapter, spec["noise"]) for adapter in adapters]
    return adapters


def load_start(spec: dict, model: nn.Module, folder: Path) -> None:
    """Put in place what the run that this one goes on from has trained.

    Of a run of PEFT's LoRA it is the adapter alone, for the layers of resora.py.
    """
    start = {**spec["start"], "task": spec["task"], "seed": spec["seed"]}
    place = adapter_folder(folder, start)
    if start["method"] == "lora":
        for name, (B, A) in LazyAdapter(place).items():
            layer = model.get_submodule(name)
            layer.B.data, layer.A.data = B, A
        return
    file = place / "state.safetensors"
    try:
        model.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, OSError) as error:
        remedy = f"delete {folder}, and its runs will be made again"
        raise ValueError(f"{file} is missing or damaged ({error}); {remedy}") from error


def layers_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """The layers of a kind, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


def fit(
    spec: dict,
    model: nn.Module,
    data: Mapping[str, Sequence],
    names: list[str],
    folder: Path,
    seed: int,
    *,
    mixed_precision: str,
    metric: str = "accuracy",
    begin: Callable[[nn.Module], None] | None = None,
    **training,
) -> tuple[nn.Module, dict]:
    """Adapt, train and score a model as a run says: (model, result).

    data: the splits train, validation and test; names: of all tasks; folder: where runs leave what
    others build on; begin: what to do to the adapted model before it trains; training: what
    `train` takes besides.
    """
    transformers.set_seed(seed)
    accelerate = accelerator(mixed_precision)
    head_size = sum(p.numel() for _, p in head_of(model))
    model, penalty = build(model, spec, adapters_for(spec, names, folder))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if "start" in spec:
        load_start(spec, model, folder)
        seed += 1  # another order of the rows
    if spec.get("regauge"):
        for layer in layers_of(model, resora.LoRALinear).values():
            layer.B.data, layer.A.data = resora.regauge(layer.B.data, layer.A.data)
    if begin is not None:
        begin(model)
    result = {"trainable": sum(p.numel() for p in trained.values()) - head_size}
    try:
        options = {"seed": seed, "penalty": penalty, **training}
        result["losses"] = train(model, data["train"], accelerate, **options)
        for split in ("validation", "test"):
            result[split] = evaluate(model, data[split], accelerate, metric)
    except Diverged as error:
        raise Diverged(f"{title(spec)}: {error}; lower its rate with --lr") from error
    if spec["method"] == "hra":  # ‖I − ÛᵀÛ‖_F, mean over layers
        layers = layers_of(model, hra.HRALinear).values()
        result["orthogonality"] = statistics.fmean(x.penalty().sqrt().item() for x in layers)
    leave(spec, model, trained, folder)
    return model, result


def leave(spec: dict, model: nn.Module, trained: Mapping[str, Tensor], folder: Path) -> None:
    """Keep what other runs may build on: all that was trained, and LoRA as PEFT keeps it."""
    if spec["method"] == "full":  # a whole model, on which no row builds
        return
    with replacing(adapter_folder(folder, spec)) as temporary:
        temporary.mkdir()
        if spec["method"] == "lora":
            model.save_pretrained(temporary)
        state = {name: p.data.contiguous() for name, p in trained.items()}
        save_file(state, temporary / "state.safetensors")


# The command line: tyro makes an option of every field, with the comment beside it as its help.


@dataclass(frozen=True)
class Options:
    """What both scripts let a user set. None stands for the preset's value."""

    rows: tuple[Literal[tuple(METHODS)], ...] = ()  # compare these methods, instead of --table
    lam: Annotated[float | None, tyro.conf.arg(aliases=["--λ"])] = None  # λ of penalties in --rows
    backbone: str = ""  # the embedded one, a hub name, or a folder in the hub's layout
    data: str = ""  # the embedded one, a hub name, or a folder in the hub's layout
    seeds: int | None = None  # runs of each row and task, with seeds 0, 1, …
    epochs: int | None = None  # passes over a task's training rows
    batch_size: int | None = None  # rows of a step, all processes together
    components: int | None = None  # K of EigenLoRAx
    rank: int | None = None  # r of EigenLoRAx's coefficients
    weight_decay: float | None = None  # of AdamW
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # of forward and backward
    lr: str = ""  # "ROW=RATE;…" instead of the preset's learning rates
    quick: bool = False  # one seed and less training
    tune: bool = False  # choose learning rates on the validation split, instead of testing
    jobs: int | None = None  # runs at a time, a thread each; by default 1 per core where embedded
    runs: str = "runs"  # folder for finished runs
    out: str = ""  # JSON file for the results; the figure and its .md go beside it


OF_NO_RUN = {"table", "rows", "lam", "seeds", "lr", "quick", "tune", "jobs", "runs", "out"}
OF_NO_RUN |= {"components", "rank"}  # options that a run does not depend on, or has in its row


def parse(kind: type, presets: Mapping[str, Mapping], arguments: list[str] | None = None):
    """The command line as an instance of the dataclass `kind`: an option per field."""
    lines = [sys.modules[kind.__module__].__doc__, "Presets:"]
    for name, preset in presets.items():
        values = ", ".join(f"{key} {value}" for key, value in preset.items())
        lines.append(f"    {name}: {values}")
    flags = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, description="\n".join(lines), args=arguments, config=flags)


def filled(config, preset: Mapping):
    """`config` with the preset's values where the user left them open."""
    return replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


def check_options(config, least: Mapping[str, int], embedded: str) -> None:
    """Raise ValueError for an option that makes no sense; `least`: the least value of some."""
    if (config.data == embedded) != (config.backbone == embedded):
        found = f"--backbone {config.backbone} with --data {config.data}"
        raise ValueError(f"found {found}; wanted both to be {embedded}, or neither")
    for name, wanted in least.items():
        if getattr(config, name) < wanted:
            option = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise ValueError(f"found {option}; wanted {wanted} or more")
    if not math.isfinite(config.weight_decay):
        raise ValueError(f"found --weight-decay {config.weight_decay}; wanted a finite number")
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("found --mixed-precision fp16 without a GPU; wanted no or bf16")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.jobs > 1 and processes > 1:
        raise ValueError(f"found --jobs {config.jobs} under torchrun; wanted 1")
    if config.batch_size % processes:
        found = f"--batch-size {config.batch_size} on {processes} processes"
        raise ValueError(f"found {found}; wanted a multiple")
    if config.seeds > TUNING_SEEDS[0]:
        raise ValueError(f"found --seeds {config.seeds}; wanted at most {TUNING_SEEDS[0]}")
    if config.out and Path(config.out).suffix != ".json":
        raise ValueError(f"found --out {config.out}; wanted a name that ends in .json")


def check_components(components: int, rank: int, others: int) -> None:
    """Raise ValueError if `others` adapters of a rank have fewer directions than components."""
    if components > rank * others:
        raise ValueError(
            f"found --components {components}; wanted at most {rank * others},"
            f" the directions of {others} adapters of rank {rank}"
        )


def check_places(config, embedded: str) -> None:
    """Raise an error if results cannot be written where `config` says.

    OSError as `check_writable`; ValueError for a place in the folder of the data or the backbone,
    which results would edit.
    """
    places = [path for path in (config.out, config.runs) if path]
    folders = {"backbone": config.backbone, "data": config.data}
    for path, (key, name) in itertools.product(places, folders.items()):
        folder = Path(name).resolve()
        inside = Path(path).resolve().is_relative_to(folder)
        if name != embedded and folder.is_dir() and inside:
            raise ValueError(f"found {path} in --{key} {folder}; wanted results elsewhere")
    for path in filter(None, (config.out, f"{config.runs}/any")):
        check_writable(path)


def cores() -> int:
    """How many processors this process may use; one of torchrun's processes: one."""
    if "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def rows_and_rates(config, rows: list[dict], adapters: dict, preset: Mapping) -> tuple:
    """(rows, {row: learning rate}) of a table, or of --rows: a row for each method then.

    adapters: the row whose adapters are recycled; preset: the rates of rows, by name. Raises
    ValueError for what is no row, or no rate, in --lr.
    """
    if config.rows:
        rows = [r for key in config.rows for r in method_rows(METHODS[key], key, config, adapters)]
        rows = list({r["row"]: r for r in rows}.values())
    rates = dict(preset)
    for r in rows:
        method = METHODS[r["method"]]
        alike = [name for name in preset if name.startswith(method.name)]
        rates.setdefault(r.get("rate", r["row"]), preset[alike[0]] if alike else method.rate)
    for item in filter(None, config.lr.split(";")):
        name, _, rate = item.strip().rpartition("=")
        if name not in rates:
            raise ValueError(f"found row {name!r} in --lr; wanted one of {', '.join(rates)}")
        rates[name] = -1.0
        with suppress(ValueError):
            rates[name] = float(rate)
        if not 0 < rates[name] < math.inf:
            raise ValueError(f"found rate {rate!r} for {name} in --lr; wanted a number above 0")
    return rows, rates


def method_rows(method: Method, key: str, config, adapters: dict) -> list[dict]:
    """The row of a method, after that of the adapters that it recycles, if it does."""
    if key == adapters["method"]:
        return [adapters]
    options = dict(method.options)
    if "components" in options:
        options |= {"components": config.components, "rank": config.rank}
    if "lam" in options and config.lam is not None:
        options["lam"] = config.lam
    if method.recycles:
        return [adapters, row(method.name, key, **options, recycle=adapters)]
    return [row(method.name, key, **options)]


def results_of(config, name: str, script: str | Path, **about) -> Results:
    """Where the runs of a configuration are kept, by all that they depend on.

    script: the file that makes them; about: what stands in for options.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in OF_NO_RUN}
    for key in ("backbone", "data"):
        settings[key] = state_of(settings[key])  # edited files begin anew
    settings |= {"code": sources(script), **environment(), **about}
    return Results(config.runs, name, settings)


def stated(config) -> dict:
    """The options that a results file names: not where files lie, and a folder by its name."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("runs", "out")}
    return settings | {"backbone": Path(config.backbone).name, "data": Path(config.data).name}


def report(config, out: Path, runs: list[dict], figure: str, note: str, **about) -> None:
    """Print a table and its note, write its JSON and draw its figure.

    The figure's script is figures/FIGURE.py, or where there is none figures/runs.py.
    """
    from figures import plots

    draws = import_module(f"figures.{plots.script(figure)}")
    setting = {"config": stated(config), "environment": environment(), **about}
    data = {**setting, "rows": plots.summary(runs), "runs": runs}
    write_json(out, data)
    if first():
        print(f"{plots.as_table(data['rows'])}\n\n{note}")
        if hasattr(draws, "verdicts"):
            print(draws.verdicts(data))
        print(f"{out}\n{draws.draw(out)}")


def tune(
    config,
    out: Path,
    rows: Iterable[dict],
    rates: Mapping,
    grid: Sequence[float],
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
    for r in sorted(rows.values(), key=depth):  # those that others recycle first
        for needed in {"recycle"} & set(r):
            finish(specify([r[needed]], rates, tasks, TUNING_SEEDS))
        scores = {}
        for lr in grid:
            runs = finish(specify([r], rates | {r["row"]: lr}, tuned_on or tasks, TUNING_SEEDS))
            scores[lr] = statistics.fmean(run["validation"] for run in runs)
        rates[r["row"]] = max(scores, key=scores.get)
        validation[r["row"]] = {str(lr): score for lr, score in scores.items()}
        if first():
            found = (f"{score:.3f}" for score in scores.values())
            print(f"{r['row']:20} {rates[r['row']]:<8g}", *found)
    setting = {"config": stated(config), "environment": environment(), **about}
    found = {"tuned_on": tuned_on or tasks, "validation": validation, "chosen": rates}
    write_json(out, {**setting, **found})
    if first():
        print(out)


def one_line_errors(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake, Ctrl-C and a killed worker end it with one line."""
    try:
        if torch.distributed.is_torchelastic_launched():  # before anything is written
            PartialState(cpu=not torch.accelerator.is_available())
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: finished runs are kept, the same command continues from them")
    except BrokenProcessPool:
        sys.exit("\na worker was killed (out of memory?); the same command continues")
    except (ValueError, OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {text or type(error).__name__}")
