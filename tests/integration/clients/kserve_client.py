"""Asks a server with KServe's own clients; run in an environment of its own (`make clients`), without our code.

    python kserve_client.py HTTP_URL GRPC_HOST:PORT TOKEN MODEL PICTURES.npy

Prints one JSON document: what each client was told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig


def request(model: str, pictures: Any, binary: bool) -> InferRequest:
    """Decoded pictures for a student."""
    given = InferInput("image_uint8", list(pictures.shape), "UINT8")
    given.set_data_from_numpy(pictures, binary_data=binary)
    return InferRequest(model, [given], request_id="k")


def logits(response: Any) -> Any:
    """Of an answer."""
    (output,) = [output for output in response.outputs if output.name == "logits"]
    return np.asarray(output.as_numpy()).reshape(output.shape).tolist()


async def main() -> None:
    """Ask everything with both clients."""
    url, grpc_url, token, model, pictures_file = sys.argv[1:]
    pictures = np.load(pictures_file)

    # A fresh one each time: the client writes a request's header length into the headers it is given.
    def headers() -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    rpc = InferenceGRPCClient(grpc_url, retries=0)
    told: dict[str, Any] = {"rest": {}, "grpc": {}}
    told["rest"]["live"] = await rest.is_server_live(url)
    told["rest"]["ready"] = await rest.is_server_ready(url)
    told["rest"]["model_ready"] = await rest.is_model_ready(url, model, headers=headers())
    for name, binary in (("binary", True), ("json", False)):
        response = await rest.infer(url, request(model, pictures, binary), model_name=model, headers=headers())
        told["rest"][name] = logits(response)
        told["rest"]["id"] = response.id
    own = [("authorization", f"Bearer {token}")]
    told["grpc"]["live"] = await rpc.is_server_live()
    told["grpc"]["ready"] = await rpc.is_server_ready()
    told["grpc"]["model_ready"] = await rpc.is_model_ready(model, headers=own)
    for name, binary in (("binary", True), ("contents", False)):
        response = await rpc.infer(request(model, pictures, binary), headers=own)
        told["grpc"][name] = logits(response)
        told["grpc"]["id"] = response.id
    await rest.close()
    await rpc.close()
    print(json.dumps(told))


asyncio.run(main())
