"""Downloads from a Hub on loopback, and each of its refusals."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kani_nb.engines.base import LoadProgress
from kani_nb.engines.hub import cached_models, find_token, hub_environment
from kani_nb.engines.sources import prefetch, resolve
from kani_nb.errors import (
    GatedModelError,
    KaniNbError,
    ModelFilesError,
    ModelUnavailableError,
    UnknownModelError,
)
from tests.sources.hub_stand_in import COMMIT, HubStandIn, Repo
from tests.sources.tiny import model_files, safetensors

SECRET = "hf_averysecretvalue"


def test_a_model_is_downloaded_once_and_then_found_without_the_network(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    source = resolve("org/tiny")
    assert source.origin == f"Hugging Face Hub, org/tiny@{COMMIT[:7]} (bf16 originals)"
    assert (source.folder / "model.safetensors").read_bytes() == model_files()["model.safetensors"]
    before = len(hub.seen)
    assert resolve("org/tiny", local_only=True) == source
    assert len(hub.seen) == before


def test_only_the_needed_files_are_downloaded(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    folder = resolve("org/tiny").folder
    assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_hubs_own_library_finds_what_was_downloaded(hub: HubStandIn, own_caches: Path) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    folder = resolve("org/tiny").folder
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    cache = own_caches / "hf" / "hub"
    found = try_to_load_from_cache("org/tiny", "model.safetensors", cache_dir=cache)
    assert Path(str(found)) == folder / "model.safetensors"
    scanned = scan_cache_dir(cache)
    assert [each.repo_id for each in scanned.repos] == ["org/tiny"]
    assert not scanned.warnings


def test_a_mirror_that_lists_only_names_works_too(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files(), sizes=False)
    assert resolve("org/tiny").size_bytes == len(model_files()["model.safetensors"])


def test_sharded_weights_come_whole(hub: HubStandIn) -> None:
    files = model_files()
    del files["model.safetensors"]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "%s", "b": "%s"}}' % tuple(n.encode() for n in names)
    files.update({name: safetensors() for name in names})
    hub.repos["org/sharded"] = Repo(files)
    assert resolve("org/sharded").size_bytes == 2 * len(safetensors())


def test_the_size_is_said_first_and_bytes_are_counted_while_they_come(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files(b"\1" * 3_000_000), stall_at={"model.safetensors": 2_000_000})
    steps: list[LoadProgress] = []

    def listen(step: LoadProgress) -> None:
        steps.append(step)
        if step.fraction is not None and 0 < step.fraction < 1 and "model.safetensors: " in step.detail:
            hub.released.set()

    # The server holds back the last third until progress about the first part was told.
    prefetch("org/tiny", listen)
    downloads = [step for step in steps if step.stage == "download"]
    assert downloads[0].detail.startswith("org/tiny: 3.0 MB in 3 files, ")
    assert "free on the disk" in downloads[0].detail
    assert any("of 3.0 MB" in step.detail and 0 < (step.fraction or 0) < 1 for step in downloads[1:])
    assert downloads[-1].fraction == 1.0


def test_a_download_cut_in_the_middle_goes_on_from_there_the_next_time(hub: HubStandIn) -> None:
    repo = Repo(model_files(b"\1" * 900_000), cut_at={"model.safetensors": 500_000})
    hub.repos["org/tiny"] = repo
    with pytest.raises(ModelUnavailableError, match=r"broke off in model\.safetensors.*500 kB of 900 kB") as caught:
        resolve("org/tiny")
    assert "only the rest" in caught.value.fix
    before = len(hub.seen)
    repo.cut_at.clear()
    source = resolve("org/tiny")
    again = [each for each in hub.seen[before:] if each.path.endswith("model.safetensors")]
    assert [each.offset for each in again] == [500_000]
    assert again[0].sent_bytes == source.size_bytes - 500_000
    assert not [each for each in hub.seen[before:] if each.path.endswith("config.json")]


def test_a_short_break_is_mended_within_one_call(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files(b"\1" * 900_000), cut_at={"model.safetensors": 500_000}, cuts_left=2)
    resolve("org/tiny")
    assert [each.offset for each in hub.files_asked("model.safetensors")] == [0, 500_000, 500_000]


def test_an_interrupt_ends_a_stalled_download_at_once_and_keeps_what_came(hub: HubStandIn) -> None:
    repo = Repo(model_files(b"\1" * 900_000), stall_at={"model.safetensors": 600_000})
    hub.repos["org/tiny"] = repo
    cancelled, stalled = threading.Event(), threading.Event()
    hub.on_stall = stalled.set
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            resolve("org/tiny", cancelled=cancelled)
        except ModelUnavailableError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert stalled.wait(10)
    _wait_for(lambda: _partial_bytes() >= 500_000)
    started = time.monotonic()
    cancelled.set()
    thread.join(20)
    assert time.monotonic() - started < 10, "the stalled server alone would have been waited for"
    assert "interrupted" in str(outcome[0])
    held = _partial_bytes()
    hub.released.set()
    resolve("org/tiny")
    assert hub.files_asked("model.safetensors")[-1].offset == held


def _partial_bytes() -> int:
    import os

    return sum(path.stat().st_size for path in Path(os.environ["HF_HOME"]).rglob("*.incomplete"))


def _wait_for(claim: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_an_interrupt_before_the_first_byte_fetches_nothing(hub: HubStandIn) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(ModelUnavailableError, match="interrupted"):
        resolve("org/tiny", cancelled=cancelled)
    assert not hub.seen


def test_two_downloads_of_one_model_at_once_fetch_it_once(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files(b"\1" * 900_000), stall_at={"model.safetensors": 300_000})
    waiting = threading.Event()
    hub.on_stall = lambda: hub.released.set() if waiting.is_set() else None
    found = []

    def run() -> None:
        found.append(resolve("org/tiny", progress=lambda step: hub.released.set() if step.stage == "waiting" else None))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    assert found[0] == found[1]
    assert sum(each.sent_bytes for each in hub.files_asked("model.safetensors")) == found[0].size_bytes


def test_an_unknown_repository_offers_near_misses(hub: HubStandIn) -> None:
    with pytest.raises(UnknownModelError, match="SmolLM2-135M-Instrukt") as caught:
        resolve("HuggingFaceTB/SmolLM2-135M-Instrukt")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in caught.value.fix


def test_a_cached_model_is_a_near_miss_too(hub: HubStandIn) -> None:
    hub.repos["school/poetry-writer"] = Repo(model_files())
    resolve("school/poetry-writer")
    with pytest.raises(UnknownModelError, match="did you mean school/poetry-writer"):
        resolve("school/poetry-writr")


def test_an_unknown_revision_is_named(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    assert resolve("org/tiny", revision="v1").folder.name == COMMIT
    with pytest.raises(UnknownModelError, match="no revision 'v2'"):
        resolve("org/tiny", revision="v2")


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (403, ""), (401, "")])
@pytest.mark.parametrize("where", ["error", "file_error"])
def test_a_gated_model_names_its_licence_page_and_an_open_one_of_its_size(
    hub: HubStandIn, status: int, code: str, where: str
) -> None:
    repo = Repo(model_files())
    setattr(repo, where, (status, code, 100))
    hub.repos["meta/Llama-3.2-1.5B-Instruct"] = repo
    with pytest.raises(GatedModelError) as caught:
        resolve("meta/Llama-3.2-1.5B-Instruct", token=SECRET)
    text = str(caught.value)
    assert f"{hub.url}/meta/Llama-3.2-1.5B-Instruct" in text
    assert "olmo2-1b" in text or "qwen2.5-1.5b" in text
    assert SECRET not in text
    assert hub.seen[0].authorization == f"Bearer {SECRET}"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_for_a_moment_is_asked_again(hub: HubStandIn, status: int) -> None:
    hub.repos["org/tiny"] = Repo(model_files(), file_error=(status, "", 2))
    assert resolve("org/tiny").kind == "hub"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("where", ["error", "file_error"])
def test_a_server_that_keeps_failing_is_reported(hub: HubStandIn, status: int, where: str) -> None:
    repo = Repo(model_files())
    setattr(repo, where, (status, "", 100))
    hub.repos["org/tiny"] = repo
    with pytest.raises(ModelUnavailableError, match=str(status)):
        resolve("org/tiny")


def test_no_network_and_nothing_cached_says_so() -> None:
    with pytest.raises(ModelUnavailableError, match=r"org/tiny is not in the local caches.*could not be reached"):
        resolve("org/tiny")


def test_a_forbidden_network_is_not_asked(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="HF_HUB_OFFLINE"):
        resolve("org/tiny")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelUnavailableError, match="--local-only"):
        resolve("org/tiny", local_only=True)
    assert not hub.seen


@pytest.mark.parametrize("sizes", [True, False])
def test_a_file_of_the_wrong_size_is_never_used(hub: HubStandIn, sizes: bool) -> None:
    files = model_files()
    repo = Repo(files, sizes=sizes, altered={"model.safetensors": files["model.safetensors"][:-100]})
    hub.repos["org/tiny"] = repo
    with pytest.raises(ModelFilesError, match=r"model\.safetensors"):
        resolve("org/tiny")
    with pytest.raises(ModelUnavailableError if sizes else ModelFilesError):
        resolve("org/tiny", local_only=True)


def test_altered_bytes_are_never_used(hub: HubStandIn) -> None:
    files = model_files()
    repo = Repo(files, altered={"model.safetensors": safetensors(b"\2" * 1024)})
    hub.repos["org/tiny"] = repo
    with pytest.raises(ModelFilesError, match="checksum"):
        resolve("org/tiny")
    repo.altered.clear()
    assert resolve("org/tiny").kind == "hub"


def test_pickled_weights_are_refused_unless_asked_for(hub: HubStandIn) -> None:
    files = model_files()
    del files["model.safetensors"]
    hub.repos["org/pickle"] = Repo(files)
    with pytest.raises(ModelFilesError, match="--allow-pickle"):
        resolve("org/pickle")
    assert not hub.files_asked("pytorch_model.bin")
    assert (resolve("org/pickle", allow_pickle=True).folder / "pytorch_model.bin").exists()
    with pytest.raises(ModelFilesError, match="--allow-pickle"):
        resolve("org/pickle")


def test_a_repository_of_ggufs_alone_says_what_to_do(hub: HubStandIn) -> None:
    hub.repos["org/ggufs"] = Repo({"config.json": b"{}", "tiny-q4.gguf": b"GGUF"})
    with pytest.raises(ModelFilesError, match=r"tiny-q4\.gguf"):
        resolve("org/ggufs")


def test_a_full_disk_is_noticed_before_the_first_byte(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(model_files(b"\1" * 900_000))
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=70_000_000 - 2_500_000))
    with pytest.raises(ModelUnavailableError, match=r"needs 900 kB.*67\.5 MB are free"):
        resolve("org/tiny")
    assert not hub.files_asked("config.json")


def test_a_login_page_instead_of_a_hub_is_recognised(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo({"../escape.json": b"{}"})
    with pytest.raises(ModelUnavailableError, match="does not answer like a model hub"):
        resolve("org/tiny")


def test_a_token_is_found_and_never_shown(own_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    (own_caches / "hf").mkdir()
    (own_caches / "hf" / "token").write_text(SECRET + "\n")
    saved = find_token()
    assert saved is not None
    assert saved.value == SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    token = find_token()
    assert token is not None
    assert SECRET not in f"{token} {token!r} {saved} {saved!r} {hub_environment()!r}"
    assert hub_environment().token_source == "HF_TOKEN"


def test_a_token_is_not_carried_to_another_host(hub: HubStandIn) -> None:
    from kani_nb.engines.hub_http import HubToken, open_url

    other = HubStandIn()
    other.repos["org/tiny"] = Repo(model_files())
    path = f"/org/tiny/resolve/{COMMIT}/config.json"
    redirecting = _Redirecting(f"{other.url}{path}")
    try:
        with open_url(f"{redirecting.url}/x", HubToken(SECRET, "a test")) as response:
            assert response.read() == model_files()["config.json"]
        assert other.seen[0].authorization is None
        assert redirecting.authorization == f"Bearer {SECRET}"
    finally:
        redirecting.close()
        other.close()


class _Redirecting:
    def __init__(self, target: str) -> None:
        from http.server import BaseHTTPRequestHandler, HTTPServer

        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.authorization = self.headers["Authorization"]
                self.send_response(302)
                self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.authorization = ""
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_the_environment_is_shown_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://user:pass@mirror.example/hf/")
    monkeypatch.setenv("https_proxy", "http://user:pass@proxy.example:3128")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    found = hub_environment()
    assert found.endpoint == "https://mirror.example/hf"
    assert found.proxies["https"] == "http://proxy.example:3128"
    assert "pass" not in repr(found)
    assert found.ca_bundle == str(tmp_path / "missing.pem")
    assert not found.ca_bundle_exists
    assert found.hub_cache == tmp_path / "hf" / "hub"
    assert found.hub_cache_is_writable


def test_a_missing_certificate_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(KaniNbError, match=r"missing\.pem"):
        resolve("org/tiny")


def test_a_proxy_from_the_environment_is_used(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(model_files())
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("no_proxy", "")
    assert resolve("org/tiny").kind == "hub"


def test_cached_models_are_listed(hub: HubStandIn) -> None:
    assert cached_models() == []
    hub.repos["org/tiny"] = Repo(model_files())
    resolve("org/tiny")
    (found,) = cached_models()
    assert found.name == "org/tiny"
    assert found.size_bytes > found.folder.joinpath("model.safetensors").stat().st_size
