"""The reference: a chat server in the manner of those that came with Petals in 2023, on today's libraries.

A thread for each user, Petals' own inference sessions, and for each user and token: embedding, norm and a head
matmul of his own, the logits processors of transformers, decoding. It answers API v2 on a WebSocket.

    python bench/reference.py '{"repository": ..., "peers": [...], "dht_prefix": ..., "dtype": ..., "threads": 0,
                                "use_generate": false}'

prints ``{"port": N}`` and ends with its standard input. With ``use_generate`` each token comes from a call of
transformers' ``generate()``, as in 2023; without, from the steps within it, which costs less.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from petals_chat.head.modules import load_client_modules
from petals_chat.head.tuning import use_threads_that_pay
from petals_chat.models.checkpoint import Checkpoint, client_tensors, open_checkpoint
from petals_client import InferenceSession, join_swarm, model_dtype, read_tensor
from rounds import report


class Model:
    """Embeddings, norm and LM head; ``next_token`` is one step of a session."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        names = client_tensors(checkpoint.config, checkpoint.tensors)

        def read(name: str) -> torch.Tensor:
            return read_tensor(
                checkpoint, name, dtype
            ).clone()  # private memory, as models were loaded in 2023

        self.embeddings = read(names.embeddings)
        self.head = read(names.head) if names.head else self.embeddings
        self.norm = LlamaRMSNorm(self.embeddings.shape[1], float(checkpoint.config.get("rms_norm_eps", 1e-5)))
        self.norm.weight.data = read(names.final_norm_weight)

    def logits(self, session: InferenceSession, ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocab_size] that follow ``ids`` [1, tokens], the part of the context that is new."""
        hidden_states = session.step(F.embedding(ids, self.embeddings))
        return F.linear(self.norm(hidden_states[:, -1]), self.head)

    def next_tokens(
        self, session: InferenceSession, context: torch.Tensor, count: int, parameters: dict[str, Any]
    ) -> torch.Tensor:
        """``context`` [1, tokens] with ``count`` tokens after it. The last one is not in the session."""
        processors = logits_processors(parameters)
        for _ in range(count):
            scores = self.logits(session, context[:, session.position :]).float()
            scores = processors(context, scores)
            if parameters.get("do_sample"):
                token = torch.multinomial(F.softmax(scores, dim=-1), 1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            context = torch.cat([context, token], dim=1)
        return context


class GeneratingModel(Model):
    """Calls transformers' ``generate()`` for each reply."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype)
        # Of this config, generate() reads that nothing ends a text.
        config = transformers.LlamaConfig(
            hidden_size=8, num_attention_heads=1, num_hidden_layers=1, eos_token_id=None, pad_token_id=0
        )
        self._shell = _Shell(config).eval()

    def next_tokens(
        self, session: InferenceSession, context: torch.Tensor, count: int, parameters: dict[str, Any]
    ) -> torch.Tensor:
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: parameters[name] for name in names if parameters.get(name)}
        given["do_sample"] = bool(given.get("do_sample"))
        self._shell.step.logits = lambda ids: self.logits(session, ids[:, session.position :])
        result: torch.Tensor = self._shell.generate(
            context, attention_mask=torch.ones_like(context), max_new_tokens=count, use_cache=False, **given
        )
        return result


class _Shell(transformers.LlamaPreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]
    """What ``generate()`` takes for a model; the logits are those of this thread's session."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self._parameter = torch.nn.Parameter(torch.empty(0))
        self.step = threading.local()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.step.logits(input_ids)[:, None])


def logits_processors(parameters: dict[str, Any]) -> LogitsProcessorList:
    """Those that ``generate()`` would choose, in its order."""
    processors = LogitsProcessorList()
    if (penalty := float(parameters.get("repetition_penalty") or 1.0)) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if parameters.get("do_sample"):
        if (temperature := float(parameters.get("temperature") or 1.0)) != 1.0:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_k := int(parameters.get("top_k") or 0):
            processors.append(TopKLogitsWarper(top_k))
        if (top_p := float(parameters.get("top_p") or 1.0)) != 1.0:
            processors.append(TopPLogitsWarper(top_p))
    return processors


class Server:
    """Answers API v2; each connection has a thread."""

    def __init__(self, model: Model, tokenizer: Any, manager: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._manager = manager
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def serve_user(self, websocket: ServerConnection) -> None:
        """One connection."""
        try:
            request = json.loads(websocket.recv())
            websocket.send(json.dumps({"ok": True}))
            with torch.inference_mode(), InferenceSession(self._manager, request["max_length"]) as session:
                self._chat(websocket, session)
        except ConnectionClosed:
            pass
        except Exception as error:
            websocket.send(json.dumps({"ok": False, "traceback": f"{type(error).__name__}: {error}"}))

    def _chat(self, websocket: ServerConnection, session: InferenceSession) -> None:
        context = torch.empty((1, 0), dtype=torch.long)
        while True:
            request = json.loads(websocket.recv())
            if request.get("inputs") is not None:
                new = self._tokenizer(request["inputs"], return_tensors="pt")["input_ids"]
                context = torch.cat([context, new], dim=1)
            stop_sequence, text, stop = request.get("stop_sequence"), "", False
            while not stop:
                length = context.shape[1]
                context = self._model.next_tokens(session, context, request["max_new_tokens"], request)
                tokens = context[0, length:].tolist()
                outputs = self._decode(tokens)
                text += outputs
                stop = stop_sequence is None or text.endswith(stop_sequence)
                reply = {"ok": True, "outputs": outputs, "stop": stop, "token_count": len(tokens)}
                websocket.send(json.dumps(reply))

    def _decode(self, tokens: list[int]) -> str:
        # A token before them keeps the space that tokenizers drop at the beginning of a text.
        anchor = self._tokenizer.decode(self._anchor)
        text: str = self._tokenizer.decode([*self._anchor, *tokens])
        return text[len(anchor) :]


def main() -> None:
    options = json.loads(sys.argv[1])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    checkpoint = open_checkpoint(options["repository"])
    dtype = model_dtype(options["dtype"])
    with join_swarm(options["peers"], options["dht_prefix"], checkpoint.num_blocks) as manager:
        if not options["threads"]:  # as the gateway's worker does: one thread for a small head
            use_threads_that_pay(load_client_modules(checkpoint, device=torch.device("cpu"), dtype=dtype))
        kind = GeneratingModel if options["use_generate"] else Model
        model = kind(checkpoint, dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options["repository"])
        server = Server(model, tokenizer, manager)
        with serve(server.serve_user, "127.0.0.1", 0, compression=None, ping_interval=None) as listening:
            threading.Thread(target=listening.serve_forever, daemon=True).start()
            report({"port": listening.socket.getsockname()[1]})
            sys.stdin.read()
            # Sessions close with their users; a session that stays open would hold up the end.
            os._exit(0)


if __name__ == "__main__":
    main()
