"""train_glue.py: presets, the docstrings' tasks, GLUE's data, the gate, and what a run leaves."""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import common
import eigenlorax
import train_glue
from common import row
from figures import glue_gate, plots
from tests.test_common import TINY, command

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("REFERENCE_DATA")
STDLIB = Path(sysconfig.get_path("stdlib"))
WORDS = "a file is read and the other one will be written to its name when it has no path".split()


def config(**options) -> train_glue.Config:
    return train_glue.complete(train_glue.Config(jobs=1, **options))


def specs_of(base: train_glue.Config, *rows: dict, seeds=(0,), task: str = "") -> list[dict]:
    """The runs of some rows, of one task or of all."""
    preset = train_glue.LEARNING_RATES[train_glue.preset(base)]
    _, rates = common.rows_and_rates(base, rows, {}, preset)
    specs = common.specify(rows, rates, train_glue.task_names(base), seeds)
    return [spec for spec in specs if task in ("", spec["task"])]


def rows_by_name(base: train_glue.Config) -> dict[str, dict]:
    """The rows of all tables."""
    return {r["row"]: r for table in train_glue.TABLES.values() for r in table(base)}


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train -1", "found --train -1; wanted 0 or more"),
        ("--length 2", "found --length 2; wanted 8 or more"),
        ("--evaluate 1", "found --evaluate 1; wanted 2 or more: one row has no correlation"),
        ("--components 8", "found --components 8; wanted more than 8, the directions of two"),
        ("--backbone no/model --data no/data", "backbone 'no/model': wanted a folder"),
    ],
)
def test_bad_input_is_one_line_that_names_it(monkeypatch, tmp_path, arguments, message):
    line = command(monkeypatch, train_glue, *arguments.split(), "--runs", str(tmp_path))
    assert line.startswith(f"train_glue.py: error: {message}"), line
    assert not list(tmp_path.rglob("glue_*.json"))


def test_presets_are_the_papers_unless_the_user_says_otherwise():
    def hub(**options) -> train_glue.Config:
        return config(backbone="x", data="y", **options)

    paper, few, quick = hub(), hub(train=400), hub(quick=True)
    assert (paper.batch_size, paper.weight_decay, paper.components, paper.rank) == (64, 0.1, 32, 8)
    rates = train_glue.LEARNING_RATES["paper"]
    assert (rates["LoRA r=8"]["sst2"], rates["EigenLoRAx"]["sst2"]) == (5e-4, 5e-3)
    assert train_glue.EPOCHS["cola"] == 80 and rates["HRA r=8, λ=0"]["qnli"] == 1e-2
    assert hub(table="hra").batch_size == 32 and hub(table="hra", batch_size=8).batch_size == 8
    assert (few.epochs, few.batch_size, few.weight_decay) == (5, 16, 0.01)
    assert train_glue.preset(quick) == "few" and (quick.train, quick.seeds) == (400, 1)
    assert (quick.epochs, quick.batch_size, quick.length) == (5, few.batch_size, few.length)
    assert config(quick=True, seeds=3).seeds == 3
    names = [r["row"] for r in train_glue.eigenlorax_rows(quick)]
    assert names == ["Full", "Base", "LoRA r=8", "EigenLoRAx", "Random subspace"]
    every = hub(table="hra")
    assert all(r["every"] for r in train_glue.hra_rows(every))  # Linear layer, as in Table 2
    for base in (paper, few, config(table="hra"), config(table="all")):
        assert not any("every" in r for r in train_glue.hra_rows(base))
    for name, base in (("docs", config()), ("few", few), ("paper", paper)):
        named = {r.get("rate", r["row"]) for r in rows_by_name(base).values()}
        assert named <= set(train_glue.LEARNING_RATES[name]), name


# ---------------------------------------------------------------- the docstrings' tasks


@pytest.fixture(scope="module")
def docs() -> list[train_glue.Doc]:
    """The docstrings of some packages of the standard library."""
    found = []
    for package in ("asyncio", "email", "http", "importlib", "unittest", "urllib", "logging"):
        inner = train_glue.docstrings(STDLIB / package)
        found += [doc._replace(module=f"{package}.{doc.module}") for doc in inner]
    words = [len(s.split()) for doc in found for s in doc.sentences]
    assert len(found) > 500 and len(words) > 1500 and min(words) >= 5 and 20 < max(words) <= 40
    return found


