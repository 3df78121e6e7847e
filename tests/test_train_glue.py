"""train_glue.py: presets, the docstrings' tasks, GLUE's data, and what a run leaves."""

import json
import os
import random
import re
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
from figures import glue_docs, glue_gate, glue_hra, plots
from tests.test_common import TINY, command

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("REFERENCE_DATA")
STDLIB = Path(sysconfig.get_path("stdlib"))
WORDS = "a file is read and the other one will be written to its name when it has no path".split()


def config(**options) -> train_glue.Config:
    return train_glue.complete(train_glue.Config(jobs=1, **options))


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "found --train -1; wanted 0 or more"),
        (["--length", "2"], "found --length 2; wanted 8 or more"),
        (["--evaluate", "1"], "found --evaluate 1; wanted 2 or more: one row has no correlation"),
        (["--components", "8"], "found --components 8; wanted more than 8, the directions of two"),
        (["--backbone", "no/model", "--data", "no/data"], "backbone 'no/model': wanted a folder"),
    ],
)
def test_bad_input_is_one_line_that_names_it(monkeypatch, tmp_path, arguments, message):
    line = command(monkeypatch, train_glue, *arguments, "--runs", str(tmp_path))
    assert line.startswith(f"train_glue.py: error: {message}"), line
    assert not list(tmp_path.rglob("glue_*.json"))


def test_presets_are_the_papers_unless_the_user_says_otherwise():
    full = config(backbone="x", data="y")
    assert (full.batch_size, full.weight_decay, full.components, full.rank) == (64, 0.1, 32, 8)
    rates = train_glue.LEARNING_RATES["paper"]
    assert (rates["LoRA r=8"]["sst2"], rates["EigenLoRAx"]["sst2"]) == (5e-4, 5e-3)
    assert train_glue.EPOCHS["cola"] == 80 and rates["HRA r=8, λ=0"]["qnli"] == 1e-2
    assert config(backbone="x", data="y", table="hra").batch_size == 32
    assert config(backbone="x", data="y", table="hra", batch_size=8).batch_size == 8
    few = config(backbone="x", data="y", train=400)
    assert (few.epochs, few.batch_size, few.weight_decay) == (5, 16, 0.01)
    quick = config(backbone="x", data="y", quick=True)
    assert train_glue.preset(quick) == "few" and (quick.train, quick.seeds) == (400, 1)
    assert (quick.epochs, quick.batch_size, quick.length) == (5, few.batch_size, few.length)
    names = [r["row"] for r in train_glue.eigenlorax_rows(quick)]
    assert names == ["Full", "Base", "LoRA r=8", "EigenLoRAx", "Random subspace"]
    assert config(quick=True, seeds=3).seeds == 3
    hra = config(backbone="x", data="y", table="hra")
    assert all(r["every"] for r in train_glue.hra_rows(hra))  # Linear layer, as in Table 2
    for base in (full, few, config(table="hra"), config(table="all")):
        assert not any("every" in r for r in train_glue.hra_rows(base))
    for name, base in (("docs", config()), ("few", few), ("paper", full)):
        for table in train_glue.TABLES.values():
            named = {r.get("rate", r["row"]) for r in table(base)}
            assert named <= set(train_glue.LEARNING_RATES[name]), name


def specs_of(base: train_glue.Config, *rows: dict, seeds=(0,), task: str = "") -> list[dict]:
    """The runs of some rows, of one task or of all."""
    preset = train_glue.LEARNING_RATES[train_glue.preset(base)]
    _, rates = common.rows_and_rates(base, rows, {}, preset)
    specs = common.specify(rows, rates, train_glue.task_names(base), seeds)
    return [spec for spec in specs if task in ("", spec["task"])]


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
    (tmp_path / "test").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text(text + "raise SystemExit('imported')\n")
    (tmp_path / "test" / "b.py").write_text(text)
    (tmp_path / "broken.py").write_text(text + "def f(:\n")
    inner = "class Some:\n  def both(self):\n    '''The first of them. It has a second one.'''\n"
    (tmp_path / "z.py").write_text(inner)
    assert train_glue.docstrings(tmp_path) == [
        ("package.a", "a", False, ["Close the file and forget about its name."]),
        ("z", "both", True, ["It has a second one."]),  # "The first of them." has four words
    ]


