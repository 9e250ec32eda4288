"""The environment of the GPTQ suite: not made without room, and made again when it should hold other things."""

from tests.gptq import environment


def test_without_room_it_says_so_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "free_bytes", lambda: environment.NEEDED_BYTES - 1)
    assert environment.main() == environment.NO_ROOM
    said = capsys.readouterr()
    assert not said.out
    assert "needs 15 GB of disk, 15.0 are free" in said.err
    assert not list(tmp_path.rglob("*python*"))


def test_what_was_made_is_kept_until_it_should_hold_something_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    venv = environment.cache() / "gptq-venv"
    venv.mkdir(parents=True)
    (venv / "stamp").write_text(environment.digest())
    (venv / "source").write_text(str(environment.ROOT))
    assert environment.main() == 0
    assert capsys.readouterr().out.strip() == str(environment.python_of(venv))
    monkeypatch.setattr(environment, "REQUIREMENTS", [*environment.REQUIREMENTS, "something==1"])
    assert not environment.is_made(venv)
