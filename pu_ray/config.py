"""Every setting of a job: one YAML, typed, closed, with the origin of each value.

Values come in layers, later ones win: the models' defaults, the recipe, the job file, the environment
(`PU_RAY__SECTION__KEY=value`) and `--set section.key=value`. Nothing here touches Ray, torch or storage,
so a wrong job file stops in well under a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pu_ray.errors import ConfigError, RefusedSetting, wrong_setting

ENVIRONMENT_PREFIX = "PU_RAY__"

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PreprocessingConfig(_Section):
    """How encoded images become a network's input. Scoring transforms have no randomness."""

    size_px: PositiveInt = Field(default=224, description="Height and width of the network's input.")
    resize_px: PositiveInt | None = Field(
        default=None, description="Shorter side before the centre crop; default: `size_px`."
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(default="bilinear", description="Of the resize.")
    channels: Literal[1, 3] = Field(default=3, description="1 for greyscale networks.")
    mean: tuple[float, ...] = Field(default=(0.485, 0.456, 0.406), description="Per channel, of pixels in [0, 1].")
    std: tuple[float, ...] = Field(default=(0.229, 0.224, 0.225), description="Per channel, of pixels in [0, 1].")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise RefusedSetting(
                f"mean and std need one number per channel ({self.channels}), got {len(self.mean)} and {len(self.std)}",
                slug="mean-and-std-unlike-channels",
            )
        if min(self.std) <= 0:
            raise RefusedSetting(f"every std must be above 0, got {min(self.std)}", slug="std-not-positive")
        if self.resize_px is not None and self.resize_px < self.size_px:
            raise RefusedSetting(
                f"resize_px ({self.resize_px}) must be at least size_px ({self.size_px})", slug="resize-below-size"
            )
        return self

    @property
    def shape_hwc(self) -> tuple[int, int, int]:
        """Shape of one decoded image."""
        return (self.size_px, self.size_px, self.channels)


class NetworkConfig(_Section):
    """A network by name: `cifar/resnet8-w16`, `torchvision/resnet18`, `timm/resnet34`, or a bare torchvision name.

    Or of your own: `my_nets.tiny:build` imports that module and calls `build(num_classes=..., in_chans=..., **options)`
    for a `torch.nn.Module`. That code runs wherever the job runs, because the job's author names it; weights never do.
    """

    architecture: str = Field(
        min_length=1,
        description="cifar/resnet{depth}-w{width} with depth 6n+2, 18 or 34; torchvision/NAME; timm/NAME; or "
        "module:function. A change inside the function is not seen: give it another name or option.",
    )
    options: dict[str, int | float | bool | str] = Field(
        default_factory=dict, description="Keyword arguments of the network's factory."
    )


class TeacherConfig(NetworkConfig):
    """The trained classifier the student learns from."""

    weights: str = Field(description="URI of a .safetensors file, or of a .pth state dict (loaded weights_only).")
    classes: str = Field(description="URI of a text file with one class name per line, in the order of the logits.")
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    stages: tuple[str, ...] | None = Field(
        default=None, description="Module names whose pooled outputs are the multi-scale features; default: found."
    )


class StudentConfig(NetworkConfig):
    """The network that learns, and what is exported and served."""

    preprocessing: PreprocessingConfig | None = Field(
        default=None, description="Where the student takes other images than the teacher; default: the teacher's."
    )


class ImagesConfig(_Section):
    """A labeled image collection: one folder per class, named as in `teacher.classes`."""

    uri: str = Field(min_length=1, description="Folder or URI; below it one folder per class.")


class LakeConfig(_Section):
    """The unlabeled images."""

    uri: str = Field(min_length=1, description="A folder of shards or of images, or one shard.")
    format: Literal["auto", "parquet", "tar", "uris", "folder"] = Field(
        default="auto", description="auto: by each file's suffix; uris: text files (.uris) with one URI per line."
    )
    max_error_share: Share = Field(default=0.05, description="The run stops (exit 3) above this share of bad images.")
    max_image_bytes: PositiveInt = Field(default=64 * 2**20, description="Larger encoded images become error rows.")
    max_image_px: PositiveInt = Field(default=100_000_000, description="Width x height checked before decoding.")
    scaled_decode: bool = Field(
        default=False,
        description="Decode JPEGs at the smallest scale that holds the pixels needed: faster, slightly other pixels.",
    )
    min_scaled_agreement: Share = Field(
        default=0.95, description="scaled_decode: share of a lake sample on which the teacher must say the same."
    )
    chunk_rows: PositiveInt = Field(default=2048, description="Images per unit of work inside a shard.")
    truth: str | None = Field(
        default=None, description="Parquet of sample_id and class where the lake's truth is known (benchmarks)."
    )


class FeaturesConfig(_Section):
    """The one pass of the frozen teacher over the lake."""

    engine: Literal["auto", "torch", "onnx"] = Field(
        default="auto", description="auto: torch on a GPU, ONNX Runtime on a CPU."
    )
    batch_size: Literal["auto"] | PositiveInt = Field(
        default="auto", description="Images of one forward pass; auto: 256 on a GPU, what fits the caches on a CPU."
    )
    compile: bool = Field(default=False, description="torch.compile on a GPU: minutes at start, faster afterwards.")
    cache: bool = Field(
        default=True,
        description="Keep every image's features, so that another scorer needs no second look at the lake; "
        "false: keep a sample for the fit, and score the lake from its images.",
    )
    cache_uri: str | None = Field(
        default=None, description="Folder shared by runs: what one embedded with this teacher, no other embeds again."
    )
    cascade: bool = Field(
        default=False, description="A gate on the early stages spares far negatives the rest of the network."
    )
    cascade_stages: PositiveInt = Field(default=1, description="How many early stages the gate sees.")
    cascade_recall: OpenShare = Field(default=0.995, description="Share of labeled positives the gate must let pass.")
    cascade_margin: NonNegativeFloat = Field(
        default=0.25,
        description="How far below the weakest of those the gate stands, in units of that one's distance to the "
        "median; raise it where labeled images look better to the teacher than the lake's, as its own training "
        "images do.",
    )
    cascade_sample: PositiveInt = Field(default=8192, description="Lake images the gate is fitted on.")

    @model_validator(mode="after")
    def _cache_uri_needs_cache(self) -> Self:
        if self.cache_uri is not None and not self.cache:
            raise RefusedSetting(
                "cache_uri shares what cache keeps: set cache to true, or leave cache_uri out",
                slug="cache-uri-without-cache",
            )
        return self


class SplitConfig(_Section):
    """How the labeled images are shared out; a calibration image is never used for training."""

    train: OpenShare = Field(default=0.5, description="Share that the scorer learns from.")
    validate_: OpenShare = Field(
        default=0.15,
        alias="validate",
        description="Share that chooses among scorers and among the student's checkpoints.",
    )
    calibrate: OpenShare = Field(default=0.35, description="Share that the threshold and its promise stand on.")

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validate_ + self.calibrate
        if abs(total - 1.0) > 1e-6:
            raise RefusedSetting(
                f"train + validate + calibrate must be 1, got {total:g}", slug="split-does-not-sum-to-one"
            )
        return self


class OptimizerConfig(_Section):
    """An optimiser and its schedule over the epochs of one fit."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW, or SGD with momentum.")
    lr: PositiveFloat = Field(default=1e-3, description="The highest learning rate of the schedule.")
    momentum: Share = Field(default=0.9, description="Of SGD; ignored by AdamW.")
    nesterov: bool = Field(default=True, description="Nesterov's momentum; the paper's is the plain one.")
    weight_decay: NonNegativeFloat = Field(default=1e-4, description="Of AdamW decoupled, of SGD part of the gradient.")
    schedule: Literal["constant", "cosine", "one_cycle", "milestones"] = Field(
        default="cosine", description="How the rate changes over the fit."
    )
    milestones: tuple[OpenShare, ...] = Field(
        default=(), description="Shares of the fit after which the rate drops tenfold; schedule `milestones` only."
    )

    @model_validator(mode="after")
    def _milestones_match(self) -> Self:
        if (self.schedule == "milestones") != bool(self.milestones):
            raise RefusedSetting(
                "milestones are given exactly when schedule is 'milestones', "
                f"got schedule {self.schedule!r} and milestones {list(self.milestones)}",
                slug="milestones-unlike-schedule",
            )
        if list(self.milestones) != sorted(self.milestones):
            raise RefusedSetting(f"milestones must rise, got {list(self.milestones)}", slug="milestones-do-not-rise")
        return self


class ScorerConfig(_Section):
    """The PU classifier that tells lake images of the teacher's classes from all others."""

    kind: Literal["auto", "nnpu", "ted", "pvu"] = Field(
        default="auto",
        description="nnpu: non-negative PU risk (Kiryo et al. 2017); ted: (TED)^n, unlabeled images that look most "
        "positive are left out (Garg et al. 2021); pvu: logistic positive-vs-unlabeled; auto: nnpu, unless another "
        "ranks held-out positives clearly higher above the lake (finetuned: nnpu).",
    )
    neighbours: Literal["auto"] | bool = Field(
        default="auto",
        description="Frozen features: add the cosine with the nearest labeled image to the head's logit, each "
        "standardised over the lake. auto: with kind auto, unless a head alone ranks clearly better.",
    )
    features: Literal["frozen", "finetuned"] = Field(
        default="frozen", description="frozen: a head on cached features; finetuned: the whole network (the paper)."
    )
    prior: Literal["auto"] | OpenShare = Field(default="auto", description="Share of positives in the lake.")
    prior_folds: Annotated[int, Field(ge=3, le=20)] = Field(
        default=5, description="prior auto: every labeled image is held out once, in one of so many fits."
    )
    attention: bool = Field(default=True, description="Squeeze-and-excitation gate over the multi-scale features.")
    hidden: Annotated[int, Field(ge=0)] = Field(default=64, description="Width of a hidden layer; 0: none.")
    loss: Literal["sigmoid", "logistic"] = Field(default="logistic", description="nnPU: loss of one margin.")
    positive_weight: Literal["prior"] | OpenShare = Field(
        default=0.5, description="nnPU: weight of the positives' risk; prior: the plain risk; else imbalanced nnPU."
    )
    beta: NonNegativeFloat = Field(default=0.0, description="nnPU: tolerance below zero before the correction.")
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="nnPU: step of the correction.")
    unlabeled_sample: PositiveInt = Field(default=20_000, description="Lake images the fit may see.")
    on_new_shards: Literal["keep", "refit"] = Field(
        default="keep",
        description="A lake that grew: keep scorer and gate, so that only new shards are worked on, or fit them anew.",
    )
    workers: PositiveInt = Field(default=1, description="Ray Train workers; finetuned only.")
    split: SplitConfig = SplitConfig()
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=512, description="Labeled and unlabeled images of one step."
    )
    positive_share: OpenShare = Field(default=0.25, description="Share of labeled positives in every step.")
    epochs: PositiveInt = Field(default=20, description="Passes over the unlabeled sample.")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-2, weight_decay=1.0)


