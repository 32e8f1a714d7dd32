"""The token store: every usable pair of a data set, tokenized once, on disk.

Token ids lie in an unnamed temporary file and are read with pread: pages of a mapped file would count as resident.
In memory stays what the index needs, a few bytes a pair.
"""

import dataclasses
import hashlib
import itertools
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from easyrm.data import pairs as reasons
from easyrm.data import sources
from easyrm.data.config import DataConfig
from easyrm.data.pairs import Dropped, Pair, check_pair, parse_pair, parse_scored
from easyrm.data.template import render
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError

_CHUNK = 256  # records tokenized at once
_EXAMPLES = 32  # texts kept as they were tokenized
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
    margins, `max_token_id` the largest id that occurs, `examples` the first few texts as they were tokenized.
    """

    report: dict[str, Any]
    fingerprint: str
    max_token_id: int
    examples: list[str]
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

    def places(self) -> Iterator[tuple[str, int]]:
        """(file, line) of each pair, in order."""
        return ((self.report["files"][row["file"]], int(row["line"])) for row in self._index)

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

    Every record is kept or counted as dropped, by reason; `report` has files, read, kept, dropped {reason: n}, tokens
    (both sides whole), tokens_unique (a shared prompt once), without_margin and longest (tokens of a conversation).
    For `scoring`, single conversations (`messages`) and pairs that teach nothing (identical sides, ties) are kept too.
    Raises InputError for missing or corrupted files, unknown roles, too many malformed records, no usable pair at all,
    and with overlong="error" for the first conversation of more than `max_length` tokens.
    """
    writer = _Writer(sources.resolve(spec), tokenizer, config, scoring, log)
    for file, path in enumerate(writer.files):
        records = sources.read_one(path)
        while chunk := list(itertools.islice(records, _CHUNK)):
            writer.add(file, chunk)
    return writer.finish(spec)


class _Writer:
    """The state of one pass: two spool files, counts, the running fingerprint."""

    def __init__(self, files: list[str], tokenizer: Tokenizer, config: DataConfig, scoring: bool, log: Callable):
        self.files, self.tokenizer, self.config, self.scoring, self.log = files, tokenizer, config, scoring, log
        self.examples: list[str] = []
        self.tokens = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the store that reads it)
        self.index = tempfile.TemporaryFile()  # noqa: SIM115
        self.digest, self.seen = hashlib.sha256(), set()
        self.read = self.kept = self.written = self.max_token_id = 0
        self.dropped, self.first_bad = Counter(), ""
        self.totals = Counter(tokens=0, tokens_unique=0, without_margin=0)
        self.longest = 0

    def add(self, file: int, records: list[sources.Record]) -> None:
        """Checks and tokenizes some records of one file, and spools the pairs that are kept."""
        self.read += len(records)
        pairs = [(record.line, pair) for record in records if (pair := self._checked(record)) is not None]
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        texts = [render(side, bos, eos) for _, pair in pairs for side in (pair.chosen, pair.rejected)]
        self.examples.extend(texts[: _EXAMPLES - len(self.examples)])
        ids = [np.array(tokens, np.uint32) for tokens in self.tokenizer.encode_batch(texts)]
        for (line, pair), chosen, rejected in zip(pairs, ids[::2], ids[1::2], strict=True):
            try:
                self._check_tokens(pair, chosen, rejected)
            except Dropped as dropped:
                self._drop(dropped, pair.where)
            else:
                self._keep(file, line, pair, chosen, rejected)

    def _checked(self, record: sources.Record) -> Pair | None:
        try:
            if self.scoring:
                return parse_scored(record)
            return check_pair(parse_pair(record), drop_ties=self.config.drop_ties)
        except Dropped as dropped:
            self._drop(dropped, record.where)
            return None

    def _drop(self, dropped: Dropped, where: str) -> None:
        self.dropped[dropped.reason] += 1
        if dropped.reason == reasons.MALFORMED:
            self.first_bad = self.first_bad or f"{where} ({dropped.detail})"
        if self.dropped[dropped.reason] <= _SHOWN:
            self.log(f"dropped {where}: {dropped}")

    def _check_tokens(self, pair: Pair, chosen: np.ndarray, rejected: np.ndarray) -> None:
        if not self.scoring and np.array_equal(chosen, rejected):
            raise Dropped(reasons.IDENTICAL, "chosen and rejected have the same tokens")
        longest, limit = max(len(chosen), len(rejected)), self.config.max_length
        if longest > limit:
            if self.config.overlong == "error":
                raise InputError(
                    f"{pair.where}: a conversation of {longest} tokens exceeds --data.max_length={limit}; "
                    "raise it, or use --data.overlong=drop"
                )
            raise Dropped(reasons.OVERLONG, f"{longest} tokens, more than --data.max_length={limit}")
        if self.config.drop_duplicates:
            content = len(chosen).to_bytes(4, "little") + chosen.tobytes() + rejected.tobytes()
            key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            if key in self.seen:
                raise Dropped(reasons.DUPLICATE, "both sides have occurred before")
            self.seen.add(key)

    def _keep(self, file: int, line: int, pair: Pair, chosen: np.ndarray, rejected: np.ndarray) -> None:
        prompt = _common_prefix(chosen, rejected)
        row = np.array((self.written, len(chosen), len(rejected), prompt, pair.margin, file, line), _INDEX)
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
        self.totals["without_margin"] += bool(np.isnan(pair.margin))

    def finish(self, spec: str) -> PairStore:
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
        report |= {**self.totals, "longest": self.longest}
        index = np.memmap(self.index, _INDEX, mode="r", shape=(self.kept,))
        self.index.close()  # the map stays
        store = PairStore(report, self.digest.hexdigest(), self.max_token_id, self.examples, self.tokens, index)
        weakref.finalize(store, self.tokens.close)
        return store


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
