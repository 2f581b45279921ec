"""Measure a trained pair on the validation split of FashionIQ or CIRR.

    python src/validate.py --dataset FashionIQ --combining-function combiner \
        --combiner-path models_final/moe_combiner_trained_on_fiq --clip-model-path models_final/clip_finetuned_on_fiq
"""

import argparse
import json
from pathlib import Path

import distributed
import options
from benchmarks import BENCHMARKS
from data_utils import check_images_exist
from features import FeatureCache
from pair import load_pair
from retrieval import evaluate, freeze_val
from utils import check_writable, command, write_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a validation."""
    parents = [options.dataset_flag(), options.pair_flags(), options.combiner_flags(trains=False)]
    parents += [options.tuned_clip_flag(), options.clip_flags(), options.machine_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    parser.add_argument("--metrics-json", type=Path, metavar="FILE", help="write the metrics there too")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Print the metrics, one `name = value` a line."""
    args = parse(argv)
    device = options.pick_device(args.device)
    check_writable({"--metrics-json": args.metrics_json.parent if args.metrics_json else None})
    benchmark = BENCHMARKS[args.dataset](args.data_root)
    val = benchmark.val()
    check_images_exist(val)
    paths = args.clip_model_path, args.combiner_path
    choices = options.clip_choice(args), options.combiner_choice(args)
    encoder, compose = load_pair(args.combining_function, *paths, *choices, device, args.num_workers)
    frozen = freeze_val(FeatureCache(None, encoder), benchmark, val)
    metrics = evaluate(benchmark, frozen, compose, args.similarity_block)
    if distributed.is_main():
        for name, value in metrics.items():
            print(f"{name} = {value}")
        if args.metrics_json:
            write_text(args.metrics_json, json.dumps(metrics, indent=2) + "\n")
    distributed.stop()


if __name__ == "__main__":
    main()
