"""Arrow schemas of every artifact: the only place that spells a column.

Shapes: N rows, D feature width (sum of the teacher's stage widths), K classes.
Units: scores and logits are natural-log odds; `confidence` is a probability in [0, 1];
`row` counts from 0 within its shard.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import pyarrow as pa

SAMPLE_ID: Final = "sample_id"  # 128-bit BLAKE2b of the encoded bytes
SHARD: Final = "shard"  # the shard's path below the lake's root
ROW: Final = "row"
NAME: Final = "name"  # path or key of the image inside its shard, where the format has one
BYTES: Final = "bytes"
ERROR: Final = "error"  # null, or one of ERROR_CODES
PIXELS: Final = "pixels"
FEATURES: Final = "features"
THUMBNAIL: Final = "thumbnail"  # 12 x 12 greyscale, for finding near copies
LOGITS: Final = "logits"
GATE: Final = "gate"  # margin of the cascade's gate; below 0 the rest of the network was spared
SCORE: Final = "score"  # minus infinity for an image that the gate rejected
PREDICTED: Final = "predicted"  # the teacher's argmax class; NO_CLASS where the teacher was spared
CONFIDENCE: Final = "confidence"  # the teacher's softmax probability of that class
ENERGY: Final = "energy"  # log-sum-exp of the teacher's logits (Liu et al. 2020)
ENTROPY: Final = "entropy"  # of the teacher's softmax, in nats
NEIGHBOUR: Final = "neighbour"  # cosine with the nearest labeled training image, in standardised feature space
CROPS: Final = "crops"  # of each image: top, left, height, width, flip, in pixels of the decoded image
KEPT: Final = "classes"  # of each stored logit
REST: Final = "rest"  # log-sum-exp of the logits that were not stored
ORDER: Final = "order"  # position in the mined set; any prefix is class-stratified
WHY: Final = "why"
CLASS: Final = "class"  # true class, or -1 for an image of no class; only where the truth is known

SAMPLE_ID_BYTES: Final = 16
NO_CLASS: Final = -1
THUMBNAIL_PX: Final = 144
SAMPLE_ID_TYPE: Final = pa.binary(SAMPLE_ID_BYTES)

ErrorCode = Literal["truncated", "not_an_image", "too_large", "unsupported", "unreadable"]
ERROR_CODES: Final[tuple[str, ...]] = get_args(ErrorCode)

_IDENTITY: Final = [
    pa.field(SAMPLE_ID, SAMPLE_ID_TYPE),
    pa.field(SHARD, pa.string()),
    pa.field(ROW, pa.int64()),
    pa.field(NAME, pa.string()),
]

IDENTITY_COLUMNS: Final = [field.name for field in _IDENTITY]


def encoded() -> pa.Schema:
    """Rows as they leave the lake: identity and encoded bytes, or an error code."""
    return pa.schema([*_IDENTITY, pa.field(BYTES, pa.large_binary()), pa.field(ERROR, pa.string())])


def decoded(pixels_per_image: int) -> pa.Schema:
    """Decoded rows: `pixels` holds H*W*C uint8 values in HWC order; null for an error row."""
    pixels = pa.field(PIXELS, pa.list_(pa.uint8(), pixels_per_image))
    return pa.schema([*_IDENTITY, pixels, pa.field(ERROR, pa.string())])


def features(feature_width: int, classes: int) -> pa.Schema:
    """`features` [N, D] float16, pooled stage outputs; `logits` [N, K] float32 of the teacher; `thumbnail` uint8.

    `gate` is null without a cascade; a row that the gate rejected has neither features nor logits.
    """
    return pa.schema(
        [
            *_IDENTITY,
            pa.field(FEATURES, pa.list_(pa.float16(), feature_width)),
            pa.field(LOGITS, pa.list_(pa.float32(), classes)),
            pa.field(THUMBNAIL, pa.list_(pa.uint8(), THUMBNAIL_PX)),
            pa.field(GATE, pa.float32()),
            pa.field(ERROR, pa.string()),
        ]
    )


def scores(thumbnails: bool = False) -> pa.Schema:
    """One row per lake row: the PU logit, the teacher's class and how sure it is, what controls rank by; or an error.

    Args:
        thumbnails: Whether they are kept here, because no feature cache holds them.
    """
    thumbnail = [pa.field(THUMBNAIL, pa.list_(pa.uint8(), THUMBNAIL_PX))] if thumbnails else []
    return pa.schema(
        [
            *_IDENTITY,
            pa.field(SCORE, pa.float32()),
            pa.field(PREDICTED, pa.int32()),
            pa.field(CONFIDENCE, pa.float32()),
            pa.field(ENERGY, pa.float32()),
            pa.field(ENTROPY, pa.float32()),
            pa.field(NEIGHBOUR, pa.float32()),
            *thumbnail,
            pa.field(ERROR, pa.string()),
        ]
    )


def selection() -> pa.Schema:
    """The chosen images: where they are, their score and class, and why they were chosen."""
    return pa.schema(
        [
            *_IDENTITY,
            pa.field(SCORE, pa.float32()),
            pa.field(PREDICTED, pa.int32()),
            pa.field(CONFIDENCE, pa.float32()),
            pa.field(ORDER, pa.int64()),
            pa.field(WHY, pa.string()),
        ]
    )


def mined() -> pa.Schema:
    """The chosen images with their encoded bytes, ready to stream to a student."""
    return pa.schema([*selection(), pa.field(BYTES, pa.large_binary())])


def soft_labels(crops: int, kept: int) -> pa.Schema:
    """The teacher's answers for stored crops of each image, see distill/soft_labels.py.

    Args:
        crops: M, crops of each image.
        kept: J, logits of each crop.
    """
    return pa.schema(
        [
            *_IDENTITY,
            pa.field(CROPS, pa.list_(pa.int16(), crops * 5)),
            pa.field(LOGITS, pa.list_(pa.float16(), crops * kept)),
            pa.field(KEPT, pa.list_(pa.int32(), crops * kept)),
            pa.field(REST, pa.list_(pa.float16(), crops)),
        ]
    )


def truth() -> pa.Schema:
    """True class of lake images, for reference workloads only; read by the evaluation and by the rule `oracle`."""
    return pa.schema([pa.field(SAMPLE_ID, SAMPLE_ID_TYPE), pa.field(CLASS, pa.int32())])
