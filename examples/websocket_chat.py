"""A conversation in the terminal over the WebSocket API: what you type is answered token by token.

Needs `pip install requests websockets`. Usage: python websocket_chat.py [URL of the server]
"""

import json
import sys

import requests
from websockets.sync.client import connect

MAX_ANSWER_TOKENS = 100

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:5000"
model = requests.get(f"{url}/api/models", timeout=10).json()["models"][0]
chat = model["chat"]
separator = chat["sep_token"] or "\n"
stop_texts = [chat["stop_token"], *chat["extra_stop_sequences"]]


def ask(websocket, message):
    """The one reply to a message."""
    websocket.send(json.dumps(message))
    reply = json.loads(websocket.recv())
    if not reply["ok"]:
        raise SystemExit(reply["traceback"])
    return reply


def answer(websocket, inputs):
    """The answer's pieces: one request for each token, so that the answer can be ended at any time."""
    text = ""
    for _ in range(MAX_ANSWER_TOKENS):
        request = {"type": "generate", "inputs": inputs, "max_new_tokens": 1, **chat["generation"]}
        piece = ask(websocket, request)["outputs"]
        text += piece
        yield piece
        if any(text.endswith(stop_text) for stop_text in stop_texts):
            return
        inputs = None  # the session has it now


with connect(f"ws{url.removeprefix('http')}/api/v2/generate") as websocket:
    opening = {
        "type": "open_inference_session",
        "model": model["key"],
        "max_length": model["max_session_length"],
    }
    ask(websocket, opening)
    print(f"{model['name']} is listening. An empty line ends the conversation.")
    while question := input("> "):
        for piece in answer(websocket, f"Human: {question}{separator}Assistant:"):
            print(piece, end="", flush=True)
        print()
