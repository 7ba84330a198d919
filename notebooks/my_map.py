"""Your maps onto the simplex; the tasks are in 6_assignment.ipynb.

Each is f(logits (..., K), progress in [0, 1]) -> weights (..., K), in torch alone, as torch follows
no other way back to a gradient; and it leaves its logits as they are. Search with one by

    python search.py --scale 2 --preset lesson --activation notebooks/my_map.py:my_map

`promises` says what a map claims beyond being one:

    "deterministic"          the same weights at each call
    "exact gradient"         autograd's gradient is the map's own
    "one-hot at progress 1"  a decision at the end
    "thaws"                  explained in task 3

In task 3, what it does not claim is not checked (but "one-hot at progress 1" is, in any case).
"""
import torch


def straight_line(logits, progress=0.0):
    """Task 0: on the straight line from softmax's weights to the corner of the largest logit.

    At progress 0 it is at softmax's weights, at 1 in the corner, at .25 a quarter of the way. Where
    several logits are largest, the corner is that of the first of them.
    """
    raise NotImplementedError("task 0, straight_line")


straight_line.promises = {"deterministic", "exact gradient", "one-hot at progress 1"}


def annealed_softmax(logits, progress=0.0):
    """Task 1: the weights that maximise <p, logits> + T entropy(p), where T = 0.01 ** progress."""
    raise NotImplementedError("task 1, annealed_softmax")


annealed_softmax.promises = {"deterministic", "exact gradient"}


def entmax15_row(z):
    """Task 2a: entmax-1.5 of one row of logits, (K,) -> (K,)."""
    raise NotImplementedError("task 2, entmax15_row")


def entmax15(logits, progress=0.0):
    """Task 2b: the same for all rows at once, without a loop. Progress is ignored: no schedule."""
    raise NotImplementedError("task 2, entmax15")


entmax15.promises = {"deterministic", "exact gradient"}


def my_map(logits, progress=0.0):
    """Task 3: a map of your own that ends in a decision."""
    raise NotImplementedError("task 3, my_map")


my_map.promises = {"deterministic", "exact gradient", "one-hot at progress 1", "thaws"}
