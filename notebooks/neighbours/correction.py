"""Correction filter: what another kernel shrank is made to look as if bicubic had shrunk it.

    python notebooks/neighbours/correction.py notebooks/results/x2-12G --kernel gaussian:1.77
    python notebooks/neighbours/correction.py RUN --kernel gaussian:1.77 --benchmark Set5 Set14
    python notebooks/neighbours/correction.py RUN --kernel gaussian:1.77 --upscale PHOTO -o FILE.png

Abu Hussein, Tirer and Giryes, *Correction Filter for Single Image Super-Resolution: Robustifying
Off-the-Shelf Deep Super-Resolvers* (arXiv 1912.00157). This neighbour searches nothing: it is
what you do with a network that you have found. Every such network is trained on pictures that
*bicubic* has shrunk. A camera shrinks by another kernel, its blur, and then the network is lost: a
Gaussian of standard deviation 2.5 / sqrt(2) HR pixels costs x2-12G 8.6 dB on Set5. The network
stays as it is; what is mended is its input. With a known kernel that gives back nearly all of it.

**The filter.** x is the large picture (HR), s the kernel that shrank it, r bicubic's (the
*target*), and "down" keeps every scale-th sample. We have y = down(s * x) and want
y_r = down(r * x). Much of x is gone for good, so suppose that x lies in what bicubic can express:
x = r~ * up(z) for some small picture z, where r~ is r turned round and up puts zeros between
samples. Then both pictures are z filtered on the *small* grid, by q = down(s * r~) and by
p = down(r * r~):

    y = q * z,    y_r = p * z      so      y_r = h * y,    H = P / Q

In capitals are Fourier transforms, where a convolution is a product (for periodic pictures), and
the inverse of a filter is a division. Where Q is nearly zero, noise would be magnified without
bound, hence, with a small epsilon,

    H = P conj(Q) / (|Q|^2 + epsilon^2)

For x as supposed, the corrected picture *is* bicubic's, to the last digit. For a photograph it is
near it. Whatever s is, flat areas keep their colour: H is 1 at frequency 0.

**Three things go wrong easily.** (Figures: PSNR-Y of x2-12G on Set5, a standard deviation of
2.5 / sqrt(2), if nothing else is said; 28.80 dB uncorrected, 36.86 corrected.)

*Place:* the sample kept must lie where bicubic's lies, in the middle of the scale x scale pixels it
stands for. An even kernel has its middle between two pixels, and so the sample is at offset
(scale - 1) // 2: 0, 1, 1 for x2, x3, x4. Offset 0 at x3 shifts the picture and costs 7 dB.

*Digits:* |H| goes up to 3.8, 527 and 865,000 at x2, for 1.5, 2.5 and 3.5 over sqrt(2). So all is
float64. An LR picture *rounded to 8 bits* holds noise, which H magnifies: with epsilon 0, .001,
.003 and .01 there are 21.7, 32.0, 34.4 and 33.9 dB left.

*Border:* photographs are not periodic. We mirror the LR picture by 32 pixels at each side, correct,
and cut them off: 21.15, 36.76, 36.86, 36.86 dB with 0, 8, 16, 32 pixels (for 3.5 / sqrt(2): 11.8,
15.1, 25.0, 36.3).

**The table** has, for each set, the PSNR-Y of the network on four kinds of LR pictures: native
(bicubic's, on which it was trained), uncorrected (the kernel's), corrected (unrounded, epsilon 0),
and corrected after rounding to 8 bits (--epsilon). HR is mirrored before it is shrunk, so LR's
mirror is just what it should be, which flatters the filter. In a picture cut out of a larger scene
it is not, and H magnifies the difference: in Set5 without its outermost 32 LR pixels 36.4 dB
instead of 37.5, and with 3.5 / sqrt(2) 21.4 instead of 37.0.

**Theirs and ours.** The formula and the kernels are the authors' (their code shifts both kernels
alike, which cancels). Ours are the networks, the mirrors, and epsilon .003, best on Set5 for the
kernel above. *Left out:* the paper also estimates an unknown kernel, as a product of four small
ones, until the network's result, shrunk by it, is the LR picture again. As we understand the
authors' code (500 steps of Adam at 1e-4; read, not run) we came nowhere near the known kernel
(32.5 dB instead of 41.4 on Set5's bird, 26.2 instead of 33.0 on its butterfly; with an earlier
x2-12G, of 11.7 G). What the paper claims in figures we could not read.
"""
import math
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import sets_of
from evaluate import (CommandLine, check_folder_of, crop_to, cubic, named, psnr, read_photo, score,
                      super_resolve)
