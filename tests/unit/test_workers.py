"""pu_ray/workers.py: two processes agree on sums, means, minima and gathered arrays; one process is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pu_ray import workers
from pu_ray.config import OptimizerConfig, ScorerConfig
from pu_ray.progress import Silent
from pu_ray.pu import scorers, training

CPU = torch.device("cpu")


def test_a_single_process_is_the_whole():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (workers.count(), workers.rank()) == (1, 0)
    for together in (workers.total(values), workers.mean(values)):
        assert together.tolist() == [1.0, 2.0]
        assert not together.requires_grad
    assert workers.least(7, CPU) == 7
    np.testing.assert_array_equal(workers.gathered(np.arange(3)), np.arange(3))


def streams(rank: int, world: int) -> training.Streams:
    generator = torch.Generator().manual_seed(1)

    def draw(count: int, shift: float) -> torch.Tensor:
        return (torch.randn(count, 6, generator=generator) + shift)[rank::world]

    return training.Streams(draw(41, 1), draw(20, 1), draw(20, 1), draw(301, -1), draw(100, -1))


def _as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    head = scorers.Head(6, attention=True, hidden=4)
    config = ScorerConfig(kind="nnpu", batch_size=64, epochs=3, optimizer=OptimizerConfig(lr=0.01))
    mine = streams(rank, 2)
    fitted = training.fit_scorer(
        head,
        mine,
        scorers.objective(config, 0.2),
        config,
        0,
        Silent(),
        leave_out=lambda network: training.most_positive(network, mine, 0.3),
    )
    result = {
        "count": workers.count(),
        "total": workers.total(torch.tensor([1.0 + rank, 10.0])),
        "mean": workers.mean(torch.tensor(1.0 + rank)),
        "least": workers.least(5 - rank, CPU),
        "gathered": torch.from_numpy(workers.gathered(np.array([rank, 10 + rank]))),
        "curve": fitted.curve,
        "weights": dict(fitted.module.state_dict()),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.set_forkserver_preload(["torch._dynamo", "pu_ray.distill.loop"])
    torch.multiprocessing.start_processes(_as_one_of_two, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_agree_on_sums_means_minima_and_arrays(two):
    for worker in two:
        assert worker["count"] == 2
        assert worker["total"].tolist() == [3.0, 20.0]
        assert worker["mean"] == 1.5
        assert worker["least"] == 4
        assert worker["gathered"].tolist() == [0, 10, 1, 11]


def test_two_that_fit_a_scorer_together_end_with_the_same_one(two):
    # They began with different weights, shares of unequal length, and left out what each had by itself.
    first, second = two
    assert first["curve"] == second["curve"]
    for name, value in first["weights"].items():
        if name in ("mean", "std"):
            continue  # buffers of the first worker count
        torch.testing.assert_close(second["weights"][name], value, msg=name)
    assert first["curve"][-1]["proxy_auc"] > 0.9