# Rules with a threshold on the score; the others rank the lake by something and take a budget of it.
THRESHOLD_RULES = ("recall", "fdr_discard", "zero")
CONTROL_RULES = ("everything", "random", "confidence", "energy", "neighbours", "oracle")


class SelectionConfig(_Section):
    """Which lake images teach the student."""

    rule: Literal[
        "recall",
        "fdr_discard",
        "zero",
        "budget",
        "everything",
        "random",
        "confidence",
        "energy",
        "neighbours",
        "oracle",
    ] = Field(
        default="recall",
        description="recall: keep a promised share of positives; fdr_discard: of what is discarded at most a share is "
        "positive; zero: score > 0 (the paper); budget: the best N by score. Controls: everything; N at random; the N "
        "the teacher is most confident of (DFND); the N of highest energy; the N nearest to a labeled image in "
        "feature space; oracle: the true positives (needs lake.truth).",
    )
    recall: OpenShare = Field(default=0.95, description="recall: share of the lake's positives to keep, as promised.")
    confidence: OpenShare = Field(default=0.95, description="recall: probability with which that promise holds.")
    fdr: OpenShare = Field(default=0.05, description="fdr_discard: share of positives among what is discarded.")
    per: Literal["lake", "class"] = Field(
        default="lake", description="recall: one threshold and promise for the lake, or one for each predicted class."
    )
    budget: PositiveInt | None = Field(default=None, description="At most this many images.")
    prefer: Literal["purest", "any", "uncertain", "spread"] = Field(
        default="purest",
        description="When the budget binds, which of those that pass the threshold: the highest scores; any, at "
        "random; those the teacher is least sure of; or equally many from every region of feature space.",
    )
    balance: Literal["quota", "none"] = Field(
        default="quota", description="quota: when the budget binds, classes get equal shares, unused ones pass on."
    )
    duplicates: Literal["exact", "near"] = Field(
        default="near", description="What counts as a copy of a better image and is left out."
    )
    near_copy_correlation: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.995,
        description="Thumbnails that correlate this much are near copies: of a test image (leaks), or of each other.",
    )

    @model_validator(mode="after")
    def _budget_where_needed(self) -> Self:
        if self.rule in ("budget", "random", "confidence", "energy", "neighbours") and self.budget is None:
            raise RefusedSetting(
                f"rule {self.rule!r} needs selection.budget, the number of images to choose", slug="rule-without-budget"
            )
        return self

    @model_validator(mode="after")
    def _settings_match_the_rule(self) -> Self:
        if self.prefer != "purest" and self.rule not in THRESHOLD_RULES:
            raise RefusedSetting(
                f"prefer chooses among those that pass a threshold, and rule {self.rule!r} has none",
                slug="prefer-without-threshold",
            )
        if self.per == "class" and self.rule != "recall":
            raise RefusedSetting(
                f"per 'class' belongs to rule 'recall', got {self.rule!r}", slug="per-class-without-recall"
            )
        return self


