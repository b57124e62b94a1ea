"""A search on a Ray cluster of several nodes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from test_hpo import check_result, ray_environment, read_until, start  # noqa: F401


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def ray_nodes(n_nodes):
    """Yield the address of a cluster of nodes with one core, and the processes that run them."""
    port, nodes = free_port(), []
    address = f"127.0.0.1:{port}"
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", "1"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pipe["env"] = os.environ | {"RAY_AUTH_MODE": "token"}
    try:
        for number in range(n_nodes):
            role = ["--address", address] if number else ["--head", "--port", str(port)]
            nodes.append(subprocess.Popen(command + role, **pipe, start_new_session=True))
            output = ""
            while "Ray runtime started" not in output:
                assert (line := nodes[-1].stdout.readline()), output
                output += line
        yield address, nodes
    finally:
        for node in nodes:
            kill_node(node)


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    for child in map(int, found.split()):
        yield child
        yield from descendants(child)


def kill_node(node):
    for pid in [node.pid, *descendants(node.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def test_a_search_on_two_nodes_survives_the_loss_of_one(flags, tmp_path, capsys):
    with ray_nodes(2) as (address, nodes):
        more = [
            "--hpo_trials",
            "4",
            "--hpo_confirm",
            "0",
            "--hpo_cpus",
            "1",
            "--ray_address",
            address,
        ]
        search = start("hpo.py", flags + more)
        output = read_until("epoch", search)
        output += read_until("trial [^0].*epoch", search)  # both nodes have trials
        kill_node(nodes[1])
        rest, errors = search.communicate(timeout=240)
    output += rest
    assert search.returncode == 0, errors
    assert "nodes: 2; for each trial 1 cores and 0 GPUs" in output
    assert "its process or node has died; it continues" in output
    check_result(output, 4, flags, tmp_path, capsys)
