"""Several targets a query: CIRCO's numbers against its evaluation code and brute force, its files, its rules."""

import copy
import hashlib
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compare
import visualize
from benchmarks import CIRCO, Split, Triplet
from benchmarks.circo import ASPECTS, PLACES
from benchmarks.metrics import NO_RANK, Ranks, average_precision, only, percentage
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from benchmarks.splits import split_digest
from conftest import CASES, SOAK
from evaluation.comparison import bootstrap
from evaluation.rankings_file import _with_ranks, read_rankings
from evaluation.result_file import read_result, stored_ranks
from evaluation.retrieval import rank
from models.features import FrozenSplit
from test_bad_input import change_json
from utils import UserError

SUM = ["--combining-function", "sum"]


def official_metrics(predictions: dict, annotations: list[dict]) -> dict[str, float]:
    """As the benchmark's own evaluation computes them: labels of a ranking, precisions at each place, means."""
    precisions = {k: [] for k in PLACES}
    recalls = {k: [] for k in PLACES}
    of_aspects = {aspect: [] for aspect in ASPECTS}
    for annotation in annotations:
        predicted = np.array(predictions[str(annotation["id"])], dtype=int)
        assert len(np.unique(predicted)) == len(predicted)
        right = np.array(annotation["gt_img_ids"], dtype=int)
        labels = np.isin(predicted, right)
        at_each = np.cumsum(labels, axis=0) * labels / np.arange(1, len(labels) + 1)
        for k in PLACES:
            precisions[k].append(float(np.sum(at_each[:k])) / min(len(right), k))
            recalls[k].append(float(annotation["target_img_id"] in predicted[:k]))
        for aspect in annotation["semantic_aspects"]:
            of_aspects[aspect].append(precisions[10][-1])
    metrics = {f"map_at{k}": float(np.mean(precisions[k])) * 100 for k in PLACES}
    metrics |= {f"recall_at{k}": float(np.mean(recalls[k])) * 100 for k in PLACES}
    for aspect, values in of_aspects.items():
        if values:
            metrics[f"{aspect}_map_at10"] = float(np.mean(values)) * 100
    return metrics


@st.composite
def rankings(draw):
    """Queries with one to 23 targets in a gallery where many images are equally near; reference 0."""
    gallery = draw(st.integers(25, 60))
    names = [str(number) for number in range(gallery)]
    triplets = []
    for number in range(draw(st.integers(1, 5))):
        targets = draw(st.permutations(names[1:]))[: draw(st.integers(1, 23))]
        aspects = draw(st.sets(st.sampled_from(ASPECTS)))
        triplets.append(
            Triplet(
                reference="0",
                captions=("", ""),
                target=targets[0],
                other_targets=tuple(targets[1:]),
                pair_id=number,
                kinds=tuple(sorted(aspects)),
            )
        )
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(-9, 9, (len(triplets), gallery), generator=generator).float()
    return Split(name="val", triplets=triplets, image_paths=dict.fromkeys(names)), similarity


@settings(max_examples=400 if SOAK else 20)
@given(rankings(), st.integers(1, 6))
def test_ranks_and_metrics_equal_brute_force(drawn_split, block):
    """By sorted lists, ties in the order of the gallery; and what the official code makes of these lists."""
    split, similarity = drawn_split
    frozen = FrozenSplit(
        split=split, images=torch.eye(len(split.names)), captions=similarity[:, None]
    )
    found = rank(
        frozen, lambda image, text: text, [ORIGINAL_KEPT, ORIGINAL_REMOVED], k=50, block=block
    )
    annotations = []
    for triplet in split.triplets:
        annotation = {"id": triplet.pair_id, "target_img_id": int(triplet.target)}
        annotation["gt_img_ids"] = [int(name) for name in triplet.targets]
        annotations.append({**annotation, "semantic_aspects": triplet.kinds})
    for protocol, ranking in found.items():
        predictions = {}
        for row, (values, triplet) in enumerate(
            zip(similarity.tolist(), split.triplets, strict=True)
        ):
            allowed = range(protocol.reference == "removed", len(values))
            order = [str(name) for name in sorted(allowed, key=lambda name: -values[name])]
            ranks = [order.index(name) for name in triplet.targets]
            assert [int(ranking.ranks[row]), *ranking.known_other_ranks[row]] == ranks
            predictions[str(triplet.pair_id)] = order[:50]
        metrics = CIRCO(None).metrics([split], {"val": ranking})
        assert metrics == pytest.approx(official_metrics(predictions, annotations))


