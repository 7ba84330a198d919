"""A table of trained networks: what a search could have found, looked up instead of trained.

    python tests/networks.py --data DIR --benchmark SETS --out t.csv     # goes on where it was
    python tests/networks.py --data DIR --benchmark SETS --out try.csv --networks 12 --search 20 \
        --steps 100

240 networks of the lesson's space at x2, each trained alone by one recipe (search.py's, after the
hand-over, but in bfloat16 and with 8 patches in a batch: some 90 seconds each): 120 drawn from the
whole space (`chance`), 60 within 5 % of 12G (`budget`), and 60 that differ in one choice from one
of three searches' results (`near`, and `found` themselves: --bfloat16 --budget 12G, the seeds 0, 1,
2). The first 20 are trained with three seeds, so that the noise is known, and in the end those that
seem the best of the searches' budget, so that luck is not taken for quality. After every network
the table is written anew, whole; FILE.json says what it was made with.

    group, number           why it is here; networks of one number are one architecture
    path, operations, widths, channels             as in architecture.json; cells apart by "/"
    parameters, multiply_adds, milliseconds        for a 1280x720 output; timed on one thread, while
                                                   the other workers go on training
    seed, Set5_psnr, Set5_ssim, ...                PSNR-Y in dB and SSIM

Workers are processes with one thread each.
"""
import argparse
import csv
import io
import itertools
import json
import random
import sys
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import search
from benchmark import NOWHERE
from chance import CACHE, advance, forks, start, task
from evaluate import (CommandLine, check_folder_of, means, measure, named, note_bfloat16,
                      sets_in, super_resolve)
from search_space import (OPERATIONS, Architecture, Space, features, milliseconds,
                          write_whole)

BUDGET, WITHIN, AGAIN, BEST, BATCH = 12e9, 0.05, 20, 5, 8
SEARCHES = {name: search.PRESETS["lesson"][name] for name in ("steps", "batch")}


def near(a: Architecture, space: Space, rng: random.Random) -> Architecture:
    """One choice changed: an operation, a width, or the path by a letter at its end."""
    level = rng.choice(("path", "operation", "width"))
    if level == "path":  # shorter, or longer by a random cell or an upsampling
        other = space.random(rng)
        path = rng.choice([n for n in space.nodes if n[:-1] == a.path or n == a.path[:-1]])
        cells = path.count("c")
        return space.architecture(path, (a.operations + other.operations[:1])[:cells],
                                  (a.widths + other.widths[:1])[:cells])
    rows = [list(row) for row in (a.operations if level == "operation" else a.widths)]
    row = rng.choice(rows)
    place = rng.randrange(len(row))
    candidates = OPERATIONS if level == "operation" else space.widths
    row[place] = rng.choice([c for c in candidates if c != row[place]])
    rows = tuple(map(tuple, rows))
    return replace(a, operations=rows) if level == "operation" else replace(a, widths=rows)


def draw(space: Space, found: list[Architecture], count: int) -> list[tuple[str, Architecture]]:
    """`count` different networks beside the found ones, the groups mixed: any beginning serves."""
    rng, taken = random.Random(0), dict.fromkeys(found)
    networks = [("found", a) for a in taken]
    for group in itertools.islice(itertools.cycle(("chance", "budget", "chance", "near")), count):
        for _ in range(1_000_000):
            a = near(rng.choice(found), space, rng) if group == "near" else space.random(rng)
            fits = group != "budget" or abs(a.multiply_adds() / BUDGET - 1) < WITHIN
            if fits and a not in taken:
                break
        else:
            raise ValueError(f"the space holds too few networks for --networks {count}")
        taken[a] = None
        networks.append((group, a))
    return networks


def find(settings, seed) -> Architecture:
    """What a search with this seed finds."""
    run = start(settings, seed)
    advance(run, settings.search)
    run.hand_over()
    return run.network.architecture


def row_of(settings, key, a: Architecture) -> list[dict]:
    """Train `a` alone, measure it: a row of the table, in a list."""
    group, number, seed = key
    run = start(settings, seed, a)
    advance(run)
    network = run.network.eval()
    row = dict(group=group, number=number, path=a.path,
               operations=" / ".join(map(" ".join, a.operations)),
               widths=" / ".join(" ".join(map(str, w)) for w in a.widths), channels=a.channels,
               parameters=a.parameters(), multiply_adds=a.multiply_adds(),
               milliseconds=round(milliseconds(network, features(3, 1, a.scale, "cpu")), 1),
               seed=seed)
    for name, photos in CACHE["sets"].items():
        mean = means(measure(lambda lr: super_resolve(network, lr), photos, a.scale))
        row |= {f"{name}_psnr": round(mean["psnr"], 4), f"{name}_ssim": round(mean["ssim"], 5)}
    return [row]


def architecture(row: dict) -> Architecture:
    """The network of a row of the table, as csv.DictReader gives it."""
    return Space(2, int(row["channels"])).architecture(
        row["path"], [cell.split() for cell in row["operations"].split("/")],
        [[int(w) for w in cell.split()] for cell in row["widths"].split("/")])


