"""Every map of sparsestmax.py keeps its promises; nothing else turns logits into weights.

And the assignment's tasks.
"""
import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checks
from search_space import Space
from sparsestmax import ACTIVATIONS, get_activation
from supernet import Supernet

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name, law", [(name, law) for name, f in ACTIVATIONS.items()
                                       for law in checks.laws_of(f)])
def test_every_map_keeps_the_laws_and_its_promises(name, law):
    checks.laws_of(ACTIVATIONS[name])[law](ACTIVATIONS[name])


# --- The checks find what is wrong ----------------------------------------------------------------

def broken(f, *promises):
    f.promises = {"deterministic", *promises}
    return f


@pytest.mark.parametrize("law, f", [
    ("on the simplex", broken(lambda z, progress: z.softmax(-1) * 1.01)),
    ("on the simplex", broken(lambda z, progress: z)),
    ("leading shapes", broken(lambda z, progress: z.softmax(-1) * (2 - len(z) / 5) if z.dim() == 2
                              else z.softmax(-1))),
    ("permutation", broken(lambda z, progress: (z + torch.arange(z.shape[-1])).softmax(-1))),
    ("shift", broken(lambda z, progress: (z ** 3).softmax(-1))),
    ("order", broken(lambda z, progress: (-z).softmax(-1))),
    ("one-hot at progress 1", broken(lambda z, progress: z.softmax(-1), "one-hot at progress 1")),
    ("exact gradient", broken(lambda z, progress: z.detach().softmax(-1) + 0 * z,
                              "exact gradient")),
    ("learns", broken(lambda z, progress: torch.eye(z.shape[-1], dtype=z.dtype)[z.argmax(-1)]
                      + 0 * z)),
    ("thaws", broken(lambda z, progress: ACTIVATIONS["softmax"](z), "thaws")),  # nobody ever leaves
    # Its last two lock.
    ("thaws", broken(lambda z, progress: ACTIVATIONS["sparsestmax"](z, progress), "thaws"))])
def test_a_broken_map_is_found(law, f):
    with pytest.raises(checks.Failed, match="(?s)input.*yours.*expected"):
        checks.laws_of(f)[law](f)


# --- What a wrong map is told ---------------------------------------------------------------------

def wide(z):
    return z.float() if z.dtype == torch.bfloat16 else z


def by_halving(z, shift=True):
    """Entmax-1.5, its tau found by halving an interval: a search that no gradient gets through."""
    x = wide(z)
    if shift:
        x = x - x.amax(-1, keepdim=True)
    with torch.no_grad():
        high = x.amax(-1, keepdim=True) / 2
        low = high - 1
        for _ in range(50):
            tau = (low + high) / 2
            much = (x / 2 - tau).clamp(min=0).square().sum(-1, keepdim=True) > 1
            low, high = torch.where(much, tau, low), torch.where(much, high, tau)
    return (x / 2 - tau).clamp(min=0).square().to(z.dtype)


def numpy_inside(z, progress):
    e = np.exp(z.numpy() - z.numpy().max(-1, keepdims=True))
    return torch.from_numpy(e / e.sum(-1, keepdims=True))


def numpy_at_last(z, progress):
    return z.softmax(-1).detach().float().numpy()


def numpy_in_disguise(z, progress):
    p = np.exp((z - z.amax(-1, keepdim=True)).detach().double().numpy())
    return torch.tensor(p / p.sum(-1, keepdims=True)).to(z.dtype)


def items(z, progress):
    rows = z.reshape(-1, z.shape[-1]).softmax(-1)
    return torch.tensor([[w.item() for w in row] for row in rows], dtype=z.dtype).reshape(z.shape)


def rows_and_columns(z, progress):
    rows, columns = z.shape
    return z.softmax(-1)


def changes_its_input(z, progress):
    z -= z.amax(-1, keepdim=True)
    return z.softmax(-1)


def changes_its_input_unseen(z, progress):
    z.data.sub_(z.data.amax(-1, keepdim=True))
    return z.softmax(-1)


def changes_on_the_way(z, progress):
    p = (z - z.amax(-1, keepdim=True)).exp()
    p /= p.sum(-1, keepdim=True)
    return p


def exp_of_anything(z, progress):
    return z.exp() / z.exp().sum(-1, keepdim=True)


def half_detached(z, progress):
    e = (z - z.amax(-1, keepdim=True)).double().exp()
    return (e / e.sum(-1, keepdim=True).data).to(z.dtype)


