"""DCNAS: the counts of its space, its draws, what a draw saves, and a run of the command line."""
import csv
import itertools
import json
import math

import numpy as np
import pytest
import torch

import common
import dcnas
from dcnas import CELLS, NAMES, Cell, Network, Supernet
from search_space import OPERATIONS
from test_neighbours import small_run


def make(sizes=(1, 1, 1, 1), **options):
    torch.manual_seed(0)
    net = Supernet(2, list(sizes), **options)
    torch.nn.init.normal_(net.tail.conv.weight, std=0.1)  # else it would hide what is before it
    return net


def test_counts():
    before = make().before
    assert before.sum(-1).tolist() == [1, 2, 3, 4] and before.sum() == 10
    # Every way to keep the two best, or all of fewer.
    ways = [len(list(itertools.combinations(range(j), min(j, 2)))) for j in range(1, 5)]
    assert ways == [1, 1, 3, 6] and dcnas.wirings() == 18
    assert dcnas.size() == 18 * 4 ** 4


def test_a_quarter_of_the_channels_has_a_sixteenth_of_the_weights():
    whole, quarter = (sum(p.numel() for p in Cell(1, share, ["conv3x3"]).parameters())
                      for share in (1, 4))
    assert (quarter, whole) == (324, 5184) and 16 * quarter == whole
    x = torch.rand(2, 24, 5, 6)
    for j in 1, 2, 3, 4:  # cell j changes the j-th quarter, and copies the rest
        cell = Cell(j, 4, list(NAMES))
        y, part = cell(x, torch.rand(4)), slice(6 * j - 6, 6 * j)
        changed = (y != x).any((0, 2, 3))
        assert y.shape == x.shape and changed[part].all() and changed.sum() == 6
    assert Cell(3, 1, ["dws"])(x, [1] * 4).shape == x.shape


