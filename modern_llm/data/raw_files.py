"""Local files as UTF-8 bytes: decompressed, converted by the byte order mark, refused where the content is of another kind."""

import codecs
import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from modern_llm.config import UserError

GZIP, ZSTANDARD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
COMPRESSIONS = {".gz": GZIP, ".zst": ZSTANDARD}
"""Endings of compressed files, and the first bytes of each."""

_OTHER_CONTENT = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull` where it was cloned"),
    (PARQUET, "a parquet file: rename it to end in .parquet"),
    (GZIP, "compressed with gzip: add .gz to its name"),
    (ZSTANDARD, "compressed with zstd: add .zst to its name"),
    (b"BZh91AY&SY", "compressed with bzip2: decompress it"),
    (b"\xfd7zXZ\x00", "compressed with xz: decompress it"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet: unpack it, or save it as .csv"),
    (b"ARROW1", "an Arrow file: give the folder that save_to_disk of datasets wrote"),
    (b"%PDF-", "a PDF: save its text as .txt"),
)
"""First bytes of files that hold no text, and what to do with them."""

_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def refuse_other_content(path: Path, expected: bytes = b"", head: bytes | None = None) -> None:
    """Raise where a file's first bytes are those of a known format that is not the expected one.

    Args:
        path: the file.
        expected: first bytes of the format that its name promises; empty for text.
        head: first bytes of the decompressed content. None: the file's own are read.

    Raises:
        UserError: names the format and says what to do.
        OSError: the file cannot be read.
    """
    if head is None:
        with path.open("rb") as file:
            head = file.read(64)
    for magic, message in _OTHER_CONTENT:
        if head.startswith(magic) and magic != expected:
            raise UserError(f"{path}: the file is {message}")


def open_text(path: Path) -> BinaryIO:
    """Open a text file as UTF-8 bytes. UTF-16 and UTF-32 are converted; the mark of UTF-8 itself stays.

    Raises:
        UserError: the file is of another kind, or of an encoding that it does not announce.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    refuse_other_content(path, COMPRESSIONS.get(path.suffix, b""))
    file: Any = _decompressed(path)
    head = file.peek(1024)[:1024]
    refuse_other_content(path, head=head)
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return io.BufferedReader(_AsUtf8(file, encoding), 1 << 20)  # type: ignore[arg-type]
    if 4 * head.count(0) > len(head):
        raise UserError(f"{path}: not UTF-8 but zero bytes, as in UTF-16 without a byte order mark: save it as UTF-8")
    return file


def _decompressed(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(_Zstandard(pyarrow.input_stream(str(path), compression="zstd")), 1 << 20)  # type: ignore[arg-type]
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """pyarrow's decompressor as a raw file. (`readinto` of its own streams copies twice, and `io` needs `readable`.)"""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _AsUtf8(io.RawIOBase):
    """Text of another encoding as UTF-8 bytes. Reading raises UnicodeDecodeError where the text is not of that encoding."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.text, self.rest = io.TextIOWrapper(file, encoding, newline=""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = self.text.read(1 << 16).encode()
        data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
