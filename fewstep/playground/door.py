"""Where the page of ``fewstep ui`` listens, and what it takes from those who reach it."""

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# What the page and programs send; gradio has more, of which uploads would fill the disk of whoever runs the page.
_SENT = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/cancel", "/gradio_api/reset")
_WRITTEN = "/gradio_api/deep_link"  # which keeps a file, too
_MOST_BYTES = 1 << 20
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::", "[::]")


class Door:
    """An ASGI middleware around all others, which lets through what the page needs: reading, and short messages to draw
    by, addressed to where the page listens, from nowhere but the page.

    Whoever makes a name of the web lead to this machine (DNS rebinding) has that name in Host; another page has its
    own in Origin. Neither reads anything, and no answer says that it may.

    Args:
        host: the name or address that the page was told to listen on.
    """

    def __init__(self, app: "ASGIApp", host: str) -> None:
        self.app = app
        self.hosts = {*_THIS_MACHINE, host.strip("[]").lower()} | (_names_of_this_machine() if host in _ANY else set())

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status = 404 if scope["type"] != "http" else self._stranger(scope) or _refused(scope)
        if status is None:
            # What fails behind has been answered with 500, and is told again for the terminal.
            with suppress(Exception):
                await self.app(scope, receive, _without_cors(send))
        elif scope["type"] == "websocket":  # of which the page has none
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"the page takes no such thing\n"})

    def _stranger(self, scope: "Scope") -> int | None:
        """The status for a request to another host than the page's, or from another page; None for others."""
        given = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
        hosts, origins = ([value for name, value in given if name == wanted] for wanted in (b"host", b"origin"))
        here = str((scope.get("server") or [""])[0]).lower()  # the address of this machine that was reached
        if len(hosts) != 1 or _name_in(hosts[0]) not in {*self.hosts, here}:
            return 421
        return 403 if any(origin.partition("://")[2] != hosts[0] for origin in origins) else None


@asynccontextmanager
async def opened(app: Any, host: str) -> AsyncIterator[None]:
    """Put the door around an application that starts, before it is reached; what it has of its own lies behind it."""
    app.middleware_stack = Door(app.middleware_stack, host)
    yield


def _without_cors(send: "Send") -> "Send":
    """What lets other pages read an answer is taken out of it."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [(k, v) for k, v in message.get("headers", []) if not k.lower().startswith(b"access-control-")]
            message = {**message, "headers": kept}
        await send(message)

    return sending


def _name_in(host: str) -> str:
    """The name in a Host header, without its port: a page may be reached through a tunnel from another."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.%]+)\]|([^:\[\]]+))(?::\d+)?", host)
    return "" if found is None else found[1] or found[2]


def _names_of_this_machine() -> set[str]:
    return {name.lower() for name in (socket.gethostname(), socket.getfqdn())}


def _refused(scope: "Scope") -> int | None:
    """The HTTP status with which a request is turned away, None for one that is welcome."""
    path, headers = scope["path"], dict(scope["headers"])
    if scope["method"] in ("GET", "HEAD"):
        return 403 if path.startswith(_WRITTEN) else None
    if scope["method"] != "POST" or not path.startswith(_SENT):
        return 403
    # A server holds a body to the length that it is said to have, and one in chunks to none.
    if b"transfer-encoding" in headers or not headers.get(b"content-length", b"").isdigit():
        return 411
    return 413 if int(headers[b"content-length"]) > _MOST_BYTES else None


def check_port(host: str, port: int) -> None:
    """That a page can be served there.

    Raises:
        OSError: a port that is taken, an address that is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(
                f"--host {host} --port {port}: the page cannot be served there ({error}): name another port, or leave "
                "--port out for the first that is free"
            ) from None
