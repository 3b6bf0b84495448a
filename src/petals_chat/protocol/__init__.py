"""The messages between the gateway and its engine workers, and their framing."""
