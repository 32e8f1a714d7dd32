"""A model for the scoring server that is none."""

import threading
import time
from collections import Counter

USER, ANSWER = {"role": "user", "content": "ant bee?"}, {"role": "assistant", "content": "cat"}


class Stand:
    """A stand-in for a Scorer: the reward is the number of tokens; `gate` closed, it computes for ever."""

    name, max_length, batch_tokens, normalization = "stand-in", 90, 4096, None

    def __init__(self, tokenizer):
        self.tokenizer, self.counts = tokenizer, Counter(tokens_computed=0)
        self.gate, self.batches, self.answer = threading.Event(), [], lambda c: float(len(c.tokens))
        self.gate.set()

    def score(self, conversations):
        self.batches.append(len(conversations))
        self.gate.wait(60)
        self.counts["tokens_computed"] += sum(len(c.tokens) for c in conversations)
        return [self.answer(c) for c in conversations]


def wait(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
