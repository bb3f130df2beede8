"""pu_ray/audit.py: a sample that a person judges, and a bound that holds."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from artifacts import CLASSES, COUNTS, FACTS, Page, encode, identity_columns, job, picture, png, publish, write_shards
from PIL import Image
from scipy import optimize, stats

from pu_ray import audit, images, manifest, schema
from pu_ray.audit import clopper_pearson, read_answers
from pu_ray.errors import DataError
from pu_ray.storage import Storage

# -- the bound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "trials"), [(1, 2), (1, 40), (20, 40), (187, 200), (199, 200)])
def test_the_ends_are_where_the_binomial_would_just_give_such_a_count(successes, trials, confidence):
    found = clopper_pearson(successes, trials, confidence)

    def solve(tail, miss):
        return optimize.brentq(lambda share: tail(share) - miss, 1e-12, 1 - 1e-12, xtol=1e-14)

    def as_many(share):
        return stats.binom.sf(successes - 1, trials, share)

    def as_few(share):
        return stats.binom.cdf(successes, trials, share)

    miss = 1 - confidence
    assert found.bound == pytest.approx(solve(as_many, miss), abs=1e-9)
    assert found.low == pytest.approx(solve(as_many, miss / 2), abs=1e-9)
    assert found.high == pytest.approx(solve(as_few, miss / 2), abs=1e-9)
    assert found.low < found.bound
    assert (found.value, found.n, found.confidence) == (successes / trials, trials, confidence)


def test_the_ends_of_the_scale_on_paper():
    # All right: share^n = miss. None right: (1 - share)^n = miss.
    all_right, none_right = clopper_pearson(59, 59, 0.95), clopper_pearson(0, 59, 0.95)
    assert all_right.bound == pytest.approx(0.05 ** (1 / 59))
    assert (all_right.low, all_right.high) == (pytest.approx(0.025 ** (1 / 59)), 1.0)
    assert (none_right.bound, none_right.low) == (0.0, 0.0)
    assert none_right.high == pytest.approx(1 - 0.025 ** (1 / 59))


@pytest.mark.parametrize("trials", [7, 30])
def test_the_bound_holds_as_often_as_it_says_whatever_the_truth(trials):
    found = [clopper_pearson(successes, trials, 0.9) for successes in range(trials + 1)]
    for truth in np.linspace(0.01, 0.99, 99):
        probability = stats.binom.pmf(np.arange(trials + 1), trials, truth)
        assert probability[[one.bound <= truth for one in found]].sum() >= 0.9 - 1e-12
        assert probability[[one.low <= truth <= one.high for one in found]].sum() >= 0.9 - 1e-12


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match=rf"need 0 <= successes <= trials .*, got {successes} of {trials}"):
        clopper_pearson(successes, trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        clopper_pearson(1, 2, confidence)


# -- the sample --------------------------------------------------------------------------------------------

IDS = [images.sample_id(bytes([k])) for k in range(100)]


def test_the_sample_depends_on_the_images_and_the_seed_and_not_on_their_order():
    drawn = audit.sample(IDS, 10, seed=0)
    assert len(set(drawn)) == 10
    assert audit.sample(IDS[::-1], 10, seed=0) == drawn
    assert audit.sample(IDS, 10, seed=1) != drawn
    assert audit.sample(IDS, 30, seed=0)[:10] == drawn
    assert sorted(audit.sample(IDS, 1000, seed=0)) == sorted(IDS)


def test_every_image_is_as_likely_at_every_place():
    draws = [audit.sample(IDS[:10], 3, seed) for seed in range(1000)]
    for place in range(3):
        counts = np.unique([IDS.index(drawn[place]) for drawn in draws], return_counts=True)[1]
        assert len(counts) == 10
        assert stats.chisquare(counts).pvalue > 1e-4


# -- answers -----------------------------------------------------------------------------------------------

DRAWN = IDS[:4]


def form(*answers: str, header: str = "number,sample_id,name,predicted_class,correct", between: str = ",") -> bytes:
    lines = [header.replace(",", between)]
    for number, answer in enumerate(answers, start=1):
        lines.append(between.join([str(number), DRAWN[number - 1].hex(), f"{number}.png", "cat", answer]))
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("yes", ["yes", "YES", " Yes ", "y", "1", "true", "TRUE"])
@pytest.mark.parametrize("no", ["no", "No", "n", "0", "false", "FALSE"])
def test_people_say_yes_and_no_in_many_ways(yes, no):
    assert read_answers(form(yes, no, "", yes), DRAWN, "a.csv") == {DRAWN[0]: True, DRAWN[1]: False, DRAWN[3]: True}


def test_what_spreadsheets_make_of_the_form_is_read():
    expected = {DRAWN[0]: True, DRAWN[1]: False}
    plain = form("yes", "no", "", "")
    assert read_answers(plain, DRAWN, "a.csv") == expected
    assert read_answers(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"), DRAWN, "a.csv") == expected
    assert read_answers(plain.replace(b"\n", b"\r"), DRAWN, "a.csv") == expected
    assert read_answers(form("yes", "no", between=";"), DRAWN, "a.csv") == expected
    assert read_answers(form("yes", "no", between="\t"), DRAWN, "a.csv") == expected
    head, *lines = plain.splitlines(keepends=True)
    assert read_answers(head.upper() + b"".join(reversed(lines)) + b"\n,,,,\n", DRAWN, "a.csv") == expected
    quoted = f'correct,note,sample_id\nyes,"two\nlines, and a comma",{DRAWN[0].hex()}\nno,,{DRAWN[1].hex().upper()}\n'
    assert read_answers(quoted.encode(), DRAWN, "a.csv") == expected


@pytest.mark.parametrize(
    ("content", "where", "problem", "allowed", "got"),
    [
        (form("yes", "maybe"), "a.csv, line 3", "this is no answer in column correct", "yes, y, 1", "'maybe'"),
        (form("yes") + b"9,,x.png,cat,yes\n", "a.csv, line 3", "not in the sample", "a sample_id of audit.csv", "''"),
        (form() + b"9," + IDS[9].hex().encode() + b",x,cat,\n", "a.csv, line 2", "not in the sample", "", IDS[9].hex()),
        (form() + b"1,1.2E+31,x,cat,yes\n", "a.csv, line 2", "not in the sample", "", "'1.2E+31'"),
        (
            form("yes") + form("no").partition(b"\n")[2],
            "a.csv, line 3",
            "the same image twice",
            "one line for each",
            "line 2 too",
        ),
        (
            form("yes", header="a,b,c,d,e"),
            "a.csv, line 1",
            "the columns correct, sample_id",
            "number, ",
            "a, b, c, d, e",
        ),
        (b"", "a.csv, line 1", "the columns correct, sample_id", "number, ", "nothing"),
        ("number\ncafé".encode("latin-1"), "a.csv", "not UTF-8 text", "", "decode"),
    ],
)
def test_answers_that_cannot_be_used_name_the_line_what_is_allowed_and_what_is_there(
    content, where, problem, allowed, got
):
    with pytest.raises(DataError) as caught:
        read_answers(content, DRAWN, "a.csv")
    error = caught.value
    assert error.where == where
    assert problem in error.problem
    assert allowed in (error.allowed or "")
    assert got in (error.got or "")


# -- the files ---------------------------------------------------------------------------------------------

HOSTILE = "=<script>alert(1)</script>\"'&"
CHOSEN = [png(k) for k in range(11)] + [encode(picture(11).convert("L"), "JPEG")]


def make(root: Path, classes: list[str] = CLASSES, name: str | None = None) -> Storage:
    """A selection of twelve images in two shards, and their bytes."""
    storage = Storage(f"{root}/run")
    parts = {}
    for shard, part in (("a.parquet", CHOSEN[:7]), ("b.parquet", CHOSEN[7:])):
        count = len(part)
        columns = {
            **identity_columns(part, shard),
            schema.SCORE: pa.array(np.linspace(5, 1, count), pa.float32()),
            schema.PREDICTED: pa.array([k % 2 for k in range(count)], pa.int32()),
            schema.CONFIDENCE: pa.array(np.full(count, 0.9), pa.float32()),
            schema.ORDER: pa.array(range(count), pa.int64()),
            schema.WHY: pa.array(["recall"] * count),
        }
        columns[schema.NAME] = pa.array([name] * count, pa.string())
        parts[shard] = pa.table({**columns, schema.BYTES: pa.array(part, pa.large_binary())}).cast(schema.mined())
    write_shards(storage.child("mined"), parts)
    everything = pa.concat_tables(parts.values()).select(schema.selection().names)
    storage.child("selection").write_table("selection.parquet", everything)
    select(storage, "this one")
    publish(storage.child("scorer"), "fit", counts=COUNTS["fit"], facts={**FACTS["fit"], "classes": classes})
    return storage


def select(storage: Storage, identity: str) -> None:
    publish(storage.child("selection"), "select", counts=COUNTS["select"], facts=FACTS["select"], identity=identity)


def rows_of(storage: Storage) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.child("audit").read_text("audit.csv"), newline="")))


def fill(storage: Storage, answers: list[str], name: str = "audit.csv") -> str:
    """Answer the form as a person would; says where."""
    rows = [row | {"correct": answer} for row, answer in zip(rows_of(storage), answers, strict=True)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, audit.COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    storage.child("audit").write_bytes(name, text.getvalue().encode())
    return f"{storage.uri}/audit/{name}"


def test_the_form_asks_about_images_of_the_selection_in_random_order(tmp_path):
    storage = make(tmp_path)
    drawn = audit.draw(job(tmp_path), storage, 5)
    assert drawn == {
        "drawn": 5,
        "selected": 12,
        "sheet": f"{tmp_path}/run/audit/sheet.html",
        "form": f"{tmp_path}/run/audit/audit.csv",
    }
    rows = rows_of(storage)
    ids = [images.sample_id(content) for content in CHOSEN]
    assert [bytes.fromhex(row["sample_id"]) for row in rows] == audit.sample(ids, 5, 0)
    assert [row["number"] for row in rows] == list("12345")
    assert {row["correct"] for row in rows} == {""}
    for row in rows:
        place = ids.index(bytes.fromhex(row["sample_id"]))
        shard, number = ("a.parquet", place) if place < 7 else ("b.parquet", place - 7)
        assert (row["name"], row["predicted_class"]) == (f"{shard} row {number}", CLASSES[number % 2])


def test_a_small_selection_is_drawn_whole(tmp_path):
    assert audit.draw(job(tmp_path), make(tmp_path), 200)["drawn"] == 12


def test_the_sheet_shows_each_image_beside_its_number_and_asks_nobody_for_anything(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 12)
    page = Page(storage.child("audit").read_text("sheet.html"))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 12
    shown = dict(zip([row["sample_id"] for row in rows_of(storage)], pictures, strict=True))
    for content in CHOSEN:
        kind, encoded = shown[images.sample_id(content).hex()]["src"].split(";base64,")
        assert kind == "data:image/jpeg"
        seen = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").resize((24, 24))
        truth = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)
        assert np.abs(np.asarray(seen, float) - truth).mean() < 12
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert all(
        (attributes.get(name) or "data:").startswith("data:") for _, attributes in page.tags for name in ("src", "href")
    )
    for part in ("12 of 12 selected images", "does it show one of the classes", "cat, dog", "score 5.000"):
        assert part in page.text


def test_names_that_others_chose_are_shown_not_run(tmp_path):
    storage = make(tmp_path, classes=[HOSTILE, "@dog"], name=HOSTILE)
    audit.draw(job(tmp_path, name="job"), storage, 12)
    html = storage.child("audit").read_text("sheet.html")
    page = Page(html)
    assert "<script" not in html
    assert HOSTILE in page.text
    assert {row["name"] for row in rows_of(storage)} == {f"'{HOSTILE}"}
    assert {row["predicted_class"] for row in rows_of(storage)} == {f"'{HOSTILE}", "'@dog"}


def test_drawing_again_changes_nothing_while_nobody_has_answered(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 5)
    before = {file.path: storage.child("audit").read_bytes(file.path) for file in storage.child("audit").list_files()}
    audit.draw(job(tmp_path), storage, 5)
    after = {file.path: storage.child("audit").read_bytes(file.path) for file in storage.child("audit").list_files()}
    assert before == after
    assert audit.draw(job(tmp_path), storage, 6)["drawn"] == 6


@pytest.mark.parametrize("by", ["one answer", "a spreadsheet", "another program"])
def test_a_form_that_somebody_touched_is_never_overwritten(tmp_path, by):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 3)
    folder = storage.child("audit")
    if by == "one answer":
        fill(storage, ["", "no", ""])
    elif by == "a spreadsheet":
        folder.write_bytes("audit.csv", folder.read_bytes("audit.csv").replace(b",", b";"))
    else:
        folder.write_bytes("audit.csv", b"\xff\xfe\0\0 anything")
    before = folder.read_bytes("audit.csv")
    with pytest.raises(DataError) as caught:
        audit.draw(job(tmp_path), storage, 3)
    assert folder.read_bytes("audit.csv") == before
    assert f"pu-ray audit JOB.yaml --answers {folder.uri}/audit.csv" in caught.value.hint
    assert f"move {folder.uri} away" in caught.value.hint


def test_a_published_audit_is_not_drawn_over_even_if_the_form_lay_elsewhere(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 3)
    audit.publish(job(tmp_path), storage, fill(storage, ["yes", "no", "yes"], "copy.csv"))
    with pytest.raises(DataError, match="answers that somebody filled in"):
        audit.draw(job(tmp_path), storage, 3)
    assert manifest.read(storage.child("audit")) is not None


def test_a_chosen_image_that_was_not_copied_is_noticed(tmp_path):
    storage = make(tmp_path)
    mined = storage.child("mined")
    mined.write_table("data/000.parquet", mined.read_table("data/000.parquet").slice(1))
    with pytest.raises(DataError) as caught:
        audit.draw(job(tmp_path), storage, 12)
    assert caught.value.got == "1 of 12 missing"


def test_answers_become_a_bound(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 10)
    published = audit.publish(job(tmp_path), storage, fill(storage, ["yes"] * 9 + ["no"]))
    assert published == manifest.read(storage.child("audit"))
    assert published.counts == {"drawn": 10, "judged": 10, "correct": 9, "unjudged": 0}
    expected = clopper_pearson(9, 10, 0.95)
    assert published.facts["precision"] == {
        "value": 0.9,
        "bound": expected.bound,
        "low": expected.low,
        "high": expected.high,
        "confidence": 0.95,
        "n": 10,
    }
    assert published.inputs["select"] == "this one"
    assert audit.render(published) == (
        f"precision: at least {100 * expected.bound:.2f} %, with confidence 95 %\n"
        f"  9 of 10 judged images are right: 90.00 % ({100 * expected.low:.2f} to {100 * expected.high:.2f})"
    )
    kept = storage.child("audit").read_table("answers.parquet")
    assert kept["correct"].to_pylist() == [True] * 9 + [False]
    assert [one.hex() for one in kept["sample_id"].to_pylist()] == [row["sample_id"] for row in rows_of(storage)]


def test_more_answers_replace_fewer(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 4)
    first = audit.publish(job(tmp_path), storage, fill(storage, ["yes", "yes", "", ""]))
    second = audit.publish(job(tmp_path), storage, fill(storage, ["yes", "yes", "yes", "yes"]))
    assert second.identity != first.identity
    assert second.facts["precision"]["bound"] > first.facts["precision"]["bound"]


@pytest.mark.parametrize(
    ("answers", "in_order", "said"),
    [
        (["yes", "no", "yes", "", ""], True, "2 of 5 are not judged: those judged are the first of a random order"),
        (
            ["yes", "", "yes", "", "no"],
            False,
            "2 of 5 are not judged: the bound holds only if those judged were picked",
        ),
    ],
)
def test_an_unfinished_audit_says_what_its_bound_rests_on(tmp_path, answers, in_order, said):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 5)
    published = audit.publish(job(tmp_path), storage, fill(storage, answers))
    assert published.counts["unjudged"] == 2
    assert published.facts["in_order"] is in_order
    assert published.facts["precision"]["n"] == 3
    assert said in audit.render(published)


def test_an_empty_form_is_no_audit(tmp_path):
    storage = make(tmp_path)
    drawn = audit.draw(job(tmp_path), storage, 5)
    with pytest.raises(DataError) as caught:
        audit.publish(job(tmp_path), storage, drawn["form"])
    assert caught.value.problem == "no image is judged"
    assert caught.value.got == "5 images without an answer"
    assert manifest.read(storage.child("audit")) is None


def test_answers_without_a_sample_name_the_command_that_draws_one(tmp_path):
    with pytest.raises(DataError, match="no sample was drawn yet"):
        audit.publish(job(tmp_path), make(tmp_path), "answers.csv")


def test_answers_about_an_earlier_selection_are_refused(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 3)
    filled = fill(storage, ["yes", "yes", "yes"])
    select(storage, "another one")
    with pytest.raises(DataError) as caught:
        audit.publish(job(tmp_path), storage, filled)
    assert caught.value.problem == "the selection has changed since the sample was drawn"
    assert (caught.value.allowed, caught.value.got) == ("a sample of selection another one", "one of this one")


def test_answers_that_are_not_there_are_named(tmp_path):
    storage = make(tmp_path)
    audit.draw(job(tmp_path), storage, 3)
    with pytest.raises(DataError) as caught:
        audit.publish(job(tmp_path), storage, f"{tmp_path}/absent.csv")
    assert "absent.csv" in caught.value.where
