"""Flags: each of a training is known to compute or to be free, and the names they choose from are the packages' own."""

import argparse

import pytest

import clip_fine_tune
import combiner_train
from models.clip_model import clip
from models.configuration import FREE_FLAGS, MOVABLE_FLAGS
from runtime.choices import OPENAI_CLIPS

COMPUTING = {
    clip_fine_tune: {"encoder", "gradient_checkpointing", "learning_rate", "micro_batch_size"},
    combiner_train: {
        "clip_bs", "combiner_lr", "combiner_type", "hidden_dim", "load_balancing_weight", "negatives",
        "num_experts", "projection_dim", "router_z_weight", "seeds", "top_k",
    },
}  # fmt: skip
COMPUTING_IN_BOTH = {
    "batch_size", "clip_grad_norm", "clip_model_name", "compile", "cosine", "dataset", "decode", "ema_decay",
    "encode_precision",
    "mask_duplicate_targets", "num_epochs", "precision", "save_best", "save_training", "script", "seed",
    "target_ratio", "transform", "validation_frequency", "verify", "warmup_steps",
}  # fmt: skip


@pytest.mark.parametrize("script", COMPUTING)
def test_each_flag_of_a_training_is_known_to_compute_or_to_be_free(script):
    """Guards against a new flag that --resume takes for a contradiction, or passes over."""
    flags = set(vars(script.parse(["--dataset", "CIRR"])))
    assert flags - FREE_FLAGS == COMPUTING[script] | COMPUTING_IN_BOTH
    assert MOVABLE_FLAGS <= FREE_FLAGS


def test_openais_names_are_those_of_the_clip_package():
    assert list(OPENAI_CLIPS) == clip.available_models()


def test_the_combining_function_is_taken_in_any_case():
    import validate

    args = validate.parse(["--dataset", "CIRR", "--combining-function", "Sum"])
    assert isinstance(args, argparse.Namespace)
    assert args.combining_function == "sum"
