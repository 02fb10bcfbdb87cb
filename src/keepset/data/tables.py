"""Rows of CSV, Parquet, Arrow files, `save_to_disk` folders and hub datasets, as (line, JSON text, object)."""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import io
import json
from collections.abc import Iterator
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
    """Give JSON a word for what Arrow knows and JSON doesn't (the column's type is kept aside for writing back)."""
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
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

    Raises:
        FileRefused: no header, or a header with empty or repeated names.
    """
    skip_bom(stream)
    csv.field_size_limit(MAX_ROW)
    # surrogateescape keeps one bad byte from costing the whole file: the row that holds it is quarantined
    lines = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    separator = "\t" if ".tsv" in file.lower() else ","
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
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
            if any("\udc80" <= c <= "\udcff" or c == "\0" for c in "".join(cells)):
                raise FileRefused(
                    file, "no-header", "the header line holds bytes that are not UTF-8, or NUL", line=line
                )
            if len(set(cells)) != len(cells) or not all(c.strip() for c in cells):
                raise FileRefused(file, "no-header", "the header line has empty or repeated column names", line=line)
            continue
        yield _csv_row(file, line, header, cells)
    if header is None:
        raise FileRefused(file, "empty-file", "the file holds no rows")


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


def _batch_rows(batch: pa.RecordBatch, line: int, file: str) -> Iterator[RawRow | Quarantined]:
    try:
        records = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        for k in range(batch.num_rows):
            try:
                record = batch.slice(k, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Quarantined(file, line + k, "invalid-utf8", "a string column holds bytes that are not UTF-8", "")
            except (ValueError, OverflowError) as error:
                yield Quarantined(file, line + k, "wrong-type", f"a value can't be read: {error}", "")
            else:
                yield object_row(line + k, record, file)
        return
    for k, record in enumerate(records):
        yield object_row(line + k, record, file)


def _schema_names(schema: pa.Schema, file: str) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise FileRefused(file, "unknown-dialect", "two columns have the same name")


def read_parquet(path: str) -> tuple[pa.Schema, Iterator[RawRow | Quarantined]]:
    """Open a Parquet file; `line` is the row's number in the file, from 1.

    Raises:
        FileRefused: `corrupt-parquet`.
    """
    try:
        source = pq.ParquetFile(path)
        schema = source.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(path, "corrupt-parquet", f"not readable as Parquet: {_one_line(error)}") from None
    _schema_names(schema, path)

    def rows() -> Iterator[RawRow | Quarantined]:
        line = 1
        try:
            with source:
                for batch in source.iter_batches(batch_size=_BATCH):
                    yield from _batch_rows(batch, line, path)
                    line += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            lost = source.metadata.num_rows - line + 1
            detail = f"{lost} rows from row {line} on can't be read: {_one_line(error)}"
            raise FileRefused(path, "corrupt-parquet", detail, line=line) from None

    return schema, rows()


def read_arrow(path: str) -> tuple[pa.Schema, Iterator[RawRow | Quarantined]]:
    """Open an Arrow file or stream; `line` is the row's number in the file, from 1.

    Raises:
        FileRefused: `corrupt-arrow`.
    """
    try:
        source = pa.memory_map(path)
        head = source.read(6)
        source.seek(0)
        reader: Any = pa.ipc.open_file(source) if head == b"ARROW1" else pa.ipc.open_stream(source)
        schema = reader.schema
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(path, "corrupt-arrow", f"not readable as Arrow: {_one_line(error)}") from None
    _schema_names(schema, path)
    count = getattr(reader, "num_record_batches", None)

    def rows() -> Iterator[RawRow | Quarantined]:
        line = 1
        try:
            batches = (reader.get_batch(k) for k in range(count)) if count is not None else reader
            for batch in batches:
                for offset in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(offset, _BATCH)
                    yield from _batch_rows(part, line, path)
                    line += part.num_rows
        except (pa.ArrowException, OSError) as error:
            raise FileRefused(
                path, "corrupt-arrow", f"breaks off at row {line}: {_one_line(error)}", line=line
            ) from None

    return schema, rows()


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


def read_hub(path: str, split: str) -> tuple[pa.Schema | None, Iterator[RawRow | Quarantined]]:
    """Open a hub dataset `owner/name` (or `owner/name:config`) through `datasets`; `line` is the row's number, from 1.

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
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client has no common base class; every failure is the user's to mend
        detail = f"no such file or folder here, and the hub gave: {type(error).__name__}: {_one_line(error)}"
        raise FileRefused(path, "no-such-file", detail) from None
    schema = found.features.arrow_schema if getattr(found, "features", None) is not None else None

    def rows() -> Iterator[RawRow | Quarantined]:
        for k, record in enumerate(found):
            yield object_row(k + 1, dict(record), path)

    return schema, rows()
