"""The Open Inference Protocol v2 over gRPC: messages in, messages out, with a status for every refusal.

Ray Serve's proxy speaks gRPC and calls the ingress's methods by the names of the protocol. Everything is decided where
REST decides it (`serving.desk`, `serving.tensors`); only the wire differs. Outputs travel in `raw_output_contents`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import grpc
import numpy as np

from serving import inference_pb2 as pb
from serving import protocol
from serving.auth import Guard
from serving.desk import Desk, Served, Unavailable
from serving.predictor import Images
from serving.tensors import (
    DECODED,
    ENCODED,
    Output,
    ProtocolError,
    Tensor,
    answers,
    check_classes,
    check_output,
    check_shape,
    from_bytes,
    input_named,
    outputs_of,
)

_log = logging.getLogger("ray.serve.pu_ray")

METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
)
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_OPEN = {"ServerLive", "ServerReady"}

Reply = TypeVar("Reply")


class Context(Protocol):
    """What Ray Serve hands to a gRPC method."""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """Keys and values that came with the call."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """How the call ends."""
        ...

    def set_details(self, details: str) -> None:
        """And why."""
        ...


class Refused(Exception):
    """Ends a call whose status has been set."""


class Servicer:
    """Answers calls.

    Args:
        desk: Whom calls are for.
        guard: Knows the tokens; None: everybody may call.
    """

    def __init__(self, desk: Desk, guard: Guard | None) -> None:
        self._desk = desk
        self._guard = guard

    async def call(self, method: str, request: Any, context: Context) -> Any:
        """Answer one call of `METHODS`.

        Raises:
            Refused: The context holds status and message.
        """
        started = time.monotonic()
        told: dict[str, Any] = {}
        status, details = grpc.StatusCode.OK, ""
        try:
            await self._known(method, context)
            handler: Callable[[Any, dict[str, Any]], Awaitable[Any]] = getattr(self, f"_{method}")
            return await handler(request, told)
        except ProtocolError as error:
            status, details = _STATUS.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), error.message
            raise Refused(details) from error
        except Unavailable as error:
            status, details = grpc.StatusCode.UNAVAILABLE, str(error)
            raise Refused(details) from error
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            _log.exception("a call failed unexpectedly")
            status, details = grpc.StatusCode.INTERNAL, "internal error; the server's log tells more"
            raise Refused(details) from error
        finally:
            if status is not grpc.StatusCode.OK:
                context.set_code(status)
                context.set_details(details)
            code = status.value[0]
            self._desk.count(lambda meter: meter.responded(method, code))
            _log.info(
                "call method=%s model=%s version=%s images=%d failed=%d status=%s seconds=%.4f",
                method,
                told.get("model", "-"),
                told.get("version", "-")[:12],
                told.get("images", 0),
                told.get("failed", 0),
                status.name,
                time.monotonic() - started,
            )

    async def _known(self, method: str, context: Context) -> None:
        if self._guard is None or method in _OPEN:
            return
        await self._guard.refresh()
        given = dict(context.invocation_metadata()).get("authorization")
        if self._guard.name_of(given) is None:
            raise ProtocolError(401, "this server wants a token: metadata authorization: Bearer ...")

    # -- what there is ------------------------------------------------------------------------------------

    async def _ServerLive(self, _request: Any, _told: dict[str, Any]) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ServerReady(self, _request: Any, _told: dict[str, Any]) -> Any:
        return pb.ServerReadyResponse(ready=not await self._desk.waiting_for())

    async def _ModelReady(self, request: Any, _told: dict[str, Any]) -> Any:
        served = self._desk.served(request.name, request.version)
        return pb.ModelReadyResponse(ready=await served.backend.ready())

    async def _ServerMetadata(self, _request: Any, _told: dict[str, Any]) -> Any:
        return pb.ServerMetadataResponse(**protocol.server_metadata())

    async def _ModelMetadata(self, request: Any, _told: dict[str, Any]) -> Any:
        served = self._desk.served(request.name, request.version)
        versions = list(self._desk.offer(request.name).versions)
        return pb.ModelMetadataResponse(**protocol.model_metadata(served.student, versions))

    async def _RepositoryIndex(self, request: Any, _told: dict[str, Any]) -> Any:
        entries = await self._desk.index()
        wanted = [entry for entry in entries if entry["state"] == "READY" or not request.ready]
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in wanted])

    # -- answers ------------------------------------------------------------------------------------------

    async def _ModelInfer(self, request: Any, told: dict[str, Any]) -> Any:
        with self._desk.admitted():
            served = self._desk.served(request.model_name, request.model_version)
            outputs = _outputs(request, served)
            images = _images(request, served, self._desk.settings.max_images)
            predictions = await self._desk.predict(served, images)
            told |= {
                "model": served.student.name,
                "version": served.student.version,
                "images": len(images),
                "failed": len(predictions.failures),
            }
            found = answers(outputs, predictions, served.student)
            response = pb.ModelInferResponse(
                model_name=served.student.name, model_version=served.student.version, id=request.id
            )
            for answer in found:
                response.outputs.add(**answer.tensor.as_dict())
                response.raw_output_contents.append(answer.as_bytes)
            return response


def _outputs(request: Any, served: Served) -> dict[str, Output]:
    wanted: dict[str, Output] = {}
    for entry in request.outputs:
        name = check_output(entry.name, served.student)
        if name in wanted:
            raise ProtocolError(400, f"output {name!r} is asked for twice")
        wanted[name] = Output(True, check_classes(name, _classes(entry.parameters)))
    return wanted or {tensor.name: Output(True) for tensor in outputs_of(served.student)}


def _classes(parameters: Mapping[str, Any]) -> int:
    if "classification" not in parameters:
        return 0
    given = parameters["classification"]
    if given.WhichOneof("parameter_choice") != "int64_param":
        raise ProtocolError(400, "parameter 'classification' must be an int64")
    return int(given.int64_param)


def _images(request: Any, served: Served, most: int) -> Images:
    if len(request.inputs) != 1:
        raise ProtocolError(422, f"a request needs exactly one input, got {len(request.inputs)}")
    (given,) = request.inputs
    tensor = input_named(given.name, served.student)
    shape = check_shape(tensor, given.datatype, list(given.shape), most)
    if "shared_memory_region" in given.parameters:
        raise ProtocolError(422, f"shared memory is not supported: send input {tensor.name!r} in the request")
    raw = list(request.raw_input_contents)
    if raw:
        if len(raw) != 1 or given.HasField("contents"):
            raise ProtocolError(400, "one input needs one entry of raw_input_contents, and then no contents")
        return from_bytes(tensor.name, raw[0], shape)
    return _from_contents(tensor, given.contents, shape)


def _from_contents(tensor: Tensor, contents: Any, shape: tuple[int, ...]) -> Images:
    where = f"input {tensor.name!r}"
    if tensor.name == ENCODED:
        found = list(contents.bytes_contents)
    else:
        found = contents.uint_contents if tensor.name == DECODED else contents.fp32_contents
    if len(found) != math.prod(shape):
        raise ProtocolError(
            422, f"{where} must have {math.prod(shape)} elements for shape {list(shape)}, got {len(found)}"
        )
    if tensor.name == ENCODED:
        return found
    if tensor.name == DECODED:
        values = np.array(found, np.uint32)
        if values.max(initial=0) > 255:
            raise ProtocolError(422, f"{where} must be whole numbers from 0 to 255")
        return values.astype(np.uint8).reshape(shape)
    return np.array(found, np.float32).reshape(shape)
