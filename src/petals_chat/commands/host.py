"""``petals-chat host``: serve blocks of a model to a Petals swarm, until Ctrl-C."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path
from typing import Any

from petals_chat.errors import ConfigurationError
from petals_chat.settings import Device, Dtype, Settings
from petals_chat.swarm.host_options import HostOptions, Quantization, Relay
from petals_chat.swarm.join_token import JoinToken, decode_token, is_address
from petals_chat.swarm.sizes import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; none of them is a setting."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="hub name or local directory of the model; may be left out with --join",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON when the host serves, and nothing else"
    )
    _add_swarm_arguments(parser.add_argument_group("swarm (one of the first four; default: --new-swarm)"))
    _add_block_arguments(parser.add_argument_group("blocks"))
    _add_network_arguments(parser.add_argument_group("network"))
    # For a parent process that supervises the host.
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--exit-with-stdin", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Serve until stopped; returns the exit code.

    Raises:
        PetalsChatError: the host cannot start, or broke down; see `petals_chat.swarm.host.serve_host`.
    """
    from petals_chat.swarm.host import serve_host

    _require_possible_combination(arguments)
    return serve_host(
        HostOptions(
            model=arguments.model,
            revision=arguments.revision,
            initial_peers="public" if arguments.public else tuple(arguments.initial_peers),
            join=arguments.join,
            dht_prefix=arguments.dht_prefix,
            blocks=arguments.blocks,
            num_blocks=arguments.num_blocks,
            memory_bytes=arguments.memory,
            device=arguments.device,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            adapters=tuple(arguments.adapters),
            cache_tokens=arguments.cache_tokens,
            max_session_length=arguments.max_session_length,
            address=arguments.address,
            port=arguments.port,
            public_ip=arguments.public_ip,
            relay=arguments.relay,
            identity=arguments.identity,
            name=arguments.name,
            threads=arguments.threads,
            json=arguments.json,
            debug=settings.server.log_level == "debug",
            ready_fd=arguments.ready_fd,
            exit_with_stdin=arguments.exit_with_stdin,
        )
    )


def _require_possible_combination(arguments: argparse.Namespace) -> None:
    if arguments.model is None and arguments.join is None:
        raise ConfigurationError("name the MODEL to serve, or the swarm to join with --join TOKEN")
    if arguments.join and arguments.dht_prefix:
        raise ConfigurationError("--dht-prefix: the join token says it already")
    if arguments.relay is not Relay.AUTO and not arguments.public:
        raise ConfigurationError(
            "--relay: only the public swarm has members that relay. In a private one, let the router pass a port on to "
            "this machine, and name the router's address with --public-ip"
        )
    if arguments.public_ip and not arguments.port:
        raise ConfigurationError(
            "--public-ip needs a fixed --port, which the router or firewall lets through"
        )


def _add_swarm_arguments(group: Any) -> None:
    swarm = group.add_mutually_exclusive_group()
    swarm.add_argument("--new-swarm", action="store_true", help="begin a private swarm")
    swarm.add_argument(
        "--join",
        type=_join_token,
        metavar="TOKEN",
        help="join the private swarm of the host that printed this token, and serve its model",
    )
    swarm.add_argument(
        "--initial-peers",
        nargs="+",
        type=_multiaddress,
        default=[],
        metavar="ADDRESS",
        help="join the swarm of these members: /ip4/.../tcp/.../p2p/...",
    )
    swarm.add_argument("--public", action="store_true", help="join the public Petals swarm")
    group.add_argument(
        "--dht-prefix",
        type=_dht_prefix,
        metavar="PREFIX",
        help="name of the model's blocks in the swarm (default: Petals' own rule for the model)",
    )
    group.add_argument("--name", help="what monitors of the swarm show")


def _add_block_arguments(group: Any) -> None:
    blocks = group.add_mutually_exclusive_group()
    blocks.add_argument(
        "--blocks",
        type=_blocks,
        metavar="START:END",
        help="serve the blocks from START up to, not including, END (default: as many as fit into the memory, those "
        "that the swarm needs most)",
    )
    blocks.add_argument("--num-blocks", type=_positive, metavar="N", help="serve at most N blocks")
    group.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="memory for blocks and attention caches, like 12GiB (default: what is free, less a margin)",
    )
    group.add_argument("--device", choices=list(Device), type=Device, default=Device.AUTO)
    group.add_argument("--dtype", choices=list(Dtype), type=Dtype, default=Dtype.AUTO)
    group.add_argument(
        "--quantization",
        choices=list(Quantization),
        type=Quantization,
        default=Quantization.NONE,
        help="compress the weights (CUDA only)",
    )
    group.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help="LoRA adapters that sessions may choose: PEFT repositories or local directories",
    )
    group.add_argument(
        "--cache-tokens",
        type=_positive,
        metavar="N",
        help="tokens that the attention caches have room for, all sessions together (default: 16384, less if the "
        "memory is short, more on a GPU that has it)",
    )
    group.add_argument(
        "--max-session-length",
        type=_positive,
        default=8192,
        metavar="N",
        help="tokens that one session may reserve (default: %(default)s)",
    )
    group.add_argument(
        "--threads",
        type=_count,
        default=0,
        metavar="N",
        help="CPU threads (default: one for each CPU that it may use, one for a small model)",
    )


def _add_network_arguments(group: Any) -> None:
    group.add_argument(
        "--address",
        type=_ip_address,
        default="0.0.0.0",  # noqa: S104 - a host is there for other machines
        help="IP address to listen on (default: all IPv4 addresses of this machine)",
    )
    group.add_argument("--port", type=_port, default=0, help="TCP port (default: any free one)")
    group.add_argument(
        "--public-ip",
        type=_ip_address,
        metavar="IP",
        help="IP address at which others reach the port, if it belongs to a router in front of this machine",
    )
    group.add_argument(
        "--relay",
        choices=list(Relay),
        type=Relay,
        default=Relay.AUTO,
        help="in the public swarm, be reached by way of other members, from behind a NAT or firewall (default: if a "
        "test finds that there is no direct way)",
    )
    group.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        help="key that gives the host its peer id, made if it is missing (default: a new one each time)",
    )


def _blocks(text: str) -> tuple[int, int]:
    try:
        start, end = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0:4") from None
    return start, end


def _dht_prefix(text: str) -> str:
    if not text or "." in text or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r}: dots and spaces are not possible in it")
    return text


def _ip_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _join_token(text: str) -> JoinToken:
    try:
        return decode_token(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 12GiB or 800MB") from None


def _multiaddress(text: str) -> str:
    if not is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like /ip4/192.0.2.1/tcp/31337/p2p/QmPeer")
    return text


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number, 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or greater")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return int(text)
