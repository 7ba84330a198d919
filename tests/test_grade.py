"""notebooks/grade.py: hand-ins of every kind. Each that is run takes some seconds to load torch."""
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grade

RIGHT = "def annealed_softmax(z, progress):\n    return (z / 0.01 ** progress).softmax(-1)\n"
# A child that would live on, and megabytes of output; both without end.
ENDLESS = """import os, time
if os.fork() == 0:
    while True:
        open({beats!r}, "a").write(".")
        time.sleep(0.02)
while True:
    print("x" * 10 ** 6)
"""


def hand_in(folder, **files):
    for name, text in files.items():
        (folder / name).mkdir(parents=True)
        if text is not None:
            (folder / name / "my_map.py").write_text(text)


def test_every_kind_of_hand_in(tmp_path, capsys):
    class_, output = tmp_path / "a class", tmp_path / "grades.csv"
    hand_in(class_, **{"Ann Lee": RIGHT, "-rf": RIGHT.replace(" / ", " * "), "=1+1": None,
                       "Zoë 'Z', \"": "def", "two\nlines": "import os\nos._exit(0)"})
    (class_ / "notes.txt").write_text("no student")
    stubs = Path(grade.ROOT, "notebooks/my_map.py").read_bytes()
    grade.main([str(class_), "-o", str(output), "--tasks", "1", "--seed", "7", "--seconds", "120"])
    with open(output, encoding="utf-8", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    found = {name: (row["result"], row["sentence"].split(";")[0]) for name, row in rows.items()}
    assert found == {
        "Ann Lee": ("solved", ""),
        "'-rf": ("not solved", "the maximum of <p, z> + T H(p), T = 0.01 ** progress"),
        "'=1+1": ("not handed in", "there is no my_map.py"),
        "Zoë 'Z', \"": ("does not run", "SyntaxError: invalid syntax (my_map.py, line 1)"),
        r"two\nlines": ("does not run", "it broke off the tests, with status 0")}
    assert {(row["task"], row["seed"]) for row in rows.values()} == {("task1", "7")}
    assert "Ann Lee, task1: solved" in capsys.readouterr().out
    assert Path(grade.ROOT, "notebooks/my_map.py").read_bytes() == stubs
    assert sorted(path.name for path in class_.rglob("*") if path.is_file()) == [
        "my_map.py"] * 4 + ["notes.txt"]  # nothing is left among them


def test_what_has_no_end_is_ended_with_its_children(tmp_path):
    hand_in(tmp_path, endless=ENDLESS.format(beats=str(tmp_path / "beats")))
    (tmp_path / "beats").touch()
    begin = time.monotonic()
    file = tmp_path / "endless/my_map.py"
    assert grade.grade(file, "task1", 8, 0) == ("does not run", "not done after 8 seconds")
    assert time.monotonic() - begin < 16
    size = (tmp_path / "beats").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "beats").stat().st_size == size


def test_an_interruption_leaves_the_table_as_it_was(tmp_path):
    hand_in(tmp_path / "class", first=None, second=ENDLESS.format(beats=str(tmp_path / "beats")))
    (tmp_path / "grades.csv").write_text("of last year")
    command = [sys.executable, grade.__file__, tmp_path / "class", "-o", tmp_path / "grades.csv"]
    with subprocess.Popen([*command, "--tasks", "0"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "first, task0: not handed in\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read().startswith("interrupted; ")
        assert process.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "grades.csv").read_text() == "of last year"
    assert {path.name for path in tmp_path.iterdir()} <= {"class", "grades.csv", "beats"}


@pytest.mark.parametrize("message, result, sentence", [
    ("NotImplementedError: task 1, annealed_softmax", "not solved",
     "not solved yet: task 1, annealed_softmax"),
    ("AttributeError: module 'my_map' has no attribute 'entmax15'", "not handed in",
     "my_map.py has no attribute 'entmax15'"),
    ("checks.Failed: it is off\n  input     1", "not solved", "it is off"),
    ('failed on setup with "Failed: my_map.py does not run: NameError: x"', "does not run",
     "NameError: x"),
    ("Skipped: please", "not solved", "Skipped: please")])
def test_a_result_in_words(message, result, sentence):
    assert grade.in_words(message) == (result, sentence)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "  =1", "＝1"])
def test_a_name_is_no_formula(text):
    assert grade.cell(text) == "'" + text
    assert grade.cell(f"a {text}") == f"a {text}"


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "No such file"), (["none"], "has no folders"), ([""], "the name is empty"),
    (["class", "-o", "none"], "is a folder"), (["class", "-o", "no/x.csv"], "cannot write into"),
    (["class", "--tasks", "7"], "invalid choice"), (["class", "--seconds", "0"], "positive"),
    (["class", "--seed", "-1"], "whole number"), ([], "required: DIR")])
def test_a_wrong_argument_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    hand_in(Path("class"), ann=None)
    with pytest.raises(SystemExit) as stop:
        grade.main(arguments)
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in error and error.startswith("grade.py: error: ")
