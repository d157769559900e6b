"""A rank that dies or hangs ends the others, instead of leaving them in a collective until torch's own timeout.

Every rank runs a thread with a connection to rank 0, beside torch's. They tell each other every few seconds that they
live, rank 0 tells all of them whom it misses, and a process that ends closes its connection at once. A beat is of the
process, not of its steps: however long a step, a compilation or a checkpoint takes, nobody is taken for dead, and time
in which the whole job was stopped does not count.

Not caught: a deadlock in which all processes live (torch's timeout ends it), and main code that never lets go of the
interpreter's lock looks dead after the same time as a dead rank.
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

from megatron_detour.errors import EXIT_INTERRUPTED, DetourError, leave, of_another_rank, say_error
from megatron_detour.files import is_transient

BEAT_SECONDS = 3.0
LOST_SECONDS = 45.0
GRACE_SECONDS = 2.0  # from a verdict to the end, so that the guilty rank's message comes first
CONNECT_SECONDS = 60.0
GREETING_SECONDS = 5.0  # a connection that has not said by then of which rank it is, is closed
MOST_STRANGERS = 64  # connections at a time that have not said it
LONGEST_LINE = 8192  # bytes
TELL_SECONDS = 10.0  # that the end of a run may take to write down
LONGEST_REASON = 500  # characters of a failure's text


@dataclass(frozen=True)
class Verdict:
    """Which rank ends the run, and how it went."""

    rank: int
    host: str
    how: str
    passing: bool = False  # as a disk that is away for a moment
    again: bool = False  # passing, and the session has saved: the run is to be started again

    @property
    def status(self) -> int:
        return EXIT_INTERRUPTED if self.again else 1

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.how}"


class _Line:
    """A connection that carries one JSON object a line, each with its code by the run's secret in front: nothing else
    that comes is so much as parsed."""

    def __init__(self, connection: socket.socket, secret: bytes) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._secret = connection, secret
        self.since = time.monotonic()
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """From any thread. That the other end has gone is found by reading."""
        body = json.dumps(message).encode()
        try:
            with self._sending:
                self.socket.sendall(self._code(body) + b" " + body + b"\n")
        except OSError:
            return

    def read(self) -> list[dict[str, Any]] | None:
        """What has come on a connection that is readable, or None when it has ended or is none of ours."""
        try:
            came = self.socket.recv(LONGEST_LINE)
        except OSError:
            return None
        *lines, self._rest = (self._rest + came).split(b"\n")
        if not came or len(self._rest) > LONGEST_LINE:
            return None
        parts = [line.partition(b" ") for line in lines]
        if not all(hmac.compare_digest(code, self._code(body)) for code, _, body in parts):
            return None
        return [json.loads(body) for _, _, body in parts]

    def _code(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, "sha256").hexdigest().encode()


@dataclass
class _Peer:
    """Another rank: each of them to rank 0, rank 0 to the others."""

    rank: int
    host: str = "an unknown host"
    line: _Line | None = None
    silence: float = 0.0  # seconds
    done: bool = False  # it has closed its watch
    heard: threading.Event = field(default_factory=threading.Event)  # it has answered our last word


class FailureDetector:
    """A context manager around the work of a process group; every rank makes it and enters it.

    Leaving it without an error closes it: the run is over for this rank. An error that is this rank's own is published.
    Of one that comes of another rank's end the guilty one is told. Then the other ranks end, after one line: status 1,
    or EXIT_INTERRUPTED where the run is to be started again, which rank 0 knows by `has_saved`. It calls `ended` first.
    """

    has_saved: Callable[[], bool] = staticmethod(lambda: False)
    ended: Callable[[Verdict], None] = staticmethod(lambda verdict: None)

    def __init__(
        self,
        beat: float = BEAT_SECONDS,
        lost: float = LOST_SECONDS,
        grace: float = GRACE_SECONDS,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connects the ranks of the default process group. `asked` tells whether this rank is to end already.

        Raises DetourError where rank 0 cannot be reached.
        """
        self._asked = asked
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        self._beat, self._lost, self._grace = beat, lost, grace
        self._host = socket.gethostname()
        self._launchers = _launchers()
        self._selector = selectors.DefaultSelector()
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._deciding = threading.Lock()
        self._ends_at = 0.0
        self._leaving = False  # the main thread is ending this process
        self._closed = threading.Event()
        self._peers: dict[int, _Peer] = {}
        self._strangers: list[_Line] = []
        self.listens: dict[str, int] = {}  # rank 0's ports by address
        if ranks > 1:
            self._connect(ranks)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> FailureDetector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):  # Ctrl-C and exits meet all ranks
            self.close()
            return
        if of_another_rank(error) and self._decided.wait(2 * self._beat):
            return  # the watch ends this process with the reason
        how = f"{type(error).__name__}: {error}".partition("\n")[0]
        error.first_to_fail = self.failed(how, is_transient(error))
        if error.first_to_fail and self._verdict and self._verdict.again:
            error.start_again = True

    def failed(self, text: str, passing: bool = False) -> bool:
        """Publishes that this rank has failed; returns whether it is the first, whose message the others wait for."""
        self._leaving = True
        verdict = Verdict(self.rank, self._host, f"has failed, see its message: {text[:LONGEST_REASON]}", passing)
        if self.rank:
            self._announce({"verdict": asdict(verdict)})
            self._decided.wait(2 * self._beat)
        else:
            self._decide(verdict)
            self._wait_for_answers()
        return self._verdict is None or self._verdict.rank == self.rank

    def close(self) -> None:
        """This rank has done its work: it and the others no longer end each other. No collective: at most two beats."""
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
        dist.all_gather_object(addresses, address)  # a name may mean another address on rank 0's own machine
        told: list[Any] = [None]
        if self.rank == 0:
            servers = {address: _serve(address) for address in set(addresses)}
            self.listens = {address: server.getsockname()[1] for address, server in servers.items()}
            told = [(self.listens, secrets.token_bytes(32), self._host)]
        dist.broadcast_object_list(told, src=0)
        ports, self._secret, first_host = told[0]
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
        """A connection that rank 0 has taken, and what it has said at once. Strangers may be in the way for a while."""
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
            f"rank {self.rank} cannot reach rank 0 at {address}, port {port} ({fault}); ranks talk on ports that "
            "the system chooses: let the nodes reach each other on them"
        )

    def _accept(self, server: socket.socket) -> None:
        try:
            connection = server.accept()[0]
        except OSError:  # it has gone again
            return
        connection.setblocking(True)
        line = _Line(connection, self._secret)
        self._strangers.append(line)
        self._selector.register(line.socket, selectors.EVENT_READ, partial(self._introduce, line))
        if len(self._strangers) > MOST_STRANGERS:
            self._turn_away(self._strangers[0])

    def _introduce(self, line: _Line) -> None:
        """What a new connection says first has to be of which rank it is."""
        messages = line.read() if line in self._strangers else []  # or it was turned away a moment ago
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
                self._miss(peer, "has ended without a word: killed, out of memory, crashed, or cut off")

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
        """Lets our last word arrive before the process ends, as the end may overtake it; not for a peer that hangs."""
        until = time.monotonic() + 2 * self._beat
        for peer in self._peers.values():
            if peer.line and not peer.done:
                peer.heard.wait(max(until - time.monotonic(), 0.0))

    def _miss(self, peer: _Peer, how: str) -> None:
        peer.done = True
        self._decide(Verdict(peer.rank, peer.host, how))

    def _decide(self, verdict: Verdict) -> None:
        """The first verdict holds. Rank 0's is passed on to all."""
        with self._deciding:
            if self._verdict is None:
                if self.rank == 0:
                    verdict = replace(verdict, again=verdict.passing and self.has_saved())
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
            # Where this process was stopped itself it cannot say how long the others were silent.
            self._count_silence(min(now - last, self._beat))
            last = now
            if now - beaten >= self._beat:
                beaten = now
                for peer in self._peers.values():
                    if peer.line and not peer.done:
                        peer.line.send({"beat": True})
            self._look_after_launchers()
            if self._verdict and now >= self._ends_at and not self._leaving:
                say_error(str(self._verdict), self.rank)
                if self.rank == 0:
                    self._tell_end()
                leave(self._verdict.status)

    def _tell_end(self) -> None:
        """In a thread of its own, as what it writes to may be a disk that never answers."""
        telling = threading.Thread(target=self.ended, args=[self._verdict], daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)

    def _count_silence(self, seconds: float) -> None:
        for peer in self._peers.values():
            peer.silence += seconds
            if peer.silence > self._lost and not peer.done:
                lost = f"has not been heard of for {self._lost:.0f} s: killed, out of memory, or its machine is gone"
                self._miss(peer, lost)

    def _look_after_launchers(self) -> None:
        """A rank whose launcher is gone would hold its GPU with nobody to end it: it asks itself to save and end."""
        if self._launchers and self._launchers != _launchers():
            self._launchers = ()
            if not self._asked():  # a Ctrl-C ends launchers as well
                say_error("the launcher has ended; this rank ends as if by SIGTERM", self.rank)
            os.kill(os.getpid(), signal.SIGTERM)


def _resolved(name: str) -> str:
    """The address that this machine finds under a name."""
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return name


def _serve(address: str) -> socket.socket:
    """Listens at the address that ranks use; at all where it is none of this machine's, as one that is forwarded."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        server = socket.create_server(("", 0), family=family)
    server.setblocking(False)
    return server


def _launchers() -> tuple[int, ...]:
    """The processes that started this rank and wait for it: torchrun; DeepSpeed's launcher and the command in front.

    That command passes no signal on, so that whoever ends it leaves the rest running. Empty without such a launcher, as
    srun looks after its tasks, and a shell may well end before what it started.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (parent,)
    try:
        arguments = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if b"deepspeed.launcher.launch" in arguments:
            status = Path(f"/proc/{parent}/stat").read_text()
            return parent, int(status.rpartition(")")[2].split()[1])
    except OSError:  # no /proc, or it has just ended
        pass
    return ()
