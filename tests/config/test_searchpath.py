"""Hydra's search path."""

from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

import hydra_plugins.verl_searchpath as plugin
from verl.config import load_config
from verl.config.searchpath import VerlSearchPath


def test_hydra_discovers_the_search_path_plugin():
    assert plugin.VerlSearchPath is VerlSearchPath
    load_config([])
    assert Plugins.instance().discover(SearchPathPlugin).count(VerlSearchPath) == 1


def test_plugin_is_registered_if_hydra_does_not_discover_it(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\n")
    known = Plugins.instance().plugin_type_to_subclass_list
    others = [plugin for plugin in known[SearchPathPlugin] if plugin.__name__ != "VerlSearchPath"]
    monkeypatch.setitem(known, SearchPathPlugin, others)
    assert load_config(config_path=tmp_path, config_name="mine") == load_config()
