"""Numbers that should not be: of edited results and rankings, of queries there twice, of other images and weights.

The cases are made from the rule: every field of a real file, every key that holds an id, every split.
"""

import copy
import itertools
import json
import logging
import math
import shutil
import string
from pathlib import Path

import pytest
import torch

import check_dataset
import compare
from benchmarks import BENCHMARKS, CIRR, FashionIQ, GeneCIS, LaSCo, Split, Triplet, Triplets
from benchmarks.dataset_report import lacks_words
from benchmarks.exclusions import read_exclusions
from benchmarks.protocols import ORIGINAL_KEPT
from conftest import CASES, SOAK
from evaluation.rankings_file import read_rankings
from evaluation.result_file import read_result
from evaluation.retrieval import evaluate, rank_all
from models.features import FrozenSplit
from test_bad_input import change_json, dump, load
from test_protocols import golden_pair
from utils import UserError

READERS = {"result": read_result, "rankings": read_rankings}
SPLITS = [
    (kind, part, split)
    for kind in BENCHMARKS.values()
    for part in kind.parts
    for split in kind(Path()).splits.values()
]
# Lists of names; those of the others are in test_lasco.py and test_genecis.py.
LISTS = [where for where in SPLITS if where[0] not in (LaSCo, GeneCIS)]


# Results and rankings


@pytest.fixture(scope="module")
def files() -> dict[str, dict]:
    """What `whole` has measured for several tests."""
    return {}


@pytest.fixture
def whole(files, golden, drawn, run, tmp_path):
    """Dataset -> a golden pair's result and rankings of drawn data, parsed."""

    def whole(dataset: str) -> dict[str, dict]:
        if dataset not in files:
            flags = ["--dataset", dataset, *golden_pair(golden, dataset), "--rankings-k", 4]
            paths = {kind: tmp_path / f"whole {kind}.json" for kind in READERS}
            outputs = ["--metrics-json", paths["result"], "--rankings", paths["rankings"]]
            run("validate", drawn, *flags, *outputs)
            files[dataset] = {kind: json.loads(path.read_text()) for kind, path in paths.items()}
        return files[dataset]

    return whole


@pytest.fixture
def read(tmp_path):
    """Read a result or rankings of some content; returns what it is refused with, or ""."""

    def read(kind: str, content: object) -> str:
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps(content))
        try:
            READERS[kind](file)
        except UserError as error:
            assert str(error).startswith(f"{file}: ")
            assert "evaluate again" in str(error)
            assert len(str(error).splitlines()) == 1
            CASES[f"edited {kind}", "refused"] += 1
            return str(error)
        CASES[f"edited {kind}", "read"] += 1
        return ""

    return read