def test_splits_share_no_module_and_no_sentence(docs):
    modules = {doc.module for doc in docs}
    parts = Counter(map(train_glue.split_of, modules))
    assert set(parts) == {"train", "validation", "test"}
    assert parts["train"] > parts["test"] > parts["validation"]
    assert train_glue.split_of("asyncio.events") == "train"  # on any machine
    suite, seen = train_glue.suite(docs), {}
    for split in train_glue.ROWS:
        texts = suite["sst2"][split]["sentence"] + suite["rte"][split]["sentence1"]
        seen[split] = set(texts)
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    where = {s: train_glue.split_of(d.module) for d in reversed(docs) for s in d.sentences}
    once = Counter(s for doc in docs for s in doc.sentences)
    for split, texts in seen.items():
        assert all(where[s] == split for s in texts if once[s] == 1)


def test_the_suite_is_the_same_every_time_and_balanced(docs):
    suite = train_glue.suite(docs)
    assert suite == train_glue.suite(docs) and list(suite) == list(train_glue.TASKS)
    for task, shape in train_glue.TASKS.items():
        for rows in suite[task].values():
            assert set(rows) == {*shape.columns, "label"}
            counts = Counter(rows["label"])
            assert max(counts.values()) - min(counts.values()) <= 1, task
            assert len(counts) == (6 if shape.classes == 1 else 2)


def test_too_little_source_is_an_error():
    doc = train_glue.Doc("a", "b", True, ["This is the only sentence that there is."])
    with pytest.raises(ValueError, match="found no rows for mrpc, train in 1 docstrings; wanted"):
        train_glue.suite([doc])


def rows_of(task: str, docs: list[train_glue.Doc]) -> list[tuple]:
    return list(train_glue.examples(task, docs, random.Random(0)))


def test_each_task_is_what_the_docstring_says(docs):
    short = [[s for s in doc.sentences if len(s.split()) <= 20] for doc in docs]
    docs = [doc._replace(sentences=s) for doc, s in zip(docs, short, strict=True) if s]
    whole = {" ".join(s.rstrip(".:").split()) for doc in docs for s in doc.sentences}
    moved = {tuple(sorted(s.split())) for s in whole}
    cola = rows_of("cola", docs)
    for (text,), label in cola:
        assert text in whole if label else tuple(sorted(text.split())) in moved
    mixed = [text not in whole for (text,), label in cola if not label]
    assert sum(mixed) > 0.98 * len(mixed)  # a few are moved to where they were

    for (text,), label in rows_of("sst2", docs):
        assert any(doc.sentences[0] == text and doc.function == (label == 0) for doc in docs)
    for pair, label in rows_of("mrpc", docs):
        first, later = pair if label else pair[::-1]
        assert any(d.sentences[0] == first and later in d.sentences[1:] for d in docs)
    for (name, text), label in rows_of("qnli", docs):
        mine = [d.sentences for d in docs if train_glue.words_of(d.name) == name]
        assert any(text in s[1:] if label else text == s[0] for s in mine)

    for (one, two), label in rows_of("rte", docs):
        assert (label == 0) == (one == two)
        assert abs(len(one) - len(two)) == (len(" not") if label else 0)
        assert sorted(one.replace(" not", "")) == sorted(two.replace(" not", ""))
    for (one, two), label in rows_of("stsb", docs):
        words = iter(one.split())
        assert all(word in words for word in two.split())  # in their order
        assert abs(len(two.split()) / len(one.split()) - label / 5) < 0.11


@pytest.mark.parametrize(
    ("name", "words"),
    [("read_until", "read until"), ("HTTPServer", "http server"), ("__init__", "init"), ("_", "")],
)
def test_names_are_split_into_words(name, words):
    assert train_glue.words_of(name) == words


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

    assert score("rte", "sentence2") > 0.8 and score("rte", "sentence1") < 0.62
    assert score("rte", "sentence2") > full["rte-like"] - 0.05
    for task, text in (("mrpc", "sentence1"), ("sst2", "sentence"), ("qnli", "sentence")):
        assert score(task, text) > full[f"{task}-like"] - 0.05, task
    assert score("qnli", "question") < 0.62


