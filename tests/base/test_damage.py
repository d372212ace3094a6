"""Every kind of file that fewstep writes, damaged in many ways: found, or made again, and never used."""

from __future__ import annotations

import functools
import shutil

import pytest

from every_file import KINDS, damages

SLOW = {"tuned recipe", "search", "teacher", "training", "distilling", "log"}

pytestmark = pytest.mark.usefixtures("few_real_samples")

EVERY = [
    pytest.param(kind, id=kind.name, marks=pytest.mark.slow if kind.name in SLOW else ())
    for kind in KINDS
]


class Copies:
    """The files of a kind, and copies of them in folders of one name."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.files = kind.made(folder / "first")
        if kind.costly:  # of each type of file one
            self.files = list({file.suffix: file for file in self.files}.values())
        self.whole = kind.read(self.fresh())

    def fresh(self):
        shutil.rmtree(self.folder / "copy", ignore_errors=True)
        return shutil.copytree(self.folder / "first", self.folder / "copy")

    def defect(self, folder, file, what):
        """Returns what is wrong with reading a folder with a damaged file."""
        try:
            got = self.kind.read(folder)
        except ValueError as error:
            if self.kind.again:
                return f"{file}, {what}, stops: {error}"
            named = str(folder) in str(error) and file.name in str(error)
            return None if named or what in ("missing", OTHER) else f"{what} not named: {error}"
        return None if got == self.whole else f"{file}, {what}: used"


OTHER = "of another"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return functools.cache(lambda kind: Copies(kind, tmp_path_factory.mktemp("kind")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EVERY)
def test_no_damage_is_used(kind, copies):
    made = copies(kind)
    defects = []
    for file in made.files:
        content = (made.folder / "first" / file).read_bytes()
        every = list(damages(content, file.name, bits=1 if kind.costly else 6, kind=kind))
        for what, damaged in every[:: 6 if kind.costly else 1]:
            folder = made.fresh()
            if damaged is None:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(damaged)
            defects.append(made.defect(folder, file, what))
    assert [defect for defect in defects if defect] == []


@pytest.mark.parametrize("kind", [p for p in EVERY if not p.values[0].costly])
def test_swapped_files_are_not_used(kind, copies):
    made, last, defects = copies(kind), {}, []
    for file in made.files:
        before = last.get((file.parent, file.suffix))
        last[file.parent, file.suffix] = file
        if before is not None:
            folder = made.fresh()
            (folder / file).rename(folder / "aside")
            (folder / before).rename(folder / file)
            (folder / "aside").rename(folder / before)
            defects.append(made.defect(folder, file, OTHER))
    assert [defect for defect in defects if defect] == []


@pytest.mark.parametrize("kind", [p for p in EVERY if p.values[0].other is not None])
def test_files_of_another_run_are_not_used(kind, copies, tmp_path):
    made, defects = copies(kind), []
    kind.other(tmp_path)
    for file in made.files:
        if (tmp_path / file).exists():
            folder = made.fresh()
            shutil.copy(tmp_path / file, folder / file)
            defects.append(made.defect(folder, file, OTHER))
    assert [defect for defect in defects if defect] == []