class LossesConfig(_Section):
    """The distillation loss: the class-weighted divergence from the teacher, and what is added to it by weight."""

    temperature: PositiveFloat = Field(
        default=4.0, description="Divides the logits of teacher and student; the loss is multiplied by its square."
    )
    standardise: bool = Field(
        default=False,
        description="Every image's logits are standardised before the softmax (Sun et al. 2024): the student need not "
        "match the teacher's scale.",
    )
    dist: NonNegativeFloat = Field(
        default=0.0, description="Weight of DIST: correlation within images and within classes (Huang et al. 2022)."
    )
    noise_matrix: NonNegativeFloat = Field(
        default=0.0,
        description="Weight of the cross entropy with the teacher's answers behind a learned matrix of its mistakes "
        "(DFND, Chen et al. 2021).",
    )
    labeled: NonNegativeFloat = Field(
        default=0.0, description="Weight of the cross entropy with the true classes of the labeled images."
    )
    robust: Literal["exact", "paper", "none"] = Field(
        default="exact", description="Adversary over class weights: exact maximum, the paper's random one, or none."
    )
    radius: NonNegativeFloat = Field(default=0.1, description="Size of the class-weight uncertainty set.")
    class_weights: bool = Field(default=True, description="Weigh rare predicted classes up.")
    class_weight_clip: Annotated[float, Field(ge=1.0)] = Field(
        default=10.0, description="Largest ratio of a class weight to the mean."
    )


