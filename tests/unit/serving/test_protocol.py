"""serving/protocol.py: what clients of the Open Inference Protocol send and get, and every way to get it wrong."""

from __future__ import annotations

import base64
import json
import math
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pu_ray.config import PreprocessingConfig
from pu_ray.images import ImageError
from serving import protocol
from serving.predictor import Predictions
from serving.protocol import InferRequest
from serving.registry import Student
from serving.tensors import Output, ProtocolError, inputs_of

STUDENT = Student("/exported", "pets", "v1", ("cat", "dog", "Ünicorn"), PreprocessingConfig(size_px=2))
SHAPE = [2, 2, 2, 3]
PICTURES = np.arange(24, dtype=np.uint8).reshape(SHAPE)
MAX_IMAGES = 4


def parse(document: object, binary: bytes | None = None) -> InferRequest:
    header = document if isinstance(document, bytes) else json.dumps(document).encode()
    length = None if binary is None else str(len(header))
    return protocol.parse_infer(header + (binary or b""), length, STUDENT, MAX_IMAGES)


def an_input(**changes: Any) -> dict[str, Any]:
    proper = {"name": "image_uint8", "datatype": "UINT8", "shape": SHAPE, "data": PICTURES.ravel().tolist()}
    return {name: value for name, value in (proper | changes).items() if value is not ...}


def a_request(**changes: Any) -> dict[str, Any]:
    return {"inputs": [an_input(**changes)]}


def elements(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


# -- what is understood ---------------------------------------------------------------------------------------


def test_metadata_lists_every_tensor() -> None:
    document = protocol.model_metadata(STUDENT)
    assert document["name"] == "pets"
    assert document["versions"] == ["v1"]
    assert document["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "image_uint8", "datatype": "UINT8", "shape": [-1, 2, 2, 3]},
        {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 2, 2]},
    ]
    assert document["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ]
    assert protocol.server_metadata()["extensions"] == list(protocol.EXTENSIONS)


@pytest.mark.parametrize("data", [PICTURES.ravel().tolist(), PICTURES.tolist()], ids=["flat", "nested"])
def test_decoded_images_as_json(data: list[Any]) -> None:
    images = parse(a_request(data=data)).images
    assert isinstance(images, np.ndarray)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, PICTURES)


def test_decoded_images_as_binary() -> None:
    request = a_request(data=..., parameters={"binary_data_size": 24})
    np.testing.assert_array_equal(np.asarray(parse(request, PICTURES.tobytes()).images), PICTURES)


def test_normalised_images_keep_every_bit() -> None:
    pixels = np.array([[0.1, -1e-30], [3e38, -0.0], [math.nan, math.inf]], np.float32).repeat(2).reshape(1, 3, 2, 2)
    common = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 2, 2]}
    as_json = parse(a_request(**common, data=pixels.ravel().tolist())).images
    request = a_request(**common, data=..., parameters={"binary_data_size": 48})
    as_binary = parse(request, pixels.tobytes()).images
    for images in (as_json, as_binary):
        assert isinstance(images, np.ndarray)
        assert images.dtype == np.float32
        assert images.tobytes() == pixels.tobytes()


def test_whole_numbers_are_floats_too() -> None:
    images = parse(a_request(name="pixels", datatype="FP32", shape=[1, 3, 2, 2], data=[1] * 12)).images
    assert np.asarray(images).dtype == np.float32


def test_encoded_images_as_json_and_as_binary() -> None:
    encoded = [b"\xff\xd8 one", b"", b"three"]
    common = {"name": "image", "datatype": "BYTES", "shape": [3]}
    texts = [base64.b64encode(image).decode() for image in encoded]
    assert parse(a_request(**common, data=texts)).images == encoded
    content = elements(*encoded)
    request = a_request(**common, data=..., parameters={"binary_data_size": len(content)})
    assert parse(request, content).images == encoded


