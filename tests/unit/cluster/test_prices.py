from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import prices
from pu_ray.errors import ConfigError


def test_the_table_that_comes_with_it_can_be_read_and_calls_its_guesses_so() -> None:
    assert prices.load().nodes.gpu.gpus >= 1
    text = prices.PRICES_FILE.read_text(encoding="utf-8")
    for guess in ("price_frac", "interruptions_per_node_hour", "start_s", "cpu_core_gflop_per_s"):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{guess}:"))
        assert "assumption" in line or "PLACEHOLDER" in line, guess


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("gpus: 1", "gpus: 0", "at least one GPU"),
        ("memory_gib: 64", "memory_gib: 0", "nodes.cpu.memory_gib"),
        ("price_frac: 0.4", "price_frac: 1.2", "spot.price_frac"),
        ("interruptions_per_node_hour: 0.02", "interruptions_per_node_hour: -1", "spot.interruptions_per_node_hour"),
        ("interruptions_per_node_hour: 0.02", "interruptions_per_node_hour: .nan", "spot.interruptions_per_node_hour"),
        ("image_us: 110", "image_ms: 1", "rates.image_"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = prices.PRICES_FILE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "prices.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        prices.load(path)


def test_a_table_that_lacks_something_or_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR", encoding="utf-8")
    with pytest.raises(ConfigError, match="nodes"):
        prices.load(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="the price table is wrong"):
        prices.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        prices.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        prices.load(tmp_path / "missing.yaml")


def test_a_table_of_one_s_own_is_taken(tmp_path: Path) -> None:
    content = yaml.safe_load(prices.PRICES_FILE.read_text(encoding="utf-8"))
    content["currency"] = "EUR"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert prices.load(path).currency == "EUR"


def test_an_hour_costs_its_share_of_a_whole_node(tmp_path: Path) -> None:
    text = prices.PRICES_FILE.read_text(encoding="utf-8")
    nodes = yaml.safe_load(text)["nodes"]
    nodes["cpu"] |= {"cpus": 10, "price_per_hour": 2.0}
    nodes["gpu"] |= {"cpus": 24, "gpus": 4, "price_per_hour": 12.0}
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | {"nodes": nodes, "currency": "EUR"}), encoding="utf-8")
    hour = prices.load(path).per_hour()
    assert hour.model_dump() == {"currency": "EUR", "cpu_hour": 0.2, "gpu_hour": 3.0, "cores_with_gpu": 6.0}
