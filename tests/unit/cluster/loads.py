"""A table with numbers that are easy to multiply by hand, and the work of stages."""

from __future__ import annotations

from hypothesis import strategies as st

from cluster.estimate import Each, Load
from cluster.prices import NodePrice, NodePrices, Prices, Rates, Spot

TABLE = Prices(
    currency="EUR",
    nodes=NodePrices(
        cpu=NodePrice(cpus=10, gpus=0, memory_gib=100, price_per_hour=1),
        gpu=NodePrice(cpus=10, gpus=2, memory_gib=100, price_per_hour=3),
    ),
    start_s=360,
    spot=Spot(price_frac=0.5, interruptions_per_node_hour=0.1),
    rates=Rates(cpu_core_gflop_per_s=10, gpu_tflop_per_s=1, decode_mb_per_s_per_core=10, image_us=0),
    assumed_prior=0.1,
)


def a_pass(**changes: object) -> Load:
    settings: dict[str, object] = {
        "stage": "features",
        "images": 1000,
        "device_s": 36_000.0,
        "decode_s": 0.0,
        "each": Each(1.0, 0.0, 2.0),
        "decoder": Each(1.0, 0.0, 0.5),
        "unit": "actors",
        "setting": "resources.embed.max_actors",
        "fewest": 1,
        "pool": 2,
        "chunks": 100,
        "most": 100,
    }
    return Load(**(settings | changes))  # type: ignore[arg-type]


def a_training(**changes: object) -> Load:
    settings: dict[str, object] = {
        "stage": "distill",
        "each": Each(1.0, 1.0, 0.0),
        "decoder": Each(0.0, 0.0, 0.0),
        "unit": "workers",
        "setting": "distill.workers",
        "pool": 4,
        "chunks": 1,
        "most": 64,
        "repeated_s": 3600.0,
    }
    return a_pass(**(settings | changes))


positive = st.floats(1.0, 1e6)
passes = st.builds(
    lambda device_s, decode_s, gpus, chunks: a_pass(
        device_s=device_s, decode_s=decode_s, each=Each(1.0, gpus, 2.0), chunks=chunks, most=chunks
    ),
    positive,
    st.floats(0.0, 1e5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.integers(1, 5000),
)
trainings = st.builds(
    lambda device_s, gpus, pool: a_training(device_s=device_s, each=Each(2.0, gpus, 0.0), pool=pool),
    positive,
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 32),
)
