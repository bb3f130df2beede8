"""Ten thousand hostile requests to a real server: none is answered with 5xx, and its memory does not grow."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from ray import serve

from serving import app
from serving.settings import ServingSettings
from tests.integration.test_serving import free_port
from tests.unit.serving.students import png, write_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = 10_000
WARM_UP = 3_000  # until allocators and caches have what they keep
CLIENTS = 4
MOST_GROWTH_MIB = 16
LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/pets/infer"

Request = tuple[str, dict[str, str], bytes]


@pytest.fixture
def url(ray_cluster: object, tmp_path: Path) -> Iterator[str]:
    settings = ServingSettings(authentication="off", max_body_bytes=500_000, max_image_px=1_000_000)
    yield app.deploy([write_student(tmp_path)], settings, port=free_port())
    serve.shutdown()


# -- requests that are right, and what is done to them ------------------------------------------------------


def with_binary(tensor: dict[str, Any], content: bytes) -> Request:
    entry = tensor | {"parameters": {"binary_data_size": len(content)}}
    header = json.dumps({"inputs": [entry], "id": "x"}).encode()
    return INFER, {LENGTH: str(len(header))}, header + content


def proper(chance: random.Random) -> Request:
    picture = png(chance.randrange(50))
    values = np.full((1, 3, 8, 8), chance.choice([0.0, float("nan"), float("inf"), 1e38]), np.float32)
    in_json = {"name": "image_uint8", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [1] * 192}
    return chance.choice(
        [
            with_binary(
                {"name": "image", "datatype": "BYTES", "shape": [1]}, struct.pack("<I", len(picture)) + picture
            ),
            with_binary({"name": "image_uint8", "datatype": "UINT8", "shape": [1, 8, 8, 3]}, bytes(192)),
            with_binary({"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8]}, values.tobytes()),
            (INFER, {}, json.dumps({"inputs": [in_json]}).encode()),
            ("/v1/classify", {"Content-Type": "image/png"}, picture),
        ]
    )


def cut(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    return path, headers, body[: chance.randrange(len(body))]


def lengthened(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    return path, headers, body + chance.randbytes(chance.choice([1, 4, 1000]))


def flipped(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    changed = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return path, headers, bytes(changed)


def mislabeled(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    wrong = chance.choice(["0", "-1", "1e3", "9" * 30, "x", str(len(body) + 1), str(chance.randrange(len(body)))])
    return path, headers | {LENGTH: wrong}, body


def absurd(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    shapes = [b"[0]", b"[-1]", b"[1000000000000]", b"[" + b"9" * 40 + b"]", b"[[1]]", b"[1.5]", b"[" * 3000, b"null"]
    for shape in (b"[1, 8, 8, 3]", b"[1, 3, 8, 8]", b"[1]"):
        body = body.replace(b'"shape": ' + shape, b'"shape": ' + chance.choice(shapes), 1)
    body = body.replace(b'"UINT8"', chance.choice([b'"FP32"', b'"BYTES"', b'"COMPLEX"', b"7", b'"UINT8"']), 1)
    if LENGTH in headers:
        headers = headers | {LENGTH: str(int(headers[LENGTH]) + len(body) - len(request[2]))}
    return path, headers, body


def compressed(chance: random.Random, request: Request) -> Request:
    path, headers, body = request
    return path, headers | {"Content-Encoding": chance.choice(["gzip", "deflate", "br", "gzip, gzip"])}, body


MUTATIONS: list[Callable[[random.Random, Request], Request]] = [
    lambda _chance, request: request,
    cut,
    lengthened,
    flipped,
    mislabeled,
    absurd,
    compressed,
]


# -- the server ---------------------------------------------------------------------------------------------


def memory_mib() -> float:
    """Resident memory of the processes that answer."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ServeReplica:pu-ray" in (entry / "cmdline").read_bytes():
                lines = (entry / "status").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        except OSError:
            continue
    return total / 1024


def left_half_way(url: str, chance: random.Random) -> None:
    """A client that promises a body, sends a part of it, and goes."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode() + chance.randbytes(chance.randrange(5000)))


def ask(url: str, seed: int, count: int, statuses: Counter[int], wrong: list[str]) -> None:
    chance, where = random.Random(seed), urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    for number in range(count):
        if number % 100 == 0:
            left_half_way(url, chance)
        mutation = chance.choice(MUTATIONS)
        path, headers, body = mutation(chance, proper(chance))
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        said = answer.read()
        statuses[answer.status] += 1
        if answer.status >= 500 or (answer.status != 200 and "error" not in json.loads(said)):
            wrong.append(f"{answer.status} {said[:300]!r} to {body[:300]!r} {headers}")
    connection.close()


def press(url: str, seed: int, requests: int) -> Counter[int]:
    counts = [Counter[int]() for _ in range(CLIENTS)]
    wrong: list[str] = []
    clients = [
        threading.Thread(target=ask, args=(url, seed + number, requests // CLIENTS, counts[number], wrong))
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not wrong, wrong[:3]
    statuses = sum(counts, Counter[int]())
    assert sum(statuses.values()) == requests // CLIENTS * CLIENTS, "a client broke off"
    return statuses


def test_ten_thousand_hostile_requests(url: str) -> None:
    press(url, 0, WARM_UP)
    before = memory_mib()
    assert before > 50, "the process was found"
    statuses = press(url, CLIENTS, REQUESTS)
    growth = memory_mib() - before
    print(f"{dict(statuses)}; {before:.0f} MiB grew by {growth:.1f}")
    assert {200, 400, 422} <= set(statuses)
    assert growth < MOST_GROWTH_MIB
