"""Calls of every kind through the gateway; ends with 0 if each was what it had to be.

    grpc_client.py ADDRESS:PORT HOST [ROOT_CERTIFICATE]
"""

import queue
import sys

import grpc

target, host, *root = sys.argv[1:]
# A busy machine is not a failed call.
DEADLINE = 20


def channel():
    options = [("grpc.max_receive_message_length", -1)]
    if not root:
        return grpc.insecure_channel(target, options + [("grpc.default_authority", host)])
    with open(root[0], "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    return grpc.secure_channel(target, credentials, options + [("grpc.ssl_target_name_override", host)])


with channel() as gateway:
    echo = gateway.unary_unary("/test.Test/Echo")
    for size in (0, 1, 16_384, 65_536, 3 << 20):
        answer, call = echo.with_call(b"x" * size, timeout=DEADLINE, metadata=(("x-asked", "yes"),))
        assert answer == b"x" * size, f"{len(answer)} of {size} bytes"
        trailers = dict(call.trailing_metadata())
        assert trailers["served-by"] == "backend", trailers
        assert trailers["length-bin"] == b"%d" % size, trailers

    try:
        gateway.unary_unary("/test.Test/Refuse")(b"", timeout=DEADLINE)
        raise AssertionError("a refused call succeeded")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
        assert error.details() == "not today: \u00fc", error

    try:
        gateway.unary_unary("/test.Test/Missing")(b"", timeout=DEADLINE)
        raise AssertionError("a method that is not there answered")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error

    numbers = list(gateway.unary_stream("/test.Test/Count")(b"1000", timeout=DEADLINE))
    assert numbers == [b"%d" % number for number in range(1000)], len(numbers)

    total = gateway.stream_unary("/test.Test/Add")((b"%d" % n for n in range(1000)), timeout=DEADLINE)
    assert total == b"499500", total

    # Each message waits for the answer to the one before, so nothing on the way may hold one back.
    answered = queue.SimpleQueue()

    def questions():
        for number in range(100):
            yield b"%d" % number
            assert answered.get(timeout=DEADLINE) == b"%d" % number

    for answer in gateway.stream_stream("/test.Test/Converse")(questions(), timeout=DEADLINE):
        answered.put(answer)

    calls = [echo.future(b"%d" % number, timeout=DEADLINE) for number in range(200)]
    assert [call.result() for call in calls] == [b"%d" % number for number in range(200)]

    try:
        gateway.unary_unary("/test.Test/Hang")(b"", timeout=0.5)
        raise AssertionError("a call beyond its deadline succeeded")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
