"""Start a runner: in this process, or as many times as there are GPUs, by ``torchrun``.

    python launch.py RUNNER.py [FLAGS...]

NPROC says how often (default: ULYSSES_SIZE x RING_SIZE where one of them is set, else the GPUs there are). For several
nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each, and there start the same command.
"""

import logging
import os
import runpy
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports


def number(name: str, default: int) -> int:
    """The variable ``name``, empty or not set: ``default``."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        sys.exit(refusal(f"{name} must be a number from 1, not '{text}'"))
    return int(text)


def refusal(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def processes() -> int:
    """How many to start on this machine."""
    if not os.environ.get("NPROC") and not (os.environ.get("ULYSSES_SIZE") or os.environ.get("RING_SIZE")):
        import torch

        return max(1, torch.cuda.device_count())
    nodes = number("NNODES", 1)
    return number("NPROC", max(1, number("ULYSSES_SIZE", 1) * number("RING_SIZE", 1) // nodes))


def torchrun(nproc: int, command: list[str]) -> int:
    """Run ``command`` in ``nproc`` processes here; the exit code of the first one that fails, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.disable(logging.ERROR)  # what it has to say about a process that failed follows here, in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    where = ["--standalone"]
    if (nodes := number("NNODES", 1)) > 1:
        where = [f"--nnodes={nodes}"]
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            where += [f"--{name.lower()}={os.environ[name]}"] if os.environ.get(name) else []
    try:
        run(parse_args([*where, f"--nproc-per-node={nproc}", "--monitor-interval=0.2", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"error: process {rank} of {nproc} was ended by {failure.signal_name()}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def main() -> int:
    runner = sys.argv[1]
    if "RANK" not in os.environ and (nproc := processes()) * number("NNODES", 1) > 1:
        return torchrun(nproc, sys.argv[1:])
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(runner))  # as if Python had been started with it
    runpy.run_path(runner, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
