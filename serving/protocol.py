"""Open Inference Protocol v2 over REST, with the binary tensor extension: bytes in, bytes out.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
Binary tensors: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

A request brings its images in exactly one of three input tensors:

    image         BYTES [N]           encoded JPEG, PNG, WebP, BMP, TIFF or GIF; base64 where they travel in JSON
    image_uint8   UINT8 [N, H, W, C]  decoded, at the network's size
    pixels        FP32  [N, C, H, W]  normalised: the network's own input

and gets any of `logits` FP32 [N, K], `probabilities` FP32 [N, K] and `label` BYTES [N]; all three if it names none.

No shape is believed: it is compared with the student's and with the bytes that came before anything is allocated.
Not covered: shared memory, Triton's classification parameter, compressed bodies.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np

import pu_ray
from serving.predictor import Floats, Images, Predictions
from serving.registry import Student

HEADER_LENGTH: Final = "Inference-Header-Content-Length"

ENCODED: Final = "image"
DECODED: Final = "image_uint8"
NORMALISED: Final = "pixels"

LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
LABEL: Final = "label"

_ANY: Final = -1
_UNSUPPORTED: Final = {
    "classification": f"ask for the output {LABEL!r}, or use POST /v1/classify",
    "shared_memory_region": "send the tensor in the request",
}


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


@dataclass(frozen=True)
class InferRequest:
    """A request that fits its student.

    Attributes:
        id: To be echoed, where the client sent one.
        images: N encoded images, uint8 [N, H, W, C] or float32 [N, C, H, W].
        outputs: Names of the wanted outputs, each with whether it travels as binary.
    """

    id: str | None
    images: Images
    outputs: dict[str, bool]


@dataclass(frozen=True)
class Reply:
    """A response's body and headers."""

    body: bytes
    headers: dict[str, str]


def inputs_of(student: Student) -> tuple[Tensor, ...]:
    """The alternatives for bringing images to this student."""
    height, width, channels = student.preprocessing.shape_hwc
    return (
        Tensor(ENCODED, "BYTES", (_ANY,)),
        Tensor(DECODED, "UINT8", (_ANY, height, width, channels)),
        Tensor(NORMALISED, "FP32", (_ANY, channels, height, width)),
    )


def outputs_of(student: Student) -> tuple[Tensor, ...]:
    """What this student can be asked for."""
    classes = len(student.labels)
    return (
        Tensor(LOGITS, "FP32", (_ANY, classes)),
        Tensor(PROBABILITIES, "FP32", (_ANY, classes)),
        Tensor(LABEL, "BYTES", (_ANY,)),
    )


def server_metadata() -> dict[str, Any]:
    """The document at `/v2`."""
    return {"name": "pu-ray", "version": pu_ray.__version__, "extensions": ["binary_tensor_data"]}


def model_metadata(student: Student) -> dict[str, Any]:
    """The document at `/v2/models/{name}`."""
    return {
        "name": student.name,
        "versions": [student.version],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor.as_dict() for tensor in inputs_of(student)],
        "outputs": [tensor.as_dict() for tensor in outputs_of(student)],
    }


# -- requests -------------------------------------------------------------------------------------------------


def parse_infer(body: bytes, header_length: str | None, student: Student, max_images: int) -> InferRequest:
    """Read an inference request.

    Args:
        body: JSON, followed by the binary tensors where there are any.
        header_length: Value of the header `Inference-Header-Content-Length`, if it was sent.
        student: Whom the request is for.
        max_images: The most images one request may bring.

    Raises:
        ProtocolError: 400 where the request is malformed, 422 where it does not fit the student.
    """
    json_bytes, binary = _split(body, header_length)
    document = _as_object(_parse_json(json_bytes), "the request")
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError(400, f"'id' must be a string, got {_kind(request_id)}")
    outputs = _parse_outputs(document, student)
    given = _as_list(document.get("inputs"), "'inputs'")
    if len(given) != 1:
        names = ", ".join(tensor.name for tensor in inputs_of(student))
        raise ProtocolError(422, f"a request needs exactly one input (one of: {names}), got {len(given)}")
    return InferRequest(request_id, _parse_input(given[0], binary, student, max_images), outputs)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes | None]:
    if header_length is None:
        return body, None
    # Bounded before int(): Python refuses absurd digit strings with an error of its own.
    text = header_length.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 18) or int(text) > len(body):
        raise ProtocolError(400, f"{HEADER_LENGTH} must be a number of bytes, at most the body's {len(body)}")
    return body[: int(text)], body[int(text) :]


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ProtocolError(400, "the request's JSON is nested too deeply") from error
    except ValueError as error:
        # The position helps; the text around it is the client's payload and stays out.
        place = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ProtocolError(400, f"the request is not valid UTF-8 JSON{place}") from error