def test_a_tokenizer_of_the_same_texts_is_the_same(docs):
    texts = [s for doc in docs for s in doc.sentences]
    made = [train_glue.docs_tokenizer(texts, 64).backend_tokenizer.to_str() for _ in range(3)]
    assert made[0] == made[1] == made[2]
    tokenizer = train_glue.docs_tokenizer(texts, 64)
    for text in ("return the name of a file.", "naïve (as it is) — and 3.5 % more"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert tokenizer.unk_token_id not in ids
    pair = tokenizer("one", "two")["input_ids"]
    assert (pair[0], pair[-1], pair.count(tokenizer.sep_token_id)) == (0, 2, 3)


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
    assert about["corpus"]["python"] == sys.version.split()[0]
    assert about["corpus"]["docstrings"] == len(docs[::2])
    assert about["corpus"]["hash"] == common.fingerprint(docs[::2])
    assert Path(backbone).name == results.config["backbone"]
    model = Path(backbone) / "0" / "model.safetensors"
    before, weights = model.stat().st_mtime_ns, model.read_bytes()
    assert train_glue.prepare(replace(base, seeds=2))[0] == backbone
    assert model.stat().st_mtime_ns == before
    assert (Path(backbone) / "1" / "model.safetensors").read_bytes() != weights
    untrained = {"epochs": 0, "batch_size": 32, "lr": 1e-3}
    for seed in (0, 1):
        train_glue.pretrain({"seed": seed}, docs[::2], tmp_path / "start", "no", untrained)
    start = [(tmp_path / "start" / s / "model.safetensors").read_bytes() for s in "01"]
    assert start[0] != start[1]
    again = train_glue.prepare(replace(base, runs=str(tmp_path / "again")))[0]
    assert (Path(again) / "0" / "model.safetensors").read_bytes() == weights
    specs = specs_of(base, train_glue.lora(base), seeds=[0, 1], task="sst2-like")
    opened, load = [], common.load_backbone
    monkeypatch.setattr(common, "load_backbone", lambda f, n: opened.append(f) or load(f, n))
    result, other = train_glue.finish(specs, base, backbone, results)
    assert opened == [f"{backbone}/0", f"{backbone}/1"]
    assert 0.5 <= result["test"] <= 1 and result["losses"] != other["losses"]
    assert train_glue.prepare(replace(base, mixed_precision="bf16", seeds=0))[0] != backbone
    assert result["trainable"] == 2 * 2 * 4 * (64 + 64) and len(result["losses"]) == base.epochs
    shutil.rmtree(model.parent)
    with pytest.raises(ValueError, match=f"found no {model.parent}; wanted a backbone: delete"):
        train_glue.prepare(base)


# ---------------------------------------------------------------- GLUE's layout


def write(folder: Path, task: str, split: str, columns: dict) -> None:
    import datasets

    (folder / task).mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / task / f"{split}.parquet")


