"""The command line: what it prints, and its exit codes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

import kani_nb
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import Conversation
from kani_nb.hardware import devices, spill
from kani_nb.hardware.devices import Device, best_device
from kani_nb.hardware.schemes import our_schemes
from kani_nb.serve.cli import main
from kani_nb.serve.quickstart import NAME, open_command, quickstart_notebook


@pytest.fixture(autouse=True)
def own_runtime(clean_runtime):
    return clean_runtime


def run(*arguments, **options):
    command = [sys.executable, "-m", "kani_nb.serve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_the_version_is_the_packages():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"kani-nb {kani_nb.__version__}"


def test_a_prompt_is_answered_and_its_numbers_stand_beside_it(capsys):
    assert main(["chat", "echo", "-p", "hello there"]) == 0
    caught = capsys.readouterr()
    assert caught.out.strip() == "hello there"
    assert "2 tokens" in caught.err


def test_a_conversation_goes_on_until_the_input_ends():
    done = run("chat", "echo", input="first\n\nsecond\n")
    assert done.returncode == 0
    assert done.stdout.index("first") < done.stdout.index("second")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["chat", "no-such-model", "-p", "x"], 1, "there is no model 'no-such-model'"),
        (["chat", "echo", "--temperature", "-1", "-p", "x"], 2, "temperature is -1.0"),
        (["chat", "echo", "-p", "  "], 1, "the prompt is empty"),
        (["prefetch", "no-such-model"], 1, "there is no model"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph_and_an_exit_code(capsys, arguments, code, said):
    assert main(arguments) == code
    caught = capsys.readouterr()
    assert said in caught.err
    assert len(caught.err.strip().splitlines()) <= 3


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["chat", "echo", "--bogus"], ["prefetch"]])
def test_a_wrong_command_line_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_the_doctor_ends_with_one_line_of_json(capsys):
    assert main(["doctor", "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    topics = {finding["topic"] for finding in record["findings"]}
    assert {"kani_nb", "packages", "device", "CPU threads", "quantization", "Hub", "conversations"} <= topics
    assert len(lines) - 1 <= 25


def test_a_plan_ends_with_one_line_of_json(capsys, smollm2):
    assert main(["plan", "smollm2", "--context", "1024", "--schemes", "none,nf4", "--card", "T4", "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    assert (record["model"], record["context"]) == ("smollm2", 1024)
    assert [each["scheme"] for each in record["schemes"]] == ["none", "nf4"]
    for each in record["schemes"]:
        assert {"scheme", "weight_bytes", "kv_bytes_per_token", "peak_bytes", "fits"} <= set(each)
        assert each["fits"] is True
    # 30 layers, 3 heads of 64 numbers for keys and as many for values, in two bytes.
    assert record["schemes"][0]["kv_bytes_per_token"] == 30 * 3 * 64 * 2 * 2
    text = "\n".join(lines[:-1])
    assert "kani-nb chat smollm2" in text
    assert "is recommended" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "smollm2", "--card", "T5"], 2, "there is no card 'T5'"),
        (["plan", "smollm2", "--schemes", "nf5"], 2, "there is no quantization scheme 'nf5'"),
        (["plan", "echo"], 2, "echo cannot be planned"),
        (["plan", "no-such-model"], 1, "there is no model 'no-such-model'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_paragraph(capsys, arguments, code, said):
    assert main(arguments) == code
    caught = capsys.readouterr()
    assert said in caught.err
    assert caught.out == ""


def test_the_doctor_says_which_schemes_run_here_and_what_the_others_lack(capsys):
    assert main(["doctor", "--json"]) == 0
    said = {each["topic"]: each["text"] for each in json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]}
    device, running = said["quantization"].removeprefix("on ").split(": ", 1)
    assert device == best_device()
    assert "none" in running.split(", ")
    assert ("cpu-int8" in running) == (device == "cpu")
    for scheme in our_schemes():
        named_once = (scheme.name in running.replace(" (slow on this CPU)", "").split(", ")) + (
            f"{scheme.name} " in said.get("not here", "")
        )
        assert named_once == 1, scheme.name
    assert said["CPU kernels"].startswith("torch computes with ")
    assert "cpu-int8: " in said["packed"] and "cpu-int4: " in said["packed"]
    assert said["bitsandbytes"].startswith(version("bitsandbytes"))


def test_a_bitsandbytes_that_cannot_be_used_is_a_problem_with_its_fix(capsys, monkeypatch, tmp_path):
    info = tmp_path / "bitsandbytes-0.41.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.41.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor"]) == 0
    problems = capsys.readouterr().out.split("! ")[1:]
    problem = next(each for each in problems if each.startswith("bitsandbytes is 0.41.0: "))
    assert "0.46.1 is the first that runs these schemes" in problem
    assert "pip install -U bitsandbytes" in problem


def test_a_driver_that_spills_is_a_problem_with_the_setting_that_forbids_it(capsys, monkeypatch):
    card = Device("cuda:0", "NVIDIA GeForce RTX 4070 Ti", 12 * 2**30, 0, (8, 9))
    monkeypatch.setattr(devices, "list_devices", lambda: (card, Device("cpu", "a CPU", 2**34, 2**33)))
    monkeypatch.setattr(spill, "driver_may_spill", lambda: True)
    monkeypatch.setattr(spill, "spilled_bytes", lambda *cards: 13 * 2**30)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "13.0 GiB spilled" in said
    assert "51 times slower" in said
    assert '"CUDA - Sysmem Fallback Policy": "Prefer No Sysmem Fallback"' in said


def test_a_token_in_the_environment_is_named_by_its_source_and_never_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretindeed")
    assert main(["doctor", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "verysecret" not in shown
    assert "HF_TOKEN" in shown


def test_the_doctor_says_what_mends_a_store_that_cannot_be_read(capsys, own_home):
    (own_home / "conversations.db").write_bytes(b"this is no database" * 100)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "! " in shown
    assert "conversations.db" in shown.split("! ", 1)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(own_home):
    command = [sys.executable, "-u", "-m", "kani_nb.serve.cli", "chat", "echo:delay=0.05"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        process.stdin.write("word " * 100 + "\n")
        process.stdin.flush()
        seen = ""
        while seen.count("word") < 3:
            seen += process.stdout.read(1)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        while "stopped" not in seen:
            seen += process.stdout.read(1)
        assert time.monotonic() - asked < 4, "the answer alone would have taken five seconds"
        process.stdin.write("next\n")
        process.stdin.close()
        seen += process.stdout.read()
        assert process.wait(timeout=20) == 0
    assert "next" in seen.split("stopped")[1]


@pytest.mark.parametrize("command", [["chat"], ["prefetch"], ["chat", "echo", "--token"], ["chat", "-p"]])
def test_a_token_on_the_command_line_is_refused_and_not_printed(capsys, command):
    assert main([*command, "hf_verysecretindeed"]) == 2
    caught = capsys.readouterr()
    assert "verysecret" not in caught.out + caught.err
    assert "HF_TOKEN" in caught.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "echo", "--temprature", "1"], "did you mean --temperature?"),
        (["doctor", "--jsn"], "did you mean --json?"),
        (["chat", "echo", "--threads", "x"], "--threads is 'x': it must be a whole number"),
        (["chat", "echo", "hello"], "'hello' cannot stand here"),
    ],
)
def test_a_wrong_command_line_is_answered_with_what_was_meant(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-u", "-m", "kani_nb.serve.cli", "chat", "echo:delay=0.01", "-p", "word " * 300]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(4) == "word"
        process.stdout.close()
        complaints = process.stderr.read()
        assert process.wait(timeout=20) == 141
    assert complaints == ""


def test_conversations_of_a_terminal_are_kept_apart(own_runtime):
    assert main(["chat", "echo", "-p", "hello"]) == 0
    own_runtime.notebook = ""
    assert own_runtime.list_chats() == []
    assert [each.notebook for each in own_runtime.list_chats(everywhere=True)] == ["(terminal)"]


def test_the_doctor_says_where_no_store_can_be_made(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KANI_NB_HOME", str(tmp_path / "file"))
    assert main(["doctor"]) == 0
    problem = capsys.readouterr().out.split("! ", 1)[1]
    assert f"{tmp_path}/file is not a folder" in problem
    assert "KANI_NB_HOME" in problem


def test_the_doctor_says_that_a_store_is_read_only(capsys, own_runtime, own_home):
    with ConversationStore() as store:
        store.create(Conversation.new("kept"))
        path = store.path
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    path.chmod(0o400)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write to every file")
    assert main(["doctor"]) == 0
    assert "read-only" in capsys.readouterr().out.split("! ", 1)[1]


def test_the_quickstart_of_the_current_folder_comes_first(tmp_path, monkeypatch):
    own = tmp_path / "notebooks" / NAME
    own.parent.mkdir()
    own.write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert quickstart_notebook() == own
    own.unlink()
    assert quickstart_notebook() != own


def test_the_quickstart_is_found_and_the_command_that_opens_it_names_it():
    path = quickstart_notebook()
    assert path.name == NAME
    assert str(path) in open_command(path)


def test_the_quickstart_is_a_clean_notebook():
    nb = json.loads(quickstart_notebook().read_text(encoding="utf-8"))
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "colab.research.google.com" in "".join(nb["cells"][0]["source"])


@pytest.mark.kernels
@pytest.mark.timeout(600)
def test_the_quickstart_runs_on_the_real_model_twice_and_ends_with_one_command(smollm2):
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "kani_nb.serve.cli", "quickstart"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
        assert "tok/s" in done.stdout
        assert "chat-1: 2 turns" in done.stdout
        assert done.stdout.count("jupyter lab") == 1
        assert "WARNING" not in done.stderr
        assert "Traceback" not in done.stderr
