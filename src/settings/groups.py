"""All settings of a training run, and the settings that other scripts share with it, grouped by subject."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from benchmarks import BENCHMARKS
from runtime.choices import (
    AUTO,
    BACKGROUNDS,
    COMBINER_TYPES,
    DECODINGS,
    ENCODE_PRECISIONS,
    ENCODERS,
    HARD_NEGATIVES,
    LORA_TARGETS,
    LOSSES,
    MINED,
    NEGATIVES,
    PRECISIONS,
    TRANSFORMS,
)
from runtime.trackers import TRACKERS
from settings.declaring import (
    AnyText,
    Flags,
    OneOf,
    Typed,
    UsablePath,
    changed,
    names_where,
    setting,
)
from settings.flag_types import MILLION, in_any_case, model_name, path_or_auto
from settings.recipes import RECIPES
from utils import PROJECT_ROOT

Count = Annotated[int, Field(ge=1, le=MILLION)]
Number = Annotated[int, Field(ge=0, le=MILLION)]
Rows = Annotated[int, Field(ge=1, le=10**9)]  # rows of a matrix that are computed at a time
Workers = Annotated[int, Field(ge=0, le=256)]  # each worker process needs a few hundred megabytes
Width = Annotated[int, Field(ge=1, le=100_000)]  # width of a layer
Experts = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
LearningRate = Annotated[float, Field(ge=1e-12, le=100)]
Weight = Annotated[float, Field(ge=0, le=MILLION)]  # weight of a loss term, or scale of some noise
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=1e-9, le=1 - 1e-9)]
# Ratio of an image's longer side to its shorter side. A ratio below 1 pads every image to a square whose side is up to
# ten times the longer side.
SideRatio = Annotated[float, Field(ge=0.1, le=1000)]
BenchmarkName = Annotated[str, Typed(in_any_case(list(BENCHMARKS))), OneOf(BENCHMARKS)]
ClipName = Annotated[str, Typed(model_name)]
CachePlace = Annotated[
    Path | str, Typed(path_or_auto, lambda text: text if text == AUTO else Path(text))
]


class Origin(Flags):
    """Command that started a training run."""

    script: AnyText = setting("", where="computes")
    command: AnyText = setting("", where="free")
    started_in: AnyText | None = setting(None, where="free")


class Dataset(Flags):
    """Choice of the benchmark."""

    title = "benchmark"
    dataset: BenchmarkName = setting(..., "benchmark to use (not case-sensitive)")


class Data(Flags):
    """Folder of the benchmarks."""

    title = "data"
    data_root: UsablePath = setting(
        PROJECT_ROOT,
        "folder that contains fashionIQ_dataset/, cirr_dataset/ and the like (default: the project's root)",
        metavar="DIR",
        where="free",
    )


class Device(Flags):
    """Device for the computation."""

    title = "machine"
    device: AnyText | None = setting(
        None,
        "device for the computation, such as cuda:1 or cpu (default: cuda if available, else cpu)",
        metavar="DEV",
        where="free",
    )


class Decoding(Flags):
    """Number of data-loader workers, for scripts that decode many images."""

    title = "machine"
    num_workers: Workers = setting(
        min(8, os.cpu_count() or 1),
        "number of data-loader processes that decode images (default: one per CPU core, at most 8)",
        where="free",
    )


class Evaluation(Flags):
    """Images to exclude, and the number of queries that are ranked at a time."""

    title = "evaluation"
    exclusions: UsablePath | None = setting(
        None,
        "list of images to leave out, written by check_dataset.py --write-exclusions",
        metavar="FILE",
        where="moves",
    )
    similarity_block: Rows | None = setting(
        None,
        "number of queries that are compared with the gallery at a time (default: as many as fit in 1 GiB)",
        metavar="ROWS",
        where="free",
    )


class Clip(Flags):
    """Choice of CLIP, its preprocessing and its encoding precision; None for flags that are not given."""

    title = "CLIP"
    about = "flags not given are read from the checkpoint, or take their defaults without one"
    clip_model_name: ClipName | None = setting(
        None,
        "CLIP model: a name from --list-models, or the path of a checkpoint (default: RN50x4)",
        metavar="NAME",
    )
    transform: Annotated[str, OneOf(TRANSFORMS)] | None = setting(
        None,
        "padding and cropping of images to a square; targetpad: pad elongated images to --target-ratio; squarepad: pad "
        "every image to a square; clip: only resize and crop the center (default: targetpad)",
    )
    target_ratio: SideRatio | None = setting(
        None,
        "largest ratio of the sides of an image that targetpad leaves unpadded (default: 1.25)",
    )
    encode_precision: Annotated[str, OneOf(ENCODE_PRECISIONS)] | None = setting(
        None,
        "precision for encoding features without training: validation, frozen features, indexes (default: fp32)",
    )
    decode: Annotated[str, OneOf(DECODINGS)] | None = setting(
        None,
        "decoding of images; draft: decode large JPEG files at 1/2, 1/4 or 1/8 of their size, which is faster but "
        "changes the pixels slightly (default: full)",
    )
    background: Annotated[str, OneOf(BACKGROUNDS)] | None = setting(
        None,
        "background color for transparent images; with a color, images are also rotated upright and converted to 8-bit "
        "sRGB; original: read them as the original code does (default: white, but original for published benchmarks)",
    )


class TunedClip(Flags):
    """Weights of stage 1."""

    title = "fine-tuned CLIP"
    clip_model_path: UsablePath | None = setting(
        None, "stage-1 weights: a checkpoint, or a run folder", metavar="PATH", where="moves"
    )


class Training(Flags):
    """Settings that both stages of training share."""

    title = "training"
    recipe: Annotated[str, OneOf(RECIPES)] = setting(
        "original",
        "set of values that replaces the defaults of flags not given, see docs/recipe.md; original: keep the defaults",
    )
    num_epochs: Count = setting(
        300, "number of epochs, which are passes over the training triplets"
    )
    batch_size: Count = setting(512, "number of triplets per step, summed over all processes")
    validation_frequency: Count = setting(1, "number of epochs from one validation to the next")
    validate_last: bool = setting(False, "also validate after the last epoch")
    save_training: bool = setting(False, "save the weights at each validation")
    save_best: bool = setting(
        False, "save only the best weights, not the weights of every validation"
    )
    save_every: Count | None = setting(
        None, "also save the weights every N epochs, validated or not", metavar="N", where="free"
    )
    seed: Seed = setting(0, "random seed for initial weights, batch order and dropout")
    seeds: list[Seed] | None = setting(
        None, "random seeds for several training runs, one after the other; replaces --seed"
    )
    output_dir: UsablePath = setting(
        PROJECT_ROOT / "models",
        "folder in which run folders are created",
        metavar="DIR",
        where="free",
    )
    resume: UsablePath | None = setting(
        None,
        "run folder of an interrupted run to resume; its flags are read from it",
        metavar="RUN_DIR",
        where="free",
    )
    verify: bool = setting(
        False,
        "for caches and --resume, detect changed images by hashing whole files (default: by size, "
        "modification time and the first, middle and last 4 KiB)",
    )
    checkpoint_every_minutes: Positive = setting(
        10.0,
        "minutes between saves of the training state within an epoch, the most work that a crash can lose",
        metavar="M",
        where="free",
    )
    precision: Annotated[str, OneOf(PRECISIONS)] = setting(
        "amp", "precision of training; amp: mixed fp16 on CUDA, fp32 on the CPU"
    )
    compile: bool = setting(False, "compile the trained module with torch.compile")

    @field_validator("seeds")
    @classmethod
    def each_seed_once(cls, seeds: list[int] | None) -> list[int] | None:
        """Reject an empty list and repeated seeds, since each seed gets a folder of its own."""
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            raise PydanticCustomError("seeds", "it contains a seed twice: pass each seed once")
        return seeds

    @property
    def validated_epochs(self) -> list[int]:
        """Return the epochs that end with a validation.

        As in the original code, they are the first and every `validation_frequency`-th after it; `validate_last` adds
        the last epoch.
        """
        epochs = list(range(0, self.num_epochs, self.validation_frequency))
        last = self.num_epochs - 1
        return [*epochs, last] if self.validate_last and epochs[-1] != last else epochs

    @property
    def saved_epochs(self) -> list[int]:
        """Return the epochs whose weights are saved regardless of the validation results."""
        epochs = set()
        if self.save_training and not self.save_best:
            epochs.update(self.validated_epochs)
        if self.save_every:
            epochs.update(range(self.save_every - 1, self.num_epochs, self.save_every))
        return sorted(epochs)


class BeyondOriginal(Flags):
    """Training settings that the original code does not have."""

    title = "training, beyond the original"
    about = "all off by default"
    mask_duplicate_targets: bool = setting(
        False,
        "do not treat targets of a batch as negatives of queries with the same target",
        off="treat all other targets as negatives, whatever --recipe sets",
    )
    loss: Annotated[str, OneOf(LOSSES)] = setting(
        "contrastive",
        "training loss; contrastive: each query must find its target; symmetric: each target must also find its query",
    )
    learn_temperature: bool = setting(
        False,
        "learn the temperature of the loss; it starts at 1/100, the original's fixed value, and never falls below it",
    )
    label_smoothing: Annotated[float, Field(ge=0, le=1 - 1e-9)] = setting(
        0.0,
        "probability mass that the loss spreads evenly over all candidates of a query, from 0 to below 1",
    )
    hard_negatives: Number = setting(
        0,
        "number of extra negative images per triplet, each a negative of all queries of the batch",
        metavar="N",
    )
    hard_negatives_from: Annotated[str, OneOf(HARD_NEGATIVES)] = setting(
        MINED,
        "source of hard negatives; mined: images near the target; group: the triplet's group (CIRR); column: the "
        "`negatives` column of your own triplets",
    )
    negatives_margin: Share = setting(
        0.05,
        "margin for mining: skip images whose cosine similarity to the target exceeds 1 - M",
        metavar="M",
    )
    warmup_steps: Number = setting(0, "number of steps in which the learning rate rises linearly")
    cosine: bool = setting(
        False,
        "decay the learning rate to 0 along half a cosine",
        off="keep the learning rate constant, whatever --recipe sets",
    )
    clip_grad_norm: Positive | None = setting(
        None,
        "largest norm of the gradient, which is clipped to it (default: no clipping)",
        metavar="NORM",
        off="do not clip gradients, whatever --recipe sets",
    )
    ema_decay: Fraction | None = setting(
        None,
        "per-step decay of a moving average of the weights; the average is validated and saved (default: no average)",
        metavar="DECAY",
        off="do not average weights, whatever --recipe sets",
    )


class Regularisation(Flags):
    """Regularisation and noise of both stages."""

    title = "regularisation and noise, beyond the original"
    about = "all off by default, see docs/recipe.md"
    drop_text: Share = setting(
        0.0, "fraction of the queries in each step whose text is left out, from 0 to 1", metavar="P"
    )
    drop_image: Share = setting(
        0.0,
        "fraction of the queries in each step whose image is left out, from 0 to 1; no query loses both",
        metavar="P",
    )
    noise: Share = setting(
        0.0,
        "fraction of training triplets whose targets are shuffled among themselves, to test robustness to label noise",
        metavar="S",
    )
    noise_seed: Seed = setting(
        0, "random seed for the choice of noisy triplets, independent of --seed"
    )

    @field_validator("drop_image")
    @classmethod
    def never_both(cls, drop_image: float, info: ValidationInfo) -> float:
        """Reject fractions that sum to more than 1, since a query must keep its image or its text."""
        if info.data.get("drop_text", 0) + drop_image > 1:
            raise PydanticCustomError(
                "drop_image", "the sum of drop_text and drop_image should be at most 1"
            )
        return drop_image


class Tracking(Flags):
    """Trackers that display a run."""

    title = "tracking"
    about = "in addition to the CSV files of the run"
    tracker: list[Annotated[str, OneOf(TRACKERS)]] = setting(
        [],
        "trackers that display the run, one or more; TensorBoard files are written to the run folder",
        where="free",
    )
    api_key: AnyText | None = setting(
        None, "API key of Comet; it is never written to a file", where="secret"
    )
    workspace: AnyText | None = setting(
        None, "Comet workspace in which the run appears", where="free"
    )
    experiment_name: AnyText | None = setting(
        None, "name of the run in trackers (default: the name of its folder)", where="free"
    )


class FineTuning(Flags):
    """Settings of stage 1."""

    title = "stage 1"
    encoder: Annotated[str, OneOf(ENCODERS)] = setting("both", "encoders of CLIP to train")
    learning_rate: LearningRate = setting(2e-6, "AdamW learning rate")
    micro_batch_size: Count | None = setting(
        None,
        "number of triplets in memory at a time, for large batches with exact gradients (default: the whole batch)",
        metavar="N",
    )
    mine_every: Count = setting(
        1,
        "number of epochs after which hard negatives are mined again with the current weights",
        metavar="E",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations instead of keeping them: less memory, more time"
    )
    flip: Share = setting(
        0.0,
        "probability of mirroring reference and target together; not if a caption mentions directions or writing",
        metavar="P",
    )
    crop: Annotated[float, Field(ge=0.01, le=1)] = setting(
        1.0,
        "smallest fraction of an image's area that a random square crop keeps; 1: do not crop",
        metavar="S",
    )
    image_cache: CachePlace | None = setting(
        AUTO,
        "folder for preprocessed images (default: pixels/ in the project, if the disk has room and it saves time)",
        metavar="DIR",
        where="free",
        off="do not cache preprocessed images on disk",
    )


class Lora(Flags):
    """Low-rank adapters, which are trained instead of CLIP's weights."""

    title = "LoRA"
    about = "off by default; needs requirements-lora.txt"
    lora_rank: Width | None = setting(
        None,
        "rank of low-rank adapters, which are trained instead of CLIP's weights (default: no adapters)",
        metavar="R",
    )
    lora_targets: Annotated[str, OneOf(LORA_TARGETS)] = setting(
        LORA_TARGETS[0], "layers of the trained encoders that get adapters"
    )
    lora_norms: bool = setting(False, "train the normalisation layers in addition to the adapters")

    @field_validator("lora_targets", "lora_norms")
    @classmethod
    def only_with_adapters(cls, value: str | bool, info: ValidationInfo) -> str | bool:
        """Reject settings of adapters if there are no adapters."""
        if value not in (False, LORA_TARGETS[0]) and not info.data.get("lora_rank"):
            raise PydanticCustomError("lora", "it needs adapters: also pass --lora-rank")
        return value


