"""From what `data.train_file` and its like name to files, and from a file to its bytes and texts."""

import glob
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.errors import DataError

Files = str | Path | Sequence[str]

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
HUB = "hf://"
FILE_OPTIONS = ("train_file", "val_file", "test_file", "predict_file")  # of a data module
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# byte order marks; the longer ones first, as that of UTF-32 begins with that of UTF-16
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# first bytes of files that are no text, and what to do with them
_NO_TEXT = {
    b"\x1f\x8b": "is compressed with gzip: add .gz to its name",
    b"BZh": "is compressed with bzip2: add .bz2 to its name",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: add .zst to its name",
    b"PAR1": "is a Parquet file: name it .parquet, or set data.table.format to parquet",
    b"PK\x03\x04": "is a zip archive or an Excel file: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "is an old Excel file: save it as CSV",
}
_SAMPLE_BYTES = 4096
# encodings that are common where a file is no Unicode, of different scripts, for the proposals of a message
_PROPOSED = ("cp1252", "cp1250", "cp1251", "shift_jis", "gb18030", "euc_kr")


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub: `hf://owner/name[/config][@revision][:split]`."""

    name: str
    config: str | None
    revision: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Raises `DataError` for another form."""
        form = r"hf://([^/:@]+/[^/:@]+)(?:/([^:@]+))?(?:@([^:]+))?(?::(.+))?"
        found = re.fullmatch(form, text)
        if found is None:
            raise DataError(
                f"{text}: expected hf://owner/name[/config][@revision][:split], as in hf://nyu-mll/glue/rte:train"
            )
        name, config, revision, split = found.groups()
        return cls(name, config, revision, split or "train")


def expand_files(files: Files) -> list[str]:
    """The files that one name, pattern or several of them stand for.

    Args:
        files: a path, a pattern such as `parts/*.csv`, the name of a data set on the hub, or a list of them.

    Returns:
        Paths and names of data sets; those of a pattern in sorted order.

    Raises:
        DataError: nothing is named, a pattern fits no file, or a file does not exist or is named twice.
    """
    names = [str(files)] if isinstance(files, str | Path) else list(files)
    if not names:
        raise DataError("expected the name of a data file, got an empty list")
    found: list[str] = []
    for name in names:
        if not name:
            raise DataError("expected the name of a data file, got nothing. Leave it out where there is none")
        if _URL.match(name) and not name.startswith(HUB):
            raise DataError(f"{name} is a URL, which can't be read. Download the file first, and name it here")
        path = Path(name).expanduser()
        if name.startswith(HUB):
            found.append(name)
        elif glob.has_magic(name) and not _exists(path):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"{name}: no file has a name of this form")
            found += matches
        elif not _exists(path):
            raise DataError(f"{path} does not exist")
        else:
            found.append(str(path))
    places: dict[str, str] = {}
    for name in found:
        place = name if name.startswith(HUB) else str(Path(name).resolve())
        if place in places:
            raise DataError(f"data file {name} is named twice ({places[place]}): name it once")
        places[place] = name
    return found


def _exists(path: Path) -> bool:
    """Whether there is a file or folder; `DataError` where there can't be one, and for pipes and devices."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is a pipe or a device, which can be read only once: write it to a file first")
        return path.exists()
    except (OSError, ValueError) as error:  # too long, or a character that no name can have
        raise DataError(f"{str(path)[:100]}... can't be the name of a file: {error.__class__.__name__}") from error


def format_of(path: Path, config: TableConfig) -> str:
    """The format that is set, or that of the ending: a key of `ENDINGS`' values, or dataset for a folder.

    Raises:
        DataError: the ending is unknown, or a folder holds no data set.
    """
    if path.is_dir():
        if config.format in ("auto", "dataset") and is_dataset(path):
            return "dataset"
        raise DataError(
            f"data file {path} is a folder, and no data set that Hugging Face's datasets has saved: name the files in "
            f"it, such as '{path}/*.csv'"
        )
    if config.format != "auto":
        return config.format
    ending = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    kind = ENDINGS.get(ending.lower())
    if kind is None:
        raise DataError(
            f"data file {path} has an unknown ending; known are {', '.join(ENDINGS)}, each also with "
            f"{', '.join(COMPRESSED)}. Rename it, or set data.table.format to csv, tsv, json, jsonl or parquet"
        )
    return kind


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` has saved a data set, or several splits of one, into a folder."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, decompressed.

    Raises:
        OSError: it can't be opened; reading a damaged compressed file raises it as well.
    """
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow as pa  # only here, as a command that finds no file must not wait for it

    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """The text of a file, whose line ends are kept as they are."""
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="")


def encoding_of(path: Path, config: TableConfig) -> str:
    """The encoding that is set, else by the first bytes: UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        DataError: it can't be read, or is no text.
    """
    try:
        with open_bytes(path) as file:
            start = file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    for mark, words in _NO_TEXT.items():
        if start.startswith(mark):
            raise DataError(f"data file {path} {words}")
    marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
    if config.encoding is not None:
        plain = config.encoding.lower().replace("_", "-") in ("utf-8", "utf8")
        return "utf-8-sig" if plain and marked == "utf-8-sig" else config.encoding
    if marked is not None:
        return marked
    # texts of Latin letters in UTF-16 have a zero in every second byte, which no other text has
    even, odd = start[0::2], start[1::2]
    for zeros, others, encoding in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if len(zeros) > 1 and zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.1 * len(others):
            return encoding
    return "utf-8"


@contextmanager
def reading(path: Path, encoding: str) -> Iterator[None]:
    """A context that turns the errors of a file's bytes and of its encoding into `DataError`."""
    try:
        yield
    except UnicodeError as error:
        raise undecodable(path, encoding, error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system can't read, or that is not compressed as its ending says."""
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None or error.errno is not None:
        return DataError(f"data file {path} can't be read: {error}")
    return DataError(
        f"data file {path} can't be read as {compression} ({error}): it is cut short, or not compressed so. Compress "
        "it again, or correct its ending"
    )


def undecodable(path: Path, encoding: str, error: UnicodeError) -> DataError:
    """The error for a file that is not in this encoding, with the line, and with encodings that it may be in."""
    try:
        number, line = _first_undecodable_line(path, encoding)
    except UnicodeError:  # an encoding in which the rest can't be read
        return DataError(
            f"{path} is not valid {_shown(encoding)} ({error}). Set data.table.encoding to that of the file"
        )
    proposals = []
    for other in _PROPOSED if line else ():
        try:
            proposals.append(f"{other}: {line.decode(other).strip()[:60]!r}")
        except UnicodeError:
            continue
    read = f"; as {', '.join(proposals[:4])}" if proposals else ""
    return DataError(
        f"{path}: line {number} is not valid {_shown(encoding)}{read}. Set data.table.encoding to that of the file, or "
        "save it as UTF-8"
    )


def _first_undecodable_line(path: Path, encoding: str) -> tuple[int, bytes]:
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))  # which have no bytes to escape
    with io.TextIOWrapper(open_bytes(path), encoding, "replace" if wide else "surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if wide and "\ufffd" in line:
                return number, b""
            if any("\udc80" <= char <= "\udcff" for char in line):
                return number, line.encode(encoding, "surrogateescape")
    raise UnicodeError("no such line")


def _shown(encoding: str) -> str:
    return encoding.removesuffix("-sig").upper()