class AugmentConfig(_Section):
    """Random crops and flips during distillation; teacher and student see the same crop."""

    crop_padding_px: Annotated[int, Field(ge=0)] = Field(
        default=4, description="Small images: a crop of the full size, moved by at most so much."
    )
    crop_scale: tuple[OpenShare, Share] | None = Field(
        default=None, description="Photographs: instead, resized crops that cover between these shares of the image."
    )
    horizontal_flip: bool = Field(
        default=True, description="Mirror every other image, by chance; not for digits or text."
    )

    @model_validator(mode="after")
    def _scale_in_order(self) -> Self:
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise RefusedSetting(
                f"crop_scale must be [smallest, largest], got {list(self.crop_scale)}", slug="crop-scale-out-of-order"
            )
        return self


class DistillConfig(_Section):
    """The student's training."""

    epochs: PositiveInt = Field(default=200, description="Passes over the mined and labeled images.")
    max_steps: PositiveInt | None = Field(default=None, description="Stop after this many steps, whatever the epochs.")
    batch_size: Annotated[int, Field(ge=2)] = Field(default=128, description="Over all workers.")
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        default=1, description="A number, or [fewest, most] for elastic training."
    )
    losses: LossesConfig = LossesConfig()
    labeled_share: Literal["auto"] | Share = Field(
        default="auto", description="Share of labeled images in each batch; auto: sampled evenly."
    )
    augment: AugmentConfig = AugmentConfig()
    soft_labels: Literal["loop", "cached"] = Field(
        default="loop",
        description="loop: the teacher sees every batch; cached: its answers for stored crops are computed once.",
    )
    crops: PositiveInt = Field(default=8, description="soft_labels cached: stored crops of each image.")
    images: Literal["auto", "decoded", "encoded"] = Field(
        default="auto",
        description="What a worker keeps on its disk: pixels, decoded once, or encoded images, decoded in every epoch; "
        "auto: pixels where they need at most a tenth of what is free.",
    )
    loader_threads: PositiveInt = Field(default=1, description="Threads of a worker that prepare batches ahead.")
    accumulate: PositiveInt = Field(default=1, description="Parts into which a worker's batch is cut, to save memory.")
    compile: bool = Field(default=False, description="torch.compile the student: minutes at start, faster afterwards.")
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", lr=0.1, weight_decay=5e-4, schedule="one_cycle")
    validations: PositiveInt = Field(default=10, description="How often held-out labeled images judge the student.")
    checkpoint_steps: PositiveInt = Field(
        default=500,
        description="Steps between two checkpoints, and the most that a lost machine takes along where they last "
        "longer than a checkpoint's way to the storage, a second or two.",
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3, description="Worker losses survived by a restart; machines that were announced to go do not count."
    )

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise RefusedSetting(
                f"workers must be [fewest, most], got {list(self.workers)}", slug="workers-out-of-order"
            )
        return self

    @property
    def fewest_workers(self) -> int:
        """The number of workers without which training does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers beyond which training does not grow."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class GateConfig(_Section):
    """What a student must reach, else exit 5 and no export."""

    max_gap_to_teacher: NonNegativeFloat | None = Field(
        default=None, description="Percentage points of test accuracy; default: no such bound."
    )
    min_accuracy: Share | None = Field(default=None, description="Of the test images; default: no such bound.")
    max_calibration_error: Share | None = Field(
        default=None, description="Mean gap between confidence and accuracy; default: no such bound."
    )


class EvaluationConfig(_Section):
    """The one look at the test images."""

    gate: GateConfig = GateConfig()
    controls: tuple[Literal["everything", "random", "confidence", "energy", "neighbours", "oracle"], ...] = Field(
        default=(), description="Students to train beside ours, with equal budget and the same recipe."
    )
    batch_size: PositiveInt = Field(default=256, description="Images of one forward pass.")
    metadata: str | None = Field(
        default=None,
        description="URI of a .parquet or .csv with what is known of each test image; its column `name` holds paths "
        "below test.uri.",
    )
    slices: tuple[str, ...] = Field(
        default=(), description="Columns of `metadata`; accuracy is also told for each of their values."
    )

    @model_validator(mode="after")
    def _slices_have_a_source(self) -> Self:
        if (self.metadata is None) != (not self.slices):
            raise RefusedSetting(
                f"metadata and slices belong together, got metadata {self.metadata!r} and slices {list(self.slices)}",
                slug="metadata-without-slices",
            )
        if len(set(self.slices)) < len(self.slices):
            raise RefusedSetting(f"every column is sliced by once, got {list(self.slices)}", slug="slice-twice")
        if self.metadata is not None and not self.metadata.lower().endswith((".parquet", ".csv")):
            raise RefusedSetting(
                f"metadata must be a .parquet or a .csv, got {self.metadata!r}", slug="metadata-of-unknown-format"
            )
        return self


class ExportConfig(_Section):
    """The portable student; each format must agree with the checkpoint, else there is no artifact."""

    formats: tuple[Literal["safetensors", "pt2", "onnx", "onnx-int8"], ...] = Field(
        default=("safetensors", "pt2", "onnx", "onnx-int8"),
        description="onnx-int8: the ONNX graph in eight bits, calibrated on mined images.",
    )
    opset: Annotated[int, Field(ge=18, le=24)] = Field(default=20, description="Version of ONNX's operators.")
    max_logit_difference: PositiveFloat = Field(default=1e-3, description="Absolute, over real images.")
    min_agreement: OpenShare = Field(default=0.999, description="Share of real images with the same answer.")
    min_int8_agreement: OpenShare = Field(
        default=0.97, description="The same, for onnx-int8; its 95 % interval must not lie below."
    )
    max_int8_accuracy_drop: NonNegativeFloat = Field(
        default=2.0,
        description="Percentage points that onnx-int8 may lose on the labeled images of validation and calibration.",
    )

    @model_validator(mode="after")
    def _weights_are_there(self) -> Self:
        if "safetensors" not in self.formats:
            raise RefusedSetting(
                f"formats must hold 'safetensors', the weights themselves, got {list(self.formats)}",
                slug="export-without-safetensors",
            )
        if len(set(self.formats)) < len(self.formats):
            raise RefusedSetting(f"every format is written once, got {list(self.formats)}", slug="format-twice")
        return self


class EmbedResources(_Section):
    """The actor pool that runs networks over the lake."""

    gpus: NonNegativeFloat = Field(default=0.0, description="GPUs of each actor, or a share of one.")
    cpus: NonNegativeFloat = Field(default=1.0, description="Logical CPUs of each actor.")
    min_actors: PositiveInt = Field(default=1, description="Size that the pool starts with.")
    max_actors: PositiveInt = Field(default=2, description="Size up to which it grows while there is work.")
    memory_gib: PositiveFloat = Field(default=2.0, description="Logical memory reserved for each actor.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_actors > self.max_actors:
            raise RefusedSetting(
                f"min_actors ({self.min_actors}) must not exceed max_actors ({self.max_actors})",
                slug="actors-out-of-order",
            )
        if self.gpus == 0 and self.cpus == 0:
            raise RefusedSetting("an actor needs gpus or cpus above 0, got 0 and 0", slug="actor-without-resources")
        return self


class DecodeResources(_Section):
    """The tasks that read images, and where actors have a GPU decode them."""

    cpus: PositiveFloat = Field(default=1.0, description="Logical CPUs of each task.")
    memory_gib: PositiveFloat = Field(default=0.5, description="Logical memory reserved for each task.")


class WriteResources(_Section):
    """Tasks that write the chosen images, mostly waiting for the storage; actors write what they make themselves."""

    cpus: PositiveFloat = Field(default=0.25, description="Logical CPUs of each task.")
    memory_gib: PositiveFloat = Field(default=0.25, description="Logical memory reserved for each task.")


Precision = Literal["auto", "bfloat16", "float32"]


class TrainResources(_Section):
    """One training worker."""

    gpus: NonNegativeFloat = Field(default=0.0, description="GPUs of each worker.")
    cpus: PositiveFloat = Field(default=1.0, description="Logical CPUs, and threads of the arithmetic, of each worker.")
    precision: Precision = Field(
        default="auto", description="Of the matrix products; auto: bfloat16 where the device has it natively."
    )


class TrackingConfig(_Section):
    """Where learning curves go besides the run's folder, which always has them for TensorBoard."""

    mlflow_uri: str | None = Field(default=None, description="An MLflow tracking server or folder.")
    experiment: str = Field(default="pu-ray", min_length=1, description="The MLflow experiment.")
    registered_model: str | None = Field(
        default=None, min_length=1, description="The exported student's name in MLflow's registry; null: the job's."
    )


