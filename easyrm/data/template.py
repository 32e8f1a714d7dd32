"""The chat template: the one text form of a conversation, in training, evaluation, scoring and export alike.

The format is Tulu's (Ivison et al. 2023): a role line, the stripped content, EOS after an assistant turn. The last
newline is left out, so that a conversation ends in its EOS; BOS, where the tokenizer has one, stands in front.
"""

import hashlib
from collections.abc import Sequence

import jinja2
import jinja2.sandbox

from easyrm.errors import InputError

ROLES = ("system", "user", "assistant")

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'].strip() + eos_token }}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'].strip() }}"
    "{% else %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}"
    "{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATE_HASH = hashlib.sha256(TEMPLATE.encode()).hexdigest()


def _raise(message: str) -> None:
    raise InputError(message)


# Configured as transformers configures it, since the exported template is rendered there.
_environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_environment.globals["raise_exception"] = _raise
_compiled = _environment.from_string(TEMPLATE)


def render(messages: Sequence[dict], bos: str, eos: str, *, add_generation_prompt: bool = False) -> str:
    """The text of `messages` ({"role", "content"} each); `bos` may be empty. Raises InputError on an unknown role."""
    return _compiled.render(
        messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt
    )
