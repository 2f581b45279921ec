"""Four protocols from one ranking, and results that say what they are."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import CIRR, PROTOCOLS, FashionIQ, Split, Triplet, Triplets
from benchmarks.protocols import VAL_REMOVED
from conftest import SOAK, read_csv
from evaluation.result_file import read_result
from evaluation.retrieval import rank
from models.configuration import Settings
from models.features import FrozenSplit
from runtime.files import find_checkpoint
from runtime.tensors import load_tensors
from test_golden import golden_split_similarity
from twins import protocol_rankings, ranked_names
from utils import UserError, flag

ORDER = ["original-kept", "original-removed", "VAL-removed", "VAL-kept"]


def golden_pair(golden: Path, dataset: str) -> list:
    """Flags of the golden pair for FashionIQ, or of that for CIRR."""
    name = "combiner_moe_fiq.pt" if dataset == "FashionIQ" else "combiner_moe_cirr.pt"
    combiner = ["--combining-function", "combiner", "--combiner-path", golden / name]
    tuned = ["--clip-model-path", golden / "tuned_clip_vit.pt"]
    return ["--clip-model-name", golden / "clip_vit.pt", *tuned, *combiner]


@pytest.fixture
def measured(golden, run, tmp_path):
    """The result of validate.py, by default of a golden pair on golden data, and its rankings."""

    def measured(dataset, *flags, root=golden, name="r"):
        flags = flags or golden_pair(golden, dataset)
        files = [tmp_path / f"{name}.json", tmp_path / f"{name}-rankings.json"]
        outputs = ["--metrics-json", files[0], "--rankings", files[1]]
        run("validate", root, "--dataset", dataset, *flags, *outputs)
        return tuple(json.loads(file.read_text()) for file in files)

    return measured


@pytest.fixture(scope="module")
def kept() -> dict:
    """What was measured or trained once for several tests."""
    return {}


@pytest.fixture
def unchanged(kept, measured, drawn, tmp_path) -> str:
    """A result of FashionIQ."""
    if "result" not in kept:
        measured("FashionIQ", *sum_of(drawn), root=drawn, name="unchanged")
        kept["result"] = (tmp_path / "unchanged.json").read_text()
    return kept["result"]


@pytest.fixture
def trained(kept, stage_2) -> dict:
    """The content of a checkpoint of one expert per query, of images padded to squares."""
    if "checkpoint" not in kept:
        flags = ["--num-epochs", 1, "--top-k", 1, "--transform", "squarepad", "--save-best"]
        folder = stage_2("CIRR", *flags)
        file = find_checkpoint("--combiner-path", folder / "saved_models/combiner_arithmetic")
        kept["checkpoint"] = load_tensors(file)
    return kept["checkpoint"]


def sum_of(drawn: Path) -> list:
    """Flags of the sum of a tiny CLIP's features."""
    return ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combining-function", "sum"]


def test_the_four_protocols_equal_brute_force_on_golden_data(golden, measured):
    """By sorted lists of names, of what validate.py writes: metrics, ranks, sizes, and the answers of every query."""
    result, rankings = measured("FashionIQ")
    assert list(result["protocols"]) == ORDER
    benchmark = FashionIQ(golden)
    for split in benchmark.val():
        similarity = golden_split_similarity(golden, split, benchmark, "combiner_moe_fiq.pt")
        for protocol in ORDER:
            found = result["protocols"][protocol]
            lists = protocol_rankings(similarity, split, found["gallery"], found["reference"])
            places = [names.index(t.target) for names, t in zip(lists, split.triplets, strict=True)]
            assert found["ranks"][split.name] == places
            for k in (10, 50):
                recall = 100 * sum(place < k for place in places) / len(places)
                assert found["metrics"][f"{split.name}_recall_at{k}"] == pytest.approx(recall)
            kept = found["reference"] == "kept"
            assert found["gallery_images"][split.name] == len(lists[0]) + (not kept)
            assert found["queries"][split.name] == len(split.triplets)
            for query, names in zip(rankings["queries"][split.name], lists, strict=True):
                stored = query["protocols"][protocol]
                assert [name for name, _ in stored["nearest"]] == names[:50]
                assert stored["rank"] == names.index(query["target"])


