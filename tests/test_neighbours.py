"""What all neighbours have in common: counting, the command line, the run's folder."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import dlsr
import netadapt
from evaluate import dead_leaves, sample_photo
from search_space import Network, Space


def small_run(run, out, monkeypatch) -> dict:
    """run("--data", DIR) on two small photographs, measured on one of them. -> results.json"""
    data = out.parent / "data"
    data.mkdir()
    photo = Image.open(sample_photo())
    for i, small in enumerate((data / "1.png", data / "2.png")):
        photo.crop((200, 80 + 80 * i, 296, 160 + 80 * i)).save(small)
    monkeypatch.setattr(common, "sample_photo", lambda: small)
    run("--data", str(data))
    assert {file.name for file in out.iterdir()} == {
        "settings.json", "architecture.json", "network.pt", "history.csv", "distributions.npz",
        "results.json", "results.md"}
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("scale", [2, 4])  # 1280 is no multiple of 3
def test_counting_agrees_with_search_space(scale):
    for seed in range(5):
        a = Space(scale, 16, 3, 3).random(random.Random(seed))
        assert common.count(Network(a), scale) == (a.parameters(), a.multiply_adds())


def test_counting_by_hand():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 5, 2, stride=2)
            self.c = nn.Linear(5, 7, bias=False)

        def forward(self, x):
            return self.c(self.b(self.a(x)).permute(0, 2, 3, 1))
    h, w = (20 - 3) // 2 + 1, (30 - 3) // 2 + 1
    by_hand = 3 * 4 * 9 * h * w + 4 * 5 * 4 * h * w + 35 * 4 * h * w
    assert common.count(Odd(), 2, (40, 60)) == (112 + 85 + 35, by_hand)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for options, message in ((["--steps", "5", "--search", "5"], "must be more than --search"),
                             (["--data", ""], "the name is empty"),
                             (["--data", "nowhere"], "is not a folder"),
                             (["--benchmark", "nowhere"], "is not a folder"),
                             (["--out", f"{tmp_path}/full"], "is not empty"),
                             (["--scale", "7"], "--scale")):
        for module in netadapt, dlsr:
            with pytest.raises(SystemExit) as stop:
                module.main(["--out", str(tmp_path / "a"), *options])
            last = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2 and message in last
            assert last.startswith(f"{module.__name__}.py: error: ")
            assert not (tmp_path / "a").exists()


def test_a_published_network_is_trained_by_one_command(tmp_path):
    for k in range(2):
        Image.fromarray(dead_leaves(64, np.random.default_rng(k))).save(tmp_path / f"{k}.png")
    dlsr.main(["--network", "tiny", "--steps", "2", "--batch", "1", "--data", str(tmp_path),
               "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["parameters"] == 56_268 and results["sets"]["sample"]["ours"]["psnr"] > 5
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["photographs"]["photographs"] == 2
    assert torch.load(tmp_path / "run/network.pt", weights_only=True)
