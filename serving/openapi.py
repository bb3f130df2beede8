"""The interface, described for programs (OpenAPI 3.1) and, from that, for people. Axes: N images, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

import pu_ray
from serving.protocol import HEADER_LENGTH
from serving.registry import Student
from serving.tensors import inputs_of, outputs_of

_JSON = "application/json"
_BINARY = "application/octet-stream"
_ERRORS = {
    "400": "The request is malformed.",
    "401": "The token is missing or not known.",
    "404": "There is no such student or version.",
    "408": "The body took too long.",
    "413": "The body or an image is too large.",
    "415": "Not an image, or a Content-Encoding that is not known.",
    "422": "The request does not fit the student, or an image cannot be used.",
    "503": "Too many requests are waiting; Retry-After says when to come back.",
    "504": "The answer took too long.",
}


def document(students: Sequence[Student], url: str) -> dict[str, Any]:
    """The description.

    Args:
        students: Whose names and labels it lists.
        url: Of the server.
    """
    names = [student.name for student in students]
    model = _parameter("model", "path", "Name of a student.", {"type": "string", "enum": names})
    version = _parameter("version", "path", "A version, or an alias such as `stable`.", {"type": "string"})
    top_k = _parameter("top_k", "query", "How many classes.", {"type": "integer", "minimum": 1, "default": 5})
    chosen = _parameter(
        "model", "query", "Name of a student; needed where there are several.", {"type": "string", "enum": names}
    )
    asked = _parameter("version", "query", "A version or an alias.", {"type": "string"})
    paths: dict[str, Any] = {
        "/v1/classify": {
            "post": _operation(
                "classify",
                "The most probable classes of one picture",
                parameters=[chosen, asked, top_k],
                body={
                    "image/*": {"schema": {"type": "string", "format": "binary"}},
                    _BINARY: {"schema": {"type": "string", "format": "binary"}},
                    "multipart/form-data": {"schema": _object({"file": {"type": "string", "format": "binary"}})},
                    _JSON: {"schema": _object({"image": {"type": "string", "contentEncoding": "base64"}})},
                },
                answer=_ref("Classification"),
                errors=_ERRORS,
            )
        },
        "/v2": {"get": _operation("server", "The server", answer=_ref("Server"), errors=_some("401"))},
        "/v2/health/live": {
            "get": _operation("live", "Whether the server lives", answer=_object({"live": {"type": "boolean"}}))
        },
        "/v2/health/ready": {
            "get": _operation(
                "ready",
                "Whether every student answers",
                answer=_object({"ready": {"type": "boolean"}}),
                errors={"503": "A student does not answer yet."},
            )
        },
        "/v2/models": {
            "get": _operation("models", "All students", answer=_ref("Models"), errors=_some("401")),
        },
        "/v2/repository/index": {
            "post": _operation(
                "index", "All versions of all students, as Triton lists them", answer=_ref("Index"), errors=_some("401")
            ),
        },
    }
    for suffix, own in (("", [model]), ("/versions/{version}", [model, version])):
        base = "/v2/models/{model}" + suffix
        word = "version" if suffix else "model"
        paths[base] = {
            "get": _operation(
                f"{word}_metadata",
                "The tensors it takes and gives",
                own,
                answer=_ref("Metadata"),
                errors=_some("401", "404"),
            )
        }
        paths[f"{base}/ready"] = {
            "get": _operation(
                f"{word}_ready",
                "Whether it answers",
                own,
                answer=_object({"name": {"type": "string"}, "ready": {"type": "boolean"}}),
                errors=_some("401", "404") | {"503": "It does not answer yet."},
            )
        }
        length = _parameter(HEADER_LENGTH, "header", "Bytes of the JSON, where tensors follow it.", {"type": "integer"})
        paths[f"{base}/infer"] = {
            "post": _operation(
                f"{word}_infer",
                "Inference (Open Inference Protocol v2)",
                [*own, length],
                body={
                    _JSON: {"schema": _ref("InferRequest")},
                    _BINARY: {"schema": {"type": "string", "format": "binary"}},
                },
                answer=_ref("InferResponse"),
                errors=_ERRORS,
            )
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PU-Ray",
            "version": pu_ray.__version__,
            "description": "Image classifiers behind the Open Inference Protocol v2. Bodies may be compressed "
            '(Content-Encoding: gzip or deflate). Every error is {"error": "..."}.',
        },
        "servers": [{"url": url.rstrip("/")}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(students),
        },
    }


def page(described: dict[str, Any]) -> str:
    """The description as a page of HTML."""
    template = resources.files("serving").joinpath("page", "docs.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(described=described, example=described["servers"][0]["url"])


def _schemas(students: Sequence[Student]) -> dict[str, Any]:
    inputs = sorted({tensor.name for student in students for tensor in inputs_of(student)})
    outputs = [tensor.name for tensor in outputs_of(students[0])] if students else []
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    tensor = _object({"name": text, "datatype": text, "shape": _list(whole)})
    values = {"type": "array", "items": {}, "description": "Row-major, flat or nested."}
    own = {"type": "object", "description": "`binary_data_size`, `binary_data`, `classification`."}
    given = {
        "name": {"type": "string", "enum": inputs},
        "datatype": {"type": "string", "enum": ["BYTES", "UINT8", "FP32"]},
        "shape": _list(whole),
        "parameters": own,
        "data": values,
    }
    wanted = {"name": {"type": "string", "enum": outputs}, "parameters": own}
    answer = {
        "name": text,
        "datatype": {"type": "string", "enum": ["FP32", "BYTES"]},
        "shape": _list(whole),
        "parameters": own,
        "data": values,
    }
    return {
        "Error": _object({"error": text}),
        "Server": _object({"name": text, "version": text, "extensions": _list(text)}),
        "Models": _object(
            {"models": _list(_object({"name": text, "versions": _list(text), "route": {"type": "object"}}))}
        ),
        "Index": _list(_object({"name": text, "version": text, "state": text, "reason": text})),
        "Metadata": _object(
            {
                "name": text,
                "versions": _list(text),
                "platform": text,
                "inputs": _list(tensor),
                "outputs": _list(tensor),
            }
        ),
        "Classification": _object(
            {
                "model": text,
                "version": text,
                "predictions": _list(_object({"label": text, "index": whole, "probability": number})),
            }
        ),
        "InferRequest": _object(
            {
                "id": text,
                "parameters": {"type": "object", "description": "`binary_data_output`."},
                "inputs": _list(_object(given, required=["name", "datatype", "shape"]), count=1),
                "outputs": _list(_object(wanted, required=["name"])),
            },
            required=["inputs"],
        ),
        "InferResponse": _object(
            {
                "model_name": text,
                "model_version": text,
                "id": text,
                "outputs": _list(_object(answer, required=["name", "datatype", "shape"])),
            },
            required=["model_name", "model_version", "outputs"],
        ),
    }


def _operation(
    name: str,
    summary: str,
    parameters: Sequence[dict[str, Any]] = (),
    *,
    answer: dict[str, Any],
    body: dict[str, Any] | None = None,
    errors: dict[str, str] | None = None,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": {_JSON: {"schema": answer}}}}
    for status, description in (errors or {}).items():
        responses[status] = {"description": description, "content": {_JSON: {"schema": _ref("Error")}}}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    if "401" not in responses:
        operation["security"] = []
    return operation


def _parameter(name: str, place: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "description": description, "schema": schema}


def _some(*statuses: str) -> dict[str, str]:
    return {status: _ERRORS[status] for status in statuses}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required)}


def _list(items: dict[str, Any], count: int | None = None) -> dict[str, Any]:
    bounds = {} if count is None else {"minItems": count, "maxItems": count}
    return {"type": "array", "items": items, **bounds}
