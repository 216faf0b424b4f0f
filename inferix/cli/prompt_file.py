"""Prompt files: one video for each line or row, read and checked whole before anything is loaded."""

import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from inferix.errors import InputError

COLUMNS = {
    "self_forcing": ("prompt", "id", "extended_prompt", "seed", "image", "num_output_frames"),
    "causvid": ("prompt", "id", "extended_prompt", "seed"),
}
"""Columns of a CSV file and keys of a JSON line, by model."""
DEFAULT_FRAMES = {False: 21, True: 19}
"""Latent frames of a Self-Forcing video, without and with an image."""
MAX_LINE_BYTES = 2**16
"""Of a line in a prompt file. The text encoder reads 512 tokens, some 3 kB, of a prompt."""
MAX_ID_BYTES = 200
"""Of an id, so that it and what the writer adds to it fit into a file name's 255."""


@dataclass(frozen=True)
class PromptEntry:
    """One video that is asked for; with ``--num_samples`` several."""

    prompt: str
    id: str | None = None
    """The file's name; None: made of the prompt."""
    extended_prompt: str | None = None
    """What the model is given in place of ``prompt``."""
    seed: int | None = None
    image: Path | None = None
    num_output_frames: int | None = None
    line: int = 0
    """Where it is in the file, from 1."""

    @property
    def model_prompt(self) -> str:
        return self.extended_prompt or self.prompt


def read_prompt_file(path: Path, columns: tuple[str, ...], extended_path: Path | None = None) -> list[PromptEntry]:
    """Return the entries of a prompt file.

    Args:
        path: ``.jsonl``: an object a line; ``.csv``: a header and a row for each video; any other: a prompt a line.
        columns: those that a CSV or JSON Lines file may have.
        extended_path: a text file with the extended prompt of each line of ``path``, then a text file as well.

    Raises:
        InputError: names file and line where one of them is malformed, empty, too long or not UTF-8, where an id appears
            twice, and where an image does not exist.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        rows = list(_read_json_lines(path))
    elif suffix == ".csv":
        rows = list(_read_csv(path, columns))
    else:
        rows = [(number, {"prompt": text}) for number, text in _read_text(path)]
    if not rows:
        raise InputError(f"prompt file {path} holds no prompt")
    if extended_path:
        if suffix in (".jsonl", ".json", ".csv"):
            raise InputError(f"EXTENDED_PROMPT_FILE goes with a text file; {path} has a column extended_prompt for it")
        extended = [text for _, text in _read_text(extended_path)]
        if len(extended) != len(rows):
            raise InputError(f"{extended_path} has {len(extended)} lines and {path} {len(rows)}: one for each prompt")
        rows = [(number, row | {"extended_prompt": text}) for (number, row), text in zip(rows, extended)]
    entries = [_entry(path, number, row, columns) for number, row in rows]
    first: dict[str, int] = {}
    for entry in entries:
        if entry.id is not None and first.setdefault(entry.id, entry.line) != entry.line:
            _refuse(path, entry.line, f"the id {entry.id!r} is that of line {first[entry.id]} already")
    return entries


def with_defaults(args: Namespace, entries: list[PromptEntry]) -> list[PromptEntry]:
    """Return the entries with seed, image and length set, to those of the flags where the file says nothing."""
    complete = []
    for entry in entries:
        entry = replace(entry, seed=args.seed if entry.seed is None else entry.seed)
        if args.model == "self_forcing":
            image = entry.image or args.image_path
            frames = DEFAULT_FRAMES[image is not None] if args.default_frames else args.num_output_frames
            entry = replace(entry, image=image, num_output_frames=entry.num_output_frames or frames)
        complete.append(entry)
    return complete


def entry_args(args: Namespace, entry: PromptEntry) -> Namespace:
    """Return the flags of a run that makes ``entry`` alone."""
    flags = {**vars(args), "seed": entry.seed, "prompts": [entry.model_prompt]}
    if args.model == "self_forcing":
        flags |= {"image_path": entry.image, "i2v": entry.image is not None}
        flags |= {"num_output_frames": entry.num_output_frames}
    return Namespace(**flags)


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise InputError(f"{path}, line {line}: {what}")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line, its end included."""
    if path.exists() and not path.is_file():
        raise InputError(f"prompt file {path} is not a file; every process reads it, so a pipe does not do either")
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    _refuse(path, number, f"it is longer than {MAX_LINE_BYTES // 1024} kB: is this a list of prompts?")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    _refuse(path, number, "it is not UTF-8: save the file in that encoding")
                if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
                    _refuse(path, number, "it has control characters: is this a list of prompts?")
                yield number, text
    except OSError as error:
        raise InputError(f"prompt file {path} cannot be read: {error.strerror}") from None


