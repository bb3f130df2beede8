"""serving/rpc.py: the protocol over gRPC, with messages of our own stubs and without a server."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc
import numpy as np
import pytest

from serving import auth, rpc
from serving import inference_pb2 as pb
from serving.desk import Served, Unavailable
from serving.predictor import Predictor
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.desks import InProcess, desk_of
from tests.unit.serving.students import LABELS, picture, png

SETTINGS = ServingSettings(max_images=4, request_timeout_s=0.2, authentication="off")


class Call:
    """What Ray Serve hands over with a call."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = list(metadata.items())
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


@pytest.fixture
def servicer(student: Student, backend: InProcess) -> rpc.Servicer:
    return rpc.Servicer(desk_of(SETTINGS, Served(student, backend)), None)


def call(servicer: rpc.Servicer, method: str, request: Any, context: Call | None = None) -> Any:
    return asyncio.run(servicer.call(method, request, context or Call()))


def refused(servicer: rpc.Servicer, method: str, request: Any, context: Call | None = None) -> tuple[Any, str]:
    context = context or Call()
    with pytest.raises(rpc.Refused):
        asyncio.run(servicer.call(method, request, context))
    return context.code, context.details


def infer(**changes: Any) -> Any:
    pictures = np.stack([picture(1), picture(2)])
    given = {"name": "image_uint8", "datatype": "UINT8", "shape": pictures.shape} | changes.pop("tensor", {})
    fields = {"model_name": "pets", "inputs": [given], "raw_input_contents": [pictures.tobytes()]} | changes
    return pb.ModelInferRequest(**fields)


def logits_of(response: Any) -> Any:
    names = [output.name for output in response.outputs]
    shape = list(response.outputs[names.index("logits")].shape)
    return np.frombuffer(response.raw_output_contents[names.index("logits")], "<f4").reshape(shape)


def test_what_there_is(servicer: rpc.Servicer, student: Student) -> None:
    assert call(servicer, "ServerLive", pb.ServerLiveRequest()).live
    assert call(servicer, "ServerReady", pb.ServerReadyRequest()).ready
    assert call(servicer, "ModelReady", pb.ModelReadyRequest(name="pets", version=student.version)).ready
    assert "binary_tensor_data" in call(servicer, "ServerMetadata", pb.ServerMetadataRequest()).extensions
    metadata = call(servicer, "ModelMetadata", pb.ModelMetadataRequest(name="pets"))
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs] == [
        ("image", "BYTES", [-1]),
        ("image_uint8", "UINT8", [-1, 8, 8, 3]),
        ("pixels", "FP32", [-1, 3, 8, 8]),
    ]
    (entry,) = call(servicer, "RepositoryIndex", pb.RepositoryIndexRequest()).models
    assert (entry.name, entry.version, entry.state) == ("pets", student.version, "READY")


def test_only_ready_ones_where_they_are_asked_for(servicer: rpc.Servicer, backend: InProcess) -> None:
    backend.is_ready = False
    assert not call(servicer, "ServerReady", pb.ServerReadyRequest()).ready
    assert len(call(servicer, "RepositoryIndex", pb.RepositoryIndexRequest()).models) == 1
    assert len(call(servicer, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True)).models) == 0


def test_images_come_in_six_ways(servicer: rpc.Servicer, predictor: Predictor) -> None:
    pictures = np.stack([picture(1), picture(2)])
    pixels = predictor.prepare(pictures).pixels_MCHW
    encoded = [png(1), png(2)]
    elements = b"".join(struct.pack("<I", len(image)) + image for image in encoded)
    expected = predictor.predict(pictures).logits_NK
    ways = [
        ("image", "BYTES", [2], {"raw": elements}),
        ("image", "BYTES", [2], {"bytes_contents": encoded}),
        ("image_uint8", "UINT8", pictures.shape, {"raw": pictures.tobytes()}),
        ("image_uint8", "UINT8", pictures.shape, {"uint_contents": pictures.ravel().tolist()}),
        ("pixels", "FP32", pixels.shape, {"raw": pixels.tobytes()}),
        ("pixels", "FP32", pixels.shape, {"fp32_contents": pixels.ravel().tolist()}),
    ]
    for name, datatype, shape, content in ways:
        tensor = {"name": name, "datatype": datatype, "shape": shape}
        raw = [content.pop("raw")] if "raw" in content else []
        if content:
            tensor["contents"] = content
        request = pb.ModelInferRequest(model_name="pets", id="7", inputs=[tensor], raw_input_contents=raw)
        response = call(servicer, "ModelInfer", request)
        assert (response.model_name, response.id) == ("pets", "7")
        np.testing.assert_allclose(logits_of(response), expected, rtol=1e-5, atol=1e-5)
        best = [LABELS[index] for index in expected.argmax(axis=1)]
        position = [output.name for output in response.outputs].index("label")
        raw_labels = b"".join(struct.pack("<I", len(each.encode())) + each.encode() for each in best)
        assert response.raw_output_contents[position] == raw_labels


