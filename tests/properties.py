"""Random spaces, budgets, activations and moments through everything, for as long as you like.

What must hold, held?

    python tests/properties.py --minutes 20
    python tests/properties.py --case 12345                    # one case again, with its traceback
"""
import random
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import CommandLine
from search import checked, whole
from search_space import (Architecture, Network, Space, counted_costs, load_run, load_tensors,
                          save_tensors)
from sparsestmax import ACTIVATIONS
from supernet import Supernet
from test_search_space import counted


def case(seed: int, folder: Path):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    space = Space(rng.choice((2, 3, 4)), rng.choice((16, 24, 32)), rng.randint(1, 3),
                  rng.randint(1, 3), rng.choice(("early", "plain")), rng.choice(("skip", "tanh")))
    name = rng.choice(list(ACTIVATIONS))
    net = Supernet(space, ACTIVATIONS[name], spread=10 ** rng.uniform(-4, 1.5),
                   recompute=rng.random() < 0.3)

    # A budget between the cheapest and the dearest network: either it is refused at once, or
    # derive keeps it.
    low, high = net.cost_range()
    most = rng.uniform(0.5 * low.min(), 1.3 * high.max())
    least = rng.choice((0.8, 0.9)) * most
    try:
        net.restrict(least, (least + most) / 2, most)
        possible = True
    except ValueError:
        possible = False
        net.allowed = torch.arange(len(space.nodes))

    # Forward, backward.
    progress = rng.choice((0.0, 1.0, rng.random()))
    weights = net.weights(progress)
    for level in weights:
        assert (level >= 0).all(), "off the simplex"
        assert torch.allclose(level.sum(-1), torch.ones(()), atol=1e-5), "off the simplex"
    x = torch.rand(rng.randint(1, 2), 3, rng.randint(3, 9), rng.randint(3, 9))
    y = net(x, weights)
    size = space.scale * x.shape[2], space.scale * x.shape[3]
    assert y.shape == (len(x), 3, *size) and y.isfinite().all(), "the output"
    cost = net.cost(weights)
    assert low.min() * (1 - 1e-9) <= cost <= high.max() * (1 + 1e-9), "the cost"
    (y.mean() + 1e-9 * cost.float() + net.order_loss(weights)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()), "a gradient"

    # Derive, count three times, leave the supernet.
    with torch.no_grad():
        weights = net.weights(1.0)
        a = net.derive(weights, (least, most) if possible else None)
        assert not possible or least <= a.multiply_adds() <= most, "the budget"
        height, width = x.shape[2:]
        count = counted(a, height, width)
        assert a.multiply_adds(height * width) == count, "torch counts otherwise"
        assert counted_costs(space).of(a) == a.multiply_adds(), "the table counts otherwise"
        network = net.inherit(a)
        one_hot = all(((w == 0) | (w == 1)).all() for w in weights)
        if one_hot and a == net.derive(weights):
            difference = abs(net.cost(weights).item() - a.multiply_adds())
            assert difference < 0.5, "the supernet counts otherwise"
            before, after = net(x, weights), network(x)
            scale = max(1, before.abs().max())
            assert (before - after).abs().max() <= 1e-5 * scale, "another function"

        # To a file and back.
        assert Architecture.from_json(a.to_json()) == a
        (folder / "architecture.json").write_text(a.to_json())
        save_tensors(network.state_dict(), folder / "network.pt")
        assert torch.equal(load_run(folder)(x), network(x)), "the file computes otherwise"
        net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})
        save_tensors(net.state_dict(), folder / "supernet.pt")
        again = Supernet(space, ACTIVATIONS[name])
        again.allowed = net.allowed  # as long as the one that is loaded
        again.load_state_dict(load_tensors(folder / "supernet.pt"))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters()))
    other = space.random(rng)  # and any other network of the space
    network = Network(other)
    assert network(x).isfinite().all()
    assert other.parameters() == sum(p.numel() for p in network.parameters())
    return possible


def main():
    parser = CommandLine(prog="properties.py", description="Random cases through build, forward, "
                         "backward, derive, count, save and load.")
    add = parser.add_mutually_exclusive_group().add_argument
    minutes = checked(float, lambda m: 0 < m < 1e6, "a number of minutes above 0")
    add("--minutes", type=minutes, default=20.0, help="(default: 20)")
    add("--case", type=whole, help="only this one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.case is not None:
            return case(args.case, Path(folder))
        begun, tried, possible, failed = time.time(), 0, 0, []
        with suppress(KeyboardInterrupt):  # Ctrl-C ends it, too
            while time.time() - begun < 60 * args.minutes:
                try:
                    possible += case(tried, Path(folder))
                except Exception:
                    failed.append(tried)
                    print(f"case {tried}: {traceback.format_exc().splitlines()[-1]}", flush=True)
                tried += 1
    print(f"{tried} cases in {(time.time() - begun) / 60:.3g} minutes, {possible} with a budget "
          f"that can be met; {len(failed)} failed: {failed[:20]}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
