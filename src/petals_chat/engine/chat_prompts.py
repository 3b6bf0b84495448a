"""Chats as text: the template for models whose tokenizer has none, in the form that pages and terminals use.

A model with a chat template has one in its repository, or in the configuration. It is rendered by transformers, in
a sandbox, so that prompts are exactly those that the model was trained on.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from petals_chat.errors import ConfigurationError, InvalidParameterError
from petals_chat.protocol.messages import ChatMessage, ChatPrompt

INTRODUCTION = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

_REFUSALS = (TemplateError, ValueError, TypeError)
"""What templates, and the tokenizer under them, raise for messages that they do not take."""


class ChatEncoder:
    """Token ids of chats.

    Special tokens that occur in messages are encoded as the text they are, so no message can pretend to be another.

    Args:
        tokenizer: of transformers.
        template: Jinja, as tokenizers have it; None = the tokenizer's own, or else `separated_turns`.
        separator: stands between the turns where there is no template.

    Raises:
        ConfigurationError: ``template`` is no valid Jinja.
    """

    def __init__(self, tokenizer: Any, template: str | None, separator: str) -> None:
        self._tokenizer = tokenizer
        self._beginning: list[int] = []
        """Tokens before what the template writes; other templates write BOS themselves."""
        if template is None and not tokenizer.chat_template:
            template = separated_turns(separator)
            self._beginning = tokenizer("")["input_ids"]
        self._template = template
        if template is not None:
            self._check_syntax()

    def encode(self, prompt: ChatPrompt) -> list[int]:
        """The prompt for the assistant's next message.

        Raises:
            InvalidParameterError: the template refuses these messages.
        """
        try:
            return [*self._beginning, *self._render(prompt)]
        except _REFUSALS as error:
            raise InvalidParameterError(
                "messages", f"the model's chat template does not take them: {error}"
            ) from None

    def _check_syntax(self) -> None:
        probe = ChatPrompt((ChatMessage("user", "Hello"),))
        try:
            self._render(probe)
        except TemplateSyntaxError as error:
            raise ConfigurationError(f"chat.template: line {error.lineno}: {error.message}") from None
        except _REFUSALS:
            pass  # it may want other messages

    def _render(self, prompt: ChatPrompt) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in prompt.messages],
            chat_template=self._template,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return ids


def separated_turns(separator: str) -> str:
    """A template: an introduction or the system's text, then "Human: ..." and "Assistant: ..." in turn."""
    between = ascii(separator)  # a literal in Jinja as it is in Python
    return (
        "{% if messages[0].role != 'system' %}{{ " + ascii(INTRODUCTION) + " }}{% endif %}"
        "{% for message in messages %}"
        "{% if not loop.first or message.role != 'system' %}{{ " + between + " }}{% endif %}"
        "{% if message.role == 'user' %}{{ 'Human: ' }}{% endif %}"
        "{% if message.role == 'assistant' %}"
        # As the model wrote it; what others wrote may lack the space.
        "{{ 'Assistant:' if message.content[:1].isspace() else 'Assistant: ' }}"
        "{% endif %}"
        "{{ message.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + between + " }}{{ 'Assistant:' }}{% endif %}"
    )
