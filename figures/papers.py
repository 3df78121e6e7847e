"""The papers' numbers that need no weights, data or GPU, recomputed: counts.md from papers.json.

python figures/papers.py             write counts.md from papers.json
python figures/papers.py --measure   first fill in papers.json: half a minute

A cell's "how", one line of Python on the names below, gives "ours" and "verdict"; the rest of it is
written by hand, as are papers.md, what of each paper is here, and errata.md. Models are built from
configurations on the meta device: shapes and operations, no weights.
"""

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import fmean

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils import flop_counter

import common
import eigenlorax
import hra
import resora  # noqa: F401  some cells use it

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
META = torch.device("meta")
IMAGE = torch.empty(1, 3, 224, 224, device=META)
TOKENS = torch.ones(1, 512, dtype=torch.int64, device=META)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ---------------------------------------------------------------- models and adapters


def vit() -> nn.Module:
    """ViT-B/16 at 224 px with its pooler, no head: google/vit-base-patch16-224's trunk."""
    with META:
        return transformers.ViTModel(transformers.ViTConfig(attn_implementation="eager"))


def roberta() -> nn.Module:
    """roberta-base with a head of two classes."""
    sizes = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config = transformers.RobertaConfig(**sizes, attn_implementation="eager")
    with META:
        return transformers.RobertaForSequenceClassification(config)


def deberta() -> nn.Module:
    """microsoft/deberta-v3-base without a head."""
    sizes = dict(vocab_size=128100, hidden_size=768, intermediate_size=3072, type_vocab_size=0)
    sizes |= dict(num_hidden_layers=12, num_attention_heads=12, position_biased_input=False)
    relative = dict(relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm")
    relative |= dict(share_att_key=True, pos_att_type=["p2c", "c2p"])
    with META:
        return transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, **relative))


DEBERTA = ["query_proj", "key_proj", "value_proj", "dense"]  # every Linear of its encoder


def mistral() -> nn.Module:
    """Mistral-7B."""
    with META:
        return transformers.MistralModel(transformers.MistralConfig())


def llama() -> nn.Module:
    """LLaMA2-7B."""
    with META:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig())


def shapes(model: nn.Module, targets: list[str]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the Linears whose names end in a target."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [(m.in_features, m.out_features) for n, m in named if n.endswith(tuple(targets))]


def sdxl() -> list[tuple[int, int]]:
    """(inputs, outputs) of the 722 Linears of SDXL's U-Net transformers, 264 of its text encoders.

    By hand from the published configurations: the only model here that is not built.
    """
    found = []
    for C, blocks, ends in ((640, 10, 10), (1280, 60, 12)):
        found += blocks * (6 * [(C, C)] + 2 * [(2048, C)] + [(C, 8 * C), (4 * C, C)])
        found += ends * [(C, C)]
    for C, layers in ((768, 12), (1280, 32)):
        found += layers * (4 * [(C, C)] + [(C, 4 * C), (4 * C, C)])
    return found


def lora(model: nn.Module, r: int, targets: list[str] | None = None) -> nn.Module:
    """PEFT's LoRA, on queries and values unless told."""
    targets = targets or common.targets_of(model)
    return peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=targets))


def vera(model: nn.Module, r: int) -> nn.Module:
    """PEFT's VeRA on queries and values."""
    config = peft.VeraConfig(r=r, target_modules=common.targets_of(model))
    return peft.get_peft_model(model, config)


def oft(model: nn.Module, b: int, targets: list[str]) -> nn.Module:
    """PEFT's OFT with blocks of b."""
    config = peft.OFTConfig(r=0, oft_block_size=b, target_modules=targets)
    return peft.get_peft_model(model, config)


def adapted(method, model: nn.Module, r: int, targets: list[str] | None = None) -> nn.Module:
    """hra's or resora's adapters, on queries and values unless told."""
    method.adapt(model, targets or common.targets_of(model), r)
    return model


def subspace(K: int, d: int, o: int) -> eigenlorax.Subspace:
    """A Subspace of K components and no values."""
    with META:
        return eigenlorax.Subspace(*(eigenlorax.directions(torch.empty(K, n)) for n in (d, o)))