def test_docstrings_are_parsed_and_never_imported(tmp_path):
    text = '"""Close the file and forget about its name.\n\nNo.\n\n>>> one more that is code\n"""\n'
    inner = "class Some:\n  def both(self):\n    '''The first of them. It has a second one.'''\n"
    for name, source in {
        "package/a.py": text + "raise SystemExit('imported')\n",
        "test/b.py": text,
        "broken.py": text + "def f(:\n",
        "z.py": inner,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert train_glue.docstrings(tmp_path) == [
        ("package.a", "a", False, ["Close the file and forget about its name."]),
        ("z", "both", True, ["It has a second one."]),  # "The first of them." has four words
    ]


def test_splits_share_no_module_and_no_sentence(docs):
    parts = Counter(map(train_glue.split_of, {doc.module for doc in docs}))
    assert parts["train"] > parts["test"] > parts["validation"] > 0 and len(parts) == 3
    assert train_glue.split_of("asyncio.events") == "train"  # on any machine
    suite, seen = train_glue.suite(docs), set()
    where = {s: train_glue.split_of(d.module) for d in reversed(docs) for s in d.sentences}
    once = Counter(s for doc in docs for s in doc.sentences)
    for split in train_glue.ROWS:
        texts = {*suite["sst2"][split]["sentence"], *suite["rte"][split]["sentence1"]}
        assert not texts & seen
        assert all(where[s] == split for s in texts if once[s] == 1)
        seen |= texts


def test_the_suite_is_the_same_every_time_and_balanced(docs):
    suite = train_glue.suite(docs)
    assert suite == train_glue.suite(docs) and list(suite) == list(train_glue.TASKS)
    for task, shape in train_glue.TASKS.items():
        for rows in suite[task].values():
            assert set(rows) == {*shape.columns, "label"}
            counts = Counter(rows["label"])
            assert max(counts.values()) - min(counts.values()) <= 1, task
            assert len(counts) == (6 if shape.classes == 1 else 2)
    doc = train_glue.Doc("a", "b", True, ["This is the only sentence that there is."])
    with pytest.raises(ValueError, match="found no rows for mrpc, train in 1 docstrings; wanted"):
        train_glue.suite([doc])


def test_each_task_is_what_the_docstring_says(docs):
    short = [[s for s in doc.sentences if len(s.split()) <= 20] for doc in docs]
    docs = [doc._replace(sentences=s) for doc, s in zip(docs, short, strict=True) if s]
    rows = {t: list(train_glue.examples(t, docs, random.Random(0))) for t in train_glue.TASKS}
    whole = {" ".join(s.rstrip(".:").split()) for doc in docs for s in doc.sentences}
    moved = {tuple(sorted(s.split())) for s in whole}
    for (text,), label in rows["cola"]:
        assert text in whole if label else tuple(sorted(text.split())) in moved
    mixed = [text not in whole for (text,), label in rows["cola"] if not label]
    assert sum(mixed) > 0.98 * len(mixed)  # a few are moved to where they were
    for (text,), label in rows["sst2"]:
        assert any(doc.sentences[0] == text and doc.function == (label == 0) for doc in docs)
    for pair, label in rows["mrpc"]:
        first, later = pair if label else pair[::-1]
        assert any(d.sentences[0] == first and later in d.sentences[1:] for d in docs)
    for (name, text), label in rows["qnli"]:
        mine = [d.sentences for d in docs if train_glue.words_of(d.name) == name]
        assert any(text in s[1:] if label else text == s[0] for s in mine)
    for (one, two), label in rows["rte"]:
        assert (label == 0) == (one == two)
        assert abs(len(one) - len(two)) == (len(" not") if label else 0)
        assert sorted(one.replace(" not", "")) == sorted(two.replace(" not", ""))
    for (one, two), label in rows["stsb"]:
        words = iter(one.split())
        assert all(word in words for word in two.split())  # in their order
        assert abs(len(two.split()) / len(one.split()) - label / 5) < 0.11
    names = {"read_until": "read until", "HTTPServer": "http server", "__init__": "init", "_": ""}
    assert {name: train_glue.words_of(name) for name in names} == names


def test_words_of_one_text_say_as_much_as_the_docstring_admits(docs):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    suite = train_glue.suite(docs)
    committed = json.loads((ROOT / "figures" / "glue_docs.json").read_text())["rows"]
    full = next(r["tasks"] for r in committed if r["row"] == "Full")

    def score(task: str, column: str) -> float:
        counts = CountVectorizer(ngram_range=(1, 2))
        train, test = suite[task]["train"], suite[task]["test"]
        model = make_pipeline(counts, LogisticRegression(max_iter=1000))
        model.fit(train[column][:800], train["label"][:800])
        return model.score(test[column], test["label"])

    tells = {"rte": "sentence2", "mrpc": "sentence1", "sst2": "sentence", "qnli": "sentence"}
    for task, text in tells.items():
        assert score(task, text) > full[f"{task}-like"] - 0.05, task
    assert score("rte", "sentence2") > 0.8
    assert score("rte", "sentence1") < 0.62 and score("qnli", "question") < 0.62


def test_a_tokenizer_of_the_same_texts_is_the_same(docs):
    texts = [s for doc in docs for s in doc.sentences]
    first, *others = (train_glue.docs_tokenizer(texts, 64) for _ in range(3))
    for tokenizer in others:
        assert tokenizer.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    for text in ("return the name of a file.", "naïve (as it is) — and 3.5 % more"):
        ids = first(text)["input_ids"]
        assert first.decode(ids, skip_special_tokens=True).strip() == text
        assert first.unk_token_id not in ids
    pair = first("one", "two")["input_ids"]
    assert (pair[0], pair[-1], pair.count(first.sep_token_id)) == (0, 2, 3)


def test_masked_words_are_words_and_the_rest_is_not_scored(docs):
    tokenizer = train_glue.docs_tokenizer([s for doc in docs for s in doc.sentences], 64)
    assert len(tokenizer) == 2000
    blocks = train_glue.Blocks(docs, tokenizer, 16)
    batch = blocks.collate(list(range(200)))
    ids, scored = blocks.ids[:200], batch["labels"] >= 0
    named, scored[:, 0] = batch["labels"][:, 0], False  # the first token names a hidden word
    hidden = (named[:, None] == ids) & scored
    assert (hidden.any(1) | (scored.sum(1) == 0)).all()
    assert torch.equal(batch["labels"][scored], ids[scored]) and ids.shape == (200, 16)
    assert torch.equal(batch["input_ids"][~scored], ids[~scored])
    assert (batch["input_ids"][scored] == tokenizer.mask_token_id).all()
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (scored & special).any()
    assert 0.17 < scored.sum() / (~special).sum() < 0.23
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and (ids[:, -1] == 2).all()


def test_the_embedded_backbone_is_made_once_and_names_its_text(tmp_path, monkeypatch, docs):
    monkeypatch.setattr(train_glue, "docstrings", lambda root: docs[::2])
    base = config(quick=True, runs=str(tmp_path / "runs"))
    backbone, results, about = train_glue.prepare(base)
    text = {"python": sys.version.split()[0], "docstrings": len(docs[::2])}
    assert about["corpus"].items() >= (text | {"hash": common.fingerprint(docs[::2])}).items()
    assert Path(backbone).name == results.config["backbone"]
    model = Path(backbone) / "0" / "model.safetensors"
    before, weights = model.stat().st_mtime_ns, model.read_bytes()
    assert train_glue.prepare(replace(base, seeds=2))[0] == backbone
    assert model.stat().st_mtime_ns == before
    assert (Path(backbone) / "1" / "model.safetensors").read_bytes() != weights
    start = []
    for seed in (0, 1):  # even untrained
        untrained = {"epochs": 0, "batch_size": 32, "lr": 1e-3}
        train_glue.pretrain({"seed": seed}, docs[::2], tmp_path / "start", "no", untrained)
        start.append((tmp_path / "start" / str(seed) / "model.safetensors").read_bytes())
    assert start[0] != start[1]
    again = train_glue.prepare(replace(base, runs=str(tmp_path / "again")))[0]
    assert (Path(again) / "0" / "model.safetensors").read_bytes() == weights
    specs = specs_of(base, train_glue.lora(base), seeds=[0, 1], task="sst2-like")
    opened, load = [], common.load_backbone
    monkeypatch.setattr(common, "load_backbone", lambda f, n: opened.append(f) or load(f, n))
    result, other = train_glue.finish(specs, base, backbone, results)
    assert opened == [f"{backbone}/0", f"{backbone}/1"]
    assert 0.5 <= result["test"] <= 1 and result["losses"] != other["losses"]
    assert result["trainable"] == 2 * 2 * 4 * (64 + 64) and len(result["losses"]) == base.epochs
    assert train_glue.prepare(replace(base, mixed_precision="bf16", seeds=0))[0] != backbone
    shutil.rmtree(model.parent)
    with pytest.raises(ValueError, match=f"found no {model.parent}; wanted a backbone: delete"):
        train_glue.prepare(base)


# ---------------------------------------------------------------- GLUE's layout


def write(folder: Path, split: str, columns: dict) -> None:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    train_glue.source.cache_clear()


def fake(task: str, n: int, mark: str) -> dict[str, list]:
    """Rows of a task: the last text ends in the word "path" as often as the label says."""
    shape, rng = train_glue.TASKS[task], random.Random(f"{task} {mark}")
    labels = [i % 2 if shape.classes == 2 else float(i % 6) for i in range(n)]
    made = {"label": labels}
    for name in shape.columns:
        texts = [rng.choices(WORDS[:-1], k=rng.randint(3, 9)) for _ in labels]
        made[name] = [f"{mark} {i} {' '.join(t)}" for i, t in enumerate(texts)]
    last = shape.columns[-1]
    made[last] = [t + " path" * int(y) for t, y in zip(made[last], labels, strict=True)]
    return made


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """Six tasks in the hub's layout, GLUE's test labels of −1 and its column idx included."""
    folder = tmp_path_factory.mktemp("glue")
    for task in train_glue.TASKS:
        for split, n in (("train", 60), ("validation", 30), ("test", 6)):
            columns = fake(task, n, split) | {"idx": list(range(n))}
            write(folder / task, split, columns | {"label": [-1] * 6} if n == 6 else columns)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A RoBERTa of width 16 with 24 positions, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = 9 * [" ".join(WORDS), "train", "validation", *map(str, range(60))]
    tokenizer = train_glue.docs_tokenizer(texts, 24)
    transformers.set_seed(0)
    sizes = dict(TINY, vocab_size=len(tokenizer), max_position_embeddings=26)
    model = transformers.RobertaModel(transformers.RobertaConfig(**sizes), add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(glue: Path, tiny: Path, tmp_path: Path, **more) -> train_glue.Config:
    asked = dict(backbone=str(tiny), data=str(glue), runs=str(tmp_path), train=24, epochs=1)
    return config(**{**asked, "batch_size": 8, "length": 16, **more})


def test_the_reported_set_is_never_used_for_anything_else(glue, tiny, tmp_path):
    base = options(glue, tiny, tmp_path)

    def load(seed: int, **new) -> dict[str, list[str]]:
        parts = train_glue.load(replace(base, **new), str(tiny), "sst2", seed)
        return {split: columns[0] for split, (columns, _) in parts.items()}

    one, again, other, whole = load(0), load(0), load(1), load(0, train=0)
    assert one == again and one["train"] != other["train"]
    assert one["validation"] == other["validation"] and one["test"] == other["test"]
    for found in (one, other):
        assert not set(found["train"]) & set(found["validation"])
        assert all(t.startswith("train ") for t in found["train"] + found["validation"])
        assert all(t.startswith("validation ") for t in found["test"])  # labels of "test" are −1
    assert [len(one[s]) for s in ("train", "validation", "test")] == [24, 6, 30]
    assert [len(whole[s]) for s in ("train", "validation", "test")] == [54, 6, 30]
    few = [load(seed, evaluate=4) for seed in (0, 1)]
    assert len(few[0]["test"]) == len(few[0]["validation"]) == 4
    assert few[0]["test"] == few[1]["test"]


@pytest.mark.parametrize(
    ("task", "split", "column", "values", "message"),
    [
        ("mrpc", "train", "sentence2", None, r"the columns \['label', 'sentence1'\]; wanted"),
        ("mrpc", "train", "label", [1] * 30, r"the labels \{1\} only; wanted two or more"),
        ("mrpc", "train", "label", [0, 1, 2] * 10, "the label 2; wanted 0 or 1"),
        ("mrpc", "train", "label", [0.0, 0.5] * 15, r"the label 0\.5; wanted 0 or 1"),
        ("stsb", "train", "label", [0.0, None] * 15, "the label None; wanted a score"),
        ("mrpc", "train", "label", ["no"] * 30, "the label 'no'; wanted 0 or 1"),
        ("mrpc", "train", "sentence1", ["a", None] * 15, "None in sentence1; wanted text"),
        ("stsb", "train", "label", [5.5] * 30, r"the label 5\.5; wanted a score from 0 to 5"),
        ("rte", "validation", "label", [-1] * 30, "the label -1; wanted 0 or 1"),
    ],
)
def test_data_that_is_not_as_it_should_be_is_named(tmp_path, task, split, column, values, message):
    for each in ("train", "validation"):  # a column that only one split has is datasets' own error
        columns = fake(task, 30, each)
        if values is None:
            del columns[column]
        elif each == split:
            columns[column] = values
        write(tmp_path / task, each, columns)
    with pytest.raises(ValueError, match=f"^{task}, {split}: found {message}"):
        train_glue.source(str(tmp_path), "", task)


def test_what_is_wrong_with_any_task_is_said_before_a_run(glue, tiny, tmp_path):
    data, linked = tmp_path / "data", tmp_path / "linked"
    shutil.copytree(glue, linked)
    data.mkdir()
    for task in train_glue.TASKS:
        (data / task).symlink_to(linked / task)
    base = options(data, tiny, tmp_path / "runs")
    before = train_glue.prepare(base)[1].folder
    stsb = linked / "stsb" / "train.parquet"
    whole = stsb.read_bytes()
    columns = fake("stsb", 60, "train") | {"idx": list(range(60))}
    for changed, message in [
        (columns | {"label": [7.0] * 60}, r"stsb, train: found the label 7\.0; wanted a score"),
        ({"label": columns["label"]}, r"data '.*stsb': .* \(CastError: Couldn't cast"),
        ({}, r"stsb has the splits \['validation', 'test'\]; wanted train and validation"),
    ]:
        write(linked / "stsb", "train", changed)
        if not changed:
            stsb.unlink()
        with pytest.raises(ValueError, match=message):
            train_glue.prepare(base)
    (data / "stsb").unlink()
    with pytest.raises(ValueError, match=r"no folder 'stsb' in .*; found \['cola', 'mrpc'"):
        train_glue.prepare(base)
    (data / "stsb").symlink_to(linked / "stsb")
    stsb.write_bytes(whole)  # as it was, but for the time
    assert train_glue.prepare(base)[1].folder != before  # edited data begin anew
    for key, inside in (("runs", data / "runs"), ("out", tiny / "a.json")):
        with pytest.raises(ValueError, match=rf"found {inside} in --(data|backbone) .*; wanted"):
            train_glue.prepare(replace(base, **{key: str(inside)}))
    assert not (data / "runs").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("ViT", "found ViTForImageClassification; wanted a model of text"),
        ("Llama", "found no pad_token_id; LlamaForSequenceClassification wants one"),
        ("T5", r"wanted Linear layers named query/value, .*; found \['dense', 'k', 'o', .* in T5"),
        ("many words", r"found \d+ tokens in its tokenizer; wanted at most \d+"),
        ("no padding", "wanted a tokenizer beside the model that has a padding"),
        ("no tokenizer", "wanted a tokenizer beside the model; found none"),
    ],
)
def test_a_backbone_must_be_of_text_and_pad(glue, tiny, tmp_path, made, message):
    folder, tokenizer = tmp_path / "model", common.load_tokenizer(str(tiny))
    if made == "many words":
        tokenizer = train_glue.docs_tokenizer([" ".join(f"word{i}" for i in range(300))] * 9, 24)
    elif made == "no padding":
        tokenizer.pad_token = None
    if made[0].isupper():
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        shape = dict(image_size=4, patch_size=2) if made == "ViT" else dict(vocab_size=2000)
        setting = getattr(transformers, f"{made}Config")(**sizes, **shape)
        getattr(transformers, f"{made}Model")(setting).save_pretrained(folder)
    else:
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    if made != "no tokenizer":
        tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        train_glue.prepare(options(glue, folder, tmp_path / "runs"))