def test_a_json_request_may_state_its_own_length() -> None:
    np.testing.assert_array_equal(np.asarray(parse(a_request(), b"").images), PICTURES)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"logits": False, "probabilities": False, "label": False}),
        ({"outputs": []}, {"logits": False, "probabilities": False, "label": False}),
        ({"parameters": {"binary_data_output": True}}, {"logits": True, "probabilities": True, "label": True}),
        ({"outputs": [{"name": "label"}]}, {"label": False}),
        ({"outputs": [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "label"}]},
         {"logits": True, "label": False}),
        ({"parameters": {"binary_data_output": True}, "outputs": [
            {"name": "logits", "parameters": {"binary_data": False}}, {"name": "label"}]},
         {"logits": False, "label": True}),
    ],
)  # fmt: skip
def test_wanted_outputs(changes: dict[str, Any], wanted: dict[str, bool]) -> None:
    outputs = parse(a_request() | changes).outputs
    assert {name: output.binary for name, output in outputs.items()} == wanted
    assert not any(output.classes for output in outputs.values())


# -- what is refused ------------------------------------------------------------------------------------------

BINARY = {"data": ..., "parameters": {"binary_data_size": 24}}
IMAGE = {"name": "image", "datatype": "BYTES", "shape": [2]}


@pytest.mark.parametrize(
    ("document", "status", "message"),
    [
        (b"", 400, "not valid UTF-8 JSON at byte 0"),
        (b"\xff\xfe{}", 400, "not valid UTF-8 JSON"),
        (b'{"inputs": [', 400, "not valid UTF-8 JSON at byte 12"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", 400, "not valid UTF-8 JSON"),
        ([], 400, "the request must be a JSON object, got an array"),
        ({}, 400, "'inputs' must be a JSON array, got nothing"),
        ({"id": 7, "inputs": []}, 400, "'id' must be a string, got a number"),
        ({"inputs": {}}, 400, "'inputs' must be a JSON array, got an object"),
        ({"inputs": []}, 422, "exactly one input (one of: image, image_uint8, pixels), got 0"),
        ({"inputs": [an_input(), an_input()]}, 422, "exactly one input (one of: image, image_uint8, pixels), got 2"),
        ({"inputs": ["image"]}, 400, "an input must be a JSON object, got a string"),
        (a_request(name="bild"), 422, 'no input "bild"; this student takes one of: image, image_uint8, pixels'),
        (a_request(name=["image"]), 422, "no input an array"),
        (a_request(name="x" * 1000), 422, 'no input "' + "x" * 76 + "...;"),
        (a_request(datatype="FP32"), 422, "input 'image_uint8' has datatype UINT8, got \"FP32\""),
        (a_request(datatype=...), 422, "has datatype UINT8, got null"),
        (a_request(shape=...), 400, "'shape' of input 'image_uint8' must be a JSON array, got nothing"),
        (a_request(shape=[24]), 422, "has shape [-1, 2, 2, 3] with 1 to 4 images, got [24]"),
        (a_request(shape=[2, 3, 2, 2]), 422, "got [2, 3, 2, 2]"),
        (a_request(shape=[0, 2, 2, 3]), 422, "got [0, 2, 2, 3]"),
        (a_request(shape=[-1, 2, 2, 3]), 422, "got [-1, 2, 2, 3]"),
        (a_request(shape=[5, 2, 2, 3]), 422, "with 1 to 4 images, got [5, 2, 2, 3]"),
        (a_request(shape=[2**40, 2, 2, 3]), 422, "got [1099511627776, 2, 2, 3]"),
        (a_request(shape=[2, 2**40, 2**40, 3]), 422, "got [2, 1099511627776, 1099511627776, 3]"),
        (a_request(shape=[2.0, 2, 2, 3]), 422, "got an array"),
        (a_request(shape=[True, 2, 2, 3]), 422, "got an array"),
        (a_request(shape=["2", 2, 2, 3]), 422, "got an array"),
        (a_request(data=...), 400, "'data' of input 'image_uint8' must be a JSON array, got nothing"),
        (a_request(data=[]), 422, "must have 24 elements for shape [2, 2, 2, 3], got 0"),
        (a_request(data=[0] * 23), 422, "must have 24 elements for shape [2, 2, 2, 3], got 23"),
        (a_request(data=[[0] * 12] * 2), 422, "nested 'data' of input 'image_uint8' does not have the shape"),
        (a_request(data=[[[[0] * 3] * 2] * 2, [[[0] * 3] * 2]]), 422, "does not have the shape"),
        (a_request(data=[[[[0] * 3] * 2] * 2, 0]), 422, "does not have the shape"),
        (a_request(data=[[[[[0]] * 3] * 2] * 2] * 2), 422, "whole numbers from 0 to 255"),
        (a_request(data=[0] * 23 + [256]), 422, "whole numbers from 0 to 255"),
        (a_request(data=[0] * 23 + [-1]), 422, "whole numbers from 0 to 255"),
        (a_request(data=[0] * 23 + [0.5]), 422, "whole numbers from 0 to 255"),
        (a_request(data=[0] * 23 + [True]), 422, "whole numbers from 0 to 255"),
        (a_request(data=[0] * 23 + [None]), 422, "whole numbers from 0 to 255"),
        (a_request(name="pixels", datatype="FP32", shape=[1, 3, 2, 2], data=["0"] * 12), 422, "must be numbers"),
        (a_request(name="pixels", datatype="FP32", shape=[1, 3, 2, 2], data=[10**400] * 12), 422, "too large for any"),
        (a_request(**IMAGE, data=["aGk=", "%%%"]), 422, "element 1 of input 'image' is not a base64 string"),
        (a_request(**IMAGE, data=["aGk=", 1]), 422, "element 1 of input 'image' is not a base64 string"),
        (a_request(**IMAGE, data=["aGk=", "ü"]), 422, "element 1 of input 'image' is not a base64 string"),
        (a_request(**BINARY), 400, "but there is no header Inference-Header-Content-Length"),
        (a_request(parameters={"binary_data_size": 24}), 400, "both 'data' and 'binary_data_size'"),
        (a_request(parameters=[]), 400, "'parameters' of input 'image_uint8' must be a JSON object, got an array"),
        (a_request(parameters={"shared_memory_region": "x"}), 422, "shared memory is not supported"),
        (a_request() | {"parameters": 1}, 400, "'parameters' must be a JSON object, got a number"),
        (a_request() | {"parameters": {"binary_data_output": 1}}, 400, "must be true or false, got a number"),
        (a_request() | {"outputs": [{}]}, 422, "no output null; this student has: logits, probabilities, label"),
        (a_request() | {"outputs": [{"name": "loss"}]}, 422, 'no output "loss"'),
        (a_request() | {"outputs": [{"name": {}}]}, 422, "no output an object"),
        (a_request() | {"outputs": [{"name": "label"}] * 2}, 400, "output 'label' is asked for twice"),
        (a_request() | {"outputs": [{"name": "label", "parameters": {"classification": 3}}]}, 422, "'label' cannot be"),
        (a_request() | {"outputs": [{"name": "logits", "parameters": {"classification": -1}}]}, 422, "-1 classifi"),
        (a_request() | {"outputs": [{"name": "logits", "parameters": {"classification": "3"}}]}, 400, "got a string"),
    ],
)  # fmt: skip
def test_refusals(document: object, status: int, message: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        parse(document)
    assert message in refusal.value.message
    assert refusal.value.status == status
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize(
    ("changes", "binary", "status", "message"),
    [
        (BINARY, bytes(23), 400, "'binary_data_size' of input 'image_uint8' is 24, but 23 bytes follow the JSON"),
        (BINARY, bytes(25), 400, "is 24, but 25 bytes follow"),
        ({"data": ..., "parameters": {"binary_data_size": 12}}, bytes(12), 422, "takes 24 bytes, got 12"),
        ({"data": ..., "parameters": {"binary_data_size": "24"}}, bytes(24), 400, 'is "24", but 24'),
        ({"data": ..., "parameters": {"binary_data_size": True}}, b"x", 400, "is true, but 1"),
        ({}, b"rest", 400, "4 bytes follow the JSON, but input 'image_uint8' has no 'binary_data_size'"),
    ],
)
def test_binary_refusals(changes: dict[str, Any], binary: bytes, status: int, message: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        parse(a_request(**changes), binary)
    assert message in refusal.value.message
    assert refusal.value.status == status


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (elements(b"one"), "does not hold exactly 2 elements"),
        (elements(b"one", b"two", b"three"), "does not hold exactly 2 elements"),
        (elements(b"one") + b"\1\0", "element 1 of input 'image' ends within its length"),
        (elements(b"one") + b"\xff\xff\xff\xff", "element 1 of input 'image' has 4294967295 bytes, but 0 follow"),
        (b"", "does not hold exactly 2 elements"),
    ],
)
def test_broken_elements_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as refusal:
        parse(a_request(**IMAGE, data=..., parameters={"binary_data_size": len(content)}), content)
    assert refusal.value.status == 400


@pytest.mark.parametrize("length", ["", "-1", "1e3", "٣", "9" * 19, "9" * 5000, "1000000"])
def test_a_wrong_header_length_is_refused(length: str) -> None:
    with pytest.raises(ProtocolError, match="must be a number of bytes") as refusal:
        protocol.parse_infer(json.dumps(a_request()).encode(), length, STUDENT, MAX_IMAGES)
    assert refusal.value.status == 400


def test_refusals_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ProtocolError(422, "no")))
    assert (error.status, str(error)) == (422, "no")


