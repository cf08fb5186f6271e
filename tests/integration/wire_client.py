# SPDX-License-Identifier: Apache-2.0
"""A client for the msgtrans wire protocol, version 1, in plain Python.

Written from docs/wire_format.md alone, with nothing but the standard library and blocking sockets, so that it can be
read as a second description of the protocol and can disagree with the C++ implementation where that one is wrong.

    packet = fixed header (16 bytes) | extension header (ext_len bytes) | payload (payload_len bytes)

    with Client("127.0.0.1", 8001) as client:
        print(client.request(b"ping").payload)      # a request and its answer
        client.send(b"hello", biz_type=7)           # a one-way message ...
        print(client.receive().payload)             # ... and what the server sends of its own accord

A `Client` belongs to one thread at a time. Every wait has a deadline: `timeout` is in seconds, and when it is over
`TimeoutError` is raised and the connection can still be used.
"""

from __future__ import annotations

import collections
import dataclasses
import socket
import struct
import time
import zlib

VERSION = 1

# compression
NONE, ZSTD, ZLIB = 0, 1, 2
# type
ONE_WAY, REQUEST, RESPONSE = 0, 1, 2
# flags; bits 3 to 15 are sent as 0 and ignored when received
FRAGMENTED, HIGH_PRIORITY, ROUTE_TAG = 1, 2, 4

#: version, compression, type, biz_type, message_id, ext_len, payload_len, flags; big-endian, without padding
HEADER = struct.Struct(">BBBBIHIH")
HEADER_SIZE = 16
assert HEADER.size == HEADER_SIZE

DEFAULT_MAX_PAYLOAD = 16 * 1024 * 1024
DEFAULT_TIMEOUT = 10.0


class ProtocolError(Exception):
    """The other end sent something that is not the protocol; the message names the field and the value."""


class ConnectionEnded(Exception):
    """The connection ended: closed by the other end, or reset."""


@dataclasses.dataclass
class Packet:
    """One packet. `payload` is what an application sees, so decompressed."""

    type: int
    message_id: int
    payload: bytes = b""
    biz_type: int = 0
    extension: bytes = b""
    flags: int = 0
    compression: int = NONE


def encode_header(
    *,
    version: int = VERSION,
    compression: int = NONE,
    type: int = ONE_WAY,
    biz_type: int = 0,
    message_id: int = 1,
    ext_len: int = 0,
    payload_len: int = 0,
    flags: int = 0,
) -> bytes:
    """The 16 bytes of a header, each field as given, also where that is against the protocol."""
    return HEADER.pack(version, compression, type, biz_type, message_id, ext_len, payload_len, flags)


def encode(packet: Packet) -> bytes:
    """The packet's bytes on the wire. A zlib payload is compressed here; a zstd payload must be a zstd frame already
    (the standard library has no zstd)."""
    payload = zlib.compress(packet.payload) if packet.compression == ZLIB else packet.payload
    header = encode_header(
        compression=packet.compression,
        type=packet.type,
        biz_type=packet.biz_type,
        message_id=packet.message_id,
        ext_len=len(packet.extension),
        payload_len=len(payload),
        flags=packet.flags,
    )
    return header + packet.extension + payload


