"""Makes the framework's YAML files known to Hydra: a file elsewhere may say `defaults: [ppo_trainer, _self_]`."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

PACKAGE = "pkg://verl.trainer.config"


class VerlSearchPath(SearchPathPlugin):
    """Appends the framework's own config directory, once."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if all(element.path != PACKAGE for element in search_path.get_path()):
            search_path.append(provider="verl", path=PACKAGE)


def register() -> None:
    """Register the plugin, for an interpreter that does not discover it under `hydra_plugins`."""
    Plugins.instance().register(VerlSearchPath)
