"""What are sparsestmax, sorting and the single phase each worth? The paper's claims, measured.

    python tests/claims.py --data DIR --benchmark SETS --out claims.csv      # goes on where it was
    python tests/claims.py --data DIR --benchmark SETS --out t.csv --seeds 1 --search 20 --steps 40

Searches of the lesson's space at x2 with a budget of 12G, where paths differ, all alike but for

  * the map: sparsestmax, softmax, sparsemax, gumbel, and sparsestmax as it was released;
  * the order term, "sorting": without, as it is, 10 and 100 times, and as it was released;
  * the phases: the found network goes on from the search, or begins afresh and then trains for as
    many steps as the other run has in all.

The tables are printed and written beside FILE.csv, as FILE.md (FILE.json says what they were made
with). Workers are processes with one thread each; seconds are those of one beside the others.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import search
import supernet
from chance import CACHE, advance, forks, quality, spread, start
from networks import options, prepare, read, work
from search_space import write_whole
from supernet import Supernet, live_choices

MAPS = "sparsestmax", "softmax", "sparsemax", "gumbel", "sparsestmax_released"
ORDERS = {"order 0": 0, "order 10": 10, "order 100": 100, "order released": 1}  # times ORDER
NAMES = [*MAPS, "two phases", *ORDERS]


def order_loss_released(net: Supernet, weights=None) -> torch.Tensor:
    """Sorting in the form of the authors' code: raw logits, no hinge, along each complete path.

    It telescopes: all that remains is (sum over leaves) - (number of leaves) * root, no floor.
    """
    nodes = net.space.nodes
    paths = [[nodes.index(leaf[:i]) for i in range(1, len(leaf) + 1)] for leaf in net.space.leaves]
    return sum((net.gamma[path[1:]] - net.gamma[path[:-1]]).sum() for path in paths)


ORDER, ORDER_LOSS = supernet.ORDER, Supernet.order_loss  # as they are


def trials(settings, name, seed) -> list[dict]:
    """A search and what is left of it, trained: a row of the table; for "sparsestmax" two."""
    changed = dict(activation=name if name in MAPS else "sparsestmax")
    settings = argparse.Namespace(**vars(settings) | changed)
    supernet.ORDER = ORDER * ORDERS.get(name, 1)  # (this worker's own)
    Supernet.order_loss = order_loss_released if name == "order released" else ORDER_LOSS

    run = start(settings, seed)
    seconds = advance(run, settings.search)
    with torch.no_grad():
        exits, operations, widths = live_choices(run.supernet.weights(1.0))
    run.hand_over()
    a, report = run.network.architecture, run.hand_over_report
    row = dict(name=name, number=NAMES.index(name), seed=seed, path=a.path,
               multiply_adds=a.multiply_adds(),
               lost=round(report["psnr_supernet"] - report["psnr_network"], 4), exits=exits,
               operations=round(operations, 3), widths=round(widths, 3), search=round(seconds, 1))

    def trained(run):  # up to the last step
        more = dict(seconds=round(seconds + advance(run), 1))
        return more | {f"{name}_psnr": round(psnr, 4)
                       for name, psnr in zip(CACHE["sets"], quality(run))}
    rows = [row | trained(run)]
    if name == "sparsestmax":
        afresh = dict(name="two phases", number=NAMES.index("two phases"))
        rows.append(row | afresh | trained(start(settings, seed, a)))
    return rows


def tables_of(rows, sets) -> str:
    """Markdown, a table for each claim; mean ± standard deviation over the seeds."""
    of = {}  # name -> its rows
    for row in rows:
        of.setdefault(row["name"], []).append(row)

    def column(key, digits, unit=1):
        return lambda some: spread([float(row[key]) / unit for row in some], digits)
    psnr = {each: column(f"{each}_psnr", 2) for each in sets}
    cost = {"multiply-adds (G)": column("multiply_adds", 1, 1e9)}
    tables = [
        ("map", {name: name for name in MAPS},
         {"lost by deciding (dB)": column("lost", 2), "exits alive": column("exits", 1),
          "operations": column("operations", 1), "widths": column("widths", 1),
          "search (s)": column("search", 0)} | cost),
        ("order term", {"order 0": "without", "sparsestmax": "as it is", "order 10": "10 times",
                        "order 100": "100 times", "order released": "as released"},
         {"paths": lambda some: ", ".join(row["path"] for row in some),
          "letters": lambda some: spread([len(row["path"]) for row in some], 1)} | cost),
        ("phases", {"sparsestmax": "one: the found network goes on",
                    "two phases": "two: it begins afresh"},
         {"seconds in all": column("seconds", 0)})]
    text = ""
    for title, names, columns in tables:
        columns = columns | psnr
        text += f"| {' | '.join([title, *columns])} |\n|---{'|---:' * len(columns)}|\n"
        for name in filter(of.get, names):
            cells = [names[name], *(column(of[name]) for column in columns.values())]
            text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    return text


def compare(args):
    rows = read(args.out, "name", "lost", "seed")
    settings = prepare(args, 2, "--budget", "12G", "--search", args.search)
    done = {(row["name"], int(row["seed"])) for row in rows}
    with forks(args.workers) as pool:
        work(pool, [(trials, settings, name, seed) for seed in range(args.seeds)
                    for name in (*MAPS, *ORDERS) if (name, seed) not in done], rows, args.out)
    text = tables_of(read(args.out), list(CACHE["sets"]))
    print(text)
    write_whole(args.out.with_suffix(".md"), text)


def main(argv=None):
    parser = options("claims.py", __doc__, steps=search.PRESETS["lesson"]["steps"])
    add = parser.add_argument
    add("--search", type=search.positive, default=search.PRESETS["lesson"]["search"],
        help="how many of the steps search")
    add("--seeds", type=search.positive, default=3, help="seeds 0 to N - 1 of each")
    args = parser.parse_args(argv)
    with parser.guard("; try fewer --workers"):
        compare(args)


if __name__ == "__main__":
    main()
