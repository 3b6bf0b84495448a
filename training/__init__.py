"""How Petals Guide, the bundled model, is made: corpus, generator, training, evaluation. README.md explains."""
