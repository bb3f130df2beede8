"""The same server as a Serve config file, for `serve deploy` and for KubeRay's RayService."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from serving.app import FRONT, STUBS, placed
from serving.plan import plan
from serving.replica import TAIL, applications
from serving.settings import ServingSettings


def text(uris: Sequence[str], settings: ServingSettings, *, host: str, port: int) -> str:
    """The file's content. Digests of tokens are in it, tokens are not.

    Args:
        uris: See `serving.plan.plan`.
        settings: Sizes, limits and tokens.
        host: Address to listen on.
        port: TCP port.

    Raises:
        PuRayError: See `plan`.
    """
    served = plan(uris, settings.wanted_engine)
    settings = placed(served, settings)
    common = settings.model_dump(mode="json", exclude_defaults=True)
    named = [served.registry_uri] if served.registry_uri else [student.uri for student in served.students]
    students: dict[str, dict[str, Any]] = {}
    for name, student in applications(served.students, settings).items():
        function, own = ("tail_from_args", {}) if name == TAIL else ("student_from_args", {"student": student.uri})
        students[name] = {
            "name": name,
            "route_prefix": None,
            "import_path": f"serving.app:{function}",
            "args": {**own, "settings": common},
        }
    front = {
        "name": FRONT,
        "route_prefix": "/",
        "import_path": "serving.app:front_from_args",
        "args": {"students": named, "settings": common},
    }
    document: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [*students.values(), front],
    }
    if settings.grpc_port is not None:
        document["grpc_options"] = {"port": settings.grpc_port, "grpc_servicer_functions": [STUBS]}
    return yaml.safe_dump(document, sort_keys=False)
