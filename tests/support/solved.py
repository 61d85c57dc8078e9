"""Answers of the solver, kept between runs: it gives one program one answer, and tests plan the same models again.

They are kept as long as the solver's version and the code that calls it are the same, one small file for each program,
below .pytest_cache.
"""

import array
import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

import placement.solve.program
from hetero_attn.tools.whole_file import write_whole
from placement.solve.program import Program

KEPT = Path(__file__).resolve().parents[2] / ".pytest_cache" / "solved"
NOTHING = b"nothing"
MOST_KEPT = 20_000  # programs of a machine that has been measured again are not asked for any more


class Solved:
    """Solves a program, or tells what the solver once gave."""

    def __init__(self, kept: Path = KEPT) -> None:
        code = Path(placement.solve.program.__file__).read_bytes()
        self._folder = kept / hashlib.sha256(code + version("scipy").encode()).hexdigest()[:16]
        if kept.exists() and (not self._folder.exists() or sum(1 for _ in self._folder.iterdir()) > MOST_KEPT):
            shutil.rmtree(kept, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._solve, self._known = Program.solve, {}

    def solve(self, program: Program, whole_numbers: bool) -> list[float] | None:
        """As `Program.solve`."""
        key = hashlib.sha256(repr((program, whole_numbers)).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = self._told(self._folder / key, program, whole_numbers)
        found = self._known[key]
        return None if found == NOTHING else array.array("d", found).tolist()

    def _told(self, place: Path, program: Program, whole_numbers: bool) -> bytes:
        if place.exists():
            return place.read_bytes()
        found = self._solve(program, whole_numbers)
        told = NOTHING if found is None else array.array("d", found).tobytes()
        write_whole(place, told)
        return told
