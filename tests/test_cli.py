"""The `arealite` command."""

import pytest

from arealite.cli import main
from arealite.errors import ConfigError


def test_the_help_of_serve_lists_its_settings(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ending:
        main(["serve", "--help"])
    assert ending.value.code == 0
    assert "server.cpu_cache_gib: int = 1" in capsys.readouterr().out


def test_a_wrong_setting_starts_no_server_and_names_the_nearest():
    with pytest.raises(ConfigError, match=r"server\.gpsu=1 is not a key\. .* server\.gpus;"):
        main(["serve", "--model", "x", "server.gpsu=1"])


def test_addresses_are_no_setting_for_starting_servers():
    with pytest.raises(ConfigError, match=r"Give the addresses to the recipe instead\."):
        main(["serve", "server.addresses=[http://127.0.0.1:8000]"])


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["sreve"])
    assert "'serve'" in capsys.readouterr().err
