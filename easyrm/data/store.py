"""The token store: every usable pair of a data set, tokenized once, on disk.

Token ids lie in an unnamed temporary file and are read with pread: pages of a mapped file would count as resident.
In memory stays what the index needs, a few bytes a pair.
"""

import dataclasses
import hashlib
import math
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
        ("probability", np.float32),
        ("ranks", np.int8, 2),  # of chosen and of rejected; -1: that side is none
        ("unit", np.uint8),  # counts the units of a group, from 0
        ("file", np.uint32),
        ("line", np.uint32),
    ]
)


class TokenPair(NamedTuple):
    """One pair as token ids (int32); both sides start with the same `prompt_length` tokens.

    No `margin` or `probability` is nan. Of a group of ranked responses it is a unit, two of them with their `ranks`; an
    odd last one stands on both sides, and its second rank is -1.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    prompt_length: int
    margin: float
    where: str
    probability: float = math.nan
    ranks: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class PairStore:
    """Random access to the kept pairs, or groups of ranked responses, in file order.

    `report` counts files, records and tokens (see `build_store`), `fingerprint` is a sha256 over the kept token ids,
    margins, probabilities and ranks, `max_token_id` the largest id that occurs, `examples` the first few texts as they
    were tokenized. `width` is the most units of a group, 0 of a store of pairs.
    """

    report: dict[str, Any]
    fingerprint: str
    max_token_id: int
    examples: list[str]
    width: int
    _tokens: Any = dataclasses.field(repr=False)
    _index: np.ndarray = dataclasses.field(repr=False)
    _starts: np.ndarray | None = dataclasses.field(repr=False)  # of each group's units, then their number

    def __len__(self) -> int:
        return len(self._index) if self._starts is None else len(self._starts) - 1

    def __getitem__(self, i: int) -> TokenPair:
        """Pair i; the first unit of group i."""
        return self._unit(i if self._starts is None else self._starts[i])

    def group(self, i: int) -> list[TokenPair]:
        """The units of group i."""
        return [self._unit(unit) for unit in range(*self._starts[i : i + 2])]

    def _unit(self, i: int) -> TokenPair:
        row = self._index[i]
        chosen, rejected, prompt = int(row["chosen"]), int(row["rejected"]), int(row["prompt"])
        count = chosen + rejected - prompt
        raw = os.pread(self._tokens.fileno(), 4 * count, 4 * int(row["offset"]))
        tokens = np.frombuffer(raw, np.uint32).astype(np.int32)
        where = f"{self.report['files'][row['file']]}:{row['line']}"
        other = np.concatenate([tokens[:prompt], tokens[chosen:]])
        more = float(row["margin"]), where, float(row["probability"]), tuple(row["ranks"].tolist())
        return TokenPair(tokens[:chosen], other, prompt, *more)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64[n, 3]: tokens of the chosen continuation, of the prompt, of the rejected continuation.

        Of groups int64[n, width, 3], zeros where a group has no such unit.
        """
        indices = np.asarray(indices)
        if self._starts is not None:
            units = self._starts[indices][:, None] + np.arange(self.width)
            exists = units < self._starts[indices + 1][:, None]
            indices = np.where(exists, units, 0)
        rows = self._index[indices]
        chosen, prompt, rejected = (rows[name].astype(np.int64) for name in ("chosen", "prompt", "rejected"))
        lengths = np.stack([chosen - prompt, prompt, rejected - prompt], axis=-1)
        return lengths if self._starts is None else lengths * exists[..., None]