def fake(task: str, n: int, mark: str, rng: random.Random) -> dict[str, list]:
    """Rows of a task: the label is whether the last text names a path; marked by their split."""
    shape, made = train_glue.TASKS[task], {}
    labels = [i % 2 if shape.classes == 2 else float(i % 6) for i in range(n)]
    for name in shape.columns:
        texts = [rng.choices(WORDS[:-1], k=rng.randint(3, 9)) for _ in labels]
        made[name] = [f"{mark} {i} {' '.join(t)}" for i, t in enumerate(texts)]
    last = shape.columns[-1]
    made[last] = [t + " path" * int(y) for t, y in zip(made[last], labels, strict=True)]
    return {**made, "label": labels, "idx": list(range(n))}


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """Six tasks in the hub's layout, GLUE's test labels of −1 included."""
    folder, rng = tmp_path_factory.mktemp("glue"), random.Random(0)
    for task in train_glue.TASKS:
        for split, n in (("train", 60), ("validation", 30), ("test", 6)):
            columns = fake(task, n, split, rng)
            if split == "test":
                columns["label"] = [-1] * n
            write(folder, task, split, columns)
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
    base = options(glue, tiny, tmp_path, length=24)

    def load(seed: int, **new) -> dict[str, list[str]]:
        parts = train_glue.load(replace(base, **new), str(tiny), "sst2", seed)
        return {split: columns[0] for split, (columns, _) in parts.items()}

    one, again, other, whole = load(0), load(0), load(1), load(0, train=0)
    assert one == again and one["train"] != other["train"]
    assert one["validation"] == other["validation"] and one["test"] == other["test"]
    for found in (one, other):
        assert not set(found["train"]) & set(found["validation"])
        assert all(t.startswith("train ") for t in found["train"] + found["validation"])
        assert all(t.startswith("validation ") for t in found["test"])
    assert [len(one[s]) for s in ("train", "validation", "test")] == [24, 6, 30]
    assert [len(whole[s]) for s in ("train", "validation", "test")] == [54, 6, 30]
    few = [load(seed, evaluate=4) for seed in (0, 1)]
    assert len(few[0]["test"]) == len(few[0]["validation"]) == 4
    assert few[0]["test"] == few[1]["test"]


SPOILED = [  # task, split, column, its new values (one: of the fourth row), message
    (
        "mrpc",
        "",
        "sentence2",
        None,
        r"mrpc, train: found the columns \['sentence1', 'label'\]; wanted",
    ),
    (
        "mrpc",
        "",
        "label",
        [1] * 30,
        r"mrpc, train: found the labels \{1\} only; wanted two or more",
    ),
    ("mrpc", "", "label", 2, "found the label 2; wanted 0 or 1"),
    ("mrpc", "", "label", [0.0, 0.5] * 15, r"found the label 0\.5; wanted 0 or 1"),
    ("mrpc", "", "label", None, "found the label None; wanted 0 or 1"),
    ("mrpc", "", "label", ["no"] * 30, "found the label 'no'; wanted 0 or 1"),
    ("mrpc", "", "sentence1", "none", "found None in sentence1; wanted text"),
    ("stsb", "", "label", 5.5, r"found the label 5\.5; wanted a score from 0 to 5"),
    ("rte", "validation", "label", [-1] * 30, "rte, validation: found the label -1; wanted 0 or 1"),
]


@pytest.mark.parametrize(("task", "only", "column", "values", "message"), SPOILED)
def test_data_that_is_not_as_it_should_be_is_named(
    tmp_path, tiny, task, only, column, values, message
):
    for split in ("train", "validation"):
        columns = fake(task, 30, split, random.Random(0))
        del columns["idx"]
        if only in ("", split):
            if values is None and column != "label":
                del columns[column]
            elif isinstance(values, list):
                columns[column] = values
            else:
                columns[column][3] = None if values == "none" else values
        write(tmp_path / "data", task, split, columns)
    base = options(tmp_path / "data", tiny, tmp_path, train=0)
    with pytest.raises(ValueError, match=message):
        for seed in range(3):  # a tenth is the validation split
            train_glue.load(base, str(tiny), task, seed)


def test_hidden_test_labels_are_never_scored_and_a_missing_split_is_named(glue, tiny, tmp_path):
    base = options(glue, tiny, tmp_path)
    assert set(train_glue.source(str(glue), str(tiny), "rte")["test"]["label"]) == {-1}
    assert len(train_glue.load(base, str(tiny), "rte", 0)["test"][1]) == 30
    write(tmp_path / "data", "stsb", "train", fake("stsb", 30, "train", random.Random(0)))
    base = options(tmp_path / "data", tiny, tmp_path)
    with pytest.raises(ValueError, match=r"stsb has the splits \['train'\]; wanted validation"):
        train_glue.load(base, str(tiny), "stsb", 0)


