"""A registry over Ray Serve: tokens, gRPC, and versions that come, share requests and go while clients ask."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from pu_ray.images import Limits
from serving import app, auth, client, deployment_file
from serving import inference_pb2 as pb
from serving import inference_pb2_grpc as stubs
from serving import registry as students
from serving.catalog import Catalog
from serving.plan import Plan, plan
from serving.predictor import Predictor
from serving.settings import ServingSettings
from tests.integration.test_serving import free_port
from tests.unit.serving.students import picture, png, write_student

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOKEN = "for-the-tests"
METADATA = [("authorization", f"Bearer {TOKEN}")]


@dataclass
class Registry:
    """A server that follows a registry, as `pu-ray serve` runs it."""

    url: str
    grpc_port: int
    catalog: Catalog
    versions: list[str]
    settings: ServingSettings
    served: Plan
    told: list[str] = field(default_factory=list)

    def follow_until(self, condition: Callable[[], bool]) -> None:
        """What the server's own loop does, until something has become true."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.told
            self.served = app.follow(self.served, self.settings, self.told.append)
            time.sleep(0.2)

    def answers(self, count: int = 1) -> Counter[str]:
        """Versions that answer."""
        with client.Client(self.url, token=TOKEN) as own:
            return Counter(own.classify(png(1)).version for _ in range(count))


