"""One exported student for the unit tests of serving."""

from __future__ import annotations

import pytest

from pu_ray.images import Limits
from serving import registry
from serving.predictor import Predictor
from serving.registry import LoadedStudent, Student
from tests.unit.serving.desks import InProcess
from tests.unit.serving.students import write_student


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedStudent:
    """The student `pets`, opened."""
    return registry.load(write_student(tmp_path_factory.mktemp("pets")))


@pytest.fixture(scope="session")
def student(loaded: LoadedStudent) -> Student:
    """The student `pets`, without its network."""
    return loaded.student


@pytest.fixture
def backend(predictor: Predictor) -> InProcess:
    """Answers in this process."""
    return InProcess(predictor)


@pytest.fixture(scope="session")
def predictor(loaded: LoadedStudent) -> Predictor:
    """The student `pets`, ready to answer."""
    return Predictor(loaded, Limits(max_bytes=1_000_000, max_px=10_000))
