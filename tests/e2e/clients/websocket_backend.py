"""A WebSocket server that returns every message; the message `close CODE` makes it close.

    websocket_backend.py ADDRESS PORT
"""

import asyncio
import sys

import websockets


async def serve(connection):
    try:
        async for message in connection:
            if isinstance(message, str) and message.startswith("close "):
                await connection.close(int(message.removeprefix("close ")), "as asked")
            else:
                await connection.send(message)
    except websockets.ConnectionClosedError:
        pass
    print("closed", connection.close_code, flush=True)


async def main(address, port):
    # One protocol of the two that clients offer.
    async with websockets.serve(
        serve, address, int(port), subprotocols=["chat"], max_size=None, backlog=2048, ping_interval=None
    ):
        print("ready", flush=True)
        await asyncio.Future()


asyncio.run(main(*sys.argv[1:]))
