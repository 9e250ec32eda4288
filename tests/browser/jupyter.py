"""A Jupyter server of a test's own: JupyterLab, Notebook 7 or Voila on 127.0.0.1, its own folders, ended by its pid.

It knows nothing of browsers; `front_end` opens its notebooks.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

Kind = Literal["lab", "notebook", "voila"]
#: The package that serves each kind.
PACKAGES: dict[Kind, str] = {"lab": "jupyterlab", "notebook": "notebook", "voila": "voila"}

#: Laid over the front end's defaults: every cell is drawn wherever it is (a default since JupyterLab 4.3 leaves those
#: off the screen without text), and nothing pops up, asks the network for news or saves by itself.
SETTINGS: dict[str, dict[str, Any]] = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


class JupyterServer:
    """A running server. A context manager; everything it writes is below `folder`.

    Args:
        kind: which front end it serves.
        folder: an empty folder; notebooks are in its `notebooks`.
        settings: more of `SETTINGS`, by plugin.
    """

    def __init__(self, kind: Kind, folder: Path, settings: dict[str, dict[str, Any]] | None = None) -> None:
        self.kind = kind
        self.root = folder / "notebooks"
        self.home = folder / "home"
        self.token = secrets.token_hex(16)
        self._log, self._data = folder / "server.log", folder / "data"
        config = folder / "config"
        (config / "labconfig").mkdir(parents=True)
        self.root.mkdir()
        overrides = {**SETTINGS, **(settings or {})}
        (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(overrides))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        environment = os.environ | {
            "JUPYTER_CONFIG_DIR": str(config),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTER_DATA_DIR": str(self._data),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython"),
            "KANI_NB_HOME": str(self.home),
        }
        command = [sys.executable, "-m", PACKAGES[kind], "--no-browser"]
        if kind == "voila":
            command += [str(self.root), f"--port={self.port}", "--Voila.ip=127.0.0.1", f"--token={self.token}"]
        else:
            command += ["--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"]
            command += [f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"]
            command += [f"--ServerApp.root_dir={self.root}", f"--IdentityProvider.token={self.token}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> Self:
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_kernel(self, name: str, environment: dict[str, str]) -> None:
        """Serve one more kernel: this Python, with these variables."""
        folder = self._data / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": command, "display_name": name, "language": "python", "env": environment}
        (folder / "kernel.json").write_text(json.dumps(spec))

    def write(self, name: str, cells: list[str], kernel: str = "python3") -> Path:
        """A notebook of code cells."""
        code = [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "metadata": {},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for number, source in enumerate(cells)
        ]
        spec = {"name": kernel, "display_name": kernel, "language": "python"}
        path = self.root / name
        path.write_text(
            json.dumps({"cells": code, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5})
        )
        return path

    def url(self, name: str) -> str:
        """Where the front end shows that notebook."""
        pages = {"lab": "lab/tree/{}?reset&", "notebook": "notebooks/{}?", "voila": "voila/render/{}?"}
        return f"{self.address}/{pages[self.kind].format(name)}token={self.token}"

    def stop_kernels(self) -> None:
        """End every kernel and its session, so that the next notebook starts a fresh one. Voila's end with Voila."""
        if self.kind == "voila":
            return
        for session in self._call("GET", "api/sessions"):
            self._call("DELETE", f"api/sessions/{session['id']}")
        for kernel in self._call("GET", "api/kernels"):
            self._call("DELETE", f"api/kernels/{kernel['id']}")

    def close(self) -> None:
        """End the server, and with it its kernels. Safe to call twice."""
        if self._process.poll() is None:
            with suppress(OSError):  # it did not come up, or is on its way down
                self.stop_kernels()
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + 60
        while True:
            try:
                self._call("GET", "" if self.kind == "voila" else "api/status")
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    log = self._log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the {self.kind} server did not start:\n{log}") from error
                time.sleep(0.1)
            else:
                return

    def _call(self, method: str, path: str) -> Any:
        request = urllib.request.Request(
            f"{self.address}/{path}", method=method, headers={"Authorization": f"token {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            if method == "DELETE" and error.code == 404:  # gone by itself
                return None
            raise
        return json.loads(body) if body and path else None