def test_classifications(servicer: rpc.Servicer, predictor: Predictor) -> None:
    wanted = {"name": "probabilities", "parameters": {"classification": pb.InferParameter(int64_param=1)}}
    response = call(servicer, "ModelInfer", infer(outputs=[wanted]))
    (output,) = response.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [2, 1])
    expected = predictor.predict(np.stack([picture(1), picture(2)])).probabilities_NK
    texts = [f"{row.max():.6f}:{row.argmax()}:{LABELS[row.argmax()]}".encode() for row in expected]
    assert response.raw_output_contents[0] == b"".join(struct.pack("<I", len(text)) + text for text in texts)


INVALID, ABSENT = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
CLASSES = pb.InferParameter(string_param="3")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model_name": "cars"}, ABSENT, "there is no student of this name"),
        ({"model_version": "7"}, ABSENT, "no such version"),
        ({"inputs": []}, INVALID, "exactly one input, got 0"),
        ({"tensor": {"name": "bild"}}, INVALID, 'no input "bild"'),
        ({"tensor": {"datatype": "FP32"}}, INVALID, "has datatype UINT8"),
        ({"tensor": {"shape": [2, 8, 8]}}, INVALID, "got [2, 8, 8]"),
        ({"tensor": {"shape": [5, 8, 8, 3]}}, INVALID, "with 1 to 4 images"),
        ({"raw_input_contents": [b"x"]}, INVALID, "takes 384 bytes, got 1"),
        ({"raw_input_contents": [b"x", b"y"]}, INVALID, "one entry of raw_input_contents"),
        ({"raw_input_contents": []}, INVALID, "must have 384 elements"),
        ({"tensor": {"contents": {"uint_contents": [1]}}}, INVALID, "then no contents"),
        (
            {"tensor": {"contents": {"uint_contents": [256] * 384}}, "raw_input_contents": []},
            INVALID,
            "whole numbers from 0 to 255",
        ),
        ({"outputs": [{"name": "loss"}]}, INVALID, 'no output "loss"'),
        ({"outputs": [{"name": "label"}] * 2}, INVALID, "asked for twice"),
        ({"outputs": [{"name": "logits", "parameters": {"classification": CLASSES}}]}, INVALID, "must be an int64"),
        (
            {"tensor": {"parameters": {"shared_memory_region": pb.InferParameter(string_param="x")}}},
            INVALID,
            "shared memory is not supported",
        ),
    ],
)
def test_refusals_have_a_status(servicer: rpc.Servicer, changes: dict[str, Any], code: Any, message: str) -> None:
    answered, details = refused(servicer, "ModelInfer", infer(**changes))
    assert answered == code
    assert message in details


@pytest.mark.parametrize(
    ("failure", "code", "details"),
    [
        (Unavailable("too many requests"), grpc.StatusCode.UNAVAILABLE, "too many requests"),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL, "internal error; the server's log tells more"),
    ],
)
def test_failures_have_a_status(
    servicer: rpc.Servicer, backend: InProcess, failure: Exception, code: Any, details: str
) -> None:
    backend.failure = failure
    assert refused(servicer, "ModelInfer", infer()) == (code, details)


def test_an_answer_that_never_comes(servicer: rpc.Servicer, backend: InProcess) -> None:
    backend.delay_s = 30
    assert refused(servicer, "ModelInfer", infer())[0] == grpc.StatusCode.DEADLINE_EXCEEDED


def test_one_bad_image_is_named(servicer: rpc.Servicer) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "contents": {"bytes_contents": [png(1), b"bad"]}}
    request = pb.ModelInferRequest(model_name="pets", inputs=[tensor])
    code, details = refused(servicer, "ModelInfer", request)
    assert code == INVALID
    assert details.startswith("image 1 of input 'image' cannot be used")


def test_tokens_are_asked_for(student: Student, backend: InProcess) -> None:
    guard = auth.Guard([auth.digest("secret")], read=None)
    servicer = rpc.Servicer(desk_of(SETTINGS, Served(student, backend)), guard)
    for stranger in (Call(), Call(authorization="Bearer wrong")):
        assert refused(servicer, "ModelInfer", infer(), stranger)[0] == grpc.StatusCode.UNAUTHENTICATED
    assert backend.asked == 0
    assert call(servicer, "ModelInfer", infer(), Call(authorization="Bearer secret")).model_name == "pets"
    assert call(servicer, "ServerLive", pb.ServerLiveRequest()).live


def test_every_method_of_the_service_is_answered() -> None:
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [method.name for method in service.methods] == list(rpc.METHODS)
