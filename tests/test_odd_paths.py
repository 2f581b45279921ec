"""Whatever lies at a path that a flag names, each script takes it or refuses it: no traceback, no waiting."""

import contextlib
import importlib
import shutil

import pytest

import utils
from conftest import CASES, SOAK, STAGE_1, STAGE_2
from test_every_flag import PATH_TYPES, SCRIPTS, parsers
from utils import printable

CPU = "--device cpu"
NO_WORKERS = "--num-workers 0"
# What each command needs beside the path that is tried; {drawn} is a data root with two tiny CLIPs.
DATA = "--data-root {drawn}"
CLIP = "--clip-model-name {drawn}/tiny_clip_vit.pt"
PAIR = f"{DATA} {CLIP} --combining-function sum {CPU} {NO_WORKERS}"
NEEDS = {
    "average": "--checkpoints {drawn}/tiny_clip_vit.pt {drawn}/tiny_clip_vit.pt --output {made}/soup.pt",
    "audit": f"--dataset CIRR {PAIR} --resamples 20",
    "check_dataset": f"{DATA} --dataset CIRR --unofficial {NO_WORKERS}",
    "check_submission": f"{DATA} {{made}}/answers.json",
    "circo_test_submission": f"{PAIR} --submission-name x --output-dir {{made}}/out",
    "triplets_test_submission": f"{PAIR} --submission-name x --output-dir {{made}}/out",
    "cirr_test_submission": f"{PAIR} --submission-name x --output-dir {{made}}/out",
    "clip_fine_tune": f"--dataset CIRR {DATA} {CLIP} {CPU} {NO_WORKERS} {STAGE_1} --output-dir {{made}}/out "
    "--no-image-cache --num-epochs 1",
    "combiner_train": f"--dataset CIRR {DATA} {CLIP} {CPU} {NO_WORKERS} {STAGE_2} --output-dir {{made}}/out "
    "--no-feature-cache --num-epochs 1",
    "compare": "{made}/answers.json",
    "convert": f"--dataset CIRR {DATA} --output-dir {{made}}/out",
    "demo_app": f"--index {{made}}/index {CPU}",
    "emoji_dataset": "--output-dir {made}/out --concepts 3 --train-triplets 3 --layouts Triplets --side 32",
    "export": f"{CLIP} --output {{made}}/out",
    "fashioniq_test_submission": f"{PAIR} --submission-name x --output-dir {{made}}/out",
    "get_data": f"CIRR {DATA} --archive {{drawn}}/cirr_dataset --unofficial {NO_WORKERS}",
    "plan stage1": f"--dataset CIRR --gpu h100 {CLIP}",
    "plan stage2": f"--dataset CIRR --gpu h100 {CLIP}",
    "search index": f"--images {{drawn}}/cirr_dataset/dev --output {{made}}/index {CLIP} {CPU} {NO_WORKERS}",
    "search query": f"--index {{made}}/index --image {{drawn}}/cirr_dataset/dev/dev-0-0-img0.png --text red {CPU}",
    "validate": f"--dataset CIRR {PAIR}",
    "visualize": f"--dataset CIRR {PAIR} --num 1 --output-dir {{made}}/out",
}
# The demo makes all that it needs, for minutes.
COMMANDS = {
    " ".join([script, *words]): parser
    for script in SCRIPTS
    if script != "demo"
    for words, parser in parsers(script)
}


def test_every_command_is_tried():
    assert COMMANDS.keys() == NEEDS.keys()


ODD = {
    "missing": lambda place: None,
    "an empty folder": lambda place: place.mkdir(),
    "a folder of folders": lambda place: (place / "a.pt").mkdir(parents=True),
    "an empty file": lambda place: place.touch(),
    "bytes": lambda place: place.write_bytes(b"\xff\xfe\0\x80" * 9),
    "other JSON": lambda place: place.write_text('{"a": [1, null]}'),
    "a list": lambda place: place.write_text("[]"),
    "a number": lambda place: place.write_text("3"),
    "deep JSON": lambda place: place.write_text("[" * 100_000),
    "a device": lambda place: place.symlink_to("/dev/null"),
    "a link to nothing": lambda place: place.symlink_to(place.parent / "nothing"),
}  # fmt: skip


# Of commands that take seconds where a path is taken.
TRIED_OF_SLOW = ("missing", "an empty folder", "bytes", "a device")
SLOW = ("clip_fine_tune", "combiner_train", "plan")