class Decoder:
    """Packets out of a stream that may be cut anywhere: `feed` bytes in, take packets out with `next`."""

    def __init__(self, max_payload: int = DEFAULT_MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def pending(self) -> int:
        """Bytes that are there and belong to a packet that is not yet whole."""
        return len(self._buffer)

    def next(self) -> Packet | None:
        """The next whole packet, or None if more bytes are needed. `ProtocolError` leaves the decoder of no use: after
        a bad header nothing says where the next packet begins."""
        if len(self._buffer) < HEADER_SIZE:
            return None
        version, compression, type_, biz_type, message_id, ext_len, payload_len, flags = HEADER.unpack_from(
            self._buffer
        )
        if version != VERSION:
            raise ProtocolError(f"version is {version}, must be {VERSION}")
        if compression not in (NONE, ZSTD, ZLIB):
            raise ProtocolError(f"compression is {compression}, must be 0, 1 or 2")
        if type_ not in (ONE_WAY, REQUEST, RESPONSE):
            raise ProtocolError(f"type is {type_}, must be 0, 1 or 2")
        if flags & FRAGMENTED:
            raise ProtocolError(f"flags is {flags:#06x}: the fragmented bit is reserved")
        if payload_len > self._max_payload:
            raise ProtocolError(f"payload_len is {payload_len}, over the limit of {self._max_payload}")

        end = HEADER_SIZE + ext_len + payload_len
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            extension = bytes(view[HEADER_SIZE : HEADER_SIZE + ext_len])
            payload = bytes(view[HEADER_SIZE + ext_len : end])
        del self._buffer[:end]
        if compression != NONE:
            payload = self._decompress(compression, payload)
        return Packet(type_, message_id, payload, biz_type, extension, flags, compression)

    def _decompress(self, compression: int, payload: bytes) -> bytes:
        if compression == ZSTD:
            raise ProtocolError("payload (zstd): this client cannot decompress it")
        inflater = zlib.decompressobj()
        try:
            # One byte over the limit is enough to know; a bomb is never unpacked.
            plain = inflater.decompress(payload, self._max_payload + 1)
        except zlib.error as error:
            raise ProtocolError(f"payload (zlib) does not decompress: {error}") from error
        if len(plain) > self._max_payload:
            raise ProtocolError(f"payload (zlib) decompresses to more than the limit of {self._max_payload}")
        if not inflater.eof or inflater.unused_data:
            raise ProtocolError("payload (zlib) is not exactly one stream")
        return plain


class MessageIds:
    """1, 2, ... 2^32-1, 1, ...: one counter an end, for its one-way messages and requests together; 0 means unset."""

    def __init__(self, first: int = 1) -> None:
        self._next = first

    def take(self) -> int:
        taken = self._next
        self._next = 1 if taken == 0xFFFFFFFF else taken + 1
        return taken


class Client:
    """One TCP connection."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_payload: int = DEFAULT_MAX_PAYLOAD,
        receive_buffer: int | None = None,
        source: str | None = None,
    ) -> None:
        """`receive_buffer` fixes the kernel's buffer (for peers that are slow on purpose), `source` is the address to
        connect from; `timeout` is for connecting, and for every other call that is given none."""
        self.timeout = timeout
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if receive_buffer is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source is not None:
                self._socket.bind((source, 0))
            self._socket.settimeout(timeout)
            self._socket.connect((host, port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self._socket.close()
            raise
        self._decoder = Decoder(max_payload)
        self._ids = MessageIds()
        self._pending: set[int] = set()
        self._responses: dict[int, Packet] = {}
        self._inbox: collections.deque[Packet] = collections.deque()
        #: What went out through `send`, `start_request` and `respond`, and whole packets that came in.
        self.packets_sent = 0
        self.packets_received = 0
        #: Responses that belong to no pending request of this end; they are dropped.
        self.unmatched_responses = 0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- messages ----------------------------------------------------------------------------------------------

    def send(self, payload: bytes, **fields: object) -> int:
        """Sends a one-way message and returns its id. `fields`: biz_type, extension, flags, compression."""
        return self._send_new(ONE_WAY, payload, fields)

    def start_request(self, payload: bytes, **fields: object) -> int:
        """Sends a request and returns its id, for `response`; any number may be pending at once."""
        return self._send_new(REQUEST, payload, fields)

    def response(self, message_id: int, timeout: float | None = None) -> Packet:
        """The answer to the request with that id. On a timeout the request is given up: a late answer is dropped."""
        deadline = self._deadline(timeout)
        try:
            while message_id not in self._responses:
                self._sort(self._read(deadline))
        finally:
            self._pending.discard(message_id)
        return self._responses.pop(message_id)

    def request(self, payload: bytes, timeout: float | None = None, **fields: object) -> Packet:
        """Sends a request and waits for its answer."""
        return self.response(self.start_request(payload, **fields), timeout)

    def receive(self, timeout: float | None = None) -> Packet:
        """The next one-way message or request of the other end, in the order they came."""
        deadline = self._deadline(timeout)
        while not self._inbox:
            self._sort(self._read(deadline))
        return self._inbox.popleft()

    def respond(self, request: Packet, payload: bytes) -> None:
        """Answers a request of the other end: its id, its biz_type."""
        self.send_packet(Packet(RESPONSE, request.message_id, payload, request.biz_type))

    def send_packet(self, packet: Packet) -> None:
        """Sends a packet as it is, with the id it has; counted as sent."""
        self.send_raw(encode(packet))
        self.packets_sent += 1

    # --- for tests ---------------------------------------------------------------------------------------------

    def new_packet(self, type_: int, payload: bytes, **fields: object) -> Packet:
        """A packet with the next message id, pending if it is a request, that the caller sends with `send_raw` in
        whatever way it likes; counted as sent."""
        packet = Packet(type_, self._ids.take(), payload, **fields)  # type: ignore[arg-type]
        if type_ == REQUEST:
            self._pending.add(packet.message_id)
        self.packets_sent += 1
        return packet

    def send_raw(self, data: bytes, timeout: float | None = None) -> None:
        """Bytes as they are, counted as nothing."""
        self._socket.settimeout(self.timeout if timeout is None else timeout)
        try:
            self._socket.sendall(data)
        except (ConnectionError, BrokenPipeError) as error:
            raise ConnectionEnded(str(error)) from error

    def next_packet(self, timeout: float | None = None) -> Packet:
        """The next packet of whatever type, as it comes, without matching it to anything."""
        return self._read(self._deadline(timeout))

    def wait_end(self, timeout: float | None = None) -> list[Packet]:
        """Reads until the other end closes or resets the connection; returns the whole packets that came before."""
        deadline = self._deadline(timeout)
        packets: list[Packet] = []
        try:
            while True:
                packets.append(self._read(deadline))
        except ConnectionEnded:
            return packets

    def half_close(self) -> None:
        """Says that nothing more comes from here; answers can still be read."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Drops the connection with a TCP reset instead of an orderly end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        self._socket.close()

    @property
    def raw_socket(self) -> socket.socket:
        return self._socket

    # --- inside ------------------------------------------------------------------------------------------------

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def _send_new(self, type_: int, payload: bytes, fields: dict[str, object]) -> int:
        packet = self.new_packet(type_, payload, **fields)
        self.send_raw(encode(packet))
        return packet.message_id

    def _read(self, deadline: float) -> Packet:
        while (packet := self._decoder.next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("nothing came in time")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(256 * 1024)
            except ConnectionError as error:
                raise ConnectionEnded(str(error)) from error
            if not data:
                raise ConnectionEnded(
                    f"closed in the middle of a packet, {self._decoder.pending()} bytes of it received"
                    if self._decoder.pending()
                    else "closed"
                )
            self._decoder.feed(data)
        self.packets_received += 1
        return packet

    def _sort(self, packet: Packet) -> None:
        if packet.type != RESPONSE:
            self._inbox.append(packet)
        elif packet.message_id in self._pending:
            self._pending.discard(packet.message_id)
            self._responses[packet.message_id] = packet
        else:
            self.unmatched_responses += 1
