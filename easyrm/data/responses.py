"""One prompt with many responses, as whole conversations."""

from easyrm.data.pairs import MALFORMED, Dropped, Messages, messages_of


def responses_of(value: dict, where: str) -> tuple[Messages, ...]:
    """The conversations of a record with `prompt` (messages, or a string: one turn of the user) and `responses`.

    A response is a string, the assistant's text, or an assistant message. Raises Dropped as `messages_of` does.
    """
    prompt, responses = value.get("prompt"), value.get("responses")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise Dropped(MALFORMED, "responses without a prompt, a list of messages or a string")
    if not isinstance(responses, list) or not responses:
        raise Dropped(MALFORMED, "responses is not a list of strings or assistant messages")
    whole = []
    for number, response in enumerate(responses):
        if isinstance(response, str):
            response = {"role": "assistant", "content": response}
        key = f"responses[{number}]"
        whole.append(messages_of({key: [*prompt, response]}, key, where))
    return tuple(whole)
