"""The relaxation is exact where it must be.

Skipping zeros, counting, and handing the weights over change no number.
"""
import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import supernet
from benchmark import lean
from claims import order_loss_released
from properties import case
from search_space import OPERATIONS, Network, Space
from sparsestmax import ACTIVATIONS
from supernet import MixedCell, Side, Supernet, Weights

SPACES = [Space(2, 24, 2, 3), Space(3, 24, 2, 2, output="tanh"), Space(4, 16, 2, 2),
          Space(4, 24, 2, 1, "plain")]


def make(space, activation="sparsestmax", seed=0, spread=1.0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    net = Supernet(space, ACTIVATIONS[activation], spread, **options)
    if dtype == torch.float64:
        net = net.double()  # (.float() would cut the cost tables, float64 by design)
    for tail in net.tails.values():  # born near zero; here they must show what is before them
        torch.nn.init.normal_(tail.conv.weight, std=0.1)
    return net


def outcome(net, progress, dense):
    """Output, and the gradient of a nonlinear function of it for every parameter.

    (Zeros where none arrived.)
    """
    net.zero_grad()
    torch.manual_seed(1)  # gumbel draws
    x = torch.rand(2, 3, 5, 6, dtype=net.gamma.dtype)
    weights = net.weights(progress)
    y = net(x, weights, net.read(weights, dense))
    (y ** 2).mean().backward()
    return y.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad
                        for name, p in net.named_parameters()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_skipping_zeros_changes_nothing(space, activation):
    for seed, progress in enumerate((0.0, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95, 1.0)):
        spread = (1e-3, 0.3, 1.0, 30.0)[seed % 4]  # 30: softmax gives 1 beside 1e-20
        net = make(space, activation, seed, spread=spread)
        (y, grads), (full, full_grads) = outcome(net, progress, False), outcome(net, progress, True)
        torch.testing.assert_close(y, full, rtol=1e-12, atol=1e-12)
        for name in full_grads:
            # Near ties the map's own slope is enormous and magnifies rounding: compare relative to
            # the whole gradient.
            size = 1 + full_grads[name].abs().sum().item()
            torch.testing.assert_close(grads[name], full_grads[name], rtol=1e-9, atol=1e-11 * size,
                                       msg=f"{name} at progress {progress}")


def test_zeros_are_skipped_indeed():
    """Count what is computed at progress 1: one path, one operation a position, one width."""
    net = make(Space(4, 24, 3, 2), dtype=torch.float32)
    architecture = net.derive(net.weights(1.0))
    called = []
    for name, module in net.body.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # a multiply-add counts as two
        net(torch.rand(1, 3, 4, 4), net.weights(1.0))
    assert counter.get_total_flops() == 2 * architecture.multiply_adds(16)
    assert called == [architecture.path[:i + 1] for i in range(len(architecture.path))]
    weights = net.weights(1.0)
    net(torch.rand(1, 3, 4, 4), weights).sum().backward()
    touched = [name for name, p in net.named_parameters()
               if ".ops." in name and p.grad is not None and p.grad.any()]
    touched = {name.split(".")[4] for name in touched}  # body.NODE.ops.0.NAME
    assert touched == set(sum(architecture.operations, ()))


@pytest.mark.parametrize("seed", range(8))
def test_properties(seed, tmp_path):
    """A few of the random cases that tests/properties.py tries for as long as one likes."""
    case(seed, tmp_path)


def test_gumbel_zeros_carry_gradient():
    net = make(Space(2, 16, 2, 2), "gumbel")
    weights = net.weights(0.5)
    net(torch.rand(1, 3, 5, 5, dtype=torch.float64), weights).square().sum().backward()
    dead = weights.gamma.detach() == 0
    assert dead.any() and (net.gamma.grad[dead] != 0).all()


def test_recomputing_changes_nothing(monkeypatch):
    space, again, checkpoint = Space(4, 16, 2, 2), [], supernet.checkpoint

    def counting(cell, *rest, **options):
        again.append(cell)
        return checkpoint(cell, *rest, **options)
    monkeypatch.setattr(supernet, "checkpoint", counting)
    (y, grads), (z, regrads) = (outcome(make(space, spread=0.1, recompute=r), 0.3, False)
                                for r in (False, True))
    assert len(again) == len(set(again)) > 1  # cells, and each once
    assert torch.equal(y, z) and all(torch.equal(grads[name], regrads[name]) for name in grads)


def test_mixture_by_hand():
    """One position, written out: sum_k alpha_k op_k(x).

    Each op is a plain module of search_space with the same weights.
    """
    torch.manual_seed(0)
    space = Space(2, 24, 1, 1)
    net = make(space)
    weights = net.weights(0.0)
    x = torch.rand(1, 24, 5, 5, dtype=torch.float64)
    y = 0
    for k, (name, (operation, *_)) in enumerate(OPERATIONS.items()):
        op = operation(24, 24).double()
        mine = net.body["c"].ops[0][name].state_dict()
        op.load_state_dict({key: mine[key] for key in op.state_dict()})
        y = y + weights.alpha[0, 0, k] * op(x)
    certain = weights.beta.new_tensor([0, 0, 1]).numpy()
    sides = [Side(torch.ones(24).double(), certain, 24, agrees)
             for agrees in (None, torch.ones(1).double())]
    mixed = net.body["c"](x, weights.alpha[0], weights.alpha[0].detach().numpy(), sides)
    torch.testing.assert_close(mixed, x + 0.2 * y)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_derived_network_is_the_supernet_at_progress_1(scale):
    """50 random architectures, so every operation, width and path takes part."""
    rng, space = random.Random(scale), Space(scale, 24, 3, 3)
    for seed in range(50):
        net = make(space, seed=seed, dtype=torch.float32, spread=0.1)
        wanted = space.random(rng)
        lean(net, wanted, 20.0)
        with torch.no_grad():
            weights = net.weights(1.0)
            found = net.derive(weights)
            network = net.inherit(found)
            x = torch.rand(1, 3, 9, 8)
            assert found == wanted
            assert (network(x) - net(x, weights)).abs().max() <= 1e-5
            assert net.cost(weights).item() == found.multiply_adds()  # the third count: to the unit
    assert type(network) is Network


def test_expected_cost_is_the_expectation():
    """Against the mean over every network of a small space.

    It is weighted by the product of its choices' weights.
    """
    space = Space(4, 24, 1, 2)  # exits c, cu, cuu
    net = make(space, spread=0.1)
    weights = net.weights(0.0)
    mean = 0.0
    names = tuple(OPERATIONS)
    choices = enumerate(space.nodes), range(4), range(4), range(3)
    for (g, path), k1, k2, w in itertools.product(*choices):
        chance = (weights.gamma[g] * weights.alpha[0, 0, k1] * weights.alpha[0, 1, k2]
                  * weights.beta[0, 0, w])
        a = space.architecture(path, [[names[k1], names[k2]]], [[space.widths[w]]])
        mean += chance.item() * a.multiply_adds()
    assert net.cost(weights).item() == pytest.approx(mean, rel=1e-12)
    grads = torch.autograd.grad(net.cost(weights), net.logits())
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_order_losses_by_hand():
    net = make(Space(2, 16, 2, 1))  # nodes c, cc, ccu, cu, cuc; leaves ccu, cuc
    gamma = torch.tensor([0.1, 0.4, 0.1, 0.0, 0.4])
    hinge = 0.3 + 0 + 0 + 0.4  # cc over c, ccu under cc, cu under c, cuc over cu
    assert net.order_loss(Weights(gamma, None, None)).item() == pytest.approx(hinge)
    c, cc, ccu, cu, cuc = net.gamma.tolist()
    assert order_loss_released(net).item() == pytest.approx(ccu + cuc - 2 * c)


@pytest.mark.parametrize("space", [Space(2, 24, 2, 2), Space(4, 16, 2, 2), Space(3, 32, 3, 3)],
                         ids=str)
def test_every_derivation_keeps_the_budget(space):
    for seed in range(6):
        net = make(space, seed=seed)
        low, high = net.cost_range()
        budget = low.min() * (high.max() / low.min()) ** random.Random(seed).uniform(0.1, 0.95)
        net.restrict(0.8 * budget, 0.9 * budget, budget)
        for progress in (0.0, 1.0):
            found = net.derive(net.weights(progress), (0.8 * budget, budget), net.weights(0.0))
            assert 0.8 * budget <= found.multiply_adds() <= budget
            assert space.nodes.index(found.path) in net.allowed


def test_knapsack_finds_the_best_within_the_budget():
    """Against trying every network of a small space."""
    space = Space(2, 24, 1, 2)
    for seed in range(20):
        net = make(space, seed=seed)
        scores = [logits.detach().numpy() for logits in net.logits()]
        budget = random.Random(seed).uniform(3e9, 12e9)
        best = {}
        choices = enumerate(space.nodes), range(4), range(4), range(3)
        for (g, path), k1, k2, w in itertools.product(*choices):
            a = net._spell(g, [[k1, k2]], [[w]])
            if 0.8 * budget <= a.multiply_adds() <= budget:
                best[a] = (scores[0][g] + scores[1][0, 0, k1] + scores[1][0, 1, k2]
                           + scores[2][0, 0, w])
        # Costs are rounded to buckets, so what lies within 1 % of the bounds may be passed over,
        # and only that.
        inside = [score for a, score in best.items()
                  if 0.808 * budget <= a.multiply_adds() <= 0.99 * budget]
        if inside:
            found = net._spell(*net._knapsack(*scores, 0.8 * budget, budget))
            assert best[found] >= max(inside) - 1e-9


def test_cost_range_is_tight():
    space = Space(4, 24, 1, 2)
    net = make(space)
    for i, path in enumerate(space.nodes):
        choices = itertools.product(range(4), range(4), range(3))
        costs = [net._spell(i, [[k1, k2]], [[w]]).multiply_adds() for k1, k2, w in choices]
        assert [bound[i] for bound in net.cost_range()] == [min(costs), max(costs)]


def test_impossible_budgets_name_what_is_possible():
    net = make(Space(2, 24, 2, 2))
    low, high = net.cost_range()
    with pytest.raises(ValueError, match=f"smallest.*{low.min() / 1e9:.4g}G"):
        net.restrict(0.8e8, 0.9e8, 1e8)
    with pytest.raises(ValueError, match=f"largest.*{high.max() / 1e9:.4g}G"):
        net.restrict(0.8e12, 0.9e12, 1e12)


def test_forbidden_exits_get_no_weight():
    net = make(Space(2, 24, 3, 2))
    net.restrict(2.4e9, 2.7e9, 3e9)
    assert 0 < len(net.allowed) < len(net.gamma)
    for progress in (0.0, 0.5, 1.0):
        gamma = net.weights(progress).gamma.detach()
        assert gamma[net.allowed].sum() == pytest.approx(1) and gamma.sum() == pytest.approx(1)


def test_forbidden_exits_are_not_computed():
    """Not even for a map whose zeros have a gradient: at an exit without a logit there is none."""
    outcomes = []
    for dense in True, False:
        net = make(Space(2, 24, 3, 2), "gumbel")
        net.restrict(2.4e9, 2.7e9, 3e9)
        called = []
        for name, module in net.body.named_children():
            module.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
        outcomes.append(outcome(net, 0.5, dense))
    allowed = [net.space.nodes[exit] for exit in net.allowed]
    assert set(called) == {node for node in net.space.nodes
                           if any(path.startswith(node) for path in allowed)} < set(net.space.nodes)
    torch.testing.assert_close(*outcomes)


def test_a_map_sees_only_the_exits_that_are_allowed():
    """So a map of a student's need not know what -inf means."""
    seen = []

    def spy(logits, progress):
        seen.append(logits)
        return logits.softmax(-1)
    net = Supernet(Space(2, 24, 3, 2), spy)
    net.restrict(2.4e9, 2.7e9, 3e9)
    net.weights(0.5).gamma[net.allowed[0]].backward()
    assert torch.equal(seen[0], net.gamma[net.allowed]) and len(seen[0]) < len(net.gamma)
    assert sorted(net.gamma.grad.nonzero().flatten().tolist()) == net.allowed.tolist()


def test_an_exit_that_cannot_reach_the_target_is_forbidden():
    net = make(Space(2, 24, 3, 3))
    low, high = net.cost_range()
    net.restrict(4.8e9, 5.4e9, 6e9)
    assert net.allowed.tolist() == np.flatnonzero((low <= 5.4e9) & (high >= 4.8e9)).tolist()
    most = low.min() * 1.05  # hardly anything fits: the cheapest exit is kept
    net.restrict(0.8 * most, 0.9 * most, most)
    assert net.allowed.tolist() == np.flatnonzero(low == low.min()).tolist()


def test_logits_are_saved_and_moved():
    net = make(Space(2, 16, 2, 2))
    assert {"gamma", "alpha", "beta"} <= dict(net.named_parameters()).keys()
    assert sum(isinstance(m, MixedCell) for m in net.modules()) == len(net.cell_of) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_agrees_with_cpu():
    net = make(Space(4, 24, 2, 2))
    x, weights = torch.rand(2, 3, 6, 6).double(), net.weights(0.5)
    on_cpu = net(x, weights)
    on_gpu = net.cuda()(x.cuda(), net.weights(0.5))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_a_budget_is_refused_or_kept(share):
    """Between two exits there may be costs that only networks above the target have, and the last
    of the forbidden exits.
    """
    for space in Space(2, 16, 1, 1), Space(4, 16, 2, 1), Space(3, 24, 2, 2):
        net = Supernet(space, spread=1.0)
        low, high = net.cost_range()
        kept = 0
        for most in np.linspace(low.min(), 1.2 * high.max(), 50):
            try:
                net.restrict(share * most, (1 + share) / 2 * most, most)
            except ValueError:
                continue
            weights = net.weights(1.0)
            assert weights.gamma.sum() == 1
            found = net.derive(weights, (share * most, most))
            kept += share * most <= found.multiply_adds() <= most
        assert kept > 10
