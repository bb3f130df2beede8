"""A registry of students over storage: versions beside each other, and a route that says which of them answers.

    REGISTRY/registry.json                        what this folder is
    REGISTRY/{name}/versions/{version}/...        exported folders, as the export stage published them
    REGISTRY/{name}/route.json                    `Route`, and the stable versions before it

A version is written before any route names it, and a route is one small file that is replaced as a whole, if nobody
else replaced it meanwhile. So a server that reads while an operator writes sees the old state or the new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pu_ray import manifest
from pu_ray.errors import ConfigError, DataError, wrong_setting
from pu_ray.storage import Storage
from serving import registry
from serving.registry import NAME, Student
from serving.routing import Route

_MARKER = "registry.json"
_ROUTE = "route.json"
_FORMAT = 1
_HISTORY = 20
_ATTEMPTS = 5
_NO_CANARY = {"canary": None, "canary_share": 0.0}


class Routed(BaseModel):
    """What `route.json` holds.

    Attributes:
        route: Which version answers.
        history: Stable versions before it, the latest last.
        changed: When, Unix time in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    route: Route
    history: tuple[str, ...] = ()
    changed: float = Field(default_factory=time.time)


@dataclass(frozen=True)
class Entry:
    """One name of a registry.

    Attributes:
        name: Of the student.
        routed: Its route, and what was stable before.
        uris: Exported folders by version.
    """

    name: str
    routed: Routed
    uris: dict[str, str]


