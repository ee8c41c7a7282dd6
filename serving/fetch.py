"""From the address of a picture to its bytes: data URLs always, the network only where it is allowed.

What it teaches: a server that fetches what strangers name can be made to ask *its own* neighbours:
the machine itself, the cloud's key service, the router. So no address is followed unless the operator
says `--allow-remote`; and then a host is looked up once, every one of its addresses must be public, and
the connection goes to the very address that was checked (a second look-up could answer otherwise). No
redirect is followed, no name in a file system is ever read.

    data:image/png;base64,iVBOR...    -> bytes
    https://host/cat.png              -> ApiError, or with allow_remote: look up, check, connect, read
    file:///etc/passwd, ftp:, ...     -> ApiError

Our choice: 10 seconds to connect, 10 for all that follows; 16 MiB.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urlsplit

from serving.protocol import Address, refused

SECONDS = 10.0
LARGEST = 16 << 20  # bytes
BLOCK = 1 << 16
DATA_URL = re.compile(r"data:(image/[\w.+-]+)?(;[\w.+=-]+)*;base64,", re.ASCII)


def picture_bytes(address: Address, allow_remote: bool = False) -> bytes:
    """The bytes at an address of a request. Raises ApiError."""
    url = address.url
    head = DATA_URL.match(url)
    if head:
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise refused(address.param, "the base64 is broken", "image_parse_error") from None

    scheme = url[:100].partition(":")[0].lower()
    if scheme not in ("http", "https"):
        what = "a data URL is wanted: data:image/png;base64,..."
        raise refused(address.param, what, "invalid_image_url")
    if not allow_remote:
        what = "this server follows no addresses: send the picture as a data URL"
        raise refused(address.param, what, "invalid_image_url")
    try:
        return remote_bytes(urlsplit(url))
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = f"it cannot be fetched ({type(error).__name__})"
        raise refused(address.param, what, "invalid_image_url") from None


def remote_bytes(url: SplitResult) -> bytes:
    """One GET of a public host. Raises ValueError, OSError or HTTPException."""
    secure = url.scheme == "https"
    host = url.hostname or ""
    port = url.port or (443 if secure else 80)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if not path.isascii() or not path.isprintable() or " " in path:
        raise ValueError("characters that must be encoded")

    # to the address that was checked; the certificate must be the host's
    connected = socket.create_connection((public_address(host, port), port), timeout=SECONDS)
    connection = http.client.HTTPConnection(host, port)
    alarm = None
    try:
        if secure:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        connection.sock = connected

        # the time limit of a socket is for each byte: a head that drips would take hours
        deadline = time.monotonic() + SECONDS
        alarm = threading.Timer(SECONDS, hang_up, (connected,))
        alarm.daemon = True
        alarm.start()
        connection.request("GET", path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        return bounded_read(response, deadline)
    finally:
        if alarm is not None:
            alarm.cancel()
        connected.close()
        connection.close()


def hang_up(connected: socket.socket) -> None:
    """End a connection on which another thread waits; whoever reads it finds its end."""
    try:
        # of the bare socket: TLS says no farewell to one that is slow
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def public_address(host: str, port: int) -> str:
    """An address of the host. Raises ValueError unless all that it has are public."""
    found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for text in found:
        place = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(place, "ipv4_mapped", None) or place
        if not inner.is_global or inner.is_multicast:
            raise ValueError("not a public address")
    return sorted(found)[0]


def bounded_read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. Raises ValueError when it is too large, or comes too slowly."""
    body = b""
    while block := response.read1(BLOCK):
        body += block
        if len(body) > LARGEST:
            raise ValueError("too large")
    if time.monotonic() >= deadline:
        raise ValueError("too slow")
    return body
