"""Nothing costs a user work, or gives a wrong number silently.

Kills, full disks, divergence, rubbish, hostile files.
"""
import argparse
import csv
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import chance
import claims
import evaluate
import field
import networks
import search
from evaluate import dead_leaves, load_photos
from search_space import load_tensors
from test_search import TINY, photos, run, same_results  # noqa: F401 (photos is a fixture)

ROOT = Path(search.__file__).parent


def refused(main, *arguments) -> str:
    """Status 2 and one line: the line."""
    err, old = io.StringIO(), sys.stderr
    sys.stderr = err
    try:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
    finally:
        sys.stderr = old
    assert stop.value.code == 2, err.getvalue()
    *_, last = err.getvalue().strip().splitlines()
    assert last.startswith(f"{main.__module__}.py: error: ")
    assert "Traceback" not in err.getvalue()
    return last


# --- Kills ----------------------------------------------------------------------------------------

# Imports once; then each attempt is a child of its own, killed after a random time.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import search
search.SAVE_SECONDS = 0  # a checkpoint after every step

def attempt(options, out, delay=None):  # -> seconds to the first checkpoint and to the end, status
    begun, child, ready = time.time(), os.fork(), None
    if child == 0:
        search.main([*options, "--out", str(out)])
        os._exit(0)
    while delay is None or time.time() - begun < delay:
        done, status = os.waitpid(child, os.WNOHANG)
        ready = ready or (out / "checkpoint.pt").exists() and time.time() - begun
        if done:
            return ready, time.time() - begun, status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return ready, delay, os.waitpid(child, 0)[1]

options, straight, out = {options!r}, Path({straight!r}), Path({out!r})
ready, whole, status = attempt(options, straight)
assert status == 0
rng, killed, tried = random.Random(0), 0, 0
while killed < 20:
    tried += 1  # ever more patience, should the machine have become slow
    begun = any((out / name).exists() for name in search.CHECKPOINTS)
    patience = 0.02 * tried * whole * (not begun)
    delay = 0.9 * ready + rng.uniform(0, 0.2) * (whole - ready) + patience
    _, _, status = attempt(["--resume"] if begun else options, out, delay)
    assert status in (0, signal.SIGKILL), status
    if status == 0:  # it came to its end: from now on kill earlier
        ready, whole = 0.7 * ready, 0.7 * whole
    killed += begun and status != 0
