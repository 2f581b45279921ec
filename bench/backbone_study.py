"""Train tiny encoders like SigLIP's and EVA's with the recipe for synthetic shapes, over several seeds.

    python bench/backbone_study.py       (about 45 minutes of a core; writes bench/results/backbone_study.json)

All models are as small as the recipe's CLIP, and start with random weights. Each seed trains both stages; the results
are the metrics of the best validation.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import open_clip
import timm
import torch
import transformers
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import clip_fine_tune
import combiner_train
import shapes_dataset
from benchmarks import BENCHMARKS
from benchmarks.metrics import mean_and_deviation
from demo import best_weights
from models.encoder import versions
from runs import SHAPES_STAGE_1, SHAPES_STAGE_2
from utils import seed_everything

SHOWN = {
    "FashionIQ": ("average_recall", "mean recall"),
    "CIRR": ("mean(R@5+R_s@1)", "mean(R@5+R_s@1)"),
}
RESULTS = Path(__file__).parent / "results" / "backbone_study.json"
SIDE = 32
TOWER = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 4}
TEXT = {"width": 64, "heads": 1, "layers": 2}


def make_tower(kind: type[torch.nn.Module], **sizes: object) -> Callable[..., torch.nn.Module]:
    """Return a function by which timm builds an image encoder of a class."""

    def tower(**asked: object) -> torch.nn.Module:
        head = {name: asked[name] for name in ("num_classes", "global_pool") if name in asked}
        made = kind(**{**TOWER, **sizes, **head})
        made.pretrained_cfg = made.default_cfg = {"input_size": (3, SIDE, SIDE)}
        return made

    tower.__module__ = "timm.models.vision_transformer"  # timm looks up registered models there
    return tower


# SigLIP pools patches by a learned query; EVA-02 has rotary position embeddings, SwiGLU and a class token.
SIGLIP = make_tower(VisionTransformer, num_heads=1, class_token=False, global_pool="map")
EVA = make_tower(
    Eva,
    num_heads=2,
    qkv_fused=False,
    mlp_ratio=4 * 2 / 3,
    swiglu_mlp=True,
    scale_mlp=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(SIDE // 8, SIDE // 8),
)


def configurations() -> dict[str, dict]:
    """Return name -> open_clip configuration, which equals SigLIP2's or EVA02-B-16's except for its sizes."""
    siglip = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision("tiny_siglip", timm_pool="map", timm_proj="none"),
        "text_cfg": {
            **TEXT,
            "context_length": 64,
            "vocab_size": 256,
            "hf_tokenizer_name": "its/own",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    }
    eva = {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": vision("tiny_eva", timm_pool="token", timm_proj=None),
        "text_cfg": {**TEXT, "context_length": 77, "vocab_size": 49408},
    }
    halves = {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    return {
        "like SigLIP2": {"model_cfg": siglip, "preprocess_cfg": halves},
        "like EVA02": {"model_cfg": eva, "preprocess_cfg": {"interpolation": "bicubic"}},
    }


# Model -> the last layers of its image encoder, whose output is the feature.
LAST = {
    "like SigLIP2": ("trunk.attn_pool.proj", "trunk.attn_pool.mlp.fc2"),
    "like EVA02": ("trunk.head",),
}


@torch.no_grad()
def even_out(model: torch.nn.Module, layers: tuple[str, ...]) -> None:
    """Scale the last layers of the image encoder so that image and text features have the same mean norm.

    With random weights, image features of SigLIP's and EVA's encoders have a thousandth to a thirtieth of that norm, so
    that the sum of both is in effect the text feature.
    """
    images = torch.randn(8, 3, SIDE, SIDE)
    words = torch.randint(1, 100, (8, model.context_length))
    lengths = [
        features.norm(dim=-1).mean()
        for features in (model.encode_image(images), model.encode_text(words))
    ]
    for name in layers:
        layer = model.visual.get_submodule(name)
        for weight in layer.parameters():
            weight.mul_(lengths[1] / lengths[0])


def vision(name: str, **head: object) -> dict:
    """Return the configuration of one of timm's image encoders."""
    return {"image_size": SIDE, "timm_model_name": name, **head}


