"""Rows of CSV, Parquet, Arrow files, `save_to_disk` folders and hub datasets, as (line, JSON text, object)."""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import io
import json
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from keepset.data.jsonfiles import RawRow
from keepset.data.jsontext import MAX_DEPTH, check_escapes, depth
from keepset.data.reasons import FileRefused, Quarantined, RowProblem, excerpt
from keepset.data.streams import MAX_ROW, StreamDamaged, skip_bom

_BATCH = 2048


def _plain(value: Any) -> Any:
    """Give JSON a word for what Arrow knows and JSON doesn't (Parquet is written from the file's own rows)."""
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (decimal.Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def object_row(line: int, row: dict[str, Any], file: str) -> RawRow | Quarantined:
    """Turn one record of a table into a raw row, with the same checks a JSON line gets."""
    text = ""
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        if len(text) > MAX_ROW:
            raise RowProblem("line-too-long", f"the row is larger than {MAX_ROW >> 20} MiB")
        if "\\u0000" in text:
            check_escapes(text, row)
        if text.count("[") + text.count("{") > MAX_DEPTH and depth(row) > MAX_DEPTH:
            raise RowProblem("too-deep", f"nested more than {MAX_DEPTH} levels")
    except RowProblem as bad:
        return Quarantined(file, line, bad.reason, bad.detail, excerpt(text))
    except (TypeError, ValueError, RecursionError) as error:
        return Quarantined(file, line, "wrong-type", f"the row has no JSON form: {error}", excerpt(repr(row)[:400]))
    return line, text, row


# ------------------------------------------------------------------------------------------------------------ CSV


def read_csv(stream: io.BufferedReader, file: str) -> Iterator[RawRow | Quarantined]:
    """Yield the rows of a CSV (or, named .tsv, tab-separated) file with a header line; `line` is where a row starts.

    Every cell is text; chats in it are JSON, which the dialects read.

    A first column without a name (pandas' index) is kept under the name it has, which is empty.

    Raises:
        FileRefused: no header, a header with empty or repeated names, or one that another separator divides.
    """
    skip_bom(stream)
    csv.field_size_limit(MAX_ROW)
    # surrogateescape keeps one bad byte from costing the whole file: the row that holds it is quarantined
    lines = _Lines(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=""))
    separator = "\t" if ".tsv" in file.lower() else ","
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        lines.row_starts, lines.marked = True, False
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield Quarantined(file, line, "csv-quotes", f"{error}", "")
            continue
        except StreamDamaged as error:
            yield Quarantined(file, line, "truncated-archive", str(error), "")
            return
        if not cells:
            continue
        if header is None:
            header = cells
            problem = _header_problem(cells, separator)
            if problem:
                raise FileRefused(file, "no-header", problem, line=line)
            continue
        if lines.marked:
            if cells != header:
                detail = "a byte-order mark and other columns stand here: files were put together; give each by itself"
                raise FileRefused(file, "no-header", detail, line=line)
            continue  # the same header again
        yield _csv_row(file, line, header, cells)
    if header is None:
        raise FileRefused(file, "empty-file", "the file holds no rows")


