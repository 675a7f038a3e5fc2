"""HTTP/2 by prior knowledge, frame by frame; ends with 0 if the gateway did what it had to.

    h2_client.py ADDRESS PORT HOST CASE
"""

import socket
import sys

import h2.config
import h2.connection
import h2.events
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

address, port, host, case = sys.argv[1:]

# The library ends the connection with GOAWAY, though streams that are open may end (RFC 9113 §6.8).
OPEN = h2.connection.ConnectionState.CLIENT_OPEN
TRANSITIONS = h2.connection.H2ConnectionStateMachine._transitions
TRANSITIONS[(OPEN, h2.connection.ConnectionInputs.RECV_GOAWAY)] = (None, OPEN)


class Client:
    def __init__(self):
        self.socket = socket.create_connection((address, int(port)), timeout=20)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events = []
        self.closed = False
        self.flush()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def request(self, path, method="POST", end=False, more=()):
        stream = self.h2.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "http"), (":authority", host), (":path", path), *more]
        self.h2.send_headers(stream, headers, end_stream=end)
        self.flush()
        return stream

    def until(self, kind, stream=None):
        """The next event of a kind, and with it all before; fails if the connection ends first."""
        while True:
            for index, event in enumerate(self.events):
                if isinstance(event, kind) and stream in (None, getattr(event, "stream_id", None)):
                    return self.events.pop(index)
            assert not self.closed, f"closed before {kind.__name__}; left: {self.events}"
            data = self.socket.recv(65_536)
            self.closed = not data
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.events.append(event)
            if not self.closed:
                self.flush()

    def status(self, stream):
        return dict(self.until(h2.events.ResponseReceived, stream).headers)[":status"]

    def body(self, stream, length):
        data = b""
        while len(data) < length:
            data += self.until(h2.events.DataReceived, stream).data
        return data


def trailers():
    client = Client()
    stream = client.request("/trailers", more=[("te", "trailers"), ("trailer", "x-sum")])
    client.h2.send_data(stream, b"body")
    client.h2.send_headers(stream, [("x-sum", "42")], end_stream=True)
    client.flush()
    assert client.status(stream) == "200"
    assert client.body(stream, 4) == b"body"
    trailers = dict(client.until(h2.events.TrailersReceived, stream).headers)
    assert trailers.get("x-sum") == "42", trailers


def resets():
    client = Client()
    # Where the reset follows at once, the head before it may be lost.
    stream = client.request("/reset", "GET", end=True)
    client.until(h2.events.StreamReset, stream)
    stream = client.request("/refused", "GET", end=True)
    assert client.status(stream) in ("502", "503")
    # The connection is as good as before.
    stream = client.request("/hold")
    assert client.status(stream) == "200"
    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
    client.flush()
    stream = client.request("/echo")
    client.h2.send_data(stream, b"still here", end_stream=True)
    client.flush()
    assert client.status(stream) == "200"
    assert client.body(stream, 10) == b"still here"


def early():
    client = Client()
    stream = client.request("/refuse")
    client.h2.send_data(stream, b"the first of much")
    client.flush()
    status = client.status(stream)
    assert status == "413", status
    client.until(h2.events.StreamEnded, stream)
    # The rest is not wanted (RFC 9113 §8.1), and the response is good.
    reset = client.until(h2.events.StreamReset, stream)
    assert reset.error_code == ErrorCodes.NO_ERROR, reset
    stream = client.request("/a", "GET", end=True)
    assert client.status(stream) == "200"


def drain():
    client = Client()
    stream = client.request("/hold")
    assert client.status(stream) == "200"
    assert client.body(stream, 5) == b"begun"
    print("open", flush=True)
    client.until(h2.events.ConnectionTerminated)
    client.h2.send_data(stream, b"", end_stream=True)
    client.flush()
    client.body(stream, 10)
    client.until(h2.events.StreamEnded, stream)
    while client.socket.recv(65_536):
        pass


def websocket():
    client = Client()
    settings = client.until(h2.events.RemoteSettingsChanged).changed_settings
    assert settings[SettingCodes.ENABLE_CONNECT_PROTOCOL].new_value == 1, settings
    stream = client.h2.get_next_available_stream_id()
    headers = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/socket")]
    headers += [(":authority", host), ("sec-websocket-version", "13"), ("sec-websocket-protocol", "chat")]
    client.h2.send_headers(stream, headers)
    client.flush()
    status = client.status(stream)
    assert status == "200", status
    # A masked text frame of RFC 6455 §5.7, and its echo without mask.
    client.h2.send_data(stream, bytes.fromhex("818537fa213d7f9f4d5158"))
    client.flush()
    assert client.body(stream, 7) == b"\x81\x05Hello"
    # Close with 1000.
    client.h2.send_data(stream, bytes.fromhex("888200000000") + (1000).to_bytes(2, "big"))
    client.flush()
    assert client.body(stream, 4) == b"\x88\x02" + (1000).to_bytes(2, "big")
    client.until(h2.events.StreamEnded, stream)


CASES = {"trailers": trailers, "resets": resets, "early": early, "drain": drain, "websocket": websocket}
CASES[case]()