def places(content, path=()):
    """Paths to every field, of lists to the first entry alone; the settings of a training are not of this file."""
    keys = list(content) if isinstance(content, dict) else range(min(1, len(content)))
    for key in keys:
        yield (*path, key)
        inner = content[key]
        if isinstance(inner, dict | list) and path[:1] != ("training",):
            yield from places(inner, (*path, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def put(content, path, value):
    """A copy with another value at a path."""
    content = copy.copy(content)
    if not path:
        return value
    content[path[0]] = put(content[path[0]], path[1:], value)
    return content


def wrong_kinds(value):
    """Values that cannot stand where this one does."""
    kinds = [None, True, "x", 3, 0.5, -1, [], {}, [1], {"a": 1}, math.nan, math.inf, 2**40]
    if value is None:
        return [kind for kind in kinds if kind is not None]
    if isinstance(value, str):
        return [kind for kind in kinds if not isinstance(kind, str)]
    if isinstance(value, dict | list):
        return [kind for kind in kinds if not isinstance(kind, type(value))]
    if isinstance(value, float):
        return [None, True, "x", [], {}, math.nan, math.inf, -math.inf, -1e9, 1e9]
    return [kind for kind in kinds if kind != 3]


UNLIMITED = {"target_ratio", "pair_id"}  # numbers that a benchmark and a flag leave free


@pytest.mark.parametrize("kind", READERS)
def test_every_field_refuses_every_other_kind_of_value(kind, whole, read):
    """A field of CIRR's files, which have all that there is; the message names it."""
    content = whole("CIRR")[kind]
    assert read(kind, content) == ""
    for path in places(content):
        value = at(content, path)
        for wrong in wrong_kinds(value)[:: 1 if SOAK else 5]:
            if path[-1] in UNLIMITED and isinstance(wrong, int | float) and math.isfinite(wrong):
                continue
            if path[-1] == "pair_id" and isinstance(wrong, str | None):
                continue  # other benchmarks have texts, or none
            error = read(kind, put(content, path, wrong))
            assert error, f"{path} = {wrong!r} was read"
            assert ".".join(map(str, path)) in error, error


@pytest.mark.parametrize("dataset", BENCHMARKS)
@pytest.mark.parametrize("kind", READERS)
def test_metrics_are_those_of_the_ranks(kind, dataset, whole, read):
    """One line with the metric and both values; also where one is missing, or is none of the benchmark."""
    content = whole(dataset)[kind]
    assert read(kind, content) == ""
    name = content["protocol"]
    for path in (("metrics",), ("protocols", name, "metrics")):
        metrics = at(content, path)
        metric, value = next(iter(metrics.items()))
        moved = value + 1 if value < 50 else value - 1
        error = read(kind, put(content, (*path, metric), moved))
        field = ".".join((*path, metric))
        assert f"{field}: {moved} in the file, but {value} from its ranks: evaluate again" in error
        without = {other: value for other, value in metrics.items() if other != metric}
        assert f"{field}: None in the file" in read(kind, put(content, path, without))
        strange = put(content, path, {**metrics, "mean of all": 50.0})
        assert "mean of all: 50.0 in the file, but None" in read(kind, strange)


@pytest.mark.parametrize("kind", READERS)
def test_no_field_may_be_missing(kind, whole, read):
    content = whole("CIRR")[kind]
    for name in content:
        without = {key: value for key, value in content.items() if key != name}
        assert f"{name}: field required" in read(kind, without)


def test_every_query_has_a_cluster(whole, read):
    content = whole("FashionIQ")["result"]
    numbers = content["clusters"]["dress"]["reference"]
    for edited in ({}, {"reference": numbers[1:]}, {"reference": numbers, "kind": [0]}):
        error = read("result", put(content, ("clusters", "dress"), edited))
        assert "clusters.dress: not a number for each query" in error


@pytest.mark.parametrize("kind", READERS)
def test_files_whose_parts_are_of_other_files(kind, whole, read):
    """Of another benchmark, and without some of the ranks."""
    content = whole("FashionIQ")[kind]
    name = content["protocol"]
    edits = [(("dataset",), "Fashion200k"), (("dataset",), "CIRR")]
    if kind == "result":
        ranks = content["protocols"][name]["ranks"]
        edits += [
            (("protocols", name, "ranks"), {"dress": ranks["dress"]}),
            (("protocols", name, "ranks", "dress"), []),
            (("protocols", name, "ranks", "dress"), [5000] * len(ranks["dress"])),
        ]
    else:
        queries = content["queries"]["dress"]
        one_protocol = {name: queries[0]["protocols"][name]}
        edits += [
            (("queries",), {"dress": queries}),
            (("queries", "dress", 0, "protocols"), one_protocol),
        ]
    for path, value in edits:
        assert read(kind, put(content, path, value)), path


# Annotations


LEADING_AWAY = [
    "../x",
    "a/../../x",
    "..",
    "a/..",
    "..\\x",
    "a\\..\\x",
    "/etc/x",
    "\\x",
    "C:x",
    "a\0",
]


def one_in_turn(cases: list, number: int) -> list:
    """All of some cases in `make soak`, else one: the next for each number."""
    return cases if SOAK else [cases[number % len(cases)]]


def id_list(kind, root: Path, part: str, split: str) -> Path:
    return kind(root).files(part, split)[1]


@pytest.mark.parametrize(("kind", "part", "split"), LISTS)
def test_names_and_places_stay_in_the_dataset(kind, part, split, own_drawn):
    file = id_list(kind, own_drawn, part, split)
    content = load(file)
    for away in one_in_turn(LEADING_AWAY, SPLITS.index((kind, part, split))):
        if isinstance(content, list):
            changed = [[away, *content[1:]]]
        elif "images" in content:
            changed = [put(content, ("images", 0, "file_name"), away)]
        else:
            first = next(iter(content))
            changed = [{**content, first: away}, {**content, away: content[first]}]
        for listed in changed:
            dump(file, listed)
            with pytest.raises(UserError) as error:
                kind(own_drawn).read_part(part, split)
            assert str(error.value).startswith(f"{file}: the image ")
            assert len(str(error.value).splitlines()) == 1
            CASES["edited annotations", "refused"] += 1
    dump(file, content)
    kind(own_drawn).read_part(part, split)
    CASES["edited annotations", "read"] += 1


def paths_to_ids(entry, known, path=()):
    """Where an entry of a captions file names images."""
    for key in entry if isinstance(entry, dict) else range(len(entry)):
        if isinstance(entry[key], dict | list):
            yield from paths_to_ids(entry[key], known, (*path, key))
        elif entry[key] in known:
            yield (*path, key)


@pytest.mark.parametrize(("kind", "part", "split"), LISTS)
def test_entries_name_images_of_the_list(kind, part, split, own_drawn):
    """Wherever an entry names an image; of CIRR's groups those of evaluations, for a training does not read them."""
    captions, images = kind(own_drawn).files(part, split)
    content = load(captions)
    known = load(images)
    strangers = LEADING_AWAY
    if "images" in known:
        known = [image["id"] for image in known["images"]]
        strangers = [max(known) + 1, -1, LEADING_AWAY[0]]
    paths = list(paths_to_ids(content[0], set(known)))
    read = [path for path in paths if split != kind.train_split or path[0] != "img_set"]
    assert read
    for path in read:
        for away in one_in_turn(strangers, SPLITS.index((kind, part, split))):
            dump(captions, [put(content[0], path, away), *content[1:]])
            with pytest.raises(UserError, match=r"entry 0|line 1"):
                kind(own_drawn).read_part(part, split)
            CASES["edited annotations", "refused"] += 1


@pytest.mark.parametrize(("kind", "part", "split"), SPLITS)
def test_a_file_may_be_no_link_out_of_the_dataset(kind, part, split, own_drawn, tmp_path):
    """A link within the dataset is good, whole folders may be links, and what such a folder links within itself."""
    image = kind(own_drawn).read_part(part, split).paths[0]
    outside = shutil.move(image, tmp_path / "private.png")
    image.symlink_to(outside)
    with pytest.raises(UserError, match="link its whole folder"):
        kind(own_drawn).read_part(part, split)
    outside.unlink()
    with pytest.raises(UserError, match="link its whole folder"):
        kind(own_drawn).read_part(part, split)
    image.unlink()
    image.symlink_to(own_drawn / "elsewhere.png")
    kind(own_drawn).read_part(part, split)
    folder = image.parent
    moved = shutil.move(folder, tmp_path / "photos")
    folder.symlink_to(moved)
    image.unlink()
    image.symlink_to("another.png")
    kind(own_drawn).read_part(part, split)
    CASES["links in datasets", "tried"] += 4


@pytest.mark.parametrize("linked", [False, True])
def test_full_paths_below_the_data_root_are_good(linked, own_drawn, tmp_path):
    """Also where the data root is a link, and the paths are those of the folder itself."""
    root = tmp_path / "link" if linked else own_drawn
    if linked:
        root.symlink_to(own_drawn)
    before = CIRR(root).val()[0].paths

    def in_full(places):
        for name, place in places.items():
            places[name] = str(own_drawn / "cirr_dataset" / place)

    change_json(id_list(CIRR, own_drawn, "rc2", "val"), in_full)
    after = CIRR(root).val()[0].paths
    assert [path.resolve() for path in after] == [path.resolve() for path in before]


@pytest.mark.parametrize("split", [CIRR.train_split, CIRR.val_split, CIRR.test_split])
def test_a_pair_id_is_one_query(split, own_drawn):
    captions, _ = CIRR(own_drawn).files("rc2", split)
    change_json(captions, lambda entries: entries[5].update(pairid=entries[2]["pairid"]))
    with pytest.raises(
        UserError, match=r"entry 5: its pairid \d+ is already used by entry 2"
    ) as error:
        CIRR(own_drawn).read_part("rc2", split)
    assert str(captions) in str(error.value)


@pytest.mark.parametrize("wrong", [None, True, 3, 0.5, [], {}])
def test_a_reason_that_is_no_text_is_named(wrong, tmp_path):
    (tmp_path / "list.json").write_text(
        json.dumps({"dataset": "CIRR", "images": {"good": "missing", "bad": wrong}})
    )
    with pytest.raises(
        UserError,
        match=r"--exclusions: .*list\.json: images\.bad: .*write it with check_dataset\.py",
    ):
        read_exclusions(tmp_path / "list.json", "CIRR")


@pytest.fixture
def findings(capsys):
    """What check_dataset finds, and what it notes, with the ids."""

    def findings(root: Path, dataset: str, level: str = "finding") -> list[str]:
        words = ["--data-root", root, "--dataset", dataset, "--unofficial", "--num-workers", 0]
        capsys.readouterr()
        try:
            check_dataset.main(list(map(str, [*words, "--json"])))
        except SystemExit as stop:
            assert stop.code == 1
        (report,) = json.loads(capsys.readouterr().out)
        of_level = [remark for remark in report["remarks"] if remark["level"] == level]
        return [f"{r['where']}: {r['text']} {' '.join(r['ids'])}" for r in of_level]

    return findings


@pytest.mark.parametrize(("kind", "split"), [(k, s) for k, p, s in SPLITS if p == k.parts[0]])
def test_a_triplet_that_is_there_twice(kind, split, own_drawn, findings):
    """A finding where it is counted; a secret target may be another one."""
    captions, _ = kind(own_drawn).files(kind.parts[0], split)

    def again(entries):
        entries.append({**entries[3], "pairid": 987_654, "id": 987_654})
        if "captions" in entries[-1]:
            entries[-1]["captions"] = entries[-1]["captions"][::-1]

    change_json(captions, again)
    number = len(load(captions)) - 1
    level = "note" if split == kind.test_split else "finding"
    (found,) = [text for text in findings(own_drawn, kind.name, level) if "entries 3" in text]
    assert found.startswith(f"{kind.parts[0]} {split}: 1 ")
    assert f"entries 3 and {number}" in found


WORDLESS = [
    *string.punctuation,
    " ",
    "\t",
    "\u200b",
    "\u00a0",
    "...",
    "?!",
    " , .",
    "\u3002",
    "\u0301",
]
CAPTIONS = {"caption", "relative_caption", "shared_concept", "query-text", "condition"}
WORDS = ["a", "7", "is red.", "\u7ea2", "\U0001f534", "\u00e9"]


@pytest.mark.parametrize(("kind", "split"), [(k, s) for k, p, s in SPLITS if p == k.parts[0]])
def test_captions_without_a_word(kind, split, own_drawn, findings):
    """As many queries at a time as the split has."""
    captions, _ = kind(own_drawn).files(kind.parts[0], split)
    entries = load(captions)
    # Your own are refused where they are empty.
    wordless = [text for text in WORDLESS if text.strip() or kind is not Triplets]
    for first in range(0, len(wordless), len(entries)):
        said = wordless[first : first + len(entries)]
        for entry, caption in itertools.zip_longest(entries, said, fillvalue="is red"):
            for key in CAPTIONS & entry.keys():
                entry[key] = caption
            if "captions" in entry:
                entry["captions"] = [caption, caption]
        dump(captions, entries)
        (found,) = findings(own_drawn, kind.name)
        assert found.startswith(f"{split}: {len(said)} queries have a caption of only punctuation")


@pytest.mark.parametrize("caption", WORDS)
def test_captions_with_a_word(caption):
    assert not lacks_words(Triplet(reference="a", captions=(caption, caption)))


@pytest.mark.parametrize("captions", [("...", "is red"), ("is red", "?")])
def test_a_caption_of_punctuation_beside_another(captions, own_drawn, findings):
    """Half of the query is stripped off. That of the official file is known, and so a note."""
    file, images = FashionIQ(own_drawn).files("dress", "train")
    change_json(file, lambda entries: entries[0].update(captions=list(captions)))
    (found,) = findings(own_drawn, "FashionIQ")
    assert found.startswith("train: 1 queries have a caption of only punctuation")
    known = {"candidate": "B004ECJWVI", "target": "B006MW3CTG"}
    folder = own_drawn / "fashionIQ_dataset/images"
    entry = json.loads(file.read_text())[0]
    for key, name in known.items():
        shutil.copy(folder / f"{entry[key]}.jpg", folder / f"{name}.jpg")
        change_json(images, lambda names, old=entry[key], new=name: names.append(new))
    change_json(file, lambda entries: entries[0].update(known))
    assert "of only punctuation" not in " ".join(findings(own_drawn, "FashionIQ"))
    assert "of only punctuation" in " ".join(findings(own_drawn, "FashionIQ", "note"))


# Weights of another benchmark, and weights that tell nothing apart


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_weights_of_another_benchmark_are_said(
    dataset, golden, drawn, run, tmp_path, caplog, capsys
):
    """Both files in one line, the result says it, and the comparison."""
    other = "CIRR" if dataset != "CIRR" else "FashionIQ"
    flags = ["--dataset", dataset, "--clip-model-name", golden / "clip_vit.pt"]
    flags += ["--combining-function", "combiner", "--metrics-json", tmp_path / "r.json"]
    for flag, name in (
        ("--clip-model-path", "tuned_clip_vit"),
        ("--combiner-path", "combiner_moe_cirr"),
    ):
        content = torch.load(golden / f"{name}.pt", weights_only=True)
        content["config"] = trained_on(other)
        torch.save(content, tmp_path / f"{name}.pt")
        flags += [flag, tmp_path / f"{name}.pt"]
    run("validate", drawn, *flags)
    (warning,) = [record.getMessage() for record in caplog.records if other in record.getMessage()]
    assert warning.count(f"was trained on {other}") == 2
    assert warning.endswith(f"but is used on {dataset}")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["trained_on"] == {"clip": other, "combiner": other}
    compare.main([str(tmp_path / "r.json")])
    out = capsys.readouterr().out
    assert f"r: its combiner was trained on {other}, but evaluated on {dataset}" in out
    assert f"r: its clip was trained on {other}" in out


def trained_on(dataset: str) -> dict:
    """Settings of a training on a dataset."""
    return {"flags": {"dataset": dataset}, "recipe": {}, "data": {}, "versions": {}}


def clip_of(drawn: Path, folder: Path, dataset: str | None = None, collapsed: bool = False) -> list:
    """Flags for a tiny CLIP whose fine-tuned weights say what they learned; collapsed ones see no image."""
    state = torch.load(drawn / "tiny_clip_vit.pt", weights_only=True)
    if collapsed:
        state["visual.ln_post.weight"] *= 0
        state["visual.ln_post.bias"] += 1
    config = {} if dataset is None else trained_on(dataset)
    torch.save({"CLIP": state, "config": config}, folder / "tuned.pt")
    tuned = ["--clip-model-path", folder / "tuned.pt"]
    return ["--clip-model-name", drawn / "tiny_clip_vit.pt", *tuned]


def test_a_training_on_weights_of_another_benchmark(stage_2, drawn, tmp_path, caplog):
    stage_2("CIRR", *clip_of(drawn, tmp_path, "FashionIQ"), "--num-epochs", 1)
    assert caplog.text.count("was trained on FashionIQ, but is used on CIRR") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["validate", "--dataset", "CIRR"],
        ["validate", "--dataset", "FashionIQ"],
        ["cirr_test_submission", "--submission-name", "x"],
        ["fashioniq_test_submission", "--submission-name", "x"],
    ],
)
def test_results_of_collapsed_weights_are_refused(words, drawn, fails, tmp_path):
    door, *flags = words
    flags += ["--combining-function", "sum", *clip_of(drawn, tmp_path, collapsed=True)]
    assert "every image is equally similar to every query" in fails(door, drawn, *flags)
    assert not (tmp_path / "out").exists()


