"""Where the page is served: found wrong before anything is loaded."""

import errno
import socket

from inferix.errors import InputError

ADDRESS_ERRORS = (OSError, OverflowError, UnicodeError)
"""What resolving a host name or binding to an address raises."""


def address_error(host: str, port: int, error: Exception) -> InputError:
    """Return the error that says why the page cannot be served at ``host`` and ``port``."""
    taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    reason = "the port is taken" if taken else "no such address or port here"
    return InputError(
        f"cannot serve the page at {host}:{port}, {reason}: choose others with --webrtc_host and --webrtc_port "
        "(WEBRTC_PORT=...)"
    )


def check_address(host: str, port: int) -> None:
    """Raises InputError where no server can listen at ``host`` and ``port`` now."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                server.bind(address)
    except ADDRESS_ERRORS as error:
        raise address_error(host, port, error) from None