# -- fuzz -----------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)
_field = st.sampled_from(["name", "datatype", "shape", "data", "parameters"])


def _only_refuses(body: bytes, header_length: str | None) -> None:
    try:
        request = protocol.parse_infer(body, header_length, STUDENT, MAX_IMAGES)
    except ProtocolError as error:
        refusal = error
    else:
        assert 1 <= len(request.images) <= MAX_IMAGES
        return
    assert refusal.status in (400, 422)
    assert len(refusal.message) < 300


@given(body=st.binary(max_size=200), header_length=st.none() | st.text(max_size=5) | st.integers(0, 250).map(str))
def test_noise_is_only_ever_refused(body: bytes, header_length: str | None) -> None:
    _only_refuses(body, header_length)


@given(document=_json, binary=st.none() | st.binary(max_size=30))
def test_strange_json_is_only_ever_refused(document: object, binary: bytes | None) -> None:
    header = json.dumps(document).encode()
    _only_refuses(header + (binary or b""), None if binary is None else str(len(header)))


@given(
    name=st.sampled_from(["image", "image_uint8", "pixels"]),
    changes=st.dictionaries(_field, _json, max_size=2),
    top=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), _json, max_size=2),
    binary=st.none() | st.binary(max_size=60),
)
def test_nearly_proper_requests_are_only_ever_refused(
    name: str, changes: dict[str, Any], top: dict[str, Any], binary: bytes | None
) -> None:
    tensor = next(tensor for tensor in inputs_of(STUDENT) if tensor.name == name)
    entry = tensor.as_dict() | {"shape": [1, *tensor.shape[1:]]}
    entry |= {"data": [0] * 12} if binary is None else {"parameters": {"binary_data_size": len(binary)}}
    header = json.dumps({"inputs": [entry | changes], **top}).encode()
    _only_refuses(header + (binary or b""), None if binary is None else str(len(header)))