class CombinerFlags(Flags):
    """Architecture and sizes of the Combiner to train."""

    title = "Combiner"
    combiner_type: Annotated[str, OneOf(COMBINER_TYPES)] = setting(
        "moe", "Combiner architecture; moe: mixture of experts; clip4cir: the Combiner of CLIP4Cir"
    )
    projection_dim: Width = setting(
        2560, "dimension to which image and text features are projected"
    )
    hidden_dim: Width = setting(5120, "dimension of the hidden layers")
    num_experts: Experts = setting(4, "number of experts (moe)")
    top_k: Experts = setting(2, "number of experts per query (moe)")
    shared_expert: bool = setting(
        False, "add an expert that every query goes through (moe; Dai et al. 2024)"
    )
    router_norm: bool = setting(False, "layer-normalise the router's input (moe)")

    @field_validator("top_k")
    @classmethod
    def no_more_than_experts(cls, top_k: int, info: ValidationInfo) -> int:
        """Reject a top_k that exceeds the number of experts of a mixture."""
        experts = info.data.get("num_experts")
        if experts and top_k > experts and info.data.get("combiner_type") == "moe":
            raise PydanticCustomError(
                "top_k", "it should be at most num_experts, {experts}", {"experts": experts}
            )
        return top_k


class WantedCombiner(Flags):
    """Expected architecture of a checkpoint's Combiner; None for flags that are not given."""

    title = "Combiner"
    about = "read from the checkpoint; a flag that differs from it is an error"
    silent: ClassVar[str] = " (default: as in the checkpoint)"
    combiner_type: Annotated[str, OneOf(COMBINER_TYPES)] | None = changed(
        CombinerFlags, "combiner_type", None, silent
    )
    projection_dim: Width | None = changed(CombinerFlags, "projection_dim", None, silent)
    hidden_dim: Width | None = changed(CombinerFlags, "hidden_dim", None, silent)
    num_experts: Experts | None = changed(CombinerFlags, "num_experts", None, silent)
    top_k: Experts | None = changed(CombinerFlags, "top_k", None, silent)
    shared_expert: bool | None = changed(CombinerFlags, "shared_expert", None, silent)
    router_norm: bool | None = changed(CombinerFlags, "router_norm", None, silent)


