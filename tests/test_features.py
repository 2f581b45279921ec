"""The feature cache: a hit, each kind of miss, and damaged files."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import CIRR, Split
from data_utils import ImageLoader, load_image, make_preprocess
from image_search.faiss_index import normalised
from image_search.image_index import encoder_key
from image_search.stores.base import check_features
from models import clip_model, encoder, features
from models.clip_model import backbone, load_clip
from models.configuration import Checkpoint, Settings, assumed, resolve_clip_options
from models.encoder import Encoder, load_encoder
from models.features import FeatureCache, FrozenSplit
from runtime.tensors import load_tensors
from settings.groups import Clip
from utils import UserError

CPU = torch.device("cpu")


class CountingEncoder(Encoder):
    """An encoder that counts what it encodes."""

    def images(self, paths, what="images"):
        self.preprocessing["images"] = self.preprocessing.get("images", 0) + len(paths)
        return super().images(paths, what)

    def captions(self, captions):
        self.preprocessing["captions"] = self.preprocessing.get("captions", 0) + len(captions)
        return super().captions(captions)


@pytest.fixture
def paths(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for level, file in enumerate(files):
        Image.new("RGB", (20, 24), (level * 90, 30, 200)).save(file)
    return files


@pytest.fixture(scope="module")
def tiny(drawn):
    """A CLIP, not to be changed."""
    return load_clip(str(drawn / "tiny_clip_vit.pt"), CPU)


@pytest.fixture
def make_encoder(tiny):
    def make(transform="targetpad", ratio=1.25, decode="full", background="original"):
        preprocessing = {
            "clip_model_name": "tiny",
            "transform": transform,
            "target_ratio": ratio,
            "decode": decode,
            "background": background,
            "resolution": 32,
        }
        read = functools.partial(load_image, preprocess=make_preprocess(transform, ratio, 32))
        loader = ImageLoader(read, 0, CPU)
        return CountingEncoder(
            model=tiny,
            backbone=backbone(tiny),
            loader=loader,
            preprocessing=preprocessing,
            device=CPU,
        )

    return make


CAPTIONS = ["is red", "is blue"]


def encode(encoder, folder, paths, captions=CAPTIONS):
    """What a cache with a fresh start gives, and how many images and captions were encoded for it."""
    encoder.preprocessing.update(images=0, captions=0)
    cache = FeatureCache(folder, encoder)
    result = cache.images(paths, "train"), cache.captions(captions, "train")
    return result, (encoder.preprocessing["images"], encoder.preprocessing["captions"])


def test_a_second_encoding_is_read_from_the_disk(make_encoder, paths, tmp_path):
    first, made = encode(make_encoder(), tmp_path / "cache", paths)
    again, read = encode(make_encoder(), tmp_path / "cache", paths)
    assert (made, read) == ((3, 2), (0, 0))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_encoding_goes_on(done, make_encoder, tmp_path, monkeypatch):
    """After each number of pieces: those are not encoded again, a damaged one is, and none is left at the end."""
    monkeypatch.setattr(features, "PIECE", 2)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for level, file in enumerate(paths):
        Image.new("RGB", (20, 24), (level * 30, 30, 200)).save(file)
    (whole, _), _ = encode(make_encoder(), None, paths)
    interrupted = make_encoder()
    remaining = iter(range(done))

    def images(encoder, paths, what):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return Encoder.images(encoder, paths, what)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CountingEncoder, "images", images)
        encode(interrupted, tmp_path / "cache", paths)
    pieces = sorted((tmp_path / "cache").glob("train-piece-*.pt")) if done else []
    assert len(pieces) == done
    for piece in pieces[:1]:
        piece.write_bytes(piece.read_bytes()[:-9])
    (found, _), counts = encode(make_encoder(), tmp_path / "cache", paths)
    assert counts == (7 - 2 * max(done - 1, 0), 2)
    torch.testing.assert_close(found, whole)
    assert sorted(file.name.rsplit("-", 1)[0] for file in (tmp_path / "cache").iterdir()) == [
        "train-captions",
        "train-images",
    ]
    (again, _), counts = encode(make_encoder(), tmp_path / "cache", paths)
    assert counts == (0, 0)
    assert torch.equal(again, found)


def test_without_a_folder_nothing_is_kept(make_encoder, paths):
    for _ in range(2):
        assert encode(make_encoder(), None, paths)[1] == (3, 2)


def test_another_image_is_encoded_anew(make_encoder, paths, tmp_path):
    before, _ = encode(make_encoder(), tmp_path / "cache", paths)
    Image.new("RGB", (20, 24), "white").save(paths[1])
    after, made = encode(make_encoder(), tmp_path / "cache", paths)
    assert made == (3, 0)
    assert not torch.equal(before[0][1], after[0][1])


def test_another_modification_time_is_another_image(make_encoder, paths, tmp_path):
    encode(make_encoder(), tmp_path / "cache", paths)
    os.utime(paths[0], ns=(1, 1))
    assert encode(make_encoder(), tmp_path / "cache", paths)[1] == (3, 0)


def test_other_captions_are_encoded_anew(make_encoder, paths, tmp_path):
    encode(make_encoder(), tmp_path / "cache", paths)
    assert encode(make_encoder(), tmp_path / "cache", paths, ["is red", "is green"])[1] == (0, 2)
    assert encode(make_encoder(), tmp_path / "cache", paths, ["is blue", "is red"])[1] == (0, 2)


def test_another_weight_is_another_encoder(make_encoder, tiny, paths, tmp_path):
    encode(make_encoder(), tmp_path / "cache", paths)
    changed = dataclasses.replace(make_encoder(), model=copy.deepcopy(tiny))
    with torch.no_grad():
        changed.model.visual.proj[0, 0] += 1e-3
    assert encode(changed, tmp_path / "cache", paths)[1] == (3, 2)


@pytest.mark.parametrize(
    "preprocessing",
    [
        ("squarepad", 1.25),
        ("targetpad", 1.5),
        ("targetpad", 1.25, "draft"),
        ("targetpad", 1.25, "full", "white"),
    ],
)
def test_another_preprocessing_is_another_encoder(preprocessing, make_encoder, paths, tmp_path):
    encode(make_encoder(), tmp_path / "cache", paths)
    assert encode(make_encoder(*preprocessing), tmp_path / "cache", paths)[1] == (3, 2)


def test_what_earlier_versions_wrote_is_still_found(make_encoder):
    """Keys are digests of these, in this order; a choice that there was not then is named where it is another's."""
    encoder = make_encoder()
    then = {"transform": "targetpad", "target_ratio": 1.25, "resolution": 32}
    assert list(encoder.image_preprocessing().items())[:3] == list(then.items())
    names = ["clip_model_name", *then, "weights", "precision", "versions"]
    assert list(encoder.describe()) == names
    assert list(encoder_key(encoder).items())[1:] == [*then.items(), ("background", "original")]
    other = make_encoder(decode="draft", background="white")
    for about in (other.image_preprocessing(), other.describe(), encoder_key(other)):
        assert (about["decode"], about["background"]) == ("draft", "white")