def eigen(model: nn.Module, K: int, r: int, targets: list[str] | None = None) -> nn.Module:
    """Ours, on queries and values unless told."""
    ends = tuple(targets or common.targets_of(model))
    named = [(n, m) for n, m in model.named_modules() if n.endswith(ends)]
    found = {n: subspace(K, m.in_features, m.out_features) for n, m in named}
    eigenlorax.adapt(model, found, r)
    return model


# ---------------------------------------------------------------- what is counted


def trained(model: nn.Module) -> int:
    """Numbers that require grad."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def percent(model: nn.Module) -> float:
    """Numbers that require grad, in per cent of LLaMA2-7B's."""
    return 100 * trained(model) / trained(llama())


def held(sizes: list[tuple[int, int]], K: int, r: int, tasks: int) -> int:
    """Numbers that EigenLoRAxLinear holds beside its base, for Linears of these sizes."""
    total = 0
    for (d, o), times in Counter(sizes).items():
        with META:
            base = nn.Linear(d, o, bias=False)
        module = eigenlorax.EigenLoRAxLinear(base, subspace(K, d, o), r, tasks)
        total += times * (sum(t.numel() for t in module.state_dict().values()) - d * o)
    return total


def break_even(sizes: list[tuple[int, int]], K: int, r: int, rank: int) -> int:
    """The least number of tasks for which that is less than as many LoRAs of this rank."""
    one = rank * sum(d + o for d, o in sizes)
    return next(t for t in range(1, 10**6) if held(sizes, K, r, t) < t * one)


def empty(*shape: int) -> Tensor:
    """No values."""
    return torch.empty(shape, device=META)


def mflops(
    f: Callable, *inputs: Tensor, elementwise: bool = False, attention: bool = True, back=False
) -> float:
    """MFLOPs of f(*inputs) as flop_counter counts: 2 for each product in a matrix product.

    elementwise: also 5 for each number that a LayerNorm gives, 1 for each of a softmax and for
    each bias of a convolution; attention: the products and softmax between tokens; back: also
    what backward needs, with what is frozen left out.
    """
    aten, flop = torch.ops.aten, flop_counter
    extra = {
        aten.native_layer_norm: lambda x, *_, **__: 5 * prod(x),
        aten._softmax: lambda x, *_, **__: prod(x),
        aten.convolution: lambda x, w, *_, out_shape, **__: (
            flop.conv_flop_count(x, w, out_shape) + prod(out_shape)
        ),
    }
    with flop.FlopCounterMode(display=False, custom_mapping=extra if elementwise else {}) as count:
        out = f(*inputs)
        if back:
            out.pooler_output.sum().backward()
    found = count.get_flop_counts().get("Global", {})
    return sum(n for k, n in found.items() if attention or k not in (aten.bmm, aten._softmax)) / 1e6


def table14(model: nn.Module) -> float:
    """MFLOPs of 512 tokens as Table 14 counts."""
    return mflops(model, TOKENS, elementwise=True)


def table15(model: nn.Module) -> float:
    """MFLOPs of an image as Table 15 counts, with a head of ten classes."""
    return mflops(model, IMAGE, elementwise=True, attention=False) + 2 * 768 * 10 / 1e6


def bases(tokens: int, units: tuple[float, float], rows: dict[int, tuple]) -> list[float]:
    """The least and the greatest base, in MFLOPs, that gives all the printed numbers of a table.

    rows: {rank of the pairs that a method adds to 24 matrices: (forward, three times forward)};
    units: of their last digits. There is none if the least is above the greatest.
    """
    low, high = -math.inf, math.inf
    for r, printed in rows.items():
        for value, unit, times in zip(printed, units, (1, 3), strict=True):
            added = 24 * tokens * 2 * r * (768 + 768) / 1e6
            low = max(low, (value - unit / 2) / times - added)
            high = min(high, (value + unit / 2) / times - added)
    return [low, high]


def in_turn(x: Tensor, U: Tensor) -> Tensor:
    """HRA's Eq. 2: one reflection after the other."""
    for u in U.T.flip(0):
        x = hra.reflect(x, u[:, None])
    return x


def growth(f: Callable[[int], float], n: int) -> float:
    """p where f grows with n to the power p, between n and 2n."""
    return math.log2(f(2 * n) / f(n))


