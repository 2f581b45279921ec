"""Averages of checkpoints."""

import pytest
import torch

import average
from runtime.tensors import load_tensors


def test_checkpoints_of_one_model_are_averaged(stage_2, run, drawn, tmp_path, capsys):
    folder = stage_2("CIRR", "--num-epochs", 3) / "saved_models"
    files = sorted(folder.iterdir())
    assert len(files) == 3
    soup = tmp_path / "soup.pt"
    average.main(["--checkpoints", *map(str, files), "--output", str(soup)])
    parts = [load_tensors(file)["Combiner"] for file in files]
    for name, weight in load_tensors(soup)["Combiner"].items():
        expected = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(weight, expected.to(weight.dtype))
    words = ["--combining-function", "combiner", "--combiner-path", soup, "--dataset", "CIRR"]
    run("validate", drawn, *words, "--clip-model-name", drawn / "tiny_clip_vit.pt")
    (other,) = stage_2("CIRR", "--num-epochs", 1, "--seed", 5, output="other").glob("*/*.pt")
    for wrong, said in ((other, "seed is 5, but 0"), (files[0].parent.parent, "several")):
        with pytest.raises(SystemExit):
            average.main(["--checkpoints", str(files[0]), str(wrong), "--output", str(soup)])
        assert said in capsys.readouterr().err