@given(images=st.lists(st.binary(max_size=20), min_size=1, max_size=MAX_IMAGES), cut=st.integers(0, 5))
def test_elements_come_back_or_are_refused(images: list[bytes], cut: int) -> None:
    content = elements(*images)
    content = content[: len(content) - cut]
    changes = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": ...}
    request = a_request(**changes, parameters={"binary_data_size": len(content)})
    if cut:
        with pytest.raises(ProtocolError):
            parse(request, content)
    else:
        assert parse(request, content).images == images


# -- answers --------------------------------------------------------------------------------------------------

LOGITS = np.array([[0.1, 2.0, -1.0], [0.0, 0.5, 3.25]], np.float32)


def answer(outputs: dict[str, bool], request_id: str | None = None, logits: Any = LOGITS) -> protocol.Reply:
    wanted = {name: Output(binary) for name, binary in outputs.items()}
    return protocol.format_infer(InferRequest(request_id, [b"", b""], wanted), Predictions(logits, {}), STUDENT)


def test_an_answer_as_json() -> None:
    reply = answer({"logits": False, "probabilities": False, "label": False}, "7")
    assert reply.headers == {"Content-Type": "application/json"}
    document = json.loads(reply.body)
    assert {name: document[name] for name in ("model_name", "model_version", "id")} == {
        "model_name": "pets",
        "model_version": "v1",
        "id": "7",
    }
    logits, probabilities, label = document["outputs"]
    assert logits | {"data": None} == {"name": "logits", "datatype": "FP32", "shape": [2, 3], "data": None}
    np.testing.assert_array_equal(np.array(logits["data"], np.float32).reshape(2, 3), LOGITS)
    np.testing.assert_allclose(np.array(probabilities["data"]).reshape(2, 3).sum(axis=1), 1, rtol=1e-6)
    assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["dog", "Ünicorn"]}


