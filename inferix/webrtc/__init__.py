"""A page on which a video is watched and steered while it is generated.

``session.Session`` is what the generating thread and the page share; ``server.serve`` opens the page.
"""
