"""The correction filter: exact where it must be, and worth its decibels on photographs."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from correction import (bicubic, correct, correction, filtered, four_ways, gaussian, main, mirrored,
                        shrink, shrink_periodic, spectrum)
from evaluate import (crop_to, degrade, psnr, read_photo, sample_photo, score, sets_in,
                      super_resolve)
from search_space import load_run

ROOT = Path(__file__).parent.parent
RUN = ROOT / "notebooks" / "results" / "x2-12G"
NARROW, WIDE, WIDEST = (std / np.sqrt(2) for std in (1.5, 2.5, 3.5))
SHAPE = 96, 120  # of HR
needs_sets = pytest.mark.skipif("TRILEVEL_BENCHMARK" not in os.environ,
                                reason="TRILEVEL_BENCHMARK names no folder of benchmark pictures")


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_kernels(scale):
    assert len(bicubic(scale)) == {2: 16, 3: 21, 4: 24}[scale]
    assert len(gaussian(1.0, scale)) == {2: 32, 3: 33, 4: 32}[scale]
    for kernel in bicubic(scale), gaussian(WIDE, scale):
        assert kernel.sum() == pytest.approx(1, abs=1e-14)
        assert kernel == pytest.approx(kernel[::-1, ::-1], abs=1e-17)
        centre = np.arange(len(kernel)) - (len(kernel) - 1) / 2
        assert kernel.sum(0) @ centre == pytest.approx(0, abs=1e-14)
    assert gaussian(WIDE, scale).sum(0) @ (
        np.arange(len(gaussian(1, scale))) - (len(gaussian(1, scale)) - 1) / 2) ** 2 == (
            pytest.approx(WIDE ** 2, rel=1e-6))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_needs_no_correction(scale):
    H = correction(bicubic(scale), bicubic(scale), scale, SHAPE)
    assert H.shape == (96 // scale, 120 // scale) and np.abs(H - 1).max() <= 1e-12


@pytest.mark.parametrize("std", [NARROW, WIDE])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_flat_areas_keep_their_colour(scale, std):
    H = correction(gaussian(std, scale), bicubic(scale), scale, SHAPE)
    assert H[0, 0] == pytest.approx(1, abs=1e-12)


def test_how_much_noise_is_magnified():
    for std, largest in (NARROW, 3.79), (WIDE, 527.47), (WIDEST, 865e3):
        H = np.abs(correction(gaussian(std, 2), bicubic(2), 2, SHAPE))
        assert H.max() == pytest.approx(largest, rel=2e-3)
        assert np.abs(correction(gaussian(std, 2), bicubic(2), 2, SHAPE, 0.003)).max() < 170


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_exact_for_what_bicubic_can_express(scale):
    """x = r~ * up(z): the corrected picture is bicubic's. Also for a kernel that is lopsided."""
    rng, offset, r = np.random.default_rng(0), (scale - 1) // 2, bicubic(scale)
    up = np.zeros((*SHAPE, 3))
    up[offset::scale, offset::scale] = rng.random(up[offset::scale, offset::scale].shape)
    x = filtered(up, spectrum(r, SHAPE).conj())
    wanted = shrink_periodic(x, r, scale)
    lopsided = gaussian(NARROW, scale)
    lopsided[18, 13] += 0.1
    for s in gaussian(NARROW, scale), lopsided / 1.1:
        y = shrink_periodic(x, s, scale)
        corrected = filtered(y, correction(s, r, scale, SHAPE))
        assert np.abs(corrected - wanted).max() <= 1e-14
        assert np.abs(y - wanted).max() > 1e-3


def test_uncorrected_is_far_off():
    """The same at x2 with the wide kernel: about .07, with pictures in [0, 1]."""
    r, s, up = bicubic(2), gaussian(WIDE, 2), np.zeros((*SHAPE, 3))
    up[::2, ::2] = np.random.default_rng(0).random(up[::2, ::2].shape)
    x = filtered(up, spectrum(r, SHAPE).conj())
    wanted, y = shrink_periodic(x, r, 2), shrink_periodic(x, s, 2)
    assert np.abs(filtered(y, correction(s, r, 2, SHAPE)) - wanted).max() <= 1e-14
    assert 0.05 < np.abs(y - wanted).max() < 0.1


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shrinking_by_bicubic_is_evaluates(scale):
    """So the samples lie where they must. (`evaluate.degrade` rounds twice: .28 on average.)"""
    hr = read_photo(sample_photo())[:120, :96]
    lr = degrade(hr, scale)
    assert np.abs(shrink(hr, bicubic(scale), scale) - lr).mean() < 0.3
    assert np.abs(shrink(np.roll(hr, 1, 0), bicubic(scale), scale) - lr).mean() > 1


