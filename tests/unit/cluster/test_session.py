from __future__ import annotations

import os
import socket

import pytest

from cluster import session
from pu_ray.errors import ClusterError

GIB = 2**30


@pytest.fixture(autouse=True)
def no_ray_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of a run share a Ray in this process: a session would use it, and a failed one would end it."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)


def test_a_private_ray_never_has_so_few_cpus_that_reads_starve() -> None:
    assert session.logical_cpus(1.0) >= session.LEAST_LOGICAL_CPUS
    assert session.logical_cpus(4000.25) == 4001


@pytest.mark.parametrize(
    ("free_memory", "free_shared", "expected"),
    [
        (64 * GIB, 32 * GIB, 2 * GIB),  # never more than modest
        (4 * GIB, 32 * GIB, GIB),  # a quarter of the memory
        (64 * GIB, GIB, GIB * 8 // 10),  # within shared memory
        (4 * GIB, 64 * 2**20, GIB),  # a container's default shared memory is no bound: Ray maps a file
        (100 * 2**20, 0, 80 * 2**20),  # what Ray needs at least
    ],
)
def test_object_store_is_modest_and_fits(free_memory: int, free_shared: int, expected: int) -> None:
    assert session.object_store_bytes(free_memory, free_shared) == expected


def test_a_private_ray_gets_a_fresh_token_in_memory() -> None:
    first, second = session.private_token({}), session.private_token({})
    assert set(first) == {"RAY_AUTH_TOKEN"}
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first != second


@pytest.mark.parametrize(
    "environment", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "x"}, {"RAY_AUTH_TOKEN_PATH": "/x"}]
)
def test_what_the_user_decided_about_authentication_stays(environment: dict[str, str]) -> None:
    assert session.private_token(environment) == {}


def test_workers_find_the_same_working_copy_and_the_user_s_settings_win() -> None:
    changes = session.local_environment({"PYTHONPATH": "/mine", "OMP_WAIT_POLICY": "ACTIVE"})
    assert changes["PYTHONPATH"].split(os.pathsep)[1:] == ["/mine"]
    assert os.path.isdir(os.path.join(changes["PYTHONPATH"].split(os.pathsep)[0], "pu_ray"))
    assert "OMP_WAIT_POLICY" not in changes
    assert session.local_environment({})["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_where_nothing_listens_fails_at_once_and_says_what_to_do(form: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = form.format(port=closed.getsockname()[1])
    with (
        pytest.raises(ClusterError, match="no connection to the Ray cluster") as raised,
        session.ray_session(address=address, verbose=False, needed_cpus=1),
    ):
        pass
    assert raised.value.where == address
    assert "ray status" in str(raised.value.hint)


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ClusterError) as raised, session.ray_session(address=None, verbose=True, needed_cpus=1):
        pass
    assert raised.value.where == "nonsense"


def test_a_dashboard_url_is_answered_with_the_right_command() -> None:
    with (
        pytest.raises(ClusterError, match="pu-ray submit"),
        session.ray_session(address="http://127.0.0.1:8265", verbose=True, needed_cpus=1),
    ):
        pass


def test_a_refused_token_names_the_variables_but_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setattr(session, "_require_listener", lambda address: None)

    def refuse(**options: object) -> None:
        raise RuntimeError("Unauthenticated: invalid token")

    monkeypatch.setattr("ray.init", refuse)
    with (
        pytest.raises(ClusterError) as raised,
        session.ray_session(address="127.0.0.1:6379", verbose=False, needed_cpus=1),
    ):
        pass
    assert "RAY_AUTH_TOKEN_PATH" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_the_environment_is_as_before_after_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    seen: dict[str, str] = {}

    def fail(**options: object) -> None:
        seen.update(os.environ)
        raise OSError("no space left")

    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(ClusterError, match="could not be started") as raised,
        session.ray_session(address=None, verbose=False, needed_cpus=1),
    ):
        pass
    assert raised.value.got == "no space left"
    assert seen["OMP_WAIT_POLICY"] == "PASSIVE"
    assert dict(os.environ) == before


def test_a_private_ray_has_a_hook_and_variables_and_a_cluster_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_require_listener", lambda address: None)
    monkeypatch.setenv("PRESENT", "stays")
    asked: list[object] = []

    def fail(**options: object) -> None:
        asked.append((options.get("runtime_env"), os.environ.get("ABSENT"), os.environ["PRESENT"]))
        raise OSError("seen enough")

    monkeypatch.setattr("ray.init", fail)
    for address in (None, "127.0.0.1:6379"):
        with (
            pytest.raises(ClusterError),
            session.ray_session(
                address=address,
                verbose=False,
                needed_cpus=1,
                worker_hook="a.function",
                variables={"ABSENT": "comes", "PRESENT": "goes"},
            ),
        ):
            pass
    # Where Ray is somebody else's, the function need not be importable on every node.
    assert asked == [
        ({"worker_process_setup_hook": "a.function"}, "comes", "stays"),
        ({"env_vars": dict(session.WORKER_ENVIRONMENT)}, None, "stays"),
    ]
    assert "ABSENT" not in os.environ
