"""Open Inference Protocol v2 over REST, with the binary tensor extension: bytes in, bytes out.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
Binary tensors: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

The tensors are those of `serving.tensors`; encoded images travel in JSON as base64. Triton's classification extension
is there too. Not covered: shared memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np

import pu_ray
from serving.predictor import Floats, Images, Predictions
from serving.registry import Student
from serving.tensors import (
    DECODED,
    ENCODED,
    NORMALISED,
    Output,
    ProtocolError,
    answers,
    check_classes,
    check_output,
    check_shape,
    from_bytes,
    input_named,
    inputs_of,
    kind_of,
    outputs_of,
    shortened,
)

EXTENSIONS: Final = ("binary_tensor_data", "classification", "model_repository(index)")
HEADER_LENGTH: Final = "Inference-Header-Content-Length"

_SHARED_MEMORY: Final = "shared_memory_region"


@dataclass(frozen=True)
class InferRequest:
    """A request that fits its student.

    Attributes:
        id: To be echoed, where the client sent one.
        images: N encoded images, uint8 [N, H, W, C] or float32 [N, C, H, W].
        outputs: What is wanted, by name.
    """

    id: str | None
    images: Images
    outputs: dict[str, Output]


@dataclass(frozen=True)
class Reply:
    """A response's body and headers."""

    body: bytes
    headers: dict[str, str]


def server_metadata() -> dict[str, Any]:
    """The document at `/v2`."""
    return {"name": "pu-ray", "version": pu_ray.__version__, "extensions": list(EXTENSIONS)}


def model_metadata(student: Student, versions: Sequence[str] = ()) -> dict[str, Any]:
    """The document at `/v2/models/{name}`.

    Args:
        student: Whose tensors are described.
        versions: All that are served; by default this one.
    """
    return {
        "name": student.name,
        "versions": list(versions) or [student.version],
        "platform": "pytorch" if student.engine == "torch" else "onnxruntime_onnx",
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
        raise ProtocolError(400, f"'id' must be a string, got {kind_of(request_id)}")
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


def _parse_outputs(document: Mapping[str, Any], student: Student) -> dict[str, Output]:
    parameters = _as_object(document.get("parameters", {}), "'parameters'")
    binary = _flag(parameters, "binary_data_output", False)
    wanted: dict[str, Output] = {}
    for entry in _as_list(document.get("outputs", []), "'outputs'"):
        output = _as_object(entry, "an output")
        name = check_output(output.get("name"), student)
        if name in wanted:
            raise ProtocolError(400, f"output {name!r} is asked for twice")
        own = _parameters_of(output, f"output {name!r}")
        classes = own.get("classification", 0)
        if type(classes) is not int:
            raise ProtocolError(400, f"parameter 'classification' must be a number, got {kind_of(classes)}")
        wanted[name] = Output(_flag(own, "binary_data", binary), check_classes(name, classes))
    return wanted or {tensor.name: Output(binary) for tensor in outputs_of(student)}


def _parse_input(entry: Any, binary: bytes | None, student: Student, max_images: int) -> Images:
    given = _as_object(entry, "an input")
    tensor = input_named(given.get("name"), student)
    name, where = tensor.name, f"input {tensor.name!r}"
    lengths = _as_list(given.get("shape"), f"'shape' of {where}")
    shape = check_shape(tensor, given.get("datatype"), lengths, max_images)
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
            400, f"'binary_data_size' of {where} is {shortened(size)}, but {len(binary)} bytes follow the JSON"
        )
    return from_bytes(name, binary, shape)


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


_FROM_JSON: Final[dict[str, Callable[[list[Any], tuple[int, ...], str], Images]]] = {
    ENCODED: _encoded_from_json,
    DECODED: _decoded_from_json,
    NORMALISED: _normalised_from_json,
}


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(400, f"{where} must be a JSON object, got {kind_of(value)}")
    return value


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProtocolError(400, f"{where} must be a JSON array, got {kind_of(value)}")
    return value


def _parameters_of(tensor: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = _as_object(tensor.get("parameters", {}), f"'parameters' of {where}")
    if _SHARED_MEMORY in parameters:
        raise ProtocolError(422, f"shared memory is not supported: send {where} in the request")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(400, f"parameter {name!r} must be true or false, got {kind_of(value)}")
    return value


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
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for answer in answers(request.outputs, predictions, student):
        output = answer.tensor.as_dict()
        if request.outputs[answer.tensor.name].binary:
            content = answer.as_bytes
            binary.append(content)
            output["parameters"] = {"binary_data_size": len(content)}
        else:
            output["data"] = _to_json(answer.values, answer.tensor.name)
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


def _to_json(values: Floats | list[str], name: str) -> list[Any]:
    if not isinstance(values, np.ndarray):
        return values
    if not np.isfinite(values).all():
        raise ProtocolError(422, f"output {name!r} holds numbers that JSON cannot carry; ask for it with 'binary_data'")
    flat: list[float] = values.ravel().tolist()
    return flat
