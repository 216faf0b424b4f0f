"""Names for files. Imports nothing heavy."""

import re


def safe_file_name(prompt: str, limit: int = 80) -> str:
    """Return ``prompt`` as a file name without a suffix: letters, digits and dashes of any script.

    The name has at most ``limit`` bytes in UTF-8; it is "video" if nothing else is left.
    """
    name = re.sub(r"[^\w]+", "-", prompt).strip("-_").encode()[:limit]
    return name.decode(errors="ignore").strip("-_") or "video"
