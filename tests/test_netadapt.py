"""NetAdaptV2: a network for each image, and a descent that keeps its budget."""
import csv
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import netadapt
from common import count
from netadapt import (CHANNELS, DECAY, FIRST, WIDTHS, Layer, Network, Space, Supernet, derive,
                      descend, mask, shrunk)


def make(space):
    torch.manual_seed(0)
    net = Supernet(space).double()
    torch.nn.init.normal_(net.tail.conv.weight, std=0.1)  # born near zero: hides what is before it
    return net


def some_widths(space, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = *shape, space.cells, space.positions
    return torch.tensor(WIDTHS)[torch.randint(len(WIDTHS), shape, generator=generator)]


def test_the_space_is_counted():
    assert Space(cells=1).size == 64 and Space().size == 4 ** 9 == 262_144
    assert [Space.weights([[w]]) for w in WIDTHS] == [0, 1728, 3456, 5184]
    assert Space.weights(Space(cells=1).widest) == 15_552


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_cost_is_counted_twice(scale):
    space = Space(scale)
    for seed in range(5):
        widths = some_widths(space, seed=seed).tolist()
        network = Network(scale, widths)
        parameters, macs = count(network, scale)
        assert macs == space.multiply_adds(widths)
        ends = [*network.head.parameters(), *network.tail.parameters()]
        assert parameters - sum(p.numel() for p in ends) == Space.weights(widths)


def test_the_ends_of_the_bypass():
    """Width 0 is the identity, and full width the plain layer."""
    space = Space(cells=1, positions=1)
    net, x = make(space), torch.rand(2, 3, 6, 7).double()
    layer, y = net.cells[0][0], net.head(x)
    for width, cell in (0, y + 0.2 * y), (CHANNELS, y + 0.2 * F.relu(layer.conv(y))):
        expected = net.tail(cell) + netadapt.enlarge(x, 2)
        torch.testing.assert_close(net(x, torch.tensor([[width]])), expected)
    narrow = Layer(8)
    z = narrow(y.float())
    assert torch.equal(z[:, 8:], y.float()[:, 8:]) and not torch.equal(z[:, :8], y.float()[:, :8])


def test_without_layers_a_cell_is_x_and_a_fifth_of_x():
    space = Space(cells=1)
    net, x = make(space), torch.rand(2, 3, 6, 7).double()
    y = net.head(x)
    for z in net(x, torch.zeros(1, 3, dtype=int)), Network(2, [[0] * 3]).double():
        if isinstance(z, Network):
            z.load_state_dict(dict(derive(net, [[0] * 3]).state_dict()))
            z = z(x)
        torch.testing.assert_close(z, net.tail(1.2 * y) + netadapt.enlarge(x, 2),
                                   rtol=1e-6, atol=1e-6)


def test_one_pass_trains_a_network_for_each_image():
    """Loss and gradients are those of B narrow networks, each on its image."""
    space, images = Space(), 5
    net = make(space)
    x, target = torch.rand(images, 3, 8, 9).double(), torch.rand(images, 3, 16, 18).double()
    widths = some_widths(space, images)
    loss = F.l1_loss(net(x, widths), target)
    loss.backward()
    total, grads = 0.0, {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in range(images):
        network = derive(net, widths[i].tolist()).double()
        network.load_state_dict({name: netadapt.leading(net.get_parameter(name), p)
                                 for name, p in network.named_parameters()})  # all digits
        one = F.l1_loss(network(x[i:i + 1]), target[i:i + 1]) / images
        one.backward()
        total += one.item()
        for name, p in network.named_parameters():
            netadapt.leading(grads[name], p).add_(p.grad)
    assert loss.item() == pytest.approx(total, abs=4e-11)
    for name, p in net.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= 4e-11, name
    assert len({tuple(w.flatten().tolist()) for w in widths}) == images


def test_which_channels_see_how_many_images():
    share = mask([[8], [16], [24]]).double().mean(0)[0].reshape(3, 8)
    assert torch.equal(share, torch.tensor([3, 2, 1]).double().div(3)[:, None].expand(3, 8))
    share = mask([[w] for w in WIDTHS]).double().mean(0)[0].reshape(3, 8)[:, 0]  # with width 0
    assert share.tolist() == [0.75, 0.5, 0.25]


def test_the_derived_network_is_the_supernet_so_narrow():
    space = Space()
    net = make(space).float()
    x = torch.rand(2, 3, 9, 8)
    for seed in range(10):
        widths = some_widths(space, seed=seed)
        assert (derive(net, widths.tolist())(x) - net(x, widths)).abs().max() <= 1e-5


def test_the_reductions_of_netadapt():
    left = 1 - np.cumsum(FIRST * DECAY ** np.arange(5000))
    assert left[[0, 9, 49, -1]] == pytest.approx([0.975, 0.790, 0.456, 0.375], abs=6e-4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_descent_keeps_its_budget(scale):
    space = Space(scale)
    least, largest = space.multiply_adds([[0]]), space.multiply_adds(space.widest)
    for seed in range(20):
        rng = random.Random(seed)
        most = rng.uniform(least, largest)
        way = list(descend(space, lambda widths: rng.random(), most, rng))
        costs = [space.multiply_adds(widths) for widths, _ in way]
        assert costs[0] == largest and all(a > b for a, b in zip(costs, costs[1:]))
        assert costs[-1] <= most and (len(costs) == 1 or costs[-2] > most)
        for (before, _), (after, _) in zip(way, way[1:]):
            assert all(a <= b for a, b in zip(sum(after, ()), sum(before, ())))
    assert list(descend(space, lambda _: 0.0, least, random.Random(0)))[-1][0] == ((0, 0, 0),) * 3
    with pytest.raises(ValueError, match="too little"):
        next(descend(space, lambda _: 0.0, least - 1, random.Random(0)))


def test_a_sample_shrinks_a_few_layers_together():
    space = Space()
    start = space.multiply_adds(space.widest)
    for seed in range(50):
        widths = shrunk(space, space.widest, 0.95 * start, random.Random(seed))
        changed = sum(w < CHANNELS for row in widths for w in row)
        assert 1 <= changed <= netadapt.LAYERS and space.multiply_adds(widths) <= 0.95 * start


def test_the_descent_takes_the_best_sample():
    """With a score that asks for the first cell, the others go first."""
    space = Space()
    half = space.multiply_adds([[24] * 3, [8] * 3, [8] * 3])
    *_, (widths, best) = descend(space, lambda widths: sum(widths[0]), half, random.Random(0))
    assert widths[0] == (24, 24, 24) and best == 72


def test_a_whole_run(tmp_path, capsys):
    out = tmp_path / "run"
    netadapt.main(["--steps", "6", "--search", "3", "--batch", "2", "--patch", "8", "--budget",
                   "5G", "--out", str(out)])
    assert {p.name for p in out.iterdir()} == {
        "settings.json", "architecture.json", "network.pt", "history.csv", "distributions.npz",
        "results.json", "results.md"}
    results = json.loads((out / "results.json").read_text())
    assert results["multiply_adds"] <= 5e9 and results["kept"] and results["live"] == 4
    widths = json.loads((out / "architecture.json").read_text())["widths"]
    assert results["multiply_adds"] == Space().multiply_adds(widths)
    with np.load(out / "distributions.npz") as file:
        assert (file["widths"].sum(-1) == 1).all() and (np.diff(file["cost"]) < 0).all()
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [int(row["step"]) for row in rows][:3] == [1, 2, 3] and rows[-1]["step"] == "6"
    assert "dB" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--budget", "80ms"], ["--budget", "0.1G"], ["--scale", "5"]])
def test_a_bad_option_is_one_line(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        netadapt.main([*options, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
