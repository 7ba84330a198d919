"""HiNAS: the counts of its space, its loss, its path, and a tiny run of the command line."""
import argparse
import csv
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
import hinas
from hinas import NAMES, SPACES, Cell, Network, Supernet
from test_neighbours import small_run

SPACE = SPACES["enlarge"]


def weights_of(module):
    return sum(p.numel() for p in module.parameters())


def test_weights_of_operations_and_cells():
    assert [weights_of(hinas.operation(name, 8)) for name in NAMES[:-1]] == [576, 272, 528, 576,
                                                                             1600, 0]
    for c, count in (8, 31_968), (12, 68_256), (16, 118_080):
        assert weights_of(Cell(SPACE, c, [NAMES[:-1]] * 9)) == count
        x = torch.rand(1, c, 9, 7)
        for name in NAMES[:-1]:
            assert hinas.operation(name, c)(x).shape == x.shape


def test_operations_keep_the_variance():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 40, 40)
    for name in NAMES[:-1]:
        with torch.no_grad():
            assert hinas.operation(name, 32)(x).square().mean() == pytest.approx(1, abs=0.4)


def test_supernets():
    assert 2 * 9 * 7 + 3 * 3 == 135
    for space, logits in (SPACES["denoise"], (3 * 14 * 7, 6 * 3)), (SPACE, (2 * 9 * 7, 3 * 3)):
        net = Supernet(space, 2)
        assert (net.alpha.numel(), net.beta.numel()) == logits
        alpha, beta = net.weights(0.0)
        torch.testing.assert_close(alpha.sum(-1), torch.ones(alpha.shape[:2]))
        torch.testing.assert_close(beta.sum(-1), torch.ones(len(beta)))
        assert beta[0].tolist() == [0, 0.5, 0.5]  # from F: the same and wider
    # Now those of super-resolution's.
    assert weights_of(net.cells) == 318_528 == 2 * 31_968 + 2 * 68_256 + 118_080
    assert list(net.cells) == ["0_0", "0_1", "1_0", "1_1", "1_2"]  # one for each layer and width
    assert len(net.routes) == 7


def test_size():
    cell = 36 * (3 * 36) * (6 * 36)
    assert cell == 839_808 and SPACE.size == cell ** 2 * 5
    assert f"{SPACE.size:.1e}" == "3.5e+12"
    # All paths of the longer space, walked.
    paths = [p for p in itertools.product(range(3), repeat=3)
             if all(abs(a - b) <= 1 for a, b in itertools.pairwise((0, *p)))]
    assert SPACES["denoise"].size == (cell * 10 * 36) ** 3 * len(paths)


def test_conv3_against_sep3_in_the_found_network():
    """The published code's networks differ by 7.06 G; its batch norms make the rest of 30,144."""
    (p3, m3), (ps, ms) = (
        common.count(Network(SPACE, 2, 16, [[0], [0], [1]],
                             [[[name] if state < 2 else [] for _, state in SPACE.edges]] * 2), 2)
        for name in ("conv3", "sep3"))
    assert p3 - ps == 6 * (2304 - 800) + 6 * (5184 - 1584) == 30_144 + 2 * 6 * (16 + 24)
    assert m3 - ms == (p3 - ps) * 640 * 360 and round((m3 - ms) / 1e9, 2) == 7.06
    assert round(57.69 - 50.63, 2) == 7.06


def test_viterbi_beats_greedy_steps():
    beta = [[0, 0.4, 0.6], [0, 0.9, 0.1], [0.2, 0.5, 0.3]]
    product, path = hinas.best_path(SPACE, beta)
    assert path == (0, 0) and product == pytest.approx(0.36)
    assert beta[0][2] * beta[2][1] == pytest.approx(0.30)  # greedy: (1, 1), that is (1.5, 1.5)


