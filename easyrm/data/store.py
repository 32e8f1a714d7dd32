"""The token store: every usable pair of a data set, tokenized once, on disk.

Token ids lie in an unnamed temporary file and are read with pread: pages of a mapped file would count as resident.
In memory stays what the index needs, a few bytes a pair.
"""

import dataclasses
import hashlib
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from easyrm.data import pairs as reasons
from easyrm.data import sources
from easyrm.data.config import DataConfig
from easyrm.data.encode import Encoded, Encoder
from easyrm.data.outcomes import Outcome, Outcomes
from easyrm.data.pairs import Dropped
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError

_SHOWN = 3  # dropped records of each reason that are logged one by one

_INDEX = np.dtype(
    [
        ("offset", np.uint64),  # of the pair's first token: chosen whole, then the rejected continuation
        ("chosen", np.uint32),
        ("rejected", np.uint32),
        ("prompt", np.uint32),
        ("margin", np.float32),
        ("file", np.uint32),
        ("line", np.uint32),
    ]
)


class TokenPair(NamedTuple):
    """One pair as token ids (int32); both sides start with the same `prompt_length` tokens; no margin is nan."""

    chosen: np.ndarray
    rejected: np.ndarray
    prompt_length: int
    margin: float
    where: str


@dataclasses.dataclass(frozen=True)
class PairStore:
    """Random access to the kept pairs, in file order.

    `report` counts files, records and tokens (see `build_store`), `fingerprint` is a sha256 over the kept token ids and
    margins, `max_token_id` the largest id that occurs, `examples` the first few texts as they were tokenized;
    `outcomes` says what became of each record (None unless built for scoring).
    """

    report: dict[str, Any]
    fingerprint: str
    max_token_id: int
    examples: list[str]
    outcomes: Outcomes | None
    _tokens: Any = dataclasses.field(repr=False)
    _index: np.ndarray = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> TokenPair:
        row = self._index[i]
        chosen, rejected, prompt = int(row["chosen"]), int(row["rejected"]), int(row["prompt"])
        count = chosen + rejected - prompt
        raw = os.pread(self._tokens.fileno(), 4 * count, 4 * int(row["offset"]))
        tokens = np.frombuffer(raw, np.uint32).astype(np.int32)
        where = f"{self.report['files'][row['file']]}:{row['line']}"
        other = np.concatenate([tokens[:prompt], tokens[chosen:]])
        return TokenPair(tokens[:chosen], other, prompt, float(row["margin"]), where)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64[n, 3]: tokens of the chosen continuation, of the prompt, of the rejected continuation."""
        rows = self._index[np.asarray(indices)]
        chosen, prompt, rejected = (rows[name].astype(np.int64) for name in ("chosen", "prompt", "rejected"))
        return np.stack([chosen - prompt, prompt, rejected - prompt], axis=-1)


def build_store(
    spec: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    scoring: bool = False,
    log: Callable[[str], None] = print,
) -> PairStore:
    """Reads, checks and tokenizes `spec` (see `sources.read`) in one streaming pass.

    Every record is kept or counted as dropped, by reason: read = kept + sum of dropped (a blank line is no record).
    `report` has files, read, kept, dropped {reason: n}, tokens (both sides whole), tokens_unique (a shared prompt
    once), without_margin, longest (tokens of a conversation), and retries, if the storage failed for a while.
    For `scoring`, single conversations (`messages`) and pairs that teach nothing (identical sides, ties) are kept too.
    Raises InputError for files that are missing, corrupted, changed meanwhile or unreachable, unknown roles, too many
    malformed records, no usable pair at all, and with overlong="error" for the first conversation of more than
    `max_length` tokens.
    """
    encode, writer = Encoder(tokenizer, config, scoring), _Writer(config, scoring, log)
    try:
        for path in sources.resolve(spec, writer.retried):
            writer.files.append(path)
            for record in encode(sources.read_one(path, writer.retried)):
                writer.add(record)
        return writer.finish(spec, encode.examples)
    except OSError as error:  # the readers make InputError of theirs
        raise InputError(
            f"data {spec}: its tokens cannot be kept in {tempfile.gettempdir()} ({error}); free space there, or set "
            "TMPDIR to a directory with more"
        ) from error


class _Writer:
    """The state of one pass: spool files, counts, the running fingerprint."""

    def __init__(self, config: DataConfig, scoring: bool, log: Callable[[str], None]):
        self.config, self.log = config, log
        self.files: list[str] = []
        self.outcomes = Outcomes() if scoring else None
        self.tokens = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the store that reads it)
        self.index = tempfile.TemporaryFile()  # noqa: SIM115
        self.digest, self.seen = hashlib.sha256(), set()
        self.read = self.kept = self.written = self.max_token_id = self.retries = 0
        self.dropped, self.first_bad = Counter(), ""
        self.totals = Counter(tokens=0, tokens_unique=0, without_margin=0)
        self.longest = 0

    def retried(self, message: str) -> None:
        """Counts and says that the storage is tried again."""
        self.retries += 1
        self.log(message)

    def add(self, record: Encoded) -> None:
        """Counts one record of the last file, and spools what is kept."""
        self.read += 1
        dropped = record.dropped
        if dropped is None and self.config.drop_duplicates and self._seen(record):
            dropped = Dropped(reasons.DUPLICATE, "both sides have occurred before")
        if dropped is None:
            self._keep(record)
        else:
            self._drop(dropped, record.where)
        if self.outcomes is not None:
            self.outcomes.add(Outcome(record.id, record.single, None if dropped is None else str(dropped)))

    def _seen(self, record: Encoded) -> bool:
        content = len(record.chosen).to_bytes(4, "little") + record.chosen.tobytes() + record.rejected.tobytes()
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        known = key in self.seen
        self.seen.add(key)
        return known

    def _drop(self, dropped: Dropped, where: str) -> None:
        self.dropped[dropped.reason] += 1
        if dropped.reason == reasons.MALFORMED:
            self.first_bad = self.first_bad or f"{where} ({dropped.detail})"
        if self.dropped[dropped.reason] <= _SHOWN:
            self.log(f"dropped {where}: {dropped}")

    def _keep(self, record: Encoded) -> None:
        chosen, rejected = record.chosen, record.rejected
        prompt = _common_prefix(chosen, rejected)
        row = np.array(
            (self.written, len(chosen), len(rejected), prompt, record.margin, len(self.files) - 1, record.line), _INDEX
        )
        spooled = np.concatenate([chosen, rejected[prompt:]])
        self.tokens.write(spooled.tobytes())
        self.index.write(row.tobytes())
        for name in ("chosen", "rejected", "prompt", "margin"):
            self.digest.update(row[name].tobytes())
        self.digest.update(spooled.tobytes())
        self.kept, self.written = self.kept + 1, self.written + len(spooled)
        self.max_token_id = max(self.max_token_id, int(spooled.max()))
        self.longest = max(self.longest, len(chosen), len(rejected))
        self.totals["tokens"] += len(chosen) + len(rejected)
        self.totals["tokens_unique"] += len(spooled)
        self.totals["without_margin"] += bool(np.isnan(record.margin))

    def finish(self, spec: str, examples: list[str]) -> PairStore:
        """The finished store; raises InputError if too much was malformed or nothing is left."""
        dropped = {reason: self.dropped[reason] for reason in reasons.REASONS if self.dropped[reason]}
        counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
        bad, limit = self.dropped[reasons.MALFORMED], self.config.max_bad_fraction
        if bad > limit * self.read:
            raise InputError(
                f"data {spec}: {bad} of {self.read} records are malformed ({bad / self.read:.1%}), the first at "
                f"{self.first_bad}; mend them or raise --data.max_bad_fraction={limit}"
            )
        if not self.kept:
            raise InputError(
                f"data {spec}: no usable pair among {self.read} records (dropped: {counts}); check the data"
            )
        self.log(f"data {spec}: kept {self.kept} of {self.read} records (dropped: {counts})")
        for file in (self.tokens, self.index):
            file.flush()
        report = {"files": self.files, "read": self.read, "kept": self.kept, "dropped": dropped}
        report |= {**self.totals, "longest": self.longest} | ({"retries": self.retries} if self.retries else {})
        index = np.memmap(self.index, _INDEX, mode="r", shape=(self.kept,))
        self.index.close()  # the map stays
        store = PairStore(
            report, self.digest.hexdigest(), self.max_token_id, examples, self.outcomes, self.tokens, index
        )
        weakref.finalize(store, self.tokens.close)
        return store


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
