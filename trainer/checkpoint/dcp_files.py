"""A checkpoint's files: the writer and reader that `torch.distributed.checkpoint` calls. Format: `trainer.checkpoint.storage`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from midwatch.checkpoint_format.manifest import (
    FILE_NAME,
    PIECE,
    CheckpointError,
    FileEntry,
    Manifest,
    TensorChunk,
    TensorEntry,
    read_chunk,
)
from shards.common.files import sync_directory
from trainer.checkpoint.direct_io import BLOCK, Sink, blocks


def make_below(root: Path, place: Path) -> None:
    """Makes a directory inside a run directory. One that was deleted or moved is not made again. Raises OSError."""
    for each in reversed([place, *place.parents]):
        if each != root and each.is_relative_to(root):
            each.mkdir(exist_ok=True)


class Abandoned(CheckpointError):
    """The save was given up on purpose."""


class _Written(msgspec.Struct, frozen=True):
    """What a rank tells of one chunk it has written, and of the file it is in."""

    chunk: TensorChunk
    file: FileEntry


class Writer(StorageWriter):
    def __init__(self, directory: Path, head: Manifest, rank: int, abandoned: Callable[[], bool]) -> None:
        self._directory, self._head, self._rank, self._abandoned = directory, head, rank, abandoned
        self.digest = ""
        self.bytes = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # The others write after the coordinator has sent them their plans, so they find it.
        if is_coordinator:
            shutil.rmtree(self._directory, ignore_errors=True)
            try:
                make_below(self._directory.parents[1], self._directory)
            except OSError as error:
                raise CheckpointError(f"{self._directory}: cannot be made: {error.strerror}") from None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = self._directory / f"rank-{self._rank:05d}.bin"
        done: Future[list[WriteResult]] = Future()
        try:
            done.set_result(self._write(file, [(item, planner.resolve_data(item)) for item in plan.items]))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from None
        return done

    def _write(self, file: Path, items: list[tuple[WriteItem, Any]]) -> list[WriteResult]:
        chunks: list[tuple[MetadataIndex, TensorChunk]] = []
        whole = xxhash.xxh3_128()
        size = 0
        with Sink(file) as sink:
            for item, tensor in items:
                if item.type == WriteItemType.BYTE_IO or not isinstance(tensor, Tensor):
                    raise CheckpointError(f"{item.index.fqn}: only tensors go into data files")
                if not tensor.numel():
                    continue
                gap = bytes(-size % BLOCK)
                whole.update(gap)
                size += len(gap)
                data, count = blocks(tensor), tensor.numel() * tensor.element_size()
                digest = xxhash.xxh3_128()
                for at in range(0, len(data), PIECE):
                    if self._abandoned():
                        raise Abandoned(f"{file}: given up")
                    piece = data[at : min(at + PIECE, count)]
                    digest.update(piece)
                    whole.update(piece)
                    sink.write(data[at : at + PIECE])
                index = item.index
                chunk = TensorChunk(tuple(index.offset or ()), tuple(tensor.shape), file.name, size, count, digest.hexdigest())
                chunks.append((index, chunk))
                size += count
            sink.finish(size)
        known = FileEntry(size, whole.hexdigest())
        return [WriteResult(index, chunk.bytes, _Written(chunk, known)) for index, chunk in chunks]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileEntry] = {}
        chunks: dict[str, list[TensorChunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            written: _Written = result.storage_data
            files[written.chunk.file] = written.file
            chunks[result.index.fqn].append(written.chunk)
        tensors = {}
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            tensors[name] = TensorEntry(tuple(known.size), dtype_name(known.properties.dtype), tuple(chunks[name]))
        raw = msgspec.msgpack.encode(msgspec.structs.replace(self._head, files=files, tensors=tensors))
        file = self._directory / FILE_NAME
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(descriptor, memoryview(raw))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(self._directory)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from None
        self.digest = xxhash.xxh3_128_hexdigest(raw)
        self.bytes = len(raw) + sum(known.bytes for known in files.values())


class DcpFileReader(StorageReader):
    def __init__(self, directory: Path, manifest: Manifest, agree: Callable[[str | None], str | None]) -> None:
        self._directory, self._manifest, self._agree = directory, manifest, agree
        self.overwriting = False
        """Live tensors are being overwritten, or have been."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in self._manifest.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=getattr(torch, entry.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        staged: list[tuple[ReadItem, Tensor]] = []
        try:
            staged, problem = list(self._read(plan.items)), None
        except (CheckpointError, MemoryError) as error:
            problem = str(error) or "no memory to verify the checkpoint in"
        problem = self._agree(problem)
        if problem:
            raise CheckpointError(problem)
        self.overwriting = True
        for item, tensor in staged:
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Tensor]]:
        """Verified contents, each chunk read once, in the order in which they lie in the files."""
        by_chunk: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
        for item in items:
            by_chunk.setdefault((item.storage_index.fqn, tuple(item.storage_index.offset or ())), []).append(item)
        wanted = []
        for (name, offsets), needed in by_chunk.items():
            entry = self._manifest.tensors[name]
            chunk = next(chunk for chunk in entry.chunks if chunk.offsets == offsets)
            wanted.append((chunk, entry.dtype, needed))
        for chunk, dtype, needed in sorted(wanted, key=lambda each: (each[0].file, each[0].start)):
            tensor = self._read_chunk(chunk).view(getattr(torch, dtype)).view(chunk.sizes)
            for item in needed:
                part = tensor
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                yield item, part if part.numel() == tensor.numel() else part.clone()

    def _read_chunk(self, chunk: TensorChunk) -> Tensor:
        buffer = torch.empty(chunk.bytes, dtype=torch.uint8)
        read_chunk(self._directory, chunk, buffer.numpy().data)
        return buffer


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