GRADIENT = r"autograd's gradient is the slope .*weight \d changes by .* per unit of logit \d"
LOST = "the gradient is lost: torch sees no way"
SLIGHTLY = r"sums to (1|1\.0+\d+|0\.99\d+) \(\S+ (above|below) 1\)"  # and by how much


@pytest.mark.parametrize("message, f", [
    # Not shifted by the maximum: only a little off, or not a number.
    ("float32.*" + SLIGHTLY + ".*subtract the row's largest",
     broken(lambda z, progress: by_halving(z, shift=False))),
    ("float32.*" + SLIGHTLY,
     broken(lambda z, progress: (wide(z) - wide(z).logsumexp(-1, True)).exp().to(z.dtype))),
    ("weight nan.*subtract the row's largest", broken(exp_of_anything)),
    # As much as an offset does in its place: the sum is 1, the weights are others.
    ("added to all logits changes nothing.*off by",
     broken(lambda z, progress: (z * (1 + z.mean(-1, keepdim=True) / 1e5)).softmax(-1))),
    # The sum looks like 1 in six digits.
    (r"has the weight 1, not in \[0, 1\] \(3e-09 above 1\)",
     broken(lambda z, progress: z.softmax(-1) * (1 + 3e-9))),
    (r"sums to 1 \(3e-09 below 1\)", broken(lambda z, progress: z.softmax(-1) * (1 - 3e-9))),
    # The gradient gets lost.
    ("the gradient is lost: torch cannot follow NumPy", broken(numpy_inside)),
    ("the gradient is lost: torch cannot follow NumPy",
     broken(lambda z, progress: torch.tensor(np.asarray(z.double())).softmax(-1).to(z.dtype))),
    ("the gradient is lost: torch cannot follow NumPy",
     broken(lambda z, progress: (z - np.max(z)).softmax(-1))),
    ("the gradient is lost: the result is no tensor but a ndarray", broken(numpy_at_last)),
    (LOST, broken(numpy_in_disguise)), (LOST, broken(items)),
    (LOST, broken(lambda z, progress: z.detach().softmax(-1))),
    (LOST, broken(lambda z, progress: z.data.softmax(-1))),
    (LOST, broken(torch.no_grad()(lambda z, progress: z.softmax(-1)))),
    (GRADIENT, broken(lambda z, progress: by_halving(z), "exact gradient")),  # its tau is detached
    (GRADIENT, broken(half_detached, "exact gradient")),
    ("all zero", broken(lambda z, progress: z.detach().softmax(-1) + 0 * z)),
    # A tie counted more than once.
    ("only the first of them", broken(lambda z, progress: (z == z.amax(-1, True)).to(z.dtype))),
    # Changes in place.
    ("your map changed its input", broken(changes_its_input)),
    ("your map changed its input", broken(changes_its_input_unseen)),
    ("the gradient is lost: what the way back needs was changed in place",
     broken(changes_on_the_way)),
    # Another dimension than the last.
    ("yours sums to 1 along dim=0", broken(lambda z, progress: z.softmax(0))),
    (r"fails on torch.float64 logits of shape \(5,\).*IndexError.*dim=-1",
     broken(lambda z, progress: z.softmax(1))),
    (r"fails on torch.float64 logits of shape \(5,\).*not enough values to unpack.*dim=-1",
     broken(rows_and_columns)),
    ("yours sums to 1 along dim=1",
     broken(lambda z, progress: z.softmax(1 if z.dim() > 1 else 0))),
    # No tensor, or another one than the logits are.
    ("the result is torch.float64, the logits are torch.float32",
     broken(lambda z, progress: z.double().softmax(-1))),
    (r"the result has shape \(4,\), the logits have \(4, 1\)",
     broken(lambda z, progress: z.softmax(-1).amax(-1))),
    ("the result is no tensor but a list",
     broken(lambda z, progress: [row.softmax(-1) for row in z])),
    ("the result is no tensor but None", broken(lambda z, progress: None)),
    # No map f(logits, progress), or not for every dtype, or it ignores progress.
    (r"fails on torch.float64 logits of shape \(4, 1\).*TypeError.*positional",
     broken(lambda z: z.softmax(-1))),
    ("fails on torch.bfloat16 logits.*not implemented for",
     broken(lambda z, progress: (torch.cdist(z[..., None], z[..., None]).sum(-1) * 0 + z)
            .softmax(-1))),
    ("at progress 1 the first of the largest.*off by",
     broken(lambda z, progress: z.softmax(-1), "one-hot at progress 1"))])
