"""Hand-made runs for the tests of what trace and forget find in them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pu_ray import images, schema
from pu_ray.lineage import forget as forgetting
from pu_ray.lineage import trace as tracing
from pu_ray.manifest import Publication
from pu_ray.progress import Silent
from pu_ray.storage import Storage
from tests.unit.artifacts import COUNTS, FACTS, identity_columns, png, write_shards

CHOSEN = [png(k) for k in range(6)]
LOW, LEAK, BROKEN, GATED, CUT = (png(k) for k in range(6, 11))
LABELED, JUDGE, TEST, STRANGER = (png(k) for k in range(11, 15))


def id_of(content: bytes) -> bytes:
    return images.sample_id(content)


def hexes(*contents: bytes) -> list[str]:
    return [id_of(content).hex() for content in contents]


ONE, TWO = hexes(*CHOSEN[:2])


def publish(storage: Storage, stage: str, identity: str, inputs: dict[str, str], **facts: Any) -> None:
    told = {**FACTS.get(stage, {}), **facts}
    Publication(stage, identity, inputs, 0).publish(storage, counts=COUNTS[stage], facts=told)


def rows(contents: list[bytes], scores: list[float | None], shard: str, errors: list[str | None]) -> pa.Table:
    nothing = pa.array([0.5] * len(contents), pa.float32())
    columns = {
        **identity_columns(contents, shard),
        schema.SCORE: pa.array(scores, pa.float32()),
        schema.PREDICTED: pa.array([None if error else k % 2 for k, error in enumerate(errors)], pa.int32()),
        **dict.fromkeys((schema.CONFIDENCE, schema.ENERGY, schema.ENTROPY, schema.NEIGHBOUR), nothing),
        schema.ERROR: pa.array(errors, pa.string()),
    }
    return pa.table(columns, schema=schema.scores())


def choose(folder: Storage, contents: list[bytes], identity: str, inputs: dict[str, str], rule: str = "recall") -> None:
    """`selection/` and `mined/` of these images, three to a shard."""
    count = len(contents)
    columns = {
        **identity_columns(contents),
        schema.SHARD: pa.array([f"{k // 3}.parquet" for k in range(count)]),
        schema.SCORE: pa.array([1.0] * count, pa.float32()),
        schema.PREDICTED: pa.array([k % 2 for k in range(count)], pa.int32()),
        schema.CONFIDENCE: pa.array([0.9] * count, pa.float32()),
        schema.ORDER: pa.array(range(count), pa.int64()),
        schema.WHY: pa.array([rule] * count),
    }
    table = pa.table(columns, schema=schema.selection())
    selection = folder.child("selection")
    selection.write_table("selection.parquet", table)
    left_out = {schema.SAMPLE_ID: pa.array([id_of(LEAK)], schema.SAMPLE_ID_TYPE), schema.WHY: pa.array(["leak"])}
    selection.write_table("left_out.parquet", pa.table(left_out))
    threshold = 0.25 if rule == "recall" else None
    publish(selection, "select", identity, inputs, rule=rule, threshold=threshold)
    mined = table.append_column(schema.BYTES, pa.array(contents, pa.large_binary()))
    write_shards(folder.child("mined"), {f"{k}.parquet": mined.slice(3 * k, 3) for k in range(-(-count // 3))})
    publish(folder.child("mined"), "materialise", f"mined of {identity}", {"select": identity})


def teach(folder: Storage, choice: str, name: str) -> None:
    """A student of a choice, judged and exported."""
    mined = f"mined of {choice}"
    publish(folder.child("student"), "distill", name, {"fit": "scorer", "materialise": mined})
    test = {schema.SAMPLE_ID: pa.array([id_of(TEST)], schema.SAMPLE_ID_TYPE)}
    folder.child("evaluation").write_table("answers.parquet", pa.table(test))
    publish(folder.child("evaluation"), "evaluate", f"judged {name}", {"select": choice, "distill": name})
    inputs = {"fit": "scorer", "materialise": mined, "distill": name, "evaluate": f"judged {name}"}
    sums = {"model.safetensors": f"sum of {name}"}
    publish(folder.child("exported"), "export", f"exported {name}", inputs, sha256=sums)


def trace(run: Storage, content: bytes) -> tracing.Trace:
    return tracing.trace(run, id_of(content), Silent())


def forget(run: Storage, *contents: bytes, apply: bool = True) -> forgetting.Forgetting:
    return forgetting.forget(run.uri, [id_of(one) for one in contents], Silent(), apply=apply, note=lambda _: None)


def files(run: Storage) -> dict[str, bytes]:
    return {file.path: run.read_bytes(file.path) for file in run.list_files()}
