"""Read JSON objects."""

import json
from pathlib import Path

from inferix.errors import DAMAGED, input_errors


def load_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError where ``path`` is missing or no such object."""
    with input_errors(path, OSError, UnicodeDecodeError, hint=DAMAGED):
        text = path.read_text()
    return parse_json(text, path)


def parse_json(text: str, source: Path | str) -> dict:
    """Return ``text`` parsed as a JSON object. Raises InputError, naming ``source``, where it is no such object."""
    with input_errors(source, ValueError, hint="is not a valid JSON object; download it again"):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError
    return content
