"""Sheets of what was retrieved: from a pair or a rankings file, in a page and a picture; and the experts' report."""

import base64
import io
import json
import re
import shutil

import pytest
from PIL import Image, ImageDraw

import visualize
from benchmarks import BENCHMARKS, CIRR
from benchmarks.splits import images_digest
from reports import sheet_picture, sheets
from reports.expert_report import expert_names, typical_of, words_of
from runtime.image_files import jpeg
from test_bad_input import change_json
from utils import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(golden):
    """Dataset -> flags of its golden pair."""
    weights = ["--clip-model-name", golden / "clip_vit.pt"]
    weights += ["--clip-model-path", golden / "tuned_clip_vit.pt"]
    names = {"CIRR": "combiner_moe_cirr.pt", "FashionIQ": "combiner_moe_fiq.pt"}
    composed = ["--combining-function", "combiner", "--combiner-path"]
    return {d: ["--dataset", d, *weights, *composed, golden / name] for d, name in names.items()}


@pytest.fixture
def look(golden, tmp_path):
    """Run the script; returns the folder of its sheets."""

    def look(*flags, root=golden, name="sheets"):
        where = ["--data-root", root, "--output-dir", tmp_path / name]
        where += ["--num-workers", 0, "--device", "cpu"]
        visualize.main(list(map(str, [*flags, *where])))
        return tmp_path / name

    return look


@pytest.fixture(scope="module")
def ranked() -> dict[str, str]:
    """Dataset -> the rankings that several tests look at."""
    return {}


@pytest.fixture
def rankings(golden, pair, run, ranked, tmp_path):
    """Dataset -> a rankings file of it."""

    def rankings(dataset):
        file = tmp_path / f"{dataset}.json"
        if dataset not in ranked:
            run("validate", golden, *pair[dataset], "--rankings", file)
            ranked[dataset] = file.read_text()
        file.write_text(ranked[dataset])
        return file

    return rankings


def pictures(page: str) -> dict[str, Image.Image]:
    """The pictures that a page has, by key."""
    content = json.loads(re.search(r"const pictures = (\{.*?\});", page)[1])
    return {key: Image.open(io.BytesIO(base64.b64decode(value))) for key, value in content.items()}


def queries(page: str) -> list[str]:
    return page.split('<div class="query">')[1:]


@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
def test_a_pair_and_its_rankings_give_the_same_sheet(dataset, look, pair, rankings):
    by_pair = look(*pair[dataset], "--num", 2, "--k", 4, name="a")
    by_file = look("--rankings", rankings(dataset), "--num", 2, "--k", 4, name="b")
    for name in ("sheet.html", "sheet.png", "experts.html"):
        assert (by_pair / name).read_bytes() == (by_file / name).read_bytes()


def test_what_a_query_of_cirr_shows(look, rankings):
    file = rankings("CIRR")
    content = json.loads(file.read_text())["queries"]["val"]
    wanted = content[7]
    folder = look("--rankings", file, "--queries", wanted["pair_id"], "--k", 5)
    page = (folder / "sheet.html").read_text()
    (query,) = queries(page)
    found = wanted["protocols"]["original-removed"]
    assert f"gallery: target at rank {found['rank'] + 1}<" in query
    assert f"subset: target at rank {wanted['in_group']['rank'] + 1}<" in query
    recall = json.loads(file.read_text())["protocols"]["original-removed"]["metrics"]["recall_at1"]
    assert f"combiner on clip_vit, R@1 {recall:.2f}, " in page
    names = re.findall(r'<figure( class="target")? title="(.*?)"', query)
    shown = [name for name, _ in found["nearest"][:5]]
    shown += [] if found["rank"] < 5 else [wanted["target"]]
    assert [name for _, name in names] == [
        wanted["reference"],
        *shown,
        *(n for n, _ in wanted["in_group"]["nearest"]),
    ]
    assert {name for mark, name in names if mark} == {wanted["target"]}
    assert [mark for mark, name in names if name == wanted["target"]] == [' class="target"'] * 2
    assert f"1. {found['nearest'][0][1]:.3f}" in query
    assert f"{wanted['gate']:.2f}</span>" in query
    assert all(f"expert {number}" in query for number in range(4))
    assert len(pictures(page)) == len({name for _, name in names})  # each is in it once
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_failures_are_sorted_by_the_rank_of_the_target(look, rankings):
    file = rankings("FashionIQ")
    places = {}
    for order in ("worst", "best"):
        folder = look("--rankings", file, "--queries", order, "--num", 6, "--k", 1)
        page = (folder / "sheet.html").read_text()
        assert re.findall("<h2>(.*?)</h2>", page) == ["dress", "toptee", "shirt"]
        sections = page.split("<h2>")[1:]
        places[order] = [
            [int(n) for n in re.findall(r"gallery: target at rank (\d+)", section)]
            for section in sections
        ]
    for worst, best in zip(places["worst"], places["best"], strict=True):
        assert worst == sorted(worst, reverse=True)
        assert best == sorted(best)
        assert len(worst) == len(best) == 6
        assert worst[0] > best[0]


