"""HNAS: published networks to the unit, the exact price of a sample, a controller that learns."""
import csv
import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import common
import hnas
from hnas import FULL, OPERATIONS, PUBLISHED, Architecture, Controller, Network


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def drawn(layers, count, seed=0):
    torch.manual_seed(seed)
    controller = Controller(layers)
    return [controller.draw(0.0)[0] for _ in range(count)]


@pytest.mark.parametrize("c, expected", [
    (8, dict(rcab=1210, skip=0, sep3=272, sep5=528, dil3=136, dil5=264, sub=2336, deconv=584)),
    (64, dict(rcab=76629, skip=0, sep3=9344, sep5=11392, dil3=4672, dil5=5696, sub=147712,
              deconv=36928))])
def test_parameters_of_operations(c, expected):
    assert {name: parameters(build(c, 2)) for operations in OPERATIONS.values()
            for name, (build, _) in operations.items() if name in expected} == expected


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("stride", [False, True])
def test_upsampling_operations_enlarge_exactly(scale, stride):
    stride = scale if stride else 1
    for name, (build, _) in OPERATIONS["up"].items():
        large = build(4, stride)(torch.rand(1, 4, 5, 7))
        assert large.shape == (1, 4, 5 * stride, 7 * stride), name


def test_size_of_the_space():
    assert hnas.size(12) == (12 * 18 * 24 * 30) ** 2 * (10 * 15 * 20 * 25) ** 2 * 12
    assert f"{hnas.size(12):.3g}" == "1.63e+21"
    # As sets: a node with n different edges has n (n + 1) / 2 pairs of them.
    normal, up = (math.prod(n * (n + 1) // 2 for n in ns)
                  for ns in ((12, 18, 24, 30), (10, 15, 20, 25)))
    assert (normal, up) == (1_860_651_000, 450_450_000)
    assert f"{normal * up * 12:.1e}" == "1.0e+19"


@pytest.mark.parametrize("scale, name, size, gmacs", [
    (2, "A", 974_019, 357.26), (2, "B", 2_141_290, 490.65), (2, "C", 2_542_545, 904.55),
    (4, "A", 1_105_091, 229.75), (4, "B", 2_502_250, 199.16), (4, "C", 2_690_257, 593.66)])
def test_published_networks(scale, name, size, gmacs):
    a = PUBLISHED[name]
    network = Network(**FULL, scale=scale, architecture=a)
    assert common.count(network, scale) == (size, a.multiply_adds(**FULL, scale=scale))
    assert round(a.multiply_adds(**FULL, scale=scale) / 1e9, 2) == gmacs


def test_published_a_to_the_unit():
    assert PUBLISHED["A"].multiply_adds(**FULL, scale=2) == 357_256_396_800
    assert PUBLISHED["A"].normal[:3] == (("skip", 1), ("sep5", 1), ("dil3", 0))


def test_the_position_decides_the_price():
    networks = [PUBLISHED["A"]._replace(position=position) for position in range(12)]
    costs = [a.multiply_adds(12, 16, 2) for a in networks]
    for position in 0, 9, 11:
        network = Network(12, 16, 2, networks[position])
        assert common.count(network, 2) == (81_459, costs[position])
    assert [round(costs[i] / 1e9, 2) for i in (0, 9, 11)] == [69.23, 30.21, 21.54]
    assert {round((a - b) / 1e9, 3) for a, b in zip(costs, costs[1:])} == {4.335}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_price_and_weights_of_any_sample(scale):
    """Counted by formula and by hooks; and the found network computes what the supernet does."""
    size = dict(layers=3, channels=8, scale=scale)
    net = Network(**size)
    torch.nn.init.normal_(net.last.weight)
    x = torch.rand(1, 3, 6, 7)
    for a in drawn(3, 2, seed=scale):
        network = Network(**size, architecture=a)
        assert common.count(network, scale)[1] == a.multiply_adds(**size)
        network.load_state_dict({name: net.state_dict()[name] for name in network.state_dict()})
        with torch.no_grad():
            assert torch.equal(network(x), net(x, a))
        assert network(x).shape == (1, 3, 6 * scale, 7 * scale)


def test_entropies_at_zero_logits():
    entropy = Categorical(Controller(12).weights(0.0)).entropy()
    expected = (2 * math.log(2 * 3 * 4 * 5) + 8 * math.log(6),
                2 * math.log(2 * 3 * 4 * 5) + 8 * math.log(5), math.log(12))
    parts = [part.sum().item() for part in entropy.split([16, 16, 1])]
    assert parts == pytest.approx(expected, rel=1e-5)
    assert [round(part, 3) for part in expected] == [23.909, 22.450, 2.485]
    assert sum(hnas.candidates(12)) == 156 and len(entropy) == 33


def test_samples_are_of_the_space():
    for a in drawn(5, 50):
        assert 0 <= a.position < 5
        for kind in OPERATIONS:
            edges = getattr(a, kind)
            assert len(edges) == hnas.EDGES
            assert all(name in OPERATIONS[kind] and 0 <= source < 2 + i // 2
                       for i, (name, source) in enumerate(edges))


def test_reinforce_is_the_gradient_of_the_expectation():
    """The mean of log p's gradient times the reward, over many draws, against the exact one."""
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, 3.0, 2.0])
    exact, = torch.autograd.grad(logits.softmax(-1) @ rewards, logits)
    chances = Categorical(logits.softmax(-1))
    draws = chances.sample((40_000,))
    for usual in (0.0, 2.0):
        mean = (chances.log_prob(draws) * (rewards[draws] - usual)).mean()
        estimate, = torch.autograd.grad(mean, logits, retain_graph=True)
        assert (estimate - exact).abs().max() < 0.03


