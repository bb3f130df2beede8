"""`pu-ray forget`: a run that never chooses some images again.

They are put on the run's list (`forgotten_list`), which makes the choice and all that came of it out of date, and the
run's copies of their pictures go at once.

Not covered: copies outside of the run's folder (a registry of students, `features.cache_uri`, old versions of objects
in a bucket that keeps them), and the scorer, which may have seen an image among its sample of the lake.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pu_ray import lease, ledger, manifest, schema
from pu_ray.errors import DataError
from pu_ray.lineage import forgotten_list, lookup
from pu_ray.manifest import Manifest
from pu_ray.progress import Progress
from pu_ray.storage import Storage

_REPORT_FILE, _SHEET_FILE, _DRAWN_FILE = "report.html", "audit/sheet.html", "audit/drawn.json"
_MOST_NAMED = 5

# Steps that see the chosen images, by the names under which manifests list their inputs.
_HANG_ON_THE_CHOICE = ("select", "materialise", "soft_labels", "distill", "evaluate")


class Forgetting(BaseModel):
    """What forgetting some images does to a run.

    Attributes:
        run: The run's folder.
        applied: Whether it was done.
        asked: Images that were named.
        already: Of these, forgotten before.
        lake: In the lake.
        selected: In the run's own choice.
        mined: With their bytes in `mined/`, the run's own or a control's.
        controls: In the choice of each control.
        labeled: Ids among the labeled images, which a choice does not touch.
        test: Ids among the test images.
        unknown: Ids that the run has never seen.
        outdated: Artifacts that the next `pu-ray run` makes anew.
        erased: Files that go at once, because they hold or may show one of the images.
        students: Identities of the students that were taught with one of them, by folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    applied: bool
    asked: int
    already: int
    lake: int
    selected: int
    mined: int
    controls: dict[str, int]
    labeled: list[str]
    test: list[str]
    unknown: list[str]
    outdated: list[str]
    erased: list[str]
    students: dict[str, str]


@dataclass(frozen=True)
class _Whereabouts:
    """Where images are in a run; sets of contents."""

    lake: set[bytes]
    selected: dict[str, set[bytes]]
    mined: dict[str, dict[str, set[bytes]]]
    roles: dict[bytes, str]
    test: set[bytes]

    def state(self, sample: bytes) -> str:
        """How the list records it."""
        if any(sample in chosen for chosen in self.selected.values()) or sample in self.with_bytes:
            return "selected"
        return "lake" if sample in self.lake else "unknown"

    @property
    def with_bytes(self) -> set[bytes]:
        """Those whose pixels the run has copied."""
        return {sample for files in self.mined.values() for here in files.values() for sample in here}


def _whereabouts(
    run: Storage, choices: Mapping[str, Storage], samples: Sequence[bytes], progress: Progress
) -> _Whereabouts:
    known = lookup.known_lake(run)
    in_lake: set[bytes] = set()
    if known is not None:
        progress.start(len(known.files), "files")
        for _, part in lookup.find(known.artifact, known.files, samples, [], progress):
            in_lake.update(part[schema.SAMPLE_ID].to_pylist())
    mined = {}
    for name, folder in choices.items():
        artifact = folder.child("mined")
        mined[name] = {
            file: set(part[schema.SAMPLE_ID].to_pylist())
            for file, part in lookup.find(artifact, lookup.data_files(artifact), samples, [])
        }
    return _Whereabouts(
        in_lake,
        {
            name: lookup.among(folder.child("selection"), lookup.SELECTION_FILE, samples)
            for name, folder in choices.items()
        },
        mined,
        lookup.roles_of(run, samples),
        lookup.among(run.child("evaluation"), "answers.parquet", samples),
    )


