"""tests/benchmarks/{load,serving_*}.py: what wrk says is read right, and tables say what was measured."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks import load, serving_material, serving_tables
from tests.benchmarks.peers import network

WRK = """Running 2s test @ http://127.0.0.1:8000/predict
  1 threads and 8 connections
  Non-2xx or 3xx responses: 3

{"requests": 200, "duration_us": 2000000, "not_ok": 3, "connect": 0, "read": 1, "write": 0, "timeout": 0, """ + (
    '"mean_us": 80000.0, "p50_us": 75000.0, "p90_us": 90000.0, "p99_us": 120500.0, "max_us": 130000.0}\n'
)


def row(contestant, position, per_s, cpu_ms=10.0, engine="torch", memory_mib=1000.0, **changes):
    """One row of the results, alike under any load."""
    measured = {"per_s": per_s, "p50_ms": 1000 / per_s, "p99_ms": 2000 / per_s, "failed": 0, "cpu_ms": cpu_ms}
    return {
        "contestant": contestant,
        "about": f"the server {contestant}",
        "engine": engine,
        "round": position,
        "versions": {"torch": "2.0"},
        "load": {str(each): measured for each in serving_tables.CONCURRENCIES},
        "memory_mib": memory_mib,
        "serving_mib": None,
    } | changes


# -- wrk ---------------------------------------------------------------------------------------------------


def test_the_line_of_json_behind_wrks_own_report_is_read():
    found = load.parse(WRK)
    assert (found.requests, found.seconds, found.failed) == (200, 2.0, 4)
    assert (found.p50_ms, found.p99_ms, found.mean_ms) == (75.0, 120.5, 80.0)


def test_only_good_answers_count():
    assert load.parse(WRK).per_s == pytest.approx(98.0)


def test_a_report_without_figures_is_an_error_that_shows_it():
    with pytest.raises(load.LoadError, match="unable to connect"):
        load.parse("unable to connect to 127.0.0.1:1 Connection refused\n")


# -- tables ------------------------------------------------------------------------------------------------


def test_a_ratio_compares_within_a_round():
    rows = [row("ours-onnx", 0, 300), row("litserve", 0, 100), row("ours-onnx", 1, 100), row("litserve", 1, 50)]
    rows.append(row("litserve", 2, 1))  # a round without ours
    found = serving_tables.compared(
        rows, "ours-onnx", "litserve", serving_tables.at(32, "per_s"), lambda one, other: one / other
    )
    assert found == [3.0, 2.0]


def test_contestants_without_a_common_round_are_not_compared():
    rows = [row("ours-onnx", 0, 300), row("litserve", 1, 100)]
    found = serving_tables.compared(
        rows, "ours-onnx", "litserve", serving_tables.at(32, "per_s"), lambda one, other: one / other
    )
    assert found is None


def test_the_best_peer_is_one_of_the_peers():
    rows = [row("ours-onnx", 0, 900), row("ray-serve-haproxy", 0, 800), row("bentoml", 0, 90), row("mlserver", 0, 80)]
    assert serving_tables.best_peer(rows, serving_tables.at(32, "per_s"), largest=True) == "bentoml"
    assert serving_tables.best_peer(rows, serving_tables.at(1, "p50_ms"), largest=False) == "bentoml"
    assert serving_tables.best_peer(rows[:2], serving_tables.at(1, "p50_ms"), largest=False) is None


def test_tables_tell_medians_and_whether_promises_are_kept():
    rows = []
    for position, ours in enumerate((120.0, 150.0, 160.0)):
        rows += [
            row("ours-onnx", position, ours, cpu_ms=12.0, engine="onnx", memory_mib=1200.0, serving_mib=600.0),
            row("limit-onnx", position, 300.0, cpu_ms=5.0, engine="onnx"),
            row("litserve", position, 100.0, memory_mib=1000.0),
            row("ray-serve", position, 60.0, memory_mib=2000.0, serving_mib=1500.0),
        ]
    told = list(serving_tables.tell(rows))
    ours = next(line for line in told if line.startswith("| ours-onnx (3) |"))
    assert ours.split(" | ")[1:4] == ["150"] * 3
    assert ours.endswith("| 12.0 | 7.0 | 1,200 | 600 |")
    assert "| ours-onnx / litserve, requests/s at 32 | >= 1.3 | 1.50 (1.20 to 1.60) | yes |" in told
    assert "| ours-onnx / ray-serve, requests/s at 32 | >= 2.4 | 2.50 (2.00 to 2.67) | yes |" in told
    assert "| ours-onnx / litserve, PSS, everything | <= 0.75 | 1.20 (1.20 to 1.20) | **no** |" in told
    assert "| ours-onnx / litserve, PSS of what serves | <= 0.75 | 0.60 (0.60 to 0.60) | yes |" in told
    assert "| ours-onnx, CPU ms/request above the limit | <= 3 | 7.00 (7.00 to 7.00) | **no** |" in told


def test_without_rows_the_tables_say_so():
    assert list(serving_tables.tell([])) == ["nothing was measured yet"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::ServeReplica:pu-ray:front"], "ray::ServeReplica:pu-ray:front"),
        (["ray::ProxyActor.receive_asgi_messages"], "ray::ProxyActor"),
        (["/a/lib/ray/core/src/ray/raylet/raylet", "--port=1"], "raylet"),
        (["/a/bin/python3.11", "-m", "tests.benchmarks.peers.litserve_app"], "litserve_app"),
        (["/a/bin/python", "-c", "from", "multiprocessing.spawn", "import", "spawn_main"], "multiprocessing"),
        (["/a/bin/python", "-u", "/a/ray/_private/log_monitor.py", "--gcs"], "log_monitor.py"),
        (["haproxy", "-W"], "haproxy"),
        ([], "ended"),
    ],
)
def test_processes_are_called_by_what_they_run(words, kind):
    assert serving_tables.kind(words) == kind


# -- pictures ----------------------------------------------------------------------------------------------


def test_a_picture_is_as_large_as_a_photograph_and_the_same_every_time():
    jpeg = serving_material.picture(3)
    assert jpeg == serving_material.picture(3)
    assert jpeg != serving_material.picture(4)
    assert Image.open(io.BytesIO(jpeg)).size == (500, 375)
    assert 40_000 < len(jpeg) < 65_000


def test_peers_see_the_pixels_that_ours_sees():
    from pu_ray.config import PreprocessingConfig
    from pu_ray.images import decode

    jpeg = serving_material.picture(5)
    ours = decode(jpeg, PreprocessingConfig(mean=network.MEAN, std=network.STD))
    assert np.array_equal(network.pixels_of(jpeg), ours)
