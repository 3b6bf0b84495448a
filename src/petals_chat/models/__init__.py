"""The catalog of known models, and the model that is there without any download."""
