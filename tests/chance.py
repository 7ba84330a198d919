"""Did the search find anything that chance would not?

    python tests/chance.py --data DIR --benchmark BENCHMARKS --budget 12G --steps 2500 --out FILE.md

The found network against others of the same multiply-adds: same photographs, same patches in the
same order, same number of steps, same seeds. The others are

  * five random networks of the space;
  * the best of the five as short trainings choose it, which together take the time of the search;
  * two published networks scaled down (same path and operations, fewer channels);
  * residual blocks as one would stack them by hand.

All lie within 5 % of the found network's multiply-adds (the scaled and the hand-made ones as near
as they come: the table says). Each but the first is trained afresh, on all photographs. Workers are
processes with one thread each. Other options are search.py's.
"""
import argparse
import itertools
import multiprocessing
import platform
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import search
from benchmark import NOWHERE, check_out
from evaluate import CommandLine, measure, named, note_bfloat16, sets_in, super_resolve
from search_space import Architecture, Network, Space, published, widths_of, write_whole
from supernet import Weights

RANDOM = 5
CACHE = {}  # a worker's photographs, and what the parts of a network cost


def start(settings, seed, architecture=None) -> search.Run:
    """A Run before its first step: of a search, or of training `architecture` afresh."""
    settings = argparse.Namespace(**vars(settings) | dict(seed=seed))
    run = search.Run(settings, NOWHERE, CACHE["costs"])
    data = CACHE["data"]
    order = torch.randperm(len(data.whole.pairs), generator=torch.Generator().manual_seed(seed))
    run.data = data._replace(half_a=data.whole.only(order[::2]),
                             half_b=data.whole.only(order[1::2]))
    if architecture:
        torch.manual_seed(seed)
        run.become(Network(architecture))
    return run


def advance(run, until=None, seconds=float("inf")):
    """Steps of `run` up to number `until` (default: all), or until the time is over."""
    s, begun = run.settings, time.perf_counter()
    while run.step < (until or s.steps) and time.perf_counter() - begun < seconds:
        for optimiser in run.optimisers:
            optimiser.param_groups[0]["lr"] = s.rate * search.learning_rate_at(
                run.step, s.search, s.steps)
        if run.supernet:
            weights = run.search_step(search.progress_at(run.step, s.search))[0]
            run.sum = weights if run.sum is None else Weights(*map(torch.add, run.sum, weights))
        else:
            run.training_step()
        run.step += 1
        run.recent = []
    return time.perf_counter() - begun


def quality(run) -> list[float]:
    """PSNR-Y on each benchmark set."""
    network = run.network.eval()
    scale = network.architecture.scale
    def upscale(lr):
        return super_resolve(network, lr)
    return [float(np.mean([row[1] for row in measure(upscale, each, scale)]))
            for each in CACHE["sets"].values()]


def searched(settings, seed):
    """-> the found architecture, seconds of the search, quality of the run that found it.

    (That run went on training.)
    """
    run = start(settings, seed)
    seconds = advance(run, settings.search)
    run.hand_over()
    advance(run)
    return run.network.architecture, seconds, quality(run)


def trained(settings, seed, architecture):
    run = start(settings, seed, architecture)
    advance(run)
    return quality(run)


def chosen(settings, seed, architectures, seconds) -> int:
    """Which of them is best after its share of the time.

    Judged on a large batch that none has seen in that order.
    """
    errors = []
    for architecture in architectures:
        run = start(settings, seed, architecture)
        advance(run, seconds=seconds / len(architectures))
        lr, hr = run.data.whole.batch(256, torch.Generator().manual_seed(2 ** 31 - 1))
        with torch.no_grad():
            errors.append(F.l1_loss(run.network(lr), hr).item())
    return int(np.argmin(errors))


# --- The others -----------------------------------------------------------------------------------

