"""One repository of the Hub, brought into the Hub's own cache: only the needed files, resumable, and checked.

The layout is the documented one (`blobs`, `snapshots`, `refs`), so every other program finds the files; an
unfinished one waits beside the blobs as `*.kani_nb.incomplete`. Who is asked, and what a refusal means, is in
`hub_http`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from kani_nb.engines.hub_http import (
    TRANSPORT_ERRORS,
    HubToken,
    abandonable,
    endpoint,
    head,
    open_url,
    public_url,
    refusal,
)
from kani_nb.engines.sources_cache import Fetch, free_bytes, hub_cache_folder, human_bytes, is_disk_full, require_space
from kani_nb.errors import EngineError, ModelFilesError, ModelUnavailableError

#: Seconds before each new attempt that follows one without a single new byte.
RETRY_DELAYS_S = (0.5, 2.0, 4.0)
_CHUNK = 256 * 1024
_SMALL = re.compile(
    r"[^/]+\.(json|txt|jinja|py)|(additional_)?chat_templates?/[^/]+\.jinja|[^/]*tokenizer[^/]*\.model|tekken\.json"
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLE = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository. `blob` is its name in the cache: a sha256, or git's sha1 of a small file."""

    path: str
    size_bytes: int = -1
    blob: str = ""


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """One revision of a repository, and all the files in it."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]


def repo_folder(repo: str) -> Path:
    """Where the Hub's cache keeps `repo`."""
    return hub_cache_folder() / f"models--{repo.replace('/', '--')}"


def repo_info(repo: str, revision: str | None, token: HubToken | None, fetch: Fetch, timeout_s: float) -> RepoInfo:
    """What the Hub has under this name. Gives up after `timeout_s` in all, looking up the name included.

    Raises:
        UnknownModelError: no such repository or revision.
        GatedModelError: access must be granted first.
        ModelUnavailableError: no answer, a server's failure, interrupted.
    """
    address = f"{endpoint()}/api/models/{repo}"
    if revision is not None:
        address += f"/revision/{urllib.parse.quote(revision, safe='')}"

    def ask() -> bytes:
        with open_url(f"{address}?blobs=true", token, timeout_s=timeout_s) as response:
            return response.read()

    body = b""
    try:
        body = abandonable(ask, fetch, timeout_s)
        record = json.loads(body)
        siblings = record.get("siblings", [])
        files = tuple(_repo_file(each) for each in siblings)
        return RepoInfo(repo, str(record["sha"]), files)
    except TRANSPORT_ERRORS as error:
        raise refusal(error, repo, revision, token) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailableError(
            f"{public_url(endpoint())} does not answer like a model hub",
            why=f"its answer begins with {body[:40]!r}; a network's login page answers so, too",
            fix="open a web page to log in to the network, or check HF_ENDPOINT",
        ) from error


def _repo_file(record: dict[str, object]) -> RepoFile:
    path = str(record["rfilename"])
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0]:
        raise ValueError(f"unsafe file name {path!r}")
    lfs = record.get("lfs")
    size, blob = record.get("size"), record.get("blobId")
    if isinstance(lfs, dict):
        size, blob = lfs.get("size", size), lfs.get("sha256")
    return RepoFile(path, size if isinstance(size, int) else -1, str(blob) if blob else "")


def needed_files(info: RepoInfo, *, allow_pickle: bool) -> tuple[RepoFile, ...]:
    """The files that loading takes, small ones first: configuration, tokenizer and one set of weights.

    Raises:
        ModelFilesError: there are no weights that may be loaded.
    """
    by_path = {each.path: each for each in info.files}
    small = [each for each in info.files if _SMALL.fullmatch(each.path)]
    shards = [each for each in info.files if _SHARD.fullmatch(each.path)]
    pickles = [each for each in info.files if _PICKLE.fullmatch(each.path)]
    if "model.safetensors" in by_path:
        weights = [by_path["model.safetensors"]]
    elif shards and "model.safetensors.index.json" in by_path:
        weights = shards
    elif pickles and allow_pickle:
        weights = pickles
    else:
        raise _no_weights(info, pickles)
    if "config.json" not in by_path:
        raise ModelFilesError(f"{info.repo} has no config.json", why="it is not a transformers model")
    return (*small, *sorted(weights, key=lambda each: each.path))