def test_viterbi_against_all_paths():
    space, rng = SPACES["denoise"], np.random.default_rng(0)
    for _ in range(20):
        beta = rng.random((6, 3))
        products = {p: math.prod(beta[space.rows.index((i, a)), b - a + 1]
                                 for i, (a, b) in enumerate(itertools.pairwise((0, *p))))
                    for p in itertools.product(range(3), repeat=3)
                    if all(abs(a - b) <= 1 for a, b in itertools.pairwise((0, *p)))}
        product, path = hinas.best_path(space, beta)
        assert path == max(products, key=products.get)
        assert product == pytest.approx(products[path])


def test_log_ssim():
    half = torch.full((1, 3, 64, 64), 0.5)
    assert hinas.log_ssim(half, half).abs() < 1e-6
    assert round(hinas.log_ssim(half, half + 0.1).item(), 5) == 0.00718
    # Against evaluate.py's, which measures: the same constants, inside the border.
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 40, 30), np.uint8)
    a = (a // 2 + b // 2).astype(np.uint8)
    x, y = (torch.from_numpy(image / 255)[None, None].float() for image in (a, b))
    assert hinas.log_ssim(x, y).item() == pytest.approx(-math.log10(evaluate.ssim(a, b, 0)), 1e-4)
    # Opposite pictures: SSIM below 0, and still a finite loss.
    assert hinas.log_ssim(x, 1 - x).isfinite()


def test_log_ssim_with_a_border_of_zeros():
    """Theirs: zeros around both pictures, and float32. (.01039 is that of 32x32 pixels.)"""
    a, b = (torch.full((1, 1, 32, 32), value) for value in (0.5, 0.6))
    gauss = torch.tensor([math.exp(-x ** 2 / 4.5) for x in range(-5, 6)])
    window = gauss.outer(gauss)[None, None] / gauss.sum() ** 2

    def mean(x):
        return F.conv2d(x, window, padding=5)
    top = (2 * mean(a) * mean(b) + 1e-4) * (2 * (mean(a * b) - mean(a) * mean(b)) + 9e-4)
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    theirs = -(top / ((mean(a) ** 2 + mean(b) ** 2 + 1e-4) * (variances + 9e-4))).mean().log10()
    assert theirs.item() == pytest.approx(0.01039, abs=1e-5)
    ours = hinas.log_ssim(*(F.pad(x, [5] * 4) for x in (a, b)))  # float64
    assert round(ours.item(), 5) == 0.01043


def test_a_cell_by_hand():
    torch.manual_seed(0)
    cell, x, y = Cell(SPACE, 8, [NAMES[:-1]] * 9), *torch.rand(2, 1, 8, 6, 6)
    alpha, states, e = torch.rand(9, 7), [x, y], 0
    for node in range(3):
        total = 0
        for state in list(states):
            total = total + sum(alpha[e, k] * cell.edges[e][name](state)
                                for k, name in enumerate(NAMES[:-1]))
            e += 1
        states.append(total)
    torch.testing.assert_close(cell(x, y, alpha), torch.cat(states[2:], 1))


def test_derive():
    alpha = torch.full((2, 9, 7), 0.1)
    alpha[..., 6] = 0.9  # "none" is never chosen, and never speaks for an edge
    alpha[0, 3, 4], alpha[0, 4, 1] = 0.3, 0.2  # node 1: states 1 and 2
    widths, names = hinas.derive(SPACE, alpha, [[0, .4, .6], [0, .9, .1], [.2, .5, .3]])
    assert widths == [[0], [0], [0]]
    assert names[0][:5] == [["conv3"], ["conv3"], [], ["dil5"], ["sep3"]]
    assert all(len(layer) == 9 and sum(map(len, layer)) == 6 for layer in names)


def test_the_supernet_at_one_hot_weights_is_the_derived_network():
    torch.manual_seed(0)
    net = Supernet(SPACE, 2)
    for tail in net.tails.values():  # born near zero; here they must show what is before them
        torch.nn.init.normal_(tail.weight, std=0.1)
    edges = SPACE.edges
    names = [[[NAMES[(e + layer) % 6]] if state >= node else [] for e, (node, state)
              in enumerate(edges)] for layer in range(2)]
    found = Network(SPACE, 2, 8, [[0], [0], [0]], names)
    found.load_state_dict(net.state_dict(), strict=False)
    for tail in ("1", "2"):  # (what is never reached gives the tail's bias alone)
        torch.nn.init.zeros_(net.tails[tail].bias)
    alpha = torch.zeros(2, 9, 7)
    for layer, e in itertools.product(range(2), range(9)):
        for name in names[layer][e]:
            alpha[layer, e, NAMES.index(name)] = 1
    beta = torch.tensor([[0., 1, 0], [0, 1, 0], [0, 1, 0]])
    x = torch.rand(1, 3, 8, 10)
    assert found(x).shape == (1, 3, 16, 20)
    torch.testing.assert_close(net(x, (alpha, beta)), found(x), rtol=1e-4, atol=1e-5)


def test_noise():
    class Grey:
        def batch(self, size, generator):
            return None, torch.full((size, 3, 64, 64), 0.5)
    noisy, clean = common.Noisy(Grey(), [30, 70]).batch(40, torch.Generator().manual_seed(0))
    assert noisy.shape == clean.shape == (40, 1, 64, 64)
    sigmas = (noisy - clean).std((1, 2, 3)) * 255
    assert {30, 70} == set(sigmas.div(10).round().mul(10).int().tolist())
    assert noisy.max() > 1  # not clipped


def run(out, *options):
    hinas.main(["--steps", "4", "--search", "2", "--batch", "2", "--patch", "12", "--out", str(out),
                *options])


@pytest.mark.parametrize("options", [["--scale", "3"], ["--task", "denoise", "--sigma", "50"]],
                         ids=SPACES)
def test_run(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    results = small_run(lambda *given: run(out, *given, *options), out, monkeypatch)
    assert results["kept"] is False and results["live"] == "7 operations an edge"
    assert math.isfinite(results["lost"])
    # The network is rebuilt from what is written of it.
    found, space = json.loads((out / "architecture.json").read_text()), SPACES[
        "denoise" if "denoise" in options else "enlarge"]
    network = Network(space, **found)
    network.load_state_dict(torch.load(out / "network.pt", weights_only=True))
    assert common.count(network, found["scale"]) == (results["parameters"],
                                                     results["multiply_adds"])
    assert found["base"] == 2 * space.base
    shapes = {name: array.shape for name, array in np.load(out / "distributions.npz").items()}
    assert shapes == {"steps": (2,), "alpha": (2, space.layers, len(space.edges), 7),
                      "beta": (2, len(space.rows), 3)}
    with open(out / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["live_operations"] == "7.0" and int(rows[1]["cost"]) == results["multiply_adds"]
    table = capsys.readouterr().out
    if "denoise" in options:
        assert "noisy, PSNR" in table
        assert list(results["sets"]) == ["sample, sigma 50"]
    else:
        assert "bicubic, PSNR-Y" in table and "sample" in results["sets"]


@pytest.mark.parametrize("options", [["--patch", "3"], ["--sigma", "0"], ["--task", "paint"],
                                     ["--search", "9"]], ids=" ".join)
def test_bad_options(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *options)
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and last.startswith("hinas.py: error: ")
    assert sum("error" in line for line in lines) == 1


@pytest.mark.skipif("TRILEVEL_BENCHMARK" not in os.environ, reason="no benchmark photographs")
def test_noisy_photographs_of_a_benchmark():
    """What is known: noise of sigma 50 leaves 14.15 dB before it is clipped."""
    args = argparse.Namespace(scale=1, seed=0, sigma=[50], benchmark=[
        Path(os.environ["TRILEVEL_BENCHMARK"], "Set5", "HR")])
    (_, _), (title, rows) = common.denoised(torch.nn.Identity(), args)
    assert title == "Set5, sigma 50" and len(rows["noisy"]) == 5
    assert rows["noisy"] == rows["ours"]
    assert all(14.15 < psnr < 16.5 for _, psnr, _ in rows["noisy"])
