#!PYTHON
"""A stand-in for the ``docker`` command: each container is a process of this machine.

Its state is in $FAKE_DOCKER: ``calls.jsonl`` (each command with what it was given), and ``NAME.json`` for
each container. What an image does is in its name: ``bad`` cannot be started, ``crash`` ends at once, ``mute``
never gets ready, ``pull`` takes a minute to start; any other serves $FAKE_APP under uvicorn, or
/health alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_DOCKER"])
HEALTH = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ.get("GREETING", "").encode())
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
CRASH = "print('no such module: shop', flush=True); raise SystemExit(3)"
MUTE = "import time; print('loading', flush=True); time.sleep(600)"


def main(arguments: list[str]) -> int:
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"argv": arguments, "greeting": os.environ.get("GREETING")}) + "\n")
    verb, *rest = arguments
    if verb == "run":
        return run(rest)
    path = HOME / f"{next(part for part in rest if part.startswith('turnwise-'))}.json"
    if not path.exists():
        return fail(f"Error response from daemon: No such container: {path.stem}", 1)
    box = json.loads(path.read_text())
    if verb == "port":
        print(f"127.0.0.1:{box['port']}")
    elif verb == "inspect":
        print("running 0" if alive(box["pid"]) else "exited 3")
    elif verb == "logs":
        print((HOME / f"{path.stem}.log").read_text(), end="")
    elif verb in ("stop", "rm"):
        if alive(box["pid"]):
            os.kill(box["pid"], signal.SIGKILL)
        if verb == "rm":
            path.unlink()
    else:
        return fail(f"docker: '{verb}' is not a docker command.", 125)
    return 0


def run(rest: list[str]) -> int:
    values: dict[str, list[str]] = {}
    while rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag != "--detach":
            values.setdefault(flag, []).append(rest.pop(0))
    (image,) = rest
    (name,) = values["--name"]
    box = {"image": image, "platform": values.get("--platform"), "pid": 0, "port": 0}
    if image.startswith("pull"):
        (HOME / "pulling").write_text(str(os.getpid()))
        time.sleep(60)
    host, port, inside = values["--publish"][0].split(":")
    assert (host, inside) == ("127.0.0.1", "8000"), values
    if not port:
        from turnwise.openenv.run.ready import free_port  # Only here: other commands are quick.

        port = str(free_port())
    box["port"] = int(port)
    if image.startswith("bad"):
        (HOME / f"{name}.json").write_text(json.dumps(box))
        return fail("docker: Error response from daemon: no matching manifest for linux/arm64/v8.", 125)
    log = (HOME / f"{name}.log").open("w")
    app = os.environ.get("FAKE_APP")
    command = [sys.executable, "-c", HEALTH.format(port=box["port"])]
    if app:
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(box["port"])]
    if image.startswith(("crash", "mute")):
        command = [sys.executable, "-c", CRASH if image.startswith("crash") else MUTE]
    environment = {key: value for key, value in os.environ.items() if key != "GREETING"}
    for pair in values.get("--env", []):
        key, equals, value = pair.partition("=")
        environment[key] = value if equals else os.environ[key]
    box["pid"] = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    ).pid
    (HOME / f"{name}.json").write_text(json.dumps(box))
    print("0" * 64)
    return 0


def alive(pid: int) -> bool:
    if pid == 0:  # it never ran
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
