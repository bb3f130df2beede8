"""pu_ray/errors.py: every kind says the same thing on both sides of a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from pu_ray import errors
from pu_ray.errors import ClusterError, ConfigError, DataError, GateError, PuRayError, RefusedSetting, wrong_setting


def _all_kinds(kind: type[PuRayError] = PuRayError) -> list[type[PuRayError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _all_kinds(child))]


SLUG = "not-there"
PARTS = {"where": "lake.uri", "allowed": "a folder", "got": "a file", "hint": "check the path"}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", _all_kinds())
def test_every_kind_survives_pickle_with_message_and_parts(kind, protocol):
    error = kind("the lake is not there", slug=SLUG, **PARTS)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.as_dict() == PARTS
    assert again.problem == "the lake is not there"
    assert (again.code, again.kind, again.exit_status) == (f"{kind.kind}/not-there", kind.kind, kind.exit_status)


@pytest.mark.parametrize("kind", _all_kinds())
def test_parts_that_were_not_given_stay_absent_after_pickle_and_copy(kind):
    error = kind("broken", slug=SLUG)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert again.code == error.code
        assert str(again) == "broken"
        assert set(again.as_dict().values()) == {None}


def test_exit_statuses_are_those_of_the_design():
    assert {kind: kind.exit_status for kind in (ConfigError, DataError, ClusterError, GateError)} == {
        ConfigError: 2,
        DataError: 3,
        ClusterError: 4,
        GateError: 5,
    }
    assert errors.INTERRUPTED_EXIT_STATUS == 130


@pytest.mark.parametrize("kind", _all_kinds())
def test_no_error_is_made_without_a_code(kind):
    with pytest.raises(TypeError, match="slug"):
        kind("broken", **PARTS)


@pytest.mark.parametrize("kind", _all_kinds())
def test_an_error_that_is_told_of_another_place_stays_what_it_is(kind):
    error = kind("the lake is not there", slug=SLUG, **PARTS)
    moved = error.at("elsewhere")
    assert type(moved) is kind
    assert (moved.code, moved.problem) == (error.code, error.problem)
    assert moved.as_dict() == PARTS | {"where": "elsewhere"}
    assert error.where == PARTS["where"]


def test_kinds_and_exit_statuses_tell_the_kinds_apart():
    kinds = _all_kinds()
    assert len({kind.kind for kind in kinds}) == len(kinds)
    assert len({kind.exit_status for kind in kinds}) == len(kinds)
    assert 0 not in {kind.exit_status for kind in kinds}


def test_the_message_says_where_what_is_allowed_what_was_got_and_what_to_do_in_that_order():
    error = DataError(
        "the image is broken", slug=SLUG, where="s3://bucket/x.png", allowed="a PNG", got="HTML", hint="remove it"
    )
    assert str(error).splitlines() == [
        "s3://bucket/x.png: the image is broken",
        "  allowed: a PNG",
        "  got: HTML",
        "  what to do: remove it",
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "broken"),
        ({"where": "here"}, "here: broken"),
        ({"got": ""}, "broken\n  got: "),  # an empty answer is an answer
        ({"hint": "mend it"}, "broken\n  what to do: mend it"),
    ],
)
def test_the_message_leaves_out_only_what_was_not_given(parts, expected):
    assert str(ConfigError("broken", slug=SLUG, **parts)) == expected


def test_every_kind_is_caught_as_the_one_base_class():
    for kind in _all_kinds():
        with pytest.raises(PuRayError):
            raise kind("broken", slug=SLUG)


# -- settings ----------------------------------------------------------------------------------------------


class Range(BaseModel):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _in_order(self):
        if self.low > self.high:
            raise RefusedSetting(f"low ({self.low}) must not exceed high ({self.high})", slug="range-out-of-order")
        return self


def _found(**values):
    with pytest.raises(ValidationError) as caught:
        Range(**values)
    return caught.value.errors()[0]


def test_what_a_validator_refuses_keeps_its_code_and_its_words():
    error = wrong_setting(_found(low=2), where="range", got="2")
    assert (type(error), error.code, error.where, error.got) == (ConfigError, "config/range-out-of-order", "range", "2")
    assert error.problem == "low (2) must not exceed high (1)"


def test_what_pydantic_refuses_is_an_invalid_value():
    error = wrong_setting(_found(low="much"), where="range.low", allowed="a number")
    assert (error.code, error.where, error.allowed) == ("config/invalid-value", "range.low", "a number")
    assert "valid integer" in error.problem


def test_a_refused_setting_survives_pickle():
    again = pickle.loads(pickle.dumps(RefusedSetting("low exceeds high", slug="range-out-of-order")))
    assert (type(again), str(again), again.slug) == (RefusedSetting, "low exceeds high", "range-out-of-order")
