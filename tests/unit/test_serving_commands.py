"""pu_ray/serving_commands.py: tokens, registries, and what `serve` and `predict` make of their arguments."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster import session
from pu_ray import cli, serving_commands
from serving import app, auth, client
from serving.settings import ServingSettings
from tests.unit.serving.students import png, write_student

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command line in this process, for a user without a token: exit status, stdout, stderr."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.delenv(auth.TOKEN_VARIABLE, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli._run(list(arguments))
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


# -- token ----------------------------------------------------------------------------------------------------


def test_a_token_is_printed_once_and_its_line_beside_it(call: Call) -> None:
    status, out, err = call("token", "the loader")
    assert status == 0
    assert f"{auth.digest(out.strip())} the loader" in err
    assert out.strip() not in err


def test_a_token_may_join_a_file(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    tokens = [call("token", name, "--add-to", str(file))[1].strip() for name in ("one", "two\nlines")]
    assert auth.parse(file.read_text(), "file") == {auth.digest(tokens[0]): "one", auth.digest(tokens[1]): "two lines"}
    assert call("token", "x", "--add-to", str(tmp_path / "absent" / "tokens"))[0] == 2


# -- registry -------------------------------------------------------------------------------------------------


def test_a_registry_by_commands(call: Call, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    first, second = (
        call("registry", "add", registry, write_student(tmp_path / str(seed), "pets", seed))[1].split()[1]
        for seed in range(2)
    )
    assert call("registry", "canary", registry, "pets", second[:10], "--percent", "20")[1] == f"canary: {second} 20 %\n"
    lines = call("registry", "list", registry)[1].splitlines()
    assert sorted(lines) == sorted([f"pets  {first}  stable", f"pets  {second}  canary 20 %"])
    (entry,) = json.loads(call("registry", "list", registry, "--json")[1])
    assert entry["route"]["canary_share"] == 0.2
    assert call("registry", "promote", registry, "pets")[1] == f"stable: {second}\n"
    assert call("registry", "rollback", registry, "pets")[1] == f"stable: {first}\n"
    assert call("registry", "shadow", registry, "pets", second)[1] == f"shadow: {second}\n"
    assert call("registry", "shadow", registry, "pets")[1] == "shadow: none\n"
    assert call("registry", "alias", registry, "pets", "next", second)[1] == f"next: {second}\n"
    assert call("registry", "alias", registry, "pets", "next")[1] == "no aliases\n"
    assert call("registry", "canary", registry, "pets")[1] == "no canary\n"
    assert call("registry", "remove", registry, "pets", second)[1] == f"removed {second}\n"
    status, _, err = call("registry", "promote", registry, "pets", second)
    assert status == 3
    assert "no such version" in err


# -- serve ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What `serve` would have started."""
    asked = SimpleNamespace()

    @contextmanager
    def no_ray(**_options: Any) -> Iterator[None]:
        yield

    def run(uris: list[str], settings: ServingSettings, *, host: str, port: int, on_ready: Any, on_change: Any) -> None:
        asked.uris, asked.settings, asked.host, asked.port = uris, settings, host, port
        on_ready(f"http://{host}:{port}")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(session, "ray_session", no_ray)
    monkeypatch.setattr(app, "run_until_interrupted", run)
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


def test_by_default_this_user_alone_may_ask(call: Call, served: SimpleNamespace) -> None:
    status, _, err = call("serve", "a", "b")
    assert status == 130, "SIGTERM ends a server as Ctrl-C does"
    assert (served.uris, served.host, served.port) == (["a", "b"], "127.0.0.1", 8000)
    assert served.settings.authentication == "required"
    assert served.settings.token_digests == (auth.digest(auth.own_token()),)
    assert str(auth.own_token_file()) in err
    assert auth.own_token() not in err