def test_what_a_wrong_map_is_told(message, f):
    """In one sentence, then input / yours / expected; and nothing as large as a matrix."""
    with pytest.raises(checks.Failed) as failure:
        for law in checks.laws_of(f).values():
            law(f)
    text = str(failure.value)
    assert re.search(f"(?s){message}", text), text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["input", "yours", "expected"], text
    assert max(map(len, lines)) < 250, text


def test_the_halving_is_right_but_for_its_gradient():
    for law in tsallis, checks.on_the_simplex:
        law(lambda z, progress: by_halving(z))


def test_who_divides_before_subtracting_the_maximum_is_right_too():
    """Torch's softmax subtracts it, but z / T has been rounded by then: less than z was already."""
    for law in checks.LAWS.values():
        law(broken(lambda z, progress: (wide(z) / 0.01 ** progress).softmax(-1).to(z.dtype)))


def test_a_task_that_is_not_solved_is_no_failure():
    def not_yet(z, progress):
        raise NotImplementedError("task 3")
    with pytest.raises(NotImplementedError):
        checks.on_the_simplex(not_yet)


def test_a_failure_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    f = broken(lambda z, progress: (-z).softmax(-1))
    with pytest.raises(checks.Failed):
        checks.check(f)
    assert (tmp_path / "runs" / "failed order.png").stat().st_size > 10_000
    assert "passed: shift" in capsys.readouterr().out


# --- FILE.py:FUNCTION -----------------------------------------------------------------------------

def test_a_map_from_a_file(tmp_path):
    text = "def f(logits, progress, dim=-1):\n    return logits.softmax(dim)\n"
    (tmp_path / "maps.py").write_text(text)
    f = get_activation(f"{tmp_path}/maps.py:f")
    assert torch.equal(f(torch.zeros(4), 0.5), torch.full((4,), 0.25))


@pytest.mark.parametrize("body, message", [
    (None, "there is no file"), ("def g(z, progress): return z", "has no function f"),
    ("f = 3", "has no function f"),
    ("import nothing_like_this", "ModuleNotFoundError"), ("def f(:", "SyntaxError"),
    ("def f(z): return z.softmax(-1)", r"fails as f\(logits of shape \(3, 3\), 0.0\): TypeError"),
    ("def f(z, progress): return z.softmax(-1) + 0 * z.topk(2).values.sum(-1, True)",
     r"fails as f\(logits of shape \(2, 1\)"),
    ("def f(z, progress): raise NotImplementedError('task 3')", "not solved yet: task 3"),
    ("def f(z, progress): return 1", "no tensor but a int"),
    ("def f(z, progress): return z.sum(-1)", r"shape \(3,\)"),
    ("def f(z, progress): return z.softmax(-1).double()", "float64"),
    ("def f(z, progress): return z", r"row 0, logits \[0.3, 0.1, -0.1\], has the weight -0.1"),
    ("def f(z, progress): return z.softmax(-1) / 2", r"row 0, .* sums to 0.5 \(0.5 below 1\)"),
    ("def f(z, progress): pass", "no tensor but None"),
    ("def f(z, progress): z -= 1; return z.softmax(-1)", "in-place operation"),
    ("import torch\ndef f(z, progress): return torch.from_numpy(z.numpy()).softmax(-1)",
     "requires grad"),
    ("def f(z, progress): return z.softmax(-1) * (progress != .75)", "at progress 0.75"),
    ("import sys; sys.exit()", "does not run: SystemExit"),
    ("def f(z, progress): return z.detach().softmax(-1)", "no gradient .* would learn nothing"),
    ("import torch\ndef f(z, progress): return torch.nn.functional.gumbel_softmax(z, hard=True)",
     "zero carry a gradient, .* add a line f.dense = True"),
    ("import torch\nclass F(torch.autograd.Function):\n    @staticmethod\n"
     "    def forward(ctx, z): return z.softmax(-1)\n"
     "def f(z, progress): return F.apply(z)", "gradient fails: NotImplementedError"),
    ("def f(z, progress): return z.softmax(-1) / (z - z)", "weight inf")])
def test_what_is_no_map_is_refused_in_one_line(tmp_path, body, message):
    if body:
        (tmp_path / "maps.py").write_text(body)
    with pytest.raises(ValueError, match=message) as error:
        get_activation(f"{tmp_path}/maps.py:f")
    assert "\n" not in str(error.value)


