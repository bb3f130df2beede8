"""serving/auth.py: tokens are known by their digests, and rotate without a restart."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from pathlib import Path

import pytest

from pu_ray.errors import ConfigError, DataError
from serving import auth


def bearer(token: str) -> str:
    return f"Bearer {token}"


def test_a_token_is_long_and_new() -> None:
    one, other = auth.new_token(), auth.new_token()
    assert one != other
    assert len(one) >= 43
    assert auth.digest(one) == f"sha256:{hashlib.sha256(one.encode()).hexdigest()}"


def test_a_tokens_file_names_its_tokens() -> None:
    lines = ["# ours", "", f"{auth.digest('a')}  the loader", auth.digest("b")]
    assert auth.parse("\n".join(lines), "file") == {auth.digest("a"): "the loader", auth.digest("b"): "token 2"}


@pytest.mark.parametrize("line", ["my-secret-token", "sha256:abc", f"sha256:{'A' * 64}", f"md5:{'0' * 64}"])
def test_a_wrong_line_is_refused_and_never_shown(line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        auth.parse(f"{auth.digest('a')}\n{line}", "file")
    assert refusal.value.where == "file, line 2"
    assert line not in str(refusal.value)


def test_no_token_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody could ask"):
        auth.parse("# none\n", "file")


@pytest.mark.parametrize(
    "header", [None, "", "b", "bearer", "Bearer ", "Bearer c", "Basic b", "Bearer bb", "Bearer " + "b" * 10_000]
)
def test_strangers_have_no_name(header: str | None) -> None:
    assert auth.Guard([auth.digest("a"), auth.digest("b")], read=None).name_of(header) is None


@pytest.mark.parametrize("header", ["Bearer b", "bearer b", "BEARER  b "])
def test_a_known_token_has_a_name(header: str) -> None:
    assert auth.Guard([auth.digest("a"), auth.digest("b")], read=None).name_of(header) == "token 2"


def test_tokens_rotate_without_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_REFRESH_S", 0.0)
    content = f"{auth.digest('old')} old\n"
    guard = auth.Guard([], read=lambda: content.encode())
    assert guard.name_of(bearer("old")) == "old"
    content += f"{auth.digest('new')} new\n"
    assert guard.name_of(bearer("new")) is None
    asyncio.run(guard.refresh())
    assert (guard.name_of(bearer("old")), guard.name_of(bearer("new"))) == ("old", "new")
    content = f"{auth.digest('new')} new\n"
    asyncio.run(guard.refresh())
    assert guard.name_of(bearer("old")) is None


@pytest.mark.parametrize("broken", ["", "my token in plain"])
def test_a_file_that_breaks_changes_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    # Ray Serve, once used in this process, takes this logger from pytest.
    monkeypatch.setattr(auth._log, "warning", lambda message, *rest: said.append(message % rest))
    monkeypatch.setattr(auth, "_REFRESH_S", 0.0)
    content = f"{auth.digest('old')} old\n"
    guard = auth.Guard([], read=lambda: content.encode())
    content = broken
    asyncio.run(guard.refresh())
    assert guard.name_of(bearer("old")) == "old"
    (line,) = said
    assert "the tokens known so far stay" in line
    assert "my token" not in line


def test_a_file_that_cannot_be_read_keeps_the_server_from_starting() -> None:
    def absent() -> bytes:
        raise DataError("there is no such file", slug="no-such-file", where="file")

    with pytest.raises(DataError):
        auth.Guard([], read=absent)


def test_the_file_is_not_read_for_every_request() -> None:
    reads = 0

    def counted() -> bytes:
        nonlocal reads
        reads += 1
        return f"{auth.digest('a')}\n".encode()

    guard = auth.Guard([], read=counted)

    async def many() -> None:
        for _ in range(100):
            await guard.refresh()

    asyncio.run(many())
    assert reads == 1


# -- this user's own token ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(auth.TOKEN_VARIABLE, raising=False)
    return tmp_path


def test_the_own_token_is_made_once_and_for_this_user_alone(home: Path) -> None:
    token = auth.own_token()
    assert auth.own_token() == token
    file = home / ".pu-ray" / "token"
    assert file.read_text() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["token"]


def test_a_home_that_cannot_be_written_is_an_error_that_helps(home: Path) -> None:
    (home / ".pu-ray").write_text("a file")
    with pytest.raises(ConfigError) as refusal:
        auth.own_token()
    assert "--tokens" in str(refusal.value.hint)


def test_the_own_token_is_shown_to_this_machine_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.token_for(loopback=True) is None
    token = auth.own_token()
    assert auth.token_for(loopback=True) == token
    assert auth.token_for(loopback=False) is None
    monkeypatch.setenv(auth.TOKEN_VARIABLE, "given")
    assert auth.token_for(loopback=True) == auth.token_for(loopback=False) == "given"
