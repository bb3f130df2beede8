"""Who may ask: bearer tokens, of which a server knows nothing but digests.

A token is 32 random bytes, so a plain SHA-256 gives nothing away and needs neither salt nor stretching. A tokens file
has one line per token, `sha256:HEX NAME`; `pu-ray token` makes both. It is read again when it changes, so rotation
is: add a line, hand the new token out, remove the old line. No restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pu_ray.errors import ConfigError, PuRayError

TOKEN_VARIABLE = "PU_RAY_TOKEN"
CHALLENGE = {"WWW-Authenticate": "Bearer"}

_REFRESH_S = 5.0
_LONGEST = 512  # characters of an Authorization header that are looked at
_LINE = re.compile(r"(sha256:[0-9a-f]{64})(?:\s+(\S.*))?")
_log = logging.getLogger("ray.serve.pu_ray")


def new_token() -> str:
    """A token that nobody has seen."""
    return f"pu_{secrets.token_urlsafe(32)}"


def digest(token: str) -> str:
    """What a server knows of a token: `sha256:HEX`."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def parse(text: str, where: str) -> dict[str, str]:
    """The lines of a tokens file: name by digest. Empty lines and those that start with # say nothing.

    Raises:
        ConfigError: A line that is none, or no token at all. What it holds is not told: it may be a token.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        found = _LINE.fullmatch(content)
        if found is None:
            raise ConfigError(
                "not a line of a tokens file",
                slug="not-a-token-line",
                where=f"{where}, line {number}",
                allowed="sha256:, 64 hexadecimal digits, and a name",
                hint="make a token and its line with `pu-ray token NAME`",
            )
        names[found[1]] = found[2] or f"token {len(names) + 1}"
    if not names:
        raise ConfigError(
            "no token is known, so nobody could ask", slug="no-token", where=where, hint="`pu-ray token NAME` makes one"
        )
    return names


class Guard:
    """Knows the tokens.

    Args:
        digests: Of tokens that are always known.
        read: Content of a tokens file; None where there is none.

    Raises:
        ConfigError: See `parse`.
        DataError, StorageError: The file cannot be read.
    """

    def __init__(self, digests: Sequence[str], read: Callable[[], bytes] | None, where: str = "tokens") -> None:
        self._fixed = {each: f"token {number}" for number, each in enumerate(digests, 1)}
        self._read = read
        self._where = where
        self._names: Mapping[str, str] = self._fixed | ({} if read is None else self._parsed(read()))
        self._checked = time.monotonic()

    def _parsed(self, content: bytes) -> dict[str, str]:
        return parse(content.decode("utf-8", "replace"), self._where)

    def name_of(self, authorization: str | None) -> str | None:
        """The name of the token in an `Authorization` header; None for a stranger."""
        scheme, _, token = (authorization or "")[:_LONGEST].partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = digest(token.strip())
        # All are compared, so that the time tells nothing about which one nearly fits.
        names = [name for known, name in self._names.items() if hmac.compare_digest(known, given)]
        return names[0] if names else None

    async def refresh(self) -> None:
        """Read the file again, at most every few seconds; what cannot be read changes nothing."""
        now = time.monotonic()
        if self._read is None or now - self._checked < _REFRESH_S:
            return
        self._checked = now
        try:
            self._names = self._fixed | self._parsed(await asyncio.to_thread(self._read))
        except PuRayError as error:
            _log.warning("the tokens file cannot be read, the tokens known so far stay: %s", error.problem)


# -- the token of this machine's user ----------------------------------------------------------------------


def own_token_file() -> Path:
    """Where the token of servers on this machine lies that were not told which tokens to know."""
    return Path.home() / ".pu-ray" / "token"


def own_token() -> str:
    """This user's token on this machine; made when it is first asked for, and readable by nobody else.

    Raises:
        ConfigError: The file cannot be written.
    """
    file = own_token_file()
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            temporary = file.with_suffix(f".{os.getpid()}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as content:
                content.write(new_token())
            try:
                os.link(temporary, file)  # the first of two that start at once wins
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(
            "the token of this machine cannot be kept",
            slug="token-not-kept",
            where=str(file),
            got=error.strerror,
            hint="give the server a tokens file (--tokens), or --no-auth",
        ) from error


def token_for(loopback: bool) -> str | None:
    """What a client says: the variable's token, else, to a server of this very machine only, its user's own."""
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    file = own_token_file()
    if loopback and file.exists():
        return file.read_text().strip()
    return None
