"""tests/networks.py, field.py and claims.py: what is trained, and what the tables say."""
import argparse
import os
import random
import time

import pytest
import torch

import claims
import common
import field
import networks
import supernet
from chance import forks, task
from search_space import Space
from supernet import Supernet

SPACE = Space(2, 24, 3, 3)
FOUND = [SPACE.random(random.Random(seed)) for seed in (1, 2, 3)]


def test_near_is_one_choice_away():
    rng = random.Random(0)
    for a in FOUND * 30:
        b = networks.near(a, SPACE, rng)
        changed = [(x, y) for level in ("operations", "widths")
                   for row, other in zip(getattr(a, level), getattr(b, level))
                   for x, y in zip(row, other) if x != y]
        assert len(changed) + (a.path != b.path) == 1
        assert abs(len(a.path) - len(b.path)) <= 1 and b.path in SPACE.nodes


def test_the_groups_are_mixed_and_no_network_comes_twice():
    drawn = networks.draw(SPACE, FOUND, 40)
    groups = [group for group, _ in drawn]
    assert [groups.count(g) for g in ("found", "chance", "budget", "near")] == [3, 20, 10, 10]
    assert len({a for _, a in drawn}) == 43
    assert all(abs(a.multiply_adds() / 12e9 - 1) < 0.05 for g, a in drawn if g == "budget")
    assert networks.draw(SPACE, FOUND, 20) == drawn[:23]  # so a table can grow


def test_a_row_spells_its_network(tmp_path):
    rows = [dict(number=n, seed=0, path=a.path, channels=24,
                 operations=" / ".join(map(" ".join, a.operations)),
                 widths=" / ".join(" ".join(map(str, w)) for w in a.widths))
            for n, a in enumerate(FOUND)]
    networks.write(tmp_path / "t.csv", rows[::-1])
    assert [networks.architecture(row) for row in networks.read(tmp_path / "t.csv")] == FOUND


def test_the_table_that_is_shipped_says_what_its_networks_are():
    rows = networks.read(field.ROOT / "notebooks" / "results" / "bench-x2.csv")
    numbers = {}
    for row in rows:
        a = networks.architecture(row)
        assert (a.parameters(), a.multiply_adds()) == (int(row["parameters"]),
                                                       int(row["multiply_adds"]))
        off = a.multiply_adds() / networks.BUDGET
        assert row["group"] in ("chance", "near") or 0.8 <= off <= (
            1 if row["group"] == "found" else 1 + networks.WITHIN)
        assert numbers.setdefault(row["number"], a) == a
        assert 30.2 < float(row["Set14_psnr"]) < 34  # above bicubic enlargement
    assert len(set(numbers.values())) == len(numbers)  # no network under two numbers
    assert len({(row["number"], row["seed"]) for row in rows}) == len(rows)


def test_the_rivals_enlarge_and_cost_what_is_known():
    torch.manual_seed(0)
    for scale in 2, 3:
        found = Space(scale, 24, 3, 3).architecture("c", [["residual"] * 3], [[24, 24]])
        for make in field.rivals(found).values():
            network, x = make(), torch.rand(2, 3, 24, 20)
            before = network(x)
            assert before.shape == (2, 3, 24 * scale, 20 * scale)
            common.count(network, scale)
            assert torch.equal(network(x), before)  # counting leaves it as it is
            inner = [*network.body.parameters()]
            assert 0 < len(inner) < len([*network.parameters()])
    # SESR at x2 by hand: 5x5 from 3 to 16, m 3x3, 5x5 to 12, and PReLU's numbers.
    for m in 5, 11:
        weights = 25 * 3 * 16 + m * 9 * 16 * 16 + 25 * 16 * 12
        parameters, macs = common.count(field.Sesr(2, m), 2)
        assert macs == weights * 640 * 360
        assert parameters == weights + (m + 1) * (16 + 16) + 12