def fronts() -> set[int]:
    """Processes that speak HTTP; their title says who they are."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ServeReplica:pu-ray:front" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found


@pytest.fixture(scope="module", params=["inside", "apart"])
def registry(
    request: pytest.FixtureRequest, ray_cluster: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    catalog = Catalog(str(folder / "registry"))
    versions = [catalog.add(write_student(folder / str(seed), "pets", seed)).version for seed in range(2)]
    settings = ServingSettings(
        token_digests=(auth.digest(TOKEN),),
        grpc_port=free_port(),
        reload_s=0.3,
        placement=request.param,
        fronts=2,
    )
    url = app.deploy([catalog.uri], settings, port=free_port())
    assert settings.grpc_port is not None
    yield Registry(url, settings.grpc_port, catalog, versions, settings, plan([catalog.uri]))
    serve.shutdown()


@pytest.fixture
def stub(registry: Registry) -> Iterator[stubs.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{registry.grpc_port}") as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


def test_strangers_get_nothing(registry: Registry, stub: stubs.GRPCInferenceServiceStub) -> None:
    with httpx.Client(base_url=registry.url, trust_env=False) as web:
        assert web.get("/v2/health/ready").json() == {"ready": True}
        response = web.post("/v1/classify", content=png(0), headers={"Content-Type": "image/png"})
        assert (response.status_code, list(response.json())) == (401, ["error"])
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    with pytest.raises(grpc.RpcError) as refusal:
        stub.ServerMetadata(pb.ServerMetadataRequest())
    assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_grpc_says_what_rest_says(registry: Registry, stub: stubs.GRPCInferenceServiceStub) -> None:
    pictures = np.stack([picture(seed) for seed in range(3)])
    tensor = {"name": "image_uint8", "datatype": "UINT8", "shape": pictures.shape}
    request = pb.ModelInferRequest(model_name="pets", inputs=[tensor], raw_input_contents=[pictures.tobytes()])
    response = stub.ModelInfer(request, metadata=METADATA)
    assert response.model_version == registry.versions[0]
    position = [output.name for output in response.outputs].index("probabilities")
    probabilities = np.frombuffer(response.raw_output_contents[position], "<f4").reshape(3, 3)
    with client.Client(registry.url, token=TOKEN) as own:
        for seed in range(3):
            by_rest = {item.index: item.probability for item in own.classify(png(seed)).predictions}
            assert {index: by_rest[index] for index in range(3)} == pytest.approx(
                dict(enumerate(probabilities[seed].tolist())), rel=1e-4
            )
    assert stub.ModelReady(pb.ModelReadyRequest(name="pets"), metadata=METADATA).ready


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.ModelInferRequest(model_name="cars"), grpc.StatusCode.NOT_FOUND),
        (pb.ModelInferRequest(model_name="pets"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_grpc_refusals_have_their_status(
    stub: stubs.GRPCInferenceServiceStub, request_: pb.ModelInferRequest, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        stub.ModelInfer(request_, metadata=METADATA)
    assert refusal.value.code() == code
    assert "Traceback" not in refusal.value.details()


def test_versions_come_share_and_go_and_no_request_fails(registry: Registry) -> None:
    first, second = registry.versions
    assert registry.answers(5) == Counter({first: 5})
    stop = threading.Event()
    seen: Counter[str] = Counter()
    failures: list[str] = []

    def asking() -> None:
        with httpx.Client(base_url=registry.url, trust_env=False, timeout=30) as web:
            headers = {"Content-Type": "image/png", "Authorization": f"Bearer {TOKEN}"}
            while not stop.is_set():
                response = web.post("/v1/classify", content=png(1), headers=headers)
                if response.status_code == 200:
                    seen[response.json()["version"]] += 1
                else:
                    failures.append(f"{response.status_code} {response.text}")

    threads = [threading.Thread(target=asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        registry.catalog.canary("pets", second, 0.5)
        registry.follow_until(lambda: seen[second] > 20)
        registry.catalog.promote("pets")
        registry.follow_until(lambda: registry.answers(10) == Counter({second: 10}))
        # The old version's process goes once no request can reach it.
        apart = registry.settings.placement == "apart"
        registry.follow_until(lambda: len(serve.status().applications) == 1 + apart)
        registry.catalog.rollback("pets")
        registry.follow_until(lambda: registry.answers(10) == Counter({first: 10}))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(seen[first], seen[second]) > 20
    assert any("is ready" in told for told in registry.told) == apart
    assert any("has stopped" in told for told in registry.told) == apart


def test_a_front_that_takes_a_dead_ones_place_knows_what_is_served_by_now(registry: Registry) -> None:
    first, second = registry.versions
    registry.catalog.promote("pets", second)
    registry.follow_until(lambda: registry.answers(10) == Counter({second: 10}))
    before = fronts()
    assert len(before) == (1 if registry.settings.placement == "inside" else 2)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(fronts() - before) < len(before):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # Our client waits until somebody answers; the version that the server was started with must never be heard again.
    assert registry.answers(20) == Counter({second: 20})
    registry.catalog.rollback("pets")
    registry.follow_until(lambda: registry.answers(10) == Counter({first: 10}))


def test_a_registry_that_breaks_changes_nothing(registry: Registry) -> None:
    route = Path(registry.catalog.uri) / "pets" / "route.json"
    content = route.read_text()
    route.write_text("{")
    try:
        told = len(registry.told)
        registry.follow_until(lambda: len(registry.told) > told)
        assert "what is served stays" in registry.told[-1]
        assert sum(registry.answers(3).values()) == 3
    finally:
        route.write_text(content)


def test_the_config_file_is_one_that_serve_takes(registry: Registry) -> None:
    text = deployment_file.text([registry.catalog.uri], registry.settings, host="0.0.0.0", port=8000)
    assert TOKEN not in text
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    apart = registry.settings.placement == "apart"
    assert [each.route_prefix for each in schema.applications] == [*([None] if apart else []), "/"]
    for each in schema.applications:
        module, _, function = each.import_path.partition(":")
        assert module == "serving.app"
        assert callable(getattr(app, function))


def test_the_tail_shares_a_process_that_starts_on_demand(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # A server of its own: the module's has to be gone.
    serve.shutdown()
    folder = tmp_path_factory.mktemp("tail")
    uris = [write_student(folder / name, name, seed) for seed, name in enumerate(["pets", "shoes", "cars"])]
    settings = ServingSettings(authentication="off", tail=("*",), tail_open=2)
    url = app.deploy(uris, settings, port=free_port())
    assert set(serve.status().applications) == {"student-tail", "pu-ray"}
    replicas = serve.status().applications["student-tail"].deployments["replica"].replica_states
    assert sum(replicas.values()) == 0, "nobody has asked yet"
    with client.Client(url) as own:
        for _ in range(2):
            for seed, name in enumerate(["pets", "shoes", "cars"]):
                expected = Predictor(students.load(uris[seed]), Limits()).predict([png(1)]).top(0, 3)
                answer = own.classify(png(1), model=name)
                assert [item.index for item in answer.predictions] == [index for index, _ in expected]
                assert answer.model == name
    replicas = serve.status().applications["student-tail"].deployments["replica"].replica_states
    assert sum(replicas.values()) == 1