SOME = settings(max_examples=300 if SOAK else 30)


@st.composite
def datasets(draw):
    """A split of a few images and triplets with many equal similarities."""
    names = [f"i{n}" for n in range(draw(st.integers(3, 14)))]
    pairs = draw(
        st.lists(st.permutations(names).map(lambda order: order[:2]), min_size=1, max_size=6)
    )
    split = Split(
        name="val",
        triplets=[Triplet(reference=r, captions=("",), target=t) for r, t in pairs],
        image_paths=dict.fromkeys(names),
    )
    cells = st.integers(-2, 2)
    values = draw(
        st.lists(cells, min_size=len(names) * len(pairs), max_size=len(names) * len(pairs))
    )
    return split, torch.tensor(values, dtype=torch.float32).view(len(pairs), len(names))


@SOME
@given(datasets(), st.integers(0, 15), st.integers(1, 4))
def test_protocols_equal_brute_force_on_any_dataset(dataset, k, block):
    """Images are axes, so that a query's features are its similarities."""
    split, similarity = dataset
    frozen = FrozenSplit(
        split=split, images=torch.eye(len(split.names)), captions=similarity[:, None]
    )
    with_captions = [protocol for protocol in PROTOCOLS.values() if not protocol.text]
    found = rank(frozen, lambda image, text: text, with_captions, k=k, block=block)
    for protocol, ranking in found.items():
        lists = protocol_rankings(similarity, split, protocol.gallery, protocol.reference)
        assert ranking.ranks.tolist() == [
            n.index(t.target) for n, t in zip(lists, split.triplets, strict=True)
        ]
        nearest = ranking.results(split.names)
        assert [[name for name, _ in row] for row in nearest] == [names[:k] for names in lists]
        alone = rank(frozen, lambda image, text: text, [protocol])[
            protocol
        ]  # the block is not copied then
        assert torch.equal(alone.ranks, ranking.ranks)


@SOME
@given(datasets(), st.integers(1, 6))
def test_what_is_certain_is_what_no_ranking_changes(dataset, group_size):
    """Each recall is certain just where the target is found even when it is the farthest of all images."""
    split, _ = dataset
    triplets = []
    for triplet in split.triplets:
        others = [name for name in split.names if name not in triplet.images][:group_size]
        triplets.append(dataclasses.replace(triplet, group=(*triplet.images, *others)))
    split = dataclasses.replace(split, triplets=triplets)
    similarity = torch.zeros(len(triplets), len(split.names))
    similarity[range(len(triplets)), split.target_rows] = -1
    frozen = FrozenSplit(
        split=split, images=torch.eye(len(split.names)), captions=similarity[:, None]
    )
    for protocol in Triplets.protocols:
        last = rank(frozen, lambda image, text: text, [protocol])[protocol]
        scores = Triplets(Path()).score(last.ranks_in(split))
        certain = [name for name, score in scores.items() if score == 100]
        assert Triplets(Path()).certain([split], protocol) == {"val": certain}