class Catalog:
    """A registry.

    Args:
        uri: Its folder, local or on S3.
    """

    def __init__(self, uri: str) -> None:
        storage = Storage(uri)
        self._storage = Storage(str(storage.local_path)) if storage.is_local else storage

    @property
    def uri(self) -> str:
        """Its folder; absolute where it is local."""
        return self._storage.uri

    def exists(self) -> bool:
        """Whether this folder is a registry."""
        return self._storage.exists(_MARKER)

    def entries(self) -> dict[str, Entry]:
        """All names.

        Raises:
            DataError: Not a registry, or a route that names a version that is not there.
        """
        self._require()
        paths = [PurePosixPath(file.path) for file in self._storage.list_files()]
        names = sorted(path.parts[0] for path in paths if len(path.parts) == 2 and path.name == _ROUTE)
        return {name: self.entry(name) for name in names}

    def entry(self, name: str) -> Entry:
        """One name.

        Raises:
            DataError: It is not there, or see `entries`.
        """
        where = f"{self._storage}/{name}/{_ROUTE}"
        if not NAME.fullmatch(name) or not self._storage.exists(f"{name}/{_ROUTE}"):
            raise DataError(
                "the registry has no student of this name",
                slug="no-such-student",
                where=self.uri,
                got=name,
                hint=f"`pu-ray registry list {self.uri}` shows the names",
            )
        try:
            routed = Routed.model_validate_json(self._storage.read_bytes(f"{name}/{_ROUTE}"))
        except ValidationError as error:
            raise DataError(
                "not a route",
                slug="route-damaged",
                where=where,
                got=str(error.errors()[0]["msg"]),
                hint="restore that file, or add the students to a new registry",
            ) from error
        uris = {version: self._folder(name, version).uri for version in self._versions(name)}
        if missing := sorted(routed.route.versions - set(uris)):
            raise DataError(
                "the route names versions that are not there",
                slug="routed-versions-missing",
                where=where,
                got=", ".join(missing),
                hint="add them again with `pu-ray registry add`",
            )
        return Entry(name, routed, uris)

    def add(self, exported_uri: str) -> Student:
        """Copy an exported folder into the registry. The first version of a name is stable at once.

        Raises:
            DataError, GateError: The folder cannot be served.
            ConfigError: The registry's folder holds something else.
        """
        student = registry.load(exported_uri).student
        self._create()
        source, target = Storage(student.uri), self._folder(student.name, student.version)
        if not target.exists(manifest.FILE_NAME):
            for path in manifest.require(source, made_by="export").files:
                target.write_bytes(path, source.read_bytes(path))
            # Last: what has a manifest is complete.
            target.write_bytes(manifest.FILE_NAME, source.read_bytes(manifest.FILE_NAME))
        if not self._storage.exists(f"{student.name}/{_ROUTE}"):
            first = Routed(route=Route(stable=student.version))
            self._storage.write_if(f"{student.name}/{_ROUTE}", _as_bytes(first), None)
        return student

    def remove(self, name: str, version: str) -> str:
        """Delete a version that no route needs; gives its full name.

        Raises:
            ConfigError: The route names it.
        """
        entry = self.entry(name)
        version = self.version(entry, version)
        if version in entry.routed.route.versions:
            raise ConfigError(
                "the route still names this version",
                slug="version-in-use",
                where=self._where(name),
                got=version,
                hint="give its place to another version first: promote, canary, shadow or alias",
            )
        self._folder(name, version).delete()
        return version

    # -- routes -------------------------------------------------------------------------------------------

    def promote(self, name: str, version: str | None = None) -> Routed:
        """Make a version, by default the canary, the stable one; a canary or shadow of that version ends.

        Raises:
            ConfigError: There is no canary.
            DataError: There is no such version.
        """

        def changed(entry: Entry) -> Routed:
            route = entry.routed.route
            wanted = self.version(entry, version) if version is not None else route.canary
            if wanted is None:
                raise ConfigError(
                    "there is no canary to promote", slug="no-canary", where=self._where(name), hint="name a version"
                )
            if wanted == route.stable:
                return entry.routed
            update: dict[str, Any] = {"stable": wanted}
            if route.canary == wanted:
                update |= _NO_CANARY
            if route.shadow == wanted:
                update |= {"shadow": None}
            return self._routed(entry, update, (*entry.routed.history, route.stable))

        return self._change(name, changed)

    def rollback(self, name: str) -> Routed:
        """Make the stable version before this one stable again; a canary ends, and so does a shadow of that version.

        Raises:
            ConfigError: There was none.
        """

        def changed(entry: Entry) -> Routed:
            history = [version for version in entry.routed.history if version in entry.uris]
            if not history:
                raise ConfigError(
                    "there is nothing to roll back to",
                    slug="nothing-to-roll-back-to",
                    where=self._where(name),
                    hint="`pu-ray registry promote` takes any version by its name",
                )
            update: dict[str, Any] = {"stable": history[-1]} | _NO_CANARY
            if entry.routed.route.shadow == history[-1]:
                update |= {"shadow": None}
            return self._routed(entry, update, tuple(history[:-1]))

        return self._change(name, changed)

    def canary(self, name: str, version: str | None, share: float) -> Routed:
        """Give a version a share of the requests; None ends the canary."""

        def changed(entry: Entry) -> Routed:
            if version is None:
                return self._routed(entry, _NO_CANARY)
            return self._routed(entry, {"canary": self.version(entry, version), "canary_share": share})

        return self._change(name, changed)

    def shadow(self, name: str, version: str | None) -> Routed:
        """Give a version copies of the stable version's requests; None ends it."""
        return self._change(
            name,
            lambda entry: self._routed(entry, {"shadow": None if version is None else self.version(entry, version)}),
        )

    def alias(self, name: str, alias: str, version: str | None) -> Routed:
        """Give a version a further name; None takes it away."""

        def changed(entry: Entry) -> Routed:
            aliases = {key: value for key, value in entry.routed.route.aliases.items() if key != alias}
            if version is not None:
                aliases[alias] = self.version(entry, version)
            return self._routed(entry, {"aliases": aliases})

        return self._change(name, changed)

    def version(self, entry: Entry, wanted: str) -> str:
        """The version that this is, or begins with.

        Raises:
            DataError: None or several.
        """
        found = [wanted] if wanted in entry.uris else [each for each in entry.uris if each.startswith(wanted)]
        if len(found) != 1:
            raise DataError(
                "no such version" if not found else "several versions begin like this",
                slug="no-such-version" if not found else "ambiguous-version",
                where=self._where(entry.name),
                allowed=", ".join(entry.uris),
                got=wanted,
            )
        return found[0]

    # -- files --------------------------------------------------------------------------------------------

    def _routed(self, entry: Entry, update: dict[str, Any], history: tuple[str, ...] | None = None) -> Routed:
        try:
            route = Route.model_validate(entry.routed.route.model_dump() | update)
        except ValidationError as error:
            raise wrong_setting(error.errors()[0], where=self._where(entry.name)) from error
        return Routed(route=route, history=(entry.routed.history if history is None else history)[-_HISTORY:])

    def _change(self, name: str, changes: Callable[[Entry], Routed]) -> Routed:
        for _ in range(_ATTEMPTS):
            tag = self._storage.tag(f"{name}/{_ROUTE}")
            routed = changes(self.entry(name))
            if self._storage.write_if(f"{name}/{_ROUTE}", _as_bytes(routed), tag) is not None:
                return routed
        raise ConfigError(
            "others keep changing this route", slug="route-contended", where=self._where(name), hint="try again"
        )

    def _where(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def _folder(self, name: str, version: str) -> Storage:
        return self._storage.child(f"{name}/versions/{version}")

    def _versions(self, name: str) -> list[str]:
        paths = [PurePosixPath(file.path) for file in self._storage.child(f"{name}/versions").list_files()]
        return sorted(path.parts[0] for path in paths if len(path.parts) == 2 and path.name == manifest.FILE_NAME)

    def _create(self) -> None:
        if self.exists():
            return
        if self._storage.exists() and self._storage.list_files():
            raise ConfigError(
                "this folder holds something that is not a registry",
                slug="registry-folder-in-use",
                where=self.uri,
                hint="name a new folder",
            )
        self._storage.write_json(_MARKER, {"format": _FORMAT})

    def _require(self) -> None:
        if not self.exists():
            raise DataError(
                "not a registry of students",
                slug="not-a-registry",
                where=self.uri,
                hint="make one with `pu-ray registry add REGISTRY EXPORTED`",
            )


def _as_bytes(routed: Routed) -> bytes:
    return routed.model_dump_json(indent=2).encode()
