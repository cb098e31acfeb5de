"""STAR files: what is read is written again value by value, whatever the file looks like."""

import re
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verglas.errors import InputError, OutputError
from verglas.io.star import StarBlock, read_star, write_star
from verglas.io.star_table import _needs_care


def read_text(tmp_path, text):
    path = tmp_path / "in.star"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_star(path)


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].values == b[name].values
        assert a[name].is_loop == b[name].is_loop
        pd.testing.assert_frame_equal(a[name].frame, b[name].frame, check_exact=True)


def rewritten(tmp_path, blocks):
    write_star(tmp_path / "out.star", blocks, overwrite=True)
    return read_star(tmp_path / "out.star")


AWKWARD = """\ufeff# comment before all
# version 30001

data_general

_rlnVoltage      3.0e2
_rlnComment      "two words"   # said here
_rlnOpticsGroup  7
_myOwn           007

data_x
loop_
_rlnDefocusU #9
_myName
_rlnOpticsGroup #1
# a comment among labels
_myNumber #2

1.0e4\t"x y"\t1   007
  -0.000001   'p q'  2.000000  1.50   # a remark
nan z#w 3 +5

# in the middle
12345.678901234567 "it's" 4 #hash
0.1 'say "hi"' 5 ""

# version 50001

data_
loop_
_rlnImageName #1
000001@a.mrcs
000002@data_set/b.mrcs
"""


def test_awkward_file(tmp_path):
    blocks = read_text(tmp_path, AWKWARD)
    assert list(blocks) == ["general", "x", ""]
    assert blocks["general"].values == {"rlnVoltage": 300.0, "rlnComment": "two words", "rlnOpticsGroup": 7, "myOwn": "007"}
    frame = blocks["x"].frame
    assert frame["myName"].tolist() == ["x y", "p q", "z#w", "it's", 'say "hi"']
    assert frame["myNumber"].tolist() == ["007", "1.50", "+5", "#hash", ""]
    assert frame["rlnOpticsGroup"].tolist() == [1, 2, 3, 4, 5]
    assert frame["rlnOpticsGroup"].dtype == np.int64
    np.testing.assert_array_equal(frame["rlnDefocusU"], [1e4, -1e-6, np.nan, 12345.678901234567, 0.1])
    assert (blocks["general"].version, blocks["x"].version, blocks[""].version) == (30001, None, 50001)
    assert_same(blocks, rewritten(tmp_path, blocks))


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: t.rstrip("\n"), lambda t: t.replace(" ", "\t"),
                                    lambda t: t.replace("\n\n", "\n  \n\t\n")])  # fmt: skip
def test_line_ends_tabs_and_blanks_do_not_matter(tmp_path, change):
    plain = "data_a\n\nloop_\n_rlnDefocusU #1\n_rlnImageName #2\n 1.5 a.mrc\n   2.5 b.mrc \n\ndata_b\n\n_rlnVoltage 300\n"
    assert_same(read_text(tmp_path, plain), read_text(tmp_path, change(plain)))


def test_plain_and_exact_reading_agree(tmp_path):
    rng = np.random.default_rng(1)
    rows = [f"{rng.normal() * 10.0 ** rng.integers(-30, 30):.17g} {i} img{i}@a.mrcs {rng.normal():12.6f}" for i in range(3000)]
    head = "data_p\nloop_\n_rlnDefocusU\n_rlnOpticsGroup\n_rlnImageName\n_rlnAngleRot\n"
    plain = read_text(tmp_path, head + "\n".join(rows) + "\n")
    exact = read_text(tmp_path, head + "\n".join([*rows[:1500], "# comment", *rows[1500:]]) + "\n")
    assert_same(plain, exact)
    expected = [float(row.split()[0]) for row in rows]
    np.testing.assert_array_equal(plain["p"].frame["rlnDefocusU"], expected)


@pytest.mark.parametrize("mark", [b'"', b"'", b"\n#", b" #", b"\v", b"\r "])
def test_rows_that_need_care_are_seen(mark):
    assert _needs_care(b"a b\n" + mark + b"c d\n", 0, 8 + len(mark))
    assert not _needs_care(b"a#1 b\r\nc d\r\n", 0, 12)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=12)
