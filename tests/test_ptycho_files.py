"""Scans in files: every format gives the same scan, and what cannot be right is named."""

from __future__ import annotations

import bz2
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from verglas.errors import InputError, OutputError
from verglas.ptychography.files import read_scan
from verglas.ptychography.files_result import read_result, write_result
from verglas.ptychography.files_write import write_scan
from verglas.ptychography.read_options import ReadOptions
from verglas.ptychography.scan import Reconstruction, Scan
from verglas.ptychography.simulation import Setting, Truth, make_truth, patterns, stored_as
from verglas.ptychography.simulation_options import DetectorOptions, PathOptions

KEV = 8.8


@pytest.fixture(scope="module")
def made() -> tuple[Truth, np.ndarray]:
    setting = Setting(path=PathOptions(positions=20), detector=DetectorOptions(window=32, energy=KEV))
    truth = make_truth(setting)
    return truth, np.concatenate(list(patterns(truth, setting)))


def offsets(scan: Scan) -> torch.Tensor:
    return scan.positions_B2 - scan.positions_B2[:1]


def assert_same(scan: Scan, made: tuple[Truth, np.ndarray], tolerance: float = 1e-4) -> None:
    """Patterns as they were simulated, positions but for their origin."""
    truth, counts_BYX = made
    assert np.array_equal(scan.patterns_BYX.numpy().astype(int), counts_BYX)
    expected_B2 = truth.recorded_B2 - truth.recorded_B2[:1]
    assert np.abs(offsets(scan).numpy() - expected_B2).max() < tolerance


def metres(truth: Truth) -> np.ndarray:
    return truth.recorded_B2 * np.array(truth.geometry.object_pixel((32, 32)))


