"""The demo, from the pictures to a query of the exported pair, for an ordinary user whose source tree is read-only."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow

# The demo's commands with few images and one epoch: for what is computed there are other tests.
SMALL_DEMO = """
import sys
sys.path.insert(0, "src")
import demo
SMALL = {
    "emoji_dataset.py": "--concepts 3 --train-triplets 3 --eval-queries 1 --side 32",
    "clip_fine_tune.py": "--num-epochs 1 --batch-size 12 --validation-frequency 1",
    "combiner_train.py": "--num-epochs 1 --batch-size 12 --validation-frequency 1 --projection-dim 8 --hidden-dim 8",
}
run = demo.Demo.run
demo.Demo.run = lambda self, script, *flags: run(self, script, *flags, *SMALL.get(script, "").split())
demo.main(["--output-dir", sys.argv[1]])
"""


@pytest.mark.long
def test_an_ordinary_user_with_a_source_tree_that_is_read_only(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    tree, output = folder / "tree", folder / "output"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    output.mkdir()
    before = sorted(tree.rglob("*"))
    for path in [tree, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    ordinary = []
    if os.access(tree, os.W_OK):  # an administrator, who may write to what is read-only
        ordinary = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv, which takes an administrator's rights off, is not installed")
    try:
        done = subprocess.run(
            [*ordinary, sys.executable, "-c", SMALL_DEMO, output],
            cwd=tree,
            env=os.environ | {"HOME": str(folder / "nowhere"), "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert sorted(tree.rglob("*")) == before
    finally:
        for path in [tree, *before]:
            path.chmod(0o755)
    assert "obeys all rules" in done.stdout
    for method in ("image alone", "text alone", "sum"):
        assert len(re.findall(rf"^stage-1 {method}  +[\d.]+ ", done.stdout, re.MULTILINE)) == 1
    kinds = re.findall(r"^(skin tone|colour|time)  +[\d.]+ ", done.stdout, re.MULTILINE)
    assert kinds == ["colour", "skin tone", "time"]
    assert "Traceback" not in done.stderr
    assert list(output.glob("models/*_moe/*/seed_0/saved_models/*.pt"))
    (pair,) = output.glob("exported/*/pair")
    card = (pair / "README.md").read_text()
    assert "trained on Triplets" in card
    assert "Triplets val, combiner" in card
    assert len(re.findall(r"^   [1-5] [\d.]+ .*\.png$", done.stdout, re.MULTILINE)) == 5
