"""serving/torch_network.py: the network by name and weights, and what is not opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pu_ray import models
from pu_ray.config import NetworkConfig
from pu_ray.errors import DataError
from pu_ray.images import Limits
from serving import registry, torch_network
from serving.predictor import Predictor
from serving.settings import ServingSettings
from tests.unit.serving.students import LABELS, picture, write_student

NETWORK = NetworkConfig(architecture="cifar/resnet8-w4")


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(NETWORK, len(LABELS), 3).eval()


def exported(folder: Path, module: torch.nn.Module, **facts: object) -> str:
    files = {"model.safetensors": models.save_weights(module)}
    return write_student(folder, files=files, facts={"architecture": NETWORK.architecture, "options": {}} | facts)


def test_it_answers_as_the_module_does(tmp_path: Path, module: torch.nn.Module) -> None:
    predictor = Predictor(registry.load(exported(tmp_path, module), "torch"), Limits())
    predictor.warm_up()
    pictures = np.stack([picture(seed) for seed in range(5)])
    pixels = predictor.prepare(pictures).pixels_MCHW
    with torch.inference_mode():
        expected = module(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(predictor.predict(pictures).logits_NK, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("facts", [{"architecture": "evil.module:run"}, {"architecture": None}, {"options": None}])
def test_code_that_an_artifact_names_is_not_run_and_nothing_is_guessed(
    tmp_path: Path, module: torch.nn.Module, facts: dict[str, str | None]
) -> None:
    loaded = registry.load(exported(tmp_path, module, **facts), "torch")
    with pytest.raises(DataError, match="builds the network by name") as refusal:
        Predictor(loaded, Limits())
    assert "onnx" in str(refusal.value.hint)


def test_weights_of_another_network_are_refused(tmp_path: Path, module: torch.nn.Module) -> None:
    loaded = registry.load(exported(tmp_path, module, architecture="cifar/resnet8-w8"), "torch")
    with pytest.raises(DataError, match="do not belong to this network"):
        Predictor(loaded, Limits())


def test_a_gpu_wants_torch_unless_told_otherwise() -> None:
    given = {"authentication": "off", "gpus_per_replica": 0.5}
    assert ServingSettings(**given).wanted_engine == "torch"
    assert ServingSettings(**given, engine="onnx").wanted_engine == "onnx"
    assert ServingSettings(authentication="off").wanted_engine == "auto"


def test_bfloat16_agrees_and_another_network_does_not(module: torch.nn.Module) -> None:
    images = torch.randn(16, 3, 8, 8)
    with torch.inference_mode():
        exact = module(images).numpy()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = module(images).float().numpy()
    assert not np.array_equal(exact, fast)
    assert torch_network.agree(exact, fast)
    assert not torch_network.agree(exact, exact[::-1])


def test_float32_where_bfloat16_differs(
    tmp_path: Path, module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice itself, on a GPU that is a CPU."""
    made: list[dict[str, object]] = []
    real = torch_network.TorchEngine

    def engine(network: torch.nn.Module, device: str, **options: object) -> object:
        made.append({"device": device, **options})
        return real(network, "cpu")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_network, "TorchEngine", engine)
    loaded = registry.load(exported(tmp_path, module), "torch")
    torch_network.opened(loaded, 1)
    assert made == [{"device": "cpu"}, {"device": "cuda", "compiled": True}]
    monkeypatch.setattr(torch_network, "agree", lambda *_logits: False)
    torch_network.opened(loaded, 1)
    assert made[-1] == {"device": "cuda", "half": False}