@pytest.mark.parametrize("says", [(), ("top_k",), ("top_k", "transform", "clip_model_name")])
@pytest.mark.parametrize("flags", [[], ["--top-k", 1], ["--top-k", 1, "--transform", "squarepad"]])
def test_what_is_assumed_of_weights_is_said(says, flags, drawn, trained, run, tmp_path, caplog):
    """In one line, and in the result; where weights or flags tell all, with the numbers of what they tell."""
    table = Settings.read(trained["config"]).table
    bare = {"Combiner": trained["Combiner"]}
    if says:
        told = {name: table[name] for name in says}
        flags_told = {name: told.pop(name) for name in says if name == "top_k"}
        bare["config"] = {"flags": flags_told, "recipe": told, "data": {}, "versions": {}}
    torch.save(bare, tmp_path / "bare.pt")
    words = ["--combining-function", "combiner", "--combiner-path", tmp_path / "bare.pt", *flags]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    caplog.clear()
    run("validate", drawn, "--dataset", "CIRR", *words, "--metrics-json", tmp_path / "r.json")
    said = [line for line in caplog.messages if "assumed" in line]
    assumed = read_result(tmp_path / "r.json")["assumed"]
    typed = {str(word).removeprefix("--").replace("-", "_") for word in flags}
    of_old = {"decode": "full", "encode_precision": "fp32", "background": "original"}
    of_old = {} if says else of_old
    defaults = {"top_k": 2, "transform": "targetpad", "target_ratio": 1.25, **of_old}
    told = {*typed, *says, *({"target_ratio"} if "transform" in {*typed, *says} else ())}
    assert assumed == {name: value for name, value in defaults.items() if name not in told}
    assert len(said) == bool(assumed)
    for name in assumed:
        assert f"{name} {assumed[name]}" in said[0]
        assert flag(name) in said[0]
    if not {"top_k", "transform"} & assumed.keys():
        torch.save(trained, tmp_path / "trained.pt")
        run("validate", drawn, "--dataset", "CIRR", *words[:2], "--combiner-path", tmp_path / "trained.pt",
            "--metrics-json", tmp_path / "own.json")  # fmt: skip
        own = read_result(tmp_path / "own.json")
        assert own["assumed"] == {}
        assert own["protocols"] == read_result(tmp_path / "r.json")["protocols"]


def test_a_recall_of_a_gallery_that_is_too_small_is_said(drawn, run, tmp_path, caplog):
    """The drawn CIRR has 18 images; its references are no answers."""
    result = tmp_path / "r.json"
    run("validate", drawn, "--dataset", "CIRR", *sum_of(drawn), "--metrics-json", result)
    (said,) = [line for line in caplog.messages if "always 100" in line]
    assert "recall_at50 of val under original-removed" in said
    measured = read_result(result)["protocols"]["original-removed"]
    assert measured["certain"] == {"val": ["recall_at50"]}
    assert measured["metrics"]["recall_at50"] == 100


def test_cirr_has_its_own_protocol_and_its_groups(golden, measured):
    result, rankings = measured("CIRR")
    assert list(result["protocols"]) == ["original-removed"]
    benchmark = CIRR(golden)
    (split,) = benchmark.val()
    similarity = golden_split_similarity(golden, split, benchmark, "combiner_moe_cirr.pt")
    for values, triplet, query in zip(
        similarity.tolist(), split.triplets, rankings["queries"]["val"], strict=True
    ):
        names = ranked_names(values, split.names, set(triplet.group) - {triplet.reference})
        assert [name for name, _ in query["in_group"]["nearest"]] == names
        assert query["in_group"]["rank"] == names.index(triplet.target)
    metrics = result["metrics"]
    assert metrics["mean(R@5+R_s@1)"] == (metrics["recall_at5"] + metrics["group_recall_at1"]) / 2


def test_a_result_says_what_it_is(golden, measured, tmp_path):
    result, rankings = measured("FashionIQ", name="said")
    assert result["metrics"] == result["protocols"]["original-kept"]["metrics"]
    assert (result["dataset"], result["split"], result["protocol"]) == (
        "FashionIQ",
        "val",
        "original-kept",
    )
    assert result["preprocessing"] == {
        "transform": "targetpad",
        "target_ratio": 1.25,
        "resolution": 64,
    }
    assert {"python", "torch", "torchvision", "pillow"} <= set(result["versions"])
    assert f"--metrics-json {tmp_path}/said.json" in result["command"]
    assert result["date"].startswith("20")
    assert all(len(digest) == 64 for digest in result["weights_sha256"].values())
    assert set(result["weights_sha256"]) == {"clip", "combiner"}
    assert result["checkpoints"]["combiner"] == str(golden / "combiner_moe_fiq.pt")
    assert result["excluded_images"] == {"dress": {}, "toptee": {}, "shirt": {}}
    without_ranks = {
        name: {k: v for k, v in m.items() if "ranks" not in k}
        for name, m in result["protocols"].items()
    }
    result.pop("clusters")  # which the queries of rankings tell
    assert {k: v for k, v in rankings.items() if k != "queries"} == result | {
        "protocols": without_ranks
    }


