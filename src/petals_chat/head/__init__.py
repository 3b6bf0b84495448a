"""The parts of a model that the gateway's machine holds: embeddings, final norm and LM head."""