def test_average_precision_by_hand():
    ranks = np.array([[4, 0, NO_RANK], [12, NO_RANK, NO_RANK], [1, 2, 0]])
    assert average_precision(ranks, 10).tolist() == pytest.approx([(1 + 2 / 5) / 2, 0, 1])
    assert average_precision(ranks, 2).tolist() == pytest.approx([1 / 2, 0, 1])
    assert average_precision(ranks, 25).tolist() == pytest.approx([0.7, 1 / 13, 1])


def test_queries_that_do_not_count_are_in_no_mean():
    values = np.array([1.0, 0.5, 0.25])
    assert percentage(only([0, 2], values)) == 62.5
    assert math.isnan(percentage(only([], values)))
    drawn = bootstrap(
        torch.from_numpy(np.column_stack([only([0, 2], values), values])),
        torch.arange(3),
        2000,
        generator=torch.Generator().manual_seed(3),
    )
    kind = drawn[:, 0]
    assert bool(kind.isnan().any())  # queries 0 and 2 are in no place
    assert set(kind[~kind.isnan()].tolist()) == {25.0, 50.0, 62.5, 75.0, 100.0}
    assert statistics.fmean(drawn[:, 1].tolist()) == pytest.approx(100 * 1.75 / 3, abs=1)


def test_one_target_is_what_it_was():
    """Digests of queries, by which results of earlier versions compare; and AP is the reciprocal rank."""
    triplet = Triplet(reference="a", captions=("x",), target="b")
    split = Split(name="val", triplets=[triplet], image_paths=dict.fromkeys("abc"))
    content = [["a", "b", "c"], [["a", ["x"], "b", []]]]
    assert split_digest(split) == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert average_precision(Ranks(np.array([3])).of_all, 10).tolist() == [0.25]


@pytest.fixture(scope="module")
def kept() -> dict[str, str]:
    """What was measured once for several tests."""
    return {}


@pytest.fixture
def pair(drawn):
    return ["--clip-model-name", drawn / "tiny_clip_vit.pt", *SUM]


@pytest.fixture
def measured(kept, drawn, pair, run, tmp_path):
    """The files of a validation of the drawn CIRCO: result and rankings."""
    files = {name: tmp_path / f"{name}.json" for name in ("result", "rankings")}
    if not kept.keys() >= files.keys():
        outputs = ["--metrics-json", files["result"], "--rankings", files["rankings"]]
        run("validate", drawn, "--dataset", "CIRCO", *pair, *outputs)
        kept.update({name: file.read_text() for name, file in files.items()})
    for name, file in files.items():
        file.write_text(kept[name])
    return files


def annotations_of(root) -> list[dict]:
    return json.loads((root / "circo_dataset/annotations/val.json").read_text())


def test_the_four_protocols_equal_the_official_evaluation(measured, drawn):
    result = read_result(measured["result"])
    content = read_rankings(measured["rankings"])
    assert list(result["protocols"]) == [protocol.name for protocol in CIRCO.protocols]
    assert result["metrics"] == result["protocols"]["original-kept"]["metrics"]
    queries = content["queries"]["unlabeled2017"]
    for name, of_protocol in result["protocols"].items():
        lists = {}
        for query in queries:
            nearest = query["protocols"][name]["nearest"]
            lists[str(query["pair_id"])] = [int(image) for image, _ in nearest]
        official = official_metrics(lists, annotations_of(drawn))
        assert of_protocol["metrics"].keys() == official.keys()
        for metric, value in official.items():
            assert round(of_protocol["metrics"][metric], 2) == round(value, 2)
        asked = {query["protocols"][name].get("caption", query["caption"]) for query in queries}
        wanted = set()
        for entry in annotations_of(drawn):
            with_concept = f"Find a picture that also {entry['shared_concept']}, but {entry['relative_caption']}"
            wanted.add(with_concept if "concept" in name else entry["relative_caption"])
        assert asked == wanted


