"""The limit: plain processes that decode and run the network in turns, without any server.

One process for each request under way, two at most, with batches as large as its share of them: what a server could do
that cost nothing. Prints one line of JSON, in which a latency is that of a batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROCESSES = 2
ENGINES = {"torch": None, "onnx": "model.onnx", "onnx-int8": "model.int8.onnx"}


def opened(engine: str, folder: Path) -> Callable[[Sequence[bytes]], list[int]]:
    """From encoded pictures to the numbers of their classes, on one thread."""
    if engine == "torch":
        from tests.benchmarks.peers import network

        classifier = network.Classifier(folder)
        return lambda batch: [
            answer["label"] for answer in classifier.answers([network.pixels_of(each) for each in batch])
        ]
    from pu_ray.config import PreprocessingConfig
    from pu_ray.engine import OnnxEngine
    from pu_ray.images import decode, normalise

    exported = folder / "exported"
    preprocessing = PreprocessingConfig.model_validate_json((exported / "preprocess.json").read_bytes())
    network_file = ENGINES[engine]
    assert network_file is not None
    session = OnnxEngine(exported / network_file, 1)

    def run(batch: Sequence[bytes]) -> list[int]:
        pixels = normalise(np.stack([decode(each, preprocessing) for each in batch]), preprocessing)
        return [int(label) for label in session.run(pixels)[0].argmax(axis=1)]

    return run


def _memory_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no Pss")


def _work(engine: str, folder: Path, picture: Path, batch: int, seconds: float, start: Any, results: Any) -> None:
    classify, encoded = opened(engine, folder), [picture.read_bytes()] * batch
    for _ in range(3):
        labels = classify(encoded)
    start.wait()
    began, cpu, latencies = time.perf_counter(), time.process_time(), []
    while time.perf_counter() < began + seconds:
        before = time.perf_counter()
        classify(encoded)
        latencies.append(time.perf_counter() - before)
    said = {
        "images": batch * len(latencies),
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "latencies_s": latencies,
        "label": labels[0],
        "memory_bytes": _memory_bytes(),
    }
    results.put(said)


def measure(engine: str, folder: Path, picture: Path, concurrency: int, seconds: float) -> dict[str, Any]:
    """Run the processes side by side; images per second and CPU seconds are of all together."""
    context = multiprocessing.get_context("spawn")
    processes = min(PROCESSES, concurrency)
    start, results = context.Barrier(processes), context.Queue()
    arguments = (engine, folder, picture, concurrency // processes, seconds, start, results)
    workers = [context.Process(target=_work, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    said = [results.get(timeout=120 + seconds) for _ in workers]
    for worker in workers:
        worker.join()
    latencies = [latency for each in said for latency in each["latencies_s"]]
    images = sum(each["images"] for each in said)
    return {
        "per_s": sum(each["images"] / each["seconds"] for each in said),
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
        "cpu_ms": 1000 * sum(each["cpu_s"] for each in said) / images,
        "labels": sorted({each["label"] for each in said}),
        "memory_bytes": sum(each["memory_bytes"] for each in said),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("concurrency", type=int)
    parser.add_argument("seconds", type=float)
    print(json.dumps(measure(**vars(parser.parse_args()))))