class LimitsConfig(_Section):
    """The most that a job holds at once, however large the cluster may grow: a cap on what an hour of it costs."""

    cpus: PositiveFloat | None = Field(default=None, description="Logical CPUs; default: all there are.")
    gpus: NonNegativeFloat | None = Field(default=None, description="Logical GPUs; default: all there are.")


class ResourcesConfig(_Section):
    """What the stages ask of the cluster."""

    embed: EmbedResources = EmbedResources()
    decode: DecodeResources = DecodeResources()
    write: WriteResources = WriteResources()
    train: TrainResources = TrainResources()
    limits: LimitsConfig = LimitsConfig()

    @property
    def most_actors(self) -> int:
        """Size up to which the actor pool may grow, `limits` included."""
        embed, limits, most = self.embed, self.limits, self.embed.max_actors
        if limits.gpus is not None and embed.gpus > 0:
            most = min(most, math.floor(limits.gpus / embed.gpus))
        if limits.cpus is not None and embed.cpus > 0:
            most = min(most, math.floor((limits.cpus - self.decode.cpus - self.write.cpus) / embed.cpus))
        return most

    @model_validator(mode="after")
    def _limits_leave_room(self) -> Self:
        if self.most_actors < self.embed.min_actors:
            raise RefusedSetting(
                f"limits leave room for {max(0, self.most_actors)} embedding actors beside one task that reads and one "
                f"that writes, embed.min_actors asks for {self.embed.min_actors}",
                slug="limits-too-low",
            )
        return self