class Frozen(Flags):
    """Settings of stage 2."""

    title = "stage 2"
    combiner_lr: LearningRate = setting(2e-5, "Adam learning rate")
    negatives: Annotated[str, OneOf(NEGATIVES)] = setting(
        "batch",
        "negatives of a query; batch: the targets of its batch; bank: all training targets",
    )
    feature_noise: Weight = setting(
        0.0,
        "standard deviation of Gaussian noise on reference and caption features, as a fraction of their norms",
        metavar="SIGMA",
    )
    mix: Weight = setting(
        0.0,
        "mixup parameter: mix pairs of triplets in each step with weights from Beta(ALPHA, ALPHA); 0: off (Zhang "
        "et al. 2018)",
        metavar="ALPHA",
    )
    load_balancing_weight: Weight = setting(
        0.0,
        "weight of the loss that spreads queries evenly over the experts (Fedus et al. 2021); 0, as in the original: "
        "off",
        metavar="W",
    )
    router_z_weight: Weight = setting(
        0.0,
        "weight of the loss that keeps the router's logits small (Zoph et al. 2022); 0, as in the original: off",
        metavar="W",
    )
    router_noise: Weight = setting(
        0.0,
        "standard deviation of the noise added to the router's logits in training (Shazeer et al. 2017); 0, as in the "
        "original, disables it",
        metavar="SIGMA",
    )
    router_bias: Weight = setting(
        0.0,
        "step size of the bias that balances the load of the experts (Wang et al. 2024); 0, as in the original: no "
        "bias",
        metavar="RATE",
    )
    clip_bs: Count = setting(32, "number of images or texts that CLIP encodes at a time")
    feature_cache: UsablePath | None = setting(
        PROJECT_ROOT / "features",
        "folder for cached features",
        metavar="DIR",
        where="free",
        off="do not cache features on disk",
    )

    @field_validator("negatives")
    @classmethod
    def of_one_kind(cls, negatives: str, info: ValidationInfo) -> str:
        """Reject hard negatives together with a bank of negatives."""
        if negatives == "bank" and info.data.get("hard_negatives"):
            raise PydanticCustomError(
                "negatives",
                "--hard-negatives adds negatives to a batch, but --negatives bank already uses all targets: remove "
                "one of the two flags",
            )
        return negatives

    @field_validator("mix")
    @classmethod
    def targets_of_a_batch(cls, mix: float, info: ValidationInfo) -> float:
        """Reject mixup with a bank or hard negatives, both of which consist of unmixed images."""
        if mix and (info.data.get("negatives") == "bank" or info.data.get("hard_negatives")):
            raise PydanticCustomError(
                "mix", "it should be 0 with --negatives bank or --hard-negatives"
            )
        return mix


