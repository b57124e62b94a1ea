import importlib
import json
import platform
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants

from bert import BertModel
from pretrained import find_pretrained
from tokenizer import BertTokenizer
from utils import Terminated, UserError, atomic_write, exit_status, one_line, pick_device

# ---------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept_only_when_asked():
    program = """
        import resource, torch, utils
        def resident():
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        def kept_share():
            before = resident()
            tensors = [torch.ones(1 << 20) for _ in range(100)]
            full = resident()
            del tensors
            return (resident() - before) / (full - before)
        print(kept_share())
        utils.keep_freed_memory()
        print(kept_share())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    unasked, asked = map(float, done.stdout.split())
    assert 0 <= unasked <= 0.1 and 0.9 <= asked <= 1.1


@pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="PyTorch cannot set it for this CPU"
)
def test_denormal_numbers_are_0_in_all_threads_of_a_program():
    """The program imports all files: one that makes a tensor when it is imported would come too early."""
    program = """
        import torch, multitask_classifier, utils

        def work():
            torch.set_num_threads(2)
            moments = torch.full((1 << 22,), 1e-37)
            print((moments * 0.01 * 1e10).count_nonzero().item())

        utils.exit_status(work, "", "")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE)
    assert int(done.stdout) == 0


# ---------------------------------------------------------------------------------- atomic files


def test_atomic_write_replaces_a_file_whole(tmp_path):
    path = tmp_path / "folder" / "file"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_atomic_write_into_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/x"):
        with atomic_write(tmp_path / "file" / "x"):
            pass


@pytest.mark.parametrize(
    "raised, status, shown",
    [
        (None, 0, ""),
        (UserError("no such file"), 1, "error: no such file\n"),
        (MemoryError(), 1, "error: out of memory; make room (MemoryError)\n"),
        (torch.OutOfMemoryError("CUDA"), 1, "error: out of memory; make room (CUDA)\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory; "),
        (KeyboardInterrupt(), 130, "\ninterrupted; nothing is lost\n"),
        (KeyboardInterrupt("saved"), 130, "\ninterrupted; saved\n"),
        (Terminated(), 143, "\ninterrupted; nothing is lost\n"),
    ],
    ids=repr,
)
def test_what_a_user_can_mend_ends_in_one_line(raised, status, shown, capsys):
    def work():
        warnings.warn("soon")
        if raised:
            raise raised

    assert exit_status(work, "make room", "nothing is lost") == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"warning: soon\n{shown}")


def test_other_errors_keep_their_traceback():
    def work():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_status(work, "", "")


def test_one_line():
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_asked_for_and_not_there_is_an_error():
    assert pick_device(False).type == "cpu"
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--use_gpu: PyTorch sees no GPU"):
            pick_device(True)


# ------------------------------------------------------------------------------------------- hub


class Hub(BaseHTTPRequestHandler):
    """The part of the model hub's protocol that a download needs, on this machine."""

    def log_message(self, *arguments):
        pass

    def answer(self, with_body):
        self.server.requests.append(f"{self.command} {self.path}")
        owner_and_name, _, filename = self.path.strip("/").partition("/resolve/main/")
        content = self.server.files.get(filename) if owner_and_name == "some/bert" else None
        self.send_response(404 if content is None else 200)
        if content is None:
            code = "RepoNotFound" if owner_and_name != "some/bert" else "EntryNotFound"
            self.send_header("X-Error-Code", code)
            content = b""
        self.send_header("X-Repo-Commit", "0123456789012345678901234567890123456789")
        self.send_header("ETag", f'"{len(content)}-{filename}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)


@pytest.fixture
def hub(tiny_directory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in tiny_directory.iterdir()}
    server.requests = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def load(tmp_path, hub, monkeypatch):
    """Load a hub id from our hub; returns what was loaded, or the error, as a line."""

    def load(name="some/bert", port=None, local_files_only=False, offline=False):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port or hub.server_port}")
        monkeypatch.setenv("HF_HUB_OFFLINE", str(offline))
        importlib.reload(constants)
        try:
            model = BertModel.from_pretrained(name, local_files_only)
            tokenizer = BertTokenizer.from_pretrained(name, local_files_only)
        except UserError as error:
            return f"error: {error}"
        return " ".join(map(str, [model.config.hidden_size, *tokenizer(["abc"])["input_ids"][0]]))

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # The library waits longer and longer before it tries again.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield load
    monkeypatch.undo()
    importlib.reload(constants)


LOADED = "24 2 5 32 33 3"


def test_a_hub_id_is_downloaded_once_and_then_local(load, hub):
    assert load() == LOADED
    assert any(
        "GET /some/bert/resolve/main/model.safetensors" in request for request in hub.requests
    )
    hub.requests.clear()
    assert load(local_files_only=True) == LOADED
    assert load(offline=True) == LOADED
    assert not hub.requests


def test_a_hub_id_with_pytorch_weights_and_vocab_txt(load, hub, tiny_directory, tmp_path):
    from safetensors.torch import load_file

    vocabulary = json.loads(hub.files.pop("tokenizer.json"))["model"]["vocab"]
    hub.files["vocab.txt"] = "\n".join(sorted(vocabulary, key=vocabulary.get)).encode()
    del hub.files["tokenizer_config.json"]
    del hub.files["model.safetensors"]
    torch.save(load_file(tiny_directory / "model.safetensors"), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    assert load() == LOADED


def test_what_the_hub_does_not_have_is_one_clear_line(load):
    assert load("some/other").startswith("error: some/other: cannot get config.json")
    assert "not a hub id" in load("no/such/directory")
    assert load(local_files_only=True) == (
        "error: some/bert: no config.json found on this machine "
        "(--local_files_only downloads nothing)"
    )
    unreachable = load(port=9)
    assert "some/bert: cannot download config.json from the model hub" in unreachable
    assert "--bert_model minilm" in unreachable


def test_files_of_a_directory_and_of_a_weights_file(tiny_directory):
    for name in (tiny_directory, tiny_directory / "model.safetensors"):
        assert find_pretrained(name, "config.json") == tiny_directory / "config.json"
        assert find_pretrained(name, "pytorch_model.bin") is None