assert attempt(["--resume"], out)[-1] == 0
"""


def test_twenty_kills_change_no_bit(tmp_path, photos):
    options = [*TINY, "--data", str(photos), "--budget", "2G", "--seed", "3", "--search", "30",
               "--steps", "60"]
    script = KILLER.format(root=str(ROOT), options=options, straight=str(tmp_path / "straight"),
                           out=str(tmp_path / "killed"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            timeout=600, env=os.environ | {  # (who has met CUDA may not fork)
                                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-3000:]
    same_results(tmp_path / "straight", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_is_begun_anew(tmp_path, photos):
    straight, out = tmp_path / "straight", tmp_path / "killed"
    run(straight, "--data", photos, "--budget", "2G")
    out.mkdir()
    for name in ".settings.part.json", ".checkpoint.part.pt":
        (out / name).write_text("half of")
    (out / "settings.json").write_text((straight / "settings.json").read_text())
    assert "no run to resume" in refused(search.main, "--resume", "--out", out)
    same_results(straight, run(out, "--data", photos, "--budget", "2G"))


def test_settings_of_somebody_else_are_not_written_over(tmp_path, photos):
    (tmp_path / "settings.json").write_text('{"mine": "years of work"}')
    line = refused(search.main, *TINY, "--data", photos, "--budget", "2G", "--out", tmp_path)
    assert "is not empty" in line
    assert "years of work" in (tmp_path / "settings.json").read_text()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, photos, capsys, monkeypatch):
    straight, out = (run(tmp_path / name, "--data", photos, "--budget", "2G") for name in "ab")
    newest, before = (out / name for name in search.CHECKPOINTS)
    whole = newest.read_bytes()
    for damage in whole[:-1000], whole[:100], b"", whole[:5000] + bytes(5000) + whole[10000:]:
        newest.write_bytes(damage)
        keep = before.read_bytes()

        def full(descriptor):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch:  # full at the next save: the sound one is still there
            patch.setattr(os, "fsync", full)
            assert "No space left" in refused(search.main, "--resume", "--out", out)
        assert before.read_bytes() == keep and (out / search.DAMAGED).read_bytes() == damage
        newest.write_bytes(damage)
        capsys.readouterr()
        search.main(["--resume", "--out", str(out)])
        assert "checkpoint.pt is missing or damaged" in capsys.readouterr().err
        same_results(straight, out)
        assert before.read_bytes() == keep
    (out / search.DAMAGED).unlink()
    newest.unlink()  # killed between two renames
    search.main(["--resume", "--out", str(out)])
    same_results(straight, out)
    for path in newest, before:
        path.write_bytes(b"rubbish")
    assert "no checkpoint in" in refused(search.main, "--resume", "--out", out)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0.0, 1.5])  # while pictures are made, and later
def test_signals_end_in_one_line(tmp_path, number, status, seconds):
    # The first line tells when Python has done importing; a signal before that is Python's own
    # affair.
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import search; "
            "print('ready', flush=True); search.main()")
    command = [sys.executable, "-c", code, *TINY, "--out", str(tmp_path / "a"), "--steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.3 + seconds)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in error
    assert "interrupted" in error.splitlines()[-1]
    if (tmp_path / "a" / "checkpoint.pt").exists():
        assert "go on with: python search.py --resume --out" in error


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_terminal_that_closes_ends_a_run_whole(tmp_path, photos, monkeypatch, name):
    step = search.Run.training_step
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # (nohup may have started the tests)

    def hang_up(self):
        step(self)
        if self.step == 10:
            os.kill(os.getpid(), getattr(signal, name))
    monkeypatch.setattr(search.Run, "training_step", hang_up)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--data", photos, "--budget", "2G")
    assert stop.value.code == 128 + getattr(signal, name)
    assert load_tensors(tmp_path / "a" / "checkpoint.pt")["step"] == 11
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        monkeypatch.setattr(search.Run, "training_step", lambda self: os.kill(os.getpid(),
                                                                               signal.SIGHUP))
        monkeypatch.setattr(search.Run, "finish", lambda self: None)
        run(tmp_path / "b", "--data", photos, "--budget", "2G")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("phase", ["load_data", "Run", "resumed"])
def test_a_signal_that_is_overheard_is_heeded_by_the_next_phase(tmp_path, photos, monkeypatch,
                                                                phase, capsys):
    """The exception of a handler is lost where Python ignores exceptions, as in `__del__`."""
    class Overhears:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
    if phase == "resumed":
        run(tmp_path / "a", "--data", photos, "--budget", "2G")
    action = getattr(search, phase)

    def deaf(*args):
        monkeypatch.setattr("sys.unraisablehook", lambda _: None)
        Overhears()
        return action(*args)
    monkeypatch.setattr(search, phase, deaf)
    options = ["--resume"] if phase == "resumed" else [*TINY, "--data", str(photos), "--budget",
                                                       "2G", "--steps", "100000"]
    with pytest.raises(SystemExit) as stop:
        search.main([*options, "--out", str(tmp_path / "a")])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err


# --- Processes ------------------------------------------------------------------------------------

def test_one_run_in_a_folder(tmp_path, photos, monkeypatch, capsys):
    """Another process is at work there, from its first moment on; killed, it leaves no lock."""
    import fcntl
    out = tmp_path / "a"
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import search\n"
            "search.Run.save = lambda self: (print('there', flush=True), input())\nsearch.main()")
    other = subprocess.Popen([sys.executable, "-c", code, *TINY, "--out", str(out), "--data",
                              str(photos), "--budget", "2G"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    before = sorted(out.iterdir())
    for more in [*TINY, "--data", photos, "--budget", "2G", "--seed", 2], ["--resume"]:
        assert "another process is at work" in refused(search.main, *more, "--out", out)
    assert sorted(out.iterdir()) == before
    other.kill()
    other.wait()
    run(out, "--data", photos, "--budget", "2G")
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "another process is at work" in refused(search.main, "--resume", "--out", out)
    os.close(descriptor)
    with monkeypatch.context() as patch:  # where a file system has no locks, runs go on
        def without(*args):
            raise OSError(37, "No locks available")
        patch.setattr(fcntl, "flock", without)
        search.main(["--resume", "--out", str(out)])
    refused(search.main, "--scale", 2, "--steps", 2, "--search", 5, "--out", tmp_path / "b/c/d")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("variables, status, words", [
    (dict(RANK="1"), 0, "of the budget of"), (dict(RANK="x", WORLD_SIZE="1"), 0, "of the budget"),
    (dict(LOCAL_RANK="abc"), 0, "of the budget"),
    (dict(WORLD_SIZE="two"), 2, "WORLD_SIZE='two'"), (dict(WORLD_SIZE="0"), 2, "WORLD_SIZE='0'"),
    (dict(WORLD_SIZE="2"), 2, "RANK=''"), (dict(WORLD_SIZE="2", RANK="-1"), 2, "RANK='-1'"),
    (dict(WORLD_SIZE="2", RANK="2"), 2, "RANK='2'"),
    (dict(WORLD_SIZE="2", RANK="0"), 2, "MASTER_ADDR")])
def test_what_the_environment_says_of_processes(tmp_path, photos, monkeypatch, capsys, variables,
                                                status, words):
    for name in "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT":
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(search, "WORLD", 1)  # (what `main` makes of it is undone behind the test)
    if status == 0:
        run(tmp_path / "a", "--data", photos, "--budget", "2G")
        assert words in capsys.readouterr().out and (tmp_path / "a/network.pt").exists()
    else:
        assert words in refused(search.main, *TINY, "--data", photos, "--budget", "2G", "--out",
                                tmp_path / "a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_processes_is_said_and_can_be_stopped(tmp_path, photos, number):
    import socket
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    waiting = subprocess.Popen(
        [sys.executable, str(ROOT / "search.py"), *TINY, "--data", str(photos), "--budget", "2G",
         "--out", str(tmp_path / "a")], stderr=subprocess.PIPE, text=True,
        env=os.environ | dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    line = waiting.stderr.readline()
    assert "process 0 waits for all 2" in line and port in line
    waiting.send_signal(number)
    error = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 128 + number and error == "interrupted; nothing was begun\n"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("options, message", [
    ("", "--benchmark"), ("--benchmark {photos} --seeds 0", "whole number"),
    ("--benchmark {photos} --workers -1", "whole number"),
    ("--benchmark {photos} --seeds many", "whole number"),
    ("--benchmark nowhere", "is not a folder"),
    ("--benchmark {photos} --data nowhere", "is not a folder"),
    ("--benchmark {photos} --budget 1", "no network was found"),
    ("--benchmark {photos} --resume", "--resume"),
    ("--benchmark {photos} --out nowhere/a.md", "nowhere"),
    ("--benchmark {photos} --steps 5 --search 9", "must be more than")])
def test_bad_options_of_the_comparison_with_chance(tmp_path, photos, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(chance.main, *options.format(photos=photos).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, message", [
    ("--data {photos} --benchmark nowhere --out a.csv", "nowhere is not a folder"),
    ("--data nowhere --benchmark {photos} --out a.csv", "nowhere is not a folder"),
    ("--data {photos} --benchmark {photos} --out no/a.csv", "cannot write into the folder no"),
    ("--data {photos} --benchmark {photos} --out {mine}", "is another table"),
    ("--data {photos} --benchmark {photos} --out a.json", "must end in .csv"),
    ("--data {photos} --benchmark {photos} --out a.csv --workers 0", "whole number"),
    ("--benchmark {photos} --out a.csv", "--data")])
@pytest.mark.parametrize("main", [networks.main, field.main, claims.main],
                         ids=lambda main: main.__module__)
def test_bad_options_of_the_tables_of_trainings(tmp_path, photos, main, options, message,
                                                monkeypatch):
    shipped = ROOT / "notebooks" / "results" / "x2-12G"
    monkeypatch.chdir(tmp_path)
    (mine := tmp_path / "mine.csv").write_text("name,marks\nann,3\n")
    given = options.format(photos=photos, mine=mine).split()
    assert message in refused(main, *[shipped] * (main == field.main), *given)
    assert [*tmp_path.iterdir()] == [mine]


def test_a_table_of_trainings_goes_on_only_as_it_was_begun(tmp_path, photos, monkeypatch):
    """Rows of two trainings in one table would be compared as if they were of one."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    args = argparse.Namespace(data=str(photos), benchmark=[photos], out=tmp_path / "t.csv")
    for steps in 40, 50, 50:  # before there is a table all may change
        args.steps = steps
        networks.prepare(args, 2, "--search", 20)
    args.out.write_text("a table")
    networks.prepare(args, 2, "--search", 20)
    args.steps, before = 40, {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in {}, dict(found="another network"):
        with pytest.raises(ValueError, match="t.csv was begun with another steps"):
            networks.prepare(args, 2, "--search", 20, **more)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options, message", [
    ("--rounds 0", "whole number"), ("--rounds x", "whole number"), ("--parts tea", "tea"),
    ("--out nowhere/a.md", "nowhere"), ("--data nowhere", "--data"), ("--resume", "--resume"),
    ("--budget banana", "budget"), ("--device toaster", "toaster")])
