"""The subcommands of ``petals-chat``, one module each: their options, and what they start."""