def test_the_mirror():
    image = np.arange(12.0).reshape(3, 4, 1)
    assert mirrored(image, 2)[2, :, 0].tolist() == [1, 0, 0, 1, 2, 3, 3, 2]
    # Shrinking a mirrored picture mirrors the small one. (8 pixels: as far as the kernel reaches.)
    hr, s = read_photo(sample_photo())[:64, :80].astype(float), gaussian(NARROW, 2)
    lr, inside = shrink(hr, s, 2), np.s_[8:-8, 8:-8]
    wanted = shrink(mirrored(hr, 32), s, 2)[inside]
    assert mirrored(lr, 16)[inside] == pytest.approx(wanted, abs=1e-9)
    assert correct(lr, bicubic(2), 2) == pytest.approx(lr, abs=1e-9)


def photo(folder):
    folder.mkdir()
    Image.fromarray(read_photo(sample_photo())[60:188, 200:340]).save(folder / "face.png")
    return folder / "face.png"


def test_correcting_a_photograph_pays(tmp_path):
    native, uncorrected, corrected, rounded = four_ways(
        load_run(RUN), photo(tmp_path / "set"), gaussian(WIDE, 2), 0.003)
    assert uncorrected + 2 < rounded < corrected < native + 0.5 and corrected > uncorrected + 4


def test_the_command_line(tmp_path, capsys, monkeypatch):
    path = photo(tmp_path / "set")
    monkeypatch.setattr("common.sample_photo", lambda: path)
    main([str(RUN), "--kernel", "gaussian:1.77", "--benchmark", str(path.parent)])
    row = r"\| \w+ \| \d\d\.\d\d \| \d\d\.\d\d \| \d\d\.\d\d \| \d\d\.\d\d \|"
    assert len(re.findall(row, capsys.readouterr().out)) == 2
    large = tmp_path / "large.png"
    main([str(RUN), "--kernel", "gaussian:1.77", "--upscale", str(path), "-o", str(large)])
    with Image.open(large) as image:
        assert image.size == (280, 256) and image.mode == "RGB"


@pytest.mark.parametrize("options", [
    ["--kernel", "box:2"], ["--kernel", "gaussian:9"], ["--kernel", "gaussian:1:2"], [],
    ["--kernel", "gaussian:1", "--upscale", "a.png"],
    ["--kernel", "gaussian:1", "--upscale", "a.png", "-o", "b.jpg"],
    ["--kernel", "gaussian:1", "--upscale", "missing.png", "-o", "b.png"],
    ["--kernel", "gaussian:1", "--benchmark", "missing"],
    ["--kernel", "gaussian:1", "--epsilon", "-1"]], ids=" ".join)
def test_a_bad_option_is_one_line(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(RUN), *options])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@needs_sets
def test_set5():
    """Whatever seed x2-12G was trained with, these hold."""
    network, s, found = load_run(RUN), gaussian(WIDE, 2), []
    for path in sets_in([Path(os.environ["TRILEVEL_BENCHMARK"]) / "Set5"], 2)["Set5"]:
        lr = shrink(crop_to(read_photo(path), 2), s, 2)
        found.append([psnr(*score(lambda _: super_resolve(network, each), path, 2), 2)
                      for each in (lr, correct(lr, s, 2, pad=16), correct(lr, s, 2, pad=0))])
    uncorrected, corrected, without_mirror = np.mean(found, axis=0)
    assert uncorrected == pytest.approx(28.81, abs=0.15)
    assert corrected == pytest.approx(36.85, abs=0.3) and corrected > uncorrected + 7.5
    assert without_mirror < 25