def test_no_id_is_no_id() -> None:
    assert "id" not in json.loads(answer({"label": False}).body)


def test_an_answer_as_binary() -> None:
    reply = answer({"label": True, "probabilities": False, "logits": True}, "")
    assert reply.headers["Content-Type"] == "application/octet-stream"
    length = int(reply.headers["Inference-Header-Content-Length"])
    document = json.loads(reply.body[:length])
    assert document["id"] == ""
    label, probabilities, logits = document["outputs"]
    assert "data" in probabilities
    assert "data" not in label
    split = length + label["parameters"]["binary_data_size"]
    assert reply.body[length:split] == elements(b"dog", "Ünicorn".encode())
    assert logits["parameters"]["binary_data_size"] == 24
    np.testing.assert_array_equal(np.frombuffer(reply.body[split:], "<f4").reshape(2, 3), LOGITS)


def test_a_bad_image_is_named_by_its_index() -> None:
    predictions = Predictions(LOGITS, {1: ImageError("truncated", "40 bytes")})
    with pytest.raises(ProtocolError, match="image 1 of input 'image' cannot be used: truncated: 40 bytes") as refusal:
        protocol.format_infer(InferRequest(None, [b"", b""], {"label": Output()}), predictions, STUDENT)
    assert refusal.value.status == 422


def test_numbers_that_json_cannot_carry_need_binary() -> None:
    logits = np.array([[math.nan, 0, 1]], np.float32)
    with pytest.raises(ProtocolError, match="ask for it with 'binary_data'") as refusal:
        answer({"logits": False}, logits=logits)
    assert refusal.value.status == 422
    assert answer({"logits": True}, logits=logits).body.endswith(logits.tobytes())


@pytest.mark.parametrize("binary", [False, True])
def test_classifications_come_as_triton_writes_them(binary: bool) -> None:
    request = a_request() | {
        "outputs": [{"name": "logits", "parameters": {"classification": 2, "binary_data": binary}}]
    }
    reply = protocol.format_infer(parse(request), Predictions(LOGITS, {}), STUDENT)
    length = int(reply.headers.get("Inference-Header-Content-Length", len(reply.body)))
    (output,) = json.loads(reply.body[:length])["outputs"]
    expected = ["2.000000:1:dog", "0.100000:0:cat", "3.250000:2:Ünicorn", "0.500000:1:dog"]
    assert {key: output[key] for key in ("name", "datatype", "shape")} == {
        "name": "logits",
        "datatype": "BYTES",
        "shape": [2, 2],
    }
    if binary:
        assert reply.body[length:] == elements(*(text.encode() for text in expected))
    else:
        assert output["data"] == expected


def test_no_more_classifications_than_classes() -> None:
    request = a_request() | {"outputs": [{"name": "probabilities", "parameters": {"classification": 1000}}]}
    (output,) = json.loads(protocol.format_infer(parse(request), Predictions(LOGITS, {}), STUDENT).body)["outputs"]
    assert output["shape"] == [2, 3]
    scores = [float(text.split(":")[0]) for text in output["data"]]
    np.testing.assert_allclose(np.array(scores).reshape(2, 3).sum(axis=1), 1, atol=2e-6)
