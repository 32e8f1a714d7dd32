"""What can be chosen about the data of a run."""

import dataclasses

from easyrm.errors import InputError


@dataclasses.dataclass
class DataConfig:
    """Flags `--data.*`; plain types, one default each.

    `train` and `eval` are comma-separated lists of file, glob, directory, `gs://...` or `hf://dataset[:split]`.
    `max_length` is in tokens a conversation, `batch_size` in pairs (or groups) per optimizer step, `row_length` in
    tokens (0: the row plan chooses). `micro_batches`: parts of a batch whose gradients are added up, for less memory.
    `packing` false: each side in a row of its own. `shuffle`: another order in each epoch. `overlong`: drop a record
    with a conversation beyond `max_length`, or stop with an error. `drop_duplicates` drops records that repeat an
    earlier one. `pad_token`: another than the tokenizer's; never EOS. `max_bad_fraction` is the share of malformed
    lines above which the run stops.

    A record is a pair: `chosen` and `rejected`, each a list of {"role", "content"} messages that ends in an assistant
    message; optional `margin` (a number), `probability` (in [0, 1], that chosen is the better one), `id`. Or, for the
    losses of ranked responses, a group: `prompt` (messages, or a string: one turn of the user) and `responses`, 2 to 16
    strings or assistant messages, best first; optional `ranks`, one integer a response, lower is better, of which equal
    ones are not compared. A group that has a response too long, or the same response at two ranks, is dropped whole.
    `drop_ties` drops pairs whose margin is 0.
    """

    train: str = ""
    eval: str = ""
    max_length: int = 4096
    batch_size: int = 64
    micro_batches: int = 1
    shuffle: bool = True
    row_length: int = 0
    packing: bool = True
    overlong: str = "drop"
    max_bad_fraction: float = 0.01
    drop_ties: bool = False
    drop_duplicates: bool = False
    pad_token: str = ""

    def validate(self) -> None:
        """Raises InputError naming the first field whose value makes no sense."""
        for name, least in [("max_length", 1), ("batch_size", 1), ("micro_batches", 1), ("row_length", 0)]:
            if getattr(self, name) < least:
                raise InputError(f"--data.{name}={getattr(self, name)} is out of range; use {least} or more")
        if self.row_length % 8:
            raise InputError(f"--data.row_length={self.row_length} is not a multiple of 8; use a multiple of 128, or 0")
        if self.micro_batches > self.batch_size:
            raise InputError(
                f"--data.micro_batches={self.micro_batches} exceeds --data.batch_size={self.batch_size} pairs; "
                "use at most one micro-batch a pair"
            )
        if self.overlong not in ("drop", "error"):
            raise InputError(f"--data.overlong={self.overlong} is unknown; use drop or error")
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"--data.max_bad_fraction={self.max_bad_fraction} is out of range; use 0 to 1")
