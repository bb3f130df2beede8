"""Whether what a plan places on a node fits into its memory, by declaration and by estimate.

Ray places processes by the memory they declare and never looks at what they use; what a node lacks shows as a killed
process in the middle of a pass. The estimate counts what grows with the job: networks, a batch's activations, the
chunk at work. It leaves out feature rows and writing tasks, knows allocators' waste only by a constant, and was up to a
third below what was measured: leave room.

Not covered: the GPU's own memory; training workers, which declare none and hold what `distill.batch_size` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.estimate import (
    OBJECT_STORE_FRAC,
    Each,
    LakeSize,
    Load,
    NetworkSize,
    StagePlan,
    decoders_beside,
    fits,
)
from cluster.prices import NodePrice, Prices, Table
from pu_ray import embedding
from pu_ray.config import JobConfig
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.storage import Storage

# As in pu_ray.lake_pass; a test holds them together.
TASKS_IN_FLIGHT = 4
CALLS = 2

_GIB = 2**30
_MIB = 2**20
# Resident memory after the imports of a worker, measured (Python 3.11, Ray 2.60): 200 MiB, with torch 668.
_PROCESS_BYTES = 200 * _MIB
_TORCH_BYTES = 468 * _MIB
# What an actor had beyond all that is counted here. With it the estimates for resnet18 and mobilenet_v3_small at 224 px
# and for cifar/resnet18-w64 are 0.69, 0.52 and 0.61 GiB where peaks of 0.67, 0.52 and 0.73 were measured on a CPU.
_ACTOR_BYTES = 120 * _MIB
_CUDA_BYTES = 1024 * _MIB  # assumption: what a CUDA context and its libraries add on the host
_ONNX_COPIES = 2  # the graph's bytes, and the session's own
_LAYERS_AT_ONCE = 3  # a layer's input and output, and what a residual block keeps
_PIXEL_COPIES = 2  # as decoded; as the usable rows of it, or pinned for the GPU


class MemoryUse(Table):
    """What a kind of process is expected to need.

    Attributes:
        what: The process.
        needs_gib: By estimate.
        declared_gib: What the job reserves for it.
        setting: Where it does.
        parts_gib: What the estimate is the sum of.
    """

    what: str
    needs_gib: float
    declared_gib: float
    setting: str
    parts_gib: dict[str, float]


class NodeUse(Table):
    """What is on the fullest node of a kind during a pass over the lake.

    Attributes:
        node: `cpu` or `gpu`.
        actors: Embedding actors on it.
        decoders: Decoding tasks on it.
        store_gib: Blocks in its object store.
        needs_gib: All of it, by estimate.
        memory_gib: The node's.
    """

    node: str
    actors: int
    decoders: int
    store_gib: float
    needs_gib: float
    memory_gib: float


class MemoryCheck(Table):
    """What was found.

    Attributes:
        processes: Each kind.
        nodes: Each kind.
        warnings: What may go wrong.
    """

    processes: tuple[MemoryUse, ...]
    nodes: tuple[NodeUse, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """A chunk on its way."""

    encoded_bytes: float
    pixel_bytes: float


def check(
    config: JobConfig,
    prices: Prices,
    lake: LakeSize,
    teacher: NetworkSize,
    work: Sequence[Load],
    stages: Sequence[StagePlan],
) -> tuple[MemoryCheck, list[PuRayError]]:
    """Estimates, warnings, and the reasons why the job could not run on such nodes.

    Args:
        config: The job.
        prices: For the nodes.
        lake: For the size of a chunk.
        teacher: Its parameters and activations.
        work: See `estimate.loads`.
        stages: The same stages with their pools.
    """
    chunk = _block(config, lake)
    actor = _actor(config, teacher, chunk)
    processes = [actor]
    if config.resources.embed.gpus > 0:
        processes.append(_decode_task(config, chunk))
    refusals = list(_misfits(work, prices))
    nodes = [] if refusals else list(_nodes(config, prices, work[0], stages[0], processes, chunk))
    warnings = [
        f"{use.what} needs about {use.needs_gib:.2g} GiB and declares {use.declared_gib:g}: raise {use.setting}"
        for use in processes
        if use.needs_gib > use.declared_gib
    ]
    for node in nodes:
        store_gib = OBJECT_STORE_FRAC * node.memory_gib
        if node.store_gib > store_gib:
            warnings.append(
                f"blocks in flight on a {node.node} node ({node.store_gib:.3g} GiB) do not fit into its object store "
                f"({store_gib:.3g} GiB) and go through its disk: lower lake.chunk_rows"
            )
        if node.needs_gib > node.memory_gib:
            refusals.append(_overflow(node, processes))
    found = MemoryCheck(processes=tuple(processes), nodes=tuple(nodes), warnings=tuple(warnings))
    return found, refusals


def _block(config: JobConfig, lake: LakeSize) -> _Block:
    side, _, channels = config.teacher.preprocessing.shape_hwc
    mean_bytes = lake.size_bytes / max(lake.rows, 1)
    return _Block(lake.chunk_rows * mean_bytes, float(lake.chunk_rows * side * side * channels))


def _actor(config: JobConfig, teacher: NetworkSize, chunk: _Block) -> MemoryUse:
    embed, on_gpu = config.resources.embed, config.resources.embed.gpus > 0
    with_torch = embedding.engine_kind(config) == "torch"
    networks = 2 if config.scorer.features == "finetuned" else 1
    # What waits for a remote storage works on another block meanwhile (lake_pass). A GPU actor works on one at a time,
    # and the one whose turn is next lies in the object store.
    calls = 1 if on_gpu or Storage(config.output).is_local else CALLS
    bytes_of = {
        "process": _PROCESS_BYTES + _ACTOR_BYTES + (_TORCH_BYTES if with_torch else 0) + (_CUDA_BYTES if on_gpu else 0),
        "networks": networks * teacher.parameter_bytes * (1 if with_torch else _ONNX_COPIES),
        # A GPU keeps its activations to itself.
        "activations": 0 if on_gpu else _LAYERS_AT_ONCE * embedding.batch_size(config) * teacher.activation_bytes,
        "blocks": calls * (_PIXEL_COPIES * chunk.pixel_bytes + (0 if on_gpu else chunk.encoded_bytes)),
    }
    return _use("an embedding actor", bytes_of, embed.memory_gib, "resources.embed.memory_gib")


def _decode_task(config: JobConfig, chunk: _Block) -> MemoryUse:
    bytes_of = {
        "process": _PROCESS_BYTES,
        # What it returns is copied into the object store while it still holds it; that copy counts there.
        "blocks": chunk.encoded_bytes + chunk.pixel_bytes,
    }
    decode = config.resources.decode
    return _use("a decoding task", bytes_of, decode.memory_gib, "resources.decode.memory_gib")


def _use(what: str, bytes_of: dict[str, float], declared_gib: float, setting: str) -> MemoryUse:
    parts = {name: round(size / _GIB, 3) for name, size in bytes_of.items()}
    return MemoryUse(
        what=what,
        needs_gib=round(sum(bytes_of.values()) / _GIB, 3),
        declared_gib=declared_gib,
        setting=setting,
        parts_gib=parts,
    )


def _nodes(
    config: JobConfig,
    prices: Prices,
    load: Load,
    stage: StagePlan,
    processes: Sequence[MemoryUse],
    chunk: _Block,
) -> Iterator[NodeUse]:
    """The fullest nodes of the first pass; the later ones place the same processes."""
    cpu, gpu = prices.nodes.cpu, prices.nodes.gpu
    actor = processes[0]
    if load.each.gpus == 0:
        # A CPU actor reads, decodes and writes by itself: nothing but receipts travels.
        actors = min(stage.pool, int(fits(cpu, load.each)))
        yield _node("cpu", cpu, actors, 0, 0.0, actors * actor.needs_gib)
        return
    task = processes[1]
    actors = min(stage.pool, int(fits(gpu, load.each)))
    beside = min(stage.decoders, decoders_beside(gpu, load, actors))
    block_gib = chunk.pixel_bytes / _GIB
    # What waits for the actors, and what the tasks are about to hand over.
    store = (actors * CALLS * TASKS_IN_FLIGHT + beside) * block_gib
    yield _node("gpu", gpu, actors, beside, store, actors * actor.needs_gib + beside * task.needs_gib)
    if stage.cpu_nodes:
        tasks = min(stage.decoders, int(fits(cpu, load.decoder)))
        yield _node("cpu", cpu, 0, tasks, tasks * block_gib, tasks * task.needs_gib)


def _node(name: str, node: NodePrice, actors: int, tasks: int, store_gib: float, processes_gib: float) -> NodeUse:
    # What the object store cannot hold goes to the disk.
    held_gib = min(store_gib, OBJECT_STORE_FRAC * node.memory_gib)
    return NodeUse(
        node=name,
        actors=actors,
        decoders=tasks,
        store_gib=round(store_gib, 3),
        needs_gib=round(processes_gib + held_gib, 3),
        memory_gib=node.memory_gib,
    )


def _misfits(work: Sequence[Load], prices: Prices) -> Iterator[PuRayError]:
    """Processes for which there is no node in the table."""
    told = set()
    for load in work:
        kind = "gpu" if load.each.gpus > 0 else "cpu"
        node = prices.nodes.gpu if load.each.gpus > 0 else prices.nodes.cpu
        sections = [("resources.train" if load.trains else "resources.embed", kind, node, load.each)]
        if load.decoder.cpus > 0 and load.each.gpus > 0:
            sections.append(("resources.decode", "cpu", prices.nodes.cpu, load.decoder))
        for section, name, machine, each in sections:
            if section not in told and fits(machine, each) < 1:
                told.add(section)
                yield ClusterError(
                    f"no {name} node of the price table can hold even one of these processes",
                    slug="process-larger-than-node",
                    where=section,
                    allowed=_room(machine),
                    got=_asked(each),
                    hint=f"lower {section}, or describe larger nodes in the price table (--prices)",
                )


def _room(node: NodePrice) -> str:
    memory_gib = (1 - OBJECT_STORE_FRAC) * node.memory_gib
    return (
        f"{node.cpus} CPUs, {node.gpus} GPUs, {memory_gib:.3g} GiB memory (of {node.memory_gib:g}: Ray keeps "
        f"{OBJECT_STORE_FRAC:.0%} for the object store)"
    )


def _asked(each: Each) -> str:
    memory = f", {each.memory_gib:g} GiB memory" if each.memory_gib else ""
    return f"{each.cpus:g} CPUs, {each.gpus:g} GPUs{memory}"


def _overflow(node: NodeUse, processes: Sequence[MemoryUse]) -> PuRayError:
    counted = [
        f"{count} x {use.needs_gib:.2g} GiB ({use.what})"
        for count, use in zip((node.actors, node.decoders), processes, strict=False)
        if count
    ]
    held_gib = min(node.store_gib, OBJECT_STORE_FRAC * node.memory_gib)
    return ClusterError(
        f"a {node.node} node would run out of memory, by estimate",
        slug="out-of-memory",
        where="resources",
        allowed=f"{node.memory_gib:g} GiB (cluster/prices.yaml or --prices: memory_gib)",
        got=f"{node.needs_gib:.3g} GiB: "
        + " + ".join([*counted, f"{math.ceil(held_gib * 100) / 100:g} GiB of blocks"]),
        hint="declare what the processes need, so that Ray places fewer on a node: "
        + " or ".join(
            use.setting for use, count in zip(processes, (node.actors, node.decoders), strict=False) if count
        ),
    )
