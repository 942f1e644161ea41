"""Real OpenSearch nodes on loopback for tests: one JVM each, made of Maven's artifacts by tests/opensearch."""

import hashlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "opensearch"
CACHE = Path.home() / ".cache" / "nanochat-tests"
START_S = 180
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def jars() -> Path:
    """The folder of everything a node needs, fetched and compiled once (60 MB). Skips where that cannot be done."""
    for program in ("java", "javac", "mvn"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: real OpenSearch nodes need a JDK and Maven")
    version = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SOURCES.iterdir()))).hexdigest()[:12]
    done = CACHE / f"opensearch-{version}"
    if done.is_dir():
        return done
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="opensearch-", dir=CACHE))
    fetch = ["mvn", "-q", "-B", "-f", str(SOURCES / "pom.xml"), "dependency:copy-dependencies"]
    fetched = subprocess.run([*fetch, f"-DoutputDirectory={folder}"], capture_output=True, text=True, timeout=600)
    if fetched.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"Maven cannot fetch OpenSearch: {fetched.stdout.strip().splitlines()[0][:200]}")
    for plugin in folder.glob("*.zip"):
        with zipfile.ZipFile(plugin) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".jar")])
    compile_ = ["javac", "-cp", f"{folder}/*", "-d", str(folder), str(SOURCES / "OpenSearchNode.java")]
    subprocess.run(compile_, check=True, timeout=120)
    try:
        folder.rename(done)
    except OSError:  # another process was first
        shutil.rmtree(folder)
    return done


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Node:
    """A node process. seed: a node whose cluster to join; None starts a cluster."""

    def __init__(self, name: str, folder: Path, seed: "Node | None" = None) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self.port, self.inner_port = free_ports(2)
        settings = {
            "node.name": name,
            "cluster.name": folder.name,
            "network.host": "127.0.0.1",
            "http.port": self.port,
            "transport.port": self.inner_port,
            "cluster.routing.allocation.disk.threshold_enabled": "false",
        }
        settings |= (
            {"discovery.seed_hosts": f"127.0.0.1:{seed.inner_port}"}
            if seed
            else {"cluster.initial_cluster_manager_nodes": name}
        )
        library = jars()
        jvm = ["java", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", f"{library}:{library}/*"]
        given = [f"{key}={value}" for key, value in settings.items()]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*jvm, "OpenSearchNode", str(folder / name), *given], stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def wait(self, nodes: int = 1) -> "Node":
        """Until it answers and sees so many nodes."""
        end = time.monotonic() + START_S
        url = f"http://127.0.0.1:{self.port}/_cluster/health?wait_for_nodes={nodes}&timeout=10s"
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                with DIRECT.open(url, timeout=15):
                    return self
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"{self.name} did not start in {START_S} s:\n{self.log.read_text()[-2000:]}")

    def url(self, index: str) -> str:
        return f"opensearch://127.0.0.1:{self.port}/{index}"

    def kill(self) -> None:
        """At once, as when its machine is lost."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
