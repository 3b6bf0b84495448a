import multiprocessing
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from petals_chat.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("petals")


def test_a_missing_identity_is_made_once(tmp_path: Path) -> None:
    from petals_chat.swarm.server import prepare_identity

    path = tmp_path / "new" / "host.id"
    prepare_identity(path)
    key = path.read_bytes()
    prepare_identity(path)
    assert path.read_bytes() == key


def test_a_file_that_is_no_key_is_not_used_as_identity(tmp_path: Path) -> None:
    from petals_chat.swarm.server import prepare_identity

    path = tmp_path / "notes.txt"
    path.write_text("garbage")
    with pytest.raises(ConfigurationError, match=r"--identity .*notes\.txt: this is no key"):
        prepare_identity(path)


def test_an_identity_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    from petals_chat.swarm.server import prepare_identity

    with pytest.raises(ConfigurationError, match=r"--identity .*: Is a directory"):
        prepare_identity(tmp_path)


def test_a_host_without_a_record_of_its_own_keeps_its_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from petals.data_structures import RemoteModuleInfo
    from petals.server import server as petals_server

    from petals_chat.swarm.server import _Server

    monkeypatch.setattr(
        petals_server, "get_remote_module_infos", lambda *_, **__: [RemoteModuleInfo("tiny.0", {})]
    )
    server = object.__new__(_Server)
    server.strict_block_indices, server.balance_quality = None, 0.75
    server.module_uids = ["tiny.0"]
    server.dht = SimpleNamespace(peer_id="this host")
    assert not server._should_choose_other_blocks()
    assert "not present in the DHT" in caplog.text


def test_a_handler_that_hangs_can_be_ended() -> None:
    from petals_chat.swarm.tied import TiedHandler, _tie_to_parent

    class Hanging(TiedHandler):
        def __init__(self) -> None:
            multiprocessing.get_context("fork").Process.__init__(self)

        def run(self) -> None:
            _tie_to_parent(is_broken=lambda: False)
            is_tied.set()
            threading.Event().wait()

    is_tied = multiprocessing.get_context("fork").Event()
    handler = Hanging()
    handler.start()
    try:
        assert is_tied.wait(20)
        handler.terminate()
        handler.join(20)
        assert handler.exitcode is not None
    finally:
        handler.kill()
        handler.join()