def test_what_is_wrong_with_any_task_is_said_before_a_run(glue, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(glue, data)
    base = options(data, tiny, tmp_path / "runs")
    before = train_glue.prepare(base)[1].folder
    columns = fake("stsb", 60, "train", random.Random(0))
    columns["label"][59] = 7.0
    write(data, "stsb", "train", columns)
    train_glue.source.cache_clear()
    with pytest.raises(ValueError, match=r"stsb, train: found the label 7\.0; wanted a score"):
        train_glue.prepare(base)
    shutil.rmtree(data / "stsb")
    train_glue.source.cache_clear()
    with pytest.raises(ValueError, match=r"no folder 'stsb' in .*; found \['cola', 'mrpc'"):
        train_glue.prepare(base)
    shutil.copytree(glue / "stsb", data / "stsb")  # as it was, but for the time
    (data / "stsb" / "train.parquet").touch()
    train_glue.source.cache_clear()
    assert train_glue.prepare(base)[1].folder != before  # edited data begin anew


def test_results_do_not_go_into_what_they_depend_on(glue, tiny, tmp_path):
    for inside in ({"runs": str(glue / "runs")}, {"out": str(tiny / "a.json")}):
        base = replace(options(glue, tiny, tmp_path), **inside)
        place = re.escape(next(iter(inside.values())))
        with pytest.raises(ValueError, match=rf"found {place} in --(data|backbone) .*; wanted"):
            train_glue.prepare(base)
    assert not (glue / "runs").exists()


def test_an_edited_file_of_a_linked_folder_counts(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rte").symlink_to(tmp_path / "real")
    before = common.state_of(str(tmp_path / "data"))
    (tmp_path / "real" / "train.parquet").write_text("edited")
    assert common.state_of(str(tmp_path / "data")) != before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("ViT", "found ViTForImageClassification; wanted a model of text"),
        ("Llama", "found no pad_token_id; LlamaForSequenceClassification wants one"),
        ("T5", r"wanted Linear layers named query/value, .*; found \['dense', 'k', 'o', .* in T5"),
    ],
)
def test_a_backbone_must_be_of_text_and_pad(glue, tiny, tmp_path, made, message):
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    shape = dict(image_size=4, patch_size=2) if made == "ViT" else dict(vocab_size=2000)
    config = getattr(transformers, f"{made}Config")(**sizes, **shape)
    getattr(transformers, f"{made}Model")(config).save_pretrained(tmp_path / "model")
    common.load_tokenizer(str(tiny)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        train_glue.prepare(options(glue, tmp_path / "model", tmp_path / "runs"))


def test_a_column_missing_in_one_split_only_is_an_error_with_its_cause(glue, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(glue, data)
    columns = fake("rte", 60, "train", random.Random(0))
    write(data, "rte", "train", {k: v for k, v in columns.items() if k != "sentence2"})
    train_glue.source.cache_clear()
    with pytest.raises(ValueError, match=r"data '.*rte': .* \(CastError: Couldn't cast"):
        train_glue.prepare(options(data, tiny, tmp_path))


def test_a_tokenizer_must_be_the_models(glue, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    words = [f"word{i}" for i in range(300)]
    train_glue.docs_tokenizer([" ".join(words)] * 9, 24).save_pretrained(folder)
    base = options(glue, folder, tmp_path)
    with pytest.raises(ValueError, match=r"found \d+ tokens in its tokenizer; wanted at most \d+"):
        train_glue.prepare(base)
    tokenizer = common.load_tokenizer(str(tiny))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="wanted a tokenizer beside the model that has a padding"):
        train_glue.prepare(base)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="wanted a tokenizer beside the model; found none"):
        train_glue.prepare(base)


def test_empty_texts_are_read_and_long_ones_cut_and_counted(tmp_path, tiny):
    for split in ("train", "validation"):
        columns = fake("cola", 40, split, random.Random(0))
        columns["sentence"][:2] = ["", " "]
        columns["sentence"][2:5] = [" ".join(3 * WORDS)] * 3
        write(tmp_path / "data", "cola", split, columns)
    base = options(tmp_path / "data", tiny, tmp_path, train=0, length=500)
    (spec,) = specs_of(base, common.row("Base", "head"), task="cola")
    result = train_glue.run(spec, config=base, backbone=str(tiny), folder=tmp_path)
    cut = result["truncated"]
    assert cut["train"] + cut["validation"] == 3 and cut["test"] == 3
    assert result["rows"] == {"train": 36, "validation": 4, "test": 40}
    assert -1 <= result["test"] <= 1


def test_padding_does_not_change_what_a_text_gives(tiny):
    tokenizer = common.load_tokenizer(str(tiny))
    texts = ["the file is read", "it has no path when the other one will be read and written"]
    task = common.TextTask([texts], [0, 1], tokenizer, 24)
    model = common.load_backbone(str(tiny), 2).eval()
    together = task.collate([task[0], task[1]])
    assert together["input_ids"].shape[1] == max(map(len, task.rows["input_ids"]))
    assert task.collate([task[0]])["input_ids"].shape[1] == len(task.rows["input_ids"][0])
    with torch.no_grad():
        both = model(**together).logits
        alone = torch.cat([model(**task.collate([task[i]])).logits for i in (0, 1)])
    assert (both - alone).abs().max() < 1e-6


def test_positions_are_those_a_text_may_fill():
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    longest = {}
    for name in ("Bert", "Roberta"):
        made = getattr(transformers, f"{name}Config")(**small, max_position_embeddings=20)
        model = getattr(transformers, f"{name}Model")(made)
        longest[name] = common.positions_of(model)
        model(torch.full((1, longest[name]), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest[name] + 1), 5))
    assert longest == {"Bert": 20, "Roberta": 18}


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared(glue, tiny, tmp_path_factory):
    """The LoRA adapters of all tasks with seed 0, after one epoch."""
    base = options(glue, tiny, tmp_path_factory.mktemp("runs"))
    backbone, results, _ = train_glue.prepare(base)
    train_glue.finish(specs_of(base, train_glue.lora(base)), base, backbone, results)
    return base, backbone, results


