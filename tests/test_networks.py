"""tests/networks.py: which networks are in the table, and that a row spells its network."""
import random

import networks
from search_space import Space

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
