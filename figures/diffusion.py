# SPDX-License-Identifier: MIT
"""Digits in twenty styles, by a small diffusion transformer and its adapters: an illustration.

python -m figures.diffusion                draw diffusion.png from diffusion.json
python -m figures.diffusion --measure      train first: some minutes of one quiet core, no download
    --quick       a few steps of everything, to see that it runs
    --out JSON    another file than diffusion.json

EigenLoRAx (Section 4.4, Figure 4) replaces 20 LoRAs of Stable Diffusion XL by 14 components and
compares the pictures. This is the same on a model that anyone can train: a transformer learns
scikit-learn's digits, and a LoRA of it each of 20 styles. No model here is pretrained and every
style is one of ours, so the figure shows pictures and bytes and supports no claim.

The model is a rectified flow. Let z be noise, x an image and x_t = (1 − t)·z + t·x a point on the
line between them. The model sees x_t, t and the digit, and guesses x. To draw, start at noise and
go from t = 0 to 1 in small steps towards the guess: (guess − x_t)/(1 − t) is the velocity.

What is trained is kept in runs/, model by model, and the same command goes on from there.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

import common
import eigenlorax
import hra
import resora
from figures import plots

SIDE, PATCH, WIDTH, DEPTH, HEADS = 16, 4, 64, 3, 4
TARGETS = ["query", "key", "value", "out", "up", "down", "last"]  # every Linear between tokens
RANK = 4  # of a LoRA; HRA has twice as many mirrors, which are as many numbers
SHOWN = 14  # components, as many as the paper has
KNOWN = 1500  # digits to train on and to judge by; the other 297 judge the judge
Images = tuple[Tensor, Tensor]  # ink (N, 1, 16, 16) from 0 to 1, and which digits (N,)
PLAN = {
    "base": {"steps": 1500, "rate": 4e-3, "batch": 64},
    "lora": {"steps": 100, "rate": 3e-2, "batch": 64},
    "hra": {"steps": 100, "rate": 3e-2, "batch": 64},
    "coefficients": {"steps": 100, "rate": 5e-2, "batch": 64},
    "components": {"K=4": 4, f"K={SHOWN}": SHOWN, "90 %": 0.9},  # name: rule, see `choose_k`
    "held_out": ["slanted left", "shadowed", "mirrored", "inverted"],
    "half_seen": ["slanted right", "outlined", "small", "striped"],
    "drawn": 5,  # pictures of each digit
}

# ---------------------------------------------------------------- digits and styles


def digits() -> Images:
    """scikit-learn's 1,797 digits at twice their size."""
    found = load_digits()
    ink = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    ink = F.interpolate(ink, scale_factor=2, mode="bicubic")
    return ink.clamp(0, 1), torch.tensor(found.target)


