"""Add verl's YAML files to Hydra's search path, so that any file may contain `defaults: [ppo_trainer, _self_]`."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

PACKAGE = "pkg://verl.trainer.config"


class VerlSearchPath(SearchPathPlugin):
    """Hydra plugin that adds verl's config directory to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory, unless it is there already."""
        if all(element.path != PACKAGE for element in search_path.get_path()):
            search_path.append(provider="verl", path=PACKAGE)


def register() -> None:
    """Register the plugin, for an interpreter in which Hydra does not find it under `hydra_plugins`."""
    Plugins.instance().register(VerlSearchPath)