def random_networks(space: Space, cost: float, rng: random.Random, within=0.05, but=None):
    """RANDOM different networks of about this cost; ValueError if so many do not come up.

    but: an Architecture that is none of them.
    """
    found = {}
    for _ in range(1_000_000):
        a = space.random(rng)
        if a != but and abs(a.multiply_adds() / cost - 1) < within:
            found[a] = None
        if len(found) == RANDOM:
            return list(found)
    raise ValueError(f"of {cost / 1e9:.3g}G multiply-adds within {within:.0%} there are hardly "
                     f"{RANDOM} networks: enlarge the space, by --channels, --cells or --positions")


def scaled(name: str, scale: int, cost: float):
    """The published network `name` at another scale and size.

    Path and operations are kept, all widths times one factor.
    """
    a, choices = published(name), []
    for channels in range(16, a.channels + 1, 8):
        allowed = np.array(widths_of(channels))
        for factor in np.linspace(0.1, 1, 46):
            widths = tuple(tuple(int(allowed[np.abs(allowed - factor * w).argmin()]) for w in cell)
                           for cell in a.widths)
            choices.append(replace(a, scale=scale, channels=channels, widths=widths, output="skip"))
    return min(choices, key=lambda b: abs(b.multiply_adds() - cost))


def by_hand(space: Space, cost: float):
    """Residual blocks in a row, as one stacks them by hand (EDSR).

    One to a cell, no wider than the space, two at least.
    """
    choices = [Architecture(space.scale, channels, "c" * n, (("residual",),) * n, ((),) * n)
               for channels in range(16, space.channels + 1, 8) for n in range(2, 17)]
    return min(choices, key=lambda b: abs(b.multiply_adds() - cost))


