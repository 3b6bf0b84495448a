"""Everything about Petals and hivemind. No other package imports them."""
