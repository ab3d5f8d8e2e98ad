"""Rows of Parquet files and of data sets of Hugging Face's `datasets`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_bge.data.tables.files import HUB, HubDataset
from lightning_bge.data.tables.rows import Columns, check_names
from lightning_bge.errors import ConfigError, DataError


class ParquetFile:
    """A Parquet file.

    Attributes:
        columns: their names.
        types: Arrow's type of each column.
        form: the format, for a message.

    Raises:
        DataError: it is not a Parquet file.
    """

    form = "Parquet"

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._file = pq.ParquetFile(path)
        self.columns: list[str] = self._file.schema_arrow.names
        self.types = dict(zip(self.columns, self._file.schema_arrow.types, strict=True))

    def rows(self, names: Sequence[str], chunk: int) -> Iterator[Columns]:
        """The columns of at most `chunk` rows after the other."""
        check_names(names, self.columns, self.path, self.form, "It names them itself")
        with self._errors():
            for batch in self._file.iter_batches(chunk, columns=list(dict.fromkeys(names))):
                yield {name: _values(batch.column(name)) for name in names}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:  # the last: nanoseconds without pandas
            raise DataError(f"data file {self.path} can't be read as Parquet: {error}") from error


class HFDataset:
    """A data set of `datasets`: a folder in which it was saved, or one of the hub.

    Labels that have names (`ClassLabel`) are read as these names.

    Args:
        source: the folder, or `hf://owner/name[/config][@revision][:split]`.

    Attributes:
        columns: their names.
        form: the format, for a message.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: it can't be loaded, or has several splits of which none is named.
    """

    def __init__(self, source: str) -> None:
        self.path = source
        self._data = _load(source)
        self.columns: list[str] = self._data.column_names
        self.form = "a data set of Hugging Face"

    def rows(self, names: Sequence[str], chunk: int) -> Iterator[Columns]:
        """The columns of at most `chunk` rows after the other."""
        check_names(names, self.columns, self.path, self.form, "It names them itself")
        data = self._data.select_columns(list(dict.fromkeys(names))).with_format("arrow")
        try:
            for table in data.iter(chunk):
                yield {name: self._named(name, _values(table.column(name))) for name in names}
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"data set {self.path} can't be read: {error}") from error

    def _named(self, name: str, values: list[Any]) -> list[Any]:
        feature = self._data.features[name]
        inner = getattr(feature, "feature", None)  # of a list
        classes = getattr(feature if inner is None else inner, "names", None)
        if classes is None:
            return values

        def named(value: Any) -> Any:
            if isinstance(value, list):
                return [named(one) for one in value]
            return None if value is None or value < 0 else classes[value]  # -1: it has no label

        return [named(value) for value in values]


def _load(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source}: reading a data set of Hugging Face needs a package: pip install 'lightning-bge[datasets]'"
        ) from error
    try:
        if source.startswith(HUB):
            hub = HubDataset.parse(source)
            return datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
        found = datasets.load_from_disk(source)
    except DataError:
        raise
    except Exception as error:  # datasets and its file systems raise many types
        text = " ".join(str(error).split())[:300]
        raise DataError(f"data set {source} can't be loaded ({type(error).__name__}: {text})") from error
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"data set {source} has several splits: name one, as in {source}/{next(iter(found))}")
    return found


def _values(column: Any) -> list[Any]:
    """As Python objects; NaN is a missing value."""
    values = column.to_pylist()
    if pa.types.is_floating(column.type):
        return [None if value is None or math.isnan(value) else value for value in values]
    return values