floats = st.floats(allow_nan=True) | st.integers(-(10**6), 10**6).map(float)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_table_survives_the_round_trip(tmp_path_factory, data):
    n = data.draw(st.integers(1, 5))
    frame = pd.DataFrame({
        "rlnImageName": pd.Series(data.draw(st.lists(texts, min_size=n, max_size=n)), dtype="str"),
        "rlnDefocusU": data.draw(st.lists(floats, min_size=n, max_size=n)),
        "rlnOpticsGroup": np.array(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)), dtype=np.int64),
        "myOwn": pd.Series(data.draw(st.lists(texts, min_size=n, max_size=n)), dtype="str"),
    })  # fmt: skip
    for label in ("rlnImageName", "myOwn"):
        sayable = ~frame[label].map(lambda t: '"' in t and "'" in t)  # both quotes in one text: STAR cannot always say it
        frame[label] = frame[label].where(sayable, "x")
    folder = tmp_path_factory.mktemp("round")
    blocks = {"p": StarBlock.table("p", frame)}
    assert_same(blocks, rewritten(folder, blocks))


def test_how_a_file_looks(tmp_path):
    frame = pd.DataFrame({"rlnImageName": ["000001@a b.mrcs"], "rlnOpticsGroup": [3], "rlnDefocusU": [0.1]})
    blocks = {"general": StarBlock.pairs("general", {"rlnVoltage": 300.0}), "p": StarBlock.table("p", frame)}
    write_star(tmp_path / "a.star", blocks)
    lines = (tmp_path / "a.star").read_text().splitlines()
    assert lines[1] == "# version 50001"
    assert lines[3] == "data_general"
    assert re.fullmatch(r"_rlnVoltage +300", lines[5])
    start = lines.index("data_p")
    assert lines[start + 2 : start + 6] == ["loop_", "_rlnImageName #1", "_rlnOpticsGroup #2", "_rlnDefocusU #3"]
    assert lines[start + 6] == '"000001@a b.mrcs"            3          0.1'


def test_texts_that_cannot_be_said(tmp_path):
    for text in ("two\nlines", "both \" and ' end'\""):
        with pytest.raises(OutputError, match="cannot be written"):
            write_star(tmp_path / "a.star", {"p": StarBlock.table("p", pd.DataFrame({"a": [text]}))})
    assert list(tmp_path.iterdir()) == []