def test_resolution_and_precision_are_part_of_the_key(make_encoder):
    encoder = make_encoder()
    about = encoder.describe()
    assert about["resolution"] == 32
    assert about["precision"] == "fp32 on cpu"
    on_gpu = dataclasses.replace(encoder, device=torch.device("cuda"))
    assert on_gpu.describe()["precision"] == "fp32 on cuda"


@pytest.mark.parametrize(
    ("architecture", "packages"),
    [("", ["clip", "clip-anytorch"]), ("a", ["open_clip_torch", "transformers"])],
)
def test_another_version_of_a_package_is_another_key(
    architecture, packages, make_encoder, paths, tmp_path, monkeypatch
):
    """Of each package that computes features. They are told without being imported."""
    encoder = make_encoder()
    known = dataclasses.replace(encoder.backbone, architecture=architecture)
    encoder = dataclasses.replace(encoder, backbone=known)
    encode(encoder, tmp_path / "cache", paths)
    real = importlib.metadata.version
    for name in packages:
        with monkeypatch.context() as patched:
            versions = {name: "9"}
            patched.setattr(
                importlib.metadata, "version", lambda of, known=versions: known.get(of) or real(of)
            )
            assert encoder.describe()["versions"][name] == "9"
            assert encode(encoder, tmp_path / "cache", paths)[1] == (3, 2)
    assert encode(encoder, tmp_path / "cache", paths)[1] == (0, 0)


