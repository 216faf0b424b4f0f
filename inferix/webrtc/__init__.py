"""Watch a video in a browser while it is being generated, and say what comes next."""

from inferix.webrtc.live import Live, WebRTCConfig

__all__ = ["Live", "WebRTCConfig"]