def write_models(folder: Path, *, evened: bool) -> dict[str, str]:
    """Write the models with random weights; return name -> value of --clip-model-name.

    Args:
        evened: whether to scale the image encoders, see `even_out`.
    """
    for name, tower in (("tiny_siglip", SIGLIP), ("tiny_eva", EVA)):
        tower.__name__ = name
        setattr(sys.modules["timm.models.vision_transformer"], name, tower)
        timm.models.register_model(tower)
    named = {"tiny CLIP": str(folder / "data" / "tiny_clip_vit.pt")}
    for name, content in configurations().items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        (place / "open_clip_config.json").write_text(json.dumps(content))
        if "hf_tokenizer_name" in content["model_cfg"]["text_cfg"]:
            write_tokenizer(place, folder / "data")
        seed_everything(0)
        model = open_clip.create_model(f"local-dir:{place}")
        if evened:
            even_out(model, LAST[name])
        torch.save(model.state_dict(), place / "open_clip_pytorch_model.bin")
        named[name] = f"local-dir:{place}"
    return named


def write_tokenizer(place: Path, data: Path) -> None:
    """Write a tokenizer whose vocabulary is the words of the synthetic captions."""
    words: dict[str, None] = {}
    for file in sorted(data.rglob("cap.*.json")):
        for entry in json.loads(file.read_text()):
            captions = entry["captions"] if "captions" in entry else [entry["caption"]]
            words.update(dict.fromkeys(" ".join(captions).lower().replace(",", " ").split()))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(place)


def measure(
    folder: Path, dataset: str, clip: str, *, seed: int, learning_rate: list[str]
) -> dict[str, float]:
    """Train both stages with a seed; return stage -> metric of its best validation.

    Args:
        learning_rate: flags that replace the recipe's learning rate of stage 1; empty to keep it.
    """
    output = folder / "runs" / f"{dataset}_{len(list(folder.glob('runs/*')))}"
    data = ["--dataset", dataset, "--data-root", str(folder / "data"), "--seed", str(seed)]
    data += ["--num-workers", "0", "--output-dir"]
    flags = ["--clip-model-name", clip, "--image-cache", str(folder / "pixels")]
    clip_fine_tune.main(
        [*data, str(output / "clip"), *flags, *SHAPES_STAGE_1.split(), *learning_rate]
    )
    (run,) = (output / "clip").iterdir()
    weights = best_weights(run, BENCHMARKS[dataset].best_clips())
    flags = ["--clip-model-path", str(weights), "--clip-model-name", clip]
    combiner_train.main([*data, str(output / "combiner"), *flags, *SHAPES_STAGE_2.split()])
    (other,) = (output / "combiner").iterdir()
    first = next(iter(BENCHMARKS[dataset].selection))
    metric = SHOWN[dataset][0]
    found = {}
    for stage, made in (("stage 1", run), ("stage 2", other)):
        best = json.loads((made / "best_metrics.json").read_text())
        found[stage] = best[first][metric]
    return found


def main() -> None:
    """Train all models, print a row for each, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--datasets", nargs="+", choices=SHOWN, default=["FashionIQ"])
    parser.add_argument("--models", nargs="+", help="of the three (default: all)")
    parser.add_argument("--learning-rate", help="of stage 1 (default: that for drawn shapes)")
    parser.add_argument("--as-made", action="store_true", help="do not even out, see `even_out`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    learning_rate = ["--learning-rate", args.learning_rate] if args.learning_rate else []
    content: dict = {"seeds": args.seeds, "versions": versions(), "rows": []}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        shapes_dataset.main(["--output-dir", str(folder / "data")])
        named = write_models(folder, evened=not args.as_made)
        for dataset in args.datasets:
            for name in args.models or named:
                found = [
                    measure(folder, dataset, named[name], seed=seed, learning_rate=learning_rate)
                    for seed in args.seeds
                ]
                row = {"dataset": dataset, "model": name, "metric": SHOWN[dataset][1]}
                row["lengths"] = "as made" if args.as_made else "evened out"
                for stage in found[0]:
                    row[stage] = mean_and_deviation([of_seed[stage] for of_seed in found])
                content["rows"].append(row)
                print(json.dumps(row), flush=True)
                args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