def test_bad_options_of_the_benchmark_of_speed(tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(benchmark.main, *options.split())
    assert not list(tmp_path.iterdir())


# --- Terminals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ["sparsestmax", "search_space"])
def test_a_reader_that_has_seen_enough(module):
    code = ("import subprocess, sys; p = subprocess.Popen([sys.executable, *sys.argv[1:]], "
            "stdout=subprocess.PIPE); p.stdout.read(1); p.stdout.close(); sys.exit(p.wait())")
    done = subprocess.run([sys.executable, "-c", code, "-u", str(ROOT / f"{module}.py")],
                          capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.returncode == 0


def test_names_that_a_terminal_cannot_print(tmp_path, finished):
    folder = tmp_path / "ü"
    folder.mkdir()
    Image.fromarray(dead_leaves(64, np.random.default_rng(0))).save(folder / "ä\udcff.png")
    for options in ["--benchmark", folder], ["--upscale", folder / "ä\udcff.png", "-o",
                                             folder / "ö.png"]:
        done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), str(finished),
                               *map(str, options)], capture_output=True,
                              env=os.environ | dict(PYTHONIOENCODING="ascii"))
        assert done.returncode == 0 and b"\\xfc" in done.stdout, done.stderr
    (finished / "benchmark.json").unlink()