class JobConfig(_Section):
    """One job, from teacher and lake to student."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Of the job, and of the student that is served."
    )
    recipe: Literal["default", "paper"] = Field(
        default="default", description="A layer of settings between the defaults and this file."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Of everything random.")
    output: str = Field(min_length=1, description="Folder or URI that receives the artifacts.")
    teacher: TeacherConfig
    labeled: ImagesConfig
    test: ImagesConfig
    lake: LakeConfig
    features: FeaturesConfig = FeaturesConfig()
    scorer: ScorerConfig = ScorerConfig()
    selection: SelectionConfig = SelectionConfig()
    student: StudentConfig
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _cascade_fits_the_scorer(self) -> Self:
        if self.features.cascade and self.scorer.features == "finetuned":
            raise RefusedSetting(
                "features.cascade spares the frozen teacher, and scorer.features 'finetuned' looks at every image with "
                "a network of its own: set one of them otherwise",
                slug="cascade-with-finetuned",
            )
        return self

    @model_validator(mode="after")
    def _neighbours_need_a_head(self) -> Self:
        if self.scorer.neighbours is True and self.scorer.features == "finetuned":
            raise RefusedSetting(
                "scorer.neighbours adds to a head on frozen features, and scorer.features is 'finetuned'",
                slug="neighbours-with-finetuned",
            )
        return self

    @model_validator(mode="after")
    def _the_oracle_knows_the_truth(self) -> Self:
        if "oracle" in (self.selection.rule, *self.evaluation.controls) and self.lake.truth is None:
            raise RefusedSetting(
                "the oracle needs lake.truth, the true class of every lake image", slug="oracle-without-truth"
            )
        return self

    @model_validator(mode="after")
    def _training_keeps_to_the_limits(self) -> Self:
        train, limits = self.resources.train, self.resources.limits
        pools = {"distill.workers": self.distill.most_workers}
        if self.scorer.features == "finetuned":
            pools["scorer.workers"] = self.scorer.workers
        for setting, workers in pools.items():
            for name, each, limit in (("gpus", train.gpus, limits.gpus), ("cpus", train.cpus, limits.cpus)):
                if limit is not None and workers * each > limit:
                    raise RefusedSetting(
                        f"{setting} ({workers}) x resources.train.{name} ({each:g}) must not exceed "
                        f"resources.limits.{name} ({limit:g})",
                        slug="training-above-limits",
                    )
        return self

    @model_validator(mode="after")
    def _spread_needs_features(self) -> Self:
        if self.selection.prefer == "spread" and not self.features.cache:
            raise RefusedSetting(
                "selection.prefer 'spread' looks at features, which features.cache false does not keep",
                slug="spread-without-cache",
            )
        return self

    @property
    def student_preprocessing(self) -> PreprocessingConfig:
        """How images become the student's input."""
        return self.student.preprocessing or self.teacher.preprocessing

    def section(self, dotted: str) -> Any:
        """The value at a dotted path as plain JSON data, for example `"teacher.preprocessing"`."""
        value: Any = self.model_dump(mode="json", by_alias=True)
        for key in dotted.split("."):
            value = value[key]
        return value