def one(shared, name: str, task: str = "rte", **new) -> dict:
    base, backbone, results = shared
    base = replace(base, **new)
    rows = {r["row"]: r for table in train_glue.TABLES.values() for r in table(base)}
    specs = specs_of(base, rows[name], task=task)
    return train_glue.finish(specs, base, backbone, results)[0]


def test_rows_train_what_they_say(shared):
    linears, width = 4, 16  # two layers, query and value
    sizes = {
        "Base": 0,
        "LoRA r=8": linears * 8 * 2 * width,
        "VeRA": linears * (256 + width),
        "EigenLoRAx-init": linears * (2 * 6 * 8 + 6 * 2 * width),
        "Random subspace": linears * 2 * 6 * 8,
        "HRA r=4, λ=0": linears * 4 * width,
        "HRA r=8, λ=1e-1": linears * 8 * width,
        "OFT": linears * 16 * 15 // 2,
        "noise 30 %": linears * 2 * 6 * 8,
        "LoRA, stage 1": linears * 8 * 2 * width,
        "LoRA, stage 2": linears * 8 * 2 * width,
        "ReSoRA, stage 2": linears * 8 * 2 * width,
    }
    for name, size in sizes.items():
        assert one(shared, name, components=6)["trainable"] == size, name
    score = one(shared, "LoRA r=8", task="stsb")
    assert -1 <= score["test"] <= 1 and score["losses"][0] > 1  # squared error of 0..5


def test_low_resource_rows_have_two_adapters_and_the_rest_at_random(shared, monkeypatch):
    base, backbone, results = shared
    seen = []
    build = common.build
    monkeypatch.setattr(common, "build", lambda *a, **o: seen.append(build(*a, **o)) or seen[-1])
    rows = {r["row"]: r for r in train_glue.eigenlorax_rows(replace(base, components=20))}
    for name in ("EigenLoRAx-AUG", "EigenLoRAx + random"):
        row = {**rows[name], "components": 3}
        row[{"EigenLoRAx-AUG": "pseudo"}.get(name, "random")] = 2
        (spec,) = specs_of(base, row, task="mrpc")
        train_glue.run(spec, config=base, backbone=backbone, folder=results.folder)
        modules = common.layers_of(seen[-1][0], eigenlorax.EigenLoRAxLinear)
        assert len(modules) == 4
        for module in modules.values():
            gram = module.V_A @ module.V_A.T
            assert module.V_A.shape == (5, 16)
            assert (gram.diagonal() - 1).abs().max() < 1e-5
            skew = (gram - torch.eye(5)).abs().max()
            assert (skew < 1e-5) == (name == "EigenLoRAx-AUG"), skew
            assert (gram[:3, :3] - torch.eye(3)).abs().max() < 1e-5