def test_a_map_whose_zeros_have_a_gradient_says_so(tmp_path):
    """Else a search would leave them out, and no logit would learn from the picture."""
    (tmp_path / "maps.py").write_text(
        "import torch\ndef f(z, progress):\n"
        "    return torch.nn.functional.gumbel_softmax(z, hard=True)\nf.dense = True\n")
    net = Supernet(Space(2, 16, 1, 2), get_activation(f"{tmp_path}/maps.py:f"))
    net(torch.rand(1, 3, 8, 8), net.weights(0.5)).mean().backward()
    assert all(logits.grad.any() for logits in (net.gamma, net.alpha, net.beta))


# --- One call site --------------------------------------------------------------------------------

NORMALISES = {"softmax", "log_softmax", "softmin", "gumbel_softmax", "sigmoid", "logsigmoid",
              "normalize", *ACTIVATIONS}
MAY_TOUCH_LOGITS = {"__init__", "logits", "weights", "inherit"}


@pytest.mark.parametrize("module", ["search_space", "supernet", "search", "evaluate"])
def test_nobody_else_turns_logits_into_weights(module):
    """Nothing normalises, raw logits are not touched, and one line calls the activation.

    (Not touched: no argmax of them, then.)
    """
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    sites = 0
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert name not in NORMALISES, f"{module}.{function.name} calls {name}"
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                raw = node.attr in ("gamma", "alpha", "beta")
                if raw and owner in ("self", "net", "self.supernet", "run.supernet"):
                    message = f"{module}.{function.name} reads raw logits"
                    assert function.name in MAY_TOUCH_LOGITS, message
                called = node.attr == "activation" and owner == "self"
                if called and function.name not in ("__init__", "read"):
                    sites += 1
                    assert function.name == "weights"
    assert sites == (module == "supernet")


# --- The assignment: `pytest -m task1`, or 0, 2, 3. Not part of the plain `pytest`. --------------

