"""When a rank dies or hangs, the other ranks exit instead of blocking in a collective until torch's own timeout.

Every rank runs a thread that holds a connection to rank 0, separate from torch's. Both ends send heartbeats every few
seconds, rank 0 broadcasts which rank is lost, and the connection of a process that exits closes at once. Heartbeats
come from the process, not from its steps: a step, compilation or checkpoint may take any time, and time in which the
whole job was suspended does not count.

Not detected: a deadlock in which all processes are alive (torch's timeout ends it). A main thread that never releases
the GIL is taken for dead.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_detour.errors import EXIT_INTERRUPTED, DetourError, caused_by_another_rank, leave, print_error
from megatron_detour.files import is_transient

BEAT_SECONDS = 3.0
LOST_SECONDS = 45.0
GRACE_SECONDS = 2.0  # from a verdict to exiting, so that the failed rank's message comes first
CONNECT_SECONDS = 60.0
GREETING_SECONDS = 5.0  # a connection that has not introduced itself by then is closed
MAX_STRANGERS = 64  # simultaneous connections that have not introduced themselves
MAX_LINE_BYTES = 8192
RECORD_SECONDS = 10.0  # time limit for recording the failure in the run directory
MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Verdict:
    """Which rank ended the run, and why."""

    rank: int
    host: str
    reason: str
    transient: bool = False  # such as a file server that is briefly unavailable
    restart: bool = False  # transient, and a checkpoint was saved: the run should be restarted

    @property
    def status(self) -> int:
        return EXIT_INTERRUPTED if self.restart else 1

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.reason}"


class _Line:
    """A connection that carries one JSON object per line, each after its HMAC under the run's secret. Nothing that
    fails authentication is parsed."""

    def __init__(self, connection: socket.socket, secret: bytes) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._secret = connection, secret
        self.since = time.monotonic()
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Thread-safe. Errors are ignored: reading detects a closed connection."""
        body = json.dumps(message).encode()
        try:
            with self._sending:
                self.socket.sendall(self._code(body) + b" " + body + b"\n")
        except OSError:
            return

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages of a readable connection, or None if it was closed or fails authentication."""
        try:
            received = self.socket.recv(MAX_LINE_BYTES)
        except OSError:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        if not received or len(self._rest) > MAX_LINE_BYTES:
            return None
        parts = [line.partition(b" ") for line in lines]
        if not all(hmac.compare_digest(code, self._code(body)) for code, _, body in parts):
            return None
        return [json.loads(body) for _, _, body in parts]

    def _code(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, "sha256").hexdigest().encode()


@dataclass
class _Peer:
    """The other end of a connection: any other rank for rank 0, rank 0 for any other rank."""

    rank: int
    host: str = "an unknown host"
    line: _Line | None = None
    silence: float = 0.0  # seconds
    done: bool = False  # it has closed its detector
    heard: threading.Event = field(default_factory=threading.Event)  # it has acknowledged our last message


class FailureDetector:
    """A context manager around the work of a process group; every rank has to create and enter it.

    Leaving it without an error closes it: this rank has finished. An error that originates in this rank is sent to the
    other ranks, which print one line and exit with status 1, or with EXIT_INTERRUPTED if the run should be restarted.
    An error that is only the consequence of another rank's failure is reported as that rank's failure.

    On rank 0, `has_saved` says whether the run can be restarted, and `on_failure` is called before exiting.
    """

    has_saved: Callable[[], bool] = staticmethod(lambda: False)
    on_failure: Callable[[Verdict], None] = staticmethod(lambda verdict: None)

    def __init__(
        self,
        beat: float = BEAT_SECONDS,
        lost: float = LOST_SECONDS,
        grace: float = GRACE_SECONDS,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect the ranks of the default process group. `is_stopping` says whether this rank is about to stop anyway.

        Raises DetourError if rank 0 cannot be reached.
        """
        self._is_stopping = is_stopping
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        self._beat, self._lost, self._grace = beat, lost, grace
        self._host = socket.gethostname()
        self._launchers = _launchers()
        self._selector = selectors.DefaultSelector()
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._deciding = threading.Lock()
        self._ends_at = 0.0
        self._leaving = False  # the main thread is about to exit
        self._closed = threading.Event()
        self._peers: dict[int, _Peer] = {}
        self._strangers: list[_Line] = []
        self.ports: dict[str, int] = {}  # on which rank 0 listens, by address
        if ranks > 1:
            self._connect(ranks)
        self._thread = threading.Thread(target=self._run, name="failure detector", daemon=True)
        self._thread.start()

    def __enter__(self) -> FailureDetector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):  # Ctrl-C and exits concern all ranks
            self.close()
            return
        if caused_by_another_rank(error) and self._decided.wait(2 * self._beat):
            return  # the thread exits with the reason
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        error.first_to_fail = self.publish_failure(reason, is_transient(error))
        if error.first_to_fail and self._verdict and self._verdict.restart:
            error.restart = True

    def publish_failure(self, text: str, transient: bool = False) -> bool:
        """Tell the other ranks that this one failed. Return whether it was the first, whose message is printed."""
        self._leaving = True
        verdict = Verdict(self.rank, self._host, f"failed, see its message: {text[:MAX_REASON_CHARACTERS]}", transient)
        if self.rank:
            self._announce({"verdict": asdict(verdict)})
            self._decided.wait(2 * self._beat)
        else:
            self._decide(verdict)
            self._wait_for_answers()
        return self._verdict is None or self._verdict.rank == self.rank

    def close(self) -> None:
        """Leave the group: this rank has finished. Not a collective; takes at most two beats."""
        self._leaving = True
        self._announce({"done": True})
        self._closed.set()
        self._thread.join(2 * self._beat)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _connect(self, ranks: int) -> None:
        address = _resolved(os.environ["MASTER_ADDR"])
        addresses: list[Any] = [None] * ranks
        dist.all_gather_object(addresses, address)  # a name may resolve differently on rank 0's own machine
        endpoint: list[Any] = [None]
        if self.rank == 0:
            servers = {address: _serve(address) for address in set(addresses)}
            self.ports = {address: server.getsockname()[1] for address, server in servers.items()}
            endpoint = [(self.ports, secrets.token_bytes(32), self._host)]
        dist.broadcast_object_list(endpoint, src=0)
        ports, self._secret, first_host = endpoint[0]
        if self.rank == 0:
            self._peers = {rank: _Peer(rank) for rank in range(1, ranks)}
            for server in servers.values():
                self._selector.register(server, selectors.EVENT_READ, partial(self._accept, server))
            return
        self._peers = {0: _Peer(0, first_host)}
        line, more = self._greet(address, ports[address])
        self._listen(self._peers[0], line)
        for message in more:
            self._receive(self._peers[0], message)

    def _greet(self, address: str, port: int) -> tuple[_Line, list[dict[str, Any]]]:
        """Return an accepted connection to rank 0 and its first messages. Strangers may occupy rank 0 for a while."""
        until = time.monotonic() + CONNECT_SECONDS
        fault = "no answer"
        while time.monotonic() < until:
            try:
                line = _Line(socket.create_connection((address, port), until - time.monotonic()), self._secret)
                line.send({"rank": self.rank, "host": self._host})
                while (welcome := line.read()) == []:
                    continue
                if welcome:
                    line.socket.settimeout(None)
                    return line, welcome
                line.socket.close()
            except OSError as error:
                fault = str(error)
            time.sleep(0.2)
        raise DetourError(
            f"rank {self.rank} cannot reach rank 0 at {address}, port {port} ({fault}); ranks connect on ports that "
            "the system chooses: allow such connections between the nodes"
        )

    def _accept(self, server: socket.socket) -> None:
        try:
            connection = server.accept()[0]
        except OSError:  # already closed
            return
        connection.setblocking(True)
        line = _Line(connection, self._secret)
        self._strangers.append(line)
        self._selector.register(line.socket, selectors.EVENT_READ, partial(self._introduce, line))
        if len(self._strangers) > MAX_STRANGERS:
            self._turn_away(self._strangers[0])

    def _introduce(self, line: _Line) -> None:
        """The first message of a new connection has to name its rank."""
        messages = line.read() if line in self._strangers else []  # it may have been turned away just before
        if messages == []:
            return
        hello, *more = messages or [{}]
        peer = self._peers.get(hello.get("rank"))
        if peer is None or peer.line:
            self._turn_away(line)
            return
        self._strangers.remove(line)
        self._selector.unregister(line.socket)
        peer.host = hello["host"]
        line.send({"welcome": True})
        self._listen(peer, line)
        for message in more:
            self._receive(peer, message)

    def _turn_away(self, line: _Line) -> None:
        self._strangers.remove(line)
        self._selector.unregister(line.socket)
        line.socket.close()

    def _listen(self, peer: _Peer, line: _Line) -> None:
        peer.line, peer.silence = line, 0.0
        self._selector.register(line.socket, selectors.EVENT_READ, lambda: self._read(peer, line))

    def _read(self, peer: _Peer, line: _Line) -> None:
        messages = line.read()
        peer.silence = 0.0
        for message in messages or []:
            self._receive(peer, message)
        if messages is None:
            self._selector.unregister(line.socket)
            peer.heard.set()
            if not peer.done:
                self._lose(peer, "exited without an error message: killed, out of memory, crashed, or disconnected")

    def _receive(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._decide(Verdict(**message["verdict"]))
        peer.done |= "done" in message
        if "heard" in message or peer.done:
            peer.heard.set()
        if "verdict" in message or "done" in message:
            peer.line.send({"heard": True})

    def _announce(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            if peer.line:
                peer.heard.clear()
                peer.line.send(message)
        self._wait_for_answers()

    def _wait_for_answers(self) -> None:
        """Wait until our last message was received, as exiting may overtake it; no longer than two beats."""
        until = time.monotonic() + 2 * self._beat
        for peer in self._peers.values():
            if peer.line and not peer.done:
                peer.heard.wait(max(until - time.monotonic(), 0.0))

    def _lose(self, peer: _Peer, reason: str) -> None:
        peer.done = True
        self._decide(Verdict(peer.rank, peer.host, reason))

    def _decide(self, verdict: Verdict) -> None:
        """The first verdict counts. Rank 0 sends its verdict to all ranks."""
        with self._deciding:
            if self._verdict is None:
                if self.rank == 0:
                    verdict = replace(verdict, restart=verdict.transient and self.has_saved())
                self._verdict, self._ends_at = verdict, time.monotonic() + self._grace
        if self.rank == 0:
            for peer in self._peers.values():
                if peer.line:
                    peer.heard.clear()
                    peer.line.send({"verdict": asdict(self._verdict)})
        self._decided.set()

    def _run(self) -> None:
        beaten = last = time.monotonic()
        while not self._closed.is_set():
            for key, _ in self._selector.select(min(self._beat, self._grace, 1.0) / 2):
                key.data()
            now = time.monotonic()
            for line in [line for line in self._strangers if now - line.since > GREETING_SECONDS]:
                self._turn_away(line)
            # A process that was itself suspended does not know how long its peers were silent.
            self._count_silence(min(now - last, self._beat))
            last = now
            if now - beaten >= self._beat:
                beaten = now
                for peer in self._peers.values():
                    if peer.line and not peer.done:
                        peer.line.send({"beat": True})
            self._check_launchers()
            if self._verdict and now >= self._ends_at and not self._leaving:
                print_error(str(self._verdict), self.rank)
                if self.rank == 0:
                    self._record_failure()
                leave(self._verdict.status)

    def _record_failure(self) -> None:
        """In a separate thread, as the disk may never respond."""
        recording = threading.Thread(target=self.on_failure, args=[self._verdict], daemon=True)
        recording.start()
        recording.join(RECORD_SECONDS)

    def _count_silence(self, seconds: float) -> None:
        for peer in self._peers.values():
            peer.silence += seconds
            if peer.silence > self._lost and not peer.done:
                reason = f"has not responded for {self._lost:.0f} s: killed, out of memory, or its machine is down"
                self._lose(peer, reason)

    def _check_launchers(self) -> None:
        """A rank whose launcher is gone would hold its GPU forever: it sends itself a SIGTERM, to save and exit."""
        if self._launchers and self._launchers != _launchers():
            self._launchers = ()
            if not self._is_stopping():  # Ctrl-C ends launchers as well
                print_error("the launcher has exited; stopping this rank as after SIGTERM", self.rank)
            os.kill(os.getpid(), signal.SIGTERM)


def _resolved(name: str) -> str:
    """Return the address that this machine resolves a name to."""
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return name


def _serve(address: str) -> socket.socket:
    """Listen at the address that ranks connect to, or at every address if this machine has no such address (NAT)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        server = socket.create_server(("", 0), family=family)
    server.setblocking(False)
    return server


def _launchers() -> tuple[int, ...]:
    """Return the processes that started this rank and wait for it: torchrun, or DeepSpeed's launcher and its parent.

    The `deepspeed` command does not forward signals: killing it leaves its children running. Empty for other launchers:
    srun cleans up its tasks, and a shell may exit before the processes that it started.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (parent,)
    try:
        arguments = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if b"deepspeed.launcher.launch" in arguments:
            status = Path(f"/proc/{parent}/stat").read_text()
            return parent, int(status.rpartition(")")[2].split()[1])
    except OSError:  # no /proc, or the parent has just exited
        pass
    return ()
