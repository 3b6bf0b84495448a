"""What tests of the engine do with a session."""

from __future__ import annotations

from petals_chat.engine.interface import Chunk, EngineSession
from petals_chat.protocol.messages import GenerationRequest


async def collect(session: EngineSession, request: GenerationRequest) -> list[Chunk]:
    """All chunks of a generation."""
    return [chunk async for chunk in session.generate(request)]


def text_of(chunks: list[Chunk]) -> str:
    """Their text."""
    return "".join(chunk.text for chunk in chunks)
