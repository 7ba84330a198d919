"""Grade a class: every task of every student, on random cases that nobody has seen.

    python notebooks/grade.py submissions/ -o grades.csv
    python notebooks/grade.py submissions/ -o lab.csv --tasks 0 1 --seconds 60 --seed 7

`submissions` has a folder for each student, which holds that student's my_map.py. The table has a
row for each student and task. The columns are

    student     the folder's name
    task        task0, task1, task2, task3
    result      "solved": all tests of the task pass
                "not solved": a test fails
                "not handed in": there is no my_map.py, or no function of the task in it
                "does not run": reading the file fails, or it is not done at the time limit
    sentence    what the first test that fails has to say; the tests that follow are not run
    seed        the number that all random cases were drawn from, the same for the whole class

For all that the checks say to one student, as that student can see it (seed 7, task 1):

    TRILEVEL_MY_MAP=submissions/ann/my_map.py TRILEVEL_GRADE_SEED=7 \\
        python -m pytest -m task1 --tb=short -x tests/test_maps.py

**This runs the students' code, with your rights: do it in a container** (of Linux). A task that is
not done in its time is ended, with all processes it has begun. But no time limit keeps a program
from your files, from leaving the group of processes that is ended (setsid), or from meddling with
the checks beside it: read the hand-ins in which `grep -l "checks\\|test_maps\\|pytest"` finds
something. (And those with `numpy` in them: task 2 forbids loops, and sees those of torch alone.)
"""
import csv
import io
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the five modules are

from evaluate import CommandLine, check_folder_of, named
from search import positive, whole
from search_space import on_signals, stop, write_whole

SETUP = 'failed on setup with "'  # what pytest puts before an error in reading the file
BROKEN = "my_map.py does not run: "  # what tests/test_maps.py says then


def grade(file, task, seconds, seed):
    """One task of one file -> (result, sentence)."""
    if not os.path.isfile(file):
        return "not handed in", f"there is no {file.name}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # not in ours
        command = [sys.executable, "-m", "pytest", ROOT / "tests/test_maps.py", "-m", task, "-x",
                   "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider",
                   "--junitxml=report.xml", "-s"]  # -s: what it prints goes nowhere, not to a disk
        given = {"TRILEVEL_MY_MAP": str(file.resolve()), "TRILEVEL_GRADE_SEED": str(seed),
                 "PYTHONDONTWRITEBYTECODE": "1"}  # nothing lands among the submissions, either
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | given, stdin=nothing, stdout=nothing,
            stderr=nothing, start_new_session=True)  # a group of its own, that can be ended as one
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "does not run", f"not done after {seconds} seconds"
        finally:
            with suppress(OSError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            cases = list(ElementTree.parse(Path(folder, "report.xml")).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            cases = []
        for outcome in (outcome for case in cases for outcome in case):
            if outcome.get("message") != "not promised":  # the one skip that is no cheating
                return in_words(outcome.get("message", ""))
        if cases and process.returncode == 0:
            return "solved", ""
        return "does not run", f"it broke off the tests, with status {process.returncode}"


def in_words(message):
    """A failed test's message, as pytest reports it -> (result, sentence)."""
    first = message.removeprefix(SETUP).removeprefix("Failed: ").split("\n")[0][:300]
    if first.startswith(BROKEN):
        return "does not run", first.removeprefix(BROKEN).removesuffix('"')
    kind, _, sentence = first.partition(": ")
    if kind == "AttributeError" and sentence.startswith("module 'my_map'"):
        return "not handed in", sentence.replace("module 'my_map'", "my_map.py")
    if kind == "NotImplementedError":
        return "not solved", f"not solved yet: {sentence}"
    return "not solved", first.removeprefix("checks.Failed: ")


def cell(text):
    """A name or sentence for a spreadsheet, which must not take it for a formula."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "'" + text if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text


def main(argv=None):
    parser = CommandLine(prog="grade.py", description="Grade a class.")
    add = parser.add_argument
    add("submissions", type=named, metavar="DIR", help="it has a folder for each student")
    add("-o", "--output", metavar="FILE", type=named, default="grades.csv",
        help="where the table is written (default: grades.csv)")
    add("--tasks", type=int, nargs="+", choices=range(4), default=range(4), metavar="N",
        help="which (default: 0 1 2 3)")
    add("--seconds", type=positive, default=300, metavar="N",
        help="limit for a task, of which torch takes some to load (default: 300)")
    add("--seed", type=whole, metavar="N", help="of the random cases (default: any)")
    args = parser.parse_args(argv)
    output, rows = Path(args.output), [("student", "task", "result", "sentence", "seed")]
    seed = secrets.randbelow(10 ** 6) if args.seed is None else args.seed
    with parser.guard(), on_signals(stop):
        try:
            students = sorted(folder for folder in Path(args.submissions).iterdir()
                              if os.path.isdir(folder) and not folder.name.startswith("."))
            if not students:
                raise ValueError(f"{args.submissions} has no folders, one for each student")
            if output.is_dir():
                raise ValueError(f"{output} is a folder: -o names the file to write")
            check_folder_of(output)
            for folder in students:
                for task in (f"task{n}" for n in args.tasks):
                    result, sentence = grade(folder / "my_map.py", task, args.seconds, seed)
                    rows.append((cell(folder.name), task, result, cell(sentence), seed))
                    print(f"{cell(folder.name)}, {task}: {result}", flush=True)
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows(rows)
            write_whole(output, lambda path: path.write_text(table.getvalue(), encoding="utf-8"))
            print(f"seed {seed}: {output}")
        except KeyboardInterrupt as stopped:
            parser.exit(128 + stopped.args[0], f"interrupted; {output} is not written\n")


if __name__ == "__main__":
    main()