def test_inclusion_of_top_2_draws():
    """The closed form, its digits, and frequencies of many draws."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    inclusion = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i)
                 for i in range(4)]
    assert np.round(inclusion, 4).tolist() == [0.7159, 0.6083, 0.4413, 0.2345]
    assert sum(inclusion) == pytest.approx(2)
    torch.manual_seed(0)
    masks = dcnas.draw(torch.tensor(p).log().expand(100_000, 4), 2)
    assert (masks.sum(-1) == 2).all()
    frequencies = masks.double().mean(0).numpy()  # their standard deviation: at most .0016
    assert np.abs(frequencies - inclusion).max() < 0.007
    assert dcnas.draw(torch.zeros(5, 4), 9).all()


def test_weights():
    net = make()
    with torch.no_grad():
        net.reading.normal_()
    full, alpha = net.weights(0.0)
    assert (full.sum(-1) - 1).abs().max() < 1e-6 and (alpha.sum(-1) - 1).abs().max() < 1e-6
    assert torch.equal(full > 0, net.before)
    for _ in range(20):
        drawn, _ = net.weights(0.0, paths=2)
        assert (drawn > 0).sum(-1).tolist() == [1, 2, 2, 2]
        kept = full * (drawn > 0)  # renormalised over what was drawn
        torch.testing.assert_close(drawn, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 3, 2)], ids=str)
def test_what_is_not_drawn_gets_no_gradient_and_is_not_computed(sizes):
    net, x = make(sizes), torch.rand(1, 3, 7, 9)
    for _ in range(10):
        net.zero_grad()
        called = []
        hooks = [module.register_forward_hook(lambda *_, name=name: called.append(name))
                 for group in (net.cells, net.aligns) for name, module in group.items()]
        edges, alpha = net.weights(0.0, paths=2)
        net(x, edges, alpha).square().sum().backward()
        for hook in hooks:
            hook.remove()
        drawn = edges > 0
        assert (net.reading.grad[~drawn] == 0).all()
        _, *cells = dcnas.read_by_the_last(edges.tolist())
        for j in cells:  # with two inputs there is something to learn
            assert j == 1 or (net.reading.grad[j - 1][drawn[j - 1]] != 0).all()
        at = 1, *sizes, 1
        reads = [(i, j) for j in cells for i in range(j) if drawn[j - 1, i]] + [(4, 5)]
        assert sorted(called) == sorted([str(j) for j in cells] + [
            f"{i}_{j}" for i, j in reads if at[i] != at[j]])
        for name, cell in net.cells.items():
            assert all((p.grad is not None) == (int(name) in cells) for p in cell.parameters()
                       if p.shape[1] > 0)


def saved_bytes(net, paths, draws=15):
    """Memory that the backward pass needs, on average over draws."""
    x, total = torch.rand(2, 3, 24, 24), 0
    torch.manual_seed(1)
    for _ in range(draws):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = net(x, *net.weights(0.0, paths))
        total += sum(size for size, _ in kept.values())
        del y
    return total / draws


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 1)], ids=str)
def test_memory_falls_with_paths_and_with_channels(sizes):
    net = make(sizes)
    one, two, three, four = (saved_bytes(net, k) for k in (1, 2, 3, 4))
    assert one < two < three <= four
    assert four == pytest.approx(saved_bytes(net, None, draws=1), rel=1e-4)
    whole = saved_bytes(make(sizes, share=1), None, draws=1)
    if sizes == (1, 1, 1, 1):  # what the docstring says
        assert two / four == pytest.approx(0.8, abs=0.05)
        assert whole / four == pytest.approx(2.9, abs=0.1)
    assert whole > 2 * four


def test_derive():
    edges = torch.tensor([[1., 0, 0, 0], [.3, .7, 0, 0], [.5, .2, .3, 0], [.1, .2, .3, .4]])
    alpha = torch.eye(4)[[1, 3, 0, 2]]
    found = dcnas.derive(edges, alpha)
    torch.testing.assert_close(torch.tensor(found["edges"]), torch.tensor(
        [[1., 0, 0, 0], [.3, .7, 0, 0], [.625, 0, .375, 0], [0, 0, 3 / 7, 4 / 7]]))
    assert found["names"] == [["conv3x3"], ["dws"], ["skip1x1"], ["residual"]]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 1), (2, 3, 1, 2)], ids=str)
def test_the_supernet_at_decided_weights_is_the_derived_network(sizes):
    net, x = make(sizes), torch.rand(1, 3, 7, 9)
    found = dcnas.derive(*(w.detach() for w in net.weights(0.0)))
    network = Network(2, list(sizes), 4, **found)
    network.load_state_dict(net.state_dict(), strict=False)
    alpha = torch.eye(4)[[NAMES.index(name) for [name] in found["names"]]]
    assert network(x).shape == (1, 3, 14, 18)
    torch.testing.assert_close(network(x), net(x, torch.tensor(found["edges"]), alpha))


def test_cells_that_lead_nowhere_do_not_exist():
    edges = [[1, 0, 0, 0], [.5, .5, 0, 0], [.5, .5, 0, 0], [.5, 0, 0, .5]]
    network = Network(2, [1] * 4, 1, edges, [["conv3x3"]] * 4)
    assert list(network.cells) == ["1", "3", "4"]
    parameters, macs = common.count(network, 2)
    weights = 27 * 24 + 3 * OPERATIONS["conv3x3"].weights(24, 24) + 9 * 24 * 12
    assert (parameters, macs) == (weights + 24 + 12, weights * 640 * 360)
    # At half the size a cell costs a quarter; its ways in and out cost 1x1 convolutions.
    _, cheaper = common.count(Network(2, [1, 1, 2, 1], 1, edges, [["conv3x3"]] * 4), 2)
    assert macs - cheaper == 640 * 360 * (3 * 5184 // 4 - 576 * 2 - 576 // 4)


def run(out, *options):
    dcnas.main(["--steps", "5", "--search", "3", "--batch", "2", "--patch", "12", "--out", str(out),
                *options])


@pytest.mark.parametrize("options", [["--scale", "3"], ["--sizes", "1", "2", "2", "1"]],
                         ids=" ".join)
def test_run(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    results = small_run(lambda *given: run(out, *given, *options), out, monkeypatch)
    assert results["kept"] is False and math.isfinite(results["lost"])
    assert results["live"] == "2.5 inputs and 4 operations a cell"
    # The network is rebuilt from what is written of it.
    found = json.loads((out / "architecture.json").read_text())
    network = Network(**found)
    network.load_state_dict(torch.load(out / "network.pt", weights_only=True))
    assert common.count(network, found["scale"]) == (results["parameters"],
                                                     results["multiply_adds"])
    shapes = {name: array.shape for name, array in np.load(out / "distributions.npz").items()}
    assert shapes == {"steps": (3,), "edges": (3, CELLS, CELLS), "alpha": (3, CELLS, len(NAMES))}
    with open(out / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert int(rows[2]["cost"]) == results["multiply_adds"] and rows[0]["live_inputs"] == "2.5"
    assert "bicubic, PSNR-Y" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--paths", "1"], ["--sizes", "1", "2"], ["--rate", "2"],
                                     ["--data", "nowhere"]], ids=" ".join)
def test_bad_options(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *options)
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and last.startswith("dcnas.py: error: ")
    assert sum("error" in line for line in lines) == 1