def test_the_gallery_is_encoded_once(drawn, pair, run, monkeypatch, tmp_path):
    """For four protocols; and with a cache of features once for both splits."""
    from models.encoder import Encoder

    encoded = []
    images = Encoder.images
    monkeypatch.setattr(
        Encoder,
        "images",
        lambda self, paths, what: encoded.extend(paths) or images(self, paths, what),
    )
    cache = ["--feature-cache", tmp_path / "features"]
    run("validate", drawn, "--dataset", "CIRCO", *pair, *cache)
    run("circo_test_submission", drawn, *pair, *cache, "--submission-name", "x")
    (split,) = CIRCO(drawn).val()
    assert encoded == split.paths


def test_sheets_show_all_targets(measured, drawn, tmp_path):
    content = json.loads(measured["rankings"].read_text())["queries"]["unlabeled2017"]
    query = max(content, key=lambda query: len(query["other_targets"]))
    words = ["--rankings", measured["rankings"], "--queries", query["pair_id"], "--k", 4]
    words += ["--protocol", "original-removed-concept", "--data-root", drawn]
    visualize.main([*map(str, words), "--output-dir", str(tmp_path / "sheets")])
    page = (tmp_path / "sheets/sheet.html").read_text()
    found = query["protocols"]["original-removed-concept"]
    places = ", ".join(str(rank + 1) for rank in [found["rank"], *found["other_ranks"]])
    assert f"gallery: targets at ranks {places}<" in page
    assert page.count('<figure class="target"') == 1 + len(query["other_targets"])
    assert found["caption"] in page


def test_comparisons_have_intervals_of_every_metric(measured, drawn, pair, run, tmp_path, capsys):
    """And say where texts differ."""
    template = "a photo of {shared_concept} that {relative_caption}"
    other = tmp_path / "other.json"
    run(
        "validate",
        drawn,
        *["--dataset", "CIRCO", *pair, "--concept-template", template, "--metrics-json", other],
    )
    capsys.readouterr()
    compare.main([str(measured["result"]), str(other), "--resamples", "200"])
    tables = capsys.readouterr().out.split("CIRCO val, ")[1:]
    metrics = read_result(other)["metrics"]
    for table in tables:
        with_concept = table.startswith(("original-kept-concept", "original-removed-concept"))
        assert ("different text templates" in table) == with_concept
        for metric, title in CIRCO.titles.items():
            lines = [line for line in table.splitlines() if line.startswith(f"{title} ")]
            assert len(lines) == (metric in metrics)
            assert all("nan" not in line and "[" in line for line in lines)


@pytest.fixture
def submitted(run, drawn, pair):
    """Write CIRCO's file of a split."""

    def submitted(split: str = "test", *flags):
        words = ["--submission-name", "x", "--split", split, *flags]
        folder = run("circo_test_submission", drawn, *pair, *words, output="circo")
        return folder / ("" if split == "test" else split) / "x.json"

    return submitted


def printed(out: str) -> dict[str, float]:
    lines = [line.split(" = ") for line in out.splitlines() if " = " in line]
    return {name: float(value) for name, value in lines}


@pytest.mark.parametrize("protocol", [protocol.name for protocol in CIRCO.protocols])
def test_a_file_of_val_scores_as_validate_measures(
    protocol, submitted, check, measured, drawn, tmp_path
):
    file = submitted("val", "--protocol", protocol)
    content = json.loads(file.read_text())
    assert list(content) == [str(number) for number in range(8)]
    metrics = read_result(measured["result"])["protocols"][protocol]["metrics"]
    code, out = check(file, "--split", "val", "--metrics-json", tmp_path / "scores.json")
    assert code == 0
    assert printed(out) == pytest.approx(metrics)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert (written["dataset"], written["split"]) == ("CIRCO", "val")
    assert written["metrics"] == pytest.approx(metrics)
    official = official_metrics(content, annotations_of(drawn))
    assert written["metrics"] == pytest.approx(official, abs=0.005)


def as_texts(content, key):
    content[key] = [f"{image:012d}" for image in content[key]]


