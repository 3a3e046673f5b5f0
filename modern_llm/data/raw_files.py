"""Local files as UTF-8 bytes: decompressed, converted by the byte order mark, refused where the content is of another kind."""

import codecs
import gzip
import io
import tempfile
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
    (b"PK\x03\x04", "a zip archive or a spreadsheet: unpack it, or save it as .csv"),
)
"""First bytes of files that hold no text, and what to do with them."""


def refuse_other_content(path: Path, expected: bytes = b"") -> None:
    """Raise where a file is empty, or begins like a known format that is not the expected one.

    Args:
        path: the file.
        expected: first bytes of the format that its name promises; empty for text.

    Raises:
        UserError: names the format and says what to do.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: has no rows: the file is empty (0 bytes)")
    for magic, message in _OTHER_CONTENT:
        if head.startswith(magic) and magic != expected:
            raise UserError(f"{path}: the file is {message}")


def open_text(path: Path) -> BinaryIO:
    """Open a text file as UTF-8 bytes. UTF-16 and UTF-32 are converted; a byte order mark stays, as that of UTF-8.

    Raises:
        UserError: the file is empty, of another kind, or of an encoding that it does not announce.
        UnicodeDecodeError: it is not of the encoding that it announces.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    refuse_other_content(path, COMPRESSIONS.get(path.suffix, b""))
    file: Any = _decompressed(path)
    head = file.peek(1024)[:1024]
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):  # the mark of the first begins with that of the third
        if head.startswith("\ufeff".encode(encoding)):
            converted: Any = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
            with file:
                converted.writelines(map(str.encode, codecs.iterdecode(iter(lambda: file.read(1 << 20), b""), encoding)))
            converted.seek(0)
            return converted
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