def test_a_run_ends_with_its_network_whatever_matplotlib_lacks(tmp_path, photos, monkeypatch,
                                                               capsys):
    def fail(*args, **options):
        raise RuntimeError("latex could not be found")
    for owner, name in ((search, "draw_levels"), (search, "draw_architecture"),
                        (search, "sample_photo")):
        monkeypatch.setattr(owner, name, fail)
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")
    text, notes = capsys.readouterr()
    assert "of the budget of" in text and (out / "network.pt").exists()
    for what in "levels.png", "architecture.png", "table of quality":
        assert f"note: no {what}: latex could not be found" in notes
    assert json.loads((out / "results.json").read_text())["sample"] == {}
    import compare
    assert compare.read_run(out)


# --- Disks ----------------------------------------------------------------------------------------

def test_a_full_disk_is_one_line_and_spares_what_was_saved(tmp_path, photos):
    out = tmp_path / "a"
    command = [sys.executable, str(ROOT / "search.py")]
    short = subprocess.run([*command, *TINY, "--out", str(out), "--data", str(photos),
                            "--budget", "2G"], capture_output=True)
    assert short.returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for limit in 1000, len(before["checkpoint.pt"]) // 2:  # bytes that a file may have at most
        full = subprocess.run(
            [*command, "--resume", "--out", str(out)], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert full.returncode == 2 and "Traceback" not in full.stderr
        last = full.stderr.splitlines()[-1]
        assert "File too large" in last and "--resume" in last
        for name in ("checkpoint.pt", "checkpoint.before.pt", "network.pt", "architecture.json",
                     "settings.json"):
            assert (out / name).read_bytes() == before[name]
        assert not list(out.glob(".*"))  # no halves


def test_folders_that_cannot_be_written_or_vanish(tmp_path, photos, monkeypatch):
    options = [*TINY, "--data", photos, "--budget", "2G"]
    assert "error" in refused(search.main, *options, "--out", "/proc/nowhere/run")
    (tmp_path / "file").touch()
    assert "is a file" in refused(search.main, *TINY, "--out", tmp_path / "file")
    out, step = tmp_path / "a", search.Run.training_step

    def vanish(self):
        step(self)
        shutil.rmtree(out, ignore_errors=True)
    monkeypatch.setattr(search.Run, "training_step", vanish)
    assert "No such file" in refused(search.main, *options, "--out", out)
    monkeypatch.undo()
    data = shutil.copytree(photos, tmp_path / "data")
    run(out, "--data", data, "--budget", "2G")
    shutil.rmtree(data)
    assert "data is not a folder" in refused(search.main, "--resume", "--out", out)


# --- Divergence -----------------------------------------------------------------------------------

@pytest.mark.parametrize("at, who", [(2, "supernet's weights"), (5, "supernet's logits"),
                                     (18, "found network's weights")])
def test_a_bad_loss_is_not_learned_from(tmp_path, photos, monkeypatch, capsys, at, who):
    """The at-th batch holds one NaN: back to the checkpoint, half the rate, and a good end."""
    monkeypatch.setattr(search, "SAVE_SECONDS", 0)
    batch, calls = search.Patches.batch, []

    def poisoned(self, *args):
        lr, hr = batch(self, *args)
        calls.append(0)
        if len(calls) == at:
            hr = hr.clone()
            hr[0, 0, 0, 0] = torch.nan
        return lr, hr
    monkeypatch.setattr(search.Patches, "batch", poisoned)
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")
    error = capsys.readouterr().err
    assert f"the loss of the {who} is nan: back to step" in error
    assert "half the learning rate" in error
    assert json.loads((out / "results.json").read_text())["halvings"] == 1
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert "nan" not in (out / "history.csv").read_text()


@pytest.mark.parametrize("at, steps", [(10, 5000), (13, 14)])  # in the middle, and the last step
def test_a_signal_beside_a_bad_loss_is_heeded(tmp_path, photos, monkeypatch, capsys, at, steps):
    """The step in which SIGTERM comes has a loss that is no number.

    There is nothing to save, and still the run ends.
    """
    loss = search.Run.loss

    def ill_fated(self, *args):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args) * (torch.nan if self.step == at else 1)
    monkeypatch.setattr(search.Run, "loss", ill_fated)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--data", photos, "--budget", "2G", "--steps", steps)
    assert stop.value.code == 143 and "go on with" in capsys.readouterr().err
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"] < at
    assert not (tmp_path / "a" / "network.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."),
                                   torch.AcceleratorError("CUDA error: out of memory"),
                                   PermissionError(13, "Permission denied")])
