"""Start a runner: in this process, or as many times as there are GPUs, by ``torchrun``.

    python launch.py RUNNER.py [FLAGS...]

NPROC says how often (default: DATA_PARALLEL x ULYSSES_SIZE x RING_SIZE where one of them is set, else the GPUs there are). For
several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each, and there start the same command.

A runner imports this module first. Where Python was started with that runner, the import checks its flags and paths and
exits if they are wrong, because what the runner imports next, PyTorch among it, takes seconds.
"""

import gc
import glob
import importlib.util
import logging
import os
import runpy
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIGNALS_TO_HANDLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Variable with the signals that torchrun passes on, after which it gives the processes 30 seconds."""
MODELS = {"run_self_forcing_quantized.py": "self_forcing", "run_causvid_quantized.py": "causvid"}


def refuse(message: str) -> None:
    """Exit with 2 and one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def number(name: str, default: int) -> int:
    """Return the variable ``name``, or ``default`` where it is empty or not set."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        refuse(f"{name} must be a number from 1, not '{text}'")
    return int(text)


def check_packages() -> None:
    """Exit where this interpreter lacks what generation needs; nothing is imported to find out."""
    sys.path.insert(1, ROOT)  # behind the program's own folder: a checkout runs without being installed
    if not all(map(importlib.util.find_spec, ("torch", "diffusers", "omegaconf", "yaml"))):
        python = os.path.join(ROOT, ".venv", "bin", "python")
        instead = f"start it with {python}" if os.path.exists(python) else f"run {os.path.join(ROOT, 'setup.sh')} first"
        refuse(f"{sys.executable} lacks what generation needs: {instead}")


def check_flags(runner: str, flags: list, world_size: int = 0) -> bool:
    """Exit where flags of ``runner`` or paths in them are wrong or do not fit ``world_size`` (0: not known), or for --help.

    Return whether the run is a batch, in which the first Ctrl-C lets the processes finish their videos.
    """
    if os.path.basename(runner) not in MODELS:
        return False
    from inferix.cli.preflight import begin_hashing, check_processes, parse_arguments, read_ahead
    from inferix.errors import InputError

    try:
        args = parse_arguments(MODELS[os.path.basename(runner)], flags)
        if world_size:
            check_processes(args, world_size)
    except InputError as error:
        refuse(str(error))
    dax = importlib.util.find_spec("dax")
    folders = dax.submodule_search_locations if dax else None
    if not any(os.path.isdir(os.path.join(folder, "quant", "quantization")) for folder in folders or ()):
        refuse(f"quantization needs DAX: run {os.path.join(ROOT, 'setup.sh')}, or pip install -e 3rd_party/DAX")
    if "RANK" not in os.environ:  # once on a machine
        read_ahead(args)
    if world_size == 1 or "RANK" in os.environ:  # this process generates
        begin_hashing(args, world_size)
    return args.entries is not None


def num_processes() -> int:
    """Return how many processes to start on this machine."""
    if os.environ.get("NPROC"):
        return number("NPROC", 1)
    groups = (os.environ.get("DATA_PARALLEL") or "1").lower()
    if groups != "all" and (groups != "1" or os.environ.get("ULYSSES_SIZE") or os.environ.get("RING_SIZE")):
        sizes = number("DATA_PARALLEL", 1) * number("ULYSSES_SIZE", 1) * number("RING_SIZE", 1)
        return max(1, sizes // number("NNODES", 1))
    if len(glob.glob("/dev/nvidia[0-9]*")) < 2 and not os.path.exists("/dev/dxg"):  # dxg: all GPUs under WSL
        return 1
    import torch

    return max(1, torch.cuda.device_count())  # honours CUDA_VISIBLE_DEVICES


def forward_interrupts() -> None:
    """Pass Ctrl-C on to the processes that torchrun has started, which have sessions of their own, and wait for their end.

    By itself torchrun passes it on too, but kills them after 30 seconds.
    """
    os.environ.setdefault(SIGNALS_TO_HANDLE, "SIGTERM,SIGHUP,SIGQUIT")
    children = f"/proc/self/task/{os.getpid()}/children"

    def forward(*_: object) -> None:
        with open(children) as file:
            pids = file.read().split()
        for pid in pids:
            os.kill(int(pid), signal.SIGINT)
        if not pids:
            os._exit(130)

    if os.path.exists(children):
        signal.signal(signal.SIGINT, forward)


def torchrun(nproc: int, command: list) -> int:
    """Run ``command`` in ``nproc`` processes here; return the exit code of the first one that fails, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.disable(logging.ERROR)  # what it says about a rank that failed follows here, in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    rendezvous = ["--standalone"]
    if (nodes := number("NNODES", 1)) > 1:
        rendezvous = [f"--nnodes={nodes}"]
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            rendezvous += [f"--{name.lower()}={os.environ[name]}"] if os.environ.get(name) else []
    args = parse_args([*rendezvous, f"--nproc-per-node={nproc}", "--monitor-interval=0.2", *command])
    if handled := os.environ.get(SIGNALS_TO_HANDLE):
        args.signals_to_handle = handled  # by which newer versions of torchrun overwrite the variable
    try:
        run(args)
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback
    runner, *flags = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(runner))  # as if Python had been started with it
    check_packages()
    check_flags(runner, flags, int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 0)
    if "RANK" not in os.environ:
        nproc, nodes = num_processes(), number("NNODES", 1)  # may have to import PyTorch
        is_batch = check_flags(runner, flags, nproc * nodes)
        if nproc * nodes > 1:
            if is_batch:
                forward_interrupts()
            return torchrun(nproc, [runner, *flags])
    sys.argv = [runner, *flags]
    sys.modules["launch"] = sys.modules["__main__"]  # checked already
    gc.disable()  # as below
    runpy.run_path(runner, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
check_packages()
if os.path.basename(sys.argv[0]) in MODELS:
    gc.disable()  # a fifth of the imports' time; inferix.cli.main.run enables it again
if check_flags(sys.argv[0], sys.argv[1:], int(os.environ.get("WORLD_SIZE", 1))) and "RANK" in os.environ:
    from inferix.cli.main import handle_signals, interrupt

    interrupt.graceful = True  # another process may be in the middle of a video while this one still loads
    handle_signals()