class _Lines:
    """Lines of a CSV file; a byte-order mark where a row starts is taken off and noted (files put together)."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.row_starts, self.marked = lines, False, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        if self.row_starts and line.startswith("\ufeff"):
            line, self.marked = line.lstrip("\ufeff"), True
        self.row_starts = False
        return line


def _header_problem(cells: list[str], separator: str) -> str | None:
    """Say what is wrong with a header line, and what to do."""
    if any("\udc80" <= c <= "\udcff" or c == "\0" for c in "".join(cells)):
        return "the header line holds bytes that are not UTF-8, or NUL"
    if cells[0].lower().startswith("sep="):
        return "the first line is Excel's `sep=`: take it out (and divide the columns by a comma)"
    unnamed = [k for k, c in enumerate(cells) if not c.strip()]
    if unnamed and unnamed != [0]:
        places = ", ".join(str(k + 1) for k in unnamed)
        remedy = "name them in the header line, or leave them out (pandas' index: to_csv(..., index=False))"
        return f"of {len(cells)} columns those at {places} have no name: {remedy}"
    repeated = next((c for c in cells if cells.count(c) > 1), None)
    if repeated is not None:
        return f"two columns are named '{repeated[:40]}'; rename one in the header line"
    if len(cells) > 1:
        return None
    other = next((c for c in ("\t", ";", ",", "|") if c != separator and c in cells[0]), None)
    if other is None:
        return None
    shown, ours = ("a tab" if c == "\t" else f"'{c}'" for c in (other, separator))
    remedy = "name the file .tsv" if other == "\t" else "name the file .csv" if other == "," else "write it anew"
    return f"the columns are divided by {shown}, not by {ours}: {remedy}, or: {_convert(other, separator)}"


def _convert(other: str, separator: str) -> str:
    return f"pandas.read_csv(OLD, sep={other!r}).to_csv(NEW, sep={separator!r}, index=False)"


def _csv_row(file: str, line: int, header: list[str], cells: list[str]) -> RawRow | Quarantined:
    whole = ",".join(cells)
    if len(cells) != len(header):
        detail = f"{len(cells)} fields where the header has {len(header)}"
        return Quarantined(file, line, "csv-columns", detail, excerpt(whole))
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(whole[error.start]) - 0xDC00
        detail = f"byte 0x{code:02x} is not UTF-8"
        shown = whole.encode("utf-8", "replace")
        return Quarantined(file, line, "invalid-utf8", detail, excerpt(shown))
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    text = json.dumps(row, ensure_ascii=False)
    if "\0" in whole:
        return Quarantined(file, line, "nul-character", "a cell holds NUL", excerpt(whole))
    if len(text) > MAX_ROW:
        return Quarantined(file, line, "line-too-long", f"the row is larger than {MAX_ROW >> 20} MiB", excerpt(whole))
    return line, text, row


# ------------------------------------------------------------------------------------------------ Parquet and Arrow


def _said(kind: pa.DataType, as_text: Callable[[pa.DataType], bool]) -> pa.DataType:
    """Return the type with text in place of those that `as_text` picks, at any depth."""
    said = partial(_said, as_text=as_text)
    if as_text(kind) or (pa.types.is_dictionary(kind) and as_text(kind.value_type)):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(said(f.type)) for f in kind])
    if pa.types.is_map(kind):
        return pa.map_(said(kind.key_type), said(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(said(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(said(kind.value_type))
    return kind


def _as_text(batch: pa.RecordBatch, as_text: Callable[[pa.DataType], bool]) -> pa.RecordBatch:
    """Cast what `as_text` picks to text; Arrow writes every time it can hold, where Python's types are narrower."""
    schema = pa.schema([field.with_type(_said(field.type, as_text)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def _nanoseconds(kind: pa.DataType) -> bool:
    return pa.types.is_time64(kind) and kind.unit == "ns"  # datetime.time would cut it to microseconds


def batch_rows(batch: pa.RecordBatch, line: int, file: str) -> Iterator[RawRow | Quarantined]:
    """Yield an Arrow batch's rows; `line` is the first one's number in the file."""
    try:
        batch = _as_text(batch, _nanoseconds)
        records = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException):
        for k in range(batch.num_rows):
            try:
                record = _record(batch.slice(k, 1))
            except UnicodeDecodeError:
                yield Quarantined(file, line + k, "invalid-utf8", "a string column holds bytes that are not UTF-8", "")
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield Quarantined(file, line + k, "wrong-type", f"a value can't be read: {_one_line(error)}", "")
            else:
                yield object_row(line + k, record, file)
        return
    for k, record in enumerate(records):
        yield object_row(line + k, record, file)


def _record(row: pa.RecordBatch) -> dict[str, Any]:
    records: list[dict[str, Any]]
    try:
        records = _as_text(row, _nanoseconds).to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):  # a year that Python doesn't know, or nanoseconds without pandas
        records = _as_text(row, pa.types.is_temporal).to_pylist()
    return records[0]


def _schema_names(schema: pa.Schema, file: str) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise FileRefused(file, "unknown-dialect", "two columns have the same name")


#: Opens a container's rows as Arrow batches, as often as it is called.
Batches = Callable[[], Iterator[pa.RecordBatch]]


def table_rows(batches: Batches, file: str) -> Iterator[RawRow | Quarantined]:
    """Yield the rows of an Arrow container; `line` is the row's number in the file, from 1."""
    line = 1
    for batch in batches():
        yield from batch_rows(batch, line, file)
        line += batch.num_rows


def open_parquet(path: str) -> tuple[pa.Schema, Batches]:
    """Open a Parquet file: its schema, and its rows in batches.

    Raises:
        FileRefused: `corrupt-parquet`, also while the batches are read.
    """
    try:
        with pq.ParquetFile(path) as source:
            schema, n_rows = source.schema_arrow, source.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(path, "corrupt-parquet", f"not readable as Parquet: {_one_line(error)}") from None
    _schema_names(schema, path)

    def batches() -> Iterator[pa.RecordBatch]:
        line = 1
        try:
            with pq.ParquetFile(path) as source:
                for batch in source.iter_batches(batch_size=_BATCH):
                    yield batch
                    line += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            detail = f"{n_rows - line + 1} rows from row {line} on can't be read: {_one_line(error)}"
            raise FileRefused(path, "corrupt-parquet", detail, line=line) from None

    return schema, batches


def _ipc(path: str) -> Any:
    source = pa.memory_map(path)
    head = source.read(6)
    source.seek(0)
    return pa.ipc.open_file(source) if head == b"ARROW1" else pa.ipc.open_stream(source)


def open_arrow(path: str) -> tuple[pa.Schema, Batches]:
    """Open an Arrow file or stream: its schema, and its rows in batches.

    Raises:
        FileRefused: `corrupt-arrow`, also while the batches are read.
    """
    try:
        schema = _ipc(path).schema
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(path, "corrupt-arrow", f"not readable as Arrow: {_one_line(error)}") from None
    _schema_names(schema, path)

    def batches() -> Iterator[pa.RecordBatch]:
        line = 1
        try:
            reader = _ipc(path)
            count = getattr(reader, "num_record_batches", None)
            for batch in (reader.get_batch(k) for k in range(count)) if count is not None else reader:
                for offset in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(offset, _BATCH)
                    yield part
                    line += part.num_rows
        except (pa.ArrowException, OSError) as error:
            raise FileRefused(
                path, "corrupt-arrow", f"breaks off at row {line}: {_one_line(error)}", line=line
            ) from None

    return schema, batches


def saved_dataset_files(folder: Path, split: str) -> list[str] | None:
    """Return the Arrow files of a folder that `datasets`' `save_to_disk` wrote, or None if it is not one.

    Raises:
        FileRefused: no such split, files missing, or an index that needs flattening.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json_file(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise FileRefused(
                str(folder), "no-such-file", f"no split '{split}'; there are: {', '.join(map(str, splits))}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        return None
    content = _json_file(state)
    if content.get("_indices_data_files"):
        detail = "the saved dataset has an index; call .flatten_indices() before saving it"
        raise FileRefused(str(folder), "unknown-container", detail)
    names = [str(entry.get("filename", "")) for entry in content.get("_data_files", []) if isinstance(entry, dict)]
    if not names or any(Path(name).name != name for name in names):
        raise FileRefused(str(state), "corrupt-arrow", "names no data files of its own folder")
    return [str(folder / name) for name in names]


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileRefused(str(path), "unreadable-file", f"can't be read: {_one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ hub


def open_hub(path: str, split: str) -> tuple[pa.Schema, Batches]:
    """Open a hub dataset `owner/name` (or `owner/name:config`) through `datasets`, as it is stored: nothing decoded.

    Raises:
        FileRefused: `datasets` is not installed, or the dataset can't be had (offline, no such name or split).
    """
    try:
        import datasets
    except ImportError:
        detail = "no such file or folder, and reading it from the hub needs: pip install 'keepset[train]'"
        raise FileRefused(path, "no-such-file", detail) from None
    name, _, config = path.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client has no common base class; every failure is the user's to mend
        detail = f"no such file or folder here, and the hub gave: {type(error).__name__}: {_one_line(error)}"
        raise FileRefused(path, "no-such-file", detail) from None

    def batches() -> Iterator[pa.RecordBatch]:
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
            yield from table.to_batches()

    return dataset.features.arrow_schema, batches
