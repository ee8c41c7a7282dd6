"""Connections with deadlines: a client that is slow or silent holds nobody up.

What it teaches: a server is stopped by those who do nothing. Somebody who opens connections and sends a
letter a minute, or asks for much and never reads it, costs no work, only places. uvicorn waits for such
people for ever; here a connection has a deadline wherever it is the client's turn.

    client's turn                                     ends
    the head of a request: from its first byte, or    `patience` seconds later, aborted
        from the opening of the connection
    reading what was sent, once 64 KiB wait for it    the same, unless enough was read in between
    the body of a request                             `read_body` (api.py): patience, and 64 KiB a second
    between two requests                              uvicorn's own five seconds

An aborted connection looks to everything above like a client that left: its rows leave the batch.

    uvicorn.Config(app, http=partial(PatientProtocol, patience=30, most=200), ...)
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """One connection. patience: seconds of a deadline; most: connections of the server, any more are
    closed at once."""

    def __init__(self, *arguments: Any, patience: float, most: int, **named: Any):
        super().__init__(*arguments, **named)
        self.patience = patience
        self.most = most
        self.alarms: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self.set_alarm("head")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.clear_alarm("head")
        elif "head" not in self.alarms:
            self.set_alarm("head")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.set_alarm("reading")

    def resume_writing(self) -> None:
        super().resume_writing()
        self.clear_alarm("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        self.clear_alarm("head")
        self.clear_alarm("reading")
        super().connection_lost(exc)

    def set_alarm(self, name: str) -> None:
        self.clear_alarm(name)
        self.alarms[name] = self.loop.call_later(self.patience, self.transport.abort)

    def clear_alarm(self, name: str) -> None:
        alarm = self.alarms.pop(name, None)
        if alarm is not None:
            alarm.cancel()
