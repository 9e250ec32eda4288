"""Quantized copies: found for the same files, settings and libraries only, made once, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from kani_nb.engines.huggingface import saving
from kani_nb.engines.quantized_copies import (
    copies_folder,
    copy_key,
    delete_copy,
    find_copy,
    keep_copy,
    list_copies,
)
from kani_nb.errors import ConfigError, EngineError
from kani_nb.quantization import Quantization
from tests.conftest import make_tokenizer
from tests.engines.quantized import load, logits, make_bfloat16

pytestmark = pytest.mark.quant

NF4 = Quantization("nf4")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bfloat16(tmp_path_factory.mktemp("bfloat16"))


def key_of(folder, settings=NF4, dtype="bfloat16", **options):
    return copy_key(folder, settings, dtype, name=options.pop("name", "org/Tiny_Model"), **options)


def fill(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "config.json").write_text("{}")


def test_a_copy_answers_as_what_it_was_made_from(source):
    import torch

    model, key = load(source, "nf4 + double quant"), key_of(source, Quantization("nf4", double_quant=True))
    assert find_copy(key) is None
    made = keep_copy(key, lambda folder: saving.save_model(model, make_tokenizer(), folder, source=source))
    assert made == find_copy(key)
    assert made.parent == copies_folder()
    assert made.name.startswith("tiny-model-nf4-double-quant-")
    assert torch.equal(logits(load(made)), logits(load(source, "nf4 + double quant")))
    (copy,) = list_copies()
    assert (copy.name, copy.scheme, copy.folder) == ("Tiny_Model", "nf4 + double quant", made)
    assert copy.origin == f"{source}, quantized to nf4 + double quant"
    assert copy.size_bytes == sum(path.stat().st_size for path in made.iterdir())


def test_a_copy_is_made_once(source):
    made = []
    for _ in range(2):
        keep_copy(key_of(source), lambda folder: (made.append(folder), fill(folder)))
    assert len(made) == 1


def test_other_files_settings_or_libraries_are_another_copy(source, tmp_path, monkeypatch):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    first = keep_copy(key_of(folder), fill)
    others = [
        key_of(source),
        key_of(folder, Quantization("fp4")),
        key_of(folder, Quantization("nf4", compute_dtype="float32")),
        key_of(folder, dtype="float16"),
        key_of(folder, device="cuda:1"),
    ]
    assert len({key.folder for key in others}) == len(others)
    assert not any(find_copy(key) for key in others)
    assert find_copy(key_of(folder, device="cpu:0")) == first
    monkeypatch.setattr("kani_nb.engines.quantized_copies.version", lambda library: "999")
    assert find_copy(key_of(folder)) is None
    monkeypatch.undo()
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path / "cache"))
    os.utime(folder / "model.safetensors", (1, 1))
    assert find_copy(key_of(folder)) is None


def test_a_hub_commit_is_the_same_wherever_its_cache_lies(tmp_path):
    commits = [tmp_path / cache / "models--org--tiny" / "snapshots" / "c0ffee" for cache in ("one", "two")]
    for each in commits:
        each.mkdir(parents=True)
        (each / "config.json").write_text(str(each))
    assert key_of(commits[0]).folder == key_of(commits[1]).folder


def test_a_copy_that_lost_a_file_or_was_cut_off_is_made_again(source):
    key, made = key_of(source), []

    def save(folder):
        made.append(folder)
        fill(folder)

    folder = keep_copy(key, save)
    (folder / "model.safetensors").write_bytes(b"x" * 10)
    assert find_copy(key) is None
    assert keep_copy(key, save) == folder
    (folder / "config.json").unlink()
    assert find_copy(key) is None
    assert keep_copy(key, save) == folder
    assert len(made) == 3
    assert [path.name for path in copies_folder().iterdir() if path.suffix != ".lock"] == [folder.name]


def test_a_full_disk_keeps_nothing(source):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            saving.save_model(load(source, "nf4"), make_tokenizer(), folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(EngineError, match="is full"):
        keep_copy(key_of(source), save)
    assert not list_copies()
    assert not [path for path in copies_folder().iterdir() if path.suffix != ".lock"]


MAKE = """
import sys, time
from pathlib import Path
from kani_nb.engines.quantized_copies import copy_key, keep_copy
from kani_nb.quantization import Quantization
def save(folder):
    print("making", flush=True)
    sys.stdin.readline()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
