"""A gRPC server in clear, of messages that are bytes.

    grpc_backend.py ADDRESS PORT
"""

import sys
from concurrent import futures

import grpc


def echo(request, context):
    context.set_trailing_metadata((("served-by", "backend"), ("length-bin", b"%d" % len(request))))
    return request


def refuse(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today: \u00fc")


def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number


def add(requests, context):
    return b"%d" % sum(int(request) for request in requests)


def converse(requests, context):
    for request in requests:
        yield request


def hang(request, context):
    # Until the client gives up; the call ends with the stream.
    over = futures.Future()
    context.add_callback(lambda: over.set_result(None))
    over.result()
    print("cancelled", flush=True)
    return b""


METHODS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo),
    "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Add": grpc.stream_unary_rpc_method_handler(add),
    "Converse": grpc.stream_stream_rpc_method_handler(converse),
    "Hang": grpc.unary_unary_rpc_method_handler(hang),
}

address, port = sys.argv[1:]
server = grpc.server(futures.ThreadPoolExecutor(16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", METHODS),))
assert server.add_insecure_port(f"{address}:{port}") == int(port)
server.start()
print("ready", flush=True)
server.wait_for_termination()
