"""The state of a swarm, asked of its members directly: joins the swarm for a moment, without a gateway."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

from petals_chat.engine.interface import ModelState
from petals_chat.errors import SwarmUnreachableError
from petals_chat.protocol.messages import SwarmStatus
from petals_chat.swarm import compat

compat.install()

from hivemind import DHT
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P
from petals.data_structures import UID_DELIMITER, ModelInfo

from petals_chat.swarm.monitor import MAX_TEXT_CHARS, SwarmMonitor
from petals_chat.swarm.state import HUB_URL, SwarmState, model_report, swarm_state

MODELS_RECORD = "_petals.models"
"""In which servers tell the DHT what they serve; models whose prefix begins with "_" are not in it."""
MAX_MODELS = 64
MAX_BLOCKS = 4096
DHT_WORKERS = 32


@dataclasses.dataclass(frozen=True)
class SurveyedModel:
    """A model, as its swarm describes it."""

    dht_prefix: str
    num_blocks: int
    hub_name: str | None = None


def survey(initial_peers: Sequence[str], models: Sequence[SurveyedModel] = ()) -> SwarmState:
    """Join the swarm, look at its servers, and leave. Forks a process.

    Args:
        initial_peers: multiaddresses of members.
        models: which models; none = all that the swarm tells of.

    Raises:
        SwarmUnreachableError: none of the members answers.
    """
    try:
        dht = DHT(
            initial_peers=initial_peers,
            client_mode=True,
            num_workers=DHT_WORKERS,
            start=True,
            nat_port_map=False,
            auto_nat=False,
        )
    except Exception as error:
        raise SwarmUnreachableError(
            f"no member of the swarm answers at {', '.join(initial_peers)}"
        ) from error
    p2p: P2P = RemoteExpertWorker.run_coroutine(dht.replicate_p2p())
    try:
        found = list(models or _find_models(dht))
        monitors = [
            SwarmMonitor(
                dht,
                p2p,
                dht_prefix=model.dht_prefix,
                num_blocks=model.num_blocks,
                initial_peers=initial_peers,
            )
            for model in found
        ]
        for monitor in monitors:
            RemoteExpertWorker.run_coroutine(monitor.look_closely())
            monitor.close()
    finally:
        RemoteExpertWorker.run_coroutine(p2p.shutdown())
        dht.shutdown()
        dht.join(5)
    return _state(found, [monitor.status for monitor in monitors])


def _find_models(dht: DHT) -> Iterator[SurveyedModel]:
    record = dht.get(MODELS_RECORD, latest=True)
    if record is None or not isinstance(record.value, dict):
        return
    prefixes = [prefix for prefix in record.value if isinstance(prefix, str) and _is_prefix(prefix)]
    for prefix in sorted(prefixes)[:MAX_MODELS]:
        entry = record.value[prefix]
        try:
            info = ModelInfo.from_dict(entry.value)
        except (TypeError, ValueError):  # anybody can write into the record
            continue
        if info.num_blocks <= MAX_BLOCKS:
            hub_name = (info.repository or "").removeprefix(HUB_URL)
            is_on_hub = hub_name != (info.repository or "")
            yield SurveyedModel(
                prefix[:MAX_TEXT_CHARS], info.num_blocks, hub_name[:MAX_TEXT_CHARS] if is_on_hub else None
            )


def _is_prefix(text: str) -> bool:
    """Whether names of blocks can begin with it; they go on with a delimiter and a number."""
    return UID_DELIMITER not in text and not any(map(str.isspace, text))


def _state(models: Sequence[SurveyedModel], swarms: Sequence[SwarmStatus]) -> SwarmState:
    now = time.time()
    reports = [
        model_report(
            swarm,
            _status(swarm),
            now,
            key=model.hub_name or model.dht_prefix,
            display_name=model.hub_name or model.dht_prefix,
            hub_name=model.hub_name,
            dht_prefix=model.dht_prefix,
        )
        for model, swarm in zip(models, swarms, strict=True)
    ]
    return swarm_state(swarms, reports)


def _status(swarm: SwarmStatus) -> ModelState:
    if swarm.missing_blocks:
        return ModelState.BROKEN
    return ModelState.FULL if swarm.full_blocks else ModelState.READY
