"""A backend of HTTP/2 by prior knowledge that answers each request as its path says.

    h2_backend.py ADDRESS PORT

`/trailers` answers with the request's trailers; `/reset` resets the stream after the response's head,
`/refused` before it; `/hold` answers at once and ends with the request; others return the request's body.
Prints each stream that a client resets.
"""

import asyncio
import sys

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.errors import ErrorCodes


class Backend(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.paths = {}
        self.bodies = {}
        self.trailers = {}
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.transport.write(self.h2.data_to_send())

    def data_received(self, data):
        for event in self.h2.receive_data(data):
            self.take(event)
        self.transport.write(self.h2.data_to_send())

    def take(self, event):
        if isinstance(event, h2.events.RequestReceived):
            stream = event.stream_id
            path = self.paths[stream] = dict(event.headers)[":path"]
            self.bodies[stream] = b""
            if path == "/hold":
                self.h2.send_headers(stream, [(":status", "200")])
                self.h2.send_data(stream, b"begun")
            elif path == "/reset":
                self.h2.send_headers(stream, [(":status", "200")])
                self.h2.send_data(stream, b"some")
                self.h2.reset_stream(stream, ErrorCodes.INTERNAL_ERROR)
            elif path == "/refused":
                self.h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
        elif isinstance(event, h2.events.DataReceived):
            self.bodies[event.stream_id] += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            self.trailers[event.stream_id] = event.headers
        elif isinstance(event, h2.events.StreamEnded):
            self.answer(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            print("reset", self.paths[event.stream_id], flush=True)

    def answer(self, stream):
        path = self.paths[stream]
        if path == "/hold":
            self.h2.send_data(stream, b" and ended", end_stream=True)
        elif path not in ("/reset", "/refused"):
            self.h2.send_headers(stream, [(":status", "200")])
            if path == "/trailers":
                self.h2.send_data(stream, self.bodies[stream])
                self.h2.send_headers(stream, self.trailers[stream], end_stream=True)
            else:
                self.h2.send_data(stream, self.bodies[stream], end_stream=True)


async def main(address, port):
    server = await asyncio.get_running_loop().create_server(Backend, address, int(port))
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
