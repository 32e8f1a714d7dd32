"""One thread that owns the devices, and the queue before it: what arrives while they compute is scored together."""

import dataclasses
import math
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from easyrm.data.conversations import Conversation
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import one_line
from easyrm.redact import redact


class Scorer(Protocol):
    """What the server needs of easyrm.scoring.scorer.Scorer; `score` is called from one thread only."""

    name: str
    tokenizer: Tokenizer
    max_length: int
    batch_tokens: int
    normalization: object | None
    counts: Counter

    def score(self, conversations: list[Conversation]) -> list[float]:
        """The reward of each, in order."""


class QueueFull(Exception):
    """No room for so many conversations now; the message says how many wait."""


class ModelFailed(Exception):
    """A batch could not be computed, or gave rewards that are no numbers; the message is one line."""


@dataclasses.dataclass(eq=False)
class _Job:
    """One request: the first `taken` of its conversations are computed or being computed."""

    conversations: list[Conversation]
    rewards: Future[list[float]] = dataclasses.field(default_factory=Future)
    found: list[float] = dataclasses.field(default_factory=list)
    taken: int = 0


class Batcher:
    """Scores jobs in the order of their arrival, at most `max_batch` conversations at once; `max_queue` may wait.

    `scorer` is None until the model is loaded and warmed up; `failure` is what prevented that. `counts`, which grow:
    `requests` and `conversations` accepted, `batches` computed, `failed_batches`, `abandoned` conversations, whose
    clients were gone before their turn came.
    """

    def __init__(self, open_scorer: Callable[[], Scorer], *, max_batch: int, max_queue: int):
        self.scorer: Scorer | None = None
        self.failure: Exception | None = None
        self.counts = Counter(requests=0, conversations=0, batches=0, failed_batches=0, abandoned=0)
        self._open, self._max_batch, self._max_queue = open_scorer, max_batch, max_queue
        self._pending: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False

    def start(self, ready: Callable[[Scorer], None], failed: Callable[[], None]) -> None:
        """Load and warm up the model, in the thread; then one of the two is called there."""
        self._thread = threading.Thread(target=self._run, args=(ready, failed), name="devices", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what waits and end the thread. A model that is still being loaded is not waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.scorer is not None:
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Conversations that no batch has taken yet."""
        with self._changed:
            return self._waiting()

    def submit(self, conversations: list[Conversation]) -> Future[list[float]]:
        """Their rewards, once computed, or ModelFailed; cancelled before its turn, it is not computed.

        Raises QueueFull.
        """
        job = _Job(conversations)
        with self._changed:
            waiting = self._waiting()
            if waiting + len(conversations) > self._max_queue:
                raise QueueFull(f"{waiting} conversations wait, and {self._max_queue} may")
            self.counts["requests"] += 1
            self.counts["conversations"] += len(conversations)
            self._pending.append(job)
            self._changed.notify()
        return job.rewards

    def _waiting(self) -> int:
        return sum(len(job.conversations) - job.taken for job in self._pending if not job.rewards.done())

    def _run(self, ready: Callable[[Scorer], None], failed: Callable[[], None]) -> None:
        try:
            scorer = self._open()
            warm_up(scorer)
        except Exception as error:
            self.failure = error
            failed()
            return
        self.scorer = scorer
        ready(scorer)
        while parts := self._next_batch():
            self._compute(parts)

    def _next_batch(self) -> list[tuple[_Job, list[Conversation]]]:
        """What is computed next, part by part; a job too large is taken piece by piece. Empty: all is done."""
        parts, room = [], self._max_batch
        with self._changed:
            while not parts:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return []
                while self._pending and room:
                    job = self._pending[0]
                    if job.rewards.done() and not job.rewards.cancelled():  # its first part failed
                        self._pending.popleft()
                        continue
                    if not job.taken and not job.rewards.set_running_or_notify_cancel():
                        self.counts["abandoned"] += len(self._pending.popleft().conversations)
                        continue
                    part = job.conversations[job.taken : job.taken + room]
                    parts.append((job, part))
                    job.taken += len(part)
                    room -= len(part)
                    if job.taken == len(job.conversations):
                        self._pending.popleft()
        return parts

    def _compute(self, parts: list[tuple[_Job, list[Conversation]]]) -> None:
        batch = [conversation for _, part in parts for conversation in part]
        self.counts["batches"] += 1
        try:
            rewards = self.scorer.score(batch)
            if len(rewards) != len(batch):
                raise RuntimeError(f"{len(rewards)} rewards for {len(batch)} conversations")
        except Exception as error:
            self.counts["failed_batches"] += 1
            print(redact(traceback.format_exc()), file=sys.stderr, end="", flush=True)
            reason = f"{type(error).__name__}: {redact(one_line(error))}"
            for job, _ in parts:
                job.rewards.set_exception(
                    ModelFailed(
                        f"the model failed on a batch of {len(batch)} conversations ({reason}); send the request "
                        "again, or see the server's log"
                    )
                )
            return
        rest = iter(rewards)
        for job, part in parts:
            job.found += [next(rest) for _ in part]
            if len(job.found) == len(job.conversations):
                _finish(job)


def warm_up(scorer: Scorer) -> None:
    """Score the shortest and the longest conversation: what does not fit, or gives no number, is known at the start."""
    longest = min(scorer.max_length, scorer.batch_tokens)
    for length in (1, longest):
        tokens = np.full(length, scorer.tokenizer.eos_id, np.int32)
        (reward,) = scorer.score([Conversation("", tokens)])
    if not math.isfinite(reward):
        raise ModelFailed(f"--model={scorer.name}: its reward of {longest} times EOS is {reward}; check its weights")


def _finish(job: _Job) -> None:
    bad = [i for i, reward in enumerate(job.found) if not math.isfinite(reward)]
    if bad:
        job.rewards.set_exception(
            ModelFailed(
                f"inputs[{bad[0]}]: its reward is {job.found[bad[0]]} ({len(bad)} of {len(job.found)} are no finite "
                "numbers); send the request without it, or start the server with --dtype=fp32"
            )
        )
    else:
        job.rewards.set_result(job.found)
