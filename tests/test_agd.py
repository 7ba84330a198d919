"""AGD: counts to the unit, one width at a time with a slope for all, and the found network's price.
"""
import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import agd
import common
from agd import FULL, Network, Supernet
from search_space import OPERATIONS, Space
from supernet import Weights

SMALL = Space(4, channels=24, cells=2, positions=3)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(space=SMALL, spread=1.0, seed=0):
    torch.manual_seed(seed)
    net = Supernet(space)
    with torch.no_grad():
        net.alpha.normal_(std=spread)
        net.beta.normal_(std=spread)
    torch.nn.init.normal_(net.shell.last.weight, std=0.1)  # born near zero; here it must show
    return net


def one_hot(net) -> Weights:
    """The weights of the network that `derive` would take."""
    alpha = F.one_hot(net.alpha.argmax(-1), 4).float()
    return Weights(torch.ones(1), alpha, net.weights(1.0).beta.detach())


def test_counts_of_the_supernet():
    net = Supernet(Space(4, **FULL))
    mixture = [parameters(op) for op in net.cells[0].ops[0].values()]
    assert mixture == [4_096, 36_864, 77_824, 39_168] and sum(mixture) == 157_952
    assert parameters(net.shell) == 151_235
    assert parameters(net) - net.alpha.numel() - net.beta.numel() == 4_100_035
    assert net.alpha.shape == (5, 5, 4) and net.beta.shape == (5, 4, 5)  # 100 logits each
    assert net.alpha.abs().max() < 1e-2


def test_size_of_the_space():
    assert agd.size(Space(4, **FULL)) == (4 ** 5 * 5 ** 4) ** 5
    assert f"{agd.size(Space(4, **FULL)):.3g}" == "1.07e+29"


def test_the_shell_takes_most():
    shell = agd.shell_cost(64, 4)
    assert round(shell / 1e9, 4) == 80.2566
    parts = [9 * 64 * 64 * 57_600 * m ** 2 / 1e9 for m in (4, 2, 1)]  # HR and second up; up; trunk
    assert [round(part, 2) for part in parts] == [33.97, 8.49, 2.12]
    low, high = Supernet(Space(4, **FULL)).cost_range()
    assert [round((shell + cells) / 1e9, 2) for cells in (low, high)] == [81.64, 186.42]


@pytest.mark.parametrize("name, size, gmacs", [("1", 410_307, 95.18), ("2", 467_811, 98.49)])
def test_published_networks(name, size, gmacs):
    a = agd.published(name)
    assert a.path == "cccccuu"
    assert common.count(Network(a), 4) == (size, agd.multiply_adds(a))
    assert round(agd.multiply_adds(a) / 1e9, 2) == gmacs


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_found_network_is_the_supernet_at_one_hot_weights(scale):
    net = make(Space(scale, 24, 2, 3), seed=scale)
    weights, a = one_hot(net), agd.derive(net)
    network, x = net.inherit(a), torch.rand(1, 3, 6, 5)
    with torch.no_grad():
        assert (network(x) - net(x, weights)).abs().max() < 1e-5
        cost = agd.shell_cost(24, scale) + net.cost(weights).item()
    assert network(x).shape == (1, 3, 6 * scale, 5 * scale)
    assert common.count(network, scale)[1] == agd.multiply_adds(a) == cost  # counted three ways


