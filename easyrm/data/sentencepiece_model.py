"""A sentencepiece `tokenizer.model`, encoding as Llama's first tokenizer did."""

import re

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from easyrm.errors import InputError

_NORMAL, _BYTE = 1, 6
_BPE = 2


class SentencePieceModel:
    """A BPE model whose marked pieces (unknown, control, user-defined) are parsed in the text, nothing being added.

    The text between two marks is encoded on its own, so each stretch has its own dummy prefix: "</s>\\n" is
    [</s>, ▁, <0x0A>]. Raises InputError for models that are not BPE or that rewrite the text (Unicode normalization,
    white space removal): their tokens could not be exported faithfully.
    """

    def __init__(self, serialized: bytes, name: str):
        self.processor = sentencepiece.SentencePieceProcessor()
        self.proto = sentencepiece_model_pb2.ModelProto()
        try:
            self.processor.LoadFromSerializedProto(serialized)
            self.proto.ParseFromString(serialized)
        except Exception as error:  # each library has error types of its own
            raise InputError(f"tokenizer {name}: not a sentencepiece model ({error}); fetch the file again") from error
        trainer, normalizer = self.proto.trainer_spec, self.proto.normalizer_spec
        if trainer.model_type != _BPE:
            raise InputError(f"tokenizer {name}: not a BPE model; train it with --model_type=bpe")
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
            raise InputError(
                f"tokenizer {name}: it rewrites the text ({normalizer.name}); train it with "
                "--normalization_rule_name=identity --remove_extra_whitespaces=false"
            )
        self.pieces = [piece.piece for piece in self.proto.pieces]
        self.marks = [p.piece for p in self.proto.pieces if p.type not in (_NORMAL, _BYTE)]
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._split = self._pattern()

    def mark(self, piece: str) -> None:
        """Has `piece` of the vocabulary parsed as a mark too."""
        if piece not in self.marks:
            self.marks.append(piece)
            self._split = self._pattern()

    def token_to_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        parts = [[part for part in self._split.split(text) if part] for text in texts]
        stretches = [part for text in parts for part in text if part not in self.marks]
        encoded = iter(self.processor.Encode(stretches))
        return [
            [token for part in text for token in ([self._ids[part]] if part in self.marks else next(encoded))]
            for text in parts
        ]

    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self.marks, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