from search import checked
from search_space import load_run, write_whole

PAD = 32  # LR pixels of mirror at each side


# --- Kernels -----------------------------------------------------------------------------------

def bicubic(scale: int) -> np.ndarray:
    """The target r: Keys' kernel, as wide as `scale` stretches it. (n, n), sum 1."""
    n = 4 * scale + 8 + scale % 2  # odd where the scale is, so that it has a pixel in its middle
    taps = cubic((np.arange(n) - (n - 1) / 2) / scale)
    return square(taps)


def gaussian(std: float, scale: int) -> np.ndarray:
    """Standard deviation in HR pixels. (32, 32) or, at x3, (33, 33), sum 1."""
    n = 32 + scale % 2
    return square(np.exp(-((np.arange(n) - (n - 1) / 2) / std) ** 2 / 2))


def square(taps: np.ndarray) -> np.ndarray:
    """A kernel that is the same along rows and columns: (n,) -> (n, n), sum 1."""
    return np.outer(taps, taps) / taps.sum() ** 2


def spectrum(kernel: np.ndarray, shape) -> np.ndarray:
    """Its Fourier transform on a periodic grid, complex `shape`; the middle is at pixel (0, 0).

    (Of an even kernel it is the pixel right and below of the middle.)
    """
    n, grid = len(kernel), np.zeros(shape)
    rows, columns = ((np.arange(n) - n // 2) % side for side in shape)
    np.add.at(grid, np.ix_(rows, columns), kernel)
    return np.fft.fft2(grid)


# --- Shrinking and correcting ------------------------------------------------------------------
# Pictures are float64 (H, W, channels) here. What is called periodic has no border: it goes round.

def filtered(image: np.ndarray, response: np.ndarray) -> np.ndarray:
    """A periodic picture, each frequency times `response` (H, W)."""
    return np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * response[..., None], axes=(0, 1)).real


def shrink_periodic(hr: np.ndarray, kernel: np.ndarray, scale: int) -> np.ndarray:
    """down(kernel * hr): (H, W, 3) -> (H / scale, W / scale, 3)."""
    offset = (scale - 1) // 2
    return filtered(hr, spectrum(kernel, hr.shape[:2]))[offset::scale, offset::scale]


def correction(s: np.ndarray, r: np.ndarray, scale: int, shape, epsilon: float = 0) -> np.ndarray:
    """H, for HR pictures of `shape`: complex (height / scale, width / scale)."""
    S, R = spectrum(s, shape), spectrum(r, shape)
    # q and p, on the small grid: every scale-th sample of what the kernels do one after the other.
    Q, P = (np.fft.fft2(np.fft.ifft2(each * R.conj())[::scale, ::scale]) for each in (S, R))
    with np.errstate(divide="ignore", invalid="ignore"):
        H = P * Q.conj() / (np.abs(Q) ** 2 + epsilon ** 2)
    if not np.isfinite(H).all():
        raise ValueError("this kernel leaves nothing of some frequencies: take a smaller one")
    return H


def mirrored(image: np.ndarray, pixels: int) -> np.ndarray:
    """(H, W, 3) -> (H + 2 pixels, W + 2 pixels, 3), as in c b a | a b c | c b a."""
    return np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), "symmetric")


def without_border(image: np.ndarray, pixels: int) -> np.ndarray:
    return image[pixels:len(image) - pixels, pixels:image.shape[1] - pixels]


def shrink(hr: np.ndarray, kernel: np.ndarray, scale: int) -> np.ndarray:
    """A photograph shrunk by a kernel: (H, W, 3) -> float64 (H / scale, W / scale, 3).

    Beyond its border it is taken to be mirrored, as far as the kernel sees.
    """
    return without_border(shrink_periodic(mirrored(hr, scale * PAD), kernel, scale), PAD)


