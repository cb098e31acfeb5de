"""MRC maps and stacks: every mode, both byte orders, headers by the book, bad input named."""

import bz2
import gzip
import subprocess
import sys

import mrcfile
import numpy as np
import pytest

from verglas.errors import InputError, OutputError
from verglas.io.mrc import Map, Stack, StackWriter, read_map, read_raw, write_map
from verglas.io.mrc_header import HEADER_DTYPE, make_header

RNG = np.random.default_rng(0)
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def write_raw_mrc(path, data, order="<", pixel=2.5, extended=b"", **fields):
    """An MRC file of any mode and byte order, field by field, independent of the writer under test."""
    mode = next(mode for mode, kind in MODES.items() if data.dtype.str[1:] == kind)
    header = np.zeros((), HEADER_DTYPE.newbyteorder(order))
    header["nz"], header["ny"], header["nx"] = data.shape
    header["mode"], header["m"], header["cell"] = mode, data.shape[::-1], np.array(data.shape[::-1]) * pixel
    header["axes"], header["nsymbt"], header["map"] = (1, 2, 3), len(extended), b"MAP "
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.tobytes() + extended + data.astype(data.dtype.newbyteorder(order)).tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_byte_order(tmp_path, mode, order):
    kind = np.dtype(MODES[mode])
    data = (RNG.normal(0, 20, (5, 6, 8)) if kind.kind == "f" else RNG.integers(0, 100, (5, 6, 8))).astype(kind)
    path = tmp_path / "a.mrcs"
    write_raw_mrc(path, data, order, extended=b"x" * 333)
    stack = Stack.open(path)
    assert (stack.n, stack.box_yx, stack.mode, stack.pixel_size) == (5, (6, 8), mode, 2.5)
    np.testing.assert_array_equal(stack.raw(), data)
    np.testing.assert_array_equal(stack.read(slice(None)), data.astype(np.float32))


@pytest.mark.parametrize("indices", [[3, 4, 5], [5, 4, 3], [0, 7, 7, 2], [], [7]])
def test_reading_images_by_number(tmp_path, indices):
    data = RNG.normal(size=(8, 4, 6)).astype(np.float32)
    write_raw_mrc(tmp_path / "a.mrcs", data)
    images = Stack.open(tmp_path / "a.mrcs").read(np.array(indices, dtype=int))
    np.testing.assert_array_equal(images, data[np.array(indices, dtype=int)])
    assert images.dtype == np.float32


def test_image_beyond_the_stack(tmp_path):
    write_raw_mrc(tmp_path / "a.mrcs", np.zeros((8, 4, 4), np.float32))
    with pytest.raises(InputError, match="image 9 asked for; expected 1 to 8"):
        Stack.open(tmp_path / "a.mrcs").read(np.array([2, 8]))


