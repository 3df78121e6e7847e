"""What README says: its code runs, its commands exist, its numbers are those that are committed."""

import importlib
import importlib.util
import re
import shlex
import statistics
import tomllib

import pytest
import torch
from torch import nn

import common
import train_glue
import train_vit
from tests.claims import METHODS, ROOT, claims
from tests.exercise import EXERCISES

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = r"^```(\w*)\n(.*?)^```\n"
BLOCKS = re.findall(BLOCK, README, flags=re.M | re.S)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SAID = " ".join(README.split())


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    return re.split(r"^#+ ", README.split(f"# {title}\n")[1], maxsplit=1, flags=re.M)[0]


def tables(title: str) -> list[list[list[str]]]:
    """The tables of a section: the cells of each line, less the heading."""
    found = re.findall(r"(?:^\|.*\n)+", section(title), flags=re.M)
    lines = [[line.strip("|").split("|") for line in table.splitlines()[2:]] for table in found]
    return [[[cell.strip() for cell in line] for line in table] for table in lines]


def read(name: str) -> dict:
    """figures/NAME.json."""
    return common.read_json(ROOT / "figures" / f"{name}.json")


# ---------------------------------------------------------------- form


def test_it_is_short_and_shows_working_code_at_once():
    assert len(README.split()) <= 1600
    assert README.partition(PYTHON[0])[0].count("\n") + PYTHON[0].count("\n") < 60
    for line in README.splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


