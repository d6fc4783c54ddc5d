"""Settings: where values come from, and how wrong ones are told."""

from __future__ import annotations

import json
import pickle
import stat

import pytest
from loraplex.cluster.cli_config import show_settings
from loraplex.cluster.errors import ClusterSecretError, SettingsError
from loraplex.cluster.settings import Settings
from loraplex.cluster.settings_sources import read_sources


def test_arguments_win_over_variables_and_these_over_defaults(monkeypatch):
    monkeypatch.setenv("LORAPLEX_PORT", "9000")
    monkeypatch.setenv("LORAPLEX_TP", "2")
    monkeypatch.setenv("LORAPLEX_POOL_BYTES", "32MiB")
    settings = Settings.load(port=9001, tp=None)
    assert (settings.port, settings.tp, settings.pool_bytes) == (9001, 2, 32 << 20)
    assert settings.host == "127.0.0.1"


def test_every_wrong_value_is_named_with_what_would_be_right(monkeypatch):
    monkeypatch.setenv("LORAPLEX_PORT", "abc")
    monkeypatch.setenv("LORAPLEX_STORE_URL", "http://bucket")
    monkeypatch.setenv("LORAPLEX_STORE_SECRET_KEY", "hush")
    with pytest.raises(SettingsError) as caught:
        Settings.load(groups=0, device="tpu", gropus=3)
    lines = str(caught.value).splitlines()
    assert any(line.startswith("LORAPLEX_PORT = 'abc'") for line in lines)
    assert any("LORAPLEX_STORE_URL" in line and "s3://bucket" in line for line in lines)
    assert any(line.startswith("groups = 0") for line in lines)
    assert any("'cpu'" in line and line.startswith("device = 'tpu'") for line in lines)
    assert "gropus: there is no such setting; did you mean groups?" in lines
    assert len(lines) == 5
    assert "hush" not in str(caught.value)


def test_a_changed_copy_is_checked_and_keeps_what_was_set():
    settings = Settings.load(tp=2, store_secret_key="hush")
    changed = settings.changed(port=0)
    assert (changed.tp, changed.port) == (2, 0)
    assert changed.model_fields_set == {"tp", "store_secret_key", "port"}
    with pytest.raises(SettingsError, match="port"):
        settings.changed(port=-1)


def test_settings_travel_between_processes_without_showing_secrets():
    settings = Settings.load(store_secret_key="hush", cluster_secret="s" * 32)
    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert copy.store_options()["secret_key"] == "hush"
    assert "hush" not in repr(settings)
    assert "sss" not in repr(settings)


def test_the_cluster_secret_is_made_once_and_only_its_owner_reads_it(tmp_path):
    settings = Settings.load(data_dir=tmp_path / "data")
    with pytest.raises(ClusterSecretError, match="with_cluster_secret"):
        settings.secret_bytes()
    secret = settings.with_cluster_secret().secret_bytes()
    assert len(secret) >= 32
    assert settings.with_cluster_secret().secret_bytes() == secret
    assert stat.S_IMODE(settings.secret_path.stat().st_mode) == 0o600


def test_a_secret_file_that_is_too_short_or_unreadable_is_named(tmp_path):
    file = tmp_path / "secret"
    file.write_text("short")
    with pytest.raises(ClusterSecretError, match=str(file)):
        Settings.load(cluster_secret_file=file).with_cluster_secret()
    with pytest.raises(ClusterSecretError, match="cannot use"):
        Settings.load(cluster_secret_file=tmp_path).with_cluster_secret()


def test_an_ep_that_doesnt_divide_tp_is_refused_with_both():
    assert Settings.load(tp=4, ep=2).ep == 2
    with pytest.raises(SettingsError, match=r"^ep = 3: must divide tp = 4"):
        Settings.load(tp=4, ep=3)
    with pytest.raises(SettingsError, match=r"^ep = 2: must divide tp = 1"):
        Settings.load(ep=2)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "loraplex.toml"
        path.write_text(text)
        return path

    return write


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(config_file, monkeypatch):
    path = config_file('port = 1\ntp = 2\ngroups = 3\npool_bytes = "64MiB"\n')
    monkeypatch.setenv("LORAPLEX_PORT", "11")
    monkeypatch.setenv("LORAPLEX_TP", "12")
    sources = read_sources(path, {"port": 21, "ep": None})
    settings = Settings.from_sources(sources)
    assert (settings.port, settings.tp, settings.groups, settings.ep) == (21, 12, 3, 1)
    assert settings.pool_bytes == 64 << 20
    origins = [sources.origin(name) for name in ("port", "tp", "groups", "ep")]
    assert origins == ["flag", "LORAPLEX_TP", str(path), "default"]
    assert settings.model_fields_set == {"port", "tp", "groups", "pool_bytes"}


def test_the_file_may_be_named_by_a_variable_and_is_read_once(config_file, monkeypatch):
    path = config_file("groups = 3\n")
    monkeypatch.setenv("LORAPLEX_CONFIG", str(path))
    settings = Settings.load(port=1)
    path.unlink()
    assert settings.changed(tp=2).groups == 3
    with pytest.raises(SettingsError, match=r"LORAPLEX_CONFIG=.*loraplex\.toml: .*can't be read"):
        Settings.load()


def test_errors_of_the_file_name_it_and_show_no_secret(config_file):
    path = config_file('port = "x"\ngropus = 2\ncluster_secret = ["hush"]\n')
    with pytest.raises(SettingsError) as caught:
        Settings.load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith(f"{path}: port = 'x': ") and "integer" in line for line in lines)
    assert f"{path}: gropus: there is no such setting; did you mean groups?" in lines
    assert "hush" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"isn't TOML.*line 1"):
        Settings.load(config_file("port: 3"))


def test_config_shows_each_value_with_its_origin_and_hides_secrets(
    config_file, monkeypatch, capsys
):
    path = config_file('store_secret_key = "hush"\nstore_kms_key = "alias/lora"\n')
    monkeypatch.setenv("LORAPLEX_METRICS_TOKEN", "hush")
    monkeypatch.setenv("LORAPLEX_PROT", "1")
    show_settings([], True, path, ["max-running=7"])
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) == set(Settings.model_fields)
    assert rows["max_running"] == {"value": 7, "origin": "flag"}
    assert rows["store_secret_key"] == {"value": "(hidden)", "origin": str(path)}
    assert rows["metrics_token"] == {"value": "(hidden)", "origin": "LORAPLEX_METRICS_TOKEN"}
    assert rows["cluster_secret"] == {"value": None, "origin": "default"}
    show_settings(["store_kms_key", "metrics_token"], False, path, [])
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["metrics_token", "(hidden)"],
        ["store_kms_key", "alias/lora"],
    ]
    assert "LORAPLEX_PROT" in shown.err
    assert "hush" not in shown.out + shown.err
    with pytest.raises(SettingsError, match="no setting nope"):
        show_settings(["nope"], False, None, [])
    with pytest.raises(SettingsError, match="name=value"):
        show_settings([], False, None, ["port"])