def tried_at(number: int, name: str) -> list[str]:
    """What lies at a path in turns: a device, and one more; `make soak` tries all."""
    kinds = list(TRIED_OF_SLOW if name.split()[0] in SLOW else ODD)
    if SOAK:
        return kinds
    if name.startswith("plan "):  # its two commands read the same files
        return [kinds[number % len(kinds)] if name == "plan stage2" else "a device"]
    return sorted({"a device", kinds[number % len(kinds)]})


CASES_OF_COMMANDS = []
for name, parser in COMMANDS.items():
    for action in parser._actions:
        if action.type in PATH_TYPES:
            flag = action.option_strings[-1] if action.option_strings else ""
            tried = tried_at(len(CASES_OF_COMMANDS), name)
            CASES_OF_COMMANDS.append(pytest.param(name, flag, tried, id=f"{name} {flag}"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("made")
    (folder / "answers.json").write_text("{}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flag", "tried"), CASES_OF_COMMANDS)
def test_every_path_of_every_command(name, flag, tried, drawn, tmp_path, capsys, monkeypatch):
    """Where a flag is given twice, the second one holds."""
    monkeypatch.setattr(utils.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    script, *words = name.split()
    for what in tried:
        made = tmp_path / what.replace(" ", "-")
        made.mkdir()
        (made / "answers.json").write_text("{}")
        place = made / "place"
        ODD[what](place)
        # A pair stands in CLIP's stead, and is refused beside it.
        others = NEEDS[name].replace(CLIP, "") if flag == "--pair" else NEEDS[name]
        needs = f"{others} {flag} {place}"
        if not flag:
            needs = NEEDS[name].replace("{made}/answers.json", str(place))
        argv = [*words, *needs.format(drawn=drawn, made=made).split()]
        code = 0
        capsys.readouterr()
        try:
            importlib.import_module(script).main(argv)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "fault" not in err, f"{what}: {err}"
        assert "Traceback" not in err, what
        assert code in (0, 1, 2), what
        if code == 2 and name == "check_dataset" and out:
            continue  # a report, which says what is missing
        if code == 2:
            assert err.count("error: ") == 1, f"{what}: {err}"
            assert err.splitlines()[-1].isprintable()
        if what == "a device":
            assert place.is_symlink(), what
        CASES["odd paths", {0: "taken", 1: "with violations", 2: "refused"}[code]] += 1
        shutil.rmtree(made)


ODD_NAMES = (
    "two\nlines",
    "\x1b[31mred\x1b[0m",
    "bell\x07",
    "right\u202eleft",
    "back\rspace",
    "tab\tbed",
    "é 中",
)


@pytest.mark.slow
# All in one name; `make soak` tries each alone.
@pytest.mark.parametrize("odd", ODD_NAMES if SOAK else [" ".join(ODD_NAMES)], ids=ascii)
def test_names_of_files_stay_in_their_line(odd, drawn, tmp_path, capsys, monkeypatch):
    """Whatever is printed of a file with such a name: findings, answers, violations, tables, refusals."""
    root = tmp_path / odd
    shutil.copytree(drawn, root)
    (root / "answers.json").write_text('{"version": "rc2", "metric": "recall", "x": [1]}')
    (root / "cirr_dataset" / "dev" / "dev-0-0-img1.png").write_bytes(b"no image")
    shown = (root / "cirr_dataset" / "dev" / odd).with_suffix(".png")
    (root / "cirr_dataset" / "dev" / "dev-0-0-img2.png").rename(shown)
    monkeypatch.chdir(tmp_path)
    data = ["--data-root", str(root)]
    clip = ["--clip-model-name", str(root / "tiny_clip_vit.pt"), *CPU.split()]
    index = ["--index", str(root / "index"), *CPU.split()]
    commands = [
        ["check_dataset", *data, "--dataset", "CIRR", "--unofficial", *NO_WORKERS.split()],
        ["check_submission", *data, str(root / "answers.json")],
        ["compare", str(root / "answers.json")],
        ["validate", *data, *clip, "--dataset", "CIRR", "--combining-function", "sum"],
        ["search", "index", "--images", str(root / "cirr_dataset"), "--output", index[1], *clip, *NO_WORKERS.split()],
        ["search", "query", *index, "--image", str(shown), "--text", odd, "--k", "50"],
        ["search", "query", *index, "--image", str(root / "none.png"), "--text", odd],
    ]  # fmt: skip
    for script, *words in commands:
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            importlib.import_module(script).main(words)
        out, err = capsys.readouterr()
        assert printable(odd) in out + err, script
        for line in [*out.split("\n"), *err.split("\n")]:
            assert line.isprintable(), f"{script}: {line!a}"
