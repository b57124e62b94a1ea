"""Output paths that are no plain file: links, devices, pipes, sockets, folders, mounts."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from checkpoints import make_checkpoint_fixture  # noqa: F401

import checkpoint
import multitask_classifier as mc
import predict
from datasets import download, git_blob_id
from options import parse_options
from tasks import TASKS
from utils import UserError, atomic_write, check_writable, lock_files

OLD, NEW = "what was there\n", "the new content\n"


def permitted(action, *arguments):
    """Do what needs the rights of an administrator, or skip the test."""
    try:
        return action(*arguments)
    except (PermissionError, subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"not permitted here: {error}")


def device(folder, minor, name="device", major=1):
    path = folder / name
    permitted(os.mknod, path, 0o20666, os.makedev(major, minor))
    # A file system that is mounted without devices lets nobody open one.
    permitted(lambda: minor == 99 or os.close(os.open(path, os.O_WRONLY)))
    return path


@contextlib.contextmanager
def mounted(folder, *arguments):
    permitted(lambda: subprocess.run(["mount", *arguments, folder], check=True, stderr=-1))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def link(folder, target, name="link"):
    (folder / name).symlink_to(target)
    return folder / name


def old_file(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(OLD)
    path.chmod(0o640)
    return path


# ---------------------------------------------------------------------- outputs that can be written
# Each yields the path, and a function that returns what has arrived there since.


@contextlib.contextmanager
def plain_file(folder, path=None, target=None):
    """A path that leads to a file, old or not there yet."""
    path = path or folder / "file"
    target = target or path
    mode = target.stat().st_mode if target.exists() else None
    link_text = os.readlink(path) if path.is_symlink() else None
    yield path, target.read_text
    assert not target.is_symlink() and (target.is_file() or not target.exists())
    assert mode is None or target.stat().st_mode == mode
    assert link_text is None or os.readlink(path) == link_text


def existing(folder):
    return plain_file(folder, old_file(folder / "file"))


def in_new_folders(folder):
    return plain_file(folder, folder / "one" / "two" / "file")


def long_name(folder):
    return plain_file(folder, folder / ("é" * 125))


def linked(folder):
    target = old_file(folder / "below" / "file")
    return plain_file(folder, link(folder, "below/file"), target)


def linked_twice(folder):
    target = old_file(folder / "below" / "file")
    link(folder, "below/file", "first")
    return plain_file(folder, link(folder / "below", "../first"), target)


def in_linked_folder(folder):
    target = old_file(folder / "below" / "file")
    return plain_file(folder, link(folder, "below") / "file", target)


def dangling(folder):
    return plain_file(folder, link(folder, "file"), folder / "file")


def dangling_into_new_folder(folder):
    return plain_file(folder, link(folder, "new/file"), folder / "new" / "file")


@contextlib.contextmanager
def mounted_file(folder):
    """Like `docker run --volume file:file`."""
    inside, outside = old_file(folder / "inside"), old_file(folder / "outside")
    with mounted(inside, "--bind", str(outside)):
        yield inside, outside.read_text


@contextlib.contextmanager
def null(folder, path=None):
    node = device(folder, 3)
    yield path or node, None
    assert node.is_char_device() and not node.is_symlink()


def linked_null(folder):
    return null(folder, link(folder, "device"))


@contextlib.contextmanager
def fifo(folder, path=None):
    """A named pipe, with a reader that waits for its end."""
    os.mkfifo(folder / "fifo")
    found = []
    reader = threading.Thread(target=lambda: found.append((folder / "fifo").read_text()))
    reader.start()
    # Another end for reading, so that writing without this reader does not wait for ever.
    spare = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)

    def arrived():
        reader.join(10)
        return "".join(found)

    yield path or folder / "fifo", arrived
    if not found:  # nothing was written, so the reader waits
        os.close(os.open(folder / "fifo", os.O_WRONLY))
        reader.join(10)
    os.close(spare)
    assert (folder / "fifo").is_fifo()


def linked_fifo(folder):
    return fifo(folder, link(folder, "fifo"))


@contextlib.contextmanager
def descriptor_of_pipe(folder):
    """Like `>(command)` in a shell."""
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        os.set_blocking(reader, False)
        yield Path(f"/dev/fd/{writer}"), lambda: (file.read() or b"").decode()
        os.close(writer)


@contextlib.contextmanager
def standard_output(folder, path="/dev/stdout"):
    """Standard output into a file that is not empty, as with `>> FILE`."""
    target = old_file(folder / "log")
    saved, file = os.dup(1), os.open(target, os.O_RDWR | os.O_APPEND)
    os.dup2(file, 1)
    try:
        yield Path(path), lambda: target.read_text().removeprefix(OLD)
    finally:
        os.dup2(saved, 1)
        for descriptor in (saved, file):
            os.close(descriptor)
    assert target.read_text().startswith(OLD)


def own_descriptor(folder):
    return standard_output(folder, "/proc/self/fd/1")


def linked_descriptor(folder):
    return standard_output(folder, link(folder, "/proc/self/fd/1"))


def file_that_is_standard_output(folder):
    return standard_output(folder, folder / "log")


FILES = [plain_file, existing, in_new_folders, long_name, linked, linked_twice]
FILES += [in_linked_folder, dangling, dangling_into_new_folder, mounted_file]
OTHERS = [null, linked_null, fifo, linked_fifo, descriptor_of_pipe, standard_output]
OTHERS += [own_descriptor, linked_descriptor, file_that_is_standard_output]
WRITABLE = pytest.mark.parametrize("kind", FILES + OTHERS, ids=lambda kind: kind.__name__)


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@WRITABLE
def test_the_content_arrives_and_nothing_else_changes(tmp_path, kind):
    with kind(tmp_path) as (path, arrived):
        before = names_below(tmp_path)
        check_writable(path)
        if path.is_fifo():
            time.sleep(
                0.1
            )  # in which its reader would leave, if it had been told that this was all
        with atomic_write(path) as temporary:
            temporary.write_text(NEW)
        assert arrived is None or arrived() == NEW
        new = set(names_below(tmp_path)) - set(before)
        assert new <= {"file", "one", "one/two", "one/two/file", "new", "new/file", "é" * 125}


@WRITABLE
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError("a full disk")])
def test_an_error_before_the_end_leaves_it_as_it_was(tmp_path, kind, error):
    with kind(tmp_path) as (path, arrived):
        is_file = kind in FILES
        there = path.exists()
        with pytest.raises(error if isinstance(error, type) else UserError):
            with atomic_write(path) as temporary:
                temporary.write_text("half")
                raise error
        assert path.exists() == there
        if there and is_file:
            assert path.read_text() == OLD
        elif arrived and not is_file and "fifo" not in kind.__name__:
            assert arrived() == ""
        assert not list(tmp_path.rglob("*.tmp"))


@WRITABLE
def test_predict_writes_its_answers_into_it(tmp_path, kind, make_checkpoint):
    questions = tmp_path / "questions"
    questions.write_text("a b c\n")
    with kind(tmp_path) as (path, arrived):
        command = [str(questions), "--checkpoint", str(make_checkpoint("plain"))]
        assert predict.main([*command, "--output", str(path)]) == 0
        if arrived:
            text = arrived()
            assert text.startswith("sentiment") and text.endswith("| a b c\n".split("| ")[1])
            assert text.count("\n") == 1


def test_a_run_writes_each_prediction_into_another_kind_of_path(flags, tmp_path, make_checkpoint):
    kinds = [linked, dangling, null, fifo, descriptor_of_pipe, linked_descriptor]
    named = [f"--{name}_{split}_out" for name in TASKS for split in ("dev", "test")]
    columns = [TASKS[name].prediction_column for name in TASKS for _ in ("dev", "test")]
    with contextlib.ExitStack() as stack:
        outputs = []
        for kind in kinds:
            (folder := tmp_path / kind.__name__).mkdir()
            outputs.append(stack.enter_context(kind(folder)))
        command = ["--evaluate", str(make_checkpoint("plain")), *flags]
        for name, (path, _) in zip(named, outputs, strict=True):
            command += [name, str(path)]
        assert mc.main(command) == 0
        for column, (_, arrived) in zip(columns, outputs, strict=True):
            if arrived:
                text = arrived()
                table = text[text.index("id\t") :]  # a run prints to standard output as well
                assert table.startswith(f"id\t{column}\n") and table.count("\n") >= 41


def test_all_predictions_can_go_into_one_device(flags, tmp_path):
    node = device(tmp_path, 3)
    named = [f"--{name}_{split}_out" for name in TASKS for split in ("dev", "test")]
    options = parse_options([*flags, *(word for name in named for word in (name, str(node)))])
    options = checkpoint.name_predictions(options, "run")
    checkpoint.check_outputs(options)
    with checkpoint.lock_predictions(options), checkpoint.lock_predictions(options):
        pass
    assert node.is_char_device() and not list(tmp_path.glob(".*"))


def test_two_names_of_a_file_are_not_two_outputs(flags, tmp_path):
    link(tmp_path, "file")
    outputs = ["--sst_dev_out", str(tmp_path / "file"), "--sst_test_out", str(tmp_path / "link")]
    with pytest.raises(UserError, match="is given for --sst_test_out and for --sst_dev_out"):
        options = parse_options([*flags, *outputs])
        checkpoint.check_outputs(checkpoint.name_predictions(options, "run"))


# -------------------------------------------------------------------- outputs that cannot be written


@contextlib.contextmanager
def a_folder(folder):
    (folder / "folder").mkdir()
    yield folder / "folder"


@contextlib.contextmanager
def linked_folder(folder):
    (folder / "folder").mkdir()
    yield link(folder, "folder")


@contextlib.contextmanager
def a_socket(folder):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket")
        yield Path("socket")
    assert (folder / "socket").is_socket()


@contextlib.contextmanager
def links_in_a_circle(folder):
    link(folder, "second", "first")
    yield link(folder, "first", "second")
    assert os.readlink(folder / "second") == "first"


@contextlib.contextmanager
def device_without_driver(folder):
    yield device(folder, 99, major=250)


@contextlib.contextmanager
def below_a_file(folder):
    file = old_file(folder / "file")
    yield file / "below"
    assert file.read_text() == OLD


@contextlib.contextmanager
def below_a_device(folder):
    yield Path("/dev/null/below")


@contextlib.contextmanager
def name_too_long(folder):
    yield folder / ("x" * 300)


@contextlib.contextmanager
def closed_descriptor(folder):
    yield Path("/dev/fd/999")


@contextlib.contextmanager
def not_a_file_of_the_kernel(folder):
    yield Path("/proc/version")


@contextlib.contextmanager
def read_only_folder(folder):
    (folder / "mount").mkdir()
    with mounted(folder / "mount", "-t", "tmpfs", "none") as mount:
        file = old_file(mount / "file")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        yield file
        assert file.read_text() == OLD


@contextlib.contextmanager
def link_into_read_only_folder(folder):
    with read_only_folder(folder) as file:
        yield link(folder, file)


@contextlib.contextmanager
def full_device(folder):
    yield device(folder, 7)


@contextlib.contextmanager
def full_folder(folder):
    (folder / "mount").mkdir()
    with mounted(folder / "mount", "-t", "tmpfs", "-o", "size=64k", "none") as mount:
        file = old_file(mount / "file")
        with contextlib.suppress(OSError):
            (mount / "rest").write_bytes(bytes(2**17))
        yield file
        assert file.read_text() == OLD


@contextlib.contextmanager
def link_into_full_folder(folder):
    with full_folder(folder) as file:
        yield link(folder, file)


NOWHERE = [a_folder, linked_folder, a_socket, links_in_a_circle, device_without_driver]
NOWHERE += [below_a_file, below_a_device, name_too_long, closed_descriptor]
NOWHERE += [not_a_file_of_the_kernel, read_only_folder, link_into_read_only_folder]
FULL = [full_device, full_folder, link_into_full_folder]  # which only writing shows


@pytest.mark.parametrize("kind", NOWHERE + FULL, ids=lambda kind: kind.__name__)
def test_what_cannot_be_written_is_one_line(tmp_path, kind):
    with kind(tmp_path) as path:
        before = names_below(tmp_path)
        if kind in NOWHERE:
            with pytest.raises(UserError, match="^cannot write "):
                check_writable(path)
        with pytest.raises(UserError, match="^cannot write "):
            with atomic_write(path) as temporary:
                temporary.write_text(NEW * 5000)
        assert names_below(tmp_path) == before


@pytest.mark.parametrize("kind", NOWHERE + FULL, ids=lambda kind: kind.__name__)
def test_predict_says_so_in_one_line(tmp_path, kind, make_checkpoint, capsys):
    (tmp_path / "questions").write_text("a b c\n" * 2000)
    with kind(tmp_path) as path:
        command = [str(tmp_path / "questions"), "--checkpoint", str(make_checkpoint("plain"))]
        assert predict.main([*command, "--output", str(path)]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write {path}"[:100]) and len(line) <= 300


# ------------------------------------------------------------------------------------------- locks


def locked(*paths):
    return lock_files(list(paths), "is being written")


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_two_names_of_a_file_have_one_lock(tmp_path, kind):
    with kind(tmp_path) as (path, _):
        check_writable(path)
        other = tmp_path / "another name"
        other.symlink_to(os.path.relpath(path, tmp_path))
        with contextlib.suppress(UserError):  # a long name has no lock
            with locked(path):
                with pytest.raises(UserError, match="is being written"):
                    with locked(other):
                        pass
        with atomic_write(path) as temporary:
            temporary.write_text(NEW)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_what_is_no_file_has_no_lock(tmp_path, kind):
    with kind(tmp_path) as (path, _):
        before = names_below(tmp_path)
        with locked(path), locked(path):
            pass
        assert names_below(tmp_path) == before


@pytest.mark.parametrize("target", ["file", "new", "fifo", "folder"])
def test_a_lock_that_is_a_link_is_refused(tmp_path, target):
    file = old_file(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    link(tmp_path, target, ".output.lock")
    before = names_below(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*\.output\.lock"):
        with locked(tmp_path / "output"):
            pass
    assert file.read_text() == OLD and names_below(tmp_path) == before


# --------------------------------------------------------------------------------------- downloads


@pytest.fixture
def source(tmp_path):
    """A folder with a file to download, and the file's digest."""
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "one.csv"
    file.write_text(NEW)
    return file.parent.as_uri(), {"one.csv": git_blob_id(file)}


@pytest.mark.parametrize("kind", [plain_file, in_new_folders, dangling, dangling_into_new_folder])
def test_a_download_follows_links(tmp_path, source, kind):
    with kind(tmp_path) as (path, arrived):
        (tmp_path / "data").mkdir()
        link(tmp_path / "data", path, "one.csv")
        download(tmp_path / "data", *source)
        assert arrived() == NEW and (tmp_path / "data" / "one.csv").is_symlink()
        assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", ["one.csv", "one.csv.part"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link"])
def test_a_download_replaces_nothing_of_others(tmp_path, source, name, kind):
    data = tmp_path / "data"
    data.mkdir()
    other = old_file(tmp_path / "other")
    make = {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda path: link(data, other, name)}
    make["device"] = lambda path: device(data, 3, name)
    make[kind](data / name)
    before = os.lstat(data / name)
    with pytest.raises(UserError, match=name):
        download(data, *source)
    after = os.lstat(data / name)
    assert (after.st_ino, after.st_mode, after.st_rdev) == (
        before.st_ino,
        before.st_mode,
        before.st_rdev,
    )
    assert names_below(data) == [name] and other.read_text() == OLD
