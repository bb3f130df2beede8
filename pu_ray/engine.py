"""One forward pass behind one interface: torch, or ONNX Runtime without importing torch.

An engine takes arrays and gives arrays. On CPUs ONNX Runtime more than halves the forward pass, and an actor
that uses it starts without the seconds that importing torch costs; on GPUs torch runs in bfloat16.

Engines compose: `Scorer` puts a head behind a network, `Cascade` a gate between its early and its late stages.

Axes: N images, H, W, C; D feature width; K classes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]


class Engine(Protocol):
    """A network, ready to run."""

    def run(self, batch: Array) -> list[Array]:
        """One forward pass; the first axis of the batch and of every output is N."""
        ...


class OnnxEngine:
    """An ONNX graph on the CPU.

    Args:
        model: Path of a .onnx file, or its bytes.
        threads: Intra-operator threads; spinning is off, so that processes sharing cores do not starve each other.
    """

    def __init__(self, model: bytes | str | Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        source = model if isinstance(model, bytes) else os.fspath(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: Array) -> list[Array]:
        """See `Engine.run`."""
        return list(self._session.run(None, {self._input: batch}))


class TorchEngine:
    """A torch module on a GPU (bfloat16 unless told otherwise, channels_last) or on a CPU (float32).

    Args:
        module: Returns a tensor or a tuple of tensors.
        device: `cuda` or `cpu`.
        compiled: Whether to run the module through torch.compile, for a batch axis of any length.
        half: Whether a GPU computes in bfloat16.
    """

    def __init__(self, module: torch.nn.Module, device: str, compiled: bool = False, half: bool = True) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._half = half and self._device.type == "cuda"
        self._module = module.eval().to(self._device)
        if self._device.type == "cuda":
            self._module = self._module.to(memory_format=torch.channels_last)
        # A network keeps its stages' outputs between forward and pooling, so two threads must not run it at once.
        self._lock = threading.Lock()
        self._call: Any = torch.compile(self._module, dynamic=True) if compiled else self._module

    def run(self, batch: Array) -> list[Array]:
        """See `Engine.run`."""
        return self.collect(self.submit(batch))

    def submit(self, batch: Array) -> list[torch.Tensor]:
        """Start a forward pass; on a GPU it goes on while the next batch is pinned and copied."""
        torch = self._torch
        # from_numpy refuses nothing but warns about read-only memory; Ray's batches are read-only views.
        tensor = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        if self._device.type == "cuda":
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        with (
            self._lock,
            torch.inference_mode(),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half),
        ):
            outputs = self._call(tensor)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    def collect(self, outputs: Sequence[torch.Tensor]) -> list[Array]:
        """Wait for a forward pass and fetch its outputs as float32."""
        return [output.float().cpu().numpy() for output in outputs]


class Scorer:
    """A head behind a network, from pixels to what the selection looks at.

    Args:
        network: Gives features [N, D] and logits [N, K], and a cascade's margins [N].
        head: Features to scores [N].
        neighbours: Features to the cosine with the nearest labeled image [N].
    """

    def __init__(self, network: Engine, head: Engine, neighbours: Engine) -> None:
        self._network = network
        self._head = head
        self._neighbours = neighbours

    def run(self, batch: Array) -> list[Array]:
        """Scores [N], logits [N, K], cosines [N]; an image that the gate rejected scores minus infinity."""
        features, logits, *margin = self._network.run(batch)
        passed = margin[0] >= 0 if margin else np.ones(len(batch), bool)
        scores = np.full(len(batch), -np.inf, np.float32)
        cosines = np.zeros(len(batch), np.float32)
        if passed.any():
            scores[passed] = self._head.run(features[passed])[0]
            cosines[passed] = self._neighbours.run(features[passed])[0]
        return [scores, logits, cosines]


class FinetunedScorer:
    """A scorer with a trunk of its own, beside the teacher.

    Args:
        network: Gives scores [N], the teacher's logits [N, K] and features [N, D].
        neighbours: Those features to the cosine with the nearest labeled image [N].
    """

    def __init__(self, network: Engine, neighbours: Engine) -> None:
        self._network = network
        self._neighbours = neighbours

    def run(self, batch: Array) -> list[Array]:
        """Scores [N], logits [N, K], cosines [N]."""
        scores, logits, features = self._network.run(batch)
        return [scores, logits, self._neighbours.run(features)[0]]


class Cascade:
    """Early stages for every image, the rest of the network for those that a gate lets pass.

    Args:
        early: Pixels to the early stages' features [N, D'], the gate's inputs [N, G], and the last activation.
        gate: Its inputs to a logit [N].
        late: That activation, or where the graph cannot be cut the pixels, to the late features [N, D''] and logits.
        threshold: Least logit that passes.
        from_pixels: Whether `late` takes the pixels.
    """

    def __init__(self, early: Engine, gate: Engine, late: Engine, threshold: float, from_pixels: bool) -> None:
        self._early = early
        self._gate = gate
        self._late = late
        self._threshold = threshold
        self._from_pixels = from_pixels
        self._widths: list[int] | None = None

    def run_whole(self, batch: Array) -> list[Array]:
        """Features and logits of every image, whatever the gate says of it."""
        early, _, *activation = self._early.run(batch)
        late, logits = self._late.run(batch if self._from_pixels else activation[0])
        return [np.concatenate([early, late], axis=1), logits]

    def run(self, batch: Array) -> list[Array]:
        """Features [N, D] and logits [N, K], zero where the gate rejects; margins [N], negative there."""
        early, coarse, *activation = self._early.run(batch)
        margin = (self._gate.run(coarse)[0] - self._threshold).astype(np.float32)
        passed = margin >= 0
        source = batch if self._from_pixels else activation[0]
        if self._widths is None and not passed.any():
            # The widths of outputs that nobody has seen yet.
            self._widths = [part.shape[1] for part in self._late.run(source[:1])]
        late = self._late.run(source[passed]) if passed.any() else None
        if late is not None:
            self._widths = [part.shape[1] for part in late]
        assert self._widths is not None
        outputs = [np.zeros((len(batch), width), np.float32) for width in self._widths]
        for output, part in zip(outputs, late or [], strict=False):
            output[passed] = part
        return [np.concatenate([early, outputs[0]], axis=1), outputs[1], margin]


def to_onnx(
    module: torch.nn.Module,
    example: torch.Tensor,
    *,
    input_name: str,
    output_names: Sequence[str],
    opset: int = 20,
) -> bytes:
    """Translate a module to an ONNX graph with a dynamic batch axis.

    Args:
        module: In eval mode; returns a tensor or a tuple of tensors.
        example: An input with at least two images, so that a batch of one is not baked in.
        input_name: Name of the graph's input.
        output_names: Names of its outputs, in order.
        opset: ONNX operator set.
    """
    import contextlib
    import io
    import logging

    import torch

    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        # The exporter narrates on stdout, which belongs to results.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]  # it takes open files too
    return buffer.getvalue()


def cut_onnx(graph: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes | None:
    """The part of a graph between some of its tensors; None where those inputs do not determine the outputs.

    Args:
        graph: A serialised model.
        inputs: Names of graph inputs or outputs that become the inputs.
        outputs: Names of graph outputs.
    """
    import onnx
    from onnx.utils import Extractor

    part = Extractor(onnx.load_from_string(graph)).extract_model(list(inputs), list(outputs))
    known = {tensor.name for tensor in [*part.graph.input, *part.graph.initializer]}
    known |= {name for node in part.graph.node for name in node.output}
    if any(name and name not in known for node in part.graph.node for name in node.input):
        return None
    content: bytes = part.SerializeToString()
    return content


def in_batches(engine: Engine, rows: Array, batch_size: int) -> list[Array]:
    """Run many rows through an engine.

    Args:
        engine: The network.
        rows: Any number of inputs, at least one, first axis N.
        batch_size: Rows of one forward pass.

    Returns:
        The engine's outputs, each with first axis N.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if isinstance(engine, TorchEngine):
        parts = [engine.collect(outputs) for outputs in [engine.submit(batch) for batch in batches]]
    else:
        parts = [engine.run(batch) for batch in batches]
    return [np.concatenate(output) for output in zip(*parts, strict=True)]
