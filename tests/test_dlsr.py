"""DLSR as its neighbour's file has it: the counts of the released networks, and the search."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dlsr
from common import count

INPUTS = {"sep3-sep5-sep5": ((2, 1), (3, 2), (4, 3), (1, 3)),
          "conv1-sep7-sep5": ((1, 2), (2, 3), (2, 4), (4, 5)),
          "tiny": ((1, 2), (2, 3), (2, 4), (4, 5))}


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def kernels(net):
    return size(net) - net.alpha.numel() - net.beta.numel()


@pytest.mark.parametrize("channels, weights", [
    (48, (2304, 20736, 57600, 112896, 5472, 7008, 9312, 2736, 3504)),
    (18, (324, 2916, 8100, 15876, 972, 1548, 2412, 486, 774))])
def test_nine_operations(channels, weights):
    assert tuple(dlsr.OPERATIONS) == ("conv1", "conv3", "conv5", "conv7", "sep3", "sep5", "sep7",
                                      "dil3", "dil5")
    x = torch.rand(1, channels, 16, 17)
    operations = [make(channels) for make in dlsr.OPERATIONS.values()]
    assert tuple(map(size, operations)) == weights
    assert sum(weights) == {48: 221568, 18: 33408}[channels]
    assert all(operation(x).shape == x.shape for operation in operations)


def test_what_sees_how_far():
    """The gradient of one output pixel shows which pixels an operation looks at."""
    for name, make in dlsr.OPERATIONS.items():
        x = torch.rand(1, 4, 21, 21, requires_grad=True)
        make(4)(x)[0, :, 10, 10].sum().backward()
        seen = (x.grad.abs().sum((0, 1)) > 0).any(0).nonzero()
        k, kind = int(name[-1]), name[:-1]
        assert 2 * (10 - seen.min()) + 1 <= {"conv": k, "sep": 2 * k - 1, "dil": 2 * k - 1}[kind]


PARTS = {  # of the facts' table, in its order
    "sep3-sep5-sep5": (1344, 44664, 1176, (5472, 7008, 7008), 10392, 4656, 6600, 4656, 13872,
                       20784, (5196, 11691, 20784)),
    "conv1-sep7-sep5": (1344, 43800, 1176, (2304, 9312, 7008), 10392, 4656, 6600, 4656, 13872,
                        20784, (5196, 11691, 20784)),
    "tiny": (504, 7708, 171, (324, 2412, 1548), 1467, 666, 778, 666, 1962, 2934,
             (1956, 4401, 7824))}


@pytest.mark.parametrize("name", dlsr.PUBLISHED)
def test_parts_of_the_published_networks(name):
    head, cell, distil, operations, last, fuse, esa, join, fuse6, smooth, tails = PARTS[name]
    network = dlsr.Network(dlsr.PUBLISHED[name], 2)
    assert network.architecture.inputs == INPUTS[name]
    assert size(network.head) == head
    for each in network.cells:
        assert size(each) == cell
        assert [size(layer) for layer in each.distil] == [distil] * 3
        assert tuple(map(size, each.steps)) == operations
        assert (size(each.last), size(each.fuse), size(each.attention)) == (last, fuse, esa)
        a = each.attention
        of_esa = size(a.first), size(a.straight), size(a.shrink), *map(size, a.coarse), size(a.last)
        assert [n for n in of_esa if n] == {6600: [588, 156, *[1308] * 4, 624],
                                            778: [76, 20, *[148] * 4, 90]}[esa]
    assert [size(layer) for layer in network.joins] == [join] * 4
    assert (size(network.fuse), size(network.smooth)) == (fuse6, smooth)
    for scale, tail in zip((2, 3, 4), tails):
        assert size(dlsr.Network(dlsr.PUBLISHED[name], scale).tail) == tail


@pytest.mark.parametrize("name, parameters, gmacs", [
    ("sep3-sep5-sep5", (327804, 334299, 343392), (68.5006, 31.0569, 18.0178)),
    ("conv1-sep7-sep5", (322620, 329115, 338208), (67.3062, 30.5269, 17.7192)),
    ("tiny", (56268, 58713, 62136), (12.0685, 5.6035, 3.3527))])
def test_published_counts(name, parameters, gmacs):
    for scale, wanted, macs in zip((2, 3, 4), parameters, gmacs):
        found = count(dlsr.Network(dlsr.PUBLISHED[name], scale), scale)
        assert (found[0], round(found[1] / 1e9, 4)) == (wanted, macs)


def test_the_attention_of_a_cell_is_not_per_pixel():
    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = dlsr.Attention(48)
            self.attention.shrink.register_forward_hook(self.see)
            self.attention.coarse.register_forward_hook(self.see)
            self.shapes = []

        def see(self, module, inputs, output):
            self.shapes.append(tuple(output.shape[2:]))

        def forward(self, x):
            return self.attention(x.new_empty(1, 48, *x.shape[2:]))

    alone = Alone()
    assert count(alone, 2)[1] == 396_279_216
    assert alone.shapes == [(179, 319), (58, 105)]
    assert dlsr.Attention(8)(torch.rand(1, 8, 15, 15)).shape == (1, 8, 15, 15)
    with pytest.raises(RuntimeError):
        dlsr.Attention(8)(torch.rand(1, 8, 14, 15))


@pytest.mark.parametrize("channels, weights", [(48, 4212924), (24, 1098540), (18, 633852)])
def test_supernet_counts(channels, weights):
    net = dlsr.Supernet(channels, 2)
    assert kernels(net) == weights
    assert net.alpha.numel() + net.beta.numel() == 41
    assert dlsr.SPACE_SIZE == 131220 == 9 ** 3 * 1 * 3 * 6 * 10


def test_weights_are_a_softmax_over_what_is_there():
    net = dlsr.Supernet(8, 2)
    weights = net.weights(0.3)
    assert weights.alpha.shape == (3, 9) and weights.beta.shape == (4, 5)
    for rows in weights:
        torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)))
    assert (weights.beta > 0).sum(-1).tolist() == [2, 3, 4, 5]
    assert all((row[:n] > 0).all() for row, n in zip(weights.beta, (2, 3, 4, 5)))
    assert weights.live() == [9, 3.5]


def test_gradient_of_the_size_term():
    alpha = torch.zeros(3, 9, requires_grad=True)
    value = dlsr.size_term(alpha.softmax(-1))
    value.backward()
    assert value.item() == pytest.approx(1 / 3)
    row = torch.tensor([-.01119, -.00193, .01659, .04437, -.00961, -.00887, -.00776, -.01098,
                        -.01061])
    torch.testing.assert_close(alpha.grad, row.expand(3, 9), atol=6e-6, rtol=0)


def test_hfen():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16)
    assert dlsr.hfen(2 * x, x).item() < 1e-6
    impulse, shifted = torch.zeros(2, 1, 3, 15, 15)
    impulse[..., 7, 7] = shifted[..., 7, 8] = 1
    assert dlsr.hfen(impulse, shifted).item() == pytest.approx(.23415, abs=5e-6)
    assert dlsr.hfen(0 * x, 0 * x).isfinite()


@pytest.mark.parametrize("seed", range(3))
def test_folded_derived_network_is_the_supernet(seed):
    torch.manual_seed(seed)
    net = dlsr.Supernet(8, 3).double()
    alpha = torch.nn.functional.one_hot(torch.randint(9, (3,)), 9).double()
    beta = torch.zeros(4, 5).double()
    for j in range(4):  # two points, of different weight
        one, two = torch.randperm(j + 2)[:2]
        beta[j, one] = share = torch.rand(()).double()
        beta[j, two] = 1 - share
    weights = dlsr.Weights(alpha, beta)
    found = net.derive(weights)
    network = net.inherit(found, weights).double()
    x = torch.rand(2, 3, 15, 17).double()
    with torch.no_grad():
        assert (net(x, weights) - network(x)).abs().max() < 1e-6  # inherited in float32
    assert net.cost(weights).item() == dlsr.multiply_adds(found, 3)


def test_derive_takes_the_largest():
    net = dlsr.Supernet(8, 2)
    with torch.no_grad():
        net.alpha[0, 0] = net.alpha[1, 6] = net.alpha[2, 5] = 1.0
        net.beta.copy_(torch.tensor([1., 2, 1, 3, 2, 1, 3, 2, 4, 1, 1, 1, 4, 5]))
    found = net.derive(net.weights(1.0))
    assert found.operations == (("conv1",), ("sep7",), ("sep5",))
    assert found.inputs == ((1, 2), (2, 3), (2, 4), (4, 5)) == INPUTS["tiny"]


def test_command_line(tmp_path, capsys):
    small = ["--batch", "2", "--patch", "15", "--out", str(tmp_path / "run")]
    dlsr.main(["--steps", "5", "--search", "3", *small])
    assert {"architecture.json", "network.pt", "history.csv", "distributions.npz", "results.json",
            "results.md", "settings.json"} == {f.name for f in (tmp_path / "run").iterdir()}
    found = json.loads((tmp_path / "run/architecture.json").read_text())
    assert found["channels"] == 18 and len(found["operations"]) == 3 and len(found["inputs"]) == 4
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["kept"] is True and isinstance(results["lost"], float)
    arrays = np.load(tmp_path / "run/distributions.npz")
    assert arrays["alpha"].shape == (3, 3, 9) and arrays["beta"].shape == (3, 4, 5)
    history = (tmp_path / "run/history.csv").read_text().splitlines()
    assert history[0] == "step,loss,live_operations,live_inputs,cost"
    assert [row.split(",")[0] for row in history[1:]] == ["1", "2", "3", "4", "5"]
    assert "lost" in capsys.readouterr().out


def test_a_published_network_trains(tmp_path):
    dlsr.main(["--network", "tiny", "--steps", "2", "--search", "1", "--batch", "2", "--patch",
               "15", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/results.json").read_text())["parameters"] == 56268


@pytest.mark.parametrize("options, words", [(["--patch", "14"], "15 or more"),
                                            (["--network", "huge"], "invalid choice")])
def test_mistakes_are_one_line(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dlsr.main([*options, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.skipif("TRILEVEL_BENCHMARK" not in os.environ, reason="needs TRILEVEL_BENCHMARK")
def test_every_benchmark_photograph_is_large_enough():
    from evaluate import sets_in
    for name in "Set5", "Set14", "B100":
        for photo in sets_in([Path(os.environ["TRILEVEL_BENCHMARK"], name)], 4)[name]:
            assert min(Image.open(photo).size) // 4 >= 15
