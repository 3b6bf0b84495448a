"""``python -m petals_chat``: the same as ``petals-chat``."""

from petals_chat.cli import main

raise SystemExit(main())