def forget(
    uri: str, samples: Sequence[bytes], progress: Progress, *, apply: bool, note: Callable[[str], None]
) -> Forgetting:
    """Make a run never choose these images again, and erase the copies that it made of them.

    The list is written first: whatever interrupts what follows, no choice takes them any more, and doing it again
    finishes it.

    Args:
        uri: The run's folder.
        samples: The images.
        progress: Counts the files of the lake's rows.
        apply: False: only say what would happen.
        note: Is told of a wait for another run.

    Raises:
        DataError: There is no run, or it cannot be written.
        ClusterError: A run is at work there.
    """
    run = Storage(uri)
    if (found := lookup.runs_below(uri)) != [run.uri]:
        raise DataError(
            "this is no run's own folder",
            slug="not-one-run",
            where=uri,
            allowed="the output of one job",
            got=f"a folder with runs below it, such as {found[0]}",
            hint="give each of them a command of its own",
        )
    if not apply:
        return _forget(run, samples, progress, apply=False)
    with lease.hold(run, "forget", note=note):
        return _forget(run, samples, progress, apply=True)


def _forget(run: Storage, samples: Sequence[bytes], progress: Progress, *, apply: bool) -> Forgetting:
    before = forgotten_list.read(run)
    # Those of the list are looked for as well: somebody may have been interrupted, or have written it by hand.
    everything = list(dict.fromkeys([*samples, *before]))
    choices = lookup.choices_of(run)
    there = _whereabouts(run, choices, everything, progress)
    # What was recorded once stays: the choices since then were made with it, and are no others for being asked again.
    new = {sample: there.state(sample) for sample in samples if sample not in before}
    digest = forgotten_list.digest_of(before | new)
    documents = {name: _made_from_a_choice(folder) for name, folder in choices.items()}
    prefixes = {name: f"{lookup.CONTROLS}/{name}/" if name else "" for name in choices}
    asked = set(samples)
    students = {
        f"{prefixes[name]}{folder}": made.identity
        for name in choices
        for folder in ("student", "exported")
        if (made := documents[name].get(folder)) is not None
        and (chosen := documents[name].get("selection")) is not None
        if there.selected[name] & asked and lookup.selection_behind(choices[name], made) == chosen.identity
    }
    mined_files = [
        f"{prefixes[name]}mined/{file}" for name in choices for file in there.mined[name] if there.mined[name][file]
    ]
    result = Forgetting(
        run=run.uri,
        applied=apply,
        asked=len(samples),
        already=sum(sample in before for sample in samples),
        lake=len(there.lake & asked),
        selected=len(there.selected[""] & asked),
        mined=len(there.with_bytes & asked),
        controls={name: len(chosen & asked) for name, chosen in there.selected.items() if name},
        labeled=sorted(sample.hex() for sample in asked & set(there.roles)),
        test=sorted(sample.hex() for sample in asked & there.test),
        unknown=[
            sample.hex()
            for sample in samples
            if there.state(sample) == "unknown" and sample not in there.roles and sample not in there.test
        ],
        outdated=[f"{prefixes[name]}{folder}" for name in choices for folder in _outdated(documents[name], digest)],
        erased=mined_files + _pages(run, there, asked),
        students=students,
    )
    if apply:
        if new:
            forgotten_list.add(run, new, result.students)
        for name, folder in choices.items():
            if any(there.mined[name].values()):
                # As for a stage: what is not whole any more is no artifact.
                folder.child("mined").delete(manifest.FILE_NAME)
        for file in result.erased:
            run.delete(file)
    return result


def _made_from_a_choice(folder: Storage) -> dict[str, Manifest]:
    """Artifacts that hang on the choice of images, by folder, in their order."""
    names = lookup.ARTIFACTS[lookup.ARTIFACTS.index("selection") :]
    return {name: document for name in names if (document := manifest.read(folder.child(name))) is not None}


