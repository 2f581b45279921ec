"""Image and text alone as ways to compose, audits against brute force, and validations of a list of queries."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import audit
import compare
import shapes_dataset
from benchmarks import BENCHMARKS, CIRR
from benchmarks.protocols import PROTOCOLS
from benchmarks.query_lists import read_query_list, restricted
from combiner import UNLEARNED, Combiner
from conftest import CASES, SOAK
from evaluation.auditing import Audit, hits_of, names_of
from evaluation.comparison import Resampling
from evaluation.retrieval import rank_all
from models.features import FrozenSplit

RESAMPLING = Resampling(resamples=200, confidence=0.9, seed=0)


@pytest.fixture(scope="module")
def case(drawn):
    """Dataset -> its validation splits, their features, which are drawn, and the audit of each way to compose."""
    made = {}

    def case(dataset: str):
        if dataset not in made:
            benchmark = BENCHMARKS[dataset](drawn)
            val = benchmark.val()
            generator = torch.Generator().manual_seed(1)
            frozen = []
            for split in val:
                images = torch.randn(len(split.names), 8, generator=generator)
                texts = benchmark.texts
                shape = (len(split.triplets), len(texts), 8)
                captions = torch.randn(shape, generator=generator)
                frozen.append(
                    FrozenSplit(split=split, images=images, captions=captions, texts=texts)
                )
            protocol = benchmark.protocols[0]
            hits = {}
            for name, kind in UNLEARNED.items():
                rankings = rank_all(frozen, kind(), [protocol], k=0, block=None)
                hits[name] = hits_of(benchmark, val, rankings[protocol])
            clusters = RESAMPLING.clusters({split.name: split.clusters for split in val})
            audit = Audit(benchmark=benchmark, hits=hits, clusters=clusters, resampling=RESAMPLING)
            made[dataset] = val, frozen, audit
        return made[dataset]

    return case


@pytest.mark.parametrize("name", UNLEARNED)
def test_each_modality_alone_is_its_normalised_features(name):
    image, text = torch.randn(2, 5, 8)
    expected = {"image": image, "text": text, "sum": image + text}[name]
    compose = UNLEARNED[name]().eval()
    torch.testing.assert_close(compose(image, text), F.normalize(expected, dim=-1))
    assert compose.explained(image, text)[1] is None
    assert not compose.state_dict()
    assert compose.combining_function == name


def test_image_alone_finds_its_own_reference_where_that_is_kept(case):
    """By hand: the rank of a target is the number of images that are nearer to the reference alone."""
    _, frozen, audit = case("FashionIQ")
    for split in frozen:
        gallery = F.normalize(split.images, dim=-1)
        similarity = F.normalize(split.references, dim=-1) @ gallery.T
        targets = split.target_rows
        own = similarity.gather(1, targets[:, None])
        ranks = (similarity > own).sum(1)
        found = audit.hits["image"][split.split.name]["recall_at10"]
        assert found.tolist() == (ranks < 10).tolist()


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_who_solves_what_equals_a_count_by_hand(case, dataset):
    val, _, audit = case(dataset)
    hits = audit.hits
    some = next(iter(hits["sum"].values()))
    for recall in [name for name, values in some.items() if values.dtype == bool]:
        found = audit.solved(recall)
        rows = []
        for split in val:
            columns = [hits[name][split.name][recall] for name in ("image", "text", "sum")]
            rows += zip(*columns, strict=True)
        for place, name in enumerate(("image", "text", "sum")):
            assert found["solved"][name]["queries"] == sum(row[place] for row in rows)
        either = sum(image or text for image, text, _ in rows)
        assert found["solved"]["either alone"]["queries"] == either
        shares = [100 * sum(row[place] for row in rows) / len(rows) for place in range(3)]
        assert found["gap"]["sum"]["value"] == pytest.approx(shares[2] - max(shares[:2]))
        assert found["gap"].keys() == {"sum"}
        for value in (*found["solved"].values(), *found["gap"].values()):
            low, high = value["interval"]
            assert low <= value["value"] <= high
        neither = audit.need_both(recall)
        names = names_of(val, neither)
        assert len(names) == len(set(names)) == len(rows) - either


def test_the_interval_of_a_gap_is_of_paired_queries():
    """Where the sum solves what the better modality solves, no resample finds a difference."""
    generator = np.random.default_rng(0)
    image = {"a": {"r": generator.random(40) < 0.5}, "b": {"r": generator.random(60) < 0.5}}
    nothing = {split: {"r": np.zeros_like(own["r"])} for split, own in image.items()}
    audit = Audit(
        benchmark=CIRR(None),
        hits={"image": image, "text": nothing, "sum": image},
        clusters={"a": np.arange(40), "b": np.arange(60)},
        resampling=RESAMPLING,
    )
    found = audit.solved("r")
    assert found["gap"]["sum"] == {"value": 0.0, "interval": (0.0, 0.0)}
    low, high = found["solved"]["sum"]["interval"]
    assert high - low > 5


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_metrics_on_all_queries_are_the_benchmarks_own(case, dataset):
    val, frozen, audit = case(dataset)
    benchmark = audit.benchmark
    everything = {split.name: np.ones(len(split.triplets), dtype=bool) for split in val}
    found = audit.metrics_on(everything)["sum"]
    rankings = rank_all(frozen, UNLEARNED["sum"](), benchmark.protocols[:1], k=0, block=None)
    expected = benchmark.metrics(val, rankings[benchmark.protocols[0]])
    assert {name: own["value"] for name, own in found.items()} == pytest.approx(expected)
    nothing = {name: ~own for name, own in everything.items()}
    assert audit.metrics_on(nothing) == {}


def test_queries_that_agree_within_a_reference_make_wide_intervals():
    """By about the root of how many ask with one reference, of all numbers of an audit."""
    solves = np.random.default_rng(1).random((3, 100)) < [[0.3], [0.2], [0.6]]
    rows = {"recall_at1": np.repeat(solves, 9, axis=1)}
    hits = {}
    for place, function in enumerate(("image", "text", "sum")):
        hits[function] = {"val": {name: own[place] for name, own in rows.items()}}
    widths = []
    for clusters in (np.repeat(np.arange(100), 9), np.arange(900)):
        audit = Audit(
            benchmark=CIRR(None),
            hits=hits,
            clusters={"val": clusters},
            resampling=Resampling(resamples=2000, confidence=0.95, seed=0),
        )
        found = audit.solved("recall_at1")
        ends = [found["solved"]["sum"]["interval"], found["gap"]["sum"]["interval"]]
        widths.append([high - low for low, high in ends])
    by_reference, by_query = np.array(widths)
    assert (by_reference / by_query).tolist() == pytest.approx([3, 3], rel=0.1)


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_a_query_keeps_its_name_whatever_is_left_out(drawn, dataset):
    """With every image left out in turn: a name is of one query, and of the same one."""
    whole = BENCHMARKS[dataset](drawn).val()
    known = {}
    for split in whole:
        for name, triplet in zip(split.query_names, split.triplets, strict=True):
            assert known.setdefault(name, triplet) == triplet
    assert len(known) == sum(len(split.triplets) for split in whole)
    for excluded in whole[0].names:
        for split in BENCHMARKS[dataset](drawn, [excluded]).val():
            for name, triplet in zip(split.query_names, split.triplets, strict=True):
                assert (known[name].reference, known[name].captions) == (
                    triplet.reference,
                    triplet.captions,
                )
        CASES["exclusions under which names stay", "read"] += 1


def write_list(file, queries, dataset="CIRR", split="val"):
    file.write_text(json.dumps({"dataset": dataset, "split": split, "queries": queries}))
    return file


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_a_restricted_split_keeps_its_galleries(drawn, protocol, tmp_path):
    benchmark = BENCHMARKS["FashionIQ"](drawn)
    val = benchmark.val()
    names = [split.query_names[-1] for split in val]
    listed = read_query_list(
        write_list(tmp_path / "l.json", names, "FashionIQ"), "FashionIQ", "val"
    )
    for split, kept in zip(val, restricted(benchmark, val, listed), strict=True):
        assert kept.query_names == split.query_names[-1:]
        assert kept.names == split.names
        assert kept.outside == split.outside
        assert protocol.gallery_size(kept) == protocol.gallery_size(split)


@pytest.fixture
def pair(drawn, tmp_path):
    """Flags of a pair with a Combiner."""
    torch.manual_seed(0)
    file = tmp_path / "combiner.pt"
    torch.save({"Combiner": Combiner(64, 16, 24).state_dict()}, file)
    clip = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    return [*clip, "--combiner-path", file]


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A data root with galleries of which ten images are not nearly all."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = "--train-triplets 1 --val-triplets 20 --train-groups 1 --val-groups 5 "
    sizes += "--circo-queries 16 --own-groups 5"
    shapes_dataset.main(["--output-dir", str(folder), *sizes.split()])
    return folder


def audited(drawn, *flags):
    machine = ["--data-root", drawn, "--device", "cpu", "--num-workers", 0]
    audit.main([str(word) for word in (*machine, "--resamples", 50, *flags)])


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_an_audits_numbers_are_those_of_validations(dataset, larger, pair, run, tmp_path, capsys):
    """Of each way to compose on all queries, and on the list that the audit wrote."""
    listed = tmp_path / "need_both.json"
    numbers = tmp_path / "audit.json"
    k = {"FashionIQ": 10, "CIRCO": 5}.get(dataset, 1)
    first = BENCHMARKS[dataset].protocols[0].name
    flags = ["--dataset", dataset, *pair, "--k", k, "--protocol", first]
    audited(larger, *flags, "--write-queries", listed, "--metrics-json", numbers)
    said = capsys.readouterr().out
    found = json.loads(numbers.read_text())["protocols"][first]
    names = json.loads(listed.read_text())["queries"]
    assert len(names) == sum(found["need_both"].values()) > 0
    assert f"{len(names)} of the queries need both, at recall_at{k}" in said
    split, number = next(iter(found["clusters"].items()))
    assert f"95% intervals, resampled by reference: {split} has {number}" in said
    assert found["resampled_by"] == "reference"
    on_those = found["metrics_where_both_are_needed"]
    assert on_those.keys() == {"image", "text", "sum", "combiner"}
    # Each way to compose in turn; `make soak` compares all of them.
    place = list(BENCHMARKS).index(dataset)
    for function in on_those if SOAK else [list(on_those)[place % len(on_those)]]:
        flags = ["--dataset", dataset, *pair, "--combining-function", function]
        flags += ["--protocol", first, "--metrics-json", tmp_path / f"{function}.json"]
        run("validate", larger, *flags, "--queries", listed)
        result = json.loads((tmp_path / f"{function}.json").read_text())
        assert result["combining_function"] == function
        assert result["query_list"]["file"] == str(listed)
        values = {name: own["value"] for name, own in on_those[function].items()}
        assert values == pytest.approx(result["metrics"])
        assert ("combiner" in result["weights_sha256"]) == (function == "combiner")
    part = {"FashionIQ": "dress_", "GeneCIS": "change_object_"}.get(dataset, "")
    assert on_those["image"][f"{part}recall_at{k}"]["value"] == 0


def test_results_of_other_lists_and_other_functions_are_told_apart(
    drawn, pair, run, tmp_path, capsys
):
    names = CIRR(drawn).val()[0].query_names
    files = []
    for label, function, queries in (
        ("sum", "sum", None),
        ("image", "image", None),
        ("some", "sum", names[:9]),
        ("others", "sum", names[5:]),
    ):
        flags = ["--dataset", "CIRR", *pair[:2], "--combining-function", function]
        if queries:
            flags += ["--queries", write_list(tmp_path / "list.json", queries)]
        files.append(str(tmp_path / f"{label}.json"))
        run("validate", drawn, *flags, "--metrics-json", files[-1])
    capsys.readouterr()
    compare.main([*files, "--resamples", "50"])
    said = capsys.readouterr().out
    assert "image - sum" in said
    for label in ("some", "others"):
        assert f"* {label} and sum have different queries, different lists of queries" in said
        assert f"{label}* - sum" not in said


REFUSED = {
    "[]": "it should be a table",
    "{}": "dataset: field required",
    '{"dataset": "CIRR", "split": "val", "queries": 3}': "queries: input should be a valid list",
    '{"dataset": "CIRR", "split": "val", "queries": []}': "is empty",
    '{"dataset": "CIRR", "split": "val", "queries": [null]}': "queries.0: input should be a valid string, not None",
    '{"dataset": "CIRR", "split": "val", "queries": [true]}': "queries.0: input should be a valid string, not True",
    '{"dataset": "CIRR", "split": "val", "queries": [["1"]]}': "queries.0: input should be a valid string, not ['1']",
    '{"dataset": "FashionIQ", "split": "val", "queries": ["dress:1"]}': "is for FashionIQ val",
    '{"dataset": "CIRR", "split": "test1", "queries": [1]}': "is for CIRR test1",
    '{"dataset": "CIRR", "split": "val", "queries": [-7, "x"]}': "2 of 2 are not queries of CIRR",
    "{": "is not a readable JSON file",
}


@pytest.mark.parametrize("content", REFUSED)
def test_a_list_that_is_none_is_refused(content, drawn, tmp_path, fails):
    file = tmp_path / "list.json"
    file.write_text(content)
    clip = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combining-function", "sum"]
    error = fails("validate", drawn, "--dataset", "CIRR", *clip, "--queries", file)
    assert f"--queries {file}" in error or f"--queries: {file}" in error
    assert REFUSED[content] in error
    CASES["lists of queries", "refused"] += 1


def test_a_list_without_a_query_of_some_split_is_refused(drawn, tmp_path, fails):
    file = write_list(tmp_path / "list.json", ["dress:0", "shirt:1"], "FashionIQ")
    clip = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combining-function", "sum"]
    error = fails("validate", drawn, "--dataset", "FashionIQ", *clip, "--queries", file)
    assert "has no query of toptee" in error


def test_a_query_that_is_left_out_is_known_all_the_same(drawn, tmp_path):
    whole = CIRR(drawn).val()[0]
    left_out = whole.triplets[0].reference
    benchmark = CIRR(drawn, [left_out])
    file = write_list(tmp_path / "list.json", [int(name) for name in whole.query_names])
    (kept,) = restricted(benchmark, benchmark.val(), read_query_list(file, "CIRR", "val"))
    assert kept.query_names == benchmark.val()[0].query_names
    assert whole.query_names[0] not in kept.query_names


def test_an_audit_at_a_k_without_a_recall_is_refused(drawn, pair, capsys):
    with pytest.raises(SystemExit) as stop:
        audited(drawn, "--dataset", "CIRR", *pair, "--k", 7)
    assert stop.value.code == 2
    assert "--k 7: CIRR has no recall_at7: choose from" in capsys.readouterr().err


def test_where_one_modality_solves_all_nothing_is_written(drawn, pair, tmp_path, capsys, caplog):
    """At k of the whole gallery, all is solved by anything."""
    listed = tmp_path / "list.json"
    audited(drawn, "--dataset", "CIRR", *pair, "--k", 50, "--write-queries", listed)
    said = capsys.readouterr().out
    assert "0 of the queries need both" in said
    assert "no metrics for the queries that need both" in said
    assert f"{listed} is not written, because no query needs both image and text" in caplog.text
    assert not listed.exists()
