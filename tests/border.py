"""What would a network give if it saw more picture beyond the border, instead of zeros?

    python tests/border.py SETS notebooks/results/x2-12G ...

SETS holds Set5 and Set14. For each network: PSNR-Y on both, and how many levels a flat saturated
colour is off, with nothing beyond the border (zeros for each convolution), and with the picture
continued as far as the network sees, in three ways of np.pad.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import CommandLine, means, measure, sets_in
from search_space import load_run


@torch.inference_mode()
def continued(network, lr, mode):
    """uint8 (H, W, 3) -> uint8 (s H, s W, 3), of a picture that goes on beyond its border."""
    scale, margin = network.architecture.scale, network.architecture.radius if mode else 0
    lr = np.pad(lr, ((margin, margin), (margin, margin), (0, 0)), mode=mode or "constant")
    sr = network(torch.from_numpy(lr).permute(2, 0, 1)[None].float() / 255)[0]
    inside = slice(scale * margin, -scale * margin or None)
    sr = (sr[:, inside, inside].clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return sr.permute(1, 2, 0).numpy()


def table(sets, runs):
    flat = np.full((40, 40, 3), (255, 0, 60), np.uint8)
    print("run        beyond      Set5    Set14   flat colour")
    for run in runs:
        network = load_run(run)
        scale = network.architecture.scale
        photos = sets_in([sets / name for name in ("Set5", "Set14")], scale)
        for mode in None, "edge", "reflect", "symmetric":
            dB = [means(measure(lambda lr: continued(network, lr, mode), files, scale))["psnr"]
                  for files in photos.values()]
            off = np.abs(continued(network, flat, mode).astype(int) - flat[0, 0]).max()
            print(f"{Path(run).name:10s} {mode or 'nothing':10s} {dB[0]:7.3f} {dB[1]:7.3f} "
                  f"{off:4d} levels")


def main(argv=None):
    parser = CommandLine(prog="border.py", description=__doc__.split("\n")[0])
    parser.add_argument("sets", type=Path, metavar="SETS", help="has folders Set5 and Set14")
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+", help="folders of search.py")
    args = parser.parse_args(argv)
    with parser.guard():
        table(args.sets, args.runs)


if __name__ == "__main__":
    main()
