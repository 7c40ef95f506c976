"""Where the page of ``fewstep ui`` listens, and what it takes from those who reach it."""

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# What the page and programs send; gradio has more, of which uploads would fill the disk of whoever runs the page.
_SENT = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/cancel", "/gradio_api/reset")
_WRITTEN = "/gradio_api/deep_link"  # which keeps a file, too
_MOST_BYTES = 1 << 20


class Door:
    """An ASGI middleware that lets through what the page needs: reading, and short messages to draw by."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        status = _refused(scope) if scope["type"] == "http" else None
        if status is None:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"the page takes no such thing\n"})


def _refused(scope: "Scope") -> int | None:
    """The HTTP status with which a request is turned away, None for one that is welcome."""
    path, headers = scope["path"], dict(scope["headers"])
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return 403 if path.startswith(_WRITTEN) else None
    if not path.startswith(_SENT):
        return 403
    # A server holds a body to the length that it is said to have, and one in chunks to none.
    if b"transfer-encoding" in headers or b"content-length" not in headers:
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
