"""LaSCo: references that are in no gallery, its metrics against a plain twin, trainings, and files that are no good."""

import json
import re

import pytest
import torch

import check_dataset
from benchmarks import LaSCo
from benchmarks.lasco import RECALLS
from conftest import read_csv
from demo import best_weights
from evaluation.result_file import read_result
from evaluation.retrieval import rank
from models.features import FrozenSplit
from test_bad_input import change_json
from utils import UserError


def test_metrics_equal_those_of_sorted_lists(drawn):
    """Each query sorts the images of the list, and no other one, whether its reference is among them or not."""
    (split,) = LaSCo(drawn).val()
    folder = drawn / "lasco_dataset"
    entries = json.loads((folder / "lasco_val.json").read_text())
    corpus = json.loads((folder / "lasco_val_corpus.json").read_text())
    gallery = [image["path"].partition("/")[2] for image in corpus]
    apart = {entry["query-image"][1] for entry in entries} - set(gallery)
    assert split.only_asked == apart
    assert 0 < len(apart) < len(entries)
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(9, (len(entries), len(split.names)), generator=generator).float()
    images = torch.eye(len(split.names))
    frozen = FrozenSplit(split=split, images=images, captions=similarity[:, None])
    protocols = LaSCo.protocols
    found = rank(frozen, lambda image, text: text, protocols, k=len(split.names))
    for protocol in protocols:
        places = []
        for row, entry in enumerate(entries):
            reference = entry["query-image"][1]
            of_query = dict(zip(split.names, similarity[row].tolist(), strict=True))
            allowed = [n for n in gallery if protocol.reference == "kept" or n != reference]
            order = sorted(allowed, key=lambda name: -of_query[name])
            places.append(order.index(entry["target-image"][1]))
            nearest = found[protocol].results(split.names)[row]
            assert [name for name, _ in nearest] == order[: len(nearest)]
        twin = {
            f"recall_at{k}": 100 * sum(place < k for place in places) / len(places) for k in RECALLS
        }
        twin["average_recall"] = (twin["recall_at10"] + twin["recall_at50"]) / 2
        assert LaSCo(drawn).metrics([split], {"val": found[protocol]}) == pytest.approx(twin)
        assert protocol.gallery_size(split) == len(gallery)


def test_both_stages_learn_and_validations_agree(stage_1, stage_2, run, drawn, tmp_path, capsys):
    clip = best_weights(
        stage_1("LaSCo", "--save-best", "--no-image-cache", "--num-epochs", 1), LaSCo.best_clips()
    )
    folder = stage_2("LaSCo", "--save-best", "--clip-model-path", clip, "--num-epochs", 1)
    measured = read_csv(folder / "validation_metrics.csv")
    weights = ["--clip-model-path", clip]
    weights += ["--combiner-path", best_weights(folder, LaSCo.best_combiners())]
    file = tmp_path / "result.json"
    flags = ["--dataset", "LaSCo", "--combining-function", "combiner", "--metrics-json", file]
    run("validate", drawn, *flags, *weights)
    result = read_result(file)
    for name, value in result["metrics"].items():
        assert measured[name] == pytest.approx([value])
    assert result["protocols"]["original-kept"]["gallery_images"] == {"val": 18}
    capsys.readouterr()
    check_dataset.main(["--dataset", "LaSCo", "--num-workers", "0", "--data-root", str(drawn)])
    out = capsys.readouterr().out
    assert re.search(r"\b18 +18 .*lasco_val_corpus.json", out)
    assert "clean" in out


@pytest.mark.parametrize(
    ("file", "place", "edit", "message"),
    [
        ("lasco_val.json", 3, {"target-image": [1, "val2014/x.jpg"]}, "entry 3: the image val"),
        ("lasco_val.json", 3, {"query-image": [1, "../x.jpg"]}, "points outside the dataset"),
        ("lasco_val.json", 3, {"query-text": None}, "entry 3: query-text: "),
        ("lasco_val.json", 3, {"query-image": ["x.jpg"]}, "entry 3: query-image.1: "),
        ("lasco_train.json", 0, {"target-image": [1, "/x.jpg"]}, "points outside the dataset"),
        ("lasco_val_corpus.json", 0, {"path": "val/../../x.jpg"}, "points outside the dataset"),
        ("lasco_val_corpus.json", 0, {"path": 3}, "entry 0: path: "),
    ],
)
def test_what_is_no_good_is_named(file, place, edit, message, own_drawn):
    path = own_drawn / "lasco_dataset" / file
    change_json(path, lambda entries: entries[place].update(edit))
    with pytest.raises(UserError) as error:
        LaSCo(own_drawn).read("train" if "train" in file else "val")
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert said.endswith(LaSCo.remedy)


def test_a_target_that_only_asks_is_refused(own_drawn):
    """A reference that no gallery has is nobody's target."""
    (split,) = LaSCo(own_drawn).val()
    name = next(iter(split.only_asked))
    path = own_drawn / "lasco_dataset" / "lasco_val.json"
    change_json(path, lambda entries: entries[-1].update({"target-image": [1, name]}))
    with pytest.raises(UserError, match=f"the image {name} is not in .*corpus"):
        LaSCo(own_drawn).val()


def test_left_out_images_leave_the_gallery_as_it_is(drawn):
    (split,) = LaSCo(drawn).val()
    for name in (next(iter(split.only_asked)), split.names[0]):
        (rest,) = LaSCo(drawn, [name]).val()
        assert rest.only_asked == split.only_asked - {name}
        assert rest.gallery_size == split.gallery_size - (name not in split.only_asked)
