"""Settings: the order of the sources, the models' table, and errors that say what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from petals_chat.errors import ConfigurationError
from petals_chat.settings import Device, Dtype, ModelSettings, Settings, load_settings


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(
    toml: str = "", environment: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> Settings:
    Path("petals-chat.toml").write_text(toml)
    return load_settings(environment=environment or {}, overrides=overrides)


def problem(
    toml: str = "", environment: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> str:
    with pytest.raises(ConfigurationError) as raised:
        load(toml, environment, overrides)
    return raised.value.message


def models(toml: str) -> dict[str, ModelSettings]:
    return {model.key: model for model in load(toml).models}


# Sources


def test_without_any_source_there_are_the_defaults() -> None:
    assert load_settings(environment={}) == Settings()


def test_a_later_source_wins_for_each_key_on_its_own() -> None:
    settings = load(
        '[server]\nhost = "10.0.0.1"\nport = 1\nlog_level = "debug"',
        {"PETALS_CHAT_SERVER__PORT": "2", "PETALS_CHAT_SERVER__LOG_LEVEL": "error"},
        ["server.log_level=warning"],
    )
    assert (settings.server.host, settings.server.port, settings.server.log_level) == (
        "10.0.0.1",
        2,
        "warning",
    )


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().server.port = 1


def test_values_of_variables_are_toml_or_else_text() -> None:
    settings = load(
        environment={
            "PETALS_CHAT_SERVER__HOST": "::1",
            "PETALS_CHAT_SERVER__CORS_ORIGINS": '["https://a.org", "https://b.org"]',
            "PETALS_CHAT_SERVER__DEBUG_TRACEBACKS": "true",
            "PETALS_CHAT_SWARM__INITIAL_PEERS": "public",
            "PETALS_CHAT_ENGINE__DEVICE": "cpu",
            "PETALS_CHAT_LIMITS__PING_INTERVAL_SECONDS": "2.5",
        }
    )
    assert settings.server.host == "::1"
    assert settings.server.cors_origins == ("https://a.org", "https://b.org")
    assert settings.server.debug_tracebacks is True
    assert settings.swarm.initial_peers == "public"
    assert settings.engine.device is Device.CPU
    assert settings.limits.ping_interval_seconds == 2.5


def test_a_text_that_looks_like_a_date_stays_text() -> None:
    [model] = load(overrides=['models."me/model".revision=2024-01-31']).models
    assert model.revision == "2024-01-31"


def test_a_variable_can_hold_a_whole_section() -> None:
    [model] = load(environment={"PETALS_CHAT_MODELS": '{"Qwen/Qwen3-8B" = true}'}).models
    assert model.key == "Qwen/Qwen3-8B"


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_CHAT_SERVER__PORT", "5001")
    assert load_settings().server.port == 5001


def test_the_file_of_the_command_line_wins_over_the_one_of_the_environment(tmp_path: Path) -> None:
    for name in ("asked", "named", "petals-chat"):
        (tmp_path / f"{name}.toml").write_text(f'[server]\nroot_path = "/{name}"')
    environment = {"PETALS_CHAT_CONFIG": "named.toml"}
    assert load_settings(Path("asked.toml"), environment).server.root_path == "/asked"
    assert load_settings(None, environment).server.root_path == "/named"
    assert load_settings(None, {}).server.root_path == "/petals-chat"


@pytest.mark.parametrize("environment", [{}, {"PETALS_CHAT_CONFIG": "nowhere.toml"}])
def test_a_file_that_is_asked_for_must_exist(environment: Mapping[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"the configuration file nowhere\.toml does not exist"):
        load_settings(None if environment else Path("nowhere.toml"), environment)


def test_a_directory_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load_settings(tmp_path, {})


def test_a_syntax_error_has_its_line() -> None:
    message = problem("[server]\nport = 1\nhost = \n")
    assert message.startswith("petals-chat.toml: not valid TOML")
    assert "line 3" in message


def test_a_file_in_another_encoding_is_reported() -> None:
    Path("latin.toml").write_bytes("# caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load_settings(Path("latin.toml"), {})


def test_relative_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "chat.toml").write_text(
        '[engine]\ndata_dir = "data"\n[models.mine]\nrepository = "./model"\nadapter = "../adapter"'
    )
    settings = load_settings(Path("etc/chat.toml"), {})
    assert settings.engine.data_dir == tmp_path / "etc" / "data"
    assert settings.models[0].repository == str(tmp_path / "etc" / "model")
    assert settings.models[0].adapter == str(tmp_path / "adapter")
    assert load(overrides=["engine.data_dir=data"]).engine.data_dir == tmp_path / "data"


# Problems


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[server]\nport = 70000", "server.port = 70000, but it must be a whole number from 0 to 65535"),
        ("[server]\nport = true", "server.port = true, but it must be a whole number from 0 to 65535"),
        ("[server]\nport = '5000'", 'server.port = "5000", but it must be a whole number from 0 to 65535'),
        ("[server]\nport = 1.5", "server.port = 1.5, but it must be a whole number from 0 to 65535"),
        ("[server]\nhost = ''", 'server.host = "", but it must be a non-empty string'),
        ("[server]\nhost = 1", "server.host = 1, but it must be a non-empty string"),
        ("[server]\ndebug_tracebacks = 1", "server.debug_tracebacks = 1, but it must be true or false"),
        ("[server]\nlog_level = 'all'", 'it must be one of "debug", "info", "warning", "error"'),
        ("[server]\nroot_path = 'chat/'", 'it must be a string like "/chat" (no slash at the end), or empty'),
        (
            "[server]\ncors_origins = ['*', 'a.org/']",
            'server.cors_origins has "a.org/", but it must be a list of',
        ),
        ("[limits]\nping_interval_seconds = inf", "= inf, but it must be a number above 0"),
        (
            "[limits]\nmax_sessions = 0",
            "limits.max_sessions = 0, but it must be a whole number of at least 1",
        ),
        ("[engine]\ndtype = 'int8'", 'it must be one of "auto", "float32", "bfloat16", "float16"'),
        ("[models.mine]\nrepository = ''", 'models.mine.repository = "", but it must be a non-empty string'),
        ("[engine]\ndata_dir = 1", "engine.data_dir = 1, but it must be a path"),
        ("[swarm]\ndht_prefix = 'a.b'", "it must be a string without dots and spaces"),
        (
            "[swarm]\ninitial_peers = ['bootstrap1']",
            'swarm.initial_peers has "bootstrap1", but it must be "public" or a list of strings like "/ip4/',
        ),
        ("server = 1", "server = 1, but it must be a table of settings"),
        (
            "[models.'a/b'.chat.generation]\ntop_p = 2",
            'models."a/b".chat.generation.top_p = 2, but it must be',
        ),
        ("[models]\n'a/b' = 3", 'model "a/b" = 3, but it must be true, false or a table of settings'),
        ("models = 1", "models = 1, but it must be a table with one entry for each model"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_what_would_be_right(toml: str, sentence: str) -> None:
    message = problem(toml)
    assert message.startswith("petals-chat.toml: ")
    assert sentence in message


@pytest.mark.parametrize(
    ("toml", "advice"),
    [
        ("[server]\nprot = 1", "there is no setting server.prot. Did you mean server.port?"),
        ("[serve]\nport = 1", "there is no section serve. Did you mean server?"),
        ("[server]\ndevice = 'cpu'", "there is no setting server.device. Did you mean engine.device?"),
        ("port = 1", "there is no section port. Did you mean server.port?"),
        ("[engine]\nzzz = 1", "The settings there are: device, dtype, head, threads,"),
        ("zzz = 1", "The sections there are: server, limits, api, swarm, engine,"),
        ("[models.'a/b'.chat]\nstop_tokens = 1", 'Did you mean models."a/b".chat.stop_token?'),
        ("[models.'a/b']\nkey = 'x'", "remove key"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_one_or_all(toml: str, advice: str) -> None:
    assert advice in problem(toml)


def test_a_problem_names_the_variable_that_it_came_from() -> None:
    message = problem(environment={"PETALS_CHAT_SERVER__PORT": "http"})
    assert message.startswith('PETALS_CHAT_SERVER__PORT: server.port = "http", but')
    message = problem(environment={"PETALS_CHAT_PORT": "1"})
    assert message == "PETALS_CHAT_PORT: there is no section port. Did you mean server.port?"


def test_a_problem_names_the_command_line_that_it_came_from() -> None:
    message = problem("[server]\nport = 1", {"PETALS_CHAT_SERVER__PORT": "2"}, ["server.port=x"])
    assert message.startswith('command line: server.port = "x", but')


@pytest.mark.parametrize("text", ["server.port", "=1", "a b=1", "server..port=1", ""])
def test_an_override_that_is_no_assignment_is_reported(text: str) -> None:
    assert problem(overrides=[text]).startswith(
        f"command line: {text!r} is not of the form section.key=value"
    )


def test_a_line_break_in_a_value_cannot_smuggle_in_another_setting() -> None:
    assert load(overrides=["server.root_path=", "server.host=a\nport=1"]).server.host == "a\nport=1"


def test_all_problems_are_reported_at_once() -> None:
    message = problem(
        "[server]\nport = -1\nprot = 1\n[models]\n'Qwen/Qwen3-9B' = true",
        {"PETALS_CHAT_ENGINE__DEVICE": "tpu"},
        ["nonsense", "limits.max_sessions=0"],
    )
    assert message.startswith("the configuration has 6 problems:\n")
    for part in (
        "server.port",
        "server.prot",
        "Qwen/Qwen3-9B",
        "ENGINE__DEVICE",
        "'nonsense'",
        "max_sessions",
    ):
        assert part in message


def test_values_after_an_unreadable_file_are_checked_all_the_same() -> None:
    message = problem("[", {"PETALS_CHAT_SERVER__PORT": "x"})
    assert "not valid TOML" in message
    assert "PETALS_CHAT_SERVER__PORT" in message


# Models


def test_one_line_switches_a_model_of_the_catalog_on() -> None:
    [model] = load('[models]\n"petals-team/StableBeluga2" = true').models
    assert (model.name, model.family) == ("Stable Beluga 2 (70B)", "Llama 2")
    assert model.aliases == ("stabilityai/StableBeluga2",)


def test_values_in_the_file_are_laid_over_those_of_the_catalog() -> None:
    model = models(
        '[models]\n"Qwen/Qwen3-32B" = { public_api = false }\n'
        '[models."Qwen/Qwen3-8B".chat]\nmax_session_length = 99'
    )
    assert model["Qwen/Qwen3-32B"].public_api is False
    assert model["Qwen/Qwen3-32B"].name == "Qwen 3 (32B)"
    assert model["Qwen/Qwen3-8B"].chat.max_session_length == 99
    assert model["Qwen/Qwen3-8B"].chat.stop_token == "<|im_end|>"


def test_an_entry_of_its_own_needs_nothing_but_its_name() -> None:
    [model] = load('[models."me/my-model"]').models
    assert model == ModelSettings(key="me/my-model", repository="me/my-model", name="my-model")


def test_false_switches_a_model_off_from_any_source() -> None:
    toml = '[models]\n"Qwen/Qwen3-8B" = true\n"Qwen/Qwen3-4B" = false'
    assert [model.key for model in load(toml).models] == ["Qwen/Qwen3-8B"]
    assert load(toml, overrides=['models."Qwen/Qwen3-8B"=false']).models == ()


def test_true_from_a_later_source_keeps_what_is_written_in_the_table() -> None:
    [model] = load('[models."me/model"]\nname = "Mine"', overrides=['models."me/model"=true']).models
    assert model.name == "Mine"


def test_models_are_grouped_by_family_in_the_order_of_the_file() -> None:
    toml = "".join(
        f'[models.{key}]\nfamily = "{family}"\nrepository = "/models/{key}"\n'
        for key, family in [("b1", "B"), ("a1", "A"), ("b2", "B"), ("a2", "A")]
    )
    assert [model.key for model in load(toml).models] == ["b1", "b2", "a1", "a2"]


@pytest.mark.parametrize(
    "written", ["stabilityai/StableBeluga2", "petals-team/StableBeluga-2", "petals-team/stablebeluga2"]
)
def test_true_for_a_model_outside_the_catalog_suggests_the_nearest(written: str) -> None:
    message = problem(f'[models]\n"{written}" = true')
    assert "is not in the catalog" in message
    assert 'Did you mean "petals-team/StableBeluga2"' in message
    assert f'[models."{written}"]' in message


def test_an_adapter_has_its_own_name_as_key_and_needs_its_base_model() -> None:
    toml = '[models."me/adapter"]\nadapter = "me/adapter"\n'
    assert "needs the repository of the model that it adapts" in problem(toml)
    [model] = load(f'{toml}repository = "base/model"').models
    assert (model.key, model.repository, model.adapter) == ("me/adapter", "base/model", "me/adapter")


def test_a_key_that_names_another_repository_is_refused() -> None:
    message = problem('[models."me/adapter"]\nrepository = "base/model"')
    assert 'add adapter = "me/adapter"' in message


def test_a_key_without_a_slash_is_free() -> None:
    model = models('[models.fast]\nrepository = "base/model"\n[models.local]\nrepository = "/models/one"')
    assert model["fast"].repository == "base/model"
    assert model["local"].repository == "/models/one"
    assert model["local"].name == "local"


def test_a_local_copy_keeps_the_key_of_the_model_that_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "copies" / "qwen").mkdir(parents=True)
    model = models(
        '[models."me/model"]\nrepository = "copies/qwen"\n[models."Qwen/Qwen3-8B"]\nrepository = "~/qwen"'
    )
    assert model["me/model"].repository == str(tmp_path / "copies" / "qwen")
    assert model["Qwen/Qwen3-8B"].repository == str(Path("~/qwen").expanduser())


def test_a_hub_name_is_not_taken_for_a_directory() -> None:
    assert models('[models."me/model"]')["me/model"].repository == "me/model"


def test_two_models_cannot_have_the_same_name() -> None:
    message = problem('[models."a/a"]\naliases = ["x", "b/b"]\n[models."b/b"]\naliases = ["x"]')
    assert 'the alias "b/b" of model "a/a" is a name of model "b/b" too' in message
    assert 'the alias "x" of model "b/b" is a name of model "a/a" too' in message


def test_a_model_can_have_a_swarm_and_a_device_of_its_own() -> None:
    peer = "/dns/example.org/tcp/31337/p2p/QmServer"
    model = models(
        f'[swarm]\ninitial_peers = "public"\n[models."a/a"]\ninitial_peers = ["{peer}"]\ndtype = "float32"\n'
        '[models."b/b"]\ninitial_peers = []\n[models."c/c"]'
    )
    assert model["a/a"].initial_peers == (peer,)
    assert model["a/a"].dtype is Dtype.FLOAT32
    assert model["b/b"].initial_peers == ()
    assert model["c/c"].initial_peers is None