def _outdated(made: Mapping[str, Manifest], digest: str | None) -> list[str]:
    """Folders of what was not made with this list, or was made of something that was not, or is no more.

    Args:
        made: Artifacts that hang on the choice.
        digest: What the list adds to the choice's identity.
    """
    current: dict[str, str] = {}
    outdated = []
    for folder, document in made.items():
        ours = {name: value for name, value in document.inputs.items() if name in _HANG_ON_THE_CHOICE}
        listed = document.stage != "select" or document.inputs.get("forgotten") == digest
        if listed and all(current.get(name) == value for name, value in ours.items()):
            current[document.stage] = document.identity
        else:
            outdated.append(folder)
    return outdated


def _pages(run: Storage, there: _Whereabouts, asked: set[bytes]) -> list[str]:
    """Pages that show one of the images, or may."""
    seen = there.lake | there.with_bytes
    pages = []
    # The report shows the best images that were not chosen, too, and which these are it does not say.
    if seen & asked and run.kind(_REPORT_FILE) == "file":
        pages.append(_REPORT_FILE)
    if run.kind(_SHEET_FILE) == "file" and run.kind(_DRAWN_FILE) == "file":
        drawn = {bytes.fromhex(text) for text in run.read_json(_DRAWN_FILE)["samples"]}
        pages += [_SHEET_FILE] if drawn & seen else []
    return pages


# -- for people --------------------------------------------------------------------------------------------


def render(done: Forgetting, command: str) -> str:
    """What was forgotten, or would be, and what is to be done next; for people.

    Args:
        done: What happened.
        command: The command that does it, for whoever has only looked.
    """
    text = io.StringIO()

    def say(line: str = "") -> None:
        text.write(f"{line}\n")

    images_ = "1 image" if done.asked == 1 else f"{done.asked:,} images"
    say(f"{done.run}: {images_} {'forgotten' if done.applied else 'to forget'}")
    say(f"  in the lake        {done.lake:,}")
    say(f"  selected           {done.selected:,}")
    for name, count in done.controls.items():
        say(f"  control {name:<10} {count:,}")
    say(f"  copied to mined/   {done.mined:,}")
    say(f"  forgotten before   {done.already:,}")
    say(f"  unknown here       {len(done.unknown):,}{_some(done.unknown)}")
    for ids, what in (
        (done.labeled, "labeled images: they go on teaching until you take them out of labeled.uri"),
        (done.test, "test images: students are judged on them until you take them out of test.uri"),
    ):
        if ids:
            say(f"  {len(ids):,} of them are {what}{_some(ids)}")
    will = "" if done.applied else "would be "
    say()
    say(f"{will}out of date: {', '.join(done.outdated) or 'nothing'}")
    say(f"{will}erased at once: {', '.join(_in_short(done.erased)) or 'nothing'}")
    if done.students:
        named = ", ".join(f"{folder} {identity[:16]}" for folder, identity in done.students.items())
        say(f"taught with some of them: {named}")
    say()
    if not done.applied:
        say("Nothing was changed. To do it:")
        say(f"  {command}")
        return text.getvalue().rstrip()
    if done.outdated:
        say("next:")
        say("  pu-ray select JOB.yaml   # the choice and its images without them: minutes, no training")
        say("  pu-ray run JOB.yaml      # students that never saw them; features and scores are kept")
        if any(name.endswith("exported") for name in done.outdated):
            say("Until a new student has passed its gate, exported/ is the old one.")
    if done.lake:
        say("Not forgotten: numbers (in features/ a 12 x 12 thumbnail) of every image in the lake, and what the scorer")
        say("learned. Take the images out of the lake as well, and the next run drops these too.")
    return text.getvalue().rstrip()


def _some(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return f": {', '.join(ids[:_MOST_NAMED])}" + (", ..." if len(ids) > _MOST_NAMED else "")


def _in_short(files: Sequence[str]) -> list[str]:
    """Files of one folder as their number."""
    counted: dict[str, list[str]] = {}
    for file in files:
        counted.setdefault(file.partition(f"/{ledger.DATA_FOLDER}/")[0], []).append(file)
    return [
        f"{len(here):,} file{'' if len(here) == 1 else 's'} of {folder}" if here != [folder] else folder
        for folder, here in counted.items()
    ]