def frozen(images: torch.Tensor) -> FrozenSplit:
    """Queries for each of some images, whose texts are the features of the next one."""
    names = [f"i{number}" for number in range(len(images))]
    triplets = []
    for number, name in enumerate(names):
        triplets.append(Triplet(reference=name, captions=("",), target=names[number - 1]))
    split = Split(name="dress", triplets=triplets, image_paths=dict.fromkeys(names, Path()))
    return FrozenSplit(split=split, images=images, captions=images.roll(1, 0)[:, None])


def add(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(image + text, dim=-1)


NOISE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
COLLAPSED = {
    "all features equal": torch.ones(6, 8),
    "equal but for rounding": torch.ones(6, 8) + 1e-7 * NOISE,
    "no features": torch.zeros(6, 8),
    "of other lengths": torch.ones(6, 8) * torch.arange(1, 7)[:, None],
}


@pytest.mark.parametrize("name", COLLAPSED)
@pytest.mark.parametrize("block", [1, 4, None])
def test_weights_that_tell_nothing_apart(name, block, caplog):
    """Refused where it would be a result; a warning in a training, once for each split."""
    splits = [frozen(COLLAPSED[name])]
    with pytest.raises(UserError, match="dress: every image is equally similar"):
        rank_all(splits, add, [ORIGINAL_KEPT], k=3, block=block)
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(FashionIQ(Path()), splits, add, block=block)
    assert "average_recall" in metrics
    assert caplog.text.count("every image is equally similar") == 1


@pytest.mark.parametrize("block", [1, 4, None])
def test_ties_are_no_collapse(block, caplog):
    """Galleries of one and two images, copies, and one query that is equally near to all."""
    copies = NOISE.clone()
    copies[1:5] = copies[1]
    one_flat = NOISE.clone()
    one_flat[0] = -one_flat[5]
    for images in (torch.ones(2, 8), copies, one_flat):
        rank_all([frozen(images)], add, [ORIGINAL_KEPT], k=1, block=block)
        evaluate(FashionIQ(Path()), [frozen(images)], add, block=block)
    assert "equally similar" not in caplog.text
