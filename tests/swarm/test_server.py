from pathlib import Path

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