class BothStages(
    Origin,
    Dataset,
    Clip,
    Training,
    BeyondOriginal,
    Regularisation,
    Tracking,
    Data,
    Decoding,
    Device,
    Evaluation,
):
    """All settings that both training scripts share."""


class Stage1(FineTuning, Lora, BothStages):
    """All settings of stage 1, fine-tuning CLIP."""


class Stage2(Frozen, CombinerFlags, TunedClip, BothStages):
    """All settings of stage 2, training a Combiner."""

    batch_size: Count = changed(Training, "batch_size", 1024)
    validation_frequency: Count = changed(Training, "validation_frequency", 3)


class AnyTraining(Stage1, Stage2):
    """Settings of both stages, for runs and checkpoints of either stage."""

    dataset: BenchmarkName | None = setting(None, "benchmark to use (not case-sensitive)")  # type: ignore[assignment]


# Training script -> its settings.
STAGES: dict[str, type[BothStages]] = {"clip_fine_tune.py": Stage1, "combiner_train.py": Stage2}
# Flags that may differ when a run is resumed. MOVABLE_FLAGS are paths of files whose content must stay the same.
FREE_FLAGS = names_where(AnyTraining, "free", "moves", "secret")
MOVABLE_FLAGS = names_where(AnyTraining, "moves")


@dataclass(frozen=True, kw_only=True)
class PairChoice:
    """Choice of the trained pair to evaluate.

    Attributes:
        combining_function: one of COMBINING_FUNCTIONS; None for "combiner" if its path is given, else "sum".
        clip_path: stage-1 weights; None for the pretrained weights of the model.
        combiner_path: stage-2 weights.
        exported: exported pair, which replaces both paths: its folder, or "hf-hub:" followed by a repository.
        workers: number of data-loader workers.
        feature_cache: folder in which features are cached; None for no cache.
        told_by: method by which the cache detects a changed image, see `runtime.files.stamp`.
    """

    combining_function: str | None
    clip_path: Path | None
    combiner_path: Path | None
    exported: Path | str | None = None
    clip: Clip = field(default_factory=Clip)
    combiner: WantedCombiner = field(default_factory=WantedCombiner)
    workers: int = 0
    feature_cache: Path | None = None
    told_by: str = "sample"
