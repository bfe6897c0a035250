"""Converts once for each line on stdin, and answers with a line: how that ended, and what is left of it.

    python tests/faults/interrupts/_session.py SOURCE TARGET main|thread

Interrupts are heeded only while it converts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import octavo


def attempt(src: str, dst: str) -> str:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        octavo.convert(src, dst, threads=2, staging_bytes=1 << 20, progress=False)
        return "done"
    except KeyboardInterrupt:
        return "interrupted"
    except octavo.OctavoError as error:
        return f"{type(error).__name__}: {error}"


def in_main(src: str, dst: str) -> str:
    try:
        try:
            return attempt(src, dst)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return "interrupted"


def in_thread(src: str, dst: str) -> str:
    """The main thread is interrupted, and leaves, while the conversion goes on in its own."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(attempt(src, dst)), daemon=True)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        thread.start()
        while thread.is_alive():
            thread.join(0.01)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os._exit(130)
    return found[0]


def main(src: str, dst: str, where: str) -> None:
    octavo.plan(src, model=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    for _ in sys.stdin:
        outcome = in_main(src, dst) if where == "main" else in_thread(src, dst)
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo")]
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        files = [path for path in opened if ".partial" in path or path.endswith(".safetensors")]
        print(json.dumps([outcome, threads, files]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
