"""HTTP/3 by aioquic; ends with 0 if the gateway did what it had to.

    http3_client.py ADDRESS PORT HOST CERTIFICATE
"""

import asyncio
import hashlib
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, StreamReset


class Response:
    def __init__(self):
        self.heads = []
        self.body = b""
        self.reset = None
        self.ended = asyncio.get_running_loop().create_future()

    def end(self):
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def status(self):
        return self.heads[0][b":status"]


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.responses = {}

    def quic_event_received(self, event):
        match event:
            case StreamReset() if event.stream_id in self.responses:
                self.responses[event.stream_id].reset = event.error_code
                self.responses[event.stream_id].end()
            case ConnectionTerminated():
                for response in self.responses.values():
                    response.end()
        for event in self.http.handle_event(event):
            response = self.responses[event.stream_id]
            if isinstance(event, HeadersReceived):
                response.heads.append(dict(event.headers))
            elif isinstance(event, DataReceived):
                response.body += event.data
            if event.stream_ended:
                response.end()

    def begin(self, method, path, more=(), end=True):
        stream = self._quic.get_next_available_stream_id()
        head = [(b":method", method), (b":scheme", b"https"), (b":authority", host.encode()), (b":path", path), *more]
        self.http.send_headers(stream, head, end_stream=end)
        self.responses[stream] = Response()
        return stream

    async def answer(self, stream):
        self.transmit()
        response = self.responses[stream]
        await asyncio.wait_for(response.ended, 20)
        return response


async def run(client):
    # Plain requests, side by side.
    streams = [client.begin(b"GET", b"/%d" % at) for at in range(50)]
    for at, stream in enumerate(streams):
        response = await client.answer(stream)
        assert response.status == b"200", response.heads
        assert response.body.startswith(b"GET /%d 0 " % at), response.body
        assert b"x-forwarded-proto: https\n" in response.body, response.body
        assert b"transfer-encoding" not in response.body, response.body

    # A body of both kinds.
    body = bytes(range(256)) * 20_000
    for more in [(), ((b"content-length", b"%d" % len(body)),)]:
        stream = client.begin(b"POST", b"/up", more, end=False)
        client.http.send_data(stream, body, end_stream=True)
        response = await client.answer(stream)
        expected = f"POST /up {len(body)} {hashlib.sha256(body).hexdigest()}\n".encode()
        assert response.body.startswith(expected), response.body

    # Trailers, which come as a second head.
    response = await client.answer(client.begin(b"GET", b"/trailers", [(b"te", b"trailers")]))
    assert response.heads[1:] == [{b"x-sum": b"42"}], response.heads

    # What is no request is reset, and the connection goes on.
    response = await client.answer(client.begin(b"GET", b"/", [(b"connection", b"close")]))
    assert response.reset == 0x10E, (response.reset, response.heads)
    response = await client.answer(client.begin(b"GET", b"/", [(b"x", b"x" * 40_000)]))
    assert response.status == b"431", response.heads

    # By another connection ID.
    client.change_connection_id()
    response = await client.answer(client.begin(b"GET", b"/last"))
    assert response.status == b"200", response.heads


async def main():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=host)
    configuration.load_verify_locations(certificate)
    async with connect(address, int(port), configuration=configuration, create_protocol=Client) as client:
        await run(client)


address, port, host, certificate = sys.argv[1:]
asyncio.run(main())