def relative(old: list[float], new: list[float]) -> float:
    """Mean relative change in per cent."""
    return 100 * fmean(b / a - 1 for a, b in zip(old, new, strict=True))


# ---------------------------------------------------------------- from cells to the page


def shows(printed: str, value: float) -> bool:
    """Whether value, rounded or cut off at the last printed digit, is the printed number."""
    digits, unit = re.match(r"(-?[\d,.]+)([KM]?)", printed).groups()
    digits, scale = digits.replace(",", ""), {"K": 1e3, "M": 1e6, "": 1}[unit]
    last = 10 ** len(digits.partition(".")[2]) / scale
    wanted, found = round(float(digits) * scale * last), round(value * last, 6)
    return abs(found - wanted) <= 0.5 or math.trunc(found) == wanted


def verdict(printed: str, ours) -> str:
    """Of a printed number, "" if there is none, and ours, which is no number if there is none."""
    if not printed:
        return "not printed"
    if not isinstance(ours, int | float) or not re.match(r"-?\d[\d,.]*([KM×%]|$| )", printed):
        return "not reproducible"
    return "equal" if shows(printed, ours) else "not equal"


def measure(data: dict) -> dict:
    """The same cells, with ours and verdict as they are today."""
    cells = []
    for cell in data["cells"]:
        ours = eval(cell["how"], globals())
        if isinstance(ours, float | list):
            ours = [round(x, 6) for x in ours] if isinstance(ours, list) else round(ours, 6)
        cells.append(cell | {"ours": ours, "verdict": verdict(cell["paper"], ours)})
    return {"cells": cells}


def shown(value) -> str:
    """A number as the page prints it."""
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.8g}"


TOP = """\
# The papers' numbers, recomputed

{0} cells: {1}.
Written by `python figures/papers.py` from [papers.json](papers.json). Where the papers' words
differ: [errata.md](errata.md).

- **ours** is the value of the line of Python beside it, which runs as it stands, in the
  repository's root: `python -c "from figures.papers import *; print(trained(lora(vit(), 1)))"`.
- **equal**: ours, rounded or cut off at the last printed digit, is the printed number. **not
  reproducible**: the paper leaves out what it takes, or it takes a machine. **not printed**: ours
  alone.
- Tables and sections are those of arXiv:2502.04700 (EigenLoRAx) and 2405.17484v3 (HRA); of
  2507.20745 (ReSoRA) we had the abstract and two public summaries only.
- Adapters are real modules, this repository's and PEFT's, on models that transformers builds on the
  meta device; FLOPs are `torch.utils.flop_counter`'s, and what a table needs beyond them is said.
  "By hand" and "by formula" mark the rest.
"""
HEAD = "| where | what | paper | ours | verdict | how | why |\n|---|---|---:|---:|---|---|---|"


def row(cell: dict) -> str:
    """A cell as a line of a Markdown table."""
    how = "" if cell["how"] == "None" else f"`{cell['how']}`"
    fields = [cell["where"], cell["what"], cell["paper"], shown(cell["ours"]), cell["verdict"]]
    return f"| {' | '.join([*fields, how, cell['why']])} |"


def page(data: dict) -> str:
    """counts.md: the mismatches of all sections first, then the other cells of each."""
    cells = data["cells"]
    count = Counter(cell["verdict"] for cell in cells)
    order = ("not equal", "equal", "not reproducible", "not printed")
    parts = [TOP.format(len(cells), ", ".join(f"{count[v]} {v}" for v in order))]
    sections = dict.fromkeys(cell["section"] for cell in cells)
    for title, mismatch in (("What differs", True), ("What is equal, or open", False)):
        parts.append(f"## {title}\n")
        for section in sections:
            mine = [cell for cell in cells if cell["section"] == section]
            lines = [row(cell) for cell in mine if (cell["verdict"] == "not equal") == mismatch]
            if lines:
                parts.append("\n".join([f"### {section}\n", HEAD, *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    source = Path(__file__).with_suffix(".json")
    if "--measure" in sys.argv[1:]:
        common.write_json(source, measure(common.read_json(source)))
    target = source.with_name("counts.md")
    with common.replacing(target) as temporary:
        temporary.write_text(page(common.read_json(source)), encoding="utf-8")
    print(target)
