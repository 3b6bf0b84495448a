"""Petals Guide: the small model that comes with the package, served where no other is configured.

It was trained for Petals Chat, by the programs in ``training/``, and answers questions about it.
"""

from __future__ import annotations

from pathlib import Path

from petals_chat.settings import ChatSettings, GenerationDefaults, ModelSettings

KEY = "petals-chat/petals-guide"
DIRECTORY = Path(__file__).parent / "petals_guide"
_END = "<|end|>"


def bundled_settings() -> ModelSettings:
    """The model's entry."""
    return ModelSettings(
        key=KEY,
        repository=str(DIRECTORY),
        name="Petals Guide",
        family="Built in",
        chat=ChatSettings(
            max_session_length=2048,
            sep_token=_END,
            stop_token=_END,
            extra_stop_sequences=(),
            generation=GenerationDefaults(do_sample=False),
            sample_questions=(
                "What is Petals Chat?",
                "How do I add a model?",
                "How do I join a swarm with another machine?",
                "Can I use the OpenAI client?",
                "What does missing_blocks mean?",
            ),
        ),
    )
