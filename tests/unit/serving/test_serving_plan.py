"""serving/plan.py: who is served, from folders or from a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from pu_ray.errors import ConfigError, DataError
from serving import registry
from serving.catalog import Catalog
from serving.plan import plan
from serving.routing import Route
from tests.unit.serving.students import write_student


@pytest.fixture
def exported(tmp_path: Path) -> list[str]:
    return [
        write_student(tmp_path / f"{name}-{seed}", name, seed)
        for name, seed in (("pets", 0), ("shoes", 1), ("pets", 2))
    ]


def test_the_first_folder_of_a_name_is_its_stable_version(exported: list[str]) -> None:
    served = plan(exported)
    first, shoes, _ = served.students
    assert served.routes == {"pets": Route(stable=first.version), "shoes": Route(stable=shoes.version)}
    assert served.registry_uri is None


@pytest.mark.parametrize("uris", [[], ["absent"]])
def test_nothing_to_serve(tmp_path: Path, uris: list[str]) -> None:
    with pytest.raises((ConfigError, DataError)):
        plan([str(tmp_path / uri) for uri in uris])


def test_the_same_version_twice_is_refused(exported: list[str]) -> None:
    with pytest.raises(ConfigError, match="the same student twice"):
        plan([exported[0], exported[0]])


def test_a_registry_says_itself_what_is_served(
    tmp_path: Path, exported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(str(tmp_path / "registry"))
    first, shoes, second = (catalog.add(uri) for uri in exported)
    served = plan([catalog.uri])
    # What no route names needs no process.
    assert [student.version for student in served.students] == [first.version, shoes.version]
    catalog.canary("pets", second.version, 0.25)
    opened = []
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda uri, engine: opened.append(uri) or load(uri, engine))
    renewed = served.renewed()
    assert {student.version for student in renewed.students} == {first.version, shoes.version, second.version}
    assert renewed.routes["pets"] == Route(stable=first.version, canary=second.version, canary_share=0.25)
    assert len(opened) == 1, "known versions are not opened again"
    assert served != renewed
    assert renewed.renewed() == renewed


def test_a_registry_is_served_alone(tmp_path: Path, exported: list[str]) -> None:
    catalog = Catalog(str(tmp_path / "registry"))
    catalog.add(exported[0])
    with pytest.raises(ConfigError, match="served alone"):
        plan([catalog.uri, exported[1]])
