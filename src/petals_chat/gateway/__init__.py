"""The web side: three APIs and the page. Knows no torch, transformers, petals or hivemind."""