def test_the_papers_rates_and_epochs_reach_their_task(glue, tiny, tmp_path, monkeypatch):
    asked = []
    train = common.train
    monkeypatch.setattr(common, "train", lambda *a, **o: asked.append(o) or train(*a, **o))
    base = options(glue, tiny, tmp_path, train=0, epochs=0, batch_size=None, table="hra")
    assert base.batch_size == 32
    rows = {r["row"]: r for r in train_glue.all_rows(base)}
    wanted = {"LoRA r=8": (4e-4, 25), "HRA r=8, λ=0": (1e-2, 12), "HRA r=8, λ=1e-3": (2e-3, 6)}
    for name, (rate, epochs) in wanted.items():
        (spec,) = specs_of(base, rows[name], task="qnli")
        train_glue.run(spec, config=base, backbone=str(tiny), folder=tmp_path)
        assert (asked[-1]["lr"], asked[-1]["epochs"]) == (rate, epochs), name


def test_a_run_that_diverges_is_an_error_but_for_tuning(shared):
    base, backbone, results = shared
    specs = [{**s, "lr": 1e30} for s in specs_of(base, common.row("Full", "full"), task="mrpc")]
    line = r"^Full, mrpc, seed 0: found loss (nan|inf) in epoch 1 .*; lower its rate with --lr$"
    with pytest.raises(common.Diverged, match=line):
        train_glue.finish(specs, base, backbone, results)
    (run,) = train_glue.finish(specs, replace(base, tune=True), backbone, results)
    assert run["validation"] == 0.0


def test_tuning_chooses_by_validation_and_a_table_prints_what_it_writes(
    glue, tiny, tmp_path, monkeypatch, capsys
):
    line = ["train_glue.py", "--backbone", str(tiny), "--data", str(glue), "--train", "8"]
    line += ["--epochs", "1", "--runs", str(tmp_path), "--seeds", "1", "--components", "4"]
    kept = {"LoRA r=8": 1e-3, "EigenLoRAx": 1e-3}
    monkeypatch.setitem(train_glue.LEARNING_RATES, "few", kept)
    monkeypatch.setattr(train_glue, "GRID", {"few": (1e-3, 1e-2)})
    monkeypatch.setattr(train_glue, "TABLES", {"noise": train_glue.noise_rows})
    monkeypatch.setattr(sys, "argv", [*line, "--table", "noise", "--tune"])
    train_glue.main()
    (out,) = tmp_path.rglob("glue_tune.json")
    tuned = json.loads(out.read_text())
    assert list(tuned["validation"]) == list(kept)
    for name, scores in tuned["validation"].items():
        assert scores[str(tuned["chosen"][name])] == max(scores.values()), name
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*line, "--table", "noise", "--evaluate", "6"])
    train_glue.main()
    (out,) = tmp_path.rglob("glue_noise.json")
    data = json.loads(out.read_text())
    assert len(data["runs"]) == 5 * 6 and out.with_suffix(".png").exists()
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
    rows = ("Majority", "Linear", "Full", "LoRA r=8")
    runs = [
        {"row": name, "method": "floor" if i < 2 else "any", "trainable": 0, "seed": 0}
        | {"task": task, "test": found[i]}
        for i, name in enumerate(rows)
        for task, found in scores.items()
    ]
    data = {"rows": plots.summary(runs), "runs": runs}
    assert glue_gate.passed(data) == ["pass"]
    assert glue_gate.verdicts(data).endswith("1 tasks pass; wanted 5: the gate is shut.")