def warped(ink: Tensor, matrix: list[list[float]]) -> Tensor:
    """Each image of ink (N, 1, h, w), read at matrix · (x, y) instead of (x, y)."""
    affine = torch.tensor([[*row, 0.0] for row in matrix])
    grid = F.affine_grid(affine.expand(len(ink), 2, 3), ink.shape, align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def styles(ink: Tensor) -> dict[str, Tensor]:
    """{style: the same digits in it} for ink (N, 1, 16, 16)."""
    line = torch.arange(SIDE)
    rows, columns = line[:, None], line[None]
    thick = F.max_pool2d(ink, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    blocks = F.avg_pool2d(ink, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    edge = ((rows % (SIDE - 1)) * (columns % (SIDE - 1)) == 0).float()
    return {
        "inverted": 1 - ink,
        "thick": thick,
        "thin": (2 * thin).clamp(0, 1),
        "outlined": (thick - ink).clamp(0, 1),
        "slanted left": warped(ink, [[1.0, -0.5], [0.0, 1.0]]),
        "slanted right": warped(ink, [[1.0, 0.5], [0.0, 1.0]]),
        "mirrored": ink.flip(3),
        "upside down": ink.flip(2),
        "turned": ink.rot90(1, (2, 3)),
        "small": warped(ink, [[1.5, 0.0], [0.0, 1.5]]),
        "narrow": warped(ink, [[1.8, 0.0], [0.0, 1.0]]),
        "flat": warped(ink, [[1.0, 0.0], [0.0, 1.8]]),
        "striped": ink * (rows % 4 < 2),
        "barred": ink * (columns % 4 < 2),
        "chequered": ink * ((rows // 2 + columns // 2) % 2),
        "mosaic": (blocks > 0.5).float(),
        "blurred": F.avg_pool2d(ink, 5, stride=1, padding=2),
        "shadowed": torch.maximum(ink, 0.5 * ink.roll((2, 2), (2, 3))),
        "framed": torch.maximum(ink, edge),
        "half inverted": torch.where(rows < SIDE // 2, ink, 1 - ink),
    }


# ---------------------------------------------------------------- the model


class Block(nn.Module):
    """Attention between tokens, then a network on each, both added to x (N, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        heads = [
            linear(h).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (N, heads, tokens, width / heads)
            for linear in (self.query, self.key, self.value)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Painter(nn.Module):
    """The images (N, 1, 16, 16) of digits (N,) that may be behind x at times t (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.digit = nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH**2)

    def forward(self, x: Tensor, t: Tensor, digit: Tensor) -> Tensor:
        waves = t[:, None] * torch.pi * torch.arange(1, 9)
        known = self.time(torch.cat([waves.sin(), waves.cos()], 1)) + self.digit(digit)
        tokens = F.pixel_unshuffle(x, PATCH).flatten(2).mT  # (N, 16 patches, 16 pixels)
        h = self.patches(tokens) + self.places + known[:, None]
        for block in self.blocks:
            h = block(h)
        out = self.last(self.norm(h)).mT.unflatten(2, (SIDE // PATCH, -1))
        return F.pixel_shuffle(out, PATCH)


def train(model: nn.Module, images: Images, how: Mapping, name: str) -> None:
    """Teach what is not frozen to guess these images behind noise."""
    ink, digit = images
    chance = generator(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how["rate"], weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how["rate"], how["steps"])
    for _ in tqdm(range(how["steps"]), name, leave=False):
        rows = torch.randint(len(ink), (how["batch"],), generator=chance)
        x = 2 * ink[rows] - 1
        z = torch.randn(x.shape, generator=chance)
        t = torch.rand(len(x), generator=chance)
        between = torch.lerp(z, x, t[:, None, None, None])
        loss = F.mse_loss(model(between, t, digit[rows]), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def drawing(model: nn.Module, digit: Tensor, steps: int = 30) -> Tensor:
    """Ink (N, 1, 16, 16) that the model draws of digits (N,), always from the same noise."""
    x = torch.randn(len(digit), 1, SIDE, SIDE, generator=generator(2))
    for step in range(steps):
        t = torch.full((len(x),), step / steps)
        x = x + (model(x, t, digit) - x) / (steps - step)
    return (x / 2 + 0.5).clamp(0, 1)


def generator(seed: int) -> torch.Generator:
    """A seed of its own for every draw, so that nothing depends on what was drawn before."""
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- what is trained


def lora(base: nn.Module, images: Images, asked: Tensor, how: Mapping, name: str) -> dict:
    """A LoRA trained on these images: its pairs {layer: (B, A)}, and what it draws.

    All start from the same A, as adapters do that come from one training script with one seed.
    """
    model = copy.deepcopy(base)
    layers = resora.adapt(model, TARGETS, RANK, generator=generator(0))
    train(model, images, how, name)
    pairs = {}
    for layer, module in layers.items():
        B, A = module.pair()
        pairs[layer] = B.detach(), A.detach()
    return {"pairs": pairs, "drawn": drawing(resora.merge(model), asked)}


def reflections(base: nn.Module, images: Images, asked: Tensor, how: Mapping, name: str) -> dict:
    """HRA with as many numbers as `lora` has, trained on these images: what it draws."""
    model = copy.deepcopy(base)
    hra.adapt(model, TARGETS, 2 * RANK, generator=generator(0))
    train(model, images, how, name)
    return {"drawn": drawing(hra.merge(model), asked)}


def coefficients(
    base: nn.Module, others: list[dict], images: Images, asked: Tensor, how: Mapping
) -> dict:
    """A style learnt by coefficients alone, of the other styles' components: what it draws."""
    model = copy.deepcopy(base)
    subspaces = eigenlorax.recycle(others, SHOWN)
    eigenlorax.adapt(model, subspaces, RANK, generator=generator(0))
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    train(model, images, how, "coefficients")
    return {"drawn": drawing(eigenlorax.merge(model), asked), "bytes": sum(trained)}


def recycled(base: nn.Module, adapters: dict[str, dict], k: int | float, asked: Tensor) -> dict:
    """One model for every style, with components by the rule k, on which adapters are projected."""
    model = copy.deepcopy(base)
    subspaces = eigenlorax.recycle(adapters.values(), k)
    layers = eigenlorax.adapt(model, subspaces, RANK, tasks=len(adapters))
    drawn = {}
    for task, (style, adapter) in enumerate(tqdm(adapters.items(), f"k = {k}", leave=False)):
        eigenlorax.set_task(layers, task, adapter)
        with eigenlorax.serving(layers, task):
            drawn[style] = drawing(model, asked)
    size = sum(tensor.nbytes for tensor in eigenlorax.to_bank(layers).values())
    return {"drawn": drawn, "bytes": size, "error": errors(layers, adapters)}


@torch.no_grad()
def errors(layers: Mapping[str, eigenlorax.EigenLoRAxLinear], adapters: dict) -> dict[str, float]:
    """‖ΔW − its projection‖ / ‖ΔW‖ for each layer, mean over the adapters."""
    found = {}
    for name, layer in layers.items():
        relative = []
        for task, adapter in enumerate(adapters.values()):
            (B, A), (kept_B, kept_A) = adapter[name], layer.pair(task)
            delta = B @ A
            relative.append((delta - kept_B @ kept_A).norm() / delta.norm())
        found[name] = torch.stack(relative).mean().item()
    return found


# ---------------------------------------------------------------- how it is judged


class Judge:
    """Tells a drawn digit and its style by the nearest of all known digits in all styles."""

    def __init__(self, known: Mapping[str, Tensor], digit: Tensor) -> None:
        self.styles = list(known)
        pixels = torch.cat([ink.flatten(1) for ink in known.values()])
        style = torch.arange(len(known)).repeat_interleave(len(digit))
        labels = torch.stack([style, digit.repeat(len(known))], 1)
        self.nearest = KNeighborsClassifier(1).fit(pixels.numpy(), labels.numpy())

    def __call__(self, ink: Tensor, style: str, digit: Tensor) -> dict[str, float]:
        """The shares of ink (N, 1, 16, 16) that are in the style, are the digit, and are both."""
        found = torch.from_numpy(self.nearest.predict(ink.flatten(1).numpy()))
        in_style = found[:, 0] == self.styles.index(style)
        is_digit = found[:, 1] == digit
        shares = {"style": in_style, "digit": is_digit, "both": in_style & is_digit}
        return {name: share.double().mean().item() for name, share in shares.items()}


def as_text(ink: Tensor) -> list[str]:
    """A string for each picture: its pixels, row by row, each a hexadecimal digit of its ink."""
    levels = (15 * ink).round().int().flatten(1).tolist()
    return ["".join(f"{level:x}" for level in picture) for picture in levels]


def as_picture(text: str) -> Tensor:
    """The picture (16, 16) of a string that `as_text` made."""
    return torch.tensor([int(level, 16) / 15 for level in text]).view(SIDE, SIDE)


# ---------------------------------------------------------------- measure


def pretrained(images: Images, asked: Tensor, how: Mapping) -> dict:
    """The weights of a painter of plain digits, and what it draws."""
    torch.manual_seed(0)
    model = Painter()
    train(model, images, how, "base")
    return {"weights": model.state_dict(), "drawn": drawing(model, asked)}


def everything(plan: Mapping, folder: Path, images: Images, asked: Tensor) -> tuple[dict, ...]:
    """What every model draws, {row: {style: ink}}; bytes by row; errors by layer, by components."""

    def made(name: str, make: Callable[..., dict], *arguments) -> dict:
        """make(*arguments), kept in a file, from which the next call reads it."""
        file = folder / f"{name}.pt"
        if not file.exists():
            found = make(*arguments)
            with common.replacing(file) as temporary:
                torch.save(found, temporary)
        return torch.load(file)

    ink, digit = images
    styled = {style: (painted, digit) for style, painted in styles(ink).items()}
    base = Painter()
    start = made("base", pretrained, images, asked, plan["base"])
    base.load_state_dict(start["weights"])
    drawn = {"base": {"plain": start["drawn"]}, "LoRA": {}, "coefficients": {}}
    adapters, size, error = {}, {}, {}

    for style, task in styled.items():
        found = made(f"LoRA, {style}", lora, base, task, asked, plan["lora"], style)
        adapters[style], drawn["LoRA"][style] = found["pairs"], found["drawn"]
    factors = [X for adapter in adapters.values() for pair in adapter.values() for X in pair]
    size["LoRA"] = sum(X.nbytes for X in factors)

    for name, k in plan["components"].items():
        found = made(name, recycled, base, adapters, k, asked)
        drawn[name], size[name], error[name] = found.values()

    for style in plan["held_out"]:
        others = [adapter for name, adapter in adapters.items() if name != style]
        how = plan["coefficients"]
        found = made(f"held out, {style}", coefficients, base, others, styled[style], asked, how)
        drawn["coefficients"][style], size["one by coefficients"] = found.values()

    few = digit < 5
    for method, train_one in {"LoRA": lora, "HRA": reflections}.items():
        drawn[f"{method}, 0 to 4"] = {}
        for style in plan["half_seen"]:
            half = styled[style][0][few], digit[few]
            name, how = f"{method}, 0 to 4, {style}", plan[method.lower()]
            found = made(name, train_one, base, half, asked, how, name)
            drawn[f"{method}, 0 to 4"][style] = found["drawn"]
    return drawn, size, error


def measure(target: Path, plan: Mapping) -> None:
    """Train what runs/ does not hold yet, judge what is drawn, and write the JSON."""
    files = [__file__, *(module.__file__ for module in (hra, resora, eigenlorax))]
    sources = [common.source_of(file) for file in files]
    folder = Path("runs") / f"diffusion-{common.fingerprint([plan, sources])}"
    folder.mkdir(parents=True, exist_ok=True)
    ink, digit = digits()
    known, other = (ink[:KNOWN], digit[:KNOWN]), (ink[KNOWN:], digit[KNOWN:])
    asked = torch.arange(10).repeat(plan["drawn"])
    drawn, size, error = everything(plan, folder, known, asked)

    judge = Judge({"plain": known[0], **styles(known[0])}, known[1])
    shares = {"real": {s: judge(x, s, other[1]) for s, x in styles(other[0]).items()}}
    pictures = {}
    for row, found in drawn.items():
        new = asked > 4 if row.endswith("0 to 4") else asked >= 0  # the digits never seen in it
        shares[row] = {style: judge(x[new], style, asked[new]) for style, x in found.items()}
        pictures[row] = {style: as_text(x[:10]) for style, x in found.items()}
    result = {"environment": common.environment(), "plan": plan, "bytes": size, "error": error}
    common.write_json(target, result | {"shares": shares, "pictures": pictures})


# ---------------------------------------------------------------- draw


def sheet(rows: list[list[str]]) -> Tensor:
    """Pictures side by side and below each other, dark ink on white, a grey line between them."""
    lines = []
    for row in rows:
        pictures = [F.pad(1 - as_picture(text), (1, 1, 1, 1), value=0.75) for text in row]
        lines.append(torch.cat(pictures, 1))
    return torch.cat(lines)


def show(axis, rows: list[list[str]], title: str, shade: str = "black") -> None:
    """Four digits a row, 2 to 5, under a title."""
    axis.imshow(sheet([row[2:6] for row in rows]).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, pad=2, color=shade)
    axis.axis("off")


def draw(source: str | Path) -> Path:
    """Draw the figure beside its JSON; returns the path of the PNG."""
    data = common.read_json(source)
    pictures, shares = data["pictures"], data["shares"]
    figure = plots.plotting().figure(figsize=(plots.WIDTH, 9.6), layout="constrained")
    grid, below, charts = figure.subfigures(3, 1, height_ratios=(5, 1.8, 2.6))

    title = "Illustration, nothing pretrained: 20 LoRAs above, "
    plots.headline(grid, title + f"{SHOWN} components of all below (red: lost)")
    failures = lost(data)
    for axis, style in zip(grid.subplots(4, 5).flat, pictures["LoRA"], strict=True):
        rows = [pictures["LoRA"][style], pictures[f"K={SHOWN}"][style]]
        show(axis, rows, style, "tab:red" if style in failures else "black")

    plots.headline(below, "Held out: its LoRA above; below, coefficients of the others' components")
    held_out = pictures["coefficients"]
    for axis, style in zip(below.subplots(1, len(held_out)), held_out, strict=True):
        show(axis, [pictures["LoRA"][style], held_out[style]], style)

    size_axis, layers_axis, half_axis = charts.subplots(1, 3)
    blue, green, red = (common.METHODS[key].colour for key in ("lora", "eigenlorax", "hra"))
    names = [*data["plan"]["components"], "LoRA"]
    size = [data["bytes"][name] / 1e3 for name in names]
    right = [percent(shares[name]) for name in names]
    size_axis.plot(size[:-1], right[:-1], "o-", color=green)
    size_axis.plot(size[-1], right[-1], "o", color=blue)
    for name, x, y in zip(names, size, right, strict=True):
        size_axis.annotate(name, (x, y), (5, -14), textcoords="offset points")
    size_axis.set(xlabel="kB for 20 styles", ylabel="drawn right, %", ylim=(0, 105))
    size_axis.set(xlim=(0, 1.3 * size[-1]), title="Pictures against bytes")

    layers_axis.plot([*data["error"][f"K={SHOWN}"].values()], "o-", color=green)
    layers_axis.set(xlabel="layer, from input to output", ylabel="‖ΔW lost‖ / ‖ΔW‖", ylim=(0, 1))
    layers_axis.set(title=f"What K = {SHOWN} loses")

    for style in data["plan"]["half_seen"]:
        pair = [shares[f"{method}, 0 to 4"][style] for method in ("LoRA", "HRA")]
        kept, gained = ([100 * share[kind] for share in pair] for kind in ("digit", "style"))
        half_axis.plot(kept, gained, color="0.8")
        half_axis.plot(kept[0], gained[0], "o", color=blue)
        half_axis.plot(kept[1], gained[1], "o", color=red)
    half_axis.text(0.05, 0.18, "LoRA", color=blue, transform=half_axis.transAxes)
    half_axis.text(0.05, 0.06, "HRA, same style", color=red, transform=half_axis.transAxes)
    half_axis.set(xlabel="unseen digits kept, %", xlim=(0, 105), ylim=(0, 105))
    half_axis.set(ylabel="style gained, %", title="Trained on 0–4, asked for 5–9")
    return plots.save_figure(figure, source)


def percent(shares: Mapping[str, Mapping], kind: str = "both") -> float:
    """Mean over styles, in per cent."""
    return 100 * sum(share[kind] for share in shares.values()) / len(shares)


def lost(data: Mapping) -> list[str]:
    """The styles of which the components draw less than half as many right as the LoRA."""
    ours, theirs = data["shares"][f"K={SHOWN}"], data["shares"]["LoRA"]
    return [style for style in theirs if ours[style]["both"] < theirs[style]["both"] / 2]


def said(data: Mapping) -> str:
    """What the figure shows, in a few sentences with its numbers."""
    shares, size = data["shares"], data["bytes"]
    ours, few = f"K={SHOWN}", "0 to 4"
    held_out = shares["coefficients"]
    same = {style: shares["LoRA"][style] for style in held_out}
    kept = {name: percent(shares[f"{name}, {few}"], "digit") for name in ("LoRA", "HRA")}
    gained = {name: percent(shares[f"{name}, {few}"], "style") for name in kept}
    return (
        f"The 20 LoRAs take {size['LoRA'] / 1e3:.0f} kB; {SHOWN} components of all of them and"
        f" every style's coefficients take {size[ours] / 1e3:.0f} kB. Digit and style are right in"
        f" {percent(shares['LoRA']):.0f} % of what the LoRAs draw and in"
        f" {percent(shares[ours]):.0f} % of what the components draw (of unseen real digits:"
        f" {percent(shares['real']):.0f} %). Lost, that is less than half as often right as with"
        f" their LoRA (of 50 pictures; the cut is arbitrary):"
        f" {', '.join(lost(data)) or 'none'}. Of the styles held out, coefficients of"
        f" the others' components draw {percent(held_out):.0f} % right, their own LoRAs"
        f" {percent(same):.0f} %. Trained in a style on the digits 0 to 4 and asked for 5 to 9,"
        f" LoRA keeps {kept['LoRA']:.0f} % of the digits and gains {gained['LoRA']:.0f} % of the"
        f" style; HRA keeps {kept['HRA']:.0f} % and gains {gained['HRA']:.0f} %"
        f" (n = {len(data['plan']['half_seen'])} styles, one seed)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="train first")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    default = Path(__file__).with_suffix(".json")
    parser.add_argument("--out", type=Path, default=default, metavar="JSON")
    options = parser.parse_args()
    plan = PLAN
    if options.quick:
        quick = {"steps": 5, "rate": 1e-2, "batch": 8}  # fewer leave 14 components nothing to find
        plan = plan | dict.fromkeys(("base", "lora", "hra", "coefficients"), quick) | {"drawn": 1}
    if options.measure:
        measure(options.out, plan)
    print(draw(options.out))


if __name__ == "__main__":
    common.one_line_errors(main)
