"""How files of rows are read."""

import codecs
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_bge.errors import ConfigError

Format = Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "dataset"]
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}  # those that are found by themselves


@dataclass(frozen=True)
class TableConfig:
    r"""How files are read.

    Args:
        format: file format; auto: by the ending (.csv, .tsv and .txt, .jsonl and .ndjson, .json, .parquet), under .gz,
            .bz2 or .zst too; a folder is a data set that Hugging Face's `datasets` has saved.
        delimiter: one character between the fields of CSV or TSV, `\t` for a tab. Unset: the one of comma, tab,
            semicolon and vertical bar with which the first line has all columns that are asked for.
        encoding: of CSV, TSV and JSON files, by Python's names (utf-8, cp1252, shift_jis ...). Unset: UTF-8, or UTF-16
            or UTF-32 where the file begins so. A file that is none of these is refused, as others can't be told apart.
        quoting: whether a double quote encloses a field of CSV or TSV. Unset: CSV yes; TSV where its quotes are those
            that a program writes, as the TSV files of public data sets contain unpaired ones.
        escape: the character before a quote that is part of an enclosed text, such as `\`. Unset: a quote is doubled.
        max_rows: read only the first rows of the training file, for a quick trial. Unset: all rows.
        labels: label names in the order of the model's outputs (binary: the negative one first), as they stand in the
            file. Unset: found in the training file and sorted.
        label_separator: separates several labels in one cell (multi-label tasks), such as `;` or `\t` for a tab.
            Unset: `|`, and cells that another character seems to separate are refused; `|` itself says that each of
            them is one label.
    """

    format: Format = "auto"
    delimiter: str | None = None
    encoding: str | None = None
    quoting: bool | None = None
    escape: str | None = None
    max_rows: int | None = None
    labels: tuple[str, ...] | None = None
    label_separator: str | None = None

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ConfigError(f"data.table.format: expected {', '.join(get_args(Format))}, got {self.format!r}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"data.table.max_rows: expected 1 or more, or null, got {self.max_rows}")
        if self.label_separator == "":
            raise ConfigError("data.table.label_separator: expected one or more characters, or null for |, got none")
        if self.label_separator in (r"\t", r"\n"):  # as they are typed on a command line
            object.__setattr__(self, "label_separator", {r"\t": "\t", r"\n": "\n"}[self.label_separator])
        self._check_delimiter()
        if self.encoding is not None:
            _check_encoding(self.encoding)
        if self.labels is not None:
            # lists come from YAML; a tuple makes the configuration hashable
            object.__setattr__(self, "labels", tuple(_label(name) for name in self.labels))

    def _check_delimiter(self) -> None:
        if self.delimiter in (r"\t", "tab"):
            object.__setattr__(self, "delimiter", "\t")
        for name in ("delimiter", "escape"):
            value = getattr(self, name)
            if value is not None and (len(value) != 1 or value in '"\r\n\0'):
                raise ConfigError(
                    rf"data.table.{name}: expected one character (\t for a tab), no quote or line end, got {value!r}"
                )
        if self.escape is not None and self.escape == self.delimiter:
            raise ConfigError(f"data.table.escape: expected another character than the delimiter, got {self.escape!r}")


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
        "text".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ConfigError(
            f"data.table.encoding: expected the name of a text encoding of Python, such as utf-8, cp1252, utf-16 or "
            f"shift_jis, got {encoding!r}"
        ) from error


def _label(name: object) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConfigError(f"data.table.labels: expected the names as texts, got {name!r}; put quotes around it")
    return str(name)
