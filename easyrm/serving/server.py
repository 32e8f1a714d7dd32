"""The process around the application: one socket, one event loop, and a stop in good order."""

import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from easyrm.distributed import say
from easyrm.errors import InputError
from easyrm.serving.app import Limits, make_app
from easyrm.serving.batcher import Batcher, Scorer


def run_server(open_scorer: Callable[[], Scorer], *, host: str, port: int, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in flight; a second signal ends the process at once.

    Listens before the model is loaded. Raises InputError where it cannot listen, and what `open_scorer` raises.
    """
    sock = _listen(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    batcher = Batcher(open_scorer, max_batch=limits.max_batch, max_queue=limits.max_queue)

    def ready(scorer: Scorer) -> None:
        say(f"ready: {scorer.name} at {url}, conversations of at most {scorer.max_length} tokens")

    def failed() -> None:
        server.should_exit = True

    app = make_app(batcher, limits, ready, failed)
    # One implementation of HTTP, whatever else is installed; what is wrong goes to stderr, requests nowhere.
    server = _Server(uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False))
    say(f"listening at {url}; loading the model")
    server.run(sockets=[sock])
    if batcher.failure is not None:
        raise batcher.failure
    say(f"stopped after {batcher.counts['requests']} requests in {batcher.counts['batches']} batches")
    if batcher.scorer is None:
        # Python would wait for a program that is still being compiled, and XLA may crash where it was interrupted.
        sys.stdout.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame) -> None:
        """A stop that was asked for is a success: the signal is not raised again at the end, as uvicorn would."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True  # first: a second signal may come while this one is being told
        print(f"easyrm: {signal.Signals(sig).name}: finishing what is in flight", file=sys.stderr, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address
        raise InputError(
            f"--host={host} --port={port}: cannot listen ({reason}); choose another port, or an address of this machine"
        ) from error
