"""Damaged files: the readers raise VerglasError or return, nothing else; no hang, no memory beyond the file's own size.

The quick tests run a few hundred mutated files; `-m slow` runs 10,000.
"""

import bz2
import gzip
import io
import resource
import struct
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verglas.errors import VerglasError
from verglas.io.cryosparc import read_cs
from verglas.io.describe import describe
from verglas.io.mrc import Stack, read_map
from verglas.io.mrc_header import make_header
from verglas.io.star import read_star, write_star

STAR = b"""# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
           1 "optics one"     300.000000
           2 'optics two'     200.000000

# version 30001

data_general
_rlnVoltage 300
_rlnComment "a b" # c

data_particles

loop_
_rlnImageName #1
_rlnDefocusU #2
_rlnAngleRot #3
_rlnOpticsGroup #4
_myOwn #5
""" + b"".join(b"%06d@stack.mrcs %12.6f %12.6e  %d z#%d\n" % (i, 1e4 + i, -1.5 * i, 1 + i % 2, i) for i in range(30))


def mrc_bytes(n=6, order="<"):
    header = make_header((n, 8, 8), 2, 1.5, is_stack=False)
    data = np.arange(n * 64, dtype=np.float32)
    if order == ">":
        header, data = header.astype(header.dtype.newbyteorder(">")), data.astype(">f4")
    return header.tobytes() + data.tobytes()


CS_FIELDS = [
    ("uid", "<u8"), ("blob/path", "S30"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)), ("blob/psize_A", "<f4"),
    ("ctf/exp_group_id", "<u4"), ("ctf/cs_mm", "<f4"), ("ctf/tilt_A", "<f4", (2,)), ("ctf/type", "U5"),
    ("alignments3D/pose", "<f4", (3,)), ("alignments3D/shift", "<f4", (2,)), ("alignments3D/split", "<u4"),
    ("alignments3D/class", "<u4"), ("location/micrograph_path", "S20"), ("location/micrograph_shape", "<u4", (2,)),
    ("location/center_x_frac", "<f4"), ("location/center_y_frac", "<f4"),
]  # fmt: skip


def cs_bytes(n=20):
    rows = np.zeros(n, CS_FIELDS)
    rows["uid"], rows["blob/path"], rows["blob/idx"], rows["ctf/cs_mm"] = np.arange(n), b"J1/a.mrc", np.arange(n), 2.7
    rows["alignments3D/pose"] = np.linspace(-3, 3, 3 * n).reshape(n, 3)
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


SEEDS = {
    ".star": [STAR, STAR.replace(b"\n", b"\r\n"), b"data_\nloop_\n_a\n1\n"],
    ".mrc": [mrc_bytes(8), mrc_bytes(8, ">"), mrc_bytes(1)],
    ".mrcs": [mrc_bytes(6), mrc_bytes(6, ">")],
    ".map.gz": [gzip.compress(mrc_bytes(8))],
    ".map.bz2": [bz2.compress(mrc_bytes(8))],
    ".cs": [cs_bytes(), cs_bytes(1)],
}
PIECES = [
    b"", b"\0", b"\n", b"\r", b"'", b'"', b"#", b" ", b"\xff\xfe", b"\x85", b"nan", b"1e999", b"-1", b"99999999999", b"9" * 400,
    b"data_", b"\ndata_x\n", b"\nloop_\n", b"\n_rlnDefocusU\n", b"\n" * 50, b'"a ' * 200,
    b"(" * 300, b"[" * 300, b"{'descr'", b"|O", b"<c8", b"<M8", b"<f2",
    *(struct.pack(order + "i", number) for order in "<>" for number in (2**31 - 1, -1, 2**20, 12)),
    struct.pack("<f", float("nan")), struct.pack("<f", float("inf")),
]  # fmt: skip
KINDS = ["flip", "cut", "insert", "replace", "repeat", "truncate"]
change = st.tuples(
    st.sampled_from(KINDS),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 64),
    st.sampled_from(PIECES) | st.binary(max_size=16),
)


def mutate(data, changes):
    for kind, where, count, piece in changes:
        at = int(where * len(data))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << count % 8)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + count :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + count] * 20 + data[at:]
        elif kind == "truncate" and count % 4 == 0:
            data = data[:at]
    return data


@st.composite
def mutated_files(draw):
    """(suffix, bytes): half of the changes of binary files fall into the header, where the sizes are."""
    suffix = draw(st.sampled_from(sorted(SEEDS)))
    data = draw(st.sampled_from(SEEDS[suffix]))
    changes = draw(st.lists(change, min_size=1, max_size=5))
    if suffix in (".mrc", ".mrcs", ".cs") and draw(st.booleans()):
        header = min(256 if suffix != ".cs" else 900, len(data))
        return suffix, mutate(data[:header], changes) + data[header:]
    return suffix, mutate(data, changes)


def read_all(path, suffix):
    """Everything that verglas can do to such a file."""
    if suffix == ".star":
        write_star(path.with_name("again.star"), read_star(path), overwrite=True)
    elif suffix == ".cs":
        write_star(path.with_name("again.star"), read_cs(path).blocks(), overwrite=True)
    elif suffix == ".mrcs":
        stack = Stack.open(path)
        stack.read(slice(None))
    else:
        read_map(path, cubic=False)
    describe(path)


def peak_memory():
    """Bytes; macOS counts in bytes, Linux in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_one(folder, suffix, data):
    path = folder / f"fuzz{suffix}"
    path.write_bytes(data)
    before, started = peak_memory(), time.perf_counter()
    for action in (lambda: read_all(path, suffix), lambda: describe(path)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
        except VerglasError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
    assert time.perf_counter() - started < 20, "hangs"
    assert peak_memory() - before < 200e6, "takes too much memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for suffix, seeds in SEEDS.items():  # the seeds are sound, and modules are loaded before memory is measured
        (folder / f"seed{suffix}").write_bytes(seeds[0])
        read_all(folder / f"seed{suffix}", suffix)
    return folder


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(file=mutated_files())
def test_three_hundred_damaged_files(folder, file):
    check_one(folder, *file)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=QUIET)
@given(file=mutated_files())
def test_ten_thousand_damaged_files(folder, file):
    check_one(folder, *file)
