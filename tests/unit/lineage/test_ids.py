"""pu_ray/lineage/ids.py: how a person names images."""

from __future__ import annotations

import pytest

from pu_ray.errors import ConfigError, DataError
from pu_ray.lineage import ids
from tests.unit.lineage.runs import CHOSEN, ONE, TWO, id_of


def test_an_image_is_meant_by_its_id_or_by_its_file(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(CHOSEN[0])
    for text in (str(file), id_of(CHOSEN[0]).hex(), f" {id_of(CHOSEN[0]).hex().upper()} "):
        assert ids.sample_of(text) == id_of(CHOSEN[0])


@pytest.mark.parametrize("text", ["", "/", "abc", "f" * 31, "g" * 32, "/absent.png", "."])
def test_what_is_neither_id_nor_file_is_a_configuration_error(text):
    with pytest.raises(ConfigError) as caught:
        ids.sample_of(text)
    assert caught.value.allowed == "32 hexadecimal digits, or the path or URI of an image"
    assert caught.value.got == text


@pytest.mark.parametrize(
    "text",
    [
        f"{ONE}\n{TWO}\n",
        f'# why\n\n  {ONE}  \n{TWO.upper()}\t# a comment, "quoted\n{ONE}\n',
        f"\ufeff{ONE}\r\n{TWO}\r\n",
        f"{ONE},a.png,cat\n{TWO},b.png,dog\n",
        f'number,sample_id,name,predicted_class,correct\n1,{ONE},\'=a.png,cat,\n2,{TWO},"b, c.png",dog,yes\n',
        f"number;Sample_ID;name\n1;{ONE};x\n2;{TWO};y\n",
        f"{ONE} selected\n{TWO} unknown\n",
    ],
)
def test_lists_come_as_people_and_programs_write_them(text):
    assert [one.hex() for one in ids.read_list(text.encode(), "ids.txt")] == [ONE, TWO]


@pytest.mark.parametrize(
    ("content", "where", "got"),
    [
        (f"{ONE}\n# note\n{TWO[:-1]}\n".encode(), "ids.txt, line 3", repr(TWO[:-1])),
        (f"name,id\na.png,{ONE}\n".encode(), "ids.txt, line 1", "'name'"),
        (f"number,sample_id\n1,{ONE}\n2\n".encode(), "ids.txt, line 3", "''"),
        (b"# nothing but a comment\n", "ids.txt", "none"),
        (b"", "ids.txt", "none"),
        ("é".encode("latin-1"), "ids.txt", "decode"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(content, where, got):
    with pytest.raises(DataError) as caught:
        ids.read_list(content, "ids.txt")
    assert caught.value.where == where
    assert got in (caught.value.got or "")