# A recipe is a layer between the models' defaults and the job file.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # Xu et al. 2019, section 4, and the settings of the published code (METHOD section 1).
    "paper": {
        "scorer": {
            "kind": "nnpu",
            "features": "finetuned",
            "attention": True,
            "hidden": 0,
            "loss": "sigmoid",
            "positive_weight": "prior",
            "epochs": 170,
            "batch_size": 4096,
            "optimizer": {
                "kind": "sgd",
                "lr": 1e-3,
                "nesterov": False,
                "weight_decay": 5e-3,
                "schedule": "milestones",
                "milestones": [50 / 170, 100 / 170, 150 / 170],
            },
        },
        "selection": {"rule": "zero", "balance": "none", "duplicates": "exact"},
        "distill": {
            "epochs": 200,
            "batch_size": 2048,
            "losses": {"temperature": 1.0, "robust": "paper", "radius": 0.1},
            "optimizer": {
                "kind": "sgd",
                "lr": 0.1,
                "nesterov": False,
                "weight_decay": 5e-4,
                "schedule": "milestones",
                "milestones": [50 / 200, 100 / 200, 150 / 200],
            },
        },
    },
}


class ResolvedConfig:
    """A validated job together with where each value came from."""

    def __init__(self, job: JobConfig, origins: Mapping[str, str]) -> None:
        self.job = job
        self._origins = dict(origins)

    def values(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting as (dotted path, value, origin), in the order of the models."""
        for path, value in _leaves(self.job.model_dump(mode="json", by_alias=True)):
            yield path, value, self._origin(path)

    def _origin(self, path: str) -> str:
        # A list or tuple is set as a whole, so a leaf's origin may be recorded at one of its parents.
        while path:
            if path in self._origins:
                return self._origins[path]
            path = path.rpartition(".")[0]
        return "default"


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> ResolvedConfig:
    """Read a job file and apply the layers above it.

    Args:
        path: A YAML file on this machine.
        overrides: `section.key=value` strings; values are parsed as YAML.
        environment: Variables to read `PU_RAY__SECTION__KEY` from; default `os.environ`.

    Raises:
        ConfigError: Anything about the file, a key, a value or a combination.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "the job file cannot be read",
            slug="job-file-unreadable",
            where=str(path),
            got=error.strerror,
            hint="give the path of a YAML file",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the job file is not UTF-8 text",
            slug="job-file-not-utf8",
            where=str(path),
            got=str(error),
            hint="save it in UTF-8",
        ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            "the job file is not valid YAML",
            slug="job-file-not-yaml",
            where=str(path),
            got=str(error),
            hint="mend the line that is named: often it is a tab, or a text with `: ` that wants quotes",
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "the job file holds no settings",
            slug="job-file-without-settings",
            where=str(path),
            allowed="a YAML mapping",
            got=type(content).__name__,
            hint="write `section: {key: value}`; README.md has the shortest job",
        )
    layers = [(f"file {path.name}", content)]
    for key, value in sorted((os.environ if environment is None else environment).items()):
        if key.startswith(ENVIRONMENT_PREFIX):
            dotted = key.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            layers.append((f"environment {key}", _nest(dotted, _parse_value(key, value))))
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(
                "an override has no '='",
                slug="override-without-equals",
                where="--set",
                allowed="section.key=value",
                got=override,
                hint="for example --set scorer.prior=0.2",
            )
        layers.append(("--set", _nest(dotted.strip(), _parse_value(dotted, value))))
    return resolve(layers)


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> ResolvedConfig:
    """Merge (origin, settings) layers over the recipe they name, and validate.

    Raises:
        ConfigError: With one paragraph per wrong field.
    """
    recipe = "default"
    for _, layer in layers:
        recipe = layer.get("recipe", recipe)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    recipe_layer = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
    for origin, layer in [(f"recipe {recipe}", recipe_layer), *layers]:
        _merge(merged, layer, origin, origins)
    try:
        job = JobConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, origins) from error
    return ResolvedConfig(job, origins)