def test_cxi_there_and_back(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    write_scan(
        tmp_path / "a.cxi", truth.geometry, truth.recorded_B2, [counts_BYX[:7], counts_BYX[7:]], np.uint16, truth.probe_MYX
    )
    scan, notices = read_scan(tmp_path / "a.cxi")
    assert_same(scan, made)
    assert scan.patterns_BYX.dtype == torch.uint16 and notices == [] and scan.object_pixel == pytest.approx((1e-8, 1e-8))
    assert scan.probe_MYX is not None and np.allclose(scan.probe_MYX.numpy(), truth.probe_MYX, rtol=1e-5, atol=1e-4)
    assert scan.geometry.wavelength == pytest.approx(truth.geometry.wavelength)
    with pytest.raises(OutputError, match="exists"):
        write_scan(tmp_path / "a.cxi", truth.geometry, truth.recorded_B2, [counts_BYX], np.uint16)


def test_cxi_near_field_says_so(tmp_path: Path) -> None:
    setting = Setting(path=PathOptions(positions=5), detector=DetectorOptions(window=32, near_field=True))
    truth = make_truth(setting)
    write_scan(tmp_path / "near.cxi", truth.geometry, truth.recorded_B2, patterns(truth, setting), stored_as(setting))
    scan, _ = read_scan(tmp_path / "near.cxi")
    assert scan.geometry.kind == "near" and scan.geometry.distance == pytest.approx(truth.geometry.distance)


def test_cxi_basis_turns_positions(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    write_scan(tmp_path / "a.cxi", truth.geometry, truth.recorded_B2, [counts_BYX], np.uint16)
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        detector = file["entry_1/instrument_1/detector_1"]
        del detector["basis_vectors"]
        detector["basis_vectors"] = np.array([[1.0, 0, 0], [0, 1.0, 0]]) * 75e-6  # rows along x, columns along y; [2, 3]
        detector["mask"] = np.where(np.eye(32) > 0, 1, 0x1000).astype(np.uint32)
    scan, _ = read_scan(tmp_path / "a.cxi")
    expected_B2 = truth.recorded_B2[:, ::-1] - truth.recorded_B2[:1, ::-1]
    assert np.abs(offsets(scan).numpy() + expected_B2).max() < 1e-4
    assert scan.mask_YX is not None and torch.equal(~scan.mask_YX, torch.eye(32, dtype=torch.bool))


def test_ptyd(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    weights = np.ones((32, 32))
    weights[3, 4] = 0
    with h5py.File(tmp_path / "a.ptyd", "w") as file:
        for number, rows in enumerate((slice(0, 12), slice(12, 20))):
            file[f"chunks/{number}/data"] = counts_BYX[rows].astype(np.int32)
            file[f"chunks/{number}/positions"] = metres(truth)[rows]
        file["info/energy"], file["info/propagation"] = KEV, "farfield"
        file["meta/distance"], file["meta/psize"] = truth.geometry.distance, [75e-6, 75e-6]
        file["info/weight2d"] = weights
    scan, _ = read_scan(tmp_path / "a.ptyd")
    assert scan.mask_YX is not None and scan.mask_YX.sum() == 32 * 32 - 1 and not scan.mask_YX[3, 4]
    counts_BYX = counts_BYX * (weights > 0)
    assert_same(scan, (truth, counts_BYX))


def test_nexus(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    with h5py.File(tmp_path / "a.nxs", "w") as file:
        for name, kind in (
            ("scan/counter", "NXdetector"),
            ("scan/sample/motors", "NXtransformations"),
            ("scan/mono", "NXmonochromator"),
        ):
            file.create_group(name).attrs["NX_class"] = kind
        file["scan/counter/data"] = counts_BYX.reshape(4, 5, 32, 32)
        file["scan/counter/distance"] = 1e3 * truth.geometry.distance  # type: ignore[operator]
        file["scan/counter/distance"].attrs["units"] = "mm"
        file["scan/counter/x_pixel_size"] = 75e-6
        for axis, name in enumerate(("y", "x")):
            file[f"scan/sample/motors/{name}"] = -1e6 * metres(truth)[:, axis].reshape(4, 5)
            file[f"scan/sample/motors/{name}"].attrs["units"] = np.bytes_("um")
        file["scan/mono/energy"] = 1e3 * KEV
    assert_same(read_scan(tmp_path / "a.nxs")[0], made)


def tike(made: tuple[Truth, np.ndarray], **changed: np.ndarray) -> dict[str, np.ndarray]:
    truth, counts_BYX = made
    arrays = {
        "data": np.fft.ifftshift(counts_BYX, axes=(1, 2))[None].astype(np.float32), "scan": truth.recorded_B2[None],
        "probe": truth.probe_MYX[None, None, None].astype(np.complex64),
    }  # fmt: skip
    return arrays | changed


def test_tike_arrays(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **tike(made))  # type: ignore[arg-type]
    (tmp_path / "a.npz.bz2").write_bytes(bz2.compress((tmp_path / "a.npz").read_bytes()))
    for name in ("a.npz", "a.npz.bz2"):
        scan, notices = read_scan(tmp_path / name)
        assert_same(scan, made)
        assert scan.probe_MYX is not None and len(scan.probe_MYX) == 1 and "in the corner" in notices[0]
    ptyger = tike(made, scan=made[0].recorded_B2.T[:, None])  # [2, 1, B]
    np.savez(tmp_path / "b.npz", **ptyger)  # type: ignore[arg-type]
    assert_same(read_scan(tmp_path / "b.npz")[0], made)


def test_pty_chi_arrays(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dp"], file["obj_pixel_size_m"] = counts_BYX, 1e-8
        for axis, name in enumerate("yx"):
            file[f"probe_position_{name}_m"] = metres(truth)[:, axis]
    scan, notices = read_scan(tmp_path / "a.h5")
    assert_same(scan, made)
    assert any("10 nm" in one for one in notices)
    swapped, _ = read_scan(tmp_path / "a.h5", ReadOptions(position_axes="x-y"))
    assert np.allclose(offsets(swapped)[:, 1], offsets(scan)[:, 0]) and np.allclose(offsets(swapped)[:, 0], -offsets(scan)[:, 1])


def refused(tmp_path: Path, arrays: dict[str, Any], options: ReadOptions | None = None) -> str:
    """The error that these arrays meet."""
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_scan(tmp_path / "bad.npz", options)
    text = str(caught.value)
    assert caught.value.found and caught.value.expected
    return text


def test_counts_that_cannot_be_are_named(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    data = tike(made)["data"].copy()
    data[0, 5, 1, 2] = -4
    assert "pattern 5" in refused(tmp_path, tike(made, data=data)) and "--clip-negative" in refused(
        tmp_path, tike(made, data=data)
    )
    clipped, notices = read_scan(tmp_path / "bad.npz", ReadOptions(clip_negative=True))
    assert clipped.patterns_BYX.min() == 0 and any("below 0" in one for one in notices)
    mask = np.ones((32, 32), bool)
    mask[1, 2] = False
    np.savez(tmp_path / "masked.npz", **tike(made, data=data, mask=mask))  # type: ignore[arg-type]
    masked, _ = read_scan(tmp_path / "masked.npz")  # the mask is in the order of the patterns
    assert masked.mask_YX is not None and not masked.mask_YX[17, 18] and masked.patterns_BYX.min() == 0
    data[0, 7, 0, 0] = np.nan
    assert "pattern 7 holds NaN" in refused(tmp_path, tike(made, data=data), ReadOptions(clip_negative=True))
    assert "all patterns are empty" in refused(tmp_path, tike(made, data=0 * made[1]))
    assert "no good pixel" in refused(tmp_path, tike(made, mask=~np.ones((32, 32), bool)))


def test_markers_of_bad_pixels_are_masked(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    marked_BYX = counts_BYX.astype(np.uint32)
    marked_BYX[:, 9, 8] = np.iinfo(np.uint32).max
    marked_BYX[3, 2, 1] = np.iinfo(np.uint32).max
    write_scan(tmp_path / "a.cxi", truth.geometry, truth.recorded_B2, [marked_BYX], np.uint32)
    scan, notices = read_scan(tmp_path / "a.cxi")
    assert scan.mask_YX is not None and sorted(map(tuple, (~scan.mask_YX).nonzero().tolist())) == [(2, 1), (9, 8)]
    assert scan.patterns_BYX.dtype == torch.uint16 and "2 pixels hold 4294967295" in notices[0]


def test_sizes_that_do_not_fit_are_named(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [np.ones((3, 3)), np.ones((4, 4))]
    assert "patterns of one size" in refused(tmp_path, tike(made, data=ragged))
    assert "probe of shape [1, 1, 16, 16]" in refused(tmp_path, tike(made, probe=np.ones((1, 1, 16, 16), complex)))
    assert "20 patterns and 25 positions" in refused(tmp_path, tike(made, scan=np.zeros((25, 2))))
    assert "--first 15" in refused(tmp_path, tike(made, scan=made[0].recorded_B2[:15]))
    assert len(read_scan(tmp_path / "bad.npz", ReadOptions(first=15))[0]) == 15
    assert "mask of [8, 8] px" in refused(tmp_path, tike(made, mask=np.ones((8, 8))))
    assert "patterns under one of the names" in refused(tmp_path, {"picture": np.ones((3, 3))})
    assert "positions under one of the names" in refused(tmp_path, {"data": made[1]})
    truth, counts_BYX = made
    with h5py.File(tmp_path / "mixed.ptyd", "w") as file:
        for number, stack in enumerate((counts_BYX[:10], counts_BYX[10:, :30, :30])):
            file[f"chunks/{number}/data"], file[f"chunks/{number}/positions"] = stack, metres(truth)[:10]
    with pytest.raises(InputError, match=r"from number 10 on have \[30, 30\] px, those before \[32, 32\] px"):
        read_scan(tmp_path / "mixed.ptyd")


def test_positions_that_cannot_be_are_named(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    position_B2 = made[0].recorded_B2.copy()
    position_B2[4] += 500
    position_B2 = np.concatenate([position_B2, position_B2[5:15], position_B2[5:15]])
    data = np.concatenate([tike(made)["data"], *[tike(made)["data"][:, 5:15]] * 2], 1)
    text = refused(tmp_path, tike(made, scan=position_B2, data=data))
    assert "1 positions outside of the scan (numbers 4)" in text and "--skip-isolated" in text
    scan, notices = read_scan(tmp_path / "bad.npz", ReadOptions(skip_isolated=True))
    assert len(scan) == 39 and any("left out 1" in one for one in notices)
    assert "--position-unit" in refused(tmp_path, tike(made, scan=1e-8 * made[0].recorded_B2))
    assert "windows meet no other" in refused(tmp_path, tike(made, scan=1e3 * made[0].recorded_B2))
    assert "position 3 is not a number" in refused(
        tmp_path, tike(made, scan=np.where(np.arange(20)[:, None] == 3, np.nan, made[0].recorded_B2))
    )
    small_YX = np.ones((40, 40), complex)
    assert "reach outside of the file's object of 40 x 40 px" in refused(tmp_path, tike(made, psi=small_YX))
    assert "--distance" in refused(tmp_path, tike(made), ReadOptions(position_unit="um"))
    assert "'xz'" in refused(tmp_path, tike(made), ReadOptions(position_axes="xz"))


def test_a_wrong_fftshift_is_named(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    wrong_BYX = np.fft.fftshift(counts_BYX, axes=(1, 2))
    write_scan(tmp_path / "wrong.cxi", truth.geometry, truth.recorded_B2, [wrong_BYX], np.uint16)
    with pytest.raises(InputError, match=r"centre of mass is at row (31|0|1), column .*fftshift.*--direct-beam corner"):
        read_scan(tmp_path / "wrong.cxi")
    assert_same(read_scan(tmp_path / "wrong.cxi", ReadOptions(direct_beam="corner"))[0], made)
    _, notices = read_scan(tmp_path / "wrong.cxi", ReadOptions(direct_beam="middle"))
    assert "as asked for" in notices[0]
    one_axis = np.fft.fftshift(counts_BYX, axes=1)
    assert "one axis only" in refused(tmp_path, tike(made, data=one_axis))
    flat = np.ones_like(counts_BYX)
    assert "not clear where the direct beam is" in refused(tmp_path, tike(made, data=flat))


def test_files_that_are_none(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    truth, counts_BYX = made
    (tmp_path / "text.h5").write_text("not HDF5")
    write_scan(tmp_path / "whole.cxi", truth.geometry, truth.recorded_B2, [counts_BYX], np.uint16)
    (tmp_path / "cut.cxi").write_bytes((tmp_path / "whole.cxi").read_bytes()[:20_000])
    np.savez(tmp_path / "whole.npz", **tike(made))  # type: ignore[arg-type]
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:20_000])
    (tmp_path / "cut.npz.bz2").write_bytes(bz2.compress((tmp_path / "whole.npz").read_bytes())[:900])
    for name in ("text.h5", "cut.cxi", "cut.npz", "cut.npz.bz2", "none.cxi", "none.npz"):
        with pytest.raises(InputError, match=name):
            read_scan(tmp_path / name)


def test_results_there_and_back(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def wave(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex64, generator=random)

    found = Reconstruction(
        wave(1, 2, 9, 11), wave(3, 4, 4), torch.rand(5, 2, dtype=torch.float64, generator=random),
        torch.rand(5, generator=random), torch.zeros(4, 4), wave(2, 4, 4), torch.randn(5, 2, generator=random),
        (3.5, -2.0), (1e-8, 2e-8), (0.5, 0.25),
    )  # fmt: skip
    write_result(tmp_path / "result.cxi", found, {"command_line": "verglas", "seed": 3})
    back, provenance = read_result(tmp_path / "result.cxi")
    for name, value in vars(found).items():
        other = getattr(back, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert provenance == {"command_line": "verglas", "seed": 3}
    with h5py.File(tmp_path / "result.cxi") as file:
        assert file["entry_1/image_1/data"].shape == (1, 2, 9, 11) and file["cxi_version"][()] == 160
    with pytest.raises(InputError, match="holds no object"):
        h5py.File(tmp_path / "empty.h5", "w").close()
        read_result(tmp_path / "empty.h5")


def test_the_real_far_field_set(shared: Path) -> None:
    scan, notices = read_scan(shared / "data/ptycho/siemens-star-small.npz.bz2")
    assert len(scan) == 516 and scan.shape == (128, 128) and "corner" in notices[0]
    light_YX = scan.patterns_BYX.double().mean(0)
    assert light_YX[24:104, 24:104].sum() > 0.9 * light_YX.sum()


def test_the_real_near_field_set(shared: Path) -> None:
    scan, _ = read_scan(shared / "data/ptycho/PETRAIII_P25_Near_Field_Ptycho.cxi", ReadOptions(near_field=True, focus=3.65e-3))
    assert len(scan) == 200 and scan.object_pixel == pytest.approx((178.66e-9, 178.66e-9), rel=1e-4)
    assert scan.geometry.distance == pytest.approx(3.638e-3, rel=1e-3)
    assert scan.mask_YX is not None and (~scan.mask_YX).sum() == 5


def test_wavelength_instead_of_energy(tmp_path: Path, made: tuple[Truth, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **tike(made))
    for options, metres in ((ReadOptions(wavelength=0.00197), 1.97e-12), (ReadOptions(energy=KEV), 1.2398e-6 / (1e3 * KEV))):
        assert read_scan(tmp_path / "a.npz", options)[0].geometry.wavelength == pytest.approx(metres, rel=1e-4)
    assert "beside --energy" in refused(tmp_path, tike(made), ReadOptions(energy=KEV, wavelength=0.1))
    assert "above 0" in refused(tmp_path, tike(made), ReadOptions(wavelength=0.0))