def test_one_width_forward_as_often_as_softmax_says():
    net = make()
    mean = 0
    for _ in range(2000):
        beta = net.weights(0.5).beta
        assert beta.detach().round(decimals=5).unique().tolist() == [0, 1]
        mean = mean + beta.detach() / 2000
    torch.testing.assert_close(mean, net.beta.softmax(-1).detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(net.expected().beta, net.beta.softmax(-1))
    assert torch.equal(net.weights(1.0).beta.argmax(-1), net.beta.argmax(-1))  # no draw at the end


def test_every_width_and_operation_learns():
    """The drawn widths carry a gradient to all logits; the ends of the sandwich to alpha alone."""
    net = make(spread=1e-3)
    x = torch.rand(2, 3, 6, 6)
    weights = net.weights(0.5)
    net(x, weights).square().mean().backward()
    assert (net.alpha.grad != 0).all() and (net.beta.grad != 0).all()
    net.zero_grad()
    for which in 0, -1:
        net(x, net.weights(0.5)._replace(beta=net.all_widths(which))).square().mean().backward()
    assert (net.alpha.grad != 0).all() and net.beta.grad is None


def test_dense_evaluation_changes_no_number():
    net = make()
    x, weights = torch.rand(1, 3, 6, 6), net.weights(0.5)
    sliced = net(x, Weights(*(w.detach() for w in weights)))
    torch.testing.assert_close(net(x, weights), sliced, rtol=1e-4, atol=1e-5)


def test_the_sandwich():
    net, generator = make(), torch.Generator().manual_seed(0)

    class Patches:
        def batch(self, size, generator):
            return torch.rand(size, 3, 4, 4, generator=generator), torch.zeros(size, 3, 16, 16)
    seen = []
    forward = net.forward
    net.forward = lambda x, weights: (seen.append(weights.beta), forward(x, weights))[1]
    args = type("Options", (), dict(batch=1))
    agd.sandwich(net, Patches(), args, generator, net.weights(0.5), False)
    widest, narrowest, drawn = seen
    assert (widest[..., -1] == 1).all() and (narrowest[..., 0] == 1).all() and drawn.requires_grad
    seen.clear()
    agd.sandwich(net, Patches(), args, generator, net.weights(0.5), True)
    assert len(seen) == 4 and not any(beta.requires_grad for beta in seen)
    assert all((beta.sum(-1) == 1).all() for beta in seen)


def test_expected_cost_is_the_mean_over_draws():
    net = make(Space(4, 24, 1, 2))
    weights, mean, names = net.expected(), 0.0, tuple(OPERATIONS)
    for i in range(4):
        for j in range(4):
            for w in range(3):
                chance = weights.alpha[0, 0, i] * weights.alpha[0, 1, j] * weights.beta[0, 0, w]
                a = agd.spell(net.space, [[i, j]], [[w]])
                assert a.operations == ((names[i], names[j]),)
                mean += chance.item() * (agd.multiply_adds(a) - agd.shell_cost(24, 4))
    assert net.cost(weights).item() == pytest.approx(mean, rel=1e-6)


OPTIONS = ["--steps", "5", "--search", "3", "--batch", "2", "--patch", "8"]


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(agd, "LESSON", dict(channels=16, cells=2, positions=2))
    agd.main([*OPTIONS, "--budget", "5.5G", "--out", str(tmp_path / "run")])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"architecture.json", "network.pt", "history.csv", "distributions.npz",
                     "results.json", "results.md", "settings.json"}
    rows = list(csv.DictReader(open(tmp_path / "run" / "history.csv")))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert float(rows[0]["live_operations"]) == 4
    assert float(rows[0]["multiply_adds"]) > agd.shell_cost(16, 4)
    arrays = np.load(tmp_path / "run" / "distributions.npz")
    assert arrays["alpha"].shape == (3, 2, 2, 4) and arrays["beta"].shape == (3, 2, 1, 2)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"] is False and abs(results["lost"]) < 20
    assert results["multiply_adds"] > agd.shell_cost(16, 4)
    assert "sample" in capsys.readouterr().out


def test_a_published_network_is_trained_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(agd, "FULL", dict(channels=40, cells=5, positions=5))
    agd.main([*OPTIONS, "--network", "2", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["multiply_adds"] == agd.multiply_adds(agd.published("2"))


@pytest.mark.parametrize("options, message", [
    (["--network", "3"], "invalid choice"), (["--network", "1", "--scale", "2"], "four times"),
    (["--budget", "3G"], "--budget must be 11.76G to"), (["--budget", "80ms"], "--budget must be"),
    (["--steps", "3", "--search", "3"], "must be more")])
def test_bad_options_end_in_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        agd.main([*options, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