def load(path):
    """The module in that file, with the promises that are graded.

    Those are not for the file to say.
    """
    spec = importlib.util.spec_from_file_location("my_map", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_map"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    for name in "annealed_softmax", "entmax15":
        if hasattr(module, name):  # a file may hold one task only
            getattr(module, name).promises = {"deterministic", "exact gradient"}
    if hasattr(module, "straight_line"):
        module.straight_line.promises = {"deterministic", "exact gradient", "one-hot at progress 1"}
    if hasattr(module, "my_map"):
        own = getattr(module.my_map, "promises", ())  # more, if it likes
        module.my_map.promises = {*own, "one-hot at progress 1"}
    return module


@pytest.fixture
def mine():
    """Your file, or the one that TRILEVEL_MY_MAP names: grade.py's way to hand one in.

    It is read when a task is graded and not before, so that a mistake in it breaks no other test.
    """
    try:
        return load(os.environ.get("TRILEVEL_MY_MAP", ROOT / "notebooks/my_map.py"))
    except (Exception, SystemExit) as error:  # it is somebody's code: anything may happen
        pytest.fail(f"my_map.py does not run: {type(error).__name__}: {error}")


def test_a_map_that_promises_nothing_is_still_graded(tmp_path):
    text = "def NAME(logits, progress):\n    return logits.softmax(-1)\nNAME.promises = set()\n"
    names = "straight_line", "annealed_softmax", "entmax15", "my_map"
    (tmp_path / "my_map.py").write_text("".join(text.replace("NAME", name) for name in names))
    softmax = load(tmp_path / "my_map.py")
    assert "exact gradient" in checks.laws_of(softmax.annealed_softmax)
    assert "exact gradient" in checks.laws_of(softmax.entmax15)
    for f in softmax.straight_line, softmax.my_map:
        with pytest.raises(checks.Failed, match="at progress 1"):
            checks.laws_of(f)["one-hot at progress 1"](f)


def test_a_file_may_hold_one_task_only(tmp_path):
    text = ("def my_map(logits, progress):\n    return logits.softmax(-1)\n"
            "my_map.promises = ['deterministic']\n")
    (tmp_path / "my_map.py").write_text(text)
    promises = load(tmp_path / "my_map.py").my_map.promises
    assert promises == {"deterministic", "one-hot at progress 1"}


def test_a_file_may_hold_a_dataclass(tmp_path):
    text = ("from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
            "@dataclass\nclass Schedule:\n    end: float = 1\n")
    (tmp_path / "my_map.py").write_text(text)
    assert load(tmp_path / "my_map.py").Schedule().end == 1


@checks.in_words
def no_copy(f):
    """Task 3 asks for a map of your own: none of sparsestmax.py, and not that of task 0 again."""
    for name, other in ACTIVATIONS.items():
        f_seeded, other = checks.seeded(f), checks.seeded(other)
        if all(torch.allclose(f_seeded(z, progress), other(z, progress), atol=1e-6)
               for z, progress in checks.cases()):
            raise checks.Failed(f"a map of your own, not {name} again", "all cases", "any",
                                f"the weights of {name}", "others")
    try:
        straight(f)
    except checks.Failed:
        return
    raise checks.Failed("a map of your own, not that of task 0 again", "all cases", "any",
                        "the weights of task 0", "others")


def test_a_copy_is_found():
    with pytest.raises(checks.Failed, match="the weights of sparsestmax"):
        no_copy(lambda z, progress: ACTIVATIONS["sparsestmax"](z, progress))
    no_copy(lambda z, progress: (2 * z).softmax(-1))


def test_the_map_of_task_0_is_no_map_of_ones_own(monkeypatch):
    monkeypatch.setitem(globals(), "straight", lambda f: None)  # as if it were that one
    with pytest.raises(checks.Failed, match="the weights of task 0"):
        no_copy(lambda z, progress: (2 * z).softmax(-1))


# p is softmax's weights, exp(z_k - tau), but for the part that has gone to the corner
straight = checks.against(lambda z, tau, progress:
                          (1 - progress) * (z - tau).clamp(max=50).exp()
                          + progress * (torch.arange(len(z)) == z.argmax()),
                          "progress of the way from softmax to the largest logit's corner")
# p maximises <p, z> + T H(p): its slope vanishes where p_k = exp((z_k - tau) / T)
annealed = checks.against(lambda z, tau, progress:
                          ((z - tau) / 0.01 ** progress).clamp(max=50).exp(),
                          "the maximum of <p, z> + T H(p), T = 0.01 ** progress")
# p maximises <p, z> + 4/3 sum_k (p_k - p_k^1.5): its slope vanishes, or p_k is 0, where
# p_k = max(z_k / 2 - tau, 0)^2
tsallis = checks.against(lambda z, tau, progress: (z / 2 - tau).clamp(min=0) ** 2,
                         "the maximum of <p, z> + 4/3 sum (p - p^1.5)")


def test_a_specification_sees_ties_and_large_logits():
    def right(z, progress):
        return (z / 0.01 ** progress).softmax(-1)
    annealed(right)
    for where in (lambda z: z[..., :1] == z[..., -1:],
                  lambda z: z.abs().amax(-1, keepdim=True) > 50):
        with pytest.raises(checks.Failed, match="the maximum of"):
            annealed(lambda z, progress: torch.where(where(z), z.softmax(-1).flip(-1) ** 2,
                                                     right(z, progress)))


@pytest.mark.task0
@pytest.mark.parametrize("law", [*checks.LAWS, *checks.OF_THE_DETERMINISTIC, "exact gradient",
                                 "one-hot at progress 1", "specification"])
def test_task0(mine, law):
    laws = checks.laws_of(mine.straight_line) | {"specification": straight}
    checks.hold(mine.straight_line, law, laws[law])


@pytest.mark.task1
@pytest.mark.parametrize("law", [*checks.LAWS, *checks.OF_THE_DETERMINISTIC, "exact gradient",
                                 "specification"])
def test_task1(mine, law):
    laws = checks.laws_of(mine.annealed_softmax) | {"specification": annealed}
    checks.hold(mine.annealed_softmax, law, laws[law])


@pytest.mark.task2
def test_task2_one_row(mine):
    one_row = mine.entmax15_row

    def rows(z, progress):
        each = [one_row(row) for row in z.reshape(-1, z.shape[-1])]
        return torch.stack(each).reshape(z.shape)
    tsallis(rows)


@pytest.mark.task2
@pytest.mark.parametrize("law", [*checks.LAWS, *checks.OF_THE_DETERMINISTIC, "exact gradient",
                                 "specification", "no loop"])
def test_task2(mine, law):
    more = {"specification": tsallis, "no loop": checks.no_loop}
    checks.hold(mine.entmax15, law, (checks.laws_of(mine.entmax15) | more)[law])


@pytest.mark.task3
@pytest.mark.parametrize("law", [*checks.LAWS, *checks.OF_THE_DETERMINISTIC, *checks.PROMISED,
                                 "no copy"])
def test_task3(mine, law):
    laws = checks.laws_of(mine.my_map) | {"no copy": no_copy}
    if law not in laws:
        pytest.skip("not promised")
    checks.hold(mine.my_map, law, laws[law])
