"""MTF curves: reading, interpolation between samples, and a clear error for what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verglas.errors import InputError
from verglas.optics.mtf import MtfCurve

HEADER = "data_mtf\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n"


def curve(tmp_path, rows: str) -> MtfCurve:
    path = tmp_path / "mtf.star"
    path.write_text(HEADER + rows)
    return MtfCurve.read(path)


def test_linear_between_samples_constant_beyond(tmp_path):
    mtf = curve(tmp_path, "0 1\n0.25 0.6\n0.5 0.2\n")
    # At an original pixel of 2 Å, 0.0625 1/Å is 0.125 1/pixel: half-way between 1 and 0.6.
    at = mtf.at(torch.tensor([0.0, 0.0625, 0.125, 0.25, 0.4]), original_pixel_size=2.0)
    assert torch.allclose(at, torch.tensor([1.0, 0.8, 0.6, 0.2, 0.2]))


@pytest.mark.parametrize("rows", ["0 1\n", "0 1\n0.2 nan\n", "0.2 1\n0.1 0.9\n", "0 1\n0.5 0\n"])
def test_unusable_curves(tmp_path, rows):
    with pytest.raises(InputError, match="not usable"):
        curve(tmp_path, rows)


def test_a_file_without_curve(tmp_path):
    (tmp_path / "x.star").write_text("data_\n\nloop_\n_rlnImageName #1\n1@a.mrcs\n")
    with pytest.raises(InputError, match="no MTF curve"):
        MtfCurve.read(tmp_path / "x.star")


def test_real_detector(shared):
    mtf = MtfCurve.read(shared / "data/betagal_tutorial/mtf_k2_200kV.star")
    assert (mtf.frequency[0], mtf.value[0]) == (0.0, 1.0)
    assert mtf.frequency[-1] == pytest.approx(0.5)
    assert (np.diff(mtf.value) < 0).all()