def _no_weights(info: RepoInfo, pickles: list[RepoFile]) -> ModelFilesError:
    if pickles:
        return ModelFilesError(
            f"{info.repo} holds only pickled weights ({pickles[0].path})",
            why="loading a pickle can run any code",
            fix="take a model with safetensors, or, if you trust its owner, add --allow-pickle",
        )
    ggufs = [each.path for each in info.files if each.path.endswith(".gguf")]
    if ggufs:
        return ModelFilesError(
            f"{info.repo} holds no safetensors, but GGUF files ({', '.join(ggufs[:3])})",
            fix="download one of them and load it by its path",
        )
    names = ", ".join(sorted(each.path for each in info.files)[:8]) or "nothing"
    return ModelFilesError(f"{info.repo} holds no weights", why=f"it has {names}", fix="check the name")


def download(
    info: RepoInfo, revision: str | None, fetch: Fetch, *, allow_pickle: bool = False, token: HubToken | None = None
) -> Path:
    """The folder of this revision in the Hub's cache, with every needed file in it. Blocks; cancelling ends it at once.

    Raises:
        ModelUnavailableError: no space, a broken connection, interrupted; the next call goes on from there.
        GatedModelError: access must be granted first.
        ModelFilesError: no weights that may be loaded, or bytes that are not those the Hub announced.
    """
    root = repo_folder(info.repo)
    files = tuple(described(info, each, token, fetch) for each in needed_files(info, allow_pickle=allow_pickle))
    total = sum(each.size_bytes for each in files)
    here = sum(_bytes_here(root, each) for each in files)
    if here < total:
        have = f"{human_bytes(here)} of it are here already, " if here else ""
        size = f"{human_bytes(total)} in {len(files)} files, {have}{human_bytes(free_bytes(root))} free on the disk"
        fetch.say("download", f"{info.repo}: {size}", here / total)
        require_space(root, total - here, f"downloading {info.repo}")
    snapshot = root / "snapshots" / info.commit
    done = 0
    try:
        for file in files:
            place_file(info, file, snapshot, token, fetch, done, total)
            done += file.size_bytes
        if revision != info.commit:
            write_ref(root, revision or "main", info.commit)
    except OSError as error:
        raise ModelUnavailableError(
            f"{info.repo} could not be written to {hub_cache_folder()}",
            why=f"{error}; {human_bytes(free_bytes(root))} are free",
            fix="free some space or point HF_HOME at another disk, and run it again; what is there is kept",
        ) from error
    return snapshot


def described(info: RepoInfo, file: RepoFile, token: HubToken | None, fetch: Fetch) -> RepoFile:
    """`file` with its size and its blob; mirrors that list only names are asked for each file."""
    if file.size_bytes >= 0 and file.blob:
        return file
    address = _address(info, file)
    try:
        headers = abandonable(lambda: head(address, token), fetch)
    except TRANSPORT_ERRORS as error:
        raise refusal(error, info.repo, None, token) from error
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    if size is None or not tag:
        raise ModelUnavailableError(f"{public_url(endpoint())} does not say how large {file.path} of {info.repo} is")
    is_checksum = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", tag)
    # Any other tag of a mirror names the file in the cache, and cannot check it.
    blob = tag if is_checksum else f"{hashlib.sha256(tag.encode()).hexdigest()}-tag"
    return replace(file, size_bytes=int(size), blob=blob)


def fetch_small_file(info: RepoInfo, file: RepoFile, token: HubToken | None, fetch: Fetch, timeout_s: float) -> bytes:
    """The bytes of one small file; nothing is kept on the disk.

    Raises:
        GatedModelError: access must be granted first.
        ModelUnavailableError: no answer, or interrupted.
    """

    def ask() -> bytes:
        with open_url(_address(info, file), token, timeout_s=timeout_s) as response:
            return response.read()

    try:
        return abandonable(ask, fetch, timeout_s)
    except TRANSPORT_ERRORS as error:
        raise refusal(error, info.repo, info.commit, token) from error


def _address(info: RepoInfo, file: RepoFile) -> str:
    return f"{endpoint()}/{info.repo}/resolve/{info.commit}/{urllib.parse.quote(file.path)}"


def _part(root: Path, file: RepoFile) -> Path:
    return root / "blobs" / f"{file.blob}.kani_nb.incomplete"


def _bytes_here(root: Path, file: RepoFile) -> int:
    for path in (root / "blobs" / file.blob, _part(root, file)):
        with contextlib.suppress(OSError):
            return min(path.stat().st_size, file.size_bytes)
    return 0


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def place_file(
    info: RepoInfo, file: RepoFile, snapshot: Path, token: HubToken | None, fetch: Fetch, before: int, total: int
) -> None:
    """Bring one file in, and point the snapshot at it."""
    pointer = snapshot / file.path
    if _has_size(pointer, file.size_bytes):
        return
    root = repo_folder(info.repo)
    blob = root / "blobs" / file.blob
    with _lock(root, file, fetch):
        if not _has_size(blob, file.size_bytes):
            blob.parent.mkdir(parents=True, exist_ok=True)
            _fill(info, file, token, fetch, before, total)
            _verify(info, file, _part(root, file), fetch)
            _part(root, file).replace(blob)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except (OSError, NotImplementedError):  # Windows without the right to make links
            shutil.copyfile(blob, pointer)


