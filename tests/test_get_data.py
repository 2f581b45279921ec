"""Datasets and checkpoints laid out from archives as people share them; each layout cites the listing it is from."""

import io
import json
import shutil
import sys
import tarfile
import types
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import get_data
from benchmarks import BENCHMARKS
from utils import UserError

Files = dict[str, bytes]  # path in an archive -> content


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def below(root: Path, prefix: str = "") -> Files:
    """Read all files below a folder, by their paths with a prefix."""
    return {
        f"{prefix}{file.relative_to(root).as_posix()}": file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def renamed(files: Files, change) -> Files:
    return {str(change(PurePosixPath(name))): content for name, content in files.items()}


@pytest.fixture(scope="module")
def fiq(drawn):
    return drawn / "fashionIQ_dataset"


@pytest.fixture(scope="module")
def cirr(drawn):
    return drawn / "cirr_dataset"


def clip4cir(fiq, cirr, at):
    """One zip of CLIP4Cir's project folder: the tree in "Data Preparation" of github.com/ABaldrati/CLIP4Cir."""
    tree = below(fiq, "project/fashionIQ_dataset/")
    return [zipped(at / "project.zip", {**tree, **below(cirr, "project/cirr_dataset/")})]


def yandex(fiq, cirr, at):
    """A tar of images whose names end in .png, and Google Drive's zips of the rest.

    data/README.md of github.com/google-deepmind/magiclens; the link is github.com/XiaoxiaoGuo/fashion-iq/issues/18.
    """
    images = renamed(below(fiq / "images", "images/"), lambda name: name.with_suffix(".png"))
    captions = zipped(
        at / "captions-20220326T130604Z-001.zip", below(fiq / "captions", "captions/")
    )
    lists = below(fiq / "image_splits", "image_splits/")
    splits = zipped(at / "image_splits-20220326T130551Z-001.zip", lists)
    return [tarred(at / "images.tar.gz", images), captions, splits]


def kaggle(fiq, cirr, at):
    """Kaggle's images alone, and a clone of the official annotations: an unpacked folder with .git/ in it.

    github.com/XiaoxiaoGuo/fashion-iq/issues/18 names kaggle.com/datasets/bitamesbah/fashioniq-bit.
    """
    clone = below(fiq / "captions", "captions/") | below(fiq / "image_splits", "image_splits/")
    clone[".git/captions/cap.dress.val.json"] = b"an object of git"
    images = zipped(at / "archive.zip", below(fiq / "images", "images/"))
    return [folder(at / "fashion-iq", clone), images]


def by_category(fiq, cirr, at):
    """resized_image/{category}/ as CoSMo and its successors read it, with an empty file before the good one.

    Empty files are what dead links leave: github.com/XiaoxiaoGuo/fashion-iq/pull/17.
    """
    files = below(fiq / "captions", "fiq/captions/") | below(
        fiq / "image_splits", "fiq/image_splits/"
    )
    for category in BENCHMARKS["FashionIQ"].parts:
        for split in ("train", "val", "test"):
            for name in json.loads(
                (fiq / f"image_splits/split.{category}.{split}.json").read_text()
            ):
                content = (fiq / f"images/{name}.jpg").read_bytes()
                files[f"fiq/resized_image/{category}/{name}.jpg"] = content
    empty = dict.fromkeys(list(below(fiq / "images", "dead/"))[:5], b"")
    return [folder(at / "by_urls", empty), zipped(at / "fiq.zip", files)]


def nlvr2(fiq, cirr, at):
    """NLVR2's three zips, of more images than CIRR has, and a clone of CIRR's branch cirr_dataset.

    lil.nlp.cornell.edu/resources/NLVR2/{train,dev,test1}_img.zip; the first has images/train/{0..99}/, the others dev/
    and test1/. The clone is in the README of github.com/Cuberick-Orion/CIRR; one with macOS's ._ files is listed in the
    README of ImageScope (arXiv 2503.10166).
    """
    train = below(cirr / "train", "images/train/") | {"images/train/7/train-1-9-img0.png": b"other"}
    clone = below(cirr / "cirr") | {
        "captions/._cap.rc2.val.json": b"\0\5\26\7",
        "captions_ext/cap.ext.rc2.val.json": b"[]",
    }
    return [
        zipped(at / "train_img.zip", train),
        zipped(at / "dev_img.zip", below(cirr / "dev", "dev/")),
        zipped(at / "test1_img.zip", below(cirr / "test1", "test1/")),
        folder(at / "cirr", clone),
    ]


def without_subfolders(fiq, cirr, at):
    """NLVR2 by its addresses: train/ has no sub-folders (github.com/ABaldrati/CLIP4Cir/issues/15)."""
    images = renamed(below(cirr / "train"), lambda name: PurePosixPath("images/train", name.name))
    images |= below(cirr / "dev", "images/dev/") | below(cirr / "test1", "images/test1/")
    files = below(cirr / "cirr", "cirr/")
    return [tarred(at / "nlvr2.tar", images), zipped(at / "c.zip", files)]


def official_cirr(fiq, cirr, at):
    """data/cirr/ with img_raw/ in it, next to features of the same names (README of Cuberick-Orion/CIRR)."""
    files = below(cirr / "cirr", "data/cirr/")
    for part in ("train", "dev", "test1"):
        images = below(cirr / part, f"data/cirr/img_raw/{part}/")
        files |= images
        files |= dict.fromkeys(
            (name.replace("img_raw", "img_feat_res152").replace(".png", ".pkl") for name in images),
            b"feature",
        )
    zipped(folder(at / "all", {"README.md": b"a folder of archives"}) / "cirr.zip", files)
    return [at / "all"]


LAYOUTS = {
    "CIRR": [clip4cir, nlvr2, without_subfolders, official_cirr],
    "FashionIQ": [clip4cir, yandex, kaggle, by_category],
}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


def get(name: str, root: Path, sources: list[Path], *flags: str) -> None:
    where = ["--data-root", str(root), "--num-workers", "0", "--unofficial", *flags]
    get_data.main([name, *where, *(["--archive", *map(str, sources)] if sources else [])])


@pytest.fixture
def refused(capsys):
    """Run the script on what it must reject: exit code 2 and one line, which is returned."""

    def refused(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            get(*arguments)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(lines) == 1
        return lines[0]

    return refused


@pytest.mark.parametrize(
    ("name", "layout"), CASES, ids=lambda case: getattr(case, "__name__", case)
)
def test_every_layout_becomes_the_official_one(name, layout, fiq, cirr, tmp_path, capsys):
    root = tmp_path / "root"
    sources = layout(fiq, cirr, tmp_path)
    # Taken in another order, empty sources first.
    get(name, root, sources[::-1])
    assert "\n  clean" in capsys.readouterr().out
    expected = fiq if name == "FashionIQ" else cirr
    assert below(root / expected.name) == below(expected)


def test_an_interrupted_run_is_completed_and_makes_no_half_file(fiq, cirr, tmp_path, monkeypatch):
    root = tmp_path / "root"
    sources = nlvr2(fiq, cirr, tmp_path)
    put = get_data.put
    after = [20]

    def killed(found, place):
        after[0] -= 1
        if after[0] < 0:
            half = place.with_name(f".{place.name}.clip4cir-0.tmp")  # what a killed process leaves
            half.write_bytes(b"half")
            raise KeyboardInterrupt
        put(found, place)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(get_data, "put", killed)
        get("CIRR", root, sources)
    assert stop.value.code == 130
    first = {file: file.stat().st_ino for file in root.rglob("*.png")}
    assert first
    get("CIRR", root, sources)
    assert below(root / "cirr_dataset") == below(cirr)
    assert first.items() <= {file: file.stat().st_ino for file in root.rglob("*.png")}.items()


def test_files_of_folders_are_hard_links_and_nothing_is_opened_when_all_is_there(
    fiq, cirr, tmp_path, monkeypatch
):
    copy = shutil.copytree(cirr, tmp_path / "copy")
    get("CIRR", tmp_path / "root", [copy])
    images = sorted(copy.rglob("*.png"))
    for image in images:
        assert image.samefile(tmp_path / "root" / "cirr_dataset" / image.relative_to(copy))
    monkeypatch.setattr(get_data, "files_of", None)
    get("CIRR", tmp_path / "root", [copy])


def test_links_are_left_out(cirr, tmp_path):
    """Of a folder, a tar file and a zip file; nothing outside of them is read."""
    secret = folder(tmp_path, {"secret.pt": b"secret"}) / "secret.pt"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.pt").symlink_to(secret)
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(f"{number}.pt")
            entry.type = kind
            entry.linkname = str(secret)
            archive.addfile(entry)
    link = zipfile.ZipInfo("c.pt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, str(secret))
    good = zipped(
        tmp_path / "good.zip", {"../../up.pt": b"up", "/root.pt": b"root", "..\\w.pt": b"w"}
    )
    sources = [tmp_path / "linked", tmp_path / "links.tar", tmp_path / "links.zip", good]
    root = tmp_path / "deep" / "root"
    get("checkpoints", root, sources)
    assert sorted(path.name for path in root.rglob("*.pt")) == ["root.pt", "up.pt", "w.pt"]
    assert all(path.parent == root / "models_final" for path in root.rglob("*.pt"))
    assert sorted(tmp_path.glob("deep/*")) == [root]


@pytest.mark.parametrize("place", ["./../../out.png", "/etc/out.png", "{root}/src/out.png"])
def test_a_list_that_leads_out_of_the_dataset_is_rejected(place, cirr, tmp_path, refused):
    root = tmp_path / "root"
    files = below(cirr, "data/")
    listed = {"train-0-0-img0": place.format(root=root)}
    files["data/cirr/image_splits/split.rc2.train.json"] = json.dumps(listed).encode()
    assert "points outside" in refused("CIRR", root, [zipped(tmp_path / "c.zip", files)])
    assert not list(tmp_path.rglob("out.png"))


def test_bad_archives_are_one_line(fiq, tmp_path, refused):
    whole = zipped(tmp_path / "whole.zip", below(fiq, "fiq/")).read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"\xff\xd8\xff") + 40] ^= 1  # in an image
    files = {
        "cut.zip": whole[: len(whole) // 2],
        "flipped.zip": bytes(flipped),
        "cut.tar.gz": tarred(tmp_path / "t.tar.gz", below(fiq)).read_bytes()[:5000],
        "fashionIQ_dataset.rar": b"Rar!\x1a\7\1\0",  # huggingface.co/datasets/Plachta/FashionIQ
    }
    folder(tmp_path / "bad", files)
    for name, message in {
        "cut.zip": "is damaged, or not a zip",
        "flipped.zip": "cannot be unpacked (Bad CRC-32",
        "cut.tar.gz": "cannot be unpacked (",
        "fashionIQ_dataset.rar": "unpack it and pass its folder",
        "nowhere.zip": "is missing",
    }.items():
        root = tmp_path / f"root of {name}"
        assert message in refused("FashionIQ", root, [tmp_path / "bad" / name]), name
        assert not list(root.rglob("*.tmp"))
    for name, message in (("checkpoints", "no .pt or .safetensors"), ("CIRR", "none of split.rc2")):
        assert message in refused(name, tmp_path / "root", [tmp_path / "whole.zip"])


def test_download_passes_on_what_gdown_fetches(tmp_path, monkeypatch, refused, capsys):
    """The released names are those of CLIP4Cir's Google Drive folder (github.com/ABaldrati/CLIP4Cir/issues/3)."""
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert "requirements-download.txt" in refused("checkpoints", tmp_path, [], "--download")
    assert "lil.nlp.cornell.edu/nlvr" in refused("CIRR", tmp_path, [], "--download")

    def download_folder(url, output, resume):
        assert (url, resume) == (get_data.DRIVE["checkpoints"], True)
        names = ["CIRR/RN50x4_fullft/cirr_clip_RN50x4_fullft.pt", "CIRR/cirr_comb_RN50x4_fullft.pt"]
        folder(Path(output), dict.fromkeys(names, b"weights"))
        return names

    def fails(**flags):
        raise OSError("no network")

    fake = types.SimpleNamespace(
        download_folder=fails,
        download=fails,
        exceptions=types.SimpleNamespace(DownloadError=UserError),
    )
    monkeypatch.setitem(sys.modules, "gdown", fake)
    for name in get_data.DRIVE:
        assert "open this link in a browser" in refused(name, tmp_path, [], "--download")
    fake.download_folder = download_folder
    get("checkpoints", tmp_path, [], "--download")
    names = ["cirr_clip_RN50x4_fullft.pt", "cirr_comb_RN50x4_fullft.pt"]
    assert sorted(file.name for file in (tmp_path / "models_final").iterdir()) == names
