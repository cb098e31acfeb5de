"""STAR files of RELION 3.0, 3.1, 4 and 5: every column and value of what is read can be written again.

Read: any number of blocks, lists and loops, any column order, quoted strings, tabs, padding, comments, CR+LF.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from verglas.errors import InputError
from verglas.io.star_block import StarBlock, Value, kind_of, to_numbers
from verglas.io.star_table import LONGEST_LINE, line_number, read_rows, split_line
from verglas.io.star_write import write_star

_VERSION = re.compile(rb"#\s*version\s+(\d{1,9})\b")


def read_star(path: Path | str) -> dict[str, StarBlock]:
    """All blocks by name, in the order of the file.

    Raises InputError, with the line number, for ragged rows, labels or blocks that occur twice, quotes left open,
    numbers that are none, and files that are no STAR files.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise InputError(path, "is empty", "a STAR file with at least one data_ block", "Write it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                return _Reader(text, path).read()
    except IsADirectoryError:
        raise InputError(path, "is a folder", "a STAR file") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "a STAR file", "Check the path.") from error


class _Reader:
    """Walks over the lines outside of loops; the rows of a loop are handed over as one span of bytes."""

    def __init__(self, text: mmap.mmap, path: Path) -> None:
        self.text, self.path, self.size = text, path, len(text)
        self.position = 3 if text[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark of Windows editors
        self.line_start = 0
        self.version: int | None = None
        self.blocks: dict[str, StarBlock] = {}
        self.block: StarBlock | None = None

    def read(self) -> dict[str, StarBlock]:
        if self.text.find(b"\0") >= 0:
            raise InputError(self.path, "holds binary data", "a STAR file, which is text", "Check that this is the right file.")
        while (line := self._next_line()) is not None:
            self._take(line)
        if not self.blocks:
            raise InputError(self.path, "has no data_ block", "a STAR file", "Check that this is the right file.")
        return self.blocks

    def _next_line(self) -> bytes | None:
        """Next line without surrounding blanks; None at the end."""
        if self.position >= self.size:
            return None
        self.line_start = self.position
        stop = self.text.find(b"\n", self.position)
        stop = self.size if stop < 0 else stop
        self.position = stop + 1
        if stop - self.line_start > LONGEST_LINE:
            raise self._error(f"{stop - self.line_start} characters in one line", "a STAR file", "Is this the right file?")
        return self.text[self.line_start : stop].strip()

    def _take(self, line: bytes) -> None:
        if line.startswith(b"#"):
            match = _VERSION.match(line)
            self.version = int(match[1]) if match else self.version
        elif line.startswith(b"data_"):
            self._open_block(line)
        elif line.split(None, 1)[:1] == [b"loop_"]:
            self._read_loop(line)
        elif line.startswith(b"_"):
            self._read_pair()
        elif line and not line.startswith(b";"):
            start = line[:40].decode("utf-8", "replace")
            raise self._error(f"{start!r} belongs to no loop and no label", "data_, loop_, or a label that begins with _",
                              "Check that this is a STAR file.")

    def _open_block(self, line: bytes) -> None:
        name = self._text(line.split()[0][len(b"data_") :])
        if name in self.blocks:
            raise self._error(f"a second block data_{name}", "every block once", "Rename or remove one of the two.")
        self.block = self.blocks[name] = StarBlock(name, version=self.version)
        self.version = None

    def _read_pair(self) -> None:
        block = self._current_block()
        number = line_number(self.text, self.line_start)
        tokens = split_line(self.text, self.line_start, min(self.position, self.size), number, 2, self.path)
        label = self._text(tokens[0][1:])
        if len(tokens) > 2:
            raise self._error(f"{label} has {len(tokens) - 1} values", "one", "Put double quotes around a text with spaces.")
        if label in block.values or label in block.frame:
            raise self._error(f"label {label} occurs twice", "every label once", "Remove one of the two.")
        block.values[label] = self._value(label, tokens[1] if len(tokens) > 1 else b"")

    def _value(self, label: str, token: bytes) -> Value:
        kind = kind_of(label)
        if kind == "text":
            return self._text(token)
        try:
            return to_numbers([token], kind)[0].item()
        except ValueError:
            raise self._error(f"{label} is {self._text(token[:40])!r}", "a number", "Correct it.") from None

    def _read_loop(self, line: bytes) -> None:
        block = self._current_block()
        if block.is_loop:
            raise self._error(f"a second loop in data_{block.name}", "one loop", "Give the second loop its own data_ line.")
        if len(line.split()) > 1 and not line.split()[1].startswith(b"#"):
            raise self._error("text behind loop_", "loop_ alone on its line", "Put each label on a line of its own.")
        labels = self._labels(block.values)
        start, end = self._body()
        block.is_loop, block.frame = True, read_rows(self.text, (start, end), labels, self.path)
        self.position = end

    def _labels(self, values: dict[str, Value]) -> list[str]:
        """Labels below loop_, none of which may be among `values`; leaves the position behind the last of them."""
        labels: dict[str, None] = {}  # ordered, and quick to ask
        behind = self.position
        while (line := self._next_line()) is not None and (not line or line[:1] in b"_#;"):
            if line.startswith(b"_"):
                label = self._text(line.split()[0][1:])
                if not label:
                    raise self._error("a label without a name", "a name behind the underscore", "Name that column.")
                if label in labels or label in values:
                    raise self._error(f"label {label} occurs twice", "every label once", "Rename or remove one of the two.")
                labels[label] = None
                behind = self.position
        self.position = behind
        if not labels:
            raise self._error("a loop without labels", "at least one label below loop_", "Check the file.")
        return list(labels)

    def _body(self) -> tuple[int, int]:
        """Bytes of the rows: up to the next block or the end, less the blank and comment lines that precede it."""
        start = min(self.position, self.size)
        # The byte before the first row is a newline, so a block may follow at once.
        end = self.text.find(b"\ndata_", max(start - 1, 0))
        end = self.size if end < 0 else max(end, start)
        second = self.text.find(b"\nloop_", max(start - 1, 0), end)
        if second >= 0:
            self.line_start = second + 1
            raise self._error("a second loop in one block", "one loop in a block", "Give the second loop its own data_ line.")
        while True:
            end = self._without_blanks(start, end)
            line_start = max(self.text.rfind(b"\n", start, end) + 1, start)
            if end <= line_start or not self.text[line_start : line_start + 64].lstrip().startswith(b"#"):
                return start, end
            end = line_start

    def _without_blanks(self, start: int, end: int) -> int:
        while end > start:
            piece = self.text[max(start, end - 4096) : end]
            kept = len(piece.rstrip())
            end -= len(piece) - kept
            if kept:
                break
        return end

    def _current_block(self) -> StarBlock:
        if self.block is None:
            raise self._error("stands before the first data_ line", "a block name first", "Check that this is a STAR file.")
        return self.block

    def _text(self, token: bytes) -> str:
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("not UTF-8 text", "a STAR file in UTF-8 or ASCII", "Check that this is the right file.") from None

    def _error(self, found: str, expected: str, fix: str) -> InputError:
        return InputError(self.path, f"line {line_number(self.text, self.line_start)}: {found}", expected, fix)


__all__ = ["StarBlock", "read_star", "write_star"]
