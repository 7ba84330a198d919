"""Three ways to count a network agree: the formula, torch's counter and the differentiable cost.

(The last of them in test_supernet.py.)
"""
import dataclasses
import json
import random
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import search_space
from search_space import (OPERATIONS, PUBLISHED, Architecture, Network, Space, Up, counted_costs,
                          draw_architecture, measured_costs, milliseconds, published)

VALID = Space(scale=4).architecture("cuc", [["dws"] * 5] * 2, [[24, 32, 40, 56]] * 2)


def counted(architecture: Architecture, height: int, width: int) -> int:
    """Multiply-adds by torch's own counter, on tensors without memory."""
    with torch.device("meta"):
        network, x = Network(architecture), torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
    assert counter.get_total_flops() % 2 == 0  # it counts a multiply-add as two
    return counter.get_total_flops() // 2


def random_architectures(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        space = Space(rng.choice((2, 3, 4)), rng.choice((16, 24, 32, 48, 64)), rng.randint(1, 5),
                      rng.randint(1, 5), rng.choice(("early", "plain")),
                      rng.choice(("skip", "tanh")))
        yield space.random(rng)


def test_formula_equals_torch_for_published_and_200_random_networks():
    for a in [published(name) for name in PUBLISHED] + list(random_architectures(200)):
        assert a.multiply_adds(11 * 7) == counted(a, 11, 7), a
        with torch.device("meta"):
            assert a.parameters() == sum(p.numel() for p in Network(a).parameters()), a


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    a, (*_, parameters, gmacs) = published(name), PUBLISHED[name]
    assert a.parameters() == pytest.approx(1e6 * parameters, abs=501)  # to the last digit printed
    assert a.multiply_adds(256 ** 2) == pytest.approx(1e9 * gmacs, rel=0.005)
    biases = 256 ** 2 * sum(layer.biases * layer.m ** 2 for layer in a.layers())
    tolerance = 5e6 if name[0] == "B" else 5e7  # biases are the whole remainder, to that digit
    assert a.multiply_adds(256 ** 2) + biases == pytest.approx(1e9 * gmacs, abs=tolerance)


def test_tree_at_full_size():
    for scale, counts in (4, (55, 35, 20, 15)), (2, (20, 15, 5, 5)), (3, (20, 15, 5, 5)):
        space = Space(scale)
        cells = sum(node[-1] == "c" for node in space.nodes)
        assert (len(space.nodes), cells, len(space.nodes) - cells, len(space.leaves)) == counts
        assert len(set(space.nodes)) == len(space.nodes)
        for i, node in enumerate(space.nodes):
            assert not i or node[:-1] in space.nodes[:i]  # parents come first


def test_layers_add_up_and_chain():
    """A network holds what its layers hold, and each layer takes what the one before gives."""
    for a in random_architectures(50, seed=2):
        layers = list(a.layers())
        assert a.parameters() == sum(layer.weights + layer.biases for layer in layers), a
        assert [layer.c for layer in layers[1:]] == [layer.d for layer in layers[:-1]], a


def test_size_counts_every_network():
    space = Space(scale=2, channels=16, cells=2, positions=2)
    per_cell = 4 ** 2 * 2  # two operations, one width out of (8, 16)
    assert space.size == 3 * per_cell ** 2 + 2 * per_cell  # exits cc, ccu, cuc; and c, cu


@pytest.mark.parametrize("upsample", ["early", "plain"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_exit_reaches_the_scale(scale, upsample):
    space = Space(scale, 16, cells=2, positions=1, upsample=upsample)
    for path in space.nodes:
        a = space.architecture(path, [["conv3x3"]] * path.count("c"), [[]] * path.count("c"))
        assert Network(a)(torch.rand(1, 3, 5, 6)).shape == (1, 3, 5 * scale, 6 * scale)


def test_radius_is_where_the_influence_ends():
    """Perturb one LR pixel: nothing beyond `radius` may change, or tiles would show."""
    for a in random_architectures(20, seed=1):
        torch.manual_seed(0)
        network, r = Network(a).double(), a.radius
        x = torch.rand(1, 3, 1, 2 * r + 5, dtype=torch.float64)
        y = x.clone()
        y[..., 0] += 1
        with torch.no_grad():
            changed = (network(x) != network(y)).any(2)[0].any(0)
        assert not changed[(r + 1) * a.scale:].any()


def test_json_round_trip():
    for a in random_architectures(20):
        assert Architecture.from_json(a.to_json()) == a


@pytest.mark.parametrize("change, message", [
    (dict(scale=5), "scale"), (dict(scale=2), "cannot reach"), (dict(path="ucc"), "begin"),
    (dict(path="cxc"), "made of"), (dict(path="cuuuc"), "cannot reach"),
    (dict(path="c" * 10 ** 6), "at most"), (dict(path=7), "path"),
    (dict(channels=2 ** 31), "channels"), (dict(channels=60), "channels"),
    (dict(channels="64"), "channels"), (dict(operations=[["conv5x5"] * 5] * 2), "conv5x5"),
    (dict(operations=[["dws"] * 5]), "2 cells"),
    (dict(operations=[["dws"] * 4] * 2), "4 operations"),
    (dict(widths=[[24, 32, 40, 48]] * 2), "48"), (dict(widths=[[24, 32, 40, True]] * 2), "True"),
    (dict(upsample="late"), "upsample"), (dict(output="none"), "output"), (dict(extra=1), "extra"),
    (dict(operations=None), "architecture"), (dict(operations=[[["dws"]]] * 2), "operation")])
def test_what_is_wrong_is_said(change, message):
    fields = dataclasses.asdict(VALID) | change
    if change == dict(scale=2):
        fields["path"] = "cucu"
    with pytest.raises(ValueError, match=message) as error:
        Architecture.from_json(json.dumps(fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", "{", '"c"', "[" * 10 ** 5])
def test_rubbish_is_not_an_architecture(text):
    with pytest.raises(ValueError):
        Architecture.from_json(text)


def test_picture_shows_every_layer():
    axis = draw_architecture(published("A-1")).axes[0]
    names = [text.get_text().split()[0] for text in axis.texts]
    assert names.count("up") == 2 and sum(name in OPERATIONS for name in names) == 20
    assert [bar.get_height() for bar in axis.patches][1:6] == [64, 24, 24, 24, 64]


def test_the_sum_of_parts_is_the_count():
    rng = random.Random(1)
    for _ in range(60):
        space = Space(rng.choice((2, 3, 4)), rng.choice((16, 24, 64)), 3, 3,
                      upsample=rng.choice(("early", "plain")))
        a, costs = space.random(rng), counted_costs(space)
        assert costs.of(a) == a.multiply_adds()


@pytest.mark.parametrize("scale, upsample", [(2, "early"), (3, "early"), (4, "early"),
                                             (4, "plain")])
def test_a_table_of_times_is_made_of_the_right_parts(monkeypatch, scale, upsample):
    """With a clock that shows multiply-adds, and twice as many for a whole network.

    The table must be twice the count.
    """
    def clock(module, *inputs, seconds=0.3):
        if not isinstance(module, torch.nn.Module):
            return 0.0
        pixels = inputs[0].shape[2] * inputs[0].shape[3]
        if isinstance(module, Network):
            return 2.0 * module.architecture.multiply_adds(pixels)
        if isinstance(module, Up):
            pixels *= module.factor ** 2
        return float(pixels * sum(p.numel() for p in module.parameters() if p.dim() == 4))
    monkeypatch.setattr(search_space, "milliseconds", clock)
    space, lines = Space(scale, 16, 2, 2, upsample=upsample), []
    table, counted = measured_costs(space, "cpu", lines.append), counted_costs(space)
    about = partial(pytest.approx, rel=0.005)  # a third of 1280 pixels is no whole number
    assert table.unit == "ms"
    assert table.parts == about({part: 2 * cost for part, cost in counted.parts.items()})
    assert any("dws" in line for line in lines) and "2.00 times the sum" in lines[-1]


def test_milliseconds_are_milliseconds():
    assert 19 < milliseconds(lambda: time.sleep(0.02), seconds=0.1) < 200
