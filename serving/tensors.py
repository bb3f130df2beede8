"""What tensors a student takes and gives, whatever carries them: JSON, bytes behind it, or gRPC.

A request brings its images in exactly one of three input tensors:

    image         BYTES [N]           encoded JPEG, PNG, WebP, BMP, TIFF or GIF
    image_uint8   UINT8 [N, H, W, C]  decoded, at the network's size
    pixels        FP32  [N, C, H, W]  normalised: the network's own input

and gets any of `logits` FP32 [N, K], `probabilities` FP32 [N, K] and `label` BYTES [N]; all three if it names none. The
first two also come as Triton's classifications, BYTES [N, n] of "score:index:label".

No shape is believed: it is compared with the student's and with the bytes that came before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from serving.predictor import Floats, Images, Predictions
from serving.registry import Student

ENCODED: Final = "image"
DECODED: Final = "image_uint8"
NORMALISED: Final = "pixels"

LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
LABEL: Final = "label"

ANY: Final = -1


class ProtocolError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status: 400 malformed, 404 unknown student, 413 too large, 415 wrong kind of content,
            422 understood, but it does not fit the student.
        message: For the client; quotes nothing but names and sizes.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Tensor:
    """A tensor as metadata lists it; -1 stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """As in a metadata document."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def inputs_of(student: Student) -> tuple[Tensor, ...]:
    """The alternatives for bringing images to this student."""
    height, width, channels = student.preprocessing.shape_hwc
    return (
        Tensor(ENCODED, "BYTES", (ANY,)),
        Tensor(DECODED, "UINT8", (ANY, height, width, channels)),
        Tensor(NORMALISED, "FP32", (ANY, channels, height, width)),
    )


def outputs_of(student: Student) -> tuple[Tensor, ...]:
    """What this student can be asked for."""
    classes = len(student.labels)
    return (
        Tensor(LOGITS, "FP32", (ANY, classes)),
        Tensor(PROBABILITIES, "FP32", (ANY, classes)),
        Tensor(LABEL, "BYTES", (ANY,)),
    )


# -- inputs --------------------------------------------------------------------------------------------------


def input_named(name: object, student: Student) -> Tensor:
    """One of the tensors that a student takes.

    Raises:
        ProtocolError: 422.
    """
    known = {tensor.name: tensor for tensor in inputs_of(student)}
    if not isinstance(name, str) or name not in known:
        raise ProtocolError(422, f"there is no input {shortened(name)}; this student takes one of: {', '.join(known)}")
    return known[name]


def check_shape(tensor: Tensor, datatype: object, shape: Sequence[object], most: int) -> tuple[int, ...]:
    """The shape of an input, once it fits.

    Args:
        tensor: As the student takes it.
        datatype: As the client calls it.
        shape: As the client says.
        most: Images of one request.

    Raises:
        ProtocolError: 422.
    """
    if datatype != tensor.datatype:
        raise ProtocolError(422, f"input {tensor.name!r} has datatype {tensor.datatype}, got {shortened(datatype)}")
    fits = len(shape) == len(tensor.shape) and all(
        type(length) is int and (1 <= length <= most if wanted == ANY else length == wanted)
        for length, wanted in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = f"shape {list(tensor.shape)} with 1 to {most} images"
        raise ProtocolError(422, f"input {tensor.name!r} has {wanted}, got {shortened(list(shape))}")
    return tuple(length for length in shape if isinstance(length, int))


def check_output(name: object, student: Student) -> str:
    """The name of an output that the student has.

    Raises:
        ProtocolError: 422.
    """
    known = [tensor.name for tensor in outputs_of(student)]
    if not isinstance(name, str) or name not in known:
        raise ProtocolError(422, f"there is no output {shortened(name)}; this student has: {', '.join(known)}")
    return name


def check_classes(name: str, classes: int) -> int:
    """How many classifications an output may be asked for.

    Raises:
        ProtocolError: 422.
    """
    if classes < 0 or (classes and name == LABEL):
        raise ProtocolError(422, f"output {name!r} cannot be asked for {shortened(classes)} classifications")
    return classes


def from_bytes(name: str, content: bytes, shape: tuple[int, ...]) -> Images:
    """The images in a tensor's bytes.

    Raises:
        ProtocolError: 400 or 422 where they do not hold what the shape says.
    """
    return _FROM_BYTES[name](content, shape, f"input {name!r}")


def _encoded_from_binary(content: bytes, shape: tuple[int, ...], where: str) -> Images:
    images: list[bytes] = []
    position = 0
    while position < len(content) and len(images) < shape[0]:
        if position + 4 > len(content):
            raise ProtocolError(400, f"element {len(images)} of {where} ends within its length")
        (length,) = struct.unpack_from("<I", content, position)
        position += 4
        if position + length > len(content):
            raise ProtocolError(
                400, f"element {len(images)} of {where} has {length} bytes, but {len(content) - position} follow"
            )
        images.append(content[position : position + length])
        position += length
    if len(images) != shape[0] or position != len(content):
        raise ProtocolError(400, f"the binary data of {where} does not hold exactly {shape[0]} elements")
    return images


def _decoded_from_binary(content: bytes, shape: tuple[int, ...], where: str) -> Images:
    return _array(content, shape, np.dtype(np.uint8), where)


def _normalised_from_binary(content: bytes, shape: tuple[int, ...], where: str) -> Images:
    return _array(content, shape, np.dtype("<f4"), where)


def _array(content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> Images:
    wanted = math.prod(shape) * dtype.itemsize
    if len(content) != wanted:
        raise ProtocolError(422, f"{where} of shape {list(shape)} takes {wanted} bytes, got {len(content)}")
    return np.frombuffer(content, dtype).reshape(shape)


_FROM_BYTES: Final[dict[str, Callable[[bytes, tuple[int, ...], str], Images]]] = {
    ENCODED: _encoded_from_binary,
    DECODED: _decoded_from_binary,
    NORMALISED: _normalised_from_binary,
}


# -- outputs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A wanted output.

    Attributes:
        binary: Whether it travels as bytes behind the JSON.
        classes: How many classifications of each image are wanted instead of numbers; 0: none.
    """

    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class Answer:
    """An output tensor of a reply.

    Attributes:
        tensor: Name, type and shape.
        values: float32 [N, K], or UTF-8 text in row-major order.
    """

    tensor: Tensor
    values: Floats | list[str]

    @property
    def as_bytes(self) -> bytes:
        """Little-endian numbers, or texts each with its length (uint32) before it."""
        if isinstance(self.values, np.ndarray):
            return self.values.astype("<f4", copy=False).tobytes()
        encoded = [value.encode("utf-8") for value in self.values]
        return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def answers(outputs: Mapping[str, Output], predictions: Predictions, student: Student) -> list[Answer]:
    """The wanted outputs.

    Raises:
        ProtocolError: 422 where an image could not be used; its position is named.
    """
    for position, failure in sorted(predictions.failures.items()):
        raise ProtocolError(422, f"image {position} of input {ENCODED!r} cannot be used: {failure}")
    return [_answer(name, output, predictions, student) for name, output in outputs.items()]


def _answer(name: str, output: Output, predictions: Predictions, student: Student) -> Answer:
    count, classes = predictions.logits_NK.shape
    if name == LABEL:
        best = [student.labels[index] for index in predictions.logits_NK.argmax(axis=1)]
        return Answer(Tensor(name, "BYTES", (count,)), best)
    values_NK = predictions.logits_NK if name == LOGITS else predictions.probabilities_NK
    if not output.classes:
        return Answer(Tensor(name, "FP32", (count, classes)), values_NK)
    kept = min(output.classes, classes)
    texts = [
        f"{row_K[index]:.6f}:{index}:{student.labels[index]}"
        for row_K in values_NK
        for index in np.argsort(-row_K, kind="stable")[:kept]
    ]
    return Answer(Tensor(name, "BYTES", (count, kept)), texts)


# -- words ---------------------------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def shortened(value: Any) -> str:
    """A client's name or number as it may appear in a message: never long enough to carry a payload."""
    if isinstance(value, dict) or (isinstance(value, list) and (len(value) > 8 or not set(map(type, value)) <= {int})):
        return kind_of(value)
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of more digits than Python prints
        return kind_of(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
