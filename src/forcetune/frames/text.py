"""Text files of any usual encoding and line ending, compressed or not, as lines that end in a line feed."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import IO, Any

from ase.io.formats import open_with_compression

HEAD = 2**16
"""Bytes by which a file is recognised."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; that of UTF-32 begins as that of UTF-16 does."""

_LATIN = "forcetune.latin-1"


def _as_latin(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes that are no UTF-8, as Windows' and older editors wrote accents and Å."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(_LATIN, _as_latin)


def detect_encoding(head: bytes) -> str:
    """The encoding of a text that begins with these bytes: by its byte order mark, or by where its zeros are."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # the first characters of all our formats are ASCII
    if len(head) >= 4 and head[0] and head[2] and not head[1] and not head[3]:
        return "utf-16-le"
    if len(head) >= 4 and head[1] and head[3] and not head[0] and not head[2]:
        return "utf-16-be"
    return "utf-8"


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file, which may be compressed, for reading.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read.
    """
    return decoded(open_with_compression(str(path), "rb"))


def decoded(stream: IO[Any]) -> io.TextIOWrapper:
    """A stream of bytes as text; carriage returns, alone or with a line feed, become line feeds."""
    buffered = io.BufferedReader(stream, HEAD)  # pyright: ignore[reportArgumentType, reportCallIssue]
    encoding = detect_encoding(buffered.peek(4)[:4])
    return io.TextIOWrapper(buffered, encoding=encoding, errors=_LATIN if encoding.startswith("utf-8") else "replace")


def read_head(path: Path) -> str:
    """The beginning of a file as text, whatever it is.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read.
    """
    with open_with_compression(str(path), "rb") as stream:
        head = stream.read(HEAD)
    text = head.decode(detect_encoding(head), errors="replace").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")
