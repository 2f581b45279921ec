"""GeneCIS: each query's own gallery, its metrics against a plain twin, and files that are no good."""

import json

import pytest
import torch

from benchmarks import GeneCIS
from benchmarks.genecis import RECALLS, TASKS
from evaluation.retrieval import rank
from models.features import FrozenSplit
from test_bad_input import change_json
from utils import UserError


def test_metrics_equal_those_of_sorted_galleries(own_drawn):
    """A query sorts its target and its gallery, in this order where they are equally near; its target may repeat."""
    folder = own_drawn / "genecis_dataset"
    for task in TASKS:
        file = folder / f"{task}.json"
        change_json(
            file, lambda entries: entries[0]["gallery"].__setitem__(5, entries[0]["target"])
        )
    rankings = {}
    twin = {}
    splits = GeneCIS(own_drawn).val()
    for split, task in zip(splits, TASKS, strict=True):
        entries = json.loads((folder / f"{task}.json").read_text())
        generator = torch.Generator().manual_seed(1)
        similarity = torch.randn(len(entries), len(split.names), generator=generator)
        images = torch.eye(len(split.names))
        frozen = FrozenSplit(split=split, images=images, captions=similarity[:, None])
        found = rank(frozen, lambda image, text: text, GeneCIS.protocols)
        rankings[split.name] = found[GeneCIS.protocols[0]]
        places = []
        for row, entry in enumerate(entries):
            of_query = dict(zip(split.names, similarity[row].tolist(), strict=True))
            candidates = [entry["target"], *entry["gallery"]]
            near = [of_query[str(image["val_image_id"])] for image in candidates]
            order = sorted(range(len(near)), key=lambda place: -near[place])
            places.append(order.index(0))
        for k in RECALLS:
            recall = 100 * sum(place < k for place in places) / len(places)
            twin[f"{task}_recall_at{k}"] = recall
    assert GeneCIS(own_drawn).metrics(splits, rankings) == pytest.approx(twin)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entry: entry["gallery"].pop(), "entry 2: gallery: "),
        (lambda entry: entry["gallery"].append(entry["gallery"][0]), "entry 2: gallery: "),
        (lambda entry: entry["gallery"].__setitem__(0, entry["gallery"][1]), "not repeat"),
        (lambda entry: entry["gallery"].__setitem__(0, entry["reference"]), "entry 2: gallery"),
        (lambda entry: entry.pop("condition"), "entry 2: condition: field required"),
        (lambda entry: entry["target"].update(val_image_id=-1), "entry 2: target.val_image_id"),
        (lambda entry: entry.update(target=entry["reference"]), "its target is also its reference"),
    ],
)
def test_what_is_no_good_is_named(edit, message, own_drawn):
    path = own_drawn / "genecis_dataset" / "focus_object.json"
    change_json(path, lambda entries: edit(entries[2]))
    with pytest.raises(UserError) as error:
        GeneCIS(own_drawn).val()
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert said.endswith(GeneCIS.remedy)