def build_store(
    spec: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    ranked: bool = False,
    log: Callable[[str], None] = print,
) -> PairStore:
    """Reads, checks and tokenizes `spec` (see `sources.read`) in one streaming pass; where `ranked`, a store of groups.

    Every record is kept or counted as dropped, by reason: read = kept + sum of dropped (a blank line is no record).
    `report` has files, read, kept, dropped {reason: n}, tokens (all responses whole), tokens_unique (a shared
    prompt once), without_margin, without_probability, longest (tokens of a conversation), and retries, if the storage
    failed for a while.
    Raises InputError for files that are missing, corrupted, changed meanwhile or unreachable, unknown roles, ranked
    responses where pairs are expected, too many malformed records, no usable pair at all, and with overlong="error" for
    the first conversation of more than `max_length` tokens.
    """
    encode = Encoder(tokenizer, config, ranked=ranked)
    try:
        writer = _Writer(config, ranked, log)
        for path in sources.resolve(spec, writer.retried):
            writer.files.append(path)
            for record in encode(sources.read_one(path, writer.retried)):
                writer.add(record)
        return writer.finish(spec, encode.examples)
    except OSError as error:  # the readers make InputError of theirs
        raise InputError(
            f"data {spec}: its tokens cannot be kept in {tempfile.tempdir or 'the temporary directory'} ({error}); "
            "free space there, or set TMPDIR to a directory with more"
        ) from error


class _Writer:
    """The state of one pass: spool files, counts, the running fingerprint."""

    def __init__(self, config: DataConfig, ranked: bool, log: Callable[[str], None]):
        self.config, self.ranked, self.log = config, ranked, log
        self.files: list[str] = []
        self.tokens = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the store that reads it)
        self.index = tempfile.TemporaryFile()  # noqa: SIM115
        self.digest, self.seen = hashlib.sha256(), set()
        self.read = self.kept = self.units = self.written = self.max_token_id = self.retries = 0
        self.dropped, self.first_bad = Counter(), ""
        self.totals = Counter(tokens=0, tokens_unique=0, without_margin=0, without_probability=0)
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
            dropped = Dropped(reasons.DUPLICATE, "all of it has occurred before")
        if dropped is None:
            self._keep(record)
        else:
            self._drop(dropped, record.where)

    def _seen(self, record: Encoded) -> bool:
        sizes = [len(response) for response in record.responses]
        content = np.array([*record.ranks, *sizes]).tobytes() + b"".join(ids.tobytes() for ids in record.responses)
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
        self.kept += 1
        self.totals["tokens"] += sum(map(len, record.responses))
        self.totals["without_margin"] += math.isnan(record.margin)
        self.totals["without_probability"] += math.isnan(record.probability)
        self.longest = max(self.longest, *map(len, record.responses))
        # What a record of no kind before this had adds nothing: fingerprints stay what they were.
        if not math.isnan(record.probability):
            self.digest.update(b"probability" + np.float32(record.probability).tobytes())
        if record.ranks != (0, 1):
            self.digest.update(b"ranks" + bytes(record.ranks))
        for unit in range(0, len(record.responses), 2):
            self._keep_unit(record, unit)

    def _keep_unit(self, record: Encoded, first: int) -> None:
        chosen, *rest = record.responses[first : first + 2]
        rejected = rest[0] if rest else chosen
        ranks = (*record.ranks[first : first + 2], -1)[:2]
        prompt = common_prefix(chosen, rejected)
        place = (self.written, len(chosen), len(rejected), prompt)
        labels = (record.margin, record.probability, ranks, first // 2)
        row = np.array((*place, *labels, len(self.files) - 1, record.line), _INDEX)
        spooled = np.concatenate([chosen, rejected[prompt:]])
        self.tokens.write(spooled.tobytes())
        self.index.write(row.tobytes())
        for name in ("chosen", "rejected", "prompt", "margin"):
            self.digest.update(row[name].tobytes())
        self.digest.update(spooled.tobytes())
        self.units, self.written = self.units + 1, self.written + len(spooled)
        self.max_token_id = max(self.max_token_id, int(spooled.max()))
        self.totals["tokens_unique"] += len(spooled)

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
        index = np.memmap(self.index, _INDEX, mode="r", shape=(self.units,))
        self.index.close()  # the map stays
        starts, width = None, 0
        if self.ranked:
            starts, width = np.append(np.flatnonzero(index["unit"] == 0), self.units), int(index["unit"].max()) + 1
        store = PairStore(
            report, self.digest.hexdigest(), self.max_token_id, examples, width, self.tokens, index, starts
        )
        weakref.finalize(store, self.tokens.close)
        return store


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
