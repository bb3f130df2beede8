"""Asks a server with Triton's own clients; run in an environment of its own (`make clients`), without our code.

    python triton_client.py HTTP_HOST:PORT GRPC_HOST:PORT TOKEN MODEL PICTURES.npy ENCODED_FOLDER

Prints one JSON document: what each client was told.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

RAW = ("image_uint8", "UINT8")


def logits(client: Any, kind: Any, model: str, pictures: Any, **options: Any) -> Any:
    """What a student says of decoded pictures."""
    binary = options.pop("binary", True)
    given = kind.InferInput(RAW[0], list(pictures.shape), RAW[1])
    if kind is over_http:
        given.set_data_from_numpy(pictures, binary_data=binary)
        wanted = [kind.InferRequestedOutput("logits", binary_data=binary)]
    else:
        given.set_data_from_numpy(pictures)
        wanted = [kind.InferRequestedOutput("logits")]
    return client.infer(model, [given], outputs=wanted, **options).as_numpy("logits").tolist()


def encoded(client: Any, kind: Any, model: str, contents: list[bytes], **options: Any) -> Any:
    """What a student says of encoded pictures, without naming an output."""
    given = kind.InferInput("image", [len(contents)], "BYTES")
    given.set_data_from_numpy(np.array(contents, dtype=object))
    result = client.infer(model, [given], **options)
    return [label.decode() for label in result.as_numpy("label").reshape(-1).tolist()]


def classified(client: Any, kind: Any, model: str, pictures: Any, **options: Any) -> Any:
    """The classification extension."""
    given = kind.InferInput(RAW[0], list(pictures.shape), RAW[1])
    given.set_data_from_numpy(pictures)
    wanted = [kind.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer(model, [given], outputs=wanted, **options).as_numpy("probabilities")
    return [[text.decode() for text in row] for row in result.tolist()]


def refusal(ask: Any) -> list[str]:
    """Status and message of a request that must fail."""
    try:
        ask()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["none", ""]


def main() -> None:
    """Ask everything with both clients."""
    http_url, grpc_url, token, model, pictures_file, folder = sys.argv[1:]
    pictures = np.load(pictures_file)
    contents = [file.read_bytes() for file in sorted(Path(folder).iterdir())]

    # A fresh one each time: the client writes a request's header length into the headers it is given.
    def headers() -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    own = {"headers": {"authorization": f"Bearer {token}"}}
    web = over_http.InferenceServerClient(http_url)
    rpc = over_grpc.InferenceServerClient(grpc_url)
    told = {
        "http": {
            "live": web.is_server_live(),
            "ready": web.is_server_ready(),
            "model_ready": web.is_model_ready(model, headers=headers()),
            "server": web.get_server_metadata(headers=headers()),
            "model": web.get_model_metadata(model, headers=headers()),
            "index": web.get_model_repository_index(headers=headers()),
            "binary": logits(web, over_http, model, pictures, headers=headers(), request_id="a"),
            "json": logits(web, over_http, model, pictures, headers=headers(), binary=False),
            "gzip": logits(
                web,
                over_http,
                model,
                pictures,
                headers=headers(),
                request_compression_algorithm="gzip",
                response_compression_algorithm="gzip",
            ),
            "deflate": logits(
                web,
                over_http,
                model,
                pictures,
                headers=headers(),
                request_compression_algorithm="deflate",
                response_compression_algorithm="deflate",
            ),
            "encoded": encoded(web, over_http, model, contents, headers=headers()),
            "classified": classified(web, over_http, model, pictures, headers=headers()),
            "stranger": refusal(lambda: logits(web, over_http, model, pictures)),
            "absent": refusal(lambda: logits(web, over_http, "cars", pictures, headers=headers())),
            "bad": refusal(lambda: encoded(web, over_http, model, [*contents, b"bad"], headers=headers())),
        },
        "grpc": {
            "live": rpc.is_server_live(),
            "ready": rpc.is_server_ready(),
            "model_ready": rpc.is_model_ready(model, **own),
            "server": rpc.get_server_metadata(as_json=True, **own),
            "model": rpc.get_model_metadata(model, as_json=True, **own),
            "index": rpc.get_model_repository_index(as_json=True, **own)["models"],
            "binary": logits(rpc, over_grpc, model, pictures, request_id="a", **own),
            "encoded": encoded(rpc, over_grpc, model, contents, **own),
            "classified": classified(rpc, over_grpc, model, pictures, **own),
            "stranger": refusal(lambda: logits(rpc, over_grpc, model, pictures)),
            "absent": refusal(lambda: logits(rpc, over_grpc, "cars", pictures, **own)),
            "bad": refusal(lambda: encoded(rpc, over_grpc, model, [*contents, b"bad"], **own)),
        },
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
