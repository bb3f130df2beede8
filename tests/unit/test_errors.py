"""pu_ray/errors.py: every kind says the same thing on both sides of a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from pu_ray import errors
from pu_ray.errors import ClusterError, ConfigError, DataError, GateError, PuRayError


def _all_kinds(kind: type[PuRayError] = PuRayError) -> list[type[PuRayError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _all_kinds(child))]


PARTS = {"where": "lake.uri", "allowed": "a folder", "got": "a file", "hint": "check the path"}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", _all_kinds())
def test_every_kind_survives_pickle_with_message_and_parts(kind, protocol):
    error = kind("the lake is not there", **PARTS)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.as_dict() == PARTS
    assert again.problem == "the lake is not there"
    assert (again.code, again.exit_status) == (kind.code, kind.exit_status)


@pytest.mark.parametrize("kind", _all_kinds())
def test_parts_that_were_not_given_stay_absent_after_pickle_and_copy(kind):
    error = kind("broken")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
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


def test_codes_and_exit_statuses_tell_the_kinds_apart():
    kinds = _all_kinds()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert len({kind.exit_status for kind in kinds}) == len(kinds)
    assert 0 not in {kind.exit_status for kind in kinds}


def test_the_message_says_where_what_is_allowed_what_was_got_and_what_to_do_in_that_order():
    error = DataError("the image is broken", where="s3://bucket/x.png", allowed="a PNG", got="HTML", hint="remove it")
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
    assert str(ConfigError("broken", **parts)) == expected


def test_every_kind_is_caught_as_the_one_base_class():
    for kind in _all_kinds():
        with pytest.raises(PuRayError):
            raise kind("broken")