def correct(lr: np.ndarray, s: np.ndarray, scale: int, epsilon: float = 0, pad: int = PAD):
    """What bicubic would have made of the picture that s made `lr` of: (h, w, 3) -> the same.

    float64, not rounded and not clipped: the network takes it as it is.
    """
    padded = mirrored(lr, pad)
    shape = scale * padded.shape[0], scale * padded.shape[1]
    return without_border(filtered(padded, correction(s, bicubic(scale), scale, shape, epsilon)),
                          pad)


# --- What is measured --------------------------------------------------------------------------

def four_ways(network, path: Path, s: np.ndarray, epsilon: float) -> list[float]:
    """PSNR-Y of one photograph: native, uncorrected, corrected, corrected of 8 bits."""
    scale = network.architecture.scale
    lr = shrink(crop_to(read_photo(path), scale), s, scale)
    rounded = lr.round().clip(0, 255)
    inputs = lr, correct(lr, s, scale), correct(rounded, s, scale, epsilon)
    # `score` shrinks by bicubic and hands that in: native takes it, the others have their own.
    ways = [lambda native: native, *(lambda _, each=each: each for each in inputs)]
    return [psnr(*score(lambda native: super_resolve(network, way(native)), path, scale), scale)
            for way in ways]


def run_benchmark(network, sets: dict, kernel: str, s: np.ndarray, epsilon: float):
    print(f"| x{network.architecture.scale}, {kernel}, PSNR-Y (dB) | native | uncorrected | "
          f"corrected | 8 bits, corrected (epsilon {epsilon:g}) |\n|---|---:|---:|---:|---:|")
    for name, photos in sets.items():
        rows = [four_ways(network, path, s, epsilon) for path in tqdm(photos, name, leave=False)]
        print(f"| {name} | " + " | ".join(f"{dB:.2f}" for dB in np.mean(rows, axis=0)) + " |")


def run_upscale(network, photo: Path, output: Path, s: np.ndarray, epsilon: float):
    """Correct and enlarge a picture file, to RGB."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} must end in .png")
    check_folder_of(output)
    if output.resolve() == photo.resolve():
        raise ValueError(f"{output} is the input itself: choose another name")
    lr, scale = read_photo(photo), network.architecture.scale
    large = Image.fromarray(super_resolve(network, correct(lr, s, scale, epsilon), 512 // scale))
    write_whole(output, large.save)
    print(f"{output}: {large.width}x{large.height}")


# --- The command line --------------------------------------------------------------------------

def read_kernel(text: str) -> float:
    """"gaussian:1.77" -> 1.77"""
    name, std = text.split(":")
    return float(std) if name == "gaussian" else math.nan


def main(argv=None):
    parser = CommandLine(prog="correction.py", description="Correct what another kernel than "
                         "bicubic has shrunk, and enlarge it. Without --upscale: measure.")
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a network, as notebooks/results/x2-12G")
    add("--kernel", required=True, metavar="gaussian:STD", help="what has shrunk, STD in HR pixels",
        type=checked(lambda text: (text, read_kernel(text)), lambda kernel: 0.3 <= kernel[1] <= 5,
                     "a kernel: gaussian:STD, with STD from 0.3 to 5 HR pixels"))
    add("--epsilon", default=0.003, help="for pictures of 8 bits (default: %(default)s)",
        type=checked(float, lambda e: 0 <= e < 1, "a number from 0 to below 1"))
    add("--benchmark", type=named, nargs="+", metavar="DIR", help="sets to measure on, besides the "
        "sample photograph")
    add("--upscale", type=Path, metavar="PHOTO", help="picture to correct and enlarge instead")
    add("-o", "--output", type=Path, metavar="FILE.png", help="where --upscale writes")
    args = parser.parse_args(argv)
    if (args.upscale is None) != (args.output is None):
        parser.error("--upscale PHOTO and -o FILE.png go together")
    if args.upscale and args.benchmark:
        parser.error("--upscale and --benchmark are two tasks: do one after the other")
    with parser.guard():
        network = load_run(args.run)
        args.scale, (kernel, std) = network.architecture.scale, args.kernel
        s = gaussian(std, args.scale)
        if args.upscale:
            run_upscale(network, args.upscale, args.output, s, args.epsilon)
        else:
            run_benchmark(network, sets_of(args), kernel, s, args.epsilon)


if __name__ == "__main__":
    main()