def test_texts_are_padded_cut_and_counted_without_a_change(tmp_path, tiny):
    for split in ("train", "validation"):
        columns = fake("cola", 40, split)
        columns["sentence"][:5] = ["", " ", *[" ".join(3 * WORDS)] * 3]
        write(tmp_path / "data" / "cola", split, columns)
    base = options(tmp_path / "data", tiny, tmp_path, train=0, length=500)
    (spec,) = specs_of(base, row("Base", "head"), task="cola")
    result = train_glue.run(spec, config=base, backbone=str(tiny), folder=tmp_path)
    cut = result["truncated"]
    assert cut["train"] + cut["validation"] == 3 and cut["test"] == 3
    assert result["rows"] == {"train": 36, "validation": 4, "test": 40}
    assert result["length"] == 24  # the model's positions
    assert -1 <= result["test"] <= 1

    texts = ["the file is read", "it has no path when the other one will be read and written"]
    task = common.TextTask([texts], [0, 1], common.load_tokenizer(str(tiny)), 24)
    model = common.load_backbone(str(tiny), 2).eval()
    lengths = [len(ids) for ids in task.rows["input_ids"]]
    together = task.collate([task[0], task[1]])
    alone = [task.collate([task[i]]) for i in (0, 1)]
    assert together["input_ids"].shape[1] == max(lengths)
    assert [batch["input_ids"].shape[1] for batch in alone] == lengths
    with torch.no_grad():
        apart = torch.cat([model(**batch).logits for batch in alone])
        assert (model(**together).logits - apart).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "longest"), [("Bert", 20), ("Roberta", 18)])
