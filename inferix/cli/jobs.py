"""The videos that a run makes: which, in which order, and by which process.

Whatever decides that (samples, prompt files, typed prompts, the web page, several processes) is decided here; a runner
iterates ``jobs`` and streams each.
"""

import os
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from inferix.cli.batch import Batch
from inferix.cli.main import interrupt, rank
from inferix.cli.planner import Job, Planner
from inferix.cli.record import Recorder
from inferix.cli.report import Report, quantization_name
from inferix.errors import InputError
from inferix.pipelines.pipeline import Pipeline
from inferix.runtime.startup import STARTUP
from inferix.webrtc.session import Session, WebRTCConfig


def webrtc_session(args: Namespace) -> AbstractContextManager[Session | None]:
    """Return a context that serves the web page with ``--enable_webrtc``, from rank 0; its value is None otherwise."""
    if not args.enable_webrtc or rank() > 0:
        return nullcontext()
    try:
        from inferix.webrtc.server import serve
    except ImportError as error:
        raise InputError(f"streaming needs aiortc and aiohttp ({error}): run ./setup.sh") from None
    token = os.environ.get("WEBRTC_TOKEN") or None  # no flag: everybody on a machine can see a process's flags
    return serve(WebRTCConfig(args.webrtc_host, args.webrtc_port, args.webrtc_exit, args.webrtc_wait, token))


def jobs(args: Namespace, pipeline: Pipeline, session: Session | None = None) -> Iterator[Job]:
    """Yield every video to generate: those of the flags, and with a ``session`` those that are asked for on its page.

    Prints each file when it is complete, which may be while the next job is generated, and the report after the last. Of a
    batch (a prompt file, or data parallelism) only those that this process's group is to make are yielded. Ranks other than
    a group's main process take part in what that generates, and get no jobs.
    """
    if not pipeline.is_main_process:
        interrupt.graceful = args.entries is not None
        pipeline.worker_loop()
        return
    if getattr(args, "enable_profiling", False):
        pipeline.stage_seconds = {}
    STARTUP.mark("quantization")
    report, recorder = Report(args, pipeline), Recorder(args, pipeline)
    if args.entries is not None:
        yield from Batch(args, pipeline, recorder, report).jobs()
        return
    planner = Planner(args, pipeline, recorder, session)
    planned = planner.from_flags()
    if session is not None:
        session.ready(quantization_name(args), report.bytes_after, planner.read_image)
        STARTUP.mark("viewer")
        planned = session.clips(planned, planner.from_prompt)
    generated: deque[Job] = deque()
    try:
        for job in planned:
            yield job
            generated.append(job)
            while len(generated) > (1 if session is None else 0):  # the page offers a file before it waits for a prompt
                report.add(generated.popleft())
    finally:
        while generated:
            report.add(generated.popleft())
    report.print()
    if session is not None and session.problem is not None:
        raise InputError(f"a file is missing: {session.problem}")
