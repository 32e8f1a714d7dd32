"""The template says what DESIGN says, to the letter, and as transformers renders it."""

import hashlib

import pytest

from easyrm.data.template import TEMPLATE, TEMPLATE_HASH, render
from easyrm.errors import InputError

TALK = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Hi  there\n\n"},
    {"role": "assistant", "content": "\tHello. "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!\nBye!"},
]


def by_hand(messages, bos, eos):
    """The format of the published models, written out: contents stripped, EOS after assistant, last newline off."""
    lines = [f"<|{m['role']}|>\n{m['content'].strip()}{eos if m['role'] == 'assistant' else ''}\n" for m in messages]
    return bos + "".join(lines)[:-1]


@pytest.mark.parametrize("bos", ["<s>", ""])
@pytest.mark.parametrize("messages", [TALK, TALK[1:3], TALK[:2], TALK[2:]])
def test_format(messages, bos):
    assert render(messages, bos, "</s>") == by_hand(messages, bos, "</s>")


def test_generation_prompt():
    opened = render(TALK[1:2], "<s>", "</s>", add_generation_prompt=True)
    assert opened == "<s><|user|>\nHi  there\n<|assistant|>\n"
    assert render(TALK[1:3], "<s>", "</s>").startswith(opened)


def test_markup_in_a_message_is_text():
    assert render([{"role": "user", "content": "{{ bos_token }} <b>&"}], "<s>", "</s>").endswith("{{ bos_token }} <b>&")


def test_unknown_role():
    with pytest.raises(InputError, match="unknown role tool; use system, user or assistant"):
        render([{"role": "tool", "content": "x"}], "", "</s>")


def test_hash_names_the_template():
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest() == TEMPLATE_HASH


def test_transformers_renders_the_same():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for bos in ("<s>", ""):
        for prompt in (False, True):
            theirs, _ = utils.render_jinja_template(
                [TALK], chat_template=TEMPLATE, add_generation_prompt=prompt, bos_token=bos, eos_token="</s>"
            )
            assert theirs == [render(TALK, bos, "</s>", add_generation_prompt=prompt)]
