"""Small tokenizers that tests make themselves."""

import io
import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from easyrm.data.template import render

WORDS = ["the", "a", "of", "to", "and", "in", "is", "it", "you", "that", "how", "why", "what", "cat", "dog", "tree"]
WORDS += ["river", "stone", "green", "small", "seven", "reward", "pair"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def conversation(rng: random.Random, prompt: str, words: int) -> list[dict[str, str]]:
    answer = sentence(rng, words) + rng.choice([".", "!", "  \n", " é ☃\n\n- x"])
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def write_pairs(path: Path, n: int, *, seed: int = 0, words: int = 12, **extra) -> Path:
    """Writes `n` valid pairs as JSON Lines."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(n):
            prompt = f"{i} {sentence(rng, words)}?"
            sides = {side: conversation(rng, prompt, rng.randint(1, words)) for side in ("chosen", "rejected")}
            file.write(json.dumps({**sides, "id": i, **extra}) + "\n")
    return path


def train_sentencepiece(path: Path, **options) -> Path:
    """Trains a BPE `tokenizer.model` of about 300 pieces, configured as Llama 2's; `options` override."""
    rng = random.Random(0)
    texts = [render(conversation(rng, sentence(rng, 9), 9), "", "") for _ in range(300)]
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def write_byte_level(directory: Path, *, bos: str = "<|begin_of_text|>", add_bos: bool = True, **config) -> Path:
    """Trains a byte-level BPE as Llama 3's, whose post-processor adds BOS; `config` goes to tokenizer_config.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([sentence(rng, 9) for _ in range(200)], trainer)
    if add_bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    directory.mkdir(exist_ok=True)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {"bos_token": bos, "eos_token": {"content": "<|end_of_text|>", "lstrip": False}, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