def test_its_links_resolve():
    headings = re.findall(r"^#+ (.+)", README, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        file, _, anchor = link.partition("#")
        assert link.startswith("https://") or (ROOT / file).exists(), link
        assert file or anchor in anchors, link


# ---------------------------------------------------------------- code


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """What the blocks define, run in order in an empty folder."""
    space = {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        torch.manual_seed(0)
        for block in PYTHON:
            exec(compile(block, "README.md", "exec"), space)
        space["reloaded"] = space["LlamaForCausalLM"].from_pretrained(
            "llama", output_loading_info=True
        )
    return space


def test_its_code_runs_in_order_and_loads_all_that_it_saved(names):
    _, report = names["reloaded"]
    assert not any(report.values()), report
    loaded = dict(names["model"].named_parameters())
    for name, p in names["trained"].items():
        assert torch.equal(loaded[name], p), name


class Line(nn.Module):
    """y = W x, whose loss counts labels; and p, which only a penalty sees."""

    def __init__(self):
        super().__init__()
        self.W, self.p = nn.Linear(2, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        logits = self.W(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Summing(Line):
    """The same; Trainer takes it for a model that divides its loss by the items of a step."""

    def forward(self, x, labels, **items):
        return super().forward(x, labels)


@pytest.mark.parametrize("kind", [Line, Summing])
@pytest.mark.parametrize("batches", [1, 2])
def test_trainer_adds_the_penalty_once_a_step_and_not_in_evaluation(
    names, kind, batches, tmp_path, monkeypatch
):
    """The gradient of p is that of the penalty p, 1, however many batches make a step."""
    model = kind()

    def penalty():
        assert model.training
        return model.p

    monkeypatch.setitem(names, "penalty", penalty)
    examples = [{"x": torch.randn(2), "labels": i % 3} for i in range(12)]
    arguments = names["TrainingArguments"](
        str(tmp_path),
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=batches,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
    )
    data = {"train_dataset": examples, "eval_dataset": examples}
    names["PenaltyTrainer"](model, arguments, **data).train()
    assert model.p.item() == -3.0


# ---------------------------------------------------------------- commands


def commands() -> list[str]:
    """The lines of the shell blocks, and what stands like a command elsewhere."""
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    prose = re.sub(BLOCK, "", README, flags=re.M | re.S)
    return lines + re.findall(r"`((?:python|make|source) [^`]+)`", prose)


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_exists(command):
    words = shlex.split(command.replace("\\", "/"), comments=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, flags=re.M)
    elif words[:4] == ["python", "-m", "pip", "install"]:
        assert words[4:] == [*re.findall(r"torch==[\d.]+", makefile), "-e", ".[test]"]
        assert "test" in project["optional-dependencies"]
    elif words[:3] == ["python", "-m", "tests.exercise"]:
        assert {*words[3:]} <= {*EXERCISES, "--check"}
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        script = {"train_vit.py": train_vit, "train_glue.py": train_glue}[words[1]]
        arguments = ["hra" if word == "ether" else word for word in words[2:]]  # a reader's own
        script.complete(common.parse(script.Config, script.PRESETS, arguments))
    else:
        assert words in (["source", ".venv/bin/activate"], [".venv/Scripts/activate"])


# ---------------------------------------------------------------- numbers and names


def rows(name: str) -> dict[str, dict]:
    """The rows of a results file by name; mean and std of the score are over its seeds."""
    return {r["row"]: r for r in read(name)["rows"]}


def score(row: dict) -> str:
    """What README says of a row, in per cent."""
    return f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}"


def verified() -> list[str]:
    """What "Why trust it" says."""
    verdicts = [cell["verdict"] for cell in read("papers")["cells"]]
    equal, differ, rest = map(verdicts.count, ("equal", "not equal", "not reproducible"))
    times = {"HRA, ours": [], "HRA, PEFT": []}
    for x in read("costs")["hra"]["rows"]:
        times.get(x["contender"], []).append(x["ratio"])
    ours, theirs = times.values()
    return [
        f"the {sum(len(claims(name)) for name in METHODS)} claims is",
        f"{equal} came out equal, {differ} differ and {rest} cannot be recomputed",
        f"HRA takes {min(ours):.2f} to {max(ours):.2f} times LoRA's time,"
        f" PEFT's HRA {min(theirs):.0f} to {max(theirs):.0f} times",
    ]


def held() -> list[str]:
    """What "What held" says."""
    now = train_vit.PRESETS["digits"]["batch_size"]
    files = ("vit_hra", "vit_hra", "vit_resora", "vit_digits")  # of the first four lines
    old = sum(read(name)["config"]["batch_size"] != now for name in files)
    assert old == 3 and "three older than version 2" in SAID
    hra, stages, digits = map(rows, ("vit_hra", "vit_resora", "vit_digits"))
    plain = hra["HRA r=8, λ=0"]
    penalised = [100 * hra[f"HRA r=8, λ=1e-{power}"]["mean"] for power in range(1, 7)]
    pairs = [(stages[f"r={r}, linear, feature"], stages[f"r={r}, λ=0"]) for r in (2, 4, 8)]
    gains = [f"{100 * (ours['mean'] - without['mean']):+.1f}" for ours, without in pairs]
    runs = read("vit_resora")["runs"]
    of_seed = [
        [run["test"] for run in runs if (run["row"], run["seed"]) == (f"r=8, {arm}", seed)]
        for seed in range(5)
        for arm in ("linear, feature", "λ=0")
    ]
    means = [100 * statistics.fmean(scores) for scores in of_seed]
    by_seed = sorted(ours - without for ours, without in zip(means[::2], means[1::2], strict=True))
    rest = statistics.fmean(by_seed[:-1])
    side = read("adapters")["sides"]["A"]
    real, k = side["real"], side["ks"].index(4)
    left_out = statistics.median(task[k] for task in real["held_out"])
    return [
        f"- HRA r=8 reached {score(plain)} (with λ from 1e-6 to 0.1: {min(penalised):.1f} to"
        f" {max(penalised):.1f}), LoRA r=4 of its size {score(hra['LoRA r=4'])}.",
        f"LoRA r=2, 4, 8 by {', '.join(gains)} points; without one seed, r=8 has {rest:+.1f}.",
        f"- EigenLoRAx reached {score(digits['EigenLoRAx'])}, a random subspace of its size"
        f" {score(digits['Random subspace'])}.",
        f"4 components of A hold {100 * real['spectrum'][3]:.0f} % of the energy, and"
        f" {100 * left_out:.0f} % of one left out (median).",
        f"average {real['cosine']['mean']:.2f} and reach {real['cosine']['largest absolute']:.2f}:",
    ]


@pytest.mark.parametrize("sentences", [verified, held])
def test_a_number_is_that_of_the_committed_json(sentences):
    for sentence in sentences():
        assert sentence in SAID, sentence


def span(*values: float) -> str:
    """What a cell of the table says: the least and the greatest, or the one there is."""
    return "–".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def test_the_starting_values_are_those_of_the_scripts():
    here = train_vit.LEARNING_RATES["digits"], train_glue.LEARNING_RATES["docs"]
    paper = train_glue.LEARNING_RATES["paper"]
    tuned = {"HRA": "HRA r=8, λ=0", "ReSoRA": "LoRA r=4", "EigenLoRAx": "EigenLoRAx"}
    printed = {**tuned, "ReSoRA": "LoRA r=8"}
    (table,) = tables("Starting values")
    for name, rate, papers, r, lam, K, decay in table:
        options = common.METHODS[name.lower()].options
        assert rate == span(*(rates[tuned[name]] for rates in here))
        assert papers.removesuffix(" (LoRA's)") == span(*paper[printed[name]].values())
        assert (r, K) == (str(options["rank"]), str(options.get("components", "")))
        assert lam.split(" ")[0] == (f"{options['lam']:g}" if "lam" in options else "")
        assert name == "HRA" or decay == f"{train_vit.PRESETS['digits']['weight_decay']}"
    assert [line[0] for line in table] == [*tuned]


def test_every_lambda_is_that_of_the_starting_values():
    (table,) = tables("Starting values")
    code = "\n".join(PYTHON)
    known = {name: re.findall(r"[\de.-]*\d", lam)[-1:] for name, _, _, _, lam, *_ in table}
    assert {*re.findall(r"(\S+) \* sum\(layer.penalty", code)} == {*known["HRA"]}
    found = {float(lam) for lam in re.findall(r"(\S+) \* regulariser.penalty", code)}
    assert found == {float(lam) for lam in known["ReSoRA"]}


def test_it_maps_papers_to_functions_and_every_claim():
    table, _ = tables("From the papers to the code")
    claimed = []
    for _, functions, ids in table:
        for method, function in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert hasattr(importlib.import_module(method), function)
        for first, *last in (part.split("–") for part in ids.split()):
            numbers = range(int(first[1:]), int([first, *last][-1][1:]) + 1)
            claimed += [f"{first[0]}{number}" for number in numbers]
    assert sorted(claimed) == sorted(claim for name in METHODS for claim in claims(name))


def test_the_plan_fits_its_exercises_in_90_minutes():
    (plan,) = tables("Learn")
    end = "0"
    for minutes, what in plan:
        start, before = minutes.split("–")[0], end
        end = minutes.split("–")[1]
        needed = sum(EXERCISES[name].minutes for name in re.findall(r"`(\w+\.[\w.]+)`", what))
        assert start == before and int(end) - int(start) >= needed, what
    assert end == "90"
    least, most = (f([e.minutes for e in EXERCISES.values()]) for f in (min, max))
    assert f"There are {len(EXERCISES)}, of {least} to {most} minutes" in SAID