def test_what_says_nothing_against_a_checkpoint_leaves_it(tmp_path, photos, monkeypatch, error):
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")

    def fail(*args):
        raise error
    monkeypatch.setattr(search, "load_tensors", fail)
    files = {path: path.read_bytes() for path in out.iterdir()}
    assert "damaged" not in refused(search.main, "--resume", "--out", out)
    assert files == {path: path.read_bytes() for path in out.iterdir()}


def test_only_memory_is_out_of_memory():
    for text in ("CUDA error: an illegal memory access was encountered",
                 "unsupported memory format option Preserve"):
        with pytest.raises(RuntimeError, match=text):
            evaluate.out_of_memory(RuntimeError(text))
    for text in ("CUDA error: out of memory",
                 "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert "out of memory" in evaluate.out_of_memory(RuntimeError(text))


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    for more in [], ["--resume"]:
        refused(search.main, *more, "--out", tmp_path / ("a" * 300))


def test_memory_that_does_not_suffice_is_one_line(tmp_path, photos, finished, monkeypatch):
    def greedy(self, *args):
        return torch.empty(2 ** 60, dtype=torch.uint8)
    monkeypatch.setattr(search.Run, "loss", greedy)
    line = refused(search.main, *TINY, "--data", photos, "--budget", "2G", "--out", tmp_path / "a")
    assert "smaller --batch or --patch" in line
    for error in MemoryError(), torch.OutOfMemoryError("CUDA out of memory."):
        def fail(*args, **options):
            raise error
        monkeypatch.setattr(evaluate, "super_resolve", fail)
        assert "out of memory" in refused(evaluate.main, finished, "--benchmark", photos)


def test_a_run_that_keeps_diverging_gives_up(tmp_path, photos, monkeypatch):
    loss = search.Run.loss

    def ill_fated(self, *args):
        return loss(self, *args) * (torch.inf if self.step > 9 else 1)
    monkeypatch.setattr(search.Run, "loss", ill_fated)
    line = refused(search.main, *TINY, "--data", photos, "--budget", "2G", "--out", tmp_path / "a")
    assert "step 10: the loss of the found network's weights is inf" in line
    assert "3 times" in line and "lower --rate" in line
    state = load_tensors(tmp_path / "a" / "checkpoint.pt")
    tensors = (state.get("network") or state["supernet"]).values()
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_a_bad_step_leaves_everything_as_it_was(tmp_path, photos):
    from test_search import make_run
    made = make_run(photos, tmp_path)
    made.search_step(0.5)
    before = [p.detach().clone() for p in made.supernet.parameters()]

    def broken(*args):
        return made.supernet.head.weight.sum() * torch.nan + made.supernet.gamma.sum()
    made.loss = broken
    made.search_step(0.5)
    assert all(torch.equal(p, b) for p, b in zip(made.supernet.parameters(), before))
    with pytest.raises(FloatingPointError):
        made.save()


# --- Rubbish among the photographs ----------------------------------------------------------------

def png(width, height, rows=b"") -> bytes:
    """A PNG file that claims a size."""
    def chunk(name, data):
        length, check = len(data).to_bytes(4, "big"), zlib.crc32(name + data).to_bytes(4, "big")
        return length + name + data + check
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def fill_with_rubbish(folder: Path, count: int) -> list[str]:
    """`count` or more mutilated and odd files; returns the names of those that are sound."""
    rng, folder = random.Random(0), Path(folder)
    picture = Image.fromarray(dead_leaves(64, np.random.default_rng(0)))
    sound, encoded = [], {}
    for ending, options in (("png", {}), ("jpg", dict(quality=90)), ("webp", dict(quality=80)),
                            ("bmp", {})):
        buffer = io.BytesIO()
        picture.save(buffer, {"jpg": "JPEG"}.get(ending, ending.upper()), **options)
        encoded[ending] = buffer.getvalue()

    def keep(name, image, **options):
        image.save(folder / name, **options)
        sound.append(name)
    keep("a name with spaces.png", picture)
    keep("größe 写真.png", picture)
    keep("palette.png", picture.quantize(16))
    keep("cmyk.jpg", picture.convert("CMYK"))
    keep("grey.png", picture.convert("L"))
    keep("alpha.png", picture.convert("RGBA"))
    keep("bilevel.png", picture.convert("1"))
    keep("sixteen.png", Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257))
    keep("animated.png", picture, save_all=True, append_images=[picture.rotate(90)])
    keep("animated.webp", picture, save_all=True, append_images=[picture.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways
    keep("rotated.jpg", picture.crop((0, 0, 64, 48)), exif=exif, quality=95)
    (folder / "really a jpeg.png").write_bytes(encoded["jpg"])
    sound.append("really a jpeg.png")
    picture.save(folder / "animation.gif")
    os.rename(folder / "animation.gif", folder / "a gif.png")
    sound.append("a gif.png")
    Image.new("RGB", (1, 1)).save(folder / "one pixel.png")
    Image.new("RGB", (3, 100000)).save(folder / "thin.png")
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png(60000, 60000))
    (folder / "bomb_b.png").write_bytes(png(30000, 30000))  # half of it, by its claim
    (folder / "bomb that is full.png").write_bytes(png(17000, 17000, bytes(17000 * (1 + 2125))))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken link.png").symlink_to("nowhere.png")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / "a folder.png").mkdir()
    (folder / "notes.txt").write_text("left alone")
    with open(os.fsencode(folder) + b"/bytes \xff\xfe.png", "wb") as file:
        file.write(b"rubbish")
    for i in range(count):
        ending = rng.choice(sorted(encoded))
        data = bytearray(encoded[ending])
        how = rng.randrange(4)
        if how == 0:
            data = data[:rng.randrange(1, len(data))]  # truncated
        elif how == 1:
            for _ in range(rng.randrange(1, 40)):  # single bytes changed, mostly in the header
                data[min(int(rng.expovariate(0.01)), len(data) - 1)] = rng.randrange(256)
        elif how == 2:
            begin = rng.randrange(len(data))
            data[begin:begin + rng.randrange(1, 500)] = b""  # a hole
        else:
            ending = rng.choice(sorted(encoded))  # whose ending may lie
        (folder / f"mutilated {i:03d}.{ending}").write_bytes(data)
    return sound


@pytest.fixture(scope="module")
def rubbish(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rubbish")
    return folder, fill_with_rubbish(folder, 300)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def photographs_in(folder) -> list[Path]:
    """What has the name of one, and is no folder."""
    return [path for path in folder.iterdir()
            if path.suffix in evaluate.PHOTOS and not path.is_dir()]


def test_rubbish_in_training_photographs(rubbish, capsys):
    folder, sound = rubbish
    before, begun = peak(), time.time()
    pairs = load_photos(str(folder), 2, 8, 0)
    error = capsys.readouterr().err
    skipped = [line for line in error.splitlines() if line.startswith("skipped: ")]
    there = photographs_in(folder)
    assert len(there) > 320 and len(pairs) + len(skipped) == len(there)  # each is used or named
    assert not [name for name in sound if name in error] and "notes.txt" not in error
    for name in ("zero.png", "bomb.png", "bomb that is full.png", "loop.png", "pipe.png",
                 "broken link.png", "thin.png", "one pixel"):
        assert any(name in line for line in skipped), name
    assert "Traceback" not in error and time.time() - begun < 120 and peak() - before < 1e9


def test_a_photograph_held_sideways_is_read_upright(rubbish):
    hr = evaluate.read_photo(rubbish[0] / "rotated.jpg")
    upright = np.rot90(dead_leaves(64, np.random.default_rng(0))[:48], -1)
    assert hr.shape == (64, 48, 3) and np.abs(hr.astype(int) - upright).mean() < 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    return run(tmp_path_factory.mktemp("finished") / "a", "--data", photos, "--budget", "2G")


def test_rubbish_in_a_benchmark(rubbish, finished, capsys):
    folder, sound = rubbish
    evaluate.main([str(finished), "--benchmark", str(folder)])
    out, error = capsys.readouterr()
    skipped = [line for line in error.splitlines() if line.startswith("skipped: ")]
    there = photographs_in(folder)
    assert f"{len(there) - len(skipped)} photographs" in out and "Traceback" not in error
    assert not [name for name in sound if any(name in line for line in skipped)]
    (finished / "benchmark.json").unlink()


def test_rubbish_to_enlarge(rubbish, finished, tmp_path):
    folder, sound = rubbish
    good, large = 0, tmp_path / "large.png"
    for path in sorted(path for path in folder.iterdir() if path.suffix in evaluate.PHOTOS):
        try:
            evaluate.main([str(finished), "--upscale", str(path), "-o", str(large)])
            good += 1
        except SystemExit as stop:
            assert stop.code == 2 and path.name not in sound, path
            assert not large.exists(), path
        large.unlink(missing_ok=True)
    assert good >= len(sound)


# --- Files of other people ------------------------------------------------------------------------

class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/trilevel-was-here",)


def hostile_files(sound: bytes):
    """name: bytes of a network.pt or checkpoint.pt that must not be believed."""
    yield "a pickle that runs code", pickle.dumps(Hostile())
    buffer = io.BytesIO()
    torch.save(Hostile(), buffer)
    yield "the same, saved by torch", buffer.getvalue()
    buffer = io.BytesIO()
    with (zipfile.ZipFile(io.BytesIO(sound)) as old,
          zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new):
        for entry in old.infolist():
            more = bytes(10 ** 8) * entry.filename.endswith("/0")
            new.writestr(entry.filename, old.read(entry) + more)
    yield "one that swells", buffer.getvalue()
    yield "nothing", b""
    yield "text", b"not a network" * 1000
    for state in {}, [], {"step": 1}, {"a": torch.zeros(3)}, torch.zeros(5):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield f"other tensors: {state}", buffer.getvalue()


def test_weights_of_other_people(finished, tmp_path):
    mine = shutil.copytree(finished, tmp_path / "a")
    state = torch.load(mine / "network.pt", weights_only=True)
    before = peak()
    for name, data in hostile_files((mine / "network.pt").read_bytes()):
        (mine / "network.pt").write_bytes(data)
        assert "network.pt" in refused(evaluate.main, mine, "--time"), name
    first = next(iter(state))
    for change in ({first: torch.full_like(state[first], torch.nan)}, {"more": torch.zeros(1)},
                   {first: torch.zeros(1).expand(10 ** 6, 10 ** 6)},
                   {first: torch.zeros_like(state[first]).to(torch.complex64)}):
        torch.save(state | change, mine / "network.pt")
        assert "network.pt" in refused(evaluate.main, mine, "--time") or "more" in change, change
    torch.save({key: value for key, value in state.items() if key != first}, mine / "network.pt")
    assert "network.pt" in refused(evaluate.main, mine, "--time")
    assert not Path("/tmp/trilevel-was-here").exists() and peak() - before < 5e8


@pytest.mark.parametrize("change", [
    dict(path="c" * 10 ** 6), dict(channels=2 ** 31), dict(channels=1e400), dict(scale=True),
    dict(path=7), dict(path="u"),
    dict(operations=[["conv3x3"] * 10 ** 5], widths=[[16] * 10 ** 5]), dict(widths="16"),
    dict(operations=None), dict(more=1),
    dict(channels=512, path="c" * 64, operations=[["residual"] * 64] * 64,
         widths=[[512] * 63] * 64)])
def test_architectures_of_other_people(finished, tmp_path, change):
    mine, before = shutil.copytree(finished, tmp_path / "a"), peak()
    fields = json.loads((mine / "architecture.json").read_text()) | change
    (mine / "architecture.json").write_text(json.dumps(fields))
    line = refused(evaluate.main, mine, "--time")
    assert len(line) < 500 and peak() - before < 3e8


@pytest.mark.parametrize("text", ["", "[]", "[" * 10 ** 5, "{}", "null", "\xff", '{"scale": 2}'])
def test_architecture_files_that_are_none(finished, tmp_path, text):
    mine = shutil.copytree(finished, tmp_path / "a")
    (mine / "architecture.json").write_bytes(text.encode("latin-1"))
    assert "architecture.json" in refused(evaluate.main, mine, "--time")


def test_checkpoints_and_settings_of_other_people(finished, tmp_path):
    mine = shutil.copytree(finished, tmp_path / "a")
    (mine / "checkpoint.before.pt").unlink()
    for name, data in hostile_files((mine / "checkpoint.pt").read_bytes()):
        (mine / "checkpoint.pt").write_bytes(data)
        assert "no checkpoint in" in refused(search.main, "--resume", "--out", mine), name
    assert not Path("/tmp/trilevel-was-here").exists()
    whole = json.loads((finished / "settings.json").read_text())["settings"]
    for change in (dict(channels=2 ** 31), dict(cells=10 ** 6), dict(steps="many"), dict(scale=7),
                   dict(budget="banana"), dict(more=1), dict(activation=5), dict(batch=10 ** 8),
                   dict(seed=-1), dict(device="meta"), dict(bfloat16="yes"), dict(data=["x"]),
                   dict(help=True), dict(unit="hours"), dict(resume=True)):
        (mine / "settings.json").write_text(json.dumps(dict(settings=whole | change)))
        assert len(refused(search.main, "--resume", "--out", mine)) < 500, change
    (mine / "evil.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')")
    evil = whole | dict(activation=f"{mine}/evil.py:f")
    (mine / "settings.json").write_text(json.dumps(dict(settings=evil)))
    assert "add --activation" in refused(search.main, "--resume", "--out", mine)
    assert not (tmp_path / "was-here").exists()
    for text in "", "{}", "[]", '{"settings": 3}', '{"settings": {}}', "[" * 10 ** 5:
        (mine / "settings.json").write_text(text)
        line = refused(search.main, "--resume", "--out", mine)
        assert "settings.json is missing or damaged" in line


# --- Bits -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(tmp_path, photos, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options = "--data", photos, "--budget", "2G", "--seed", 5
        a, b = (run(tmp_path / name, *options) for name in "ab")
    finally:
        torch.set_num_threads(before)
    same_results(a, b)
