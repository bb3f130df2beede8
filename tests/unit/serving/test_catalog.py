"""serving/catalog.py: versions and routes over storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pu_ray.errors import ConfigError, DataError, GateError, PuRayError
from pu_ray.storage import Storage
from serving import registry
from serving.catalog import Catalog
from serving.routing import Route
from tests.unit.serving.students import write_student


@pytest.fixture
def exported(tmp_path: Path) -> list[str]:
    return [write_student(tmp_path / f"pets-{seed}", "pets", seed) for seed in range(3)]


@pytest.fixture(params=["local", "s3"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    if request.param == "local":
        return Catalog(str(tmp_path / "registry"))
    return Catalog(f"{request.getfixturevalue('s3_bucket')}/registry")


def route_of(catalog: Catalog) -> Route:
    return catalog.entry("pets").routed.route


def test_the_first_version_is_stable_and_others_wait(catalog: Catalog, exported: list[str], tmp_path: Path) -> None:
    assert not catalog.exists()
    first, second = (catalog.add(uri) for uri in exported[:2])
    shoes = catalog.add(write_student(tmp_path / "shoes", "shoes", 7))
    assert catalog.exists()
    entries = catalog.entries()
    assert list(entries) == ["pets", "shoes"]
    assert entries["pets"].routed.route == Route(stable=first.version)
    assert set(entries["pets"].uris) == {first.version, second.version}
    assert entries["shoes"].routed.route == Route(stable=shoes.version)
    # What was copied is served as it was published.
    for uri in entries["pets"].uris.values():
        assert registry.load(uri).student.name == "pets"


def test_adding_again_changes_nothing(catalog: Catalog, exported: list[str]) -> None:
    first = catalog.add(exported[0])
    second = catalog.add(exported[1])
    catalog.promote("pets", second.version)
    assert catalog.add(exported[0]) == first
    assert route_of(catalog).stable == second.version


def test_a_version_that_was_cut_off_does_not_count(catalog: Catalog, exported: list[str]) -> None:
    catalog.add(exported[0])
    second = catalog.add(exported[1])
    Storage(f"{catalog.uri}/pets/versions/{second.version}").delete("manifest.json")
    assert second.version not in catalog.entry("pets").uris
    catalog.add(exported[1])
    assert second.version in catalog.entry("pets").uris


def test_nothing_below_its_gate_gets_in(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        catalog.add(write_student(tmp_path / "bad", facts={"gate_passed": False}))
    assert not catalog.exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, exported: list[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a registry"):
        Catalog(str(tmp_path / "photos")).add(exported[0])
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.jpg"]


# -- routes ---------------------------------------------------------------------------------------------------


def test_promotion_and_rollback(catalog: Catalog, exported: list[str]) -> None:
    a, b, c = (catalog.add(uri).version for uri in exported)
    catalog.canary("pets", b[:8], 0.1)
    assert route_of(catalog) == Route(stable=a, canary=b, canary_share=0.1)
    catalog.promote("pets")
    assert route_of(catalog) == Route(stable=b)
    catalog.promote("pets", c)
    assert catalog.entry("pets").routed.history == (a, b)
    assert catalog.rollback("pets").route.stable == b
    assert catalog.rollback("pets").route.stable == a
    with pytest.raises(ConfigError, match="nothing to roll back to"):
        catalog.rollback("pets")


def test_a_rollback_ends_the_canary(catalog: Catalog, exported: list[str]) -> None:
    a, b, c = (catalog.add(uri).version for uri in exported)
    catalog.promote("pets", b)
    catalog.canary("pets", c, 0.5)
    assert catalog.rollback("pets").route == Route(stable=a)


def test_promoting_the_shadow_ends_it(catalog: Catalog, exported: list[str]) -> None:
    a, b, _ = (catalog.add(uri).version for uri in exported)
    catalog.shadow("pets", b)
    assert route_of(catalog).shadow == b
    assert catalog.promote("pets", b).route == Route(stable=b)
    assert catalog.promote("pets", b).history == (a,)
    catalog.shadow("pets", a)
    assert catalog.rollback("pets").route == Route(stable=a)


def test_aliases_come_and_go(catalog: Catalog, exported: list[str]) -> None:
    _, b, c = (catalog.add(uri).version for uri in exported)
    catalog.alias("pets", "next", b)
    catalog.alias("pets", "newest", c)
    assert route_of(catalog).aliases == {"next": b, "newest": c}
    catalog.alias("pets", "next", None)
    assert route_of(catalog).aliases == {"newest": c}


def test_what_is_routed_cannot_be_removed(catalog: Catalog, exported: list[str]) -> None:
    a, b, c = (catalog.add(uri).version for uri in exported)
    catalog.promote("pets", b)
    catalog.canary("pets", c, 0.1)
    for version in (b, c):
        with pytest.raises(ConfigError, match="still names"):
            catalog.remove("pets", version)
    catalog.remove("pets", a)
    assert a not in catalog.entry("pets").uris
    with pytest.raises(ConfigError, match="nothing to roll back to"):
        catalog.rollback("pets")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda catalog: catalog.promote("pets"), ConfigError),
        (lambda catalog: catalog.promote("pets", "nope"), DataError),
        (lambda catalog: catalog.promote("pets", ""), DataError),
        (lambda catalog: catalog.promote("cars"), DataError),
        (lambda catalog: catalog.promote("../pets"), DataError),
        (lambda catalog: catalog.canary("pets", catalog.entry("pets").routed.route.stable, 0.1), ConfigError),
        (lambda catalog: catalog.shadow("pets", catalog.entry("pets").routed.route.stable), ConfigError),
        (lambda catalog: catalog.alias("pets", "stable", catalog.entry("pets").routed.route.stable), ConfigError),
    ],
)
def test_wrong_changes_are_refused_and_change_nothing(
    catalog: Catalog, exported: list[str], change: Callable[[Catalog], object], kind: type[PuRayError]
) -> None:
    for uri in exported:
        catalog.add(uri)
    before = catalog.entry("pets")
    with pytest.raises(kind):
        change(catalog)
    assert catalog.entry("pets") == before


@pytest.mark.parametrize("content", ["{", "[]", '{"route": {"stable": "absent"}}', '{"route": {"stabl": "a"}}'])
def test_a_broken_route_is_named(catalog: Catalog, exported: list[str], content: str) -> None:
    catalog.add(exported[0])
    Storage(f"{catalog.uri}/pets").write_bytes("route.json", content.encode())
    with pytest.raises(DataError) as refusal:
        catalog.entries()
    assert str(refusal.value.where).endswith("pets/route.json")


def test_the_route_is_a_file_that_a_person_can_read(catalog: Catalog, exported: list[str]) -> None:
    first = catalog.add(exported[0])
    document = json.loads(Storage(f"{catalog.uri}/pets").read_bytes("route.json"))
    assert document["route"]["stable"] == first.version
