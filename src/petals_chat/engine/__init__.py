"""The engine: worker processes that run one model each, and the gateway's side of them."""