def _parse_outputs(document: Mapping[str, Any], student: Student) -> dict[str, bool]:
    known = [tensor.name for tensor in outputs_of(student)]
    parameters = _as_object(document.get("parameters", {}), "'parameters'")
    binary = _flag(parameters, "binary_data_output", False)
    wanted: dict[str, bool] = {}
    for entry in _as_list(document.get("outputs", []), "'outputs'"):
        output = _as_object(entry, "an output")
        name = output.get("name")
        if name not in known:
            raise ProtocolError(422, f"there is no output {_short(name)}; this student has: {', '.join(known)}")
        if name in wanted:
            raise ProtocolError(400, f"output {name!r} is asked for twice")
        wanted[name] = _flag(_parameters_of(output, f"output {name!r}"), "binary_data", binary)
    return wanted or dict.fromkeys(known, binary)


def _parse_input(entry: Any, binary: bytes | None, student: Student, max_images: int) -> Images:
    given = _as_object(entry, "an input")
    known = {tensor.name: tensor for tensor in inputs_of(student)}
    name = given.get("name")
    if not isinstance(name, str) or name not in known:
        raise ProtocolError(422, f"there is no input {_short(name)}; this student takes one of: {', '.join(known)}")
    tensor = known[name]
    where = f"input {name!r}"
    if given.get("datatype") != tensor.datatype:
        raise ProtocolError(422, f"{where} has datatype {tensor.datatype}, got {_short(given.get('datatype'))}")
    shape = _parse_shape(given.get("shape"), tensor, max_images)
    size = _parameters_of(given, where).get("binary_data_size")
    if size is None:
        if binary:
            raise ProtocolError(400, f"{len(binary)} bytes follow the JSON, but {where} has no 'binary_data_size'")
        data = _flatten(_as_list(given.get("data"), f"'data' of {where}"), shape, where)
        return _FROM_JSON[name](data, shape, where)
    if "data" in given:
        raise ProtocolError(400, f"{where} has both 'data' and 'binary_data_size'")
    if binary is None:
        raise ProtocolError(400, f"{where} has 'binary_data_size', but there is no header {HEADER_LENGTH}")
    if type(size) is not int or size != len(binary):
        raise ProtocolError(
            400, f"'binary_data_size' of {where} is {_short(size)}, but {len(binary)} bytes follow the JSON"
        )
    return _FROM_BINARY[name](binary, shape, where)


def _parse_shape(given: Any, tensor: Tensor, max_images: int) -> tuple[int, ...]:
    lengths = _as_list(given, f"'shape' of input {tensor.name!r}")
    fits = len(lengths) == len(tensor.shape) and all(
        type(length) is int and (1 <= length <= max_images if wanted == _ANY else length == wanted)
        for length, wanted in zip(lengths, tensor.shape, strict=True)
    )
    if not fits:
        wanted = f"shape {list(tensor.shape)} with 1 to {max_images} images"
        raise ProtocolError(422, f"input {tensor.name!r} has {wanted}, got {_short(lengths)}")
    return tuple(lengths)


def _flatten(data: list[Any], shape: tuple[int, ...], where: str) -> list[Any]:
    """Row-major elements of flat data, or of data nested exactly as the shape says."""
    if data and isinstance(data[0], list):
        level: list[Any] = [data]
        for length in shape:
            if not all(isinstance(part, list) and len(part) == length for part in level):
                raise ProtocolError(422, f"the nested 'data' of {where} does not have the shape {list(shape)}")
            level = list(chain.from_iterable(level))
        data = level
    if len(data) != math.prod(shape):
        raise ProtocolError(
            422, f"'data' of {where} must have {math.prod(shape)} elements for shape {list(shape)}, got {len(data)}"
        )
    return data


def _encoded_from_json(data: list[Any], _shape: tuple[int, ...], where: str) -> Images:
    images = []
    for index, text in enumerate(data):
        try:
            if not isinstance(text, str):
                raise ValueError("not a string")
            images.append(base64.b64decode(text, validate=True))
        except (ValueError, binascii.Error) as error:
            raise ProtocolError(422, f"element {index} of {where} is not a base64 string") from error
    return images