def test_the_table_takes_the_better_of_two_shapes():
    rows = [dict(name="a", batch=b, patch=p, seed=s, parameters=1000, multiply_adds=2e9,
                 milliseconds=5, Set5_psnr=q) for b, p, s, q in
            ((4, 48, 0, 31.0), (16, 24, 0, 30.0), (4, 48, 1, 31.2))]
    assert field.better_shapes(rows, ["Set5"]) == {"a": 48}
    assert field.table_of(rows, ["Set5"]).splitlines()[2] == (
        "| a | 4 of 48x48 | 1,000 | 2.00 G | 5 | 31.10 ± 0.14 |")
    assert field.shapes_worth(rows, ["Set5"]) == {("a", 48)}


def test_shapes_that_one_seed_does_not_tell_apart_get_all_seeds():
    rows = [dict(name="a", patch=p, seed=s, Set5_psnr=q) for p, s, q in
            ((48, 0, 36.98), (24, 0, 36.99))]
    assert field.shapes_worth(rows, ["Set5"]) == {("a", 24), ("a", 48)}
    rows.append(dict(name="a", patch=24, seed=1, Set5_psnr=36.2))
    assert field.shapes_worth(rows, ["Set5"]) == {("a", 24), ("a", 48)}
    assert field.better_shapes(rows, ["Set5"]) == {"a": 48}  # by the mean


def test_the_tables_of_the_claims():
    row = dict(path="cc", multiply_adds=1e10, lost=2, exits=1, operations=1.5, widths=2, search=30,
               seconds=90)
    rows = [row | dict(name=name, seed=seed, Set5_psnr=psnr, path=path)
            for name, seed, psnr, path in (
                ("sparsestmax", 0, 37.0, "cc"), ("order 0", 0, 36.5, "c"),
                ("sparsestmax", 1, 37.2, "cuc"))]
    maps, orders, phases = claims.tables_of(rows, ["Set5"]).split("\n\n")[:3]
    assert maps.splitlines()[2:] == ["| sparsestmax | 2.00 ± 0.00 | 1.0 ± 0.0 | 1.5 ± 0.0 | "
                                     "2.0 ± 0.0 | 30 ± 0 | 10.0 ± 0.0 | 37.10 ± 0.14 |"]
    assert orders.splitlines()[2:] == ["| without | c | 1.0 | 10.0 | 36.50 |",
                                       "| as it is | cc, cuc | 2.5 ± 0.7 | 10.0 ± 0.0 | "
                                       "37.10 ± 0.14 |"]
    assert phases.splitlines()[2:] == ["| one: the found network goes on | 90 ± 0 | 37.10 ± 0.14 |"]


def test_a_trial_changes_what_its_name_says(monkeypatch):
    """And nothing of it is left for the worker's next trial."""
    seen = []

    def start(settings, seed, architecture=None):
        seen.append((settings.activation, supernet.ORDER, Supernet.order_loss))
        raise StopIteration
    monkeypatch.setattr(claims, "start", start)
    monkeypatch.setattr(supernet, "ORDER", supernet.ORDER)
    monkeypatch.setattr(Supernet, "order_loss", Supernet.order_loss)
    plain = supernet.ORDER, Supernet.order_loss
    for name in "order released", "softmax", "order 100", "sparsestmax":
        with pytest.raises(StopIteration):
            claims.trials(argparse.Namespace(activation="none"), name, 0)
    assert seen == [("sparsestmax", plain[0], claims.order_loss_released), ("softmax", *plain),
                    ("sparsestmax", 100 * plain[0], plain[1]), ("sparsestmax", *plain)]


def test_a_worker_that_is_killed_ends_the_work_in_one_line():
    with forks(2) as pool:
        assert list(pool.map(task, [(abs, -1), (abs, -2)])) == [1, 2]
    with pytest.raises(ValueError, match="fewer --workers"), forks(2) as pool:
        list(pool.map(task, [(abs, -1), (os._exit, 9), (abs, -2)]))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), forks(2) as pool:
        pool.submit(task, (time.sleep, 60))
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 30  # nobody waits for what is not wanted any more
