"""What only a GPU can show: the same answers in bfloat16, training on the device. Skipped where there is none; no Ray.

`make test-gpu` on a machine that has one; docs/benchmarks/gpu.md says when that was last done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pu_ray import engine, models
from pu_ray.config import AugmentConfig, DistillConfig, NetworkConfig, PreprocessingConfig
from pu_ray.distill import answers, crops, data, loop
from pu_ray.distill.store import InMemory
from pu_ray.images import Limits
from serving import registry, torch_network
from serving.predictor import Predictor
from tests.unit.serving.students import LABELS, picture, write_student

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PREPROCESSING = PreprocessingConfig(size_px=28, channels=1, mean=(0.286,), std=(0.353,))
CLASSES = 4
CUDA = torch.device("cuda")


def network(name: str, seed: int = 0, channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build(NetworkConfig(architecture=name), CLASSES, channels).eval()


def stripes(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Pixels uint8 [N, 28, 28, 1] of four plain patterns under noise, and which."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=count)
    across = np.indices((28, 28))
    patterns = np.stack(
        [(across[0] // 4) % 2, (across[1] // 4) % 2, ((across[0] + across[1]) // 5) % 2, np.zeros((28, 28), int)]
    )
    pixels = 60 + 120 * patterns[labels] + generator.normal(0, 30, (count, 28, 28))
    return np.clip(pixels, 0, 255).astype(np.uint8)[..., None], labels


@pytest.mark.parametrize("compiled", [False, True])
def test_the_lake_pass_sees_the_same_in_bfloat16(compiled: bool) -> None:
    teacher = models.Normalised(models.Teacher(network("cifar/resnet18-w16")), PREPROCESSING)
    pixels, _ = stripes(64)
    exact = engine.TorchEngine(teacher, "cpu").run(pixels)
    fast = engine.TorchEngine(teacher, "cuda", compiled=compiled)
    for size in (64, 7):  # the last batch of a block is shorter
        for ours, theirs in zip(fast.run(pixels[:size]), exact, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs[:size], atol=0.03 * float(np.ptp(theirs)))


def test_float32_on_the_gpu_is_the_cpus_but_for_tf32() -> None:
    module, images = network("resnet18", channels=3), np.random.default_rng(0).standard_normal((8, 3, 64, 64))
    exact = engine.TorchEngine(module, "cpu").run(images.astype(np.float32))[0]
    ours = engine.TorchEngine(module, "cuda", half=False).run(images.astype(np.float32))[0]
    np.testing.assert_allclose(ours, exact, atol=5e-3 * float(np.ptp(exact)))


def test_a_student_is_served_in_bfloat16_and_answers_as_on_a_cpu(tmp_path: Path) -> None:
    module = models.build(NetworkConfig(architecture="cifar/resnet8-w4"), len(LABELS), 3).eval()
    files = {"model.safetensors": models.save_weights(module)}
    facts = {"architecture": "cifar/resnet8-w4", "options": {}}
    predictor = Predictor(registry.load(write_student(tmp_path, files=files, facts=facts), "torch"), Limits())
    predictor.warm_up()
    pictures = np.stack([picture(seed) for seed in range(5)])
    with torch.inference_mode():
        expected = module.cpu()(torch.from_numpy(predictor.prepare(pictures).pixels_MCHW)).numpy()
    answered = predictor.predict(pictures).logits_NK
    assert torch_network.agree(expected, answered)
    assert torch.cuda.memory_allocated() > 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("robust", ["exact", "paper"])
def test_a_student_learns_on_the_gpu_and_goes_on_from_a_checkpoint(cached: bool, robust: str) -> None:
    pixels, labels = stripes(512)
    augment = AugmentConfig(crop_padding_px=2)
    teacher = _teacher_of(pixels, labels)
    stored = _asked(teacher, pixels, augment) if cached else None
    empty = data.Source(InMemory(pixels[:0]), _asked(teacher, pixels[:0], augment) if cached else None)
    settings = DistillConfig.model_validate(
        {"epochs": 10**6, "max_steps": 120, "batch_size": 64, "validations": 4, "checkpoint_steps": 30}
        | {"losses": {"robust": robust}, "optimizer": {"kind": "sgd", "lr": 0.05}}
    )
    kept: list[tuple[int, bytes]] = []

    def train(checkpoint: bytes | None) -> loop.State:
        return loop.train(
            network("cifar/resnet8-w8", seed=3),
            None if cached else teacher,
            data.Batches(data.Source(InMemory(pixels), stored), empty, 64, "auto", augment, 0),
            stripes(200, seed=5),
            settings,
            preprocessing=PREPROCESSING,
            classes=CLASSES,
            seed=0,
            device=CUDA,
            precision="auto",
            checkpoint=checkpoint,
            report=lambda state, content: kept.append((state.step, content())),
            count_images=lambda _images: None,
        )

    whole = train(None)
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    assert whole.best_accuracy > 0.9
    step, content = kept[len(kept) // 2]
    resumed = train(content)
    assert 0 < step < resumed.step == whole.step
    assert abs(resumed.best_accuracy - whole.best_accuracy) < 0.1


def _teacher_of(pixels: Any, labels: Any) -> torch.nn.Module:
    module = network("cifar/resnet14-w8", seed=1).to(CUDA).train()
    normalise = models.Normalised(torch.nn.Identity(), PREPROCESSING).to(CUDA)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for start in range(0, 4 * len(pixels), 64):
        rows = np.arange(start, start + 64) % len(pixels)
        logits = module(normalise(torch.from_numpy(pixels[rows]).to(CUDA)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(CUDA))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return models.Normalised(models.Teacher(module), PREPROCESSING).eval().to(CUDA)


def _asked(teacher: torch.nn.Module, pixels: Any, augment: AugmentConfig) -> answers.SoftLabels:
    drawn = crops.draw(len(pixels) * 2, (28, 28), augment, np.random.default_rng(1))
    seen = crops.cut(np.repeat(pixels, 2, axis=0), drawn)
    with torch.inference_mode():
        logits = teacher(torch.from_numpy(seen).to(CUDA))[1].float().cpu().numpy()
    parts = [part.reshape(len(pixels), 2, *part.shape[1:]) for part in (drawn, *answers.compress(logits))]
    return answers.SoftLabels(iter([parts]), CLASSES)
