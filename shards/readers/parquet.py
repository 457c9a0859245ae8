"""Parquet: row groups streamed, of the columns that are needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from shards.common.optional import need
from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.files import raw_file
from shards.readers.layouts import Placed, documents
from shards.spec import Source

SUFFIXES = (".parquet",)
KINDS = ("text", "sft", "preference", "unpaired")
OPTIONS = ("layout", "suffixes")
BATCH_BYTES = 8 << 20  # of rows decoded at once, by the row group's mean
BATCH_ROWS = 1024


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A file's rows as documents."""
    for path in unit.paths:
        yield from documents(_rows(path, source, reading), source)


def columns(names: list[str], source: Source) -> list[str]:
    """The columns of a file that are read: one for texts; for instruction data all except tensors."""
    return [source.text_field] if source.kind == "text" and source.text_field in names else names


def _rows(path: str, source: Source, reading: ReadPosition) -> Iterator[Placed]:
    pa, parquet = need("pyarrow", f"{path}"), need("pyarrow.parquet", f"{path}")
    damage = (pa.lib.ArrowException, OSError, EOFError, UnicodeDecodeError)
    number = 0
    before = reading.done
    try:
        with io.BufferedReader(raw_file(path), 1 << 20) as raw:
            file = parquet.ParquetFile(raw, buffer_size=1 << 20, page_checksum_verification=True)
            if source.kind == "text" and source.text_field not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names[:20])
                yield Rejected(path, f'no column "{source.text_field}"', f"there are: {has}", rest=True)
                return
            wanted = columns(file.schema_arrow.names, source)
            for group in range(file.num_row_groups):
                told = file.metadata.row_group(group)
                mean = max(1, told.total_byte_size // max(1, told.num_rows))
                size = max(1, min(BATCH_ROWS, BATCH_BYTES // mean))
                for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
                    for row in _of_batch(batch, pa):
                        number += 1
                        where = f"{path}:{number}"
                        yield Rejected(where, row.reason, row.record) if isinstance(row, Rejected) else (where, row)
                    reading.done = before + raw.tell()
    except damage as error:
        yield Rejected(path, DAMAGED, shown(str(error)), rest=True)


def _of_batch(batch: Any, pa: Any) -> Iterator[dict[str, Any] | Rejected]:
    if batch.nbytes > LONGEST_RECORD and batch.num_rows > 1:  # a row group's mean says little of its longest rows
        for row in range(batch.num_rows):
            yield from _of_batch(batch.slice(row, 1), pa)
        return
    if batch.num_rows == 1 and batch.nbytes > LONGEST_RECORD:
        yield Rejected("", f"longer than {LONGEST_RECORD >> 20} MiB", "")
        return
    try:
        if batch.num_columns == 1:
            name = batch.schema.names[0]
            yield from [{name: value} for value in batch.column(0).to_pylist()]
        else:
            yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from _of_batch(batch.slice(row, 1), pa)
        else:
            yield Rejected("", "not UTF-8", _raw(batch, pa))


def _raw(batch: Any, pa: Any) -> str:
    for column in batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            value = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())[0].as_py()
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                return shown(value)
    return ""
