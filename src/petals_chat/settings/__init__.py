"""Everything that can be configured, typed and validated, as one frozen `Settings`.

Defaults < ``petals-chat.toml`` < environment < command line. This package is the only reader of the
environment. It knows what a valid configuration is, not what is done with it.
"""

from petals_chat.settings.loading import load_settings
from petals_chat.settings.sections import (
    ApiKeySettings,
    ApiSettings,
    ChatSettings,
    Device,
    Dtype,
    EngineSettings,
    GenerationDefaults,
    HeadWeights,
    HistorySettings,
    LimitSettings,
    ModelSettings,
    Multiaddress,
    Seconds,
    Section,
    ServerSettings,
    Settings,
    SwarmSettings,
)
from petals_chat.settings.sources import find_configuration_file

__all__ = [
    "ApiKeySettings",
    "ApiSettings",
    "ChatSettings",
    "Device",
    "Dtype",
    "EngineSettings",
    "GenerationDefaults",
    "HeadWeights",
    "HistorySettings",
    "LimitSettings",
    "ModelSettings",
    "Multiaddress",
    "Seconds",
    "Section",
    "ServerSettings",
    "Settings",
    "SwarmSettings",
    "find_configuration_file",
    "load_settings",
]
