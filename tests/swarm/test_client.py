"""Servers that do not say how they want hidden states, or say nonsense."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("petals")


class Manager:
    """As much of Petals' as is asked here."""

    config = SimpleNamespace(max_retries=3, connect_timeout=0.05, request_timeout=1.0)
    state = SimpleNamespace(p2p=None)
    block_uids = ("tiny.0", "tiny.1")

    def __len__(self) -> int:
        return len(self.block_uids)


def schema_of(**hidden_states: Any) -> Any:
    return [SimpleNamespace(**{"dtype": torch.bfloat16, "compression": 0} | hidden_states)]


@pytest.mark.parametrize(
    "answer",
    [None, 5, [], schema_of(dtype="float32"), schema_of(dtype=torch.int64), schema_of(compression=99)],
    ids=["none", "a number", "nothing in it", "no dtype", "wrong dtype", "no compression"],
)
async def test_another_server_is_asked_next(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from petals_chat.swarm import client

    schemas: dict[str, Any] = {"bad": (answer, {}), "good": (schema_of(), {})}

    def get_stub(_: Any, peer_id: str) -> Any:
        async def rpc_info(_: Any) -> Any:
            if schemas[peer_id][0] is None:
                await asyncio.Event().wait()
            return SimpleNamespace(serialized_info=peer_id)

        return SimpleNamespace(rpc_info=rpc_info)

    monkeypatch.setattr(client, "TransformerConnectionHandler", SimpleNamespace(get_stub=get_stub))
    loads = lambda peer_id: {"inference_schema": schemas[peer_id]}  # noqa: E731
    monkeypatch.setattr(client, "MSGPackSerializer", SimpleNamespace(loads=loads))
    failed: list[str] = []
    routing = client.SwarmRouting(Manager(), on_failure=lambda: None)
    monkeypatch.setattr(routing, "note_failure", lambda span: failed.append(span.peer_id))
    bad, good = (SimpleNamespace(peer_id=name, start=0) for name in ("bad", "good"))
    for count in (1, 2):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
            await routing.tensor_schema(bad)
        assert failed == ["bad"] * count
    assert (await routing.tensor_schema(good)) == schemas["good"][0]
    assert len(failed) == 2
