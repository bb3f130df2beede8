"""What others do for the same work: `python -m tests.benchmarks.baselines NAME JOB.yaml --lake DIR --out DIR`.

Each reads the Parquet lake, decodes every image, resizes and normalises as the teacher's preprocessing says, runs
teacher and PU head in eager torch (float32), and writes one row per image to Parquet: path, score, predicted class,
confidence. Teacher, preprocessing and head are those of the job file and its finished `fit`. Each is written as its own
documentation recommends for inference in batches, with the same decoder and the same batch size: 128 for small images,
32 for photographs, where 128 costs eager torch twice as much.

Threads, chosen as the better for each on 2 cores: `loop` 2, `dataloader` 1 beside its 2 workers, all others 2 processes
with 1 each. Not even a faster decoder is taken where it gives other pixels: the answers must be the same.

The limits are no contestants: they run the networks alone, on pixels decoded before the clock starts, and write how
long that took to seconds.json beside the rows. `reference` answers for a sample of the images, with features tapped and
head computed anew in float64: what all others are compared with.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import transforms

from pu_ray import config, models
from pu_ray.config import JobConfig, PreprocessingConfig

PROCESSES = 2
REFERENCE_IMAGES = 300
SECONDS_FILE = "seconds.json"

Rows = dict[str, Any]


# -- what all of them share --------------------------------------------------------------------------------


def batch_size_of(job: JobConfig) -> int:
    """Images of one forward pass, the better of two."""
    return 128 if job.teacher.preprocessing.size_px <= 64 else 32


class Decoder:
    """Encoded bytes to the network's pixels, uint8 [C, H, W], as torchvision's documentation does it."""

    def __init__(self, preprocessing: PreprocessingConfig) -> None:
        self._mode = "RGB" if preprocessing.channels == 3 else "L"
        self._transform = transforms.Compose(
            [
                transforms.Resize(preprocessing.resize_px or preprocessing.size_px),
                transforms.CenterCrop(preprocessing.size_px),
                transforms.PILToTensor(),
            ]
        )

    def __call__(self, encoded: bytes) -> torch.Tensor:
        return cast(torch.Tensor, self._transform(Image.open(io.BytesIO(encoded)).convert(self._mode)))

    def batch(self, encoded: Any) -> torch.Tensor:
        """Uint8 [N, C, H, W]."""
        return torch.stack([self(content) for content in encoded])


class Networks:
    """Teacher and PU head in eager torch, float32."""

    def __init__(self, job: JobConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        preprocessing = job.teacher.preprocessing
        self._mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
        self._teacher, _ = models.load_teacher(job.teacher)
        self._head = _load_head(job)

    @torch.inference_mode()
    def __call__(self, pixels_NCHW: torch.Tensor) -> Rows:
        """Score, predicted class and confidence of uint8 images."""
        return self.answer(self.forward(pixels_NCHW))

    def forward(self, pixels_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [N] and logits [N, K]."""
        return self.from_normalised((pixels_NCHW.float() / 255 - self._mean) / self._std)

    def from_normalised(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [N] and logits [N, K] of what the network itself takes."""
        features, logits = self._teacher(x_NCHW)
        return self._head(features), logits

    @staticmethod
    def answer(outputs: tuple[torch.Tensor, torch.Tensor]) -> Rows:
        """The columns to write."""
        scores, logits = outputs
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        return {"score": scores.numpy(), "predicted": predicted.numpy(), "confidence": confidence.numpy()}


def _load_head(job: JobConfig) -> torch.nn.Module:
    from safetensors.torch import load_file

    from pu_ray.pu import scorers

    state = load_file(f"{job.output}/scorer/scorer.safetensors")
    head = scorers.Head(len(state["mean"]), job.scorer.attention, job.scorer.hidden)
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)


def _batches(lake: Path, batch_size: int) -> Iterator[tuple[list[str], list[bytes]]]:
    for file in sorted(lake.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(batch_size, columns=["path", "bytes"]):
            yield batch["path"].to_pylist(), batch["bytes"].to_pylist()


def _write(out: Path, rows: Iterator[Rows]) -> None:
    writer = None
    for batch in rows:
        table = pa.table(batch)
        writer = writer or pq.ParquetWriter(out / "rows.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


# -- plain torch -------------------------------------------------------------------------------------------


def loop(job: JobConfig, lake: Path, out: Path) -> None:
    """One process, one batch after another."""
    networks, decode = Networks(job, threads=2), Decoder(job.teacher.preprocessing)
    _write(
        out,
        ({"path": paths} | networks(decode.batch(encoded)) for paths, encoded in _batches(lake, batch_size_of(job))),
    )


class _LakeDataset(torch.utils.data.IterableDataset[tuple[list[str], torch.Tensor]]):
    """Decoded batches; the workers share the row groups among themselves."""

    def __init__(self, lake: Path, decode: Decoder, batch_size: int) -> None:
        self._lake = lake
        self._decode = decode
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None, "a loader without worker processes"
        place = 0
        for path in sorted(self._lake.glob("*.parquet")):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                place += 1
                if place % worker.num_workers != worker.id:
                    continue
                table = file.read_row_group(group, columns=["path", "bytes"])
                for batch in table.to_batches(self._batch_size):
                    yield batch["path"].to_pylist(), self._decode.batch(batch["bytes"].to_pylist())


def dataloader(job: JobConfig, lake: Path, out: Path) -> None:
    """Workers decode whole batches (automatic batching off, as advised for bulk reads), this process runs the nets."""
    networks = Networks(job, threads=1)
    dataset = _LakeDataset(lake, Decoder(job.teacher.preprocessing), batch_size_of(job))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=PROCESSES)
    _write(out, ({"path": paths} | networks(pixels) for paths, pixels in loader))


# -- Hugging Face datasets ---------------------------------------------------------------------------------


class _HuggingFacePredictor:
    """A mapped function; the networks are loaded by each process when it first needs them."""

    def __init__(self, job: JobConfig) -> None:
        self._job = job
        self._loaded: tuple[Networks, Decoder] | None = None

    def __call__(self, batch: Rows) -> Rows:
        if self._loaded is None:
            self._loaded = Networks(self._job, threads=1), Decoder(self._job.teacher.preprocessing)
        networks, decode = self._loaded
        return networks(decode.batch(batch["bytes"]))


def hugging_face(job: JobConfig, lake: Path, out: Path) -> None:
    """load_dataset, map over batches with two processes, to_parquet; its caches lie in the output's folder."""
    import datasets

    files = [str(file) for file in sorted(lake.glob("*.parquet"))]
    images = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    scored = images.map(
        _HuggingFacePredictor(job),
        batched=True,
        batch_size=batch_size_of(job),
        num_proc=PROCESSES,
        remove_columns=["bytes"],
        desc="score",
    )
    scored.to_parquet(out / "rows.parquet")


# -- Daft --------------------------------------------------------------------------------------------------


def daft(job: JobConfig, lake: Path, out: Path) -> None:
    """A class with two processes that decodes and predicts batches.

    Not Daft's own decoder: its JPEG pixels differ by up to 4 of 255, and a class that follows it in the plan was run by
    threads of one process (0.7.26), whatever `use_process` said.
    """
    import daft as df

    answer = df.DataType.struct(
        {"score": df.DataType.float32(), "predicted": df.DataType.int64(), "confidence": df.DataType.float32()}
    )

    @df.cls(max_concurrency=PROCESSES, use_process=True)
    class Predictor:
        def __init__(self, job: JobConfig) -> None:
            self._networks, self._decode = Networks(job, threads=1), Decoder(job.teacher.preprocessing)

        @df.method.batch(return_dtype=answer, unnest=True, batch_size=batch_size_of(job))
        def predict(self, encoded: Any) -> pa.Array:
            rows = self._networks(self._decode.batch(encoded.to_pylist()))
            return pa.StructArray.from_arrays([pa.array(values) for values in rows.values()], names=list(rows))

    predictor = Predictor(job)
    images = df.read_parquet(f"{lake}/*.parquet")
    images.select(df.col("path"), predictor.predict(df.col("bytes"))).write_parquet(str(out))


# -- Ray Data ----------------------------------------------------------------------------------------------


class _RayPredictor:
    def __init__(self, job: JobConfig) -> None:
        self._networks = Networks(job, threads=1)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = self._networks.answer(self._networks.from_normalised(torch.from_numpy(batch["image"])))
        return {"path": batch["path"], **answer}


def naive_ray_data(job: JobConfig, lake: Path, out: Path) -> None:
    """read_parquet, map_batches to decode and normalise, map_batches with two actors, write_parquet.

    As in Ray's guide to batch inference: the preprocessing ends in the float tensors that the network takes. Two
    settings are not a newcomer's. Four logical CPUs: with this machine's two, the actors take both and the readers
    starve. And no dashboard, because ours has none either.
    """
    import ray

    decode = Decoder(job.teacher.preprocessing)
    normalise = transforms.Compose(
        [
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(job.teacher.preprocessing.mean, job.teacher.preprocessing.std),
        ]
    )

    def preprocess(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [normalise(decode(content)).numpy() for content in batch["bytes"]]
        return {"path": batch["path"], "image": np.stack(images)}

    ray.init(num_cpus=2 * PROCESSES, include_dashboard=False)
    images = ray.data.read_parquet(str(lake)).map_batches(preprocess)
    scored = images.map_batches(
        _RayPredictor,
        fn_constructor_args=[job],
        batch_size=batch_size_of(job),
        compute=ray.data.ActorPoolStrategy(size=PROCESSES),
    )
    scored.write_parquet(str(out))


# -- limits and reference ----------------------------------------------------------------------------------


def _run_limit(
    open_networks: Callable[[JobConfig, Any], Callable[[torch.Tensor], Any]],
    job: JobConfig,
    extra: Any,
    encoded: list[bytes],
    barrier: Any,
    results: Any,
) -> None:
    networks = open_networks(job, extra)
    pixels = Decoder(job.teacher.preprocessing).batch(encoded)
    networks(pixels[: batch_size_of(job)])  # warm up
    barrier.wait()
    started = time.monotonic()
    outputs = [networks(batch) for batch in torch.split(pixels, batch_size_of(job))]
    ended = time.monotonic()
    scores, logits = (torch.cat([torch.as_tensor(output[which]) for output in outputs]) for which in (0, 1))
    results.put((started, ended, scores.numpy(), logits.numpy()))


def _limit(open_networks: Any, job: JobConfig, extra: Any, lake: Path, out: Path) -> None:
    paths, encoded = (
        [value for batch in _batches(lake, batch_size_of(job)) for value in batch[which]] for which in (0, 1)
    )
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    shares = np.array_split(np.arange(len(paths)), PROCESSES)
    queues = [context.Queue() for _ in shares]
    for share, queue in zip(shares, queues, strict=True):
        mine = encoded[share[0] : share[-1] + 1]
        context.Process(target=_run_limit, args=(open_networks, job, extra, mine, barrier, queue)).start()
    results = [queue.get() for queue in queues]
    seconds = max(ended for _, ended, _, _ in results) - min(started for started, _, _, _ in results)
    (out / SECONDS_FILE).write_text(json.dumps(seconds))
    scores, logits = (torch.from_numpy(np.concatenate([result[which] for result in results])) for which in (2, 3))
    _write(out, iter([{"path": paths} | Networks.answer((scores, logits))]))


def _open_torch(job: JobConfig, _: None) -> Callable[[torch.Tensor], Any]:
    return torch.inference_mode()(Networks(job, threads=1).forward)


def _open_onnx(job: JobConfig, graph: bytes) -> Callable[[torch.Tensor], Any]:
    from pu_ray import engine

    torch.set_num_threads(1)
    head, neighbours = (engine.OnnxEngine(f"{job.output}/scorer/{name}.onnx") for name in ("scorer", "neighbours"))
    scorer = engine.Scorer(engine.OnnxEngine(graph), head, neighbours)
    # Our graph takes pixels as they are decoded, with the channels last.
    return lambda pixels_NCHW: scorer.run(pixels_NCHW.permute(0, 2, 3, 1).contiguous().numpy())


def limit_torch(job: JobConfig, lake: Path, out: Path) -> None:
    """The networks alone, eager torch: two processes with one thread each."""
    _limit(_open_torch, job, None, lake, out)


def limit_onnx(job: JobConfig, lake: Path, out: Path) -> None:
    """The networks alone, as the ONNX graphs that we run: two processes with one thread each."""
    from pu_ray import engine

    teacher, _ = models.load_teacher(job.teacher)
    module = models.Normalised(teacher, job.teacher.preprocessing).eval()
    example = models.example_pixels(job.teacher.preprocessing)
    graph = engine.to_onnx(module, example, input_name="pixels", output_names=["features", "logits"])
    _limit(_open_onnx, job, graph, lake, out)


def reference(job: JobConfig, lake: Path, out: Path) -> None:
    """The answers for a sample of the images, computed apart from all others, in float64."""
    from safetensors.torch import load_file
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    network = models.build(
        job.teacher, len(models.read_classes(job.teacher.classes)), job.teacher.preprocessing.channels
    )
    models.load_weights(network, job.teacher.weights)
    stages = job.teacher.stages or models.find_stages(network)
    logits = get_graph_node_names(network.eval())[1][-1]
    taps = create_feature_extractor(network, {**{name: name for name in stages}, logits: "logits"})
    taps = taps.double().eval()
    head = {name: value.double() for name, value in load_file(f"{job.output}/scorer/scorer.safetensors").items()}
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
        for values in (job.teacher.preprocessing.mean, job.teacher.preprocessing.std)
    )
    decode = Decoder(job.teacher.preprocessing)
    rows = [row for paths, encoded in _batches(lake, batch_size_of(job)) for row in zip(paths, encoded, strict=True)]
    rows = rows[:: max(1, len(rows) // REFERENCE_IMAGES)]

    def answers() -> Iterator[Rows]:
        for start in range(0, len(rows), batch_size_of(job)):
            part = rows[start : start + batch_size_of(job)]
            with torch.inference_mode():
                outputs = taps((decode.batch([content for _, content in part]).double() / 255 - mean) / std)
                features = torch.cat([outputs[name].mean(dim=(2, 3)) for name in stages], dim=1)
                answer = Networks.answer((_head(head, features), outputs["logits"]))
            yield {"path": [path for path, _ in part]} | answer

    _write(out, answers())


def _head(state: dict[str, torch.Tensor], features_ND: torch.Tensor) -> torch.Tensor:
    """The PU head by hand: standardise, gate, hidden layer, logit."""
    x = (features_ND - state["mean"]) / state["std"]
    squeezed = torch.relu(x @ state["attention.squeeze.weight"].T + state["attention.squeeze.bias"])
    x = x * torch.sigmoid(squeezed @ state["attention.excite.weight"].T + state["attention.excite.bias"])
    x = torch.relu(x @ state["body.0.weight"].T + state["body.0.bias"])
    return (x @ state["last.weight"].T + state["last.bias"]).squeeze(1)


BASELINES: dict[str, Callable[[JobConfig, Path, Path], None]] = {
    "loop": loop,
    "dataloader": dataloader,
    "hugging-face": hugging_face,
    "daft": daft,
    "ray-data": naive_ray_data,
    "limit-torch": limit_torch,
    "limit-onnx": limit_onnx,
    "reference": reference,
}


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("job", type=Path)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    BASELINES[arguments.name](config.load(arguments.job).job, arguments.lake, arguments.out)


if __name__ == "__main__":
    main()