RULES = [
    (lambda c: c.pop("3"), "id 3: missing"),
    (lambda c: c.update({"8": c["3"]}), "id 8: not a query"),
    (lambda c: c.update({"x": c["3"]}), "id x: not a query"),
    (lambda c: c["3"].pop() and c["3"].pop(), "ids instead of"),
    (lambda c: c["3"].append(c["3"][0]), "occurs 2 times"),
    (lambda c: c["3"].__setitem__(0, 5), "id 3: 5 is not an image of unlabeled2017"),
    (lambda c: c["3"].__setitem__(0, "a"), "id 3: not a list of image ids"),
    (lambda c: c["3"].__setitem__(0, True), "id 3: not a list of image ids"),
    (lambda c: c["3"].__setitem__(0, 7.0), "id 3: not a list of image ids"),
    (lambda c: c["3"].__setitem__(0, "9" * 5000), "id 3: not a list of image ids"),
    (lambda c: c["3"].__setitem__(0, None), "id 3: not a list of image ids"),
    (lambda c: c.update({"3": "7"}), "id 3: not a list of image ids"),
    (lambda c: c.clear(), "id 0: missing"),
    (lambda c: as_texts(c, "3"), ""),
]


@pytest.mark.parametrize(("edit", "expected"), RULES)
def test_every_rule_of_circo(edit, expected, submitted, check, kept, tmp_path):
    if "submission" not in kept:
        kept["submission"] = submitted().read_text()
    file = tmp_path / "x.json"
    file.write_text(kept["submission"])
    change_json(file, edit)
    code, out = check(file)
    assert code == bool(expected)
    assert expected in out


def test_rankings_are_scored_as_they_were_measured(measured, check, tmp_path):
    result = read_result(measured["result"])
    scores = tmp_path / "scores.json"
    code, out = check(measured["rankings"], "--split", "val", "--metrics-json", scores)
    assert code == 0
    assert printed(out) == pytest.approx(result["metrics"])
    for name, metrics in json.loads(scores.read_text())["protocols"].items():
        assert metrics == pytest.approx(result["protocols"][name]["metrics"])
    code, out = check(measured["rankings"])
    assert code == 2
    assert "pass --split val" in out


@pytest.mark.parametrize(
    "field", ["pair_id", "reference", "target", "other_targets", "caption", "nearest", "kinds"]
)
def test_rankings_of_other_queries_are_not_scored(field, measured, check):
    """Each field of a query, changed without a contradiction within the file."""

    def edit(content):
        query = content["queries"]["unlabeled2017"][2]
        if field == "kinds":
            content["kinds"]["unlabeled2017"]["viewpoint"] = [0]
            ranked = _with_ranks(content)
            for name, of_protocol in content["protocols"].items():
                ranks = stored_ranks(ranked, name, "unlabeled2017")
                of_protocol["metrics"] = CIRCO(Path()).score(ranks)
            content["metrics"] = content["protocols"][content["protocol"]]["metrics"]
        elif field == "nearest":
            known = {query["target"], *query["other_targets"]}
            nearest = query["protocols"]["original-kept"]["nearest"]
            next(answer for answer in nearest if answer[0] not in known)[0] = "stranger"
        elif field == "target":
            rename(query, query["target"], "stranger")
        elif field == "other_targets":
            rename(query, query["other_targets"][0], "stranger")
        else:
            query[field] = 999 if field == "pair_id" else "stranger"

    def rename(query, old, new):
        query["target"] = new if query["target"] == old else query["target"]
        query["other_targets"] = [new if name == old else name for name in query["other_targets"]]
        for found in query["protocols"].values():
            for answer in found["nearest"]:
                answer[0] = new if answer[0] == old else answer[0]

    content = json.loads(measured["rankings"].read_text())
    if field == "other_targets" and not content["queries"]["unlabeled2017"][2]["other_targets"]:
        pytest.skip("the drawn query has one target")
    change_json(measured["rankings"], edit)
    code, out = check(measured["rankings"], "--split", "val")
    assert code == 1, out
    assert "from the annotations" in out or "is not an image of the split" in out


# Bad input


WRONG = [None, True, "x", -1, 0.5, [], {}, 10**30]


