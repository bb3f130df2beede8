"""The three ways in which a person's program sends one picture: as the body, as a form's file, as base64 in JSON."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.tensors import ProtocolError, kind_of

_FIELDS_AT_MOST = 8  # of a form; one is needed
_FIELD = "file"
_KEY = "image"


async def image_in(headers: Headers, body: bytes) -> bytes:
    """The encoded picture in a request's body.

    Raises:
        ProtocolError: 400, 415 or 422.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return body
    if kind == "multipart/form-data":
        return await _from_form(headers, body)
    if kind == "application/json":
        return _from_json(body)
    raise ProtocolError(
        415,
        "the body must be one encoded image with a Content-Type of image/..., a form (multipart/form-data) with a "
        f"field {_FIELD!r}, or JSON with base64 under {_KEY!r}",
    )


async def _from_form(headers: Headers, body: bytes) -> bytes:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        # The body has been counted already; a part may be as large as all of it.
        parser = MultiPartParser(
            headers, whole(), max_files=_FIELDS_AT_MOST, max_fields=_FIELDS_AT_MOST, max_part_size=len(body)
        )
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ProtocolError(400, "the form cannot be read") from error
    try:
        files = [value for name, value in form.multi_items() if isinstance(value, UploadFile) and name == _FIELD]
        if len(files) != 1:
            raise ProtocolError(422, f"the form needs exactly one file in a field {_FIELD!r}, got {len(files)}")
        return await files[0].read()
    finally:
        await form.close()


def _from_json(body: bytes) -> bytes:
    try:
        document = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, "the request is not valid UTF-8 JSON") from error
    text = document.get(_KEY) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ProtocolError(422, f"the JSON needs base64 under {_KEY!r}, got {kind_of(text)}")
    # What a browser's FileReader makes of a file: `data:image/png;base64,...`
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ProtocolError(422, f"{_KEY!r} is not base64") from error