@pytest.mark.parametrize("factor", [0.0, 1e-13, 1e25])
def test_features_whose_direction_is_lost_are_refused(factor, make_encoder, tiny, paths):
    """They would be ranked by what is left of them; the first image or caption is named. A thousandth is good."""
    encoder = dataclasses.replace(make_encoder(), model=copy.deepcopy(tiny))
    with torch.no_grad():
        for projection in (encoder.model.visual.proj, encoder.model.text_projection):
            projection *= 1e-3
        encode(encoder, None, paths)
        encoder.model.visual.proj *= factor
        with pytest.raises(UserError, match=f"features of {paths[0]} have norm"):
            encoder.images(paths)
        with pytest.raises(UserError, match=f"features of {paths[0]} have norm"):
            for features, _ in encoder.readable_images([paths]):
                check_features([(str(path), 1, 1) for path in paths], features.numpy(), 64)
        with pytest.raises(UserError, match="features of the reference image have norm"):
            encoder.read_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        encoder.model.text_projection *= factor
        with pytest.raises(UserError, match="features of the caption 'is red' have norm"):
            encoder.captions(CAPTIONS)
    with pytest.raises(UserError, match="build the index again"):
        normalised(factor * np.eye(3))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-200])


def flip_a_value(file):
    content = torch.load(file)
    content["features"][0, 0] += 1
    torch.save(content, file)


def foreign(file):
    torch.save({"CLIP": {"weight": torch.ones(2)}}, file)


def of_another_key(file):
    content = torch.load(file)
    torch.save(content | {"key": "0" * 64}, file)


def garbage(file):
    file.write_bytes(b"not a torch file")


@pytest.mark.parametrize("damage", [truncate, flip_a_value, foreign, of_another_key, garbage])
def test_a_damaged_file_is_noticed_and_made_anew(damage, make_encoder, paths, tmp_path, caplog):
    folder = tmp_path / "cache"
    whole, _ = encode(make_encoder(), folder, paths)
    for file in folder.iterdir():
        damage(file)
    again, made = encode(make_encoder(), folder, paths)
    assert made == (3, 2)
    assert caplog.text.count("damaged or belongs to another run") == 2
    assert torch.equal(whole[0], again[0])
    assert encode(make_encoder(), folder, paths)[1] == (0, 0)


def test_a_full_disk_costs_the_cache_and_nothing_else(make_encoder, paths, tmp_path, caplog):
    (tmp_path / "file").write_text("where a folder should be")
    features, made = encode(make_encoder(), tmp_path / "file", paths)
    assert made == (3, 2)
    assert features[0].shape == (3, 64)
    assert "continuing without a cache" in caplog.text


def test_repeated_captions_are_encoded_once(make_encoder):
    encoder = make_encoder()
    features = encoder.captions(["a", "b", "a"])
    assert torch.equal(features[0], features[2])
    torch.testing.assert_close(features[1], encoder.captions(["b"])[0])


def test_captions_are_tokenised_once(make_encoder, monkeypatch):
    encoder._tokens.cache_clear()
    tokenised = []
    real = clip_model.tokenize

    def counting(texts, columns):
        tokenised.extend(texts)
        return real(texts, columns)

    monkeypatch.setattr(clip_model, "tokenize", counting)
    captions = [f"has {number} stripes" for number in range(300)]
    first = make_encoder().captions([*captions, captions[0]])
    assert tokenised == captions
    assert torch.equal(make_encoder().captions(captions), first[:-1])
    assert tokenised == captions
    alone = make_encoder().captions(captions[280:281])  # in no batch of 256
    torch.testing.assert_close(alone[0], first[280], rtol=1e-4, atol=1e-5)