def keys_of(entry):
    """Paths to every value of an entry, of lists to each."""
    for key, value in entry.items():
        yield (key,)
        if isinstance(value, list):
            yield from ((key, place) for place in range(len(value)))


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_value_of_an_entry_is_checked(split, own_drawn):
    """Other types, ids that the gallery lacks, and keys that are missing, all in one line that names the entry."""
    file = own_drawn / f"circo_dataset/annotations/{split}.json"
    entries = json.loads(file.read_text())
    for number, path in enumerate(keys_of(entries[0])):
        value = entries[0][path[0]] if len(path) == 1 else entries[0][path[0]][path[1]]
        for wrong in WRONG if SOAK else [WRONG[number % len(WRONG)]]:
            is_same = type(wrong) is type(value) and isinstance(value, str | list)
            number_of_query = path == ("id",) and type(wrong) is int
            if (is_same and path[0] not in ("gt_img_ids", "semantic_aspects")) or number_of_query:
                continue
            if path == ("semantic_aspects",) and wrong == []:
                continue  # a query of no kind
            edited = copy.deepcopy(entries)
            if len(path) == 1:
                edited[0][path[0]] = wrong
            else:
                edited[0][path[0]][path[1]] = wrong
            file.write_text(json.dumps(edited))
            check_refused(own_drawn, split, "entry 0")
        if len(path) == 1:
            without = [{k: v for k, v in entries[0].items() if k != path[0]}, *entries[1:]]
            file.write_text(json.dumps(without))
            check_refused(own_drawn, split, "entry 0")


def check_refused(root, split: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        CIRCO(root).read(split)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    CASES["edited CIRCO annotations", "refused"] += 1


EDITS = [
    (
        lambda entries: entries[4].update(id=entries[1]["id"]),
        "entry 4: its id 1 is already used by entry 1",
    ),
    (
        lambda entries: entries[4]["gt_img_ids"].append(entries[4]["gt_img_ids"][0]),
        "should not repeat",
    ),
    (
        lambda entries: entries[4]["gt_img_ids"].append(entries[4]["reference_img_id"]),
        "its target is also its reference",
    ),
    (
        lambda entries: entries[4].update(target_img_id=entries[5]["target_img_id"]),
        "should include target_img_id",
    ),
    (
        lambda entries: entries[4]["semantic_aspects"].append("mood"),
        "semantic_aspects.",
    ),
    (lambda entries: entries.clear(), "no triplets"),
]


@pytest.mark.parametrize(("edit", "expected"), EDITS)
def test_entries_that_contradict_themselves(edit, expected, own_drawn):
    change_json(own_drawn / "circo_dataset/annotations/val.json", edit)
    check_refused(own_drawn, "val", expected)


IMAGES = "circo_dataset/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.pop("images"),
        lambda content: content.update(images={}),
        lambda content: content["images"][0].pop("id"),
        lambda content: content["images"][0].update(id="7"),
        lambda content: content["images"][0].pop("file_name"),
        lambda content: content["images"][0].update(file_name=7),
        lambda content: content["images"].append(content["images"][0]),
        lambda content: content["images"].insert(0, 7),
        lambda content: content["images"].clear(),
    ],
)
def test_lists_of_images_that_are_none(edit, own_drawn):
    change_json(own_drawn / IMAGES, edit)
    check_refused(own_drawn, "val", "circo_dataset")


def test_what_is_missing_is_said(own_drawn, pair, fails):
    (own_drawn / IMAGES).rename(own_drawn / "elsewhere.json")
    error = fails("validate", own_drawn, "--dataset", "CIRCO", *pair)
    assert "image_info_unlabeled2017.json" in error
    for door in ("clip_fine_tune", "combiner_train"):
        error = fails(door, own_drawn, "--dataset", "CIRCO")
        assert "--dataset CIRCO has no train split" in error


TEMPLATES = [
    "", "{shared_concept}", "{relative_caption}", "{} {shared_concept} {relative_caption}",
    "{shared_concept!r} {relative_caption}", "{shared_concept} {relative_caption} {x}",
    "{shared_concept} {shared_concept} {relative_caption}", "{{shared_concept}} {relative_caption}",
    "{shared_concept.__class__} {relative_caption}", "{shared_concept} {relative_caption} }",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_are_none(template, drawn, pair, fails):
    error = fails("validate", drawn, "--dataset", "CIRCO", *pair, "--concept-template", template)
    assert "--concept-template" in error


def test_a_template_of_a_benchmark_without_concepts(drawn, pair, fails):
    flags = ["--concept-template", CIRCO.concept_template]
    assert "remove --concept-template" in fails(
        "validate", drawn, "--dataset", "CIRR", *pair, *flags
    )
