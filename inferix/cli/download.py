"""Fetch public weights; ``weights/download.sh`` runs it. Needs huggingface_hub only where something is to be fetched."""

import shutil
import sys
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from inferix.cli.presets import DOWNLOADS, RemoteFile

DEFAULT = ("self_forcing", "causvid")


def wanted_files(names: list[str]) -> list[RemoteFile]:
    """Return the files of all ``names``, each once. Exits with 2 for an unknown name."""
    if unknown := [name for name in names if name not in DOWNLOADS]:
        print(f"error: unknown: {' '.join(unknown)}; there are {', '.join(DOWNLOADS)}", file=sys.stderr)
        sys.exit(2)
    return list(dict.fromkeys(file for name in names for file in DOWNLOADS[name]))


def fetch(file: RemoteFile, weights: Path) -> None:
    """Fetch one file, continuing an interrupted download."""
    if file.url is not None:
        fetch_url(file.url, file.path(weights))
        return
    from huggingface_hub import hf_hub_download

    top = file.path(weights).parents[len(Path(file.name).parts) - 1]
    hf_hub_download(file.repo, file.name, local_dir=top)


def fetch_url(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``, which appears when it is complete; until then it is ``path`` with ``.partial``."""
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = partial.stat().st_size if partial.exists() else 0
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=60)
    except HTTPError as error:
        if error.code != 416 or not done:  # 416: there is nothing after these bytes
            raise
    else:
        with response, partial.open("ab" if response.status == 206 else "wb") as target:
            shutil.copyfileobj(response, target)
            if response.length:  # http.client counts down what is still to come
                raise URLError(f"the connection to {url} was lost")
    partial.replace(path)


def main(weights: Path, words: list[str]) -> None:
    """Print which files are present, and without ``--dry-run`` fetch the missing ones."""
    missing = []
    for file in wanted_files([word for word in words if word != "--dry-run"] or list(DEFAULT)):
        path = file.path(weights)
        state = "there" if path.exists() else f"{file.gigabytes:.1f} GB" if file.gigabytes >= 0.05 else "small"
        print(f"{state:>8}  {file.repo}  {file.name} -> weights/{path.relative_to(weights)}", flush=True)
        if not path.exists():
            missing.append(file)
    need, free = sum(file.gigabytes for file in missing), shutil.disk_usage(weights).free / 1e9
    print(f"to fetch: {need:.1f} GB; free here: {free:.1f} GB")
    if "--dry-run" in words or not missing:
        return
    if need > free:
        sys.exit("error: the disk has too little room; name what to fetch, or link weights/ to another disk")
    try:
        for file in missing:
            fetch(file, weights)
    except ImportError:
        sys.exit("error: huggingface_hub is not installed: run ./setup.sh first")
    except KeyboardInterrupt:
        sys.exit("stopped: run it again to go on")
    except Exception as error:
        sys.exit(f"error: {str(error).splitlines()[0]} (run it again to go on where it stopped)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
