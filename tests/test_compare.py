"""notebooks/compare.py: runs with several activations and seeds, side by side."""
import json

import numpy as np
import pytest
from PIL import Image

import compare
import evaluate
from test_search import photos, run  # noqa: F401 (photos is a fixture)


def test_runs_are_compared(tmp_path, photos, capsys):
    runs = [run(tmp_path / f"{activation}{seed}", "--data", photos, "--budget", "2G",
                "--activation", activation, "--seed", seed)
            for activation in ("softmax", "sparsestmax") for seed in (0, 1)]
    capsys.readouterr()
    compare.main([*map(str, runs), "-o", str(tmp_path / "c.png")])
    out = capsys.readouterr().out
    rows = {line.split(" | ")[0]: line.split(" | ")[1:]
            for line in out.splitlines() if line.startswith("| s")}
    lost = [json.loads((r / "results.json").read_text())["hand_over"] for r in runs[:2]]
    lost = [each["psnr_supernet"] - each["psnr_network"] for each in lost]
    assert rows["| softmax"][0] == "2"
    assert rows["| softmax"][3] == f"{np.mean(lost):.2f} ± {np.std(lost, ddof=1):.2f}"
    assert rows["| sparsestmax"][0] == "2" and "Fewer than three seeds" in out
    assert Image.open(tmp_path / "c.png").size[0] > 1000
    other = run(tmp_path / "x3", "--scale", 3, "--budget", "1.6G")
    for main, arguments, message in [(compare.main, [tmp_path], "no finished run"),
                                     (compare.main, [runs[0], other], "--scale"),
                                     (compare.main, [*runs, runs[1]], "same activation and seed"),
                                     (evaluate.main, ["--time"], "required: RUN"),
                                     (evaluate.main, ["--benchmark", "x"], "required: RUN")]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        error, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in error
        assert error.startswith(f"{main.__module__}.py: error: ")
    whole = {name: (runs[0] / name).read_bytes()
             for name in ("distributions.npz", "results.json", "settings.json")}
    null = whole["results.json"].replace(b'"hand_over": {', b'"hand_over": null, "x": {')
    for name, damage in [("distributions.npz", whole["distributions.npz"][:-99]),
                         ("distributions.npz", b""),
                         ("results.json", b"[]"), ("results.json", b"[" * 10 ** 5),
                         ("results.json", b'{"sample": {"bicubic": {}}}'), ("results.json", null),
                         ("settings.json", b'{"settings": {}}'),
                         ("settings.json", b'{"settings": null}')]:
        (runs[0] / name).write_bytes(damage)
        with pytest.raises(SystemExit) as stop:
            compare.main(list(map(str, runs)))
        error, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and "no finished run" in error, (name, damage[:50])
        (runs[0] / name).write_bytes(whole[name])
