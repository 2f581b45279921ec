"""The examples of docs/new-combiner.md, applied to a copy of the code as they stand, and used by the scripts."""

import json
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from forks import forked
from isolated import write_to

GUIDE = ROOT / "docs" / "new-combiner.md"
# A paragraph that names a file last, and the block below it.
EXAMPLE = re.compile(
    r"`(src/[\w/]+\.py)`[^`\n]*(?:`make_loss`)?:\n\n```(python|diff)\n(.*?)```", re.DOTALL
)
NEXT_BLOCK = re.compile(r"\n\n```diff\n(.*?)```", re.DOTALL)
NEW = (
    "--dataset CIRR --combiner-type hadamard --loss margin --tracker jsonl --projection-dim 16 --hidden-dim 24 "
    "--num-epochs 2 --batch-size 12 --validation-frequency 1 --combiner-lr 1e-3 --save-training --save-best"
)


def use(tree: Path, data: Path, out: Path, log: Path) -> None:
    """Train all that is new, and use what was trained; in a fork, which loads a tree's modules in place of ours."""
    write_to(log)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{ROOT / 'src'}/"):
            del sys.modules[name]
    sys.path[:] = [str(tree / "src"), *(place for place in sys.path if place != str(ROOT / "src"))]
    import combiner_train
    import export
    import search
    import validate
    from reports import run_page

    run_page.can_draw = lambda: False
    clip = ["--clip-model-name", f"{data}/tiny_clip_vit.pt"]
    cpu = ["--num-workers", "0", "--device", "cpu"]
    where = ["--data-root", str(data), *cpu]
    output = ["--output-dir", f"{out}/runs", "--no-feature-cache"]
    combiner_train.main([*NEW.split(), *clip, *where, *output])
    (trained,) = out.glob("runs/*/saved_models/combiner_arithmetic.pt")
    weights = ["--combiner-path", str(trained)]
    result = ["--metrics-json", f"{out}/result.json"]
    composed = ["--combining-function", "combiner", *weights]
    validate.main(["--dataset", "CIRR", *composed, *where, *result])
    export.main([*weights, "--output", f"{out}/pair", "--results", f"{out}/result.json"])
    pair = ["--pair", f"{out}/pair"]
    again = ["--metrics-json", f"{out}/again.json"]
    validate.main(["--dataset", "CIRR", *pair, *where, *again])
    images = data / "cirr_dataset" / "dev"
    search.main(["index", "--images", str(images), "--output", f"{out}/index", *pair, *cpu])
    query = ["--image", str(min(images.iterdir())), "--text", "is red", "--device", "cpu"]
    search.main(["query", "--index", f"{out}/index", *query, "--k", "3", "--json"])


def applied(tree):
    """Apply the examples of the guide to a copy of the code; returns the files that they change."""
    text = GUIDE.read_text()
    changed = []
    for example in EXAMPLE.finditer(text):
        name, kind, block = example.groups()
        file = tree / name
        changed.append(name)
        if kind == "python":
            before = file.read_text() + "\n\n" if file.exists() else ""
            file.write_text(before + block)
            continue
        blocks = [block]
        end = example.end()
        while more := NEXT_BLOCK.match(text, end):
            blocks.append(more[1])
            end = more.end()
        for lines in (block.splitlines() for block in blocks):
            old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
            new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
            code = file.read_text()
            assert code.count(old) == 1, (name, old)
            file.write_text(code.replace(old, new))
    return changed


@pytest.mark.long
def test_the_examples_work_as_they_stand(drawn, tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    for path in [tree, *tree.rglob("*")]:  # of a checkout that is read-only
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    shutil.copy(ROOT / "tests" / "fourth_benchmark.py", tree / "src" / "benchmarks" / "fourth.py")
    assert (
        len(applied(tree)) == len(re.findall("^`{3}(?:python|diff)$", GUIDE.read_text(), re.M)) - 1
    )
    out, log = tmp_path / "out", tmp_path / "log"
    process = forked(use, tree, drawn, out, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    (run,) = (out / "runs").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["epoch"] for line in lines} == {0, 1}
    results = [json.loads((out / name).read_text()) for name in ("result.json", "again.json")]
    assert results[0]["metrics"] == results[1]["metrics"]
    config = json.loads((out / "pair" / "config.json").read_text())
    sizes = config["combiner"]["sizes"]
    assert (sizes["combiner_type"], sizes["projection_dim"], sizes["hidden_dim"]) == (
        "hadamard",
        16,
        24,
    )
    assert log.read_text().count('"similarity"') == 3
