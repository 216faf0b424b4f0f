"""Who may use a page: requests with its token, or, without one, those that come from the page itself."""

import hmac
import html
import ipaddress
import socket

from aiohttp import web
from yarl import URL

COOKIE_SECONDS = 30 * 24 * 3600
LOGIN_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
LOGIN_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Inferix live</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ display: grid; place-content: center; min-height: 90vh; font: 16px/1.5 system-ui, sans-serif; }}
  input, button {{ font: inherit; padding: 8px 12px; }}
</style>
<form action="./">
  <p><label for="token">{message}</label></p>
  <p><input id="token" name="token" type="password" autocomplete="current-password" required autofocus> <button>Open</button></p>
</form>
"""


class Access:
    """Decide about requests.

    Args:
        token: what a request must have, as ``Authorization: Bearer TOKEN``, ``?token=TOKEN`` or in the cookie that the page
            then gets; None: any request may pass that does not come from somebody else's page.
        host: name that the page is served at, beside those of this machine.
    """

    def __init__(self, token: str | None, host: str):
        self.token, self.host = token, host

    def check(self, request: web.Request) -> None:
        """Raises a client error where ``request`` may not pass."""
        origin = request.headers.get("Origin")
        # Without a token a name that somebody else's DNS has pointed at this machine would let their pages in.
        known = self.token is not None or self._is_own_name(request.host)
        if not known or (origin is not None and origin.partition("://")[2] != request.host):
            raise web.HTTPForbidden(text="this server takes requests from its own page only")
        if self.token is not None and not any(map(self._is_token, self._given(request))):
            raise self._unauthorized(request)

    def sign_in(self, request: web.Request) -> web.Response | None:
        """Return the answer to a request for the page with ``?token=``: a cookie, and the page's address without it."""
        if self.token is None or "token" not in request.query:
            return None
        response = web.Response(status=303, headers={"Location": "./"})
        response.set_cookie(
            self._cookie(request), self.token, max_age=COOKIE_SECONDS, httponly=True, samesite="Lax", path="/"
        )
        return response

    def _given(self, request: web.Request) -> list[str]:
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        given = [request.query.get("token"), request.cookies.get(self._cookie(request))]
        return [value for value in [*given, credentials if scheme.lower() == "bearer" else None] if value]

    def _is_token(self, value: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(value.encode(errors="replace"), self.token.encode())

    def _cookie(self, request: web.Request) -> str:
        """Return the cookie's name. Cookies are shared by all ports of a machine, so it has the port in it."""
        return f"inferix_token_{request.url.port or 0}"

    def _unauthorized(self, request: web.Request) -> web.HTTPException:
        headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"}
        if request.path != "/" or "text/html" not in request.headers.get("Accept", ""):
            return web.HTTPUnauthorized(text="this server needs its token (WEBRTC_TOKEN)", headers=headers)
        message = (
            "That is not the token. Token:" if "token" in request.query else "Token of this server (WEBRTC_TOKEN):"
        )
        headers["Content-Security-Policy"] = LOGIN_POLICY
        page = LOGIN_PAGE.format(message=html.escape(message))
        return web.HTTPUnauthorized(text=page, content_type="text/html", headers=headers)

    def _is_own_name(self, host: str) -> bool:
        try:
            name = URL(f"http://{host}").host or ""
            if name in ("localhost", self.host, socket.gethostname()):
                return True
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return False
