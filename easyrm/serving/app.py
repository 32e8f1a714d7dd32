"""The routes, POST /score and GET /health; every other answer is {"error": one line}."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from easyrm.errors import InputError, one_line
from easyrm.redact import redact
from easyrm.serving.batcher import Batcher, ModelFailed, QueueFull, Scorer
from easyrm.serving.requests import Refused, conversations_of

BODY_SECONDS = 60.0
_GONE = 499  # what nobody receives


@dataclasses.dataclass(frozen=True)
class Limits:
    """Conversations computed at once, waiting, and of one request; megabytes (2**20 bytes) of its body."""

    max_batch: int = 256
    max_queue: int = 4096
    max_inputs: int = 1024
    max_body_mb: int = 64

    def __post_init__(self):
        if self.max_inputs > self.max_queue:
            raise InputError(
                f"--max_inputs={self.max_inputs} is above --max_queue={self.max_queue}: such a request would never be "
                "taken; raise --max_queue"
            )


def make_app(
    batcher: Batcher, limits: Limits, ready: Callable[[Scorer], None], failed: Callable[[], None]
) -> Starlette:
    """The application; its lifespan is that of the batcher, which calls one of `ready` and `failed` once."""
    # Requests are read in one thread: a long text holds up neither the devices nor /health.
    reader = ThreadPoolExecutor(1, "reader")

    @contextlib.asynccontextmanager
    async def lifespan(_):
        batcher.start(ready, failed)
        yield
        batcher.close()
        reader.shutdown()

    async def score(request: Request) -> Response:
        scorer = _loaded(batcher)
        body = await _read(request, limits.max_body_mb * 2**20)
        lengths = {"max_length": scorer.max_length, "max_inputs": limits.max_inputs}
        read = functools.partial(conversations_of, body, scorer.tokenizer, **lengths)
        conversations = await asyncio.get_running_loop().run_in_executor(reader, read)
        try:
            rewards = await _unless_gone(request, asyncio.wrap_future(batcher.submit(conversations)))
        except QueueFull as error:
            raise Refused(503, f"{error} (--max_queue); send the request later", {"Retry-After": "1"}) from error
        except ModelFailed as error:
            raise Refused(500, str(error)) from error
        return JSONResponse({"rewards": rewards})

    async def health(_: Request) -> Response:
        scorer = _loaded(batcher)
        counts = {**scorer.counts, **batcher.counts, "waiting": batcher.waiting}
        state = {"status": "ok", "model": redact(scorer.name), "max_length": scorer.max_length}
        return JSONResponse({**state, "normalized": scorer.normalization is not None, "counts": counts})

    routes = [Route("/score", score, methods=["POST"]), Route("/health", health, methods=["GET"])]
    handlers = {Refused: _refused, HTTPException: _no_route, ClientDisconnect: _gone, Exception: _defect}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _loaded(batcher: Batcher) -> Scorer:
    if batcher.scorer is None:
        raise Refused(503, "the model is being loaded; ask again when /health says ok", {"Retry-After": "5"})
    return batcher.scorer


async def _read(request: Request, limit: int) -> bytes:
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                # Read to its end even if it is refused: a client that still sends would not see the answer.
                if size <= limit:
                    body += chunk
    except TimeoutError as error:
        message = f"the body did not arrive within {BODY_SECONDS:g} s; send the request again"
        raise Refused(408, message, {"Connection": "close"}) from error
    if size > limit:
        raise Refused(413, f"the body is above {limit // 2**20} MB (--max_body_mb); send fewer conversations a request")
    return bytes(body)


async def _unless_gone(request: Request, rewards: asyncio.Future[list[float]]) -> list[float]:
    """What `rewards` will be. Cancels it, and raises ClientDisconnect, where the client is gone before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({rewards, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not rewards.done():
            rewards.cancel()
            raise ClientDisconnect
        return rewards.result()
    finally:
        leaving.cancel()


def _answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


async def _refused(_: Request, error: Refused) -> Response:
    return _answer(error.status, str(error), error.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = "no such path" if error.status_code == 404 else error.detail
    message = f"{request.method} {request.url.path}: {what}; there are POST /score and GET /health"
    return _answer(error.status_code, message, error.headers)


async def _gone(*_) -> Response:
    return Response(status_code=_GONE)


async def _defect(_: Request, error: Exception) -> Response:
    return _answer(500, f"the server failed ({redact(one_line(error))}); see its log")