def spread(values, digits=2) -> str:
    """Mean ± standard deviation, where there are several."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def task(arguments):
    function, *rest = arguments
    return function(*rest)


@contextmanager
def forks(workers: int):
    """A pool of processes that share this one's photographs, and end with it.

    ValueError if one is killed, as the system does when memory runs out.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for this one alone
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, perhaps for want of memory: try fewer --workers"
                         ) from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def compare(args):
    """All searches, all networks, the tables. What cannot be is found before the work, mostly."""
    benchmark, seeds, workers, out = args.benchmark, range(args.seeds), args.workers, args.out
    for name in ("benchmark", "seeds", "workers"):  # the others are search.py's
        delattr(args, name)
    args.out, args.device = NOWHERE, "cpu"
    settings, _ = search.settings_of(args)
    if out:
        check_out(out)
    note_bfloat16(settings)
    CACHE["sets"] = sets_in(benchmark, settings.scale)
    torch.set_num_threads(1)
    CACHE["costs"] = search.Run(settings, NOWHERE).costs
    CACHE["data"] = search.load_data(settings)
    sets = list(CACHE["sets"])
    space = Space(settings.scale, settings.channels, settings.cells, settings.positions)
    if settings.unit == "multiply-adds":  # a found network has 80 to 100 % of them
        random_networks(space, 0.9 * settings.budget, random.Random(0), 0.17)
    rows = {}  # name -> one list of PSNRs for each seed

    with forks(workers) as pool:
        jobs = [(searched, settings, seed) for seed in seeds]
        found = list(tqdm(pool.map(task, jobs), total=len(jobs), desc="searches"))
        jobs, randoms, contenders = [], [], {}
        for seed, (a, _, psnr) in zip(seeds, found):
            rows.setdefault("found: search, then training", []).append(psnr)
            randoms.append(random_networks(space, a.multiply_adds(), random.Random(seed), but=a))
            contenders[seed] = {"found, trained afresh": a}
            contenders[seed] |= {f"random {i + 1}": r for i, r in enumerate(randoms[-1])}
            contenders[seed] |= {
                f"{name}, scaled": scaled(name, settings.scale, a.multiply_adds())
                for name in ("B-1", "B-2")}
            contenders[seed]["residual blocks by hand"] = by_hand(space, a.multiply_adds())
            jobs += [(trained, settings, seed, b) for b in contenders[seed].values()]
        jobs += [(chosen, settings, seed, each, f[1])
                 for seed, each, f in zip(seeds, randoms, found)]
        done = iter(list(tqdm(pool.map(task, jobs), total=len(jobs), desc="networks")))
    for seed in seeds:
        for name in contenders[seed]:
            rows.setdefault(name, []).append(next(done))
    each_random = [rows.pop(f"random {i + 1}") for i in range(RANDOM)]  # (RANDOM, seeds, sets)
    rows["five random ones, mean"] = np.mean(each_random, 0)
    rows["the best of the five, by short trainings"] = [each_random[next(done)][k]
                                                        for k in range(len(seeds))]
    rows["the best of the five, in hindsight"] = np.max(each_random, 0)

    seconds = np.median([f[1] for f in found])
    lines = [f"PSNR-Y in dB, mean ± standard deviation over {len(seeds)} seeds; "
             f"x{settings.scale}, {settings.steps} steps of {settings.batch} patches of "
             f"{settings.patch}x{settings.patch}, the first {settings.search} of them the search's "
             f"where there is one (median {seconds:.0f} s). "
             f"{len(CACHE['data'].whole.pairs)} photographs; "
             f"Python {platform.python_version()}, torch {torch.__version__}, one thread each.", "",
             "| network | " + " | ".join(sets) + " |", "|---|" + "---:|" * len(sets)]
    lines += [f"| {name} | " + " | ".join(map(spread, zip(*row))) + " |"
              for name, row in rows.items()]
    scores = ", ".join(f"{r[0]:.2f}" for r in itertools.chain(*each_random))
    lines += ["", f"Random ones, all: {scores} on {sets[0]}.", "",
              "| seed | network | path | operations | widths | multiply-adds | "
              + " | ".join(sets) + " |",
              "|---|---|---|---|---|---:|" + "---:|" * len(sets)]
    table = {name: iter(row) for name, row in rows.items()}
    table |= {f"random {i + 1}": iter(r) for i, r in enumerate(each_random)}
    for seed in seeds:
        for name, a in contenders[seed].items():
            operations, widths = (" / ".join(" ".join(map(str, cell)) for cell in level)
                                  for level in (a.operations, a.widths))
            lines.append(f"| {seed} | {name} | {a.path} | {operations} | {a.channels}: {widths} | "
                         f"{a.multiply_adds() / 1e9:.2f}G | "
                         + " | ".join(f"{p:.2f}" for p in next(table[name])) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        write_whole(out, text)


def main(argv=None):
    parser = CommandLine(prog="chance.py", description=__doc__.split("\n")[0],
                         parents=[search.arguments()], conflict_handler="resolve")
    add = parser.add_argument_group("the comparison").add_argument
    few = search.checked(int, lambda n: 0 < n <= 1000, "a whole number from 1 to 1000")
    add("--benchmark", type=named, nargs="+", required=True, metavar="DIR",
        help="sets to measure on, as evaluate.py takes them")
    add("--seeds", type=few, default=3, metavar="N",
        help="searches, of the seeds 0 to N - 1 (default: 3)")
    add("--workers", type=few, default=torch.get_num_threads(), metavar="N",
        help=f"processes (default: {torch.get_num_threads()})")
    add("--out", type=Path, metavar="FILE.md", help="where the tables are written, too")
    args = parser.parse_args(argv)
    if args.resume:
        parser.error("--resume is for a run of search.py: leave it out, a comparison begins anew")
    if args.seed is not None:
        parser.error("--seed is for a run of search.py: here --seeds N takes the seeds 0 to N - 1")
    if args.device not in (None, "cpu"):
        parser.error(f"--device {args.device}: workers are forks of this process, which CUDA does "
                     "not allow; leave it out, and they run on the CPU")
    with parser.guard("; try fewer --workers, or a smaller --batch or --patch"):
        compare(args)


if __name__ == "__main__":
    main()
