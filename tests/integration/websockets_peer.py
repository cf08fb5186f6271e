# SPDX-License-Identifier: Apache-2.0
"""The other end, played by Debian's python3-websockets; for transports_test.py.

    websockets_peer.py client WS_URL WSS_URL CERTIFICATE      checks an echo server of ours; status 0 if all is right
    websockets_peer.py deflate WS_URL WSS_URL CERTIFICATE     the same of one that agrees on permessage-deflate
    websockets_peer.py server CERTIFICATE KEY                 prints two URLs, and echoes until killed

The library offers permessage-deflate, and agrees on it, unless told otherwise.
"""

import asyncio
import random
import ssl
import struct
import sys

import websockets
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

HEADER = struct.Struct(">BBBBIHIH")


def packet(kind: int, number: int, payload: bytes, biz_type: int = 0) -> bytes:
    return HEADER.pack(1, 0, kind, biz_type, number, 0, len(payload), 0) + payload


async def ends_with(code: int, url: str, send) -> None:  # type: ignore[no-untyped-def]
    async with websockets.connect(url, max_size=None) as peer:
        await send(peer)
        try:
            while True:
                await asyncio.wait_for(peer.recv(), 10)
        except websockets.ConnectionClosed as closed:
            assert closed.rcvd is not None, f"no Close frame instead of {code}"
            assert closed.rcvd.code == code, (closed.rcvd, code)


async def pieces(peer, whole: bytes):  # type: ignore[no-untyped-def]
    for at in range(0, len(whole), 100):
        yield whole[at : at + 100]
        await asyncio.wait_for(await peer.ping(b"between"), 10)


async def client(plain: str, encrypted: str, certificate: str) -> None:
    for url in (plain, encrypted):
        trust = ssl.create_default_context(cafile=certificate) if url.startswith("wss") else None
        async with websockets.connect(url, ssl=trust, subprotocols=["msgtrans"], max_size=None) as peer:
            assert peer.subprotocol == "msgtrans", peer.subprotocol
            for size in (0, 1, 109, 110, 125, 126, 65519, 65520, 100000):
                payload = bytes(i * 7 & 255 for i in range(size))
                await peer.send(packet(1, size + 1, payload, 9))
                assert await peer.recv() == packet(2, size + 1, payload, 9), size
            # in fragments, with a ping between that is answered
            await peer.send(pieces(peer, packet(1, 7, b"in pieces" * 100)))
            assert (await peer.recv())[HEADER.size :] == b"in pieces" * 100
            for number in range(1, 101):
                await peer.send(packet(0, number, b"%d" % number))
            for number in range(1, 101):
                assert (await peer.recv())[HEADER.size :] == b"%d" % number
            await peer.close(1000, "enough")
            assert peer.close_code == 1000, peer.close_code
    await ends_with(1003, plain, lambda peer: peer.send("text"))
    await ends_with(1009, plain, lambda peer: peer.send(packet(1, 1, bytes(100001))))
    await ends_with(1002, plain, lambda peer: peer.send(b"\x02" + packet(1, 1, b"x")[1:]))
    await ends_with(1002, plain, lambda peer: peer.send(packet(1, 1, b"x") + b"more"))


class WatchedDeflate(ClientPerMessageDeflateFactory):
    """Notes of each message that came whether it was compressed."""

    def process_response_params(self, params, accepted):  # type: ignore[no-untyped-def]
        agreed = super().process_response_params(params, accepted)
        decode, self.compressed = agreed.decode, []

        def noted(frame, **limits):  # type: ignore[no-untyped-def]
            if frame.opcode == 2:
                self.compressed.append(frame.rsv1)
            return decode(frame, **limits)

        agreed.decode = noted
        return agreed


async def deflate(plain: str, encrypted: str, certificate: str) -> None:
    noise = random.Random(1).randbytes(90000)
    for url in (plain, encrypted):
        trust = ssl.create_default_context(cafile=certificate) if url.startswith("wss") else None
        for parameters in (
            {},
            {"client_max_window_bits": True},
            {"server_no_context_takeover": True, "client_no_context_takeover": True},
            {"server_max_window_bits": 9, "client_max_window_bits": 9},
        ):
            offer = WatchedDeflate(**parameters)
            async with websockets.connect(url, ssl=trust, compression=None, extensions=[offer], max_size=None) as peer:
                for payload in (b"", b"few", b"x" * 1000, b"word " * 18000, noise, b"word " * 200):
                    for number in (1, 2):
                        await peer.send(packet(1, number, payload, 9))
                        assert await peer.recv() == packet(2, number, payload, 9), len(payload)
                assert offer.compressed == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2, offer.compressed
                await peer.send(pieces(peer, packet(1, 7, b"in pieces" * 1000)))
                assert (await peer.recv())[HEADER.size :] == b"in pieces" * 1000
                for number in range(1, 101):
                    await peer.send(packet(0, number, b"%d " % number * 300))
                for number in range(1, 101):
                    assert (await peer.recv())[HEADER.size :] == b"%d " % number * 300
                await peer.close(1000, "enough")
                assert peer.close_code == 1000, peer.close_code
    await ends_with(1009, plain, lambda peer: peer.send(packet(1, 1, bytes(100001))))
    await ends_with(1002, plain, lambda peer: peer.send(packet(1, 1, b"x" * 1000) + bytes(1000000)))


async def echo(peer) -> None:  # type: ignore[no-untyped-def]
    async for message in peer:
        _, _, kind, biz_type, number, _, _, _ = HEADER.unpack(message[: HEADER.size])
        payload = message[HEADER.size :]
        if payload.startswith(b"close "):
            return await peer.close(int(payload[6:]), "as asked")
        if payload == b"extensions":
            payload = b",".join(extension.name.encode() for extension in peer.extensions)
        await peer.send(packet(2 if kind == 1 else 0, number, payload, biz_type))


async def server(certificate: str, key: str) -> None:
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)
    urls = []
    for scheme, context in (("ws", None), ("wss", own)):
        listening = await websockets.serve(echo, "127.0.0.1", 0, ssl=context, subprotocols=["msgtrans"], max_size=None)
        urls.append(f"{scheme}://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    print(*urls, flush=True)
    await asyncio.Future()


if sys.argv[1] == "client":
    asyncio.run(client(*sys.argv[2:]))
elif sys.argv[1] == "deflate":
    asyncio.run(deflate(*sys.argv[2:]))
else:
    asyncio.run(server(*sys.argv[2:]))
