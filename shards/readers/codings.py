"""Content codings of crawled pages (RFC 9110, section 8.4.1), decoded to a limit: a few bytes can expand to any size.

All are decoded here. warcio's own decoders have no limit, and which codings they cover depends on what else is installed.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import zstandard

from shards.common.optional import need
from shards.readers.compressed import opened

_UNREAD = frozenset(("dcb", "dcz", "compress", "x-compress"))
"""Codings that are registered and not read here: RFC 9842, and LZW. Servers send other names too, for pages without a coding."""
_GZIP = b"\x1f\x8b"


class CodingError(Exception):
    """A page that cannot be decoded. The message is the reason."""


def decode(page: bytes, header: str, most: int) -> bytes:
    """A page without the codings that its Content-Encoding header names; of a longer one about `most` bytes, and more than `most`.

    Names that are no coding ("utf-8", "none") are ignored. Raises CodingError.
    """
    for coding in reversed([name.strip().lower() for name in header.split(",")]):  # the last one was applied last
        if coding in _UNREAD:
            raise CodingError(f"content-encoding {coding} not read")
        decoder = _DECODERS.get(coding)
        if decoder is None or not page or len(page) > most:
            continue
        try:
            page = decoder(page, most)
        except (EOFError, zlib.error, zstandard.ZstdError):
            raise CodingError(f"content-encoding {coding} is damaged") from None
    return page


def _gzip(page: bytes, most: int) -> bytes:
    """What has no gzip header is taken for a page that is not encoded. What follows the first member is ignored, as browsers do."""
    return _inflated(page, 31, most) if page.startswith(_GZIP) else page


def _deflate(page: bytes, most: int) -> bytes:
    """By the standard it has zlib's header (RFC 9110, section 8.4.1.2). Some servers leave it out."""
    try:
        return _inflated(page, zlib.MAX_WBITS, most)
    except zlib.error:
        return _inflated(page, -zlib.MAX_WBITS, most)


def _inflated(page: bytes, window: int, most: int) -> bytes:
    decompressor = zlib.decompressobj(window)
    found = decompressor.decompress(page, most + 1)
    if not decompressor.eof and len(found) <= most:
        raise EOFError
    return found


def _zstd(page: bytes, most: int) -> bytes:
    return opened(".zst", io.BufferedReader(io.BytesIO(page))).read(most + 1)


def _brotli(page: bytes, most: int) -> bytes:
    """RFC 7932."""
    brotli = need("brotli", "a page in brotli")
    decompressor = brotli.Decompressor()
    try:
        found: bytes = decompressor.process(page, output_buffer_limit=most + 1)  # a little more comes than the limit
    except brotli.error:
        raise EOFError from None
    if not decompressor.is_finished() and len(found) <= most:
        raise EOFError
    return found


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": _zstd,
    "br": _brotli,
}
