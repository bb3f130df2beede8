"""serving/routing.py: which version a request gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serving.routing import Route


def test_the_canary_gets_its_share() -> None:
    route = Route(stable="a", canary="b", canary_share=0.2)
    picked = [route.pick(chance) for chance in np.random.default_rng(0).random(10_000)]
    assert 1800 < picked.count("b") < 2200
    assert Route(stable="a").pick(0.0) == "a"
    assert Route(stable="a", canary="b").pick(0.0) == "a"
    assert Route(stable="a", canary="b", canary_share=1.0).pick(0.999999) == "b"


def test_aliases_name_versions() -> None:
    route = Route(stable="a", canary="b", shadow="c", aliases={"old": "d"})
    assert [route.named(name) for name in ("stable", "canary", "old", "c")] == ["a", "b", "d", "c"]
    assert route.versions == {"a", "b", "c", "d"}
    assert Route(stable="a").named("canary") == "canary"


@pytest.mark.parametrize(
    "wrong",
    [
        {"stable": ""},
        {"canary_share": 0.5},
        {"canary": "a"},
        {"shadow": "a"},
        {"canary": "b", "canary_share": 1.5},
        {"canary": "b", "canary_share": -0.1},
        {"aliases": {"stable": "b"}},
        {"aliases": {"canary": "b"}},
        {"weight": 1},
    ],
)
def test_routes_that_contradict_themselves_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Route(**{"stable": "a"} | wrong)
