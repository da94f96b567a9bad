"""A real Prometheus (Debian's) with the configuration that is shipped, but for where it finds its targets."""

import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from deltawire.redis_server import free_port
from tests.support.absent import lack
from tests.support.observability import DIRECTORY
from tests.support.processes import end
from tests.support.system import START_TIMEOUT_S

INTERVAL: Final = "1s"


class Prometheus:
    """Scrapes each job's targets every second with the key given, from `__enter__` on."""

    def __init__(self, targets: Mapping[str, Sequence[str]], key: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-prometheus-")
        self._targets = targets
        self._key = key
        self._process: subprocess.Popen[bytes] | None = None
        self._url = f"http://127.0.0.1:{free_port()}"
        self._client = httpx.Client(base_url=self._url, trust_env=False, timeout=START_TIMEOUT_S)

    def _configuration(self) -> str:
        config = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(config["global"], INTERVAL)
        config["rule_files"] = [str(DIRECTORY / file) for file in config["rule_files"]]
        key_path = Path(self._directory.name, "key")
        key_path.write_text(self._key)
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        config["scrape_configs"] = [jobs[name] for name in self._targets]
        for name, targets in self._targets.items():
            del jobs[name]["dns_sd_configs"]
            jobs[name]["static_configs"] = [{"targets": list(targets)}]
            jobs[name]["authorization"] = {"credentials_file": str(key_path)}
        return str(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        program = shutil.which("prometheus")
        if program is None:
            lack("Prometheus is not installed (Debian: prometheus)")
        directory = Path(self._directory.name)
        (directory / "prometheus.yml").write_text(self._configuration())
        log_path = directory / "log"
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                    "--log.level=warn",
                ],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log_path.read_text()
                self.__exit__()
                raise AssertionError(f"Prometheus is not ready; its log:\n{said[-3000:]}")
            time.sleep(0.05)
        return self

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._client.close()
        if self._process is not None:
            end(self._process)
        self._directory.cleanup()

    def values(self, expression: str) -> list[float]:
        """What a query finds now; none that is no number."""
        answer = self._get("query", query=expression)
        found = [float(series["value"][1]) for series in answer["result"]]
        return [value for value in found if not math.isnan(value)]

    def rules(self) -> list[dict[str, Any]]:
        """What it says of the rules: their health, and which alerts fire."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **params: str) -> Any:  # JSON
        answer = self._client.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]
