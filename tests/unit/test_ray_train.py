"""pu_ray/ray_train.py: what it relies on in Ray Train beyond the public interface."""

from __future__ import annotations

from ray.train.torch import TorchTrainer


def test_ray_train_still_takes_ctrl_c_for_itself_where_we_stop_it() -> None:
    # Under another name the driver would leave with status 1 again; tests/e2e/test_kill_and_resume.py (slow) sees it.
    assert callable(getattr(TorchTrainer, "_register_sigint_handler", None))