def test_other_images_and_weights_have_other_digests(own_images, measured):
    flags = sum_of(own_images)
    first, _ = measured("CIRR", *flags, root=own_images)
    again, _ = measured("CIRR", *flags, root=own_images)
    assert first["images_sha256"] == again["images_sha256"]
    file = own_images / "cirr_dataset/dev/dev-0-0-img0.png"
    file.write_bytes((own_images / "cirr_dataset/dev/dev-0-0-img1.png").read_bytes())
    other, _ = measured("CIRR", *flags, root=own_images)
    assert other["images_sha256"] != first["images_sha256"]
    assert other["queries_sha256"] == first["queries_sha256"]
    flags[1] = own_images / "tiny_clip_resnet.pt"
    assert measured("CIRR", *flags, root=own_images)[0]["weights_sha256"] != first["weights_sha256"]


def test_a_protocol_can_be_chosen(drawn, measured, capsys, fails):
    chosen = ["--protocol", "val-KEPT", "val-removed"]
    result, _ = measured("FashionIQ", *sum_of(drawn), *chosen, root=drawn)
    assert list(result["protocols"]) == ["VAL-removed", "VAL-kept"]
    assert result["protocol"] == "VAL-removed"
    out = capsys.readouterr().out
    assert f"average_recall = {result['metrics']['average_recall']}" in out
    assert "original" not in out
    wrong = [*sum_of(drawn), "--protocol", "VAL-kept"]
    error = fails("validate", drawn, "--dataset", "CIRR", *wrong)
    assert "--protocol VAL-kept does not exist for CIRR: choose from original-removed" in error


def test_the_table_has_all_protocols_and_the_lines_the_first(drawn, run, capsys):
    run("validate", drawn, "--dataset", "FashionIQ", *sum_of(drawn))
    lines, table = capsys.readouterr().out.split("\n\n")
    assert len(lines.splitlines()) == 9
    assert [line.split()[0] for line in table.splitlines()[1:]] == ORDER
    value = next(line for line in lines.splitlines() if line.startswith("average_recall = ")).split(
        " = "
    )[1]
    assert table.splitlines()[1].split()[-1] == f"{float(value):.2f}"


@pytest.mark.slow
def test_csv_files_have_the_originals_protocol_alone(stage_1, golden, measured):
    folder = stage_1("FashionIQ", "--num-epochs", 1, data_root=golden)
    weights = folder / "saved_models" / "tuned_clip_0"
    result, _ = measured("FashionIQ", "--combining-function", "sum", "--clip-model-path", weights)
    history = read_csv(folder / "validation_metrics.csv")
    last = {name: values[0] for name, values in history.items() if name != "epoch"}
    assert last == pytest.approx(result["protocols"]["original-kept"]["metrics"])
    assert last != pytest.approx(result["protocols"][VAL_REMOVED.name]["metrics"])


def test_the_number_of_stored_answers(measured, drawn):
    _, rankings = measured("FashionIQ", *sum_of(drawn), "--rankings-k", 3, root=drawn)
    for query in rankings["queries"]["dress"]:
        assert [len(query["protocols"][name]["nearest"]) for name in ORDER] == [3] * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.pop("protocols"),
        lambda result: result.update(dataset="COCO"),
        lambda result: result.update(protocols={}),
        lambda result: result["protocols"]["VAL-kept"].pop("ranks"),
        lambda result: result["protocols"]["VAL-kept"]["metrics"].pop("average_recall"),
        lambda result: result["protocols"]["VAL-kept"]["metrics"].update(average_recall="high"),
        lambda result: result["protocols"]["VAL-kept"]["metrics"].update(average_recall=99.0),
        lambda result: result["protocols"]["VAL-kept"]["ranks"].update(dress=[0, None]),
        lambda result: result["protocols"]["VAL-kept"]["ranks"].update(dress=[]),
    ],
)
def test_a_result_that_was_changed_is_refused(change, unchanged, tmp_path):
    result = json.loads(unchanged)
    (tmp_path / "x.json").write_text(unchanged)
    read_result(tmp_path / "x.json")
    change(result)
    (tmp_path / "x.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"x\.json.*evaluate again"):
        read_result(tmp_path / "x.json")
