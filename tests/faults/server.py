"""Runs `rosaq` commands in forks of a process that has PyTorch loaded, and lets things happen to them half way.

One JSON request a line on standard input, one JSON answer a line on standard output. A request has "arguments", of the
command line; "ranks", how many processes run it together (default 1); "rank", which of them the fault strikes;
"at", the number of the disk operation that it strikes at (from 1); "fault", what happens then: a signal's name (with
SIGKILL, a write has been half done), ["truncate", FILE, BYTES] or ["remove", FOLDER]; "after", seconds after which
SIGKILL comes; "file_bytes", the largest file that can be written. The answer has "codes", "errors",
"operations" and "peak_bytes", of resident memory.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

import rosaq.statistics
from rosaq_cli.app import main

OPERATIONS = ("fsync", "pwrite", "rename", "mkdir", "unlink", "rmdir", "posix_fallocate")


def strike(fault, name, arguments, original):
    if fault == "SIGKILL" and name == "pwrite":
        descriptor, data, place = arguments
        original(descriptor, data[: len(data) // 2], place)
    if isinstance(fault, str):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault[0] == "truncate":
        os.truncate(fault[1], fault[2])
    else:
        shutil.rmtree(fault[1])


def watch(at, fault, counter):
    """Count disk operations into a file; let the fault happen at one of them."""
    lock, count = threading.Lock(), [0]

    def watched(name, original):
        def call(*arguments, **named):
            with lock:
                count[0] += 1
                now = count[0]
                counter.write_text(str(now))
            if now == at:
                strike(fault, name, arguments, original)
            return original(*arguments, **named)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))


def child(request, rank, folder, port):
    ranks = request.get("ranks", 1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream)
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    struck = rank == request.get("rank", 0)
    watch(request.get("at", 0) if struck else 0, request.get("fault"), folder / f"count{rank}")
    sys.argv = ["rosaq", *request["arguments"]]
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    except BaseException:  # noqa: BLE001  (a child must not go on as a second server)
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def serve(request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(request.get("ranks", 1)):
            (folder / f"count{rank}").write_text("0")
            (folder / f"err{rank}").write_text("")  # a child that is killed at once makes none
            pid = os.fork()
            if not pid:
                child(request, rank, folder, port)
            children.append(pid)
        if "after" in request:
            time.sleep(request["after"])
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        ended = [os.wait4(pid, 0) for pid in children]
        codes, peaks = [os.waitstatus_to_exitcode(status) for _, status, _ in ended], [1024 * usage.ru_maxrss for _, _, usage in ended]
        errors = [(folder / f"err{rank}").read_text() for rank in range(len(children))]
        operations = [int((folder / f"count{rank}").read_text() or 0) for rank in range(len(children))]
        return {"codes": codes, "errors": errors, "operations": operations, "peak_bytes": peaks}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rosaq.statistics.SNAPSHOT_BLOCKS = 2  # so that a model of three blocks has one in its middle
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