def digest(value: Any) -> str:
    """SHA-256 (hex) of plain JSON data; independent of key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors."""
    return JobConfig.model_json_schema()


def _parse_value(where: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            "the value is not valid YAML",
            slug="value-not-yaml",
            where=where,
            got=text,
            hint="quote it twice, for the shell and for YAML: '\"...\"'",
        ) from error


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    nested: Any = value
    for key in reversed(dotted.split(".")):
        nested = {key: nested}
    assert isinstance(nested, dict)
    return nested


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    for key, value in layer.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            child = into.get(key)
            if not isinstance(child, dict):
                child = into[key] = {}
            _merge(child, value, origin, origins, f"{path}.")
        else:
            into[key] = value
            origins[path] = origin


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    """One readable error for all that pydantic found, one paragraph per field."""
    by_field: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        if item["type"] != "extra_forbidden":  # an unknown key may well be called "int"
            names = [name for name in names if not (_is_union_tag(name) or name.isdigit())]
        by_field.setdefault(".".join(names) or "job", []).append(item)
    paragraphs = [_paragraph(where, items, origins.get(where)) for where, items in by_field.items()]
    if len(paragraphs) == 1:
        return paragraphs[0]
    text = "\n".join(f"({paragraph.code}) {paragraph}" for paragraph in paragraphs)
    return ConfigError(f"{len(paragraphs)} settings are wrong\n{text}", slug="several-wrong-settings")


def _paragraph(where: str, items: Sequence[Any], origin: str | None) -> ConfigError:
    """The error of one field; a union's alternatives each bring an item."""
    place = f"{where} ({origin})" if origin else where
    item = items[0]
    if item["type"] == "extra_forbidden":
        parents, _, name = where.rpartition(".")
        known = _field_names(parents.split(".") if parents else [])
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "remove it, or correct its name"
        return ConfigError(
            "unknown key", slug="unknown-key", where=place, allowed=", ".join(known), got=name, hint=hint
        )
    if item["type"] == "missing":
        return ConfigError(
            "a required key is missing", slug="missing-key", where=place, hint=f"add {where} to the job file"
        )
    got = repr(item["input"]) if len(repr(item["input"])) <= 120 else type(item["input"]).__name__
    allowed = [_allowed(each) for each in items]
    if len(items) > 1:
        return ConfigError(
            "none of the allowed forms",
            slug="invalid-value",
            where=place,
            allowed=", or ".join(filter(None, allowed)),
            got=got,
        )
    return wrong_setting(item, where=place, allowed=allowed[0], got=got)


def _allowed(item: Any) -> str | None:
    context = item.get("ctx", {})
    if "expected" in context:
        return str(context["expected"])
    bounds = [
        f"{sign} {context[key]}"
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if key in context
    ]
    if bounds:
        return " and ".join(bounds)
    plain = {
        "string_pattern_mismatch": f"text matching {context.get('pattern')}",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "float_parsing": "a number",
        "float_type": "a number",
        "tuple_type": "a list",
    }
    return plain.get(item["type"])


def _is_union_tag(part: str) -> bool:
    # pydantic appends the tried alternative of a union ("int", "literal['auto']", "constrained-float") to the path.
    return bool(re.fullmatch(r"(int|float|bool|str|none|literal\[.*\]|constrained-\w+|tuple\[.*\]|function-.*)", part))


def _field_names(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = JobConfig
    for name in path:
        annotation = next(
            (field.annotation for key, field in model.model_fields.items() if name in (key, field.alias)), None
        )
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [field.alias or key for key, field in model.model_fields.items()]
