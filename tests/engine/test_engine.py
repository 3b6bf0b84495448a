"""Text from a real worker through a real swarm equals local transformers, in every way of asking for it."""