key = copy_key(Path(sys.argv[1]), Quantization("nf4"), "bfloat16", name="org/Tiny_Model")
print("made", keep_copy(key, save), flush=True)
"""


def test_two_processes_make_it_once_and_the_one_that_waits_can_be_told_to_stop(source):
    key = key_of(source)
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "making\n"
    waited = []

    def stop(seconds):
        waited.append(seconds)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_copy(key, fill, waiting=stop)
    assert waited
    assert find_copy(key) is None

    def let_it_go_on(seconds):
        if not process.stdin.closed:
            process.stdin.close()

    made = []
    folder = keep_copy(key, made.append, waiting=let_it_go_on)
    with process:
        assert process.stdout.read() == f"made {folder}\n"
    assert not made
    assert find_copy(key) == folder


LOAD = """
import json, sys, time
import psutil, torch, bitsandbytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from kani_nb.engines.huggingface.footprint import storage_bytes
from kani_nb.engines.huggingface.library_errors import free_memory
folder, quantizes = sys.argv[1], sys.argv[2] == "quantizes"
options = {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)} if quantizes else {}
process, steps, started = psutil.Process(), {}, time.perf_counter()
def note(step):
    steps[step] = round((process.memory_info().rss - base) / 2**20)
base = process.memory_info().rss
model = AutoModelForCausalLM.from_pretrained(folder, **options)
seconds = time.perf_counter() - started
note("loaded_mib")
free_memory()
note("freed_mib")
with torch.inference_mode():
    model(torch.arange(100, 140)[None])
note("answered_mib")
# getrusage would tell the peak of the process that started this one, where that was higher.
peak_kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = round(peak_kib / 1024 - base / 2**20)
weights = round(sum(storage_bytes(model).values()) / 2**20)
print(json.dumps({"seconds": round(seconds, 2), "weights_mib": weights, "peak_mib": peak, **steps}))
"""


@pytest.mark.timing
@pytest.mark.timeout(900)
def test_what_quantizing_leaves_behind_against_loading_a_copy(smollm2, capfd):
    """MiB above what the process held after its imports, in processes of their own, one after the other."""
    made = keep_copy(key_of(smollm2, name="smollm2"), lambda folder: load(smollm2, "nf4").save_pretrained(folder))
    runs = {"quantizes": [], "loads": []}
    for _ in range(3):
        for what, folder in (("quantizes", smollm2), ("loads", made)):
            ran = subprocess.run(
                [sys.executable, "-c", LOAD, str(folder), what], capture_output=True, text=True, check=True
            )
            runs[what].append(json.loads(ran.stdout.splitlines()[-1]))
    median = {what: sorted(each, key=lambda run: run["peak_mib"])[1] for what, each in runs.items()}
    with capfd.disabled():
        print("\n" + json.dumps({"measured": "nf4 in MiB above the imports", **median, "load": os.getloadavg()[0]}))
    assert median["loads"]["peak_mib"] < median["quantizes"]["peak_mib"]


def test_a_copy_is_deleted_by_any_of_its_names(source):
    for name in (lambda copy: copy, lambda copy: copy.folder, lambda copy: copy.folder.name):
        keep_copy(key_of(source), fill)
        (copy,) = list_copies()
        assert delete_copy(name(copy)) == copy.size_bytes >= 1000
        assert not list_copies()
        assert find_copy(key_of(source)) is None


def test_nothing_else_can_be_deleted(source, tmp_path):
    keep_copy(key_of(source), fill)
    (copy,) = list_copies()
    for wrong in (source, "nothing", tmp_path / copy.folder.name, copies_folder()):
        with pytest.raises(ConfigError, match=f"there is no quantized copy .*\n→ there are {copy.folder.name}"):
            delete_copy(wrong)
    assert source.exists()
    assert list_copies() == [copy]


def test_folders_of_others_are_no_copies(source):
    copies_folder().mkdir(parents=True)
    (copies_folder() / "foreign").mkdir()
    (copies_folder() / "foreign" / "kani_nb.json").write_text(json.dumps({"origin": "mine"}))
    assert list_copies() == []
