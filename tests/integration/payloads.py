# SPDX-License-Identifier: Apache-2.0
"""Compressed payloads for the tests, good and bad, without a zstd module: zstd frames are put together by hand from raw
and run-length blocks (RFC 8878, section 3.1.1), which every decoder must understand, and one really compressed frame is
kept as a constant."""

from __future__ import annotations

import struct
import zlib

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 128 * 1024
_RAW, _RUN = 0, 1


def _zstd_header(content_size: int | None) -> bytes:
    # Frame header descriptor: content size flag in bits 6 and 7 (3: eight bytes); no checksum, no dictionary, no single
    # segment, so a window descriptor follows: exponent 7, which is a window of 128 KiB.
    descriptor = 0 if content_size is None else 0xC0
    size = b"" if content_size is None else struct.pack("<Q", content_size)
    return _ZSTD_MAGIC + bytes([descriptor, 7 << 3]) + size


def _zstd_block(kind: int, size: int, content: bytes, last: bool) -> bytes:
    return struct.pack("<I", size << 3 | kind << 1 | last)[:3] + content


def zstd_stored(data: bytes) -> bytes:
    """A zstd frame of raw blocks."""
    pieces = [data[i : i + _ZSTD_BLOCK] for i in range(0, len(data), _ZSTD_BLOCK)] or [b""]
    blocks = (_zstd_block(_RAW, len(p), p, i == len(pieces) - 1) for i, p in enumerate(pieces))
    return _zstd_header(len(data)) + b"".join(blocks)


def zstd_run(byte: bytes, count: int, *, announce: int | None = None) -> bytes:
    """A zstd frame of one byte `count` times, four bytes for each 128 KiB; the frame says its size only if given one,
    true or not."""
    sizes = [_ZSTD_BLOCK] * (count // _ZSTD_BLOCK) + ([count % _ZSTD_BLOCK] if count % _ZSTD_BLOCK else [])
    blocks = (_zstd_block(_RUN, size, byte, i == len(sizes) - 1) for i, size in enumerate(sizes))
    return _zstd_header(announce) + b"".join(blocks)


def zlib_run(byte: bytes, count: int) -> bytes:
    """A zlib stream of one byte `count` times, without ever holding all of them."""
    compressor = zlib.compressobj(9)
    block = byte * (1 << 20)
    parts = [compressor.compress(block) for _ in range(count // len(block))]
    parts.append(compressor.compress(byte * (count % len(block))))
    return b"".join(parts) + compressor.flush()


#: What `ZSTD_FRAME` decompresses to.
ZSTD_TEXT = b"".join(b"line %d: the quick brown fox jumps over the lazy dog\n" % i for i in range(20))

#: `ZSTD_TEXT` through `zstd -19 -c` of the zstd command line tool 1.5.4: an entropy-coded block, and the checksum.
ZSTD_FRAME = bytes.fromhex(
    "28b52ffd04684d030024046c696e6520303a2074686520717569636b2062726f776e20666f78206a756d7073206f7665726c"
    "617a7920646f670a3132333435363738393131323334353637383915a810e83deb77a033ce011022e1ffff1dc107272332c1"
    "601203804040045471c15ab82f03a8a1677d"
)
