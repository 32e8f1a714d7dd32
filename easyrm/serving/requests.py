"""From the body of a request to conversations, or to the answer that says what is wrong with it, and where."""

import json
import reprlib
from typing import Any

from easyrm.data.conversations import Conversation, encode_texts
from easyrm.data.pairs import OVERLONG, Dropped
from easyrm.data.template import ROLES, render
from easyrm.data.tokenizer import Tokenizer

_ANSWER = "<|assistant|>\n"


class Refused(Exception):
    """A request that gets no rewards: the HTTP `status`, a message of one line, and headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


def conversations_of(body: bytes, tokenizer: Tokenizer, *, max_length: int, max_inputs: int) -> list[Conversation]:
    """The conversations under `inputs`, in order. Raises Refused: 400 for what is no JSON object, else 422."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f'the body is not JSON ({error}); send {{"inputs": [conversation, ...]}}') from error
    if not isinstance(value, dict):
        raise Refused(400, f'the body is {_kind(value)}; send an object {{"inputs": [conversation, ...]}}')
    if unknown := sorted(value.keys() - {"inputs"}):
        raise Refused(422, f"{reprlib.repr(unknown[0])}: unknown key; a request has inputs, and nothing else")
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        found = f"{_kind(inputs)}" if "inputs" in value else "missing"
        raise Refused(422, f"inputs: {found}; give a list of one conversation or more")
    if len(inputs) > max_inputs:
        raise Refused(422, f"inputs: {len(inputs)} conversations; send at most {max_inputs} (--max_inputs) a request")
    texts = [text_of(conversation, f"inputs[{i}]", tokenizer) for i, conversation in enumerate(inputs)]
    found = encode_texts(tokenizer, [(_prompt(text), text) for text in texts], max_length)
    for i, conversation in enumerate(found):
        if isinstance(conversation, Dropped):
            advice = "; shorten it" if conversation.reason == OVERLONG else ""
            raise Refused(422, f"inputs[{i}]: {conversation.detail}{advice}")
    return found


def text_of(conversation: Any, where: str, tokenizer: Tokenizer) -> str:
    """The text that is scored: BOS once in front where there is one, EOS at the end. Raises Refused (422).

    A string is a conversation that is rendered already, and scored as it stands: only BOS and EOS are added where they
    are missing, since the reward is read at EOS, and white space behind EOS is removed.
    """
    if isinstance(conversation, list):
        return render(_check_messages(conversation, where), tokenizer.bos, tokenizer.eos)
    if not isinstance(conversation, str):
        raise Refused(422, f"{where}: {_kind(conversation)}; give a list of messages, or a string that is rendered")
    text = conversation.rstrip() if conversation.rstrip().endswith(tokenizer.eos) else conversation
    text = _check_text(text.removeprefix(tokenizer.bos).removesuffix(tokenizer.eos), where)
    # As a batch is that was decoded with its padding: the reward would depend on it.
    if text.startswith(tokenizer.pad) or text.endswith(tokenizer.pad):
        raise Refused(422, f"{where}: begins or ends with the pad token {tokenizer.pad}; send it without padding")
    return tokenizer.bos + text + tokenizer.eos


def _check_messages(messages: list, where: str) -> list[dict[str, str]]:
    if not messages:
        raise Refused(422, f"{where}: no messages; give at least that of the assistant")
    for i, message in enumerate(messages):
        here = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise Refused(422, f'{here}: {_kind(message)}; a message is {{"role": ..., "content": ...}}')
        role = message.get("role")
        if role not in ROLES:
            found = reprlib.repr(role) if "role" in message else "missing"
            raise Refused(422, f"{here}.role: {found}; the roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            found = _kind(message["content"]) if "content" in message else "missing"
            raise Refused(422, f"{here}.content: {found}; give a string")
        _check_text(message["content"], f"{here}.content")
    if messages[-1]["role"] != "assistant":
        last = f"{where}[{len(messages) - 1}].role"
        raise Refused(422, f"{last}: {messages[-1]['role']}; the last message, which is scored, is the assistant's")
    return messages


def _check_text(text: str, where: str) -> str:
    if not text.strip():
        raise Refused(422, f"{where}: no text; give some")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(422, f"{where}: no Unicode text ({error}); escape no half of a character") from error
    return text


def _prompt(text: str) -> str:
    """What the texts of one prompt begin with; a text without an answer shares nothing."""
    return text[: text.rfind(_ANSWER) + len(_ANSWER)] if _ANSWER in text else text


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number") if value != [] else "an empty list"
