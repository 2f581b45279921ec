"""Results side by side: which compare, seeds, intervals."""

import json
import operator
import re
import shutil
import statistics

import numpy as np
import pytest
import torch

import compare
import kills
from benchmarks import FashionIQ
from benchmarks.metrics import Ranks
from evaluation.result_file import write_result


def ranks(seed: int, shift: int = 0, queries: int = 200) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 120, (queries,), generator=generator) - shift).clamp(min=0).tolist()


MADE_BY = {
    "query_list": None,
    "clip_model_name": "RN50",
    "combining_function": "combiner",
    "checkpoints": {},
    "weights_sha256": {"clip": "c"},
    "encode_precision": "fp32",
    "preprocessing": {},
    "training": {},
    "trained_on": {},
    "assumed": {},
    "versions": {},
    "command": "",
    "date": "",
}


def settings(data: dict | None = None, **flags) -> dict:
    """Settings of a training with some flags."""
    return {"flags": flags, "recipe": {}, "data": data or {}, "versions": {}}


@pytest.fixture
def result(tmp_path):
    """Write a FashionIQ result with some ranks; returns its file."""

    def result(
        name: str,
        shift: int = 0,
        seed=None,
        protocols=("original-kept",),
        found=None,
        clusters=None,
        **changes,
    ):
        benchmark, measured = FashionIQ(tmp_path), {}
        columns = clusters or {"reference": list(range(200))}
        for protocol in protocols:
            of_split = {}
            for place, split in enumerate(benchmark.parts):
                of_split[split] = found or ranks(place, shift)
            scores = {split: benchmark.score(Ranks(np.array(r))) for split, r in of_split.items()}
            gallery, reference = protocol.split("-")
            measured[protocol] = {
                "gallery": gallery,
                "reference": reference,
                "text": "",
                "template": "",
                "certain": {},
                "other_ranks": {},
                "gallery_images": dict.fromkeys(of_split, 300),
                "queries": dict.fromkeys(of_split, len(columns["reference"])),
                "metrics": benchmark.summary(scores),
                "ranks": of_split,
                "group_ranks": {},
            }
        content = {
            "dataset": "FashionIQ",
            "split": "val",
            "protocol": protocols[0],
            "metrics": measured[protocols[0]]["metrics"],
            "protocols": measured,
            "excluded_images": {},
            "excluded_triplets": {},
            "smaller_groups": {},
            "images_sha256": {"dress": "i"},
            "images_sampled": {"dress": "i"},
            "kinds": {},
            **MADE_BY,
            "queries_sha256": dict.fromkeys(benchmark.parts, "q"),
            "clusters": dict.fromkeys(benchmark.parts, columns),
            "training": {}
            if seed is None
            else {"combiner": settings(seed=seed, combiner_type="moe", data_root=name)},
        }
        write_result(tmp_path / f"{name}.json", content | changes)
        return tmp_path / f"{name}.json"

    return result


@pytest.fixture
def compared(capsys):
    def compared(*words) -> str:
        compare.main(["--resamples", "500", *map(str, words)])
        return capsys.readouterr().out

    return compared


def row(out: str, title: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(title))


def test_a_difference_has_the_interval_of_the_paired_bootstrap(result, compared):
    """Against resamples made here one by one; pairing makes the interval narrow."""
    files = result("a"), result("b", shift=8)
    out = compared(*files, "--resamples", 4000)
    before, after = (
        json.loads(f.read_text())["protocols"]["original-kept"]["ranks"]["dress"] for f in files
    )
    generator = torch.Generator().manual_seed(7)
    differences = []
    for _ in range(4000):
        drawn = torch.randint(200, (200,), generator=generator).tolist()
        hits = [sum(ranks[query] < 10 for query in drawn) / 2 for ranks in (before, after)]
        differences.append(hits[1] - hits[0])
    low, high = (
        statistics.quantiles(differences, n=40)[0],
        statistics.quantiles(differences, n=40)[-1],
    )
    cells = row(out, "dress R@10").split(maxsplit=4)
    assert [float(cells[2]), float(cells[3])] == [
        sum(r < 10 for r in side) / 2 for side in (before, after)
    ]
    difference, interval = cells[4].split(" ", 1)
    assert float(difference) == pytest.approx(float(cells[3]) - float(cells[2]))
    ours = [float(end) for end in interval.strip("[]").split(", ")]
    assert ours == pytest.approx([low, high], abs=0.6)