def test_queries_by_name_and_at_random(look, rankings):
    file = rankings("FashionIQ")

    def page(*flags: object) -> str:
        return (look("--rankings", file, "--num", 2, "--k", 2, *flags) / "sheet.html").read_text()

    named = page("--queries", "shirt:3", "dress:0")
    assert re.findall(r"<figcaption>((?:shirt|dress):\d+)<", named) == ["shirt:3", "dress:0"]
    one, same, other = (page("--queries", "random", "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("dataset", "flags", "message"),
    [
        (
            "FashionIQ",
            ["--queries", "dress:999"],
            "--queries dress:999: pass best, worst, random, or a query name such as dress:0",
        ),
        ("CIRR", ["--protocol", "VAL-kept"], "--protocol VAL-kept is not in"),
        ("CIRR", ["--rankings", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_bad_flags(dataset, flags, message, look, rankings, capsys):
    with pytest.raises(SystemExit) as stop:
        look("--rankings", rankings(dataset), *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_neither_a_pair_nor_rankings(look, capsys):
    with pytest.raises(SystemExit) as stop:
        look("--dataset", "CIRR")
    assert stop.value.code == 2
    assert "--rankings" in capsys.readouterr().err


def test_damaged_rankings_and_images(look, rankings, golden, tmp_path, capsys):
    root = shutil.copytree(golden, tmp_path / "own")
    file = rankings("CIRR")
    content = json.loads(file.read_text())
    reference = content["queries"]["val"][0]["reference"]
    pair_id = content["queries"]["val"][0]["pair_id"]
    path = next((root / "cirr_dataset").rglob(f"{reference}.png"))
    path.write_bytes(path.read_bytes()[:80])
    (split,) = BENCHMARKS["CIRR"](root).val()
    sampled = images_digest(split, sampled=True)
    change_json(file, lambda c: c["images_sampled"].update(val=sampled))
    with pytest.raises(SystemExit):
        look("--rankings", file, "--queries", pair_id, root=root)
    assert f"{reference}.png cannot be decoded" in capsys.readouterr().err
    change_json(file, lambda c: c["queries"]["val"][0]["protocols"].clear())
    with pytest.raises(SystemExit):
        look("--rankings", file)
    assert "evaluate again" in capsys.readouterr().err


def test_captions_are_shown_as_text(look, rankings):
    file = rankings("FashionIQ")
    change_json(
        file, lambda c: c["queries"]["dress"][0].update(caption="<script>alert('x')</script>")
    )
    folder = look("--rankings", file, "--queries", "dress:0")
    pages = [(folder / name).read_text() for name in ("sheet.html", "experts.html")]
    assert "&lt;script&gt;alert(" in pages[0]
    assert "<script>alert" not in "".join(pages)


@pytest.mark.long
def test_two_hundred_queries_stay_below_20_megabytes(tmp_path):
    """With photos that do not compress: every place another one."""
    noise = Image.effect_noise((200, 160), 80).convert("RGB")
    cards, paths = [], {}
    for number in range(200):
        names = [f"{number}-{place}" for place in range(17)]
        for name in names:
            paths[name] = tmp_path / f"{len(paths) % 40}.jpg"
        rows = {
            "gallery": sheets.Row([(name, 0.5) for name in names[1:11]], {names[16]: 3}),
            "subset": sheets.Row([(name, 0.5) for name in names[11:16]], {names[16]: 2}),
        }
        card = sheets.Card(
            label=str(number),
            caption="is noisy",
            reference=names[0],
            rows=rows,
            bars={"text in the gate": 0.5},
        )
        cards.append(card)
    for path in set(paths.values()):
        noise.rotate(len(path.stem) * 7).save(path, quality=95)
    small = sheets.load_thumbnails(paths)
    page = sheets.sheet("noise", {"val": cards}, small, about=[])
    assert len(queries(page)) == 200
    assert 4_000_000 < len(page) < 20_000_000
    picture, shown = sheet_picture.picture(cards, small)
    with Image.open(io.BytesIO(picture)) as image:
        assert image.height <= sheet_picture.TALLEST
    assert 100 < shown <= 200


def a_card(caption: str, answers: int = 3) -> tuple[sheets.Card, dict[str, bytes]]:
    """A query with a gallery and a group, and the images in it."""
    names = [str(number) for number in range(answers)]
    nearest = [(name, 0.5) for name in names]
    rows = {"gallery": sheets.Row(nearest, {"0": 0}), "subset": sheets.Row(nearest, {"1": 1})}
    card = sheets.Card(
        label="12", caption=caption, reference="0", rows=rows, bars={}, kinds=["color", "size"]
    )
    return card, dict.fromkeys(names, jpeg(Image.new("RGB", (90, 60)), 90))


def test_a_picture_says_what_its_page_says(monkeypatch):
    """The model, the kinds, and what each row is of."""
    card, thumbnails = a_card("is red")
    written = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *words: (written.append(words[2]), draw(*words))
    )
    sheet_picture.picture([card], thumbnails, head=["CIRR", "sum on RN50"])
    page = sheets.sheet("CIRR", {"val": [card]}, thumbnails, about=["sum on RN50"])
    lines = ["12, color, size", "gallery: target at rank 1", "subset: target at rank 2", "is red"]
    for line in ("CIRR", "sum on RN50", *lines):
        assert line in written
        assert line in page


def test_captions_of_the_picture_are_in_any_script_that_a_font_has(caplog):
    card, thumbnails = a_card("đổi nền thành màu lục sẫm, giữ nguyên ợ Ự ẵ; Ελλάδα; кошка")
    sheet_picture.picture([card], thumbnails)
    assert not caplog.messages
    for word in card.caption.split():
        font = sheet_picture.font_of(word)
        missing = bytes(font.getmask("\uffff"))
        assert all(bytes(font.getmask(char)) != missing for char in word)
    card, thumbnails = a_card("is \uffff red")
    sheet_picture.picture([card], thumbnails)
    assert "boxes instead of \\uffff" in caplog.text or "boxes instead of \uffff" in caplog.text


@pytest.mark.parametrize(
    ("answers", "columns"), [(10, (10, 5, 5)), (12, (6, 6, 4)), (3, (3, 3, 3))]
)
def test_rows_are_full(answers, columns):
    card, thumbnails = a_card("is red", answers)
    page = sheets.sheet("CIRR", {"val": [card]}, thumbnails, about=[])
    assert f'style="--wide:{columns[0]};--middle:{columns[1]};--narrow:{columns[2]}"' in page


def test_the_experts_report(look, rankings):
    file = rankings("FashionIQ")
    page = (look("--rankings", file, "--num", 1) / "experts.html").read_text()
    content = json.loads(file.read_text())["queries"]
    everything = [query for split in content.values() for query in split]
    for expert in range(4):
        mean = sum(query["experts"][expert] for query in everything) / len(everything)
        assert f">{mean:.2f}</td>" in page
        heaviest = sum(query["experts"][expert] == max(query["experts"]) for query in everything)
        assert f"has the largest weight in {heaviest} of 120 queries" in page
    assert all(f"<th>{name}</th>" in page for name in ("dress", "toptee", "shirt", "all"))


def test_what_experts_take_lies_beside_the_page(look, rankings):
    file = rankings("CIRR")
    content = json.loads(file.read_text())
    named = json.loads((look("--rankings", file, "--num", 1) / "experts.json").read_text())
    assert named["of_weights"] == content["weights_sha256"]["combiner"]
    assert named["experts"] == expert_names(content["queries"]["val"])


def test_an_expert_is_named_by_kinds_by_words_or_not_at_all():
    weights = [[0.6, 0.4, 0]] * 3 + [[0.3, 0.7, 0]] * 3
    captions = ["is red"] * 3 + ["is blue"] * 3
    queries = [
        {"caption": caption, "experts": experts}
        for caption, experts in zip(captions, weights, strict=True)
    ]
    named = [(["red"], False), (["blue"], False), ([], True)]
    assert expert_names(queries) == [{"takes": t, "is_idle": i} for t, i in named]
    with_kinds = [{**query, "kinds": ["colour"]} for query in queries[:3]] + queries[3:]
    assert [expert["takes"] for expert in expert_names(with_kinds)] == [["colour"], [], []]


def test_words_of_an_expert_by_hand():
    texts = ("is red", "is red now", "Red!", "is blue", "is blue", "is blue")
    words = [words_of({"caption": text}) for text in texts]
    assert typical_of(words[:3], words) == [("red", 2.0)]
    assert typical_of([], words) == []
    alike = {f"word{number}" for number in range(8)}
    typical = typical_of([alike] * 3, [alike] * 3 + [set()] * 3)
    assert [word for word, _ in typical] == sorted(alike)


def test_the_sum_has_no_experts(look, golden):
    flags = ["--clip-model-name", golden / "clip_vit.pt", "--combining-function", "sum"]
    folder = look("--dataset", "CIRR", "--num", 1, *flags)
    assert sorted(file.name for file in folder.iterdir()) == ["sheet.html", "sheet.png"]


def test_answers_to_test_queries_are_those_of_a_submission(look, pair, golden, run):
    """In its order, the group's too, under each query's id, and without a word of targets."""
    flags = pair["CIRR"]
    page = (look(*flags, "--split", "test", "--k", 4, "--num", 3) / "sheet.html").read_text()
    assert "<h2>test1</h2>" in page
    assert len(queries(page)) == 3
    folder = run("cirr_test_submission", golden, *flags[2:], "--submission-name", "same")
    for query in queries(page):
        label = re.search("<figcaption>(.*?)</figcaption>", query)[1]
        names = re.findall(r'<figure title="(.*?)"', query)
        expected = []
        for metric, number in (("recall", 4), ("recall_subset", 3)):
            submitted = json.loads((folder / f"{metric}_submission_same.json").read_text())
            expected.append(submitted[label][:number])
        assert names[1:5] == expected[0]
        assert names[5:8] == expected[1]
    assert "target" not in page.split("</style>")[1].split("<script>")[0]


@pytest.mark.parametrize("dataset", ["FashionIQ", "CIRCO", "Triplets"])
def test_every_benchmarks_test_split_can_be_looked_at(dataset, look, drawn):
    flags = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combining-function", "sum"]
    flags += ["--dataset", dataset, "--split", "test", "--num", 2]
    page = (look(*flags, root=drawn) / "sheet.html").read_text()
    splits = BENCHMARKS[dataset](drawn).test()
    assert re.findall("<h2>(.*?)</h2>", page) == [split.name for split in splits]
    assert len(queries(page)) == 2 * len(splits)


def test_the_worst_of_a_test_split_are_not_known(look, pair, capsys):
    with pytest.raises(SystemExit) as stop:
        look(*pair["CIRR"], "--split", "test", "--queries", "worst")
    assert stop.value.code == 2
    assert "--split test has no known targets" in capsys.readouterr().err


def test_what_else_annotators_said_of_a_query_is_shown(own_drawn, run, look, tmp_path):
    """CIRR's extended annotations, where their file is there; the metrics are the same without it."""
    files = []
    (split,) = CIRR(own_drawn).val()
    for place in ("without", "with"):
        files.append(tmp_path / f"{place}.json")
        clip = ["--clip-model-name", own_drawn / "tiny_clip_vit.pt"]
        flags = ["--dataset", "CIRR", "--combining-function", "sum", *clip]
        run("validate", own_drawn, *flags, "--rankings", files[-1])
        said = {"0": "A <photo> of shapes", "1": "[c] None existed", "2": "seen from above"}
        pair_id = split.triplets[-1].pair_id
        entries = [{"pairid": pair_id, "caption_extend": said}]
        extended = own_drawn / "cirr_dataset/cirr/captions_ext/cap.ext.rc2.val.json"
        extended.parent.mkdir(exist_ok=True)
        extended.write_text(json.dumps(entries))
    without, with_it = (json.loads(file.read_text()) for file in files)
    assert without["protocols"] == with_it["protocols"]
    texts = [query.get("extended") for query in with_it["queries"]["val"]]
    assert texts == [None] * (len(texts) - 1) + [["A <photo> of shapes", "seen from above"]]
    assert not any("extended" in query for query in without["queries"]["val"])
    page = look("--rankings", files[1], "--queries", pair_id, root=own_drawn) / "sheet.html"
    assert "A &lt;photo&gt; of shapes" in page.read_text()
    assert "None existed" not in page.read_text()
    change_json(extended, lambda entries: entries[0].pop("caption_extend"))
    with pytest.raises(
        UserError, match=r"cap\.ext\.rc2\.val\.json: entry 0: caption_extend: field"
    ):
        CIRR(own_drawn).val()