def _decoded_from_json(data: list[Any], shape: tuple[int, ...], where: str) -> Images:
    if set(map(type, data)) != {int} or min(data) < 0 or max(data) > 255:
        raise ProtocolError(422, f"'data' of {where} must be whole numbers from 0 to 255")
    return np.array(data, np.uint8).reshape(shape)


def _normalised_from_json(data: list[Any], shape: tuple[int, ...], where: str) -> Images:
    if not set(map(type, data)) <= {int, float}:
        raise ProtocolError(422, f"'data' of {where} must be numbers")
    try:
        with np.errstate(over="ignore"):
            return np.array(data, np.float64).astype(np.float32).reshape(shape)
    except OverflowError as error:
        raise ProtocolError(422, f"'data' of {where} has a number too large for any float") from error


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


_FROM_JSON: Final[dict[str, Callable[[list[Any], tuple[int, ...], str], Images]]] = {
    ENCODED: _encoded_from_json,
    DECODED: _decoded_from_json,
    NORMALISED: _normalised_from_json,
}
_FROM_BINARY: Final[dict[str, Callable[[bytes, tuple[int, ...], str], Images]]] = {
    ENCODED: _encoded_from_binary,
    DECODED: _decoded_from_binary,
    NORMALISED: _normalised_from_binary,
}


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(400, f"{where} must be a JSON object, got {_kind(value)}")
    return value


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProtocolError(400, f"{where} must be a JSON array, got {_kind(value)}")
    return value


def _parameters_of(tensor: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = _as_object(tensor.get("parameters", {}), f"'parameters' of {where}")
    for name, instead in _UNSUPPORTED.items():
        if name in parameters:
            raise ProtocolError(422, f"parameter {name!r} of {where} is not supported: {instead}")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(400, f"parameter {name!r} must be true or false, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """A client's name or number as it may appear in a message: never long enough to carry a payload."""
    if isinstance(value, dict) or (isinstance(value, list) and (len(value) > 8 or not set(map(type, value)) <= {int})):
        return _kind(value)
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of more digits than Python prints
        return _kind(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- responses ------------------------------------------------------------------------------------------------


def format_infer(request: InferRequest, predictions: Predictions, student: Student) -> Reply:
    """Write the answer to an inference request.

    Args:
        request: What was asked.
        predictions: One row per image.
        student: Who answered.

    Raises:
        ProtocolError: 422 where an image could not be used (its index is named), or where a number that JSON
            cannot carry was not asked for as binary.
    """
    for position, failure in sorted(predictions.failures.items()):
        raise ProtocolError(422, f"image {position} of input {ENCODED!r} cannot be used: {failure}")
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    specifications = {tensor.name: tensor for tensor in outputs_of(student)}
    for name, as_binary in request.outputs.items():
        values = _values(name, predictions, student)
        shape = [len(values), *specifications[name].shape[1:]]
        output = specifications[name].as_dict() | {"shape": shape}
        if as_binary:
            content = _to_binary(values)
            binary.append(content)
            output["parameters"] = {"binary_data_size": len(content)}
        else:
            output["data"] = _to_json(values, name)
        outputs.append(output)
    document: dict[str, Any] = {"model_name": student.name, "model_version": student.version}
    if request.id is not None:
        document["id"] = request.id
    header = json.dumps(document | {"outputs": outputs}, allow_nan=False, separators=(",", ":")).encode()
    if not binary:
        return Reply(header, {"Content-Type": "application/json"})
    return Reply(
        b"".join([header, *binary]),
        {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))},
    )


def _values(name: str, predictions: Predictions, student: Student) -> Floats | list[str]:
    if name == LABEL:
        return [student.labels[index] for index in predictions.logits_NK.argmax(axis=1)]
    return predictions.logits_NK if name == LOGITS else predictions.probabilities_NK


def _to_binary(values: Floats | Sequence[str]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<f4").tobytes()
    encoded = [value.encode("utf-8") for value in values]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def _to_json(values: Floats | list[str], name: str) -> list[Any]:
    if not isinstance(values, np.ndarray):
        return values
    if not np.isfinite(values).all():
        raise ProtocolError(422, f"output {name!r} holds numbers that JSON cannot carry; ask for it with 'binary_data'")
    flat: list[float] = values.ravel().tolist()
    return flat