REFERENCES = 90
CLUSTER = 9  # queries of each


def bounds_of(out: str, title: str) -> tuple[float, float]:
    low, high = row(out, title).rsplit("[", 1)[1].rstrip("]").split(", ")
    return float(low), float(high)


def test_queries_of_one_reference_are_drawn_together(result, compared):
    """Queries that agree wholly within a reference tell nothing new: the interval is sqrt(CLUSTER) times as wide.

    Against a twin that draws references one by one and takes all queries of each.
    """
    references = [number // CLUSTER for number in range(REFERENCES * CLUSTER)]
    files = []
    for name, seed in (("a", 1), ("b", 2)):
        generator = torch.Generator().manual_seed(seed)
        found = torch.randint(0, 20, (REFERENCES,), generator=generator)[references].tolist()
        files.append(result(name, found=found, clusters={"reference": references}))
    hits = []
    for file in files:
        measured = json.loads(file.read_text())["protocols"]["original-kept"]
        hits.append([rank < 10 for rank in measured["ranks"]["dress"]])
    generator = torch.Generator().manual_seed(5)
    differences = []
    for _ in range(2000):
        gains = []
        for reference in torch.randint(REFERENCES, (REFERENCES,), generator=generator).tolist():
            queries = slice(reference * CLUSTER, (reference + 1) * CLUSTER)
            gains += map(operator.sub, hits[1][queries], hits[0][queries])
        differences.append(100 * statistics.fmean(gains))
    quantiles = statistics.quantiles(differences, n=40)
    words = [*files, "--resamples", 2000]
    by_reference = compared(*words)
    assert bounds_of(by_reference, "dress R@10") == pytest.approx(
        (quantiles[0], quantiles[-1]), abs=1.7
    )
    assert f"95% intervals, resampled by reference: dress has {REFERENCES}" in by_reference
    by_query = compared(*words, "--resample-by", "query")
    assert f"resampled by query: dress has {REFERENCES * CLUSTER}" in by_query
    widths = []
    for out in (by_reference, by_query):
        low, high = bounds_of(out, "dress R@10")
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(CLUSTER**0.5, rel=0.1)


def test_a_column_that_queries_lack_is_named(result, compared, capsys):
    with pytest.raises(SystemExit) as stop:
        compared(result("a"), result("b"), "--resample-by", "concept")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--resample-by concept" in error
    assert "choose from query, reference" in error


def test_equal_results_differ_by_nothing(result, compared):
    out = compared(result("a"), result("b"))
    assert row(out, "mean ").endswith("+0.00 [+0.00, +0.00]")


def test_seeds_are_one_column(result, compared):
    files = [result(f"s{seed}", shift=seed, seed=seed) for seed in (0, 2, 4)]
    out = compared(result("base", shift=1), *files)
    values = [
        json.loads(f.read_text())["protocols"]["original-kept"]["metrics"]["average_recall"]
        for f in files
    ]
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in row(out, "mean  ")
    assert "s0: mean ± standard deviation of 3 seeds" in out
    assert "s2" not in out


def test_seeds_of_stage_1_and_of_both_stages_are_one_column(result, compared):
    sums = [result(f"sum{s}", shift=s, training={"clip": settings(seed=s)}) for s in (0, 1)]
    pairs = []
    for seed in (0, 1):
        combiner = settings({"clip_weights": str(seed)}, seed=seed)
        training = {"clip": settings(seed=seed), "combiner": combiner}
        weights = {"clip": str(seed), "combiner": str(seed)}
        pairs.append(result(f"pair{seed}", shift=seed, training=training, weights_sha256=weights))
    out = compared(*sums, *pairs)
    assert "sum0: mean ± standard deviation of 2 seeds" in out
    assert "pair0: mean ± standard deviation of 2 seeds" in out


def test_combiners_on_clips_that_do_not_tell_their_training_are_apart(result, compared):
    files = [result(f"s{s}", shift=s, seed=s, weights_sha256={"clip": str(s)}) for s in (0, 1)]
    assert "±" not in compared(*files)


def test_seeds_measured_on_other_images_are_no_mean(result, compared):
    files = [result("a", seed=0), result("b", seed=1, images_sha256={"dress": "other"})]
    assert "the seeds of a have different image files, so their mean is not meaningful" in compared(
        *files
    )


def test_files_of_one_name_are_told_apart(result, compared, tmp_path):
    files = []
    for run, shift in (("x", 0), ("y", 8)):
        files.append(tmp_path / run / "metrics.json")
        files[-1].parent.mkdir()
        result(run, shift=shift).rename(files[-1])
    out = compared(*files)
    first, second = (str(file.with_suffix("")) for file in files)
    assert f"{second} - {first}" in out
    values = [
        json.loads(f.read_text())["protocols"]["original-kept"]["metrics"]["average_recall"]
        for f in files
    ]
    assert [float(cell) for cell in row(out, "mean  ").split()[1:3]] == [
        round(value, 2) for value in values
    ]
    assert "metrics (2)" in compared(result("metrics"), tmp_path / "metrics.json")


@pytest.mark.parametrize(
    "name", ["split", "training", "queries_sha256", "images_sha256", "excluded_images"]
)
@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_a_result_that_lacks_something_is_named(name, value, result, capsys):
    file = result("a", **{name: value})
    with pytest.raises(SystemExit) as stop:
        compare.main([str(file)])
    assert stop.value.code == 2
    assert str(file) in capsys.readouterr().err


def test_one_seed_twice_is_not_two_seeds(result, compared):
    out = compared(result("a", seed=1), result("b", seed=1))
    assert "±" not in out
    assert "b - a" in out


def test_other_trainings_are_other_columns(result, compared):
    other = {"combiner": settings(seed=1, combiner_type="clip4cir")}
    out = compared(result("a", seed=0), result("b", seed=1, training=other))
    assert "±" not in out


def test_protocols_that_are_not_shared(result, compared, capsys):
    both = ("original-kept", "VAL-removed")
    out = compared(result("a", protocols=both), result("b", protocols=both), result("c"))
    first, second, _ = out.strip().split("\n\n")
    assert first.startswith("FashionIQ val, original-kept: gallery original, reference kept")
    assert "c - a" in first
    assert "c was not evaluated under VAL-removed" in second
    with pytest.raises(SystemExit) as stop:
        compared(result("a"), result("b", protocols=["VAL-kept"]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "a: original-kept; b: VAL-kept" in error
    assert "cannot be compared" in error


def test_a_protocol_can_be_chosen(result, compared):
    both = ("original-kept", "VAL-removed")
    out = compared(
        result("a", protocols=both), result("b", protocols=both), "--protocol", "val-removed"
    )
    assert "original" not in out


def test_other_conditions_are_marked(result, compared):
    out = compared(result("a"), result("b", images_sha256={"dress": "other"}))
    assert "* b and a have different image files: not a fair comparison" in out
    assert "b* - a" in out
    out = compared(result("a"), result("b", queries_sha256=dict.fromkeys(FashionIQ.parts, "other")))
    assert "* b and a have different queries" in out
    assert " - a" not in out  # other queries cannot be paired


def test_other_datasets_and_other_files_are_refused(result, tmp_path, capsys):
    first = result("a")
    for other in (result("b", split="test"), tmp_path / "none.json"):
        with pytest.raises(SystemExit) as stop:
            compare.main([str(first), str(other)])
        assert stop.value.code == 2
        assert str(other) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_several_seeds_in_one_command(stage, request, run, drawn, compared, capsys, tmp_path):
    """--seeds trains what as many commands would, and its report and files of metrics are theirs."""
    train = request.getfixturevalue(stage)
    flags = ["--save-best", "--num-epochs", 1 if stage == "stage_1" else 2]
    folder = train("CIRR", "--seeds", 0, 3, *flags)
    out = capsys.readouterr().out
    assert out.startswith("validations with the best arithmetic_mean of each seed")
    single = train("CIRR", "--seed", 3, *flags, output="single")
    assert kills.differences(single, folder / "seed_3") == []
    summary = json.loads((folder / "best_metrics.json").read_text())
    values = [summary["seeds"][seed]["recall_at1"] for seed in ("0", "3")]
    assert summary["mean"]["recall_at1"] == statistics.fmean(values)
    assert summary["standard_deviation"]["recall_at1"] == pytest.approx(statistics.stdev(values))
    flags = {
        "stage_1": ["--combining-function", "sum", "--clip-model-path"],
        "stage_2": ["--combining-function", "combiner", "--combiner-path"],
    }[stage]
    for seed in (0, 3):
        weights = next((folder / f"seed_{seed}" / "saved_models").glob("*_arithmetic.pt"))
        file = tmp_path / f"seed{seed}.json"
        run("validate", drawn, "--dataset", "CIRR", *flags, weights, "--metrics-json", file)
        ours, theirs = (json.loads(of.read_text()) for of in (folder / f"seed_{seed}.json", file))
        assert ours.keys() == theirs.keys()
        assert {name for name in ours if ours[name] != theirs[name]} <= {"command", "date"}
        best = summary["seeds"][str(seed)]
        assert ours["metrics"] == {name: best[name] for name in ours["metrics"]}
    capsys.readouterr()
    assert "seed_0: mean ± standard deviation of 2 seeds" in compared(folder)


@pytest.mark.slow
def test_seeds_of_both_stages_in_a_table(stage_1, stage_2, compared, capsys, tmp_path):
    """Stage 2 over the weights of each seed of stage 1, a file or the only one of a folder."""
    short = ["--save-best", "--num-epochs", 1]
    tuned = stage_1("CIRR", "--seeds", 1, 2, *short)
    folders = []
    for seed in (1, 2):
        weights = tuned / f"seed_{seed}" / "saved_models" / "tuned_clip_arithmetic.pt"
        if seed == 2:
            weights = shutil.copy(weights, tmp_path / "tuned.pt").parent
        flags = ["--clip-model-path", weights, "--seeds", 0, 3]
        folders.append(stage_2("CIRR", *flags, *short, output=f"combiner_{seed}"))
    out = compared(*folders)
    assert "mean ± standard deviation of 4 seeds" in out
    table = out.partition("arithmetic_mean by the seeds of both stages")[2]
    means = []
    for seed, folder in zip((1, 2), folders, strict=True):
        files = [json.loads((folder / f"seed_{of}.json").read_text()) for of in (0, 3)]
        values = [file["metrics"]["arithmetic_mean"] for file in files]
        means.append(statistics.fmean(values))
        told = f"{values[0]:.2f} +{values[1]:.2f} +{means[-1]:.2f} ± {statistics.stdev(values):.2f}"
        assert re.search(f"stage 1, seed {seed} +{told}", table)
    both = f"{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}"
    assert table.rstrip().splitlines()[-1].endswith(both)


def test_a_folder_without_metrics_of_seeds_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert f"{tmp_path} contains no seed_*.json" in capsys.readouterr().err


def test_one_seed_has_no_standard_deviation(stage_2, capsys):
    """Guards against a deviation of 0.00, which would say that seeds agree."""
    folder = stage_2("CIRR", "--seeds", 3, "--save-best", "--num-epochs", 1)
    assert "deviation" not in capsys.readouterr().out
    summary = json.loads((folder / "best_metrics.json").read_text())
    assert set(summary) == {"chosen_by", "seeds", "mean"}