def test_tables_of_rows_are_made_once(golden, monkeypatch):
    """Validations of other weights share them."""
    made = []
    real = Split.group_rows.fget
    monkeypatch.setattr(Split, "group_rows", property(lambda split: made.append(1) or real(split)))
    split = CIRR(golden).val()[0]
    tables = {}
    for _ in range(3):
        features = torch.zeros(len(split.names), 4)
        frozen = FrozenSplit(split=split, images=features, captions=features, tables=tables)
        assert frozen.group_rows.tolist() == real(split)
        assert frozen.reference_rows.tolist() == split.reference_rows
    assert len(made) == 1
    alone = FrozenSplit(split=split, images=features, captions=features)
    assert alone.tables is not tables
    assert torch.equal(alone.outside, frozen.outside)


def trained(**preprocessing) -> Checkpoint:
    parts = {"flags": {}, "recipe": preprocessing, "data": {}, "versions": {}}
    return Checkpoint(path=Path("weights.pt"), state={}, config=parts)


@pytest.mark.parametrize("decode", ["full", "draft"])
def test_an_encoder_reads_on_its_background(decode, drawn, tmp_path):
    """Without one as the original does, to the bit."""
    file = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (0, 255, 0, 0)).save(file)
    name = str(drawn / "tiny_clip_vit.pt")
    read = {}
    for background in ("original", "white", "black"):
        chosen = Clip(clip_model_name=name, decode=decode, background=background)
        encoder = load_encoder(resolve_clip_options(chosen, []), None, CPU, workers=0)
        read[background] = encoder.loader.read(file)
    assert torch.equal(read["original"], load_image(file, make_preprocess("targetpad", 1.25, 32)))
    assert read["original"][1].min() == 255 > read["original"][0].max()
    assert (read["white"].min(), read["black"].max()) == (255, 0)


def test_own_photos_are_read_on_what_the_weights_say_else_on_white(caplog):
    own, of_before = trained(background="grey"), trained(transform="clip")
    read_as_original = trained(transform="clip", background="original")
    silent = Clip()
    for weights in ([], [of_before], [read_as_original]):
        assert resolve_clip_options(silent, weights).background == "original"
        settled = resolve_clip_options(silent, weights, "white")
        assert settled.background == "white"
        assert ("background" in assumed(silent, settled, weights)) == bool(weights)
        typed = Clip(background="original")
        assert resolve_clip_options(typed, weights, "white").background == "original"
    for default in ("original", "white"):
        settled = resolve_clip_options(silent, [own], default)
        assert settled.background == "grey"
        assert "background" not in assumed(silent, settled, [own])
    assert caplog.text == ""
    assert resolve_clip_options(Clip(background="white"), [own]).background == "white"
    assert "was trained with --background grey, not white" in caplog.text


def test_images_are_decoded_as_the_weights_were_trained(caplog):
    silent, draft = Clip(), trained(transform="clip", decode="draft")
    assert resolve_clip_options(silent, []).decode == "full"
    assert (
        resolve_clip_options(silent, [trained(transform="clip")]).decode == "full"
    )  # of an earlier version
    assert resolve_clip_options(silent, [draft]).decode == "draft"
    assert caplog.text == ""
    assert resolve_clip_options(Clip(decode="full"), [draft]).decode == "full"
    assert "weights.pt was trained with --decode draft, not full" in caplog.text
    with pytest.raises(
        UserError, match=r"recipe\.decode: it should be one of full, draft, not 'half'"
    ):
        Settings.checked(trained(decode="half").config, file="weights.pt", remedy="train again")


@pytest.mark.slow
def test_weights_and_results_say_how_images_were_decoded(stage_1, run, drawn, tmp_path):
    kinds = {}
    for decode in ("full", "draft"):
        flags = ["--decode", decode, "--save-best", "--num-epochs", 1]
        folder = stage_1("CIRR", *flags, output=decode)
        weights = folder / "saved_models" / "tuned_clip_arithmetic.pt"
        assert load_tensors(weights)["config"]["recipe"]["decode"] == decode
        pair = ["--dataset", "CIRR", "--combining-function", "sum", "--clip-model-path", weights]
        run("validate", drawn, *pair, "--metrics-json", tmp_path / f"{decode}.json")
        kinds[decode] = json.loads((tmp_path / f"{decode}.json").read_text())["preprocessing"]
    assert kinds["full"] == {"transform": "targetpad", "target_ratio": 1.25, "resolution": 32}
    assert kinds["draft"] == {**kinds["full"], "decode": "draft"}
