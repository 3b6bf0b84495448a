"""Petals Chat: a chat web app and an inference gateway for models served by a Petals swarm."""

__version__ = "0.1.0"