def test_settings_come_from_flags(call: Call, served: SimpleNamespace, tmp_path: Path) -> None:
    call("serve", "a", "--tokens", "tokens.txt", "--grpc-port", "9000", "--replicas", "2", "--max-replicas", "5")
    assert served.settings.tokens_uri == str(Path("tokens.txt").absolute())
    assert (served.settings.grpc_port, served.settings.replicas, served.settings.max_replicas) == (9000, 2, 5)
    call("serve", "a", "--tokens", "s3://bucket/tokens", "--engine", "onnx-int8")
    assert (served.settings.tokens_uri, served.settings.engine) == ("s3://bucket/tokens", "onnx-int8")
    call("serve", "a", "--placement", "apart", "--fronts", "3")
    assert (served.settings.placement, served.settings.fronts) == ("apart", 3)
    call("serve", "a", "--no-auth")
    assert (served.settings.authentication, served.settings.token_digests) == ("off", ())


def test_haproxy_listens_where_no_other_server_does(
    call: Call, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (*serving_commands._HAPROXY, *serving_commands._HAPROXY_PORTS):
        monkeypatch.setenv(variable, "-")  # so that it is undone
        monkeypatch.delenv(variable)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(serving_commands, "_HAPROXY_PORTS", {"RAY_SERVE_HAPROXY_STATS_PORT": taken})
        call("serve", "a", "--haproxy", "--host", "0.0.0.0")
    chosen = int(os.environ["RAY_SERVE_HAPROXY_STATS_PORT"])
    assert chosen not in (0, taken)
    assert serving_commands._free_port(taken) == taken, "by now it is free"


@pytest.mark.parametrize("wrong", [["--replicas", "0"], ["--engine", "tensorrt"], ["--grpc-port", "70000"]])
def test_wrong_settings_are_refused(call: Call, served: SimpleNamespace, wrong: list[str]) -> None:
    status, _, err = call("serve", "a", *wrong)
    assert status == 2
    assert wrong[0].removeprefix("--").replace("-", "_") in err


def test_a_config_file_starts_nothing(call: Call, served: SimpleNamespace, tmp_path: Path) -> None:
    uri = write_student(tmp_path / "pets")
    file = tmp_path / "serve.yaml"
    assert call("serve", uri, "--config-out", str(file), "--host", "0.0.0.0")[0] == 0
    document = yaml.safe_load(file.read_text())
    assert document["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert [each["import_path"] for each in document["applications"]] == ["serving.app:front_from_args"]
    assert auth.own_token() not in file.read_text()
    assert not hasattr(served, "uris")
    status, _, err = call("serve", uri, "--config-out", str(tmp_path / "absent" / "serve.yaml"))
    assert status == 2
    assert f"--config-out: the file cannot be written\n  got: {tmp_path}/absent/serve.yaml: No such file" in err


# -- predict --------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Pictures that a server would have been asked about."""
    pictures: list[bytes] = []

    def classify(_client: Any, image: bytes, *, model: str | None, top_k: int) -> client.Classification:
        pictures.append(image)
        return client.Classification(model or "pets", "v1", (client.Prediction("cat", 0, 0.75),))

    monkeypatch.setattr(client.Client, "classify", classify)
    return pictures


def test_files_folders_and_stdin(
    call: Call, asked: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name, seed in (("b.png", 1), ("below/a.JPG", 2), ("notes.txt", 3)):
        (folder / name).write_bytes(png(seed))
    (tmp_path / "single.dat").write_bytes(png(4))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(png(5))))
    status, out, _ = call("predict", str(tmp_path / "single.dat"), str(folder), "-")
    assert status == 0
    assert asked == [png(4), png(1), png(2), png(5)]
    assert [line.rpartition(": ")[0] for line in out.splitlines()] == [
        str(tmp_path / "single.dat"),
        str(folder / "b.png"),
        str(folder / "below" / "a.JPG"),
        "-",
    ]
    assert out.splitlines()[0].endswith(": cat 0.750")


def test_answers_for_machines(call: Call, asked: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    _, out, _ = call("predict", str(tmp_path / "a.png"), "--model", "shoes", "--json")
    (answer,) = json.loads(out)
    assert (answer["file"], answer["model"]) == (str(tmp_path / "a.png"), "shoes")
    assert answer["predictions"] == [{"label": "cat", "index": 0, "probability": 0.75}]


def test_a_folder_without_pictures_is_an_error(call: Call, asked: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = call("predict", str(tmp_path / "empty"))
    assert status == 2
    assert "there is no image in this folder" in err