def test_positions_are_those_a_text_may_fill(name, longest):
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    made = getattr(transformers, f"{name}Config")(**small, max_position_embeddings=20)
    model = getattr(transformers, f"{name}Model")(made)
    assert common.positions_of(model) == longest
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


# ---------------------------------------------------------------- the gate


def test_the_gate_holds_training_against_what_the_frozen_model_knows(
    glue, tiny, tmp_path, monkeypatch, capsys
):
    line = ["train_glue.py", "--backbone", str(tiny), "--data", str(glue), "--table", "gate"]
    line += ["--train", "24", "--epochs", "1", "--seeds", "1", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    train_glue.main()
    (out,) = tmp_path.rglob("glue_gate.json")
    data = json.loads(out.read_text())
    assert [r["row"] for r in data["rows"]] == ["Majority", "Linear", "Full", "LoRA r=8"]
    majority, linear = (r["tasks"] for r in data["rows"][:2])
    assert majority["mrpc"] == 0.5 and majority["cola"] == 0 and abs(majority["stsb"]) < 1e-12
    assert linear["stsb"] > 0.4  # a text that ends in more of one word has a higher score
    assert out.with_suffix(".md").read_text() == glue_gate.verdicts(data) + "\n"
    assert glue_gate.verdicts(data) in capsys.readouterr().out


def test_a_task_passes_only_if_every_trained_row_is_above_both_floors():
    scores = {  # Majority, Linear, Full, LoRA
        "pass": (0.5, 0.6, 0.7, 0.61),
        "below linear": (0.5, 0.6, 0.7, 0.55),
        "below majority": (0.7, 0.6, 0.65, 0.8),
        "as good": (0.5, 0.6, 0.6, 0.7),
    }
    methods = {"Majority": "floor", "Linear": "floor", "Full": "full", "LoRA r=8": "lora"}
    runs = []
    for task, found in scores.items():
        for (name, method), test in zip(methods.items(), found, strict=True):
            about = {"row": name, "method": method, "task": task, "seed": 0, "trainable": 0}
            runs.append({**about, "test": test})
    data = {"rows": plots.summary(runs), "runs": runs}
    assert glue_gate.passed(data) == ["pass"]
    assert glue_gate.verdicts(data).endswith("1 tasks pass; wanted 5: the gate is shut.")


def test_the_linear_floor_predicts_what_is_linear_in_the_features(tiny):
    trunk = common.load_backbone(str(tiny), 1).base_model
    tokenizer = common.load_tokenizer(str(tiny))
    rng = random.Random(0)
    one, two = (
        [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(200)] for _ in range(2)
    )
    u, v = (train_glue.embed(texts, trunk, tokenizer, 24) for texts in (one, two))
    alone = torch.cat([train_glue.embed([text], trunk, tokenizer, 24) for text in one[:3]])
    assert (alone - u[:3]).abs().max() < 1e-6  # padding is no token
    pair = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
    assert train_glue.features(pair).tolist() == [[2.0, 3.0, 3.0, -2.0]]
    assert train_glue.features(pair[:1]).tolist() == [[1.0, 2.0]]
    scores = (torch.cat([(u - v).abs(), u * v], 1) @ torch.linspace(-1, 1, 32)).tolist()
    parts = {"train": slice(0, 100), "validation": slice(100, 150), "test": slice(150, 200)}
    rows = {split: ([one[i], two[i]], scores[i]) for split, i in parts.items()}
    found, _ = train_glue.floor("Linear", trunk, tokenizer, 24, rows, "pearson")
    assert found["test"] > 0.98 and found["validation"] > 0.98


@pytest.mark.parametrize("task", ["stsb", "mrpc", "cola"])
def test_texts_apart_start_at_the_linear_floor(glue, tiny, tmp_path, task):
    base = options(glue, tiny, tmp_path, train=0, apart=True, table="gate")
    shape, rows = train_glue.TASKS[task], train_glue.load(base, str(tiny), task, 0)
    tokenizer = common.load_tokenizer(str(tiny))
    trunk = common.load_backbone(str(tiny), 1).base_model
    scores, linear = train_glue.floor("Linear", trunk, tokenizer, 16, rows, shape.metric)
    model = train_glue.Apart(trunk, len(shape.columns), shape.classes)
    model.start_at(linear)
    data = train_glue.ApartTask(*rows["test"], tokenizer, 16)
    found = common.evaluate(model, data, common.accelerator(), shape.metric, batch_size=7)
    assert abs(found - scores["test"]) < 1e-4
    (spec,) = specs_of(base, train_glue.lora(base), task=task)
    result = train_glue.run(spec, config=base, backbone=str(tiny), folder=tmp_path)
    assert result["trainable"] == 4 * 8 * 2 * 16


def test_the_head_of_a_score_starts_at_the_mean_of_its_labels(tiny):
    model = common.load_backbone(str(tiny), 1)
    train_glue.start_at_mean(model, [1.0, 2.0, 4.5])
    assert model.classifier.out_proj.bias.tolist() == [2.5]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared(glue, tiny, tmp_path_factory):
    """The LoRA adapters of all tasks with seed 0, after one epoch."""
    base = options(glue, tiny, tmp_path_factory.mktemp("runs"))
    backbone, results, _ = train_glue.prepare(base)
    train_glue.finish(specs_of(base, train_glue.lora(base)), base, backbone, results)
    return base, backbone, results


def test_rows_train_what_they_say(shared):
    base, backbone, results = shared
    base = replace(base, components=6)
    linears, width = 4, 16  # two layers, query and value
    lora = linears * 8 * 2 * width
    sizes = {
        "Base": 0,
        "LoRA r=8": lora,
        "VeRA": linears * (256 + width),
        "EigenLoRAx-init": linears * (2 * 6 * 8 + 6 * 2 * width),
        "Random subspace": linears * 2 * 6 * 8,
        "HRA r=4, λ=0": linears * 4 * width,
        "HRA r=8, λ=1e-1": linears * 8 * width,
        "OFT": linears * 16 * 15 // 2,
        "noise 30 %": linears * 2 * 6 * 8,
        "LoRA, stage 1": lora,
        "LoRA, stage 2": lora,
        "ReSoRA, stage 2": lora,
    }
    rows = [rows_by_name(base)[name] for name in sizes]
    runs = train_glue.finish(specs_of(base, *rows, task="rte"), base, backbone, results)
    assert {run["row"]: run["trainable"] for run in runs} == sizes
    (score,) = train_glue.finish(specs_of(base, rows[1], task="stsb"), base, backbone, results)
    assert -1 <= score["test"] <= 1 and score["losses"][0] > 1  # squared error of 0..5


@pytest.mark.parametrize(("name", "added"), [("AUG", "pseudo"), (" + random", "random")])
def test_low_resource_rows_have_two_adapters_and_the_rest_at_random(
    shared, monkeypatch, name, added
):
    base, backbone, results = shared
    seen, build = [], common.build
    monkeypatch.setattr(common, "build", lambda *a, **o: seen.append(build(*a, **o)) or seen[-1])
    name = f"EigenLoRAx{'-' * (name == 'AUG')}{name}"
    low = {**rows_by_name(base)[name], "components": 3, added: 2}
    (spec,) = specs_of(base, low, task="mrpc")
    train_glue.run(spec, config=base, backbone=backbone, folder=results.folder)
    modules = common.layers_of(seen[-1][0], eigenlorax.EigenLoRAxLinear)
    assert len(modules) == 4
    for module in modules.values():
        error = (module.V_A @ module.V_A.T - torch.eye(5)).abs()
        assert error.diagonal().max() < 1e-5 and error[:3, :3].max() < 1e-5
        assert (error.max() < 1e-5) == (added == "pseudo")


def test_the_papers_rates_and_epochs_reach_their_task(glue, tiny, tmp_path, monkeypatch):
    asked, train = [], common.train
    monkeypatch.setattr(common, "train", lambda *a, **o: asked.append(o) or train(*a, **o))
    base = options(glue, tiny, tmp_path, train=0, epochs=0, batch_size=None, table="hra")
    wanted = {"LoRA r=8": (4e-4, 25), "HRA r=8, λ=0": (1e-2, 12), "HRA r=8, λ=1e-3": (2e-3, 6)}
    for name, (rate, epochs) in wanted.items():
        (spec,) = specs_of(base, rows_by_name(base)[name], task="qnli")
        train_glue.run(spec, config=base, backbone=str(tiny), folder=tmp_path)
        assert (asked[-1]["lr"], asked[-1]["epochs"]) == (rate, epochs), name


def test_a_run_that_diverges_is_an_error_but_for_tuning(shared):
    base, backbone, results = shared
    specs = [{**s, "lr": 1e30} for s in specs_of(base, row("Full", "full"), task="mrpc")]
    line = r"^Full, mrpc, seed 0: found loss (nan|inf) in epoch 1 .*; lower its rate with --lr$"
    with pytest.raises(common.Diverged, match=line):
        train_glue.finish(specs, base, backbone, results)
    (run,) = train_glue.finish(specs, replace(base, tune=True), backbone, results)
    assert run["validation"] == 0.0


def test_tuning_chooses_by_validation_and_a_table_prints_what_it_writes(
    glue, tiny, tmp_path, monkeypatch, capsys
):
    def main(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", [*line, *more])
        train_glue.main()
        (out,) = tmp_path.rglob("glue_tune.json" if "--tune" in more else "glue_noise.json")
        return json.loads(out.read_text())

    line = ["train_glue.py", "--backbone", str(tiny), "--data", str(glue), "--train", "8"]
    line += ["--epochs", "1", "--runs", str(tmp_path), "--seeds", "1", "--components", "4"]
    line += ["--table", "noise"]
    kept = {"LoRA r=8": 1e-3, "EigenLoRAx": 1e-3}
    monkeypatch.setitem(train_glue.LEARNING_RATES, "few", kept)
    monkeypatch.setattr(train_glue, "GRID", {"few": (1e-3, 1e-2)})
    monkeypatch.setattr(train_glue, "TABLES", {"noise": train_glue.noise_rows})
    tuned = main("--tune")
    assert list(tuned["validation"]) == list(kept)
    for name, scores in tuned["validation"].items():
        assert scores[str(tuned["chosen"][name])] == max(scores.values()), name
    capsys.readouterr()
    data = main("--evaluate", "6")
    assert len(data["runs"]) == 5 * 6 and next(tmp_path.rglob("glue_noise.png")).exists()
    printed = capsys.readouterr().out
    assert plots.as_table(data["rows"]) in printed and "Texts cut to 24 tokens: " in printed
    assert data["config"]["backbone"] == tiny.name and "runs" not in data["config"]


def test_a_second_stage_without_its_first_says_what_to_do(shared):
    base, backbone, results = shared
    first, second = specs_of(base, *train_glue.resora_rows(base)[:2], seeds=[7], task="mrpc")
    train_glue.finish([first], base, backbone, results)
    file = common.adapter_folder(results.folder, first) / "state.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-9]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=rf"{file.name} is missing or damaged .*; delete"):
            train_glue.finish([second], base, backbone, results)


# ---------------------------------------------------------------- what is committed


def test_the_committed_rates_are_those_that_validation_chose():
    tuned = json.loads((ROOT / "figures" / "glue_tune.json").read_text())
    rates = train_glue.LEARNING_RATES["docs"]
    for name, scores in tuned["validation"].items():
        assert [float(lr) for lr in scores] == list(train_glue.GRID["docs"]), name
        assert float(max(scores, key=scores.get)) == rates[name], name
    assert set(tuned["validation"]) == set(rates)


@pytest.mark.slow
def test_the_quick_demo_runs_as_a_user_runs_it(tmp_path):
    launch = [sys.executable, str(ROOT / "train_glue.py"), "--quick", "--runs", str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = tmp_path.rglob("glue_eigenlorax.json")
    result = json.loads(out.read_text())
    rows = {r["row"]: r for r in result["rows"]}
    assert len(result["runs"]) == 5 * 6 and next(iter(rows)) == "Full"
    full, base = (rows[name]["mean"] for name in ("Full", "Base"))  # --seeds 4: 0.49 and 0.36
    assert full > base + 0.04 and full > 0.42  # chance: 1/3, four halves and two zeros
    assert plots.as_table(result["rows"]) in done.stdout
    assert out.with_suffix(".png").exists()
    assert result["corpus"]["docstrings"] > 3000


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="REFERENCE_DATA is not set: no real backbone or texts here")
def test_a_real_backbone_and_real_texts(tmp_path):
    data = dict(backbone=f"{REAL}/models/minilm-l6", data=f"{REAL}/glue", runs=str(tmp_path))
    base = config(**data, train=200, evaluate=200, epochs=3, batch_size=8, seeds=1)
    backbone, results, _ = train_glue.prepare(base)
    specs = specs_of(base, train_glue.lora(base), task="sst2")
    (lora,) = train_glue.finish(specs, base, backbone, results)
    assert lora["trainable"] == 6 * 2 * 8 * 2 * 384 and lora["test"] > 0.65  # chance is a half
    assert lora["truncated"] == {"train": 0, "validation": 0, "test": 0}
