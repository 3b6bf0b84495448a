"""Chats as text: the template for models whose tokenizer has none, in the form that pages and terminals use.

A model with a chat template has one in its repository, or in the configuration. It is rendered by transformers, in
a sandbox, so that prompts are exactly those that the model was trained on.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from petals_chat.errors import ConfigurationError, InvalidParameterError
from petals_chat.protocol.messages import ChatMessage, ChatPrompt, ToolStyle

INTRODUCTION = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

_REFUSALS = (TemplateError, ValueError, TypeError)
"""What templates, and the tokenizer under them, raise for messages that they do not take."""
_TEXTS_IN_REFUSAL = "Final message to continue:"
"""From here on, an error of transformers repeats what people wrote."""


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
        """The prompt for the assistant's next message, or for the rest of the last one.

        Raises:
            InvalidParameterError: the template refuses these messages.
        """
        if prompt.continue_final_message and not prompt.messages[-1].content.strip():
            prompt = msgspec.structs.replace(
                prompt, messages=prompt.messages[:-1], continue_final_message=False
            )  # nothing to go on from, so it is written anew
        try:
            return [*self._beginning, *self._render(prompt), *self._prefix(prompt)]
        except _REFUSALS as error:
            reason = str(error).partition(_TEXTS_IN_REFUSAL)[0]
            raise InvalidParameterError(
                "messages", f"the model's chat template does not take them: {reason}"
            ) from None

    @property
    def template(self) -> str:
        """The template, as Jinja."""
        template = self._template
        if template is None:
            template = self._tokenizer.get_chat_template()
        return str(template)

    @property
    def tool_style(self) -> ToolStyle | None:
        """How the template writes calls of functions; None if it takes none, or writes them in another way."""
        return tool_style_of(self.template)

    def _prefix(self, prompt: ChatPrompt) -> list[int]:
        if not prompt.answer_prefix:
            return []
        ids: list[int] = self._tokenizer(prompt.answer_prefix, add_special_tokens=False)["input_ids"]
        return ids

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
            [_as_dict(message) for message in prompt.messages],
            tools=list(prompt.tools) or None,
            chat_template=self._template,
            add_generation_prompt=not prompt.continue_final_message,
            continue_final_message=prompt.continue_final_message,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return ids


def tool_style_of(template: str) -> ToolStyle | None:
    """How a template that takes functions writes calls of them, going by the words that it has for them."""
    if not re.search(r"\btools\b", template) or "<function=" in template:
        return None
    if "<tool_call>" in template:
        return ToolStyle.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolStyle.MISTRAL
    # Llama 3 has "<|python_tag|>" for programs, and writes calls of functions as plain JSON.
    return ToolStyle.LLAMA3 if re.search(r'"parameters\\?":', template) else None


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """The message in the form that templates take."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _parsed(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _parsed(arguments: str) -> Any:
    """Arguments as an object, which is what templates expect; as they are if the assistant wrote no JSON."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


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