def read(path: Path, *columns) -> list[dict]:
    """The rows of a table, or none yet; ValueError if it is another table, without the columns."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if any(row.get(name) is None for row in rows for name in columns):
        raise ValueError(f"{path} is another table, or damaged: choose another --out")
    return rows


def write(path: Path, rows: list[dict]):
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (int(row["number"]), int(row["seed"]))))
    write_whole(path, text.getvalue())


def prepare(args, scale, *options, **more) -> argparse.Namespace:
    """Settings of search.py for the lesson's recipe, and what the workers will share.

    ValueError if the table was begun with other settings, photographs or `more`: FILE.json says.
    """
    settings, _ = search.settings_of(search.arguments().parse_args([
        "--scale", str(scale), "--preset", "lesson", "--device", "cpu", "--bfloat16", "--data",
        args.data, "--steps", str(args.steps), "--out", str(NOWHERE), *map(str, options)]))
    check_folder_of(args.out)
    if args.out.suffix != ".csv":
        raise ValueError(f"--out {args.out} must end in .csv: FILE.json is written beside it")
    note_bfloat16(settings)
    CACHE["sets"] = sets_in(args.benchmark, settings.scale)
    torch.set_num_threads(1)
    CACHE["costs"] = search.Run(settings, NOWHERE).costs
    CACHE["data"] = search.load_data(settings)
    note = args.out.with_suffix(".json")
    made = dict(steps=args.steps, search=settings.search, benchmark=list(CACHE["sets"]),
                data=CACHE["data"].found["digest"], **more)
    before = json.loads(note.read_text()) if args.out.exists() and note.exists() else made
    if changed := [name for name in made if before.get(name) != made[name]]:
        raise ValueError(f"{args.out} was begun with another {' and '.join(changed)} (see {note}): "
                         "choose another --out")
    write_whole(note, json.dumps(made, indent=1) + "\n")
    return settings


def build(args):
    rows = read(args.out, "group", "widths", "seed")
    settings = prepare(args, 2, "--budget", "12G", "--search", args.search, "--batch", BATCH)
    space = Space(2, settings.channels, settings.cells, settings.positions)
    with forks(args.workers) as pool:
        # 1. The searches' results: from the table, where it holds them.
        found = [architecture(row) for row in rows if (row["group"], row["seed"]) == ("found", "0")]
        if len(found) < 3:
            searches = argparse.Namespace(**vars(settings) | SEARCHES)
            found = pool.map(task, [(find, searches, seed) for seed in range(3)])
        # 2. All networks, without what is there already.
        networks = draw(space, list(dict.fromkeys(found)), args.networks)
        keys = [(group, number, seed) for seed in range(3)
                for number, (group, _) in enumerate(networks) if seed == 0 or number < AGAIN]

        def train(keys):
            done = {(int(row["number"]), int(row["seed"])) for row in rows}
            work(pool, [(row_of, settings, key, networks[key[1]][1]) for key in keys
                        if key[1:] not in done], rows, args.out)
        train(keys)
        # 3. The best that a search could have found, twice again.
        allowed = [row for row in rows if int(row["number"]) < len(networks) and
                   int(row["seed"]) == 0 and
                   search.LEAST * BUDGET <= int(row["multiply_adds"]) <= BUDGET]
        allowed.sort(key=lambda row: -float(row[f"{next(iter(CACHE['sets']))}_psnr"]))
        best = dict.fromkeys((row["group"], int(row["number"])) for row in allowed)
        train([(*key, seed) for key in [*best][:BEST] for seed in (1, 2)])


def work(pool, jobs, rows, out):
    """Do the jobs, whose results are lists of rows; the table is written after each."""
    done = as_completed([pool.submit(task, job) for job in jobs])
    for future in tqdm(done, "trainings", len(jobs)):
        rows += future.result()
        write(out, rows)


def options(program: str, manual: str, steps: int) -> CommandLine:
    """A parser with what networks.py, field.py and claims.py are all asked."""
    parser = CommandLine(prog=program, description=manual.split("\n")[0],
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=named, required=True, metavar="DIR", help="photographs to train on")
    add("--benchmark", type=named, nargs="+", required=True, metavar="DIR",
        help="sets to measure on")
    add("--steps", type=search.positive, default=steps, help="of each network's training")
    add("--workers", type=search.positive, default=torch.get_num_threads(), help="processes")
    add("--out", type=Path, required=True, metavar="FILE.csv", help="the table")
    return parser


def main(argv=None):
    parser = options("networks.py", __doc__, steps=3000)
    add = parser.add_argument
    add("--networks", type=search.positive, default=240, help="how many, beside the found ones")
    add("--search", type=search.positive, default=300, help="steps of the three searches")
    args = parser.parse_args(argv)
    with parser.guard("; try fewer --workers"):
        build(args)


if __name__ == "__main__":
    main()
