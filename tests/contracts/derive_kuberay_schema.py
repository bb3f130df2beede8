"""Makes kuberay.schema.json from KubeRay's CRDs, so that manifests can be checked where neither they nor a cluster are.

    python tests/contracts/derive_kuberay_schema.py CRDS

CRDS is a copy of `ray-operator/config/crd/bases` of the KubeRay release that the manifests are for. Left out are
descriptions, statuses and old versions; what stands there more than once, such as a pod template, is kept once. An
object takes only the fields that are named, as `kubectl apply` with strict validation has it; the API server alone
would drop a misspelled field without a word.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

RELEASE = "v1.7.0"
KINDS = {"RayJob": "ray.io_rayjobs.yaml", "RayService": "ray.io_rayservices.yaml"}
NOTICE = (
    f"Derived by derive_kuberay_schema.py from ray-operator/config/crd/bases of KubeRay {RELEASE}. "
    "Copyright The KubeRay Authors, Apache License 2.0."
)
_WORTH_SHARING = 200  # characters


def schema_of(crd: Path) -> dict[str, Any]:
    versions = yaml.load(crd.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    del schema["properties"]["status"]
    closed: dict[str, Any] = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object"}  # the API server knows its fields, the CRD does not
    return closed


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    # Among properties, `description` is a field's name and holds a schema.
    kept = {key: _closed(value) for key, value in node.items() if key != "description" or isinstance(value, dict)}
    is_open = kept.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object" and not is_open:
        kept["additionalProperties"] = False
    return kept


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas as `$defs`, with every larger part that repeats in a definition of its own."""
    seen: Counter[str] = Counter()

    def count(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(child)
        if isinstance(node, dict) and "type" in node:
            seen[_key(node)] += 1

    count(list(schemas.values()))
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def refer(node: Any, name: str) -> Any:
        if isinstance(node, list):
            return [refer(each, name) for each in node]
        if not isinstance(node, dict):
            return node
        key = _key(node)
        if key in names:
            return {"$ref": f"#/$defs/{names[key]}"}
        repeats = len(key) > _WORTH_SHARING and seen[key] > 1
        if repeats:
            names[key] = next(
                each
                for number in range(1000)
                if (each := f"{name}{number or ''}") not in {*definitions, *names.values()}
            )
        body = {child: refer(value, name if child in _STRUCTURE else child) for child, value in node.items()}
        if not repeats:
            return body
        definitions[names[key]] = body
        return {"$ref": f"#/$defs/{names[key]}"}

    for kind, schema in schemas.items():
        definitions[kind] = refer(schema, kind)
    return definitions


_STRUCTURE = {"properties", "items", "additionalProperties"}


def _key(node: dict[str, Any]) -> str:
    return json.dumps(node, sort_keys=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    document = {"$comment": NOTICE, "$defs": shared({kind: schema_of(folder / name) for kind, name in KINDS.items()})}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    Path(__file__).with_name("kuberay.schema.json").write_text(text, encoding="utf-8")