HEAD = "data_p\n\nloop_\n_rlnDefocusU #1\n_rlnImageName #2\n"
BAD = {
    "short row": (HEAD + "1 a\n2\n3 c\n", "line 7 has 1 values; expected 2"),
    "short row, text missing at the end": (HEAD + "1 a\n2 b\n3\n", "line 8 has 1 values"),
    "long row": (HEAD + "1 a\n2 b c\n", "line 7 has 3 values"),
    "long first row": (HEAD + "1 a b c d\n2 b\n", "line 6 has 5 values"),
    "no number": (HEAD + "1 a\nabc b\n", "line 7: rlnDefocusU is 'abc'; expected a number"),
    "python number": (HEAD + "1_000 a\n", "line 6: rlnDefocusU is '1_000'"),
    "open quote": (HEAD + "1 'a\n", "line 6 opens a quote"),
    "label twice": ("data_p\nloop_\n_rlnA\n_rlnB\n_rlnA\n1 2 3\n", "line 5: label rlnA occurs twice"),
    "value twice": ("data_p\n_rlnA 1\n_rlnA 2\n", "line 3: label rlnA occurs twice"),
    "block twice": ("data_p\n_rlnA 1\n\ndata_p\n_rlnA 2\n", "line 4: a second block data_p"),
    "two loops": ("data_p\nloop_\n_rlnA\n1\n\nloop_\n_rlnB\n2\n", "line 6: a second loop"),
    "loop without labels": ("data_p\nloop_\n1 2\n", "a loop without labels"),
    "no block": ("_rlnA 1\n", "before the first data_"),
    "prose": ("Dear reader,\nthis is a letter.\n", "'Dear reader,' belongs to no loop"),
    "empty": ("", "is empty"),
    "only comments": ("# version 30001\n", "no data_ block"),
    "two values": ("data_p\n_rlnA two words\n", "rlnA has 2 values"),
    "binary": (b"data_p\n\x00\x01\x02", "binary data"),
    "latin-1": (HEAD.encode() + b"1 caf\xe9\n", "line 6 is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_line(tmp_path, name):
    text, message = BAD[name]
    with pytest.raises(InputError, match=re.escape(message)):
        read_text(tmp_path, text)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_star(tmp_path / "no.star")
    with pytest.raises(InputError, match="is a folder"):
        read_star(tmp_path)


def test_whole_numbers_written_with_a_fraction(tmp_path):
    head = "data_p\nloop_\n_rlnOpticsGroup\n_rlnImageName\n"
    assert read_text(tmp_path, head + "1.000000 a\n2.0 b\n")["p"].frame["rlnOpticsGroup"].tolist() == [1, 2]
    kept = read_text(tmp_path, head + "1.5 a\n2 b\n")["p"].frame["rlnOpticsGroup"]
    assert kept.tolist() == [1.5, 2.0]


def test_list_and_loop_in_one_block(tmp_path):
    blocks = read_text(tmp_path, "data_p\n_rlnVoltage 300\n\nloop_\n_rlnImageName\na\nb\n")
    assert blocks["p"].values == {"rlnVoltage": 300.0}
    assert blocks["p"].frame["rlnImageName"].tolist() == ["a", "b"]
    assert_same(blocks, rewritten(tmp_path, blocks))


def test_empty_table(tmp_path):
    blocks = read_text(tmp_path, "data_a\nloop_\n_rlnImageName\n_rlnDefocusU\n\n# version 30001\n\ndata_b\n_rlnVoltage 200\n")
    assert blocks["a"].is_loop and blocks["a"].frame.shape == (0, 2)
    assert blocks["b"].version == 30001
    assert_same(blocks, rewritten(tmp_path, blocks))


def test_float32_columns_are_written_in_float32(tmp_path):
    frame = pd.DataFrame({"rlnDefocusU": np.array([2.95, 0.1, 1e-7], np.float32)})
    write_star(tmp_path / "a.star", {"p": StarBlock.table("p", frame)})
    assert (tmp_path / "a.star").read_text().split()[-3:] == ["2.95", "0.1", "1e-7"]


def tokens_of_rows(path):
    """All rows of all loops as lists of raw tokens: a reader of its own, for files without quotes."""
    rows, inside = [], False
    for line in path.read_text().splitlines():
        if line.startswith(("data_", "#")) or not line.strip():
            inside = inside and not line.startswith("data_")
        elif line.startswith("loop_"):
            inside = True
        elif inside and not line.startswith("_"):
            rows.append(line.split())
    return rows


def test_real_files_keep_every_column_and_value(tmp_path, shared):
    folders = ("star_cs_variants", "betagal_tutorial", "betagal_relion_refine")
    paths = [path for folder in folders for path in sorted((shared / "data" / folder).rglob("*.star"))]
    assert len(paths) > 30
    for path in paths:
        blocks = read_star(path)
        again = rewritten(tmp_path, blocks)
        assert_same(blocks, again)
        for old, new in zip(tokens_of_rows(path), tokens_of_rows(tmp_path / "out.star"), strict=True):
            assert len(old) == len(new)
            assert all(a == b or float(a) == float(b) or a.lstrip("-") == b == "nan" for a, b in zip(old, new))


REAL_NAMES = """CoordinateX CoordinateY DefocusU DefocusV DefocusAngle AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst
NormCorrection PhaseShift CtfBfactor CtfScalefactor CtfMaxResolution CtfFigureOfMerit MaxValueProbDistribution
LogLikeliContribution"""


def cpu_seconds(action):
    """Seconds of computing: other programs on a busy machine do not count."""
    started, wall = time.process_time(), time.perf_counter()
    action()
    seconds = time.process_time() - started
    print(f"\n{seconds:.1f} s of computing, {time.perf_counter() - wall:.1f} s by the clock")
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["single spaces", "padded"])
def test_a_million_rows(tmp_path, padded):
    rng = np.random.default_rng(0)
    real = [f"rln{name}" for name in REAL_NAMES.split()]
    whole = ["rlnOpticsGroup", "rlnClassNumber", "rlnRandomSubset", "rlnGroupNumber", "rlnNrOfSignificantSamples"]
    n = 1_000_000
    columns = {label: np.round(rng.normal(0, 100, n), 6) for label in real} | {label: rng.integers(1, 500, n) for label in whole}
    frame = pd.DataFrame(columns)
    frame["rlnImageName"] = pd.Series([f"{i % 200:06d}@Extract/job009/mic_{i // 200:05d}.mrcs" for i in range(n)], dtype="str")
    frame["rlnMicrographName"] = pd.Series([f"MotionCorr/job002/mic_{i // 200:05d}.mrc" for i in range(n)], dtype="str")
    assert frame.shape == (n, 25)
    path = tmp_path / "large.star"
    write_seconds = cpu_seconds(lambda: write_star(path, {"particles": StarBlock.table("particles", frame)}))
    if not padded:
        text = re.sub(rb"(?m)^ +", b"", re.sub(rb" +", b" ", path.read_bytes()))
        path.write_bytes(text)
        del text
    again = {}
    read_seconds = cpu_seconds(lambda: again.update(read_star(path)))
    again = again["particles"].frame
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert read_seconds <= 10
    assert write_seconds <= 15
