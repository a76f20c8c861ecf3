"""The network between one supervisor and the replica set: it can be cut, delayed and reset.

A cut link behaves as a cut cable does: nothing is lost from the sender's view, nothing arrives, nobody is told; what
was sent arrives when the link is whole again, unless a side gave up meanwhile. One thread serves all links.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from threading import Thread
from typing import Any

_CHUNK = 65_536


class Link:
    """One supervisor's way to one mongod."""

    def __init__(self, listening: socket.socket, port: int) -> None:
        self._listening = listening
        self._port = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._delay_seconds = 0.0
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self) -> None:
        self._listening.setblocking(False)
        self._server = await asyncio.start_server(self._connected, sock=self._listening)

    async def close(self) -> None:
        self._server.close()
        await self.reset()

    async def set(self, *, whole: bool = True, delay_seconds: float = 0.0) -> None:
        self._delay_seconds = delay_seconds
        if whole:
            self._whole.set()
        else:
            self._whole.clear()

    async def reset(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._whole.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._writers.add(far_writer)
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._writers -= pair
        for end in pair:
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self._delay_seconds:
                    await asyncio.sleep(self._delay_seconds)
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


class Network:
    """All links, and the thread that serves them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._links: list[Link] = []
        self._thread = Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def add(self, listening: socket.socket, port: int) -> Link:
        async def make() -> Link:
            link = Link(listening, port)
            await link.serve()
            self._links.append(link)
            return link

        return asyncio.run_coroutine_threadsafe(make(), self._loop).result(10)

    def do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(10)

    def close(self) -> None:
        async def cancel() -> None:
            for link in self._links:
                await link.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # aborted connections close in the next turn

        self.do(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
