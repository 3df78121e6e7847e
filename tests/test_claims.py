"""figures/claims.py: the statistics against cases worked out by hand, and the plan."""

import json
from copy import deepcopy

import pytest

import train_vit
from figures import claims
from figures.claims import Estimate, estimate, holm, outcome

PLAN = json.loads(claims.PLAN.read_text(encoding="utf-8"))["plan"]
EPS = 2.0**-52


def near(found: float, wanted: float, digits: float = 16 * EPS) -> bool:
    return abs(found - wanted) <= digits * abs(wanted)


def test_a_mean_of_means_with_its_error_by_hand():
    """Sets (1, 3) and (0, 2, 4): means 2 and 2, variances 2 and 4, degrees 1 + 2."""
    alone = estimate([[1.0, 3.0], [0.0, 2.0, 4.0]], dependent=False)
    assert (alone.mean, alone.degrees) == (2.0, 3)
    assert near(alone.error**2, (2 / 2 + 4 / 3) / 4)
    shared = estimate([[1.0, 3.0], [0.0, 2.0, 4.0]], dependent=True)
    assert near(shared.error**2, (2 * (1 / 2 + 1 / 1) + 4 * (1 / 3 + 1 / 2)) / 4)
    assert estimate([[1.0, 1.0], [5.0, 5.0, 5.0, 5.0]], dependent=False).mean == 3.0


def test_the_interval_and_p_are_those_of_tables_of_student():
    """t(0.975) is 2.776 with 4 degrees and 2.179 with 12; t(0.8) is 0.941 and 0.873."""
    low, high = Estimate(1.0, 0.5, 4).interval()
    assert near(low, 1 - 0.5 * 2.776, 1e-3) and near(high, 1 + 0.5 * 2.776, 1e-3)
    assert near(Estimate(2.179, 1.0, 12).p(), 0.05, 1e-3)
    assert near(Estimate(-2.179, 1.0, 12).p(), 0.05, 1e-3)
    assert near(Estimate(9.0, 2.0, 12).smallest(), 2 * (2.179 + 0.873), 1e-3)
    assert (Estimate(0.0, 0.0, 12).p(), Estimate(1.0, 0.0, 12).p()) == (1.0, 0.0)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.4 times 4, 3, 2, 1; none below the one before it, none above 1."""
    found = holm([0.03, 0.01, 0.4, 0.02])
    assert all(map(near, found, [0.06, 0.04, 0.4, 0.06]))
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("mean", "error", "adjusted", "wanted"),
    [
        (3.0, 0.5, 0.01, "supported"),
        (-3.0, 0.5, 0.01, "contradicted"),
        (3.0, 0.5, 0.06, "undecided"),
        (0.5, 0.1, 0.01, "no difference beyond the margin"),
        (0.5, 0.5, 1.0, "undecided"),  # the interval leaves the margin above
        (-0.5, 0.5, 1.0, "undecided"),  # and below
    ],
)
def test_the_four_outcomes(mean, error, adjusted, wanted):
    assert outcome(Estimate(mean, error, 12), adjusted, margin=1.0) == wanted


def invented(score) -> dict:
    """A file of claims in which score(row, subset, seed) is every field of every run."""
    rows = {row for claim in PLAN["claims"] for row in claim["weights"]} | {"Full"}
    runs = {}
    for row in sorted(rows):
        for subset in range(1, 6):
            for seed in (0, 1, 100):  # the last one only tuned
                value = score(row, subset, seed)
                fields = dict.fromkeys(("validation", "test", "probe", "kept"), value)
                where = {"row": row, "task": f"subset {subset}", "seed": seed}
                runs[f"{row} {subset} {seed}"] = {**where, **fields}
    part = {"config": {"subsets": 5}, "runs": runs}
    return {"plan": PLAN, "sets": {name: deepcopy(part) for name in PLAN["sets"]}}


def plain(row: str, subset: int, seed: int) -> float:
    """LoRA has 0.10 more than the probe, other rows 0.05; the noise is that of each seed."""
    gain = {"Probe": 0.0, "LoRA r=4": 0.1}.get(row, 0.05)
    return 0.6 + gain + (0.01 * subset if row == "OFT" else 0.0) + (seed == 1) * 0.02


def test_contrasts_average_seeds_within_their_task_and_ignore_tuning():
    found = {line["claim"]: line for line in claims.verdicts(invented(plain))}
    few = found["keeps 80 % of LoRA's gain over the probe, with 96 numbers"]
    assert near(few["pooled"].mean, 5 - 0.8 * 10, 1e-9)
    assert few["outcome"] == "contradicted"
    assert found["random coefficients beat the base"]["outcome"] == "supported"
    oft = found["beats OFT at about its size"]
    assert near(oft["sets"]["food101"][4], -5.0, 1e-9) and oft["pooled"].degrees == 12
    again = found["re-gauging keeps 80 % of its gain"]
    assert again["outcome"] == "not asked: there is no gain to explain"


def test_a_task_without_gain_is_dropped_and_one_without_runs_stops_all():
    def lost(row: str, subset: int, seed: int) -> float:
        return 0.6 if subset == 2 else plain(row, subset, seed)

    data = invented(lost)
    assert claims.dropped(data["sets"]["food101"], 2) == ["subset 2"]
    found = claims.verdicts(data)[0]
    assert [len(tasks) for tasks in found["sets"].values()] == [4, 4, 4]
    del data["sets"]["cifar100"]["runs"]["Probe 3 1"]
    assert claims.verdicts(data)[0]["outcome"] == "not run"
    del data["sets"]["cifar100"]
    assert {line["outcome"] for line in claims.verdicts(data)} == {"not run"}
    assert claims.table(data).count("not run") == len(PLAN["claims"])


def test_the_figure_is_drawn_and_the_file_keeps_its_plan(tmp_path):
    source = tmp_path / "claims.json"
    setting = {"subsets": 5, "others": ("a", "b")}
    assert claims.known_runs(source, "food101", setting) == {}
    claims.keep(source, "food101", {"config": setting, "runs": {"key": {}}})
    assert json.loads(source.read_text())["plan"] == PLAN
    assert claims.known_runs(source, "food101", setting) == {"key": {}}
    with pytest.raises(ValueError, match="wanted {'subsets': 4"):
        claims.known_runs(source, "food101", {**setting, "subsets": 4})
    source.write_text(json.dumps(invented(plain)))
    assert claims.draw(source).exists()


def test_every_row_of_the_plan_is_in_the_table_and_every_trained_row_is_tuned():
    rows = {row["row"]: row for row in train_vit.claims_rows({})}
    assert {row for claim in PLAN["claims"] for row in claim["weights"]} <= rows.keys()
    assert all(abs(sum(claim["weights"].values())) < 4 * EPS for claim in PLAN["claims"])
    tuned = {row for row, option, _ in train_vit.QUESTIONS if option == "lr"}
    assert tuned == {name for name, row in rows.items() if row.get("stages") != 0}
    for claim in PLAN["claims"]:
        recycles = [("recycle" in rows[name]) for name in claim["weights"]]
        assert claim["dependent"] == any(recycles), claim["claim"]
