"""The visitors' conversations, kept in a database."""
