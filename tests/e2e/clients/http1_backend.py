"""A backend of HTTP/1.1: answers with what it got, after an early hint or a trailer if asked for.

    http1_backend.py ADDRESS PORT
"""

import asyncio
import hashlib
import sys


async def read_body(reader, headers):
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        while (await reader.readline()).strip():
            pass
        return body
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def exchange(reader, writer):
    request_line = await reader.readline()
    if not request_line:
        return False
    method, path, _ = request_line.decode().split(" ")
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if path == "/refuse":
        # At once. What comes all the same is read, since closing before would reset the connection.
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.write_eof()
        while await reader.read(65_536):
            pass
        return False
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await read_body(reader, headers)
    if path == "/hints":
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
    echoed = "".join(f"{name}: {value}\n" for name, value in headers.items())
    text = f"{method} {path} {len(body)} {hashlib.sha256(body).hexdigest()}\n{echoed}".encode()
    if path == "/trailers":
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n")
        writer.write(b"%x\r\n%s\r\n0\r\nx-sum: 42\r\n\r\n" % (len(text), text))
    else:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text))
        if method != "HEAD":
            writer.write(text)
    await writer.drain()
    return True


async def serve(reader, writer):
    try:
        while await exchange(reader, writer):
            pass
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def main(address, port):
    server = await asyncio.start_server(serve, address, int(port), backlog=512)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
