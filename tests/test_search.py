"""The loop end to end at toy size.

What a run leaves behind, that it keeps its budget, that resuming changes no bit.
"""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import search
import search_space
from benchmark import lean
from evaluate import cut_in_two, dead_leaves, degrade, load_photos
from search_space import Network, load_run, load_tensors
from sparsestmax import ACTIVATIONS
from supernet import COST, ORDER, PRICE, leading

TINY = ("--channels 16 --cells 2 --positions 2 --batch 2 --patch 8 --steps 14 --search 8 "
        "--device cpu").split()


def run(out, *options):
    search.main([*TINY, "--out", str(out), *map(str, options)])
    return out


def same_results(a: Path, b: Path):
    x, y = (torch.load(folder / "network.pt", weights_only=True) for folder in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    assert (a / "architecture.json").read_text() == (b / "architecture.json").read_text()
    x, y = (list(csv.DictReader((folder / "history.csv").open())) for folder in (a, b))
    assert [row | dict(seconds=0) for row in x] == [row | dict(seconds=0) for row in y]
    with np.load(a / "distributions.npz") as x, np.load(b / "distributions.npz") as y:
        assert all(np.array_equal(x[key], y[key]) for key in x)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(dead_leaves(48, rng)).save(folder / f"{i}.png")
    return folder


def test_a_run_leaves_everything(tmp_path, photos, capsys):
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")
    names = {"settings.json", "history.csv", "distributions.npz", "levels.png", "architecture.png",
             "architecture.json", "network.pt", "results.md", "results.json", "checkpoint.pt",
             "checkpoint.before.pt"}
    assert {path.name for path in out.iterdir()} == names
    network = load_run(out)  # weights_only=True
    a = network.architecture
    assert 0.8 * 2e9 <= a.multiply_adds() <= 2e9
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert float(rows[0]["live_operations"]) == 4 and float(rows[-1]["cost"]) == a.multiply_adds()
    over_time = np.load(out / "distributions.npz")
    assert {name: over_time[name].shape[1:] for name in ("gamma", "alpha", "beta")} == \
        {"gamma": (5,), "alpha": (3, 2, 4), "beta": (3, 1, 2)}
    for name in ("gamma", "alpha", "beta"):  # each row, at any time, is on the simplex
        np.testing.assert_allclose(over_time[name].sum(-1), 1, rtol=1e-5)
    results = json.loads((out / "results.json").read_text())
    assert results["sample"]["bicubic"]["psnr"] > 25 and results["hand_over"]["step"] == 8
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"]["seed"] == 0 and settings["versions"]["torch"] == torch.__version__
    text = (out / "results.md").read_text()
    assert "bicubic" in text and f"{a.parameters():,}" in text and text in capsys.readouterr().out


@pytest.mark.parametrize("scale, activation", [*((2, f) for f in ACTIVATIONS), (3, "sparsestmax"),
                                               (4, "sparsestmax")])
def test_every_run_keeps_its_budget(tmp_path, photos, scale, activation):
    out = run(tmp_path / "a", "--scale", scale, "--activation", activation, "--budget", "1.6G",
              "--data", photos)
    a = load_run(out).architecture
    assert a.scale == scale and 0.8 * 1.6e9 <= a.multiply_adds() <= 1.6e9


def test_the_full_preset_runs_at_toy_size(tmp_path, photos):
    """Recomputed cells and bfloat16, which the lesson preset leaves out."""
    out = run(tmp_path / "a", "--preset", "full", "--data", photos, "--budget", "2G", "--bfloat16")
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["bfloat16"] and all(p.isfinite().all() for p in load_run(out).parameters())


def test_bfloat16_is_for_devices_that_compute_it(tmp_path, photos, capsys, monkeypatch):
    """Else the preset does without, and who asks for it is told what it costs."""
    for emulated in (True, False):
        for module in search, evaluate:
            monkeypatch.setattr(module, "emulates_bfloat16", lambda device: emulated)
        args = search.arguments().parse_args([*TINY, "--preset", "full", "--out", "runs/none"])
        assert search.settings_of(args)[0].bfloat16 == (not emulated)
        out = run(tmp_path / str(emulated), "--data", photos, "--budget", "2G", "--bfloat16")
        assert json.loads((out / "settings.json").read_text())["settings"]["bfloat16"]
        assert ("only emulates bfloat16" in capsys.readouterr().err) == emulated


def test_one_position_has_no_width_to_choose(tmp_path, photos):
    out = run(tmp_path / "a", "--data", photos, "--positions", 1, "--budget", "1.6G")
    assert load_run(out).architecture.widths == ((),) * load_run(out).architecture.path.count("c")


def test_a_budget_in_milliseconds(tmp_path, photos, monkeypatch, capsys):
    """A clock that shows a millisecond for 10 million multiply-adds.

    A run measures its table once, and keeps it.
    """
    def clock(module, *inputs, seconds=0.3):
        calls.append(module)
        if not isinstance(module, torch.nn.Module):
            return 0.0
        pixels = inputs[0].shape[2] * inputs[0].shape[3]
        if isinstance(module, Network):
            return module.architecture.multiply_adds(pixels) / 1e7
        pixels *= getattr(module, "factor", 1) ** 2
        return pixels * sum(p.numel() for p in module.parameters() if p.dim() == 4) / 1e7
    calls = []
    monkeypatch.setattr(search_space, "milliseconds", clock)
    a = run(tmp_path / "a", "--data", photos, "--budget", "160ms")
    text, measured = capsys.readouterr().out, len(calls)
    assert "dws" in text and "Timed on its own it takes" in text
    assert "of the budget of 160 ms" in text
    took = load_run(a).architecture.multiply_adds() / 1e7
    results, settings = (json.loads((a / f"{name}.json").read_text())
                         for name in ("results", "settings"))
    assert 0.8 * 160 <= took <= 160 and results["milliseconds"] == pytest.approx(took)
    assert (settings["settings"]["budget"], settings["settings"]["unit"]) == (160, "ms")
    # A second run measures anew: today's machine may be another.
    calls.clear()
    b = run(tmp_path / "b", "--data", photos, "--budget", "160ms")
    assert len(calls) == measured > 1 and "dws" in capsys.readouterr().out
    assert (a / "architecture.json").read_text() == (b / "architecture.json").read_text()
    # But a run goes on with its own table; only its own network is timed.
    table, threads = load_tensors(b / "checkpoint.pt")["costs"], torch.get_num_threads()
    for number in threads, 3:  # 3: as if on another machine
        calls.clear()
        torch.set_num_threads(number)
        search.main(["--resume", "--out", str(b)])
        torch.set_num_threads(threads)
        assert len(calls) == 1 and "dws" not in capsys.readouterr().out
        assert table["unit"] == "ms" and load_tensors(b / "checkpoint.pt")["costs"] == table
    assert not list(tmp_path.rglob("milliseconds.json"))


class Killed(BaseException):
    """Nothing in search.py catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("seed", range(3))
def test_a_map_that_decides_at_once_may_find_what_was_never_computed(tmp_path, photos, seed):
    """To keep the budget, `derive` may take operations of which the optimiser remembers nothing."""
    (tmp_path / "once.py").write_text(
        "import torch\n\n\ndef once(z, progress):\n"
        "    return torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z) + 0 * z\n")
    out = run(tmp_path / "a", "--activation", f"{tmp_path}/once.py:once", "--data", photos,
              "--budget", "1.6G", "--seed", seed)
    assert 0.8 * 1.6e9 <= load_run(out).architecture.multiply_adds() <= 1.6e9
    assert json.loads((out / "results.json").read_text())["hand_over"]["changed"]
    assert "choices were changed to keep the budget" in (out / "results.md").read_text()


def test_a_run_goes_on_with_a_map_whose_file_has_moved(tmp_path, photos):
    text = "def soft(z, progress):\n    return (z / (1.01 - progress)).softmax(-1)\n"
    (tmp_path / "here.py").write_text(text)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/here.py").write_text(text)
    out = run(tmp_path / "a", "--activation", f"{tmp_path}/here.py:soft", "--data", photos,
              "--budget", "1.6G")
    moved = f"{tmp_path}/there/here.py:soft"
    search.main(["--resume", "--out", str(out), "--activation", moved])
    assert json.loads((out / "settings.json").read_text())["settings"]["activation"] == moved
    with pytest.raises(SystemExit):  # another map is refused
        search.main(["--resume", "--out", str(out), "--activation", "softmax"])


def test_with_one_position_a_map_sees_no_empty_logits(tmp_path, photos):
    text = ("import torch\ndef rows(z, progress):\n"
            "    return torch.stack([row.softmax(-1) for row in z.flatten(0, -2)]).view_as(z) "
            "if z.dim() > 1 else z.softmax(-1)\n")
    (tmp_path / "rows.py").write_text(text)
    run(tmp_path / "a", "--activation", f"{tmp_path}/rows.py:rows", "--data", photos,
        "--positions", 1, "--budget", "1.6G")


@pytest.mark.parametrize("activation", ["sparsestmax", "gumbel"])  # gumbel draws at random
@pytest.mark.parametrize("kill_at", [[3], [7], [8], [11], [2, 6, 9, 13]])
def test_resuming_gives_the_same_bits(tmp_path, photos, monkeypatch, activation, kill_at):
    options = "--data", photos, "--budget", "2G", "--activation", activation, "--seed", 3
    straight = run(tmp_path / "straight", *options)
    monkeypatch.setattr(search, "SAVE_SECONDS", 0)  # a checkpoint after every step
    out, steps = tmp_path / "killed", (search.Run.search_step, search.Run.training_step)
    for i, at in enumerate(kill_at + [None]):
        def dying(step):
            def method(self, *args):
                result = step(self, *args)  # weights are already changed when death comes
                if self.step == at:
                    raise Killed
                return result
            return method
        monkeypatch.setattr(search.Run, "search_step", dying(steps[0]))
        monkeypatch.setattr(search.Run, "training_step", dying(steps[1]))
        try:
            run(out, *options) if i == 0 else search.main(["--resume", "--out", str(out)])
        except Killed:
            assert at is not None
    same_results(straight, out)


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "a"
    command = [sys.executable, "search.py", *TINY, "--out", str(out), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               cwd=Path(search.__file__).parent)
    deadline = time.time() + 120
    while not (out / "settings.json").exists() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and f"--resume --out {out}" in error
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] > 0


def make_run(photos, tmp_path, **changes):
    args = search.arguments().parse_args([*TINY, "--out", str(tmp_path / "r"),
                                          "--data", str(photos), "--budget", "2G"])
    settings, out = search.settings_of(args)
    vars(settings).update(changes)
    made = search.Run(settings, out)
    made.data = search.load_data(settings)
    return made


def test_hand_over_is_an_identity_and_keeps_the_optimisers_memory(photos, tmp_path):
    """Decide by sparsestmax alone, within the budget: only the type of the object may change."""
    made = make_run(photos, tmp_path)
    for _ in range(3):
        made.sum = made.search_step(0.0)[0]
    net, old = made.supernet, made.optimisers[0]
    wanted = net.derive(net.weights(1.0), (1.6e9, 2e9), made.sum)
    lean(net, wanted, 9.0)  # towards a network that the budget allows
    made.hand_over()
    assert type(made.network) is Network and made.network.architecture == wanted
    assert made.hand_over_report["largest_difference"] <= 1e-5
    assert not made.hand_over_report["changed"]
    adam, muon = made.optimisers
    matrices = dict(zip(map(id, muon.kernels), muon.param_groups[0]["params"]))
    assert len(matrices) + len(adam.param_groups[0]["params"]) == len(made.learned)
    for parameter, source in net.origins(made.network):
        assert torch.equal(parameter, leading(source, parameter))
        if (matrix := matrices.get(id(parameter))) is not None:
            momentum = leading(old.state[source]["exp_avg"], parameter)
            assert torch.equal(muon.state[matrix]["momentum_buffer"], search.as_matrix(momentum))
            continue
        for name, value in old.state[source].items():
            kept = adam.state[parameter][name]
            assert torch.equal(kept, value if value.dim() == 0 else leading(value, parameter))
    before = [p.detach().clone() for p in made.learned]
    for optimiser in made.optimisers:
        optimiser.param_groups[0]["lr"] = 1e-3
    made.training_step()
    assert not any(torch.equal(p, b) for p, b in zip(made.learned, before))  # all of them move


def test_muon_moves_a_kernel_in_all_directions_alike():
    """Its step is U V^T of the momentum's singular value decomposition, at the size of Adam's."""
    torch.manual_seed(0)
    kernel = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    kernel.requires_grad_()
    muon, before = search.KernelMuon([kernel]), kernel.detach().clone()
    muon.param_groups[0]["lr"] = 0.01
    kernel.grad = torch.randn(8, 16, 3, 3) * torch.logspace(0, -2, 8).view(8, 1, 1, 1)
    muon.step()
    step = search.as_matrix(before) - search.as_matrix(kernel)  # (8, 144)
    u, _, v = torch.linalg.svd(search.as_matrix(kernel.grad), full_matrices=False)
    size = 0.01 * 0.2 * 144 ** 0.5
    values = torch.linalg.svdvals(step) / size
    assert 0.5 < values.min() and values.max() < 1.5  # Newton and Schulz come so near in 5 rounds
    overlap = (step * (u @ v)).sum() / step.norm() / (u @ v).norm()
    assert overlap > 0.95


def test_logits_get_no_weight_gradient_and_weights_no_logit_gradient(photos, tmp_path):
    made = make_run(photos, tmp_path)
    logits = {id(p) for p in made.supernet.logits()}
    before = [p.clone() for p in made.supernet.logits()]
    made.search_step(0.0)  # warm-up: the logits wait
    assert all(torch.equal(p, b) for p, b in zip(made.supernet.logits(), before))
    made.search_step(1e-5)  # hardly on the sphere: two candidates are not locked yet
    for p, b in zip(made.supernet.logits(), before):
        assert p.grad is not None and not torch.equal(p, b)
    assert not logits & {id(p) for p in made.learned}


def test_exits_pay_for_what_exceeds_the_target_and_cells_move_towards_it(photos, tmp_path):
    """Where pictures say nothing, dear exits lose against those that meet the target or can still
    grow.
    """
    made = make_run(photos, tmp_path, search=40, steps=50)
    net = made.supernet
    made.loss = lambda *args: 0 * sum(p.sum() for p in net.parameters())
    net.allowed = torch.arange(len(net.space.nodes))
    before = net.exit_costs(net.weights(0.0)).detach()
    for _ in range(30):
        made.search_step(0.05)
    gamma, after = net.weights(0.05).gamma, net.exit_costs(net.weights(0.05)).detach()
    dear = before > 1.05 * made.target
    assert dear.any() and (~dear).any() and gamma[dear].max() < gamma[~dear].min()
    # The mean over exits, not each: they share cells.
    miss = [gamma.double() @ (costs / made.target).log() ** 2 for costs in (before, after)]
    assert miss[1] < miss[0]


def test_what_is_added_to_the_loss_by_hand(photos, tmp_path):
    made = make_run(photos, tmp_path)
    net, seen, progress = made.supernet, {}, 0.3
    net.allowed = torch.arange(len(net.space.nodes))
    with torch.no_grad():
        net.gamma += torch.linspace(0, 0.2, len(net.gamma))  # deeper exits weigh more
    made.loss = lambda *args: 0 * sum(p.sum() for p in net.parameters())
    made.descend = lambda what, loss: seen.update({what: loss.item()})
    weights, cost = made.search_step(progress)
    gamma, costs = weights.gamma.numpy(), net.exit_costs(weights).detach().numpy()
    correction = np.log(net.cost(net.weights(1.0)).item() / cost.item())
    off = np.log(costs / made.target) + progress * correction
    nodes = net.space.nodes
    hinge = sum(max(0, gamma[nodes.index(n)] - gamma[nodes.index(n[:-1])])
                for n in nodes if len(n) > 1)
    terms = COST * gamma @ off ** 2, PRICE * gamma @ np.maximum(off, 0), ORDER * hinge
    assert seen["logits"] == pytest.approx(sum(terms), rel=1e-4) and min(terms) > 1e-3 * sum(terms)


def test_logits_that_are_no_numbers_decide_nothing(photos, tmp_path):
    made = make_run(photos, tmp_path)
    made.search_step(0.0)
    with torch.no_grad():
        made.supernet.beta[0, 0, 0] = torch.nan  # a finite loss may still have a slope that is none
    with pytest.raises(FloatingPointError, match="the supernet's beta is not finite"):
        made.hand_over()


def test_halves_are_disjoint_and_complete(photos, tmp_path):
    made = make_run(photos, tmp_path)
    drawn = []  # (3, 4): how likely each half, and all, draw each photograph
    for patches in made.data.half_a, made.data.half_b, made.data.whole:
        per_block = patches.up_to.diff(prepend=torch.zeros(1, dtype=torch.double))
        counts = patches.blocks[:, 0].bincount().tolist()
        drawn.append(torch.stack([part.sum() for part in per_block.split(counts)]))
    a, b, both = torch.stack(drawn)
    assert torch.allclose(a + b, both) and (both > 0).all() and not (a * b).any()
    assert (a > 0).sum() == (b > 0).sum() == 2
    assert made.data.half_a.pairs is made.data.whole.pairs  # the pixels are in memory once
    whole, = load_photos(str(photos), 2, 8, 0)[:1]
    a, b = cut_in_two([whole])
    for i in (0, 1):  # LR, HR
        assert np.array_equal(np.concatenate([a[i], b[i]]), whole[i])


def test_patches_come_from_the_right_photograph_and_place():
    """Every pixel holds its own address, so a patch says where it was cut."""
    ranges = np.arange(2), np.arange(40), np.arange(30)
    address = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).astype(np.uint8)
    sizes = (12, 30), (40, 9)  # one wide, one tall
    pairs = [(lr, lr.repeat(2, 0).repeat(2, 1))
             for lr in (address[i, :h, :w] for i, (h, w) in enumerate(sizes))]
    patches = search.Patches(pairs, 8, "cpu")
    assert patches.pairs is pairs  # not copied
    seen = set()
    for photo in [0], [1], [0, 1]:
        x, _ = patches.only(torch.tensor(photo)).batch(1500, torch.Generator().manual_seed(0))
        where = (x * 255).round().long()
        where = where.permute(0, 2, 3, 1)  # (B, 8, 8, 3): photograph, row, column
        assert set(where[..., 0].flatten().tolist()) == set(photo)
        for patch in where:
            i, (top, left) = patch[0, 0, 0].item(), patch.amin((0, 1))[1:].tolist()
            h, w = sizes[i]
            assert (patch[..., 0] == i).all() and top + 8 <= h and left + 8 <= w
            assert len(patch.flatten(0, 1).unique(dim=0)) == 64
            assert patch.amax((0, 1))[1:].tolist() == [top + 7, left + 7]
            seen.add((i, top, left))
    assert len(seen) == (12 - 7) * (30 - 7) + (40 - 7) * (9 - 7)  # every place comes up


def test_photographs_are_not_copied():
    """Patches hold the list that they are given: all of it, or some of its photographs."""
    pairs = [(np.zeros((8, 9, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)) for _ in range(3)]
    given = [id(image) for pair in pairs for image in pair]
    patches = search.Patches(pairs, 8, "cpu")
    assert patches.pairs is pairs and patches.only(torch.tensor([0, 2])).pairs is pairs
    assert [id(image) for pair in pairs for image in pair] == given


def test_patches_are_drawn_where_shrinking_lost_something():
    """Two photographs, one four times as large, both smooth but for the left half.

    Red says which one, blue that it is left.
    """
    rng, pairs = np.random.default_rng(0), []
    for red, size in (0, 40), (255, 80):
        lr = np.full((size, size, 3), 128, np.uint8)
        lr[..., 0], lr[:, :size // 2, 2], lr[:, size // 2:, 2] = red, 255, 0
        hr = lr.repeat(2, 0).repeat(2, 1)
        hr[:, :size, 1] += rng.integers(-40, 40, (2 * size, size), dtype=np.int8).astype(np.uint8)
        pairs.append((lr, hr))
    x, _ = search.Patches(pairs, 8, "cpu").batch(2000, torch.Generator().manual_seed(0))
    large = x[:, 0].mean((1, 2)) > 0.5
    assert 0.45 < large.float().mean() < 0.55  # not four times as often, for all its pixels
    assert x[:, 2].mean() > 0.85
    assert (x[:, 2].mean((1, 2)) == 0).any()  # but the smooth half as well, now and then


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_patches_match_and_are_turned_alike(scale):
    """HR is LR with every pixel repeated: a patch cut or turned differently would show."""
    lr = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    patches = search.Patches([(lr, lr.repeat(scale, 0).repeat(scale, 1))], 8, "cpu")
    x, y = patches.batch(64, torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 8, 8) and y.shape == (64, 3, 8 * scale, 8 * scale)
    assert 0 <= x.min() and x.max() <= 1
    assert torch.equal(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), y)
    again, _ = patches.batch(64, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and len({image.numpy().tobytes() for image in x}) > 50


def test_lr_is_made_by_the_rule(photos):
    lr, hr = load_photos(str(photos), 3, 8, 0)[0]
    assert hr.shape == (48, 48, 3) and np.array_equal(lr, degrade(hr, 3))


def test_unusable_files_are_named_and_skipped(photos, tmp_path, capsys):
    sub = tmp_path / "a folder" / "ü"
    sub.mkdir(parents=True)
    (sub / "good.PNG").write_bytes((photos / "0.png").read_bytes())
    (sub / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (sub / "notes.txt").write_text("not a picture")
    Image.new("RGB", (5, 400)).save(sub / "thin.png")
    good, = load_photos(str(photos), 2, 8, 0)[:1]
    halves = load_photos(str(tmp_path), 2, 8, 0)  # of the only one that is left
    assert len(halves) == 2 and np.array_equal(np.concatenate([hr for _, hr in halves]), good[1])
    error = capsys.readouterr().err
    assert "broken.jpg" in error and "thin.png" in error
    assert "notes" not in error and "good" not in error


def test_dead_leaves_are_seeded_and_have_edges():
    a, b, c = (dead_leaves(64, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert a.dtype == np.uint8 and a.shape == (64, 64, 3)
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    steps = np.abs(np.diff(a.astype(int), axis=0))
    assert np.median(steps) < 5 and np.quantile(steps, 0.95) > 30  # flat leaves, sharp borders


def test_schedules():
    progress = [search.progress_at(step, 100) for step in (0, 10, 55, 100, 500)]
    assert progress == pytest.approx([0, 0, 0.5, 1, 1])
    rates = [search.learning_rate_at(step, 50, 1000) for step in range(1000)]
    assert rates[0] < rates[25] < rates[49] == max(rates)
    assert 0.99 < max(rates) <= 1 and rates[-1] < 0.011


def test_the_first_step_of_the_found_network_takes_the_rate_of_its_step(tmp_path, photos,
                                                                        monkeypatch):
    rates, descend = [], search.Run.descend

    def watched(self, what, loss):
        if what == "weights":
            rate, = {optimiser.param_groups[0]["lr"] for optimiser in self.optimisers}
            rates.append(rate)
        descend(self, what, loss)
    monkeypatch.setattr(search.Run, "descend", watched)
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")
    s = json.loads((out / "settings.json").read_text())["settings"]
    expected = [search.learning_rate_at(step, s["search"], s["steps"])
                for step in range(s["steps"])]
    assert rates == [s["rate"] * part for part in expected]


@pytest.mark.parametrize("text, value, unit", [
    ("18G", 18e9, "multiply-adds"), ("750M", 7.5e8, "multiply-adds"),
    ("1.5g", 1.5e9, "multiply-adds"), ("2e9", 2e9, "multiply-adds"), ("80ms", 80, "ms"),
    ("12.5MS", 12.5, "ms")])
def test_budgets_are_read(text, value, unit):
    assert search.budget(text) == (value, unit)


@pytest.mark.parametrize("options, message", [
    ("--scale 5", "scale"), ("--steps 0", "positive"), ("--steps 2.5", "positive"),
    ("--steps 8", "more than --search"), ("--steps 9999999999", "positive"),
    ("--budget 0", "0"), ("--budget 0ms", "0ms"), ("--budget banana", "banana"),
    ("--budget 1e-322", "1e-322"),
    ("--budget -1G", "budget"), ("--budget nan", "nan"),
    ("--budget 1M", "the smallest of this space has"),
    ("--budget 900G", "the largest of this space has"),
    ("--rate 2", "not a learning rate"), ("--rate fast", "fast"),
    ("--data nowhere", "nowhere is not a folder"), ("--data {empty}", "no usable photograph"),
    ("--data {full}/file", "is not a folder"),
    ("--device cuda:99", "--device cuda:99"), ("--device gpu", "--device gpu"),
    ("--device meta", "--device meta"), ("--device cuda", "--device cuda"),
    ("--activation relu", "relu"), ("--activation no.py:f", "there is no file no.py"),
    ("--seed -1", "whole number"), ("--cells 1000000", "1 to 16 cells"),
    ("--batch 99999999", "fit no memory"), ("--channels 20", "multiple of 8"),
    ("--channels 512 --cells 16 --positions 16", "fits no memory"),
    ("--preset big", "big"), ("--nonsense", "--nonsense"), ("--out {full}", "not empty"),
    ("--resume", "no run to resume")])
def test_bad_command_lines_say_so_in_one_line(tmp_path, capsys, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    if options == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    options = options.format(empty=tmp_path / "empty", full=tmp_path / "full").split()
    with pytest.raises(SystemExit) as stop:
        search.main([*TINY, "--out", str(tmp_path / "out"), *options])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("search.py: error: ") and message in last
    assert not (tmp_path / "out").exists()  # nothing half begun


def test_resuming_with_other_settings_is_refused(tmp_path, photos, capsys):
    out = run(tmp_path / "a", "--data", photos, "--budget", "2G")
    with pytest.raises(SystemExit) as stop:
        search.main(["--resume", "--out", str(out), "--seed", "7", "--scale", "2",
                     "--budget", "80ms"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--seed 7 (the run has 0)" in error and "--scale" not in error
    assert "--budget 80 ms (the run has 2G multiply-adds)" in error and "--unit" not in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_runs_on_cuda(tmp_path, photos):
    out = run(tmp_path / "a", "--device", "cuda", "--preset", "full", "--data", photos,
              "--budget", "2G")
    assert (out / "network.pt").exists()


def test_two_processes_are_one_with_twice_their_share(tmp_path, photos):
    """torchrun splits the batch: the losses and the network of one process that takes all of it."""
    options = [*TINY, "--batch", "4", "--steps", "56", "--search", "50", "--data", str(photos),
               "--budget", "2G"]
    folder, python = Path(search.__file__).parent, [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in ("one", python), ("two", torchrun):
        result = subprocess.run(
            [*launcher, "search.py", *options, "--out", str(tmp_path / name)], cwd=folder,
            text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Hand-over") == 1  # process 0 alone speaks and writes
    one, two = (list(csv.DictReader((tmp_path / name / "history.csv").open()))
                for name in ("one", "two"))
    assert len(one) == len(two) == 56
    for a, b in zip(one, two):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-5)
    one, two = ((tmp_path / name / "architecture.json").read_text() for name in ("one", "two"))
    assert one == two
    one, two = (np.load(tmp_path / name / "distributions.npz") for name in ("one", "two"))
    for key in one:
        # (Near ties the map magnifies rounding.)
        np.testing.assert_allclose(one[key], two[key], atol=2e-3)


ILL_FATED = """
import os, sys
sys.path.insert(0, {folder!r})
import search
search.SAVE_SECONDS = (0, 1e9)[int(os.environ["RANK"])]  # process 1 would never save
loss = search.Run.loss

def ill_fated(self, *args):
    print(self.step, file=open(f"{{sys.argv[-1]}}.{{search.RANK}}", "a"))
    if self.step == 20:
        raise ValueError("far enough")
    bad = search.RANK == 1 and self.step == 12 and not self.halvings
    return loss(self, *args) * (float("nan") if bad else 1)
search.Run.loss = ill_fated
search.main()
"""


def test_two_processes_go_back_to_one_step(tmp_path, photos):
    """One process has a bad loss, and its clock differs.

    Both go back to the same checkpoint, and take the same steps from there.
    """
    script, out = tmp_path / "ill_fated.py", tmp_path / "two"
    script.write_text(ILL_FATED.format(folder=str(Path(search.__file__).parent)))
    options = [*TINY, "--steps", "4000", "--data", str(photos), "--budget", "2G",
               "--out", str(out)]  # so many steps that losses are read rarely
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), *options], text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert result.stderr.count("back to step 12, at half the learning rate") == 1
    taken = [Path(f"{out}.{rank}").read_text() for rank in (0, 1)]
    assert taken[0] == taken[1] and taken[0].count("12\n") == 2 and taken[0].endswith("20\n")


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, photos, monkeypatch, capsys):
    options = ["--data", str(photos), "--budget", "2G", "--batch", "4",
               "--out", str(tmp_path / "r")]
    search.main([*TINY, *options])
    monkeypatch.setattr(search, "WORLD", 1)  # (what `main` makes of it is undone behind the test)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    for arguments in [*TINY, *options[:-1], str(tmp_path / "s")], ["--resume", *options[-2:]]:
        with pytest.raises(SystemExit) as stop:
            search.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "--batch 4 cannot be split evenly over 3" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        search.main([*TINY, *options[:-1], str(tmp_path / "s"), "--device", "cuda:1"])
    assert stop.value.code == 2 and "pass --device cuda" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_waits_for_the_gpu_once_at_most(photos, tmp_path):
    made = make_run(photos, tmp_path, device="cuda", bfloat16=True)
    made.search_step(0.5)  # first calls set things up, and may wait
    waits = []
    for step in (lambda: made.search_step(0.5)), made.training_step:
        if step == made.training_step:
            made.hand_over()
            step()
            step()  # which records the steps to come
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message)
                         for warning in caught))
    assert waits[0] <= 1 and waits[1] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_replayed_steps_are_the_steps_that_python_takes(photos, tmp_path):
    """Several, at a rate that changes: moments go on, no step works on the patches of another."""
    ends = []
    for out in tmp_path / "replayed", tmp_path / "stepwise":
        made = make_run(photos, out, device="cuda")
        made.search_step(0.0)
        made.hand_over()
        if out.name == "stepwise":
            muon = made.optimisers[1]
            made.network_slope, muon.direction = made.network_slope.action, muon.direction.action
        for step in range(8):
            for optimiser in made.optimisers:
                optimiser.param_groups[0]["lr"] = 1e-3 / (step + 1)
            made.training_step()
        made.settle()
        ends.append([p.detach() for p in made.network.parameters()] + [made.recent[-1][2]])
        assert bool(getattr(made.network_slope, "graph", None)) == (out.name == "replayed")
    torch.testing.assert_close(*ends, rtol=1e-3, atol=2e-4)
