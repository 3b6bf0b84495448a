"""``petals-chat swarm status``: which servers hold which blocks, from a running gateway or from the swarm itself.

How the map is drawn stands in `petals_chat.swarm.block_map`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from pydantic import ValidationError

from petals_chat.errors import ConfigurationError, EngineError
from petals_chat.settings import Settings
from petals_chat.swarm.block_map import draw
from petals_chat.swarm.join_token import JoinToken, decode_token, is_address
from petals_chat.swarm.state import SwarmState

_DEFAULT_URL = "http://localhost:5000"
_TIMEOUT_SECONDS = 10.0
_MAX_REPLY_BYTES = 64 * 2**20
_NARROWEST = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to ask, and the form of the output."""
    parser.add_argument("action", choices=["status"], metavar="status", help="show it once")
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help=f"address of a gateway's page, which is asked (default: {_DEFAULT_URL})",
    )
    swarm = parser.add_mutually_exclusive_group()
    swarm.add_argument(
        "--peers",
        nargs="+",
        type=_address,
        metavar="ADDRESS",
        help="ask the swarm of these members instead: /ip4/.../tcp/.../p2p/...",
    )
    swarm.add_argument(
        "--join", type=_token, metavar="TOKEN", help="ask the swarm that this join token leads to instead"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the state as JSON, as /api/v1/state has it"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the state; returns the exit code.

    Raises:
        PetalsChatError: nobody answers, or the arguments do not go together.
    """
    if arguments.url and (arguments.peers or arguments.join):
        raise ConfigurationError("ask either a gateway, by its URL, or a swarm, with --peers or --join")
    if arguments.join:
        state = _ask_swarm_of(arguments.join)
    elif arguments.peers:
        state = _ask_swarm(arguments.peers)
    else:
        state = _ask_gateway(arguments.url or _DEFAULT_URL)
    if arguments.json:
        print(state.model_dump_json(indent=2))
    else:
        width = max(_NARROWEST, shutil.get_terminal_size().columns)
        print(draw(state, width, has_colors=sys.stdout.isatty()))
    return 0


def _ask_gateway(url: str) -> SwarmState:
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigurationError(f"{url} is not the address of a page, like {_DEFAULT_URL}")
    try:
        with urllib.request.urlopen(f"{url}/api/v1/state", timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
            return SwarmState.model_validate_json(response.read(_MAX_REPLY_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            raise EngineError(f"{url} answers programs with an API key only") from None
        raise EngineError(f"{url} answers, but tells nothing of a swarm (HTTP {error.code})") from None
    except ValidationError:
        raise EngineError(f"{url} answers, but is no Petals Chat server") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or str(reason) or "no answer"
        raise EngineError(f"{url} cannot be reached: {text}") from None


def _ask_swarm(peers: list[str]) -> SwarmState:
    from petals_chat.swarm.survey import survey

    return survey(peers)


def _ask_swarm_of(token: JoinToken) -> SwarmState:
    from petals_chat.swarm.record import fetch_record
    from petals_chat.swarm.survey import SurveyedModel, survey

    record = fetch_record(token)
    return survey(token.peers, [SurveyedModel(token.name, record.num_blocks, record.model)])


def _address(text: str) -> str:
    if not is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like /ip4/192.0.2.1/tcp/31337/p2p/QmPeer")
    return text


def _token(text: str) -> JoinToken:
    try:
        return decode_token(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(error.message) from None
