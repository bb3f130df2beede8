"""One forward pass behind one interface: torch, or ONNX Runtime without importing torch.

An engine takes arrays and gives arrays. On CPUs ONNX Runtime more than halves the forward pass, and an actor
that uses it starts without the seconds that importing torch costs; on GPUs torch runs in bfloat16.

Axes: N images, H, W, C; D feature width; K classes.
"""

from __future__ import annotations

import os
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
    """A torch module on a GPU (bfloat16, channels_last) or, as the reference, on a CPU (float32).

    Args:
        module: Returns a tensor or a tuple of tensors.
        device: `cuda` or `cpu`.
    """

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._module = module.eval().to(self._device)
        if self._device.type == "cuda":
            self._module = self._module.to(memory_format=torch.channels_last)

    def run(self, batch: Array) -> list[Array]:
        """See `Engine.run`."""
        torch = self._torch
        # from_numpy refuses nothing but warns about read-only memory; Ray's batches are read-only views.
        tensor = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        if self._device.type == "cuda":
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"),
        ):
            outputs = self._module(tensor)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        return [output.float().cpu().numpy() for output in outputs]


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


def in_batches(engine: Engine, rows: Array, batch_size: int) -> list[Array]:
    """Run many rows through an engine.

    Args:
        engine: The network.
        rows: Any number of inputs, at least one, first axis N.
        batch_size: Rows of one forward pass.

    Returns:
        The engine's outputs, each with first axis N.
    """
    parts = [engine.run(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return [np.concatenate(output) for output in zip(*parts, strict=True)]