def _read_text(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and content of every line. Empty lines may come at the end only."""
    empty = None
    for number, text in _read_lines(path):
        if not text.strip():
            empty = empty or number
        elif empty:
            _refuse(path, empty, "it is empty: remove it, or write a prompt")
        else:
            yield number, text.strip()


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in _read_text(path):
        try:
            row = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            _refuse(path, number, f"it is not a JSON object on one line ({reason})")
        if not isinstance(row, dict):
            _refuse(path, number, 'it is not a JSON object: write {"prompt": "…"}')
        yield number, row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Return the object of ``pairs``. Raises ValueError where a key appears twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key appears twice")
    return row


def _read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield the first line's number and the cells of every row; an empty cell counts as not there."""
    reader = csv.reader((text for _, text in _read_lines(path)), strict=True)
    header: list[str] | None = None
    empty, start = None, 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                empty = empty or number
            elif empty:
                _refuse(path, empty, "it is empty: remove it, or write a prompt")
            elif header is None:
                header = [cell.strip() for cell in cells]
                if "prompt" not in header or len(set(header)) < len(header):
                    _refuse(path, number, f"it must name the columns, once each, prompt and any of {_others(columns)}")
            elif len(cells) != len(header):
                _refuse(path, number, f"{len(cells)} cells for {len(header)} columns: quote a cell that has a comma")
            else:
                yield number, {name: cell for name, cell in zip(header, cells) if cell.strip()}
    except csv.Error as error:
        _refuse(path, start, f"it is not CSV: {error}")


def _others(columns: tuple[str, ...]) -> str:
    return ", ".join(column for column in columns if column != "prompt")


def _entry(path: Path, line: int, row: dict, columns: tuple[str, ...]) -> PromptEntry:
    """Return a checked entry. Raises InputError that names file and line."""
    if unknown := [name for name in row if name not in columns]:
        _refuse(path, line, f"there is no column {unknown[0]!r} here; the columns are {', '.join(columns)}")
    row = {name: value for name, value in row.items() if value is not None}
    try:
        entry = PromptEntry(
            prompt=_text(row.get("prompt", ""), "prompt"),
            id=_id(row["id"]) if "id" in row else None,
            extended_prompt=_text(row["extended_prompt"], "extended_prompt") if "extended_prompt" in row else None,
            seed=_number(row["seed"], "seed", 0) if "seed" in row else None,
            image=path.parent / _text(row["image"], "image") if "image" in row else None,
            num_output_frames=_number(row["num_output_frames"], "num_output_frames", 1)
            if "num_output_frames" in row
            else None,
            line=line,
        )
    except ValueError as error:
        _refuse(path, line, str(error))
    if entry.image and not entry.image.is_file():
        _refuse(path, line, f"the image {entry.image} was not found (paths are relative to the prompt file)")
    return entry


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"the {name} is empty" if value in ("", None) or isinstance(value, str) else f"{name} must be text"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half a surrogate pair (\\ud800 to \\udfff)") from None
    return value.strip()


def _id(value: Any) -> str:
    """Return an id, which becomes a file name as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = _text(value, "id")
    if "/" in name or name.startswith(".") or not name.isprintable() or len(name.encode()) > MAX_ID_BYTES:
        raise ValueError(
            f"the id becomes a file name: it may have no /, no . at its beginning, no control characters and at most "
            f"{MAX_ID_BYTES} bytes"
        )
    return name


def _number(value: Any, name: str, smallest: int) -> int:
    """Return a whole number from ``smallest`` to 2**63 - 1, of JSON or of a CSV cell."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 30:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**63:
        raise ValueError(f"{name} must be a whole number from {smallest}, not {str(value)[:40]!r}")
    return value
