"""Who is served: from exported folders as they were named, or from a registry as it is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pu_ray.errors import ConfigError
from serving import registry
from serving.catalog import Catalog
from serving.registry import Student
from serving.routing import Route


@dataclass(frozen=True)
class Plan:
    """Who is served.

    Attributes:
        students: Every version.
        routes: By name.
        registry_uri: The registry that this came from; None where exported folders were named.
        engine: See `registry.load`.
    """

    students: tuple[Student, ...]
    routes: dict[str, Route]
    registry_uri: str | None = None
    engine: str = "auto"

    def renewed(self) -> Plan:
        """The same registry as it is now; versions that are known already are not opened again.

        Raises:
            DataError, GateError: The registry cannot be read, or a new version cannot be served.
        """
        assert self.registry_uri is not None, "only a registry changes"
        known = {(student.name, student.version): student for student in self.students}
        students, routes = [], {}
        for name, entry in Catalog(self.registry_uri).entries().items():
            routes[name] = entry.routed.route
            for version in sorted(entry.routed.route.versions):
                students.append(known.get((name, version)) or registry.load(entry.uris[version], self.engine).student)
        return replace(self, students=tuple(students), routes=routes)


def plan(uris: Sequence[str], engine: str = "auto") -> Plan:
    """Read what there is to serve.

    Args:
        uris: Exported folders, of which the first of a name is its stable version; or one registry.
        engine: See `registry.load`.

    Raises:
        ConfigError: Nothing, a registry beside other folders, or the same version twice.
        DataError, GateError: A student cannot be served.
    """
    if not uris:
        raise ConfigError(
            "there is nothing to serve",
            slug="nothing-to-serve",
            where="EXPORTED",
            allowed="one exported folder or more, or a registry",
        )
    registries = [uri for uri in uris if Catalog(uri).exists()]
    if registries:
        if len(uris) > 1:
            raise ConfigError(
                "a registry is served alone",
                slug="registry-not-alone",
                where=registries[0],
                got=f"{len(uris)} folders",
                hint="add the other students to it: `pu-ray registry add`",
            )
        found = Plan((), {}, Catalog(registries[0]).uri, engine).renewed()
        if not found.students:
            raise ConfigError(
                "the registry is empty",
                slug="registry-empty",
                where=found.registry_uri,
                hint="`pu-ray registry add REGISTRY EXPORTED` puts a student there",
            )
        return found
    students: list[Student] = []
    for uri in uris:
        student = registry.load(uri, engine).student
        if any((student.name, student.version) == (other.name, other.version) for other in students):
            raise ConfigError(
                "the same student twice",
                slug="student-twice",
                where=student.uri,
                got=f"{student.name} {student.version}",
                hint="name each folder once",
            )
        students.append(student)
    stable: dict[str, Route] = {}
    for student in students:
        stable.setdefault(student.name, Route(stable=student.version))
    return Plan(tuple(students), stable, engine=engine)