def test_on_cost_alone_the_mean_cost_halves():
    torch.manual_seed(0)
    controller, costs = Controller(12), []

    def reward(a: Architecture):
        costs.append(a.multiply_adds(12, 8, 2, pixels=48 * 48) / 1e8)
        return -0.8 * costs[-1] / 2
    for _ in range(800):
        controller.learn(reward, 0.0)
    weights = controller.weights(1.0).detach()
    assert np.mean(costs[-100:]) < np.mean(costs[:100]) / 2
    assert weights[-1] @ torch.arange(12.0) > 10  # it upsamples late
    assert Categorical(weights[-1]).entropy() < 1


def test_forbidden_candidates_are_never_chosen_and_get_no_gradient():
    controller = Controller(5)
    weights = controller.weights(0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(33))
    for row, n in zip(weights, hnas.candidates(5)):
        assert (row[:n] > 0).all() and (row[n:] == 0).all()
    controller.learn(lambda a: float(a.position), 0.0)
    controller.learn(lambda a: float(a.position), 0.0)
    assert controller.logits.isfinite().all()
    assert (controller.logits[controller.forbidden] == 0).all()


OPTIONS = ["--steps", "6", "--search", "4", "--batch", "2", "--patch", "8"]


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hnas, "LESSON", dict(layers=2, channels=4))
    hnas.main([*OPTIONS, "--out", str(tmp_path / "run")])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"architecture.json", "network.pt", "history.csv", "distributions.npz",
                     "results.json", "results.md", "settings.json"}
    rows = list(csv.DictReader(open(tmp_path / "run" / "history.csv")))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[0]["live"]) == pytest.approx(np.mean(hnas.candidates(2)))
    assert float(rows[0]["multiply_adds"]) > 1e9
    assert np.load(tmp_path / "run" / "distributions.npz")["weights"].shape == (4, 33, 6)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = json.loads((tmp_path / "run" / "architecture.json").read_text())
    a = Architecture(found["position"], *(tuple(map(tuple, found[kind])) for kind in OPERATIONS))
    assert results["multiply_adds"] == a.multiply_adds(2, 4, 2)
    assert results["kept"] is True and results["lost"] <= 0
    assert "sample" in capsys.readouterr().out


def test_a_published_network_is_trained_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(hnas, "FULL", dict(layers=12, channels=4))  # small enough to train here
    hnas.main([*OPTIONS, "--network", "B", "--scale", "4", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["multiply_adds"] == PUBLISHED["B"].multiply_adds(12, 4, 4)


@pytest.mark.parametrize("options, message", [
    (["--network", "D"], "invalid choice"), (["--steps", "3", "--search", "3"], "must be more"),
    (["--scale", "5"], "invalid choice"), (["--rate", "2"], "learning rate")])
def test_bad_options_end_in_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        hnas.main([*options, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