def test_the_linear_floor_sees_two_texts_apart_and_has_converged(tiny):
    """A score that is a linear function of |u − v| and u·v is predicted but for the ridge."""
    trunk = common.load_backbone(str(tiny), 1).base_model
    tokenizer = common.load_tokenizer(str(tiny))
    one, two = ([" ".join(random.Random(i + s).choices(WORDS, k=6)) for i in range(200)]
                for s in (0, 1000))  # fmt: skip
    u, v = (train_glue.embed(texts, trunk, tokenizer, 24) for texts in (one, two))
    alone = [train_glue.embed([text], trunk, tokenizer, 24) for text in one[:3]]
    assert (torch.cat(alone) - u[:3]).abs().max() < 1e-6  # padding is no token
    scores = (train_glue.features([u, v]) @ torch.linspace(-1, 1, 32)).tolist()
    rows = {"train": slice(0, 100), "validation": slice(100, 150), "test": slice(150, 200)}
    rows = {split: ([one[i], two[i]], scores[i]) for split, i in rows.items()}
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
    with torch.no_grad():
        assert abs(model(torch.tensor([[0, 9, 2]])).logits.item() - 2.5) < 0.5


# ---------------------------------------------------------------- figures


def made_up(gains: dict[str, float]) -> dict:
    """Results of every row of the table all: 0.5, its gain, and noise that rows share."""
    base = config(backbone="x", data="y", train=400)
    rng, runs = random.Random(0), []
    for task in train_glue.TASKS:
        for seed in range(3):
            luck = rng.gauss(0, 0.1)
            for i, row in enumerate(train_glue.all_rows(base)):
                gain = gains.get(row["row"], 0.0)
                score = {"test": 0.5 + luck + gain, "validation": 0.5 + luck + gain}
                losses = [1.0, 0.8 - gain]
                about = {"row": row["row"], "task": task, "seed": seed, "trainable": 1000 * (i + 1)}
                runs.append({**about, **score, "losses": losses})
    return {"rows": plots.summary(runs), "runs": runs}


def test_verdicts_say_what_the_numbers_say(tmp_path):
    gains = {"EigenLoRAx": 0.1, "PiSSA r=32": 0.3, "BOFT": -0.05, "OFT": 0.05}
    data = made_up({**gains, "HRA r=8, λ=1e-3": 0.02})
    for row, other, options, wanted in [
        ("EigenLoRAx", "LoRA r=32", {"least": -1.0}, "+10.0 [+10.0, +10.0] points: supported here"),
        ("HRA r=8, λ=0", "LoRA r=8", {}, "+0.0 [+0.0, +0.0] points: undecided"),
        ("HRA r=8, λ=0", "OFT", {}, "-5.0 [-5.0, -5.0] points: not supported here"),
        ("HRA r=8, λ=0", "BOFT", {}, "+5.0 [+5.0, +5.0] points: supported here"),
        ("HRA r=8, λ=1e-3", "HRA r=8, λ=0", {}, "+2.0 [+2.0, +2.0] points: supported here"),
    ]:
        _, difference, verdict = plots.judge(data, "any", [row], [other], **options)
        assert f"{difference}: {verdict}" == wanted, row
    for other, wanted in (("VeRA", "supported here"), ("PiSSA r=32", "not supported here")):
        found = plots.judge(data, "faster", ["EigenLoRAx"], [other], plots.log_loss)
        assert found[2] == wanted, other
    setting = {"config": {"backbone": "a/b", "train": 9}}
    (tmp_path / "b.json").write_text(json.dumps({**data, **setting}))
    assert glue_docs.draw(tmp_path / "b.json").exists()
    for name in ("HRA r=2, λ=0", "HRA r=4, λ=0", "HRA r=8, λ=1e-1"):
        data["runs"] += [{**r, "row": name} for r in data["runs"] if r["row"] == "OFT"]
    hra = [r for r in data["rows"] if r["row"] == "LoRA r=8" or "HRA" in r["row"]]
    (tmp_path / "c.json").write_text(json.dumps({**data, **setting, "rows": hra}))
    assert glue_hra.draw(tmp_path / "c.json").exists()
    assert (tmp_path / "c.md").read_text() == plots.as_table(hra) + "\n"


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