@contextlib.contextmanager
def _lock(root: Path, file: RepoFile, fetch: Fetch) -> Iterator[None]:
    """The lock that the Hub's own library takes for this file, where the file system has locks."""
    import filelock

    folder = root.parent / ".locks" / root.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{file.blob}.lock")
    with contextlib.suppress(NotImplementedError):
        while True:
            try:
                lock.acquire(timeout=0.3)
                break
            except filelock.Timeout:
                fetch.say("waiting", f"another process is downloading {file.path}")
    try:
        yield
    finally:
        lock.release()


def _fill(info: RepoInfo, file: RepoFile, token: HubToken | None, fetch: Fetch, before: int, total: int) -> None:
    """Fetch what is missing of the part file, trying again while that helps."""
    part = _part(repo_folder(info.repo), file)
    attempt = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        if start > file.size_bytes:
            part.unlink()
            start = 0
        if start == file.size_bytes and part.exists():
            return
        reason: BaseException | None = None
        try:
            abandonable(lambda: _stream(info, file, token, fetch, part, before, total), fetch)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:  # the server has less than we do: start over
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise refusal(error, info.repo, None, token) from error
                reason = error
        except TRANSPORT_ERRORS as error:
            if is_disk_full(error) or isinstance(error, PermissionError):
                raise
            reason = error
        now = part.stat().st_size if part.exists() else 0
        attempt = 0 if now > start else attempt + 1
        if now < file.size_bytes and attempt > len(RETRY_DELAYS_S):
            raise _broken_off(info, file, now, reason, token) from reason
        if now < file.size_bytes:
            fetch.pause(RETRY_DELAYS_S[max(0, attempt - 1)])


def _stream(
    info: RepoInfo, file: RepoFile, token: HubToken | None, fetch: Fetch, part: Path, before: int, total: int
) -> None:
    start = part.stat().st_size if part.exists() else 0
    with open_url(_address(info, file), token, offset=start) as response:
        announced = response.headers.get("Content-Length")
        if start and response.status != 206:  # the server ignored our range
            start = 0
        if announced is not None and start + int(announced) != file.size_bytes:
            part.unlink(missing_ok=True)
            raise _wrong(info, file, f"the server sends {start + int(announced)} bytes instead of {file.size_bytes}")
        with part.open("ab" if start else "wb") as sink:
            while chunk := response.read1(_CHUNK):
                fetch.check()  # a thread left behind writes nothing any more
                if sink.tell() + len(chunk) > file.size_bytes:
                    part.unlink(missing_ok=True)
                    raise _wrong(info, file, f"the server sends more than {file.size_bytes} bytes")
                sink.write(chunk)
                fetch.say_bytes("download", file.path, before + sink.tell(), total)


def _verify(info: RepoInfo, file: RepoFile, part: Path, fetch: Fetch) -> None:
    if file.blob.endswith("-tag"):
        return
    digest = hashlib.sha256() if len(file.blob) == 64 else hashlib.sha1()  # noqa: S324 - git's own name of a file
    if len(file.blob) == 40:
        digest.update(b"blob %d\0" % file.size_bytes)
    with part.open("rb") as source:
        while chunk := source.read(4 * _CHUNK):
            fetch.check()
            digest.update(chunk)
    if digest.hexdigest() != file.blob:
        part.unlink()
        raise _wrong(info, file, f"its checksum is {digest.hexdigest()[:12]} instead of {file.blob[:12]}")


def _wrong(info: RepoInfo, file: RepoFile, why: str) -> ModelFilesError:
    return ModelFilesError(
        f"{file.path} of {info.repo} is not what {public_url(endpoint())} announced",
        why=why,
        fix="run it again; if it stays so, the server or a proxy between alters files",
    )


def _broken_off(
    info: RepoInfo, file: RepoFile, now: int, reason: BaseException | None, token: HubToken | None
) -> EngineError:
    if isinstance(reason, urllib.error.HTTPError):
        return refusal(reason, info.repo, None, token)
    return ModelUnavailableError(
        f"the download of {info.repo} broke off in {file.path}",
        why=f"{human_bytes(now)} of {human_bytes(file.size_bytes)} came, then: {reason or 'the connection was closed'}",
        fix="run it again to fetch only the rest",
    )


def write_ref(root: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or a tag is, as huggingface_hub does in its cache."""
    ref = root / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    fresh.write_text(commit, encoding="utf-8")
    fresh.replace(ref)