def test_opening_costs_nothing_however_large(tmp_path):
    path = tmp_path / "large.mrcs"
    header = make_header((400_000, 360, 360), 2, 1.0, is_stack=True)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.truncate(1024 + 400_000 * 360 * 360 * 4)  # sparse: takes no disk
    code = """if True:
        import resource, sys
        from verglas.io.mrc import Stack
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        stack = Stack.open(sys.argv[1])
        stack.raw()[399_999, 5, 5]
        print(stack.n, peak() - before)"""
    count, grown = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 400_000
    assert int(grown) < 5_000  # kB


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_map_is_valid_and_reads_back(tmp_path, dtype):
    data = RNG.normal(3, 2, (16, 16, 16)).astype(dtype).astype(np.float32)
    path = tmp_path / "a.mrc"
    write_map(path, Map(data, 1.237, (-9.0, 0.5, 7.0), ("first label", "second")), dtype=dtype)
    assert mrcfile.validate(path)
    with mrcfile.open(path) as other:
        np.testing.assert_array_equal(other.data, data)
        assert other.voxel_size.x == pytest.approx(1.237)
        assert other.header.origin.item() == (-9.0, 0.5, 7.0)
        assert other.header.ispg == 1
        assert other.header.rms == pytest.approx(data.std(), rel=1e-3)
    again = read_map(path)
    np.testing.assert_array_equal(again.data_ZYX, data)
    assert (again.pixel_size, again.origin, again.labels) == (1.237, (-9.0, 0.5, 7.0), ("first label", "second"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stack_writer(tmp_path, dtype):
    data = RNG.normal(1, 2, (7, 10, 12)).astype(dtype)
    path = tmp_path / "a.mrcs"
    with StackWriter(path, 7, (10, 12), 3.54, dtype) as writer:
        writer.append(data[:3])
        writer.append(data[3:])
        assert not path.exists()
    assert mrcfile.validate(path)
    with mrcfile.open(path) as other:
        assert other.is_image_stack()
        np.testing.assert_array_equal(other.data, data)
        assert other.header.dmean == pytest.approx(data.mean(dtype=np.float64), rel=1e-4)
        assert other.header.rms == pytest.approx(data.std(dtype=np.float64), rel=1e-4)
        assert (other.header.dmin, other.header.dmax) == (data.min(), data.max())
    assert Stack.open(path).pixel_size == 3.54


def test_incomplete_stack_is_not_written(tmp_path):
    with pytest.raises(OutputError, match="only 2 came"), StackWriter(tmp_path / "a.mrcs", 3, (4, 4), 1.0) as writer:
        writer.append(np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="declared with 3"), StackWriter(tmp_path / "a.mrcs", 3, (4, 4), 1.0) as writer:
        writer.append(np.zeros((4, 4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_stack_that_cannot_fit_on_the_disk(tmp_path):
    with pytest.raises(OutputError, match="GB are free"), StackWriter(tmp_path / "a.mrcs", 10**9, (512, 512), 1.0):
        raise AssertionError("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused(tmp_path):
    with pytest.raises(OutputError, match="do not fit float16"):
        write_map(tmp_path / "a.mrc", Map(np.full((4, 4, 4), 1e6, np.float32), 1.0), dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_maps(tmp_path, suffix, pack):
    data = RNG.normal(size=(8, 8, 8)).astype(np.float32)
    write_map(tmp_path / "a.map", Map(data, 2.0))
    packed = tmp_path / f"a.map{suffix}"
    packed.write_bytes(pack((tmp_path / "a.map").read_bytes()))
    np.testing.assert_array_equal(read_map(packed).data_ZYX, data)
    packed.write_bytes(pack((tmp_path / "a.map").read_bytes()[:-40]))
    with pytest.raises(InputError, match="truncated"):
        read_map(packed)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"unpacked|truncated"):
        read_map(packed)


def test_compression_bomb_unpacks_no_more_than_declared(tmp_path):
    write_map(tmp_path / "a.map", Map(np.zeros((8, 8, 8), np.float32), 2.0))
    bomb = tmp_path / "a.map.gz"
    bomb.write_bytes(gzip.compress((tmp_path / "a.map").read_bytes() + bytes(10**8)))
    header, data = read_raw(bomb)
    assert data.nbytes == header.data_bytes == 8**3 * 4
    huge = make_header((2**30, 2**15, 2**15), 2, 1.0, is_stack=False)
    bomb.write_bytes(gzip.compress(huge.tobytes() + bytes(10**6)))
    with pytest.raises(InputError, match="GiB"):
        read_raw(bomb)


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (2, 3, 1), (3, 1, 2)])
def test_stored_axes_are_put_in_order(tmp_path, axes):
    data_ZYX = RNG.normal(size=(2, 3, 4)).astype(np.float32)  # z, y, x
    stored = data_ZYX.transpose([3 - axis for axis in axes[::-1]])  # sections, rows, columns
    intervals = data_ZYX.shape[::-1]
    write_raw_mrc(tmp_path / "a.map", stored, axes=axes, m=intervals, cell=np.array(intervals) * 2.5)
    np.testing.assert_array_equal(read_map(tmp_path / "a.map", cubic=False).data_ZYX, data_ZYX)


def test_origin_from_nstart(tmp_path):
    write_raw_mrc(tmp_path / "a.map", np.zeros((4, 4, 4), np.float32), nstart=(-2, 0, 6))
    assert read_map(tmp_path / "a.map").origin == (-5.0, 0.0, 15.0)


def bad_maps():
    cube = np.ones((4, 4, 4), np.float32)
    with_nan = cube.copy()
    with_nan[1, 2, 3] = np.nan
    return {
        "voxel size 0": (cube, {"pixel": 0}, "voxel size 0; expected a size above 0"),
        "odd": (np.ones((5, 5, 5), np.float32), {}, "odd box of 5"),
        "no cube": (np.ones((4, 4, 6), np.float32), {}, "box of 6 x 4 x 4"),
        "NaN": (with_nan, {}, "1 voxels are not finite"),
        "anisotropic": (cube, {"cell": (4, 4, 5)}, "1.0000 x 1.0000 x 1.2500"),
        "complex": (cube, {"mode": 4}, "mode 4"),
        "negative size": (cube, {"nx": -4}, "not an MRC file"),
        "huge size": (cube, {"nx": 2**20, "ny": 2**30, "nz": 2**30}, "truncated"),
        "negative extended header": (cube, {"nsymbt": -100}, "extended header of -100"),
        "huge extended header": (cube, {"nsymbt": 2**31 - 1}, "truncated"),
    }


@pytest.mark.parametrize("name", bad_maps())
def test_bad_maps_are_named(tmp_path, name):
    data, fields, text = bad_maps()[name]
    write_raw_mrc(tmp_path / "a.mrc", data, **fields)
    with pytest.raises(InputError, match=text):
        read_map(tmp_path / "a.mrc")


def test_pixel_size_can_be_given(tmp_path):
    write_raw_mrc(tmp_path / "a.mrc", np.ones((4, 4, 4), np.float32), pixel=0)
    assert read_map(tmp_path / "a.mrc", pixel_size=1.5).pixel_size == 1.5


def test_files_that_are_no_mrc(tmp_path):
    (tmp_path / "text.mrc").write_text("data_particles\nloop_\n" * 100)
    with pytest.raises(InputError, match="looks like a text file"):
        read_map(tmp_path / "text.mrc")
    (tmp_path / "empty.mrc").write_bytes(b"")
    with pytest.raises(InputError, match="only 0 bytes"):
        read_map(tmp_path / "empty.mrc")
    with pytest.raises(InputError, match="cannot be read"):
        read_map(tmp_path / "missing.mrc")
    with pytest.raises(InputError, match="is a folder"):
        Stack.open(tmp_path)
    (tmp_path / "short.mrcs").write_bytes(make_header((10, 4, 4), 2, 1.0, True).tobytes() + bytes(3 * 64 + 5))
    with pytest.raises(InputError, match="hold 3 sections of 4 x 4"):
        Stack.open(tmp_path / "short.mrcs")


def test_real_maps_as_mrcfile_reads_them(shared):
    for path in sorted((shared / "data/maps").iterdir()):
        np.testing.assert_array_equal(read_map(path).data_ZYX, mrcfile.read(path))
    for path in sorted((shared / "data/betagal_tutorial/Extract/job009/Movies").glob("*.mrcs"))[:2]:
        stack = Stack.open(path)
        assert (stack.mode, stack.box_yx, stack.pixel_size) == (12, (64, 64), 3.54)
        np.testing.assert_array_equal(stack.read(slice(None)), mrcfile.read(path).astype(np.float32))


def test_measured_images_are_written_with_their_statistics(tmp_path):
    data = np.random.default_rng(3).normal(2, 5, (6, 8, 8)).astype(np.float32)
    with StackWriter(tmp_path / "a.mrcs", 6, (8, 8), 2.0, "float16") as stack:
        for part in (data[:4], data[4:]):
            numbers = (float(part.min()), float(part.max()), float(part.sum()), float(np.square(part).sum()))
            stack.append_measured(part.astype(np.float16), numbers)
    with mrcfile.open(tmp_path / "a.mrcs") as file:
        np.testing.assert_array_equal(file.data, data.astype(np.float16))
        found = [float(file.header[name]) for name in ("dmin", "dmax", "dmean", "rms")]
    assert found == pytest.approx([data.min(), data.max(), data.mean(), data.std()], rel=1e-5)
    with (
        pytest.raises(OutputError, match="1e\\+05 do not fit float16"),
        StackWriter(tmp_path / "b.mrcs", 1, (8, 8), 2.0, "float16") as stack,
    ):
        stack.append_measured(np.zeros((1, 8, 8), np.float16), (0.0, 1e5, 1e5, 1e10))
    assert not (tmp_path / "b.mrcs").exists()
