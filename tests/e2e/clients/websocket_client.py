"""WebSockets through the gateway; ends with 0 if all was echoed and closed as it had to be.

    websocket_client.py ADDRESS PORT HOST [ROOT_CERTIFICATE]
"""

import asyncio
import ssl
import sys

import websockets

address, port, host, *root = sys.argv[1:]


def connect(**options):
    context = ssl.create_default_context(cafile=root[0]) if root else None
    scheme = "wss" if root else "ws"
    options = {"ssl": context, "server_hostname": host, **options} if root else options
    url = f"{scheme}://{host}/socket"
    return websockets.connect(
        url,
        host=address,
        port=int(port),
        subprotocols=["other", "chat"],
        max_size=None,
        ping_interval=None,
        proxy=None,
        **options,
    )


async def echoes():
    async with connect() as connection:
        assert connection.subprotocol == "chat", connection.subprotocol
        for message in ("", "text: \u00fc\u20ac", b"", bytes(range(256)), b"x" * 65_536, "y" * (4 << 20)):
            await connection.send(message)
            answer = await connection.recv()
            assert answer == message, f"{len(answer)} of {len(message)}"
        # A message in three fragments.
        await connection.send(iter(["one ", "two ", "three"]))
        assert await connection.recv() == "one two three"
        for _ in range(10):
            await (await connection.ping(b"are you there"))
        await connection.close(4001, "done")
        assert connection.close_code == 4001, connection.close_code


async def closed_by_the_server(code):
    async with connect() as connection:
        await connection.send(f"close {code}")
        try:
            await connection.recv()
            raise AssertionError("the connection stayed open")
        except websockets.ConnectionClosed:
            pass
        assert (connection.close_code, connection.close_reason) == (code, "as asked")


async def main():
    await echoes()
    for code in (1000, 1001, 1011, 3000, 4999):
        await closed_by_the_server(code)
    await asyncio.gather(*(echoes() for _ in range(10)))


asyncio.run(main())
