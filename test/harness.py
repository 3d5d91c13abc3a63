# SPDX-License-Identifier: LGPL-2.1-or-later
"""What whole-program tests share: a daemon under test, a QMP client, the peer's image tools, and a TestCase.

The daemon is `INTERLOCK_DAEMON` (a command line) if that is set, else `interlock daemon` of the build folder named by
`INTERLOCK_BUILD` (default: build). A test that passes with INTERLOCK_DAEMON=qemu-storage-daemon is right about what the
two have in common. `INTERLOCK_SEED` repeats a run; `INTERLOCK_LEVEL` is `short` (default) or `full`.

Every daemon is started, watched and ended by its own process id. A test fails when its daemon ends with another status
than it should, or leaves a sanitizer's report or a failed assertion on its stderr, whatever else the test saw.
"""
import contextlib
import ctypes
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, os.environ.get("INTERLOCK_BUILD", "build"))
PROGRAM = os.path.join(BUILD, "interlock")
DAEMON = shlex.split(os.environ.get("INTERLOCK_DAEMON", "")) or [PROGRAM, "daemon"]
PEER = "qemu-storage-daemon"
IS_PEER = os.path.basename(DAEMON[0]) == PEER
FULL = os.environ.get("INTERLOCK_LEVEL", "short") == "full"
SANITIZED = any(word in os.path.basename(BUILD) for word in ("asan", "tsan"))
SLOWNESS = 4 if SANITIZED else 1  # how much longer to wait for a sanitized daemon

KIB = 1024
MIB = 1024 * KIB

REPORTS = re.compile(
    rb"ERROR: (?:Address|Leak|Thread|Memory)Sanitizer|WARNING: ThreadSanitizer|runtime error:|SUMMARY: \w+Sanitizer"
    rb"|\bERROR:\S+:\d+:\w+: assertion|assertion failed|CRITICAL \*\*|stack smashing"
)
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:exitcode=99:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:second_deadlock_stack=1",
}


def scale(short, full):
    """The size of a random or exhaustive test: a slice for each check, the whole for ./dev long."""
    return full if FULL else short


class QmpError(Exception):
    """An error reply: its class and sentence, and the structured data of a refusal if there were any."""

    def __init__(self, command, reply):
        error = reply["error"]
        super().__init__(f"{command}: {error['class']}: {error['desc']}")
        self.error_class = error["class"]
        self.desc = error["desc"]
        self.data = error.get("data")


class Gone(Exception):
    """The daemon closed the connection."""


class Qmp:
    """One QMP connection. Events are kept in order in `events` until a wait takes them."""

    def __init__(self, path, negotiate=True, timeout=30 * SLOWNESS):
        self.timeout = timeout
        self.buffer = b""
        self.events = []
        self.log = []
        self.identity = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.greeting = self.receive()
        if negotiate:
            self.execute("qmp_capabilities")

    def close(self):
        self.socket.close()

    def send_raw(self, data):
        self.socket.sendall(data)

    def receive(self, timeout=None):
        """The next message of any kind; TimeoutError when none comes."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                raise TimeoutError("no QMP message")
            data = self.socket.recv(65536)
            if not data:
                raise Gone("the daemon closed the QMP connection")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        self.log.append(message)
        return message

    def reply(self, timeout=None):
        """The next message that is no event; events on the way are kept."""
        while True:
            message = self.receive(timeout)
            if "event" not in message:
                return message
            self.events.append(message)

    def execute(self, command, arguments=None, timeout=None, **more):
        """Runs a command; keyword arguments have '_' for '-'. Returns what it returned or raises QmpError."""
        self.identity += 1
        request = {"execute": command, "id": self.identity}
        arguments = {**(arguments or {}), **{key.replace("_", "-"): value for key, value in more.items()}}
        if arguments:
            request["arguments"] = arguments
        self.send_raw(json.dumps(request).encode() + b"\n")
        reply = self.reply(timeout)
        assert reply.get("id") == self.identity, f"reply to another command: {reply}"
        if "error" in reply:
            raise QmpError(command, reply)
        return reply["return"]

    def wait_event(self, name, timeout=None, **match):
        """Takes the first event of that name whose data has all of `match`."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)

        def fits(event):
            data = event.get("data", {})
            return event["event"] == name and all(data.get(k.replace("_", "-")) == v for k, v in match.items())

        while True:
            for event in self.events:
                if fits(event):
                    self.events.remove(event)
                    return event
            message = self.receive(max(0.0, deadline - time.monotonic()))
            if "event" in message:
                self.events.append(message)

    def drain_events(self, quiet=0.05):
        """All events that have come, and those that come until it is quiet for so many seconds."""
        with contextlib.suppress(TimeoutError):
            while True:
                message = self.receive(quiet)
                self.events.append(message)
        events, self.events = self.events, []
        return events

    def jobs(self):
        return {job["id"]: job for job in self.execute("query-jobs")}

    def wait_job(self, job, timeout=None):
        """Waits for the end of a job; returns its error or None. The job was started with auto-dismiss on."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        error = None
        while True:
            event = self.wait_event("JOB_STATUS_CHANGE", max(0.0, deadline - time.monotonic()), id=job)
            status = event["data"]["status"]
            if status == "concluded":
                for info in self.execute("query-jobs"):
                    if info["id"] == job:
                        error = info.get("error")
            if status == "null":
                for known in [e for e in self.events if e["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")]:
                    if known["data"]["device"] == job:
                        self.events.remove(known)
                        error = known["data"].get("error", error)
                return error

    def wait_jobs(self, jobs, timeout=None):
        return {job: self.wait_job(job, timeout) for job in jobs}


def die_with_parent():
    """In a child before exec: ends with the test run, even if that is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


class Daemon:
    """A running daemon. `qmp` is a first connection to its monitor; `sock` is the path for an NBD server."""

    def __init__(self, directory, *options, command=None, monitor=True, name="d", wait=True):
        self.directory = directory
        self.monitor_path = os.path.join(directory, f"{name}.qmp")
        self.nbd_path = os.path.join(directory, f"{name}.nbd")
        self.stderr_path = os.path.join(directory, f"{name}.stderr")
        self.qmp = None
        self.ended = False
        line = [*(command or DAEMON), *options]
        if monitor:
            line += ["--chardev", f"socket,id=monitor0,path={self.monitor_path},server=on,wait=off"]
            line += ["--monitor", "chardev=monitor0"]
        self.command_line = line
        self.is_peer = os.path.basename(line[0]) == PEER
        environment = {**SANITIZER_OPTIONS, **os.environ}
        with open(self.stderr_path, "ab") as stderr:
            self.process = subprocess.Popen(
                line, cwd=directory, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=environment,
                preexec_fn=die_with_parent,
            )
        if monitor and wait:
            self.qmp = self.connect()

    @property
    def pid(self):
        return self.process.pid

    def connect(self, negotiate=True, timeout=15 * SLOWNESS):
        """Another connection to the monitor, as soon as the daemon listens."""
        deadline = time.monotonic() + timeout
        if self.is_peer:
            time.sleep(0.1)  # it can lose a monitor client that comes while it starts
        while True:
            try:
                return Qmp(self.monitor_path, negotiate)
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None:
                    self.ended = True
                    raise AssertionError(f"the daemon ended with {self.process.returncode} at start:\n{self.stderr()}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the daemon does not listen:\n{self.stderr()}")
                time.sleep(0.005)

    def stderr(self):
        with open(self.stderr_path, "rb") as log:
            return log.read()[-20000:].decode("utf-8", "replace")

    def is_alive(self):
        return self.process.poll() is None

    def check_reports(self):
        with open(self.stderr_path, "rb") as log:
            text = log.read()
        if REPORTS.search(text):
            raise AssertionError(f"the daemon reported:\n{text[-20000:].decode('utf-8', 'replace')}")

    def wait(self, timeout=10 * SLOWNESS, status=0):
        """Waits for the daemon's own end and checks how it ended."""
        self.ended = True
        try:
            returned = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            stacks = backtraces(self.pid)
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not end in {timeout} s\n{self.stderr()}\n{stacks}") from None
        self.check_reports()
        if status is not None and returned != status:
            raise AssertionError(f"the daemon ended with {returned} instead of {status}:\n{self.stderr()}")
        return returned

    def stop(self):
        """An orderly end by `quit`, or by SIGTERM without a monitor."""
        if self.ended:
            return
        if self.process.poll() is not None:
            self.ended = True
            self.check_reports()
            raise AssertionError(f"the daemon had ended with {self.process.returncode}:\n{self.stderr()}")
        if self.qmp:
            with contextlib.suppress(Gone, OSError, TimeoutError):
                self.qmp.execute("quit", timeout=5 * SLOWNESS)
            self.qmp.close()
        else:
            self.process.send_signal(signal.SIGTERM)
        self.wait()

    def kill(self):
        """The power cut: SIGKILL, without a word."""
        self.ended = True
        self.process.kill()
        self.process.wait()
        if self.qmp:
            self.qmp.close()
        self.check_reports()

    # What nearly every test asks of a daemon.

    def nbd_server(self):
        self.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.nbd_path}}})

    def export(self, node, writable=True, name=None, export_id=None, **more):
        arguments = {"type": "nbd", "id": export_id or f"export-{name or node}", "node-name": node, "writable": writable}
        arguments["name"] = name or node
        self.qmp.execute("block-export-add", arguments, **more)

    def uri(self, name):
        return f"nbd+unix:///{name}?socket={self.nbd_path}"

    def add_file(self, name, path, **more):
        self.qmp.execute("blockdev-add", {"driver": "file", "node-name": name, "filename": path, **more})

    def add_qcow2(self, name, path, backing=None, **more):
        """Node `name` over a file node `name`-file; `backing` is a node-name, or None for no backing at all."""
        self.add_file(f"{name}-file", path, **{key: more[key] for key in ("read-only",) if key in more})
        arguments = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", **more}
        self.qmp.execute("blockdev-add", {**arguments, "backing": backing})

    def add_chain(self, chain, **more):
        """Opens [(name, path), …] from the base up; the last one is the top. `more` is for the top one."""
        below = None
        for position, (name, path) in enumerate(chain):
            top = position == len(chain) - 1
            self.add_qcow2(name, path, below, **(more if top else {}))
            below = name

    def chain_of(self, node):
        """Node names from `node` down its backing edges, job filters left out."""
        nodes = {info["node-name"]: info for info in self.qmp.execute("query-named-block-nodes", {"flat": True})}
        by_file = {info["file"]: name for name, info in nodes.items() if info["drv"] == "qcow2"}
        result = [node]
        while nodes[result[-1]].get("backing_file"):
            result.append(by_file[os.path.join(self.directory, nodes[result[-1]]["backing_file"])])
        return result


def backtraces(pid):
    """Where every thread of a hanging process is, if gdb is installed."""
    if not shutil.which("gdb"):
        return ""
    line = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 12"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(line, capture_output=True, text=True, timeout=30).stdout[-6000:]
    return ""


def run(*command, check=True, timeout=120 * SLOWNESS, **more):
    """A command to its end, with its output as text."""
    result = subprocess.run(
        [str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, **more
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{shlex.join(map(str, command))}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result


def qemu_img(*arguments, **more):
    return run("qemu-img", *arguments, **more).stdout


def qemu_io(path, *commands, image_format="qcow2", **more):
    line = ["qemu-io", "-f", image_format]
    for command in commands:
        line += ["-c", command]
    output = run(*line, path, **more).stdout
    if "failed" in output or "error" in output.lower():
        raise AssertionError(f"qemu-io {path}: {commands}\n{output}")
    return output


def image_check(path, leaks_allowed=False):
    """The peer's verdict on a qcow2 image: clean, or with leaks at most."""
    result = run("qemu-img", "check", "--output=json", "-f", "qcow2", path, check=False)
    if result.returncode == 0 or (leaks_allowed and result.returncode == 3):
        return
    raise AssertionError(f"qemu-img check {path}: status {result.returncode}\n{result.stdout}{result.stderr}")


def image_compare(first, second, first_format="qcow2", second_format="qcow2"):
    run("qemu-img", "compare", "-f", first_format, "-F", second_format, first, second)


class TestCase(unittest.TestCase):
    """A test with a directory and a seed of its own, a time limit, and no daemon left behind."""

    time_limit = 60
    builds = ("release",)  # what `./dev check` runs it on; INTERLOCK_BUILD overrides
    long_builds = ("release",)  # the same for `./dev long`
    exclusive = False  # measures time: wants the machine for itself

    def setUp(self):
        base = os.environ.get("INTERLOCK_TEST_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.directory = tempfile.mkdtemp(prefix="il-", dir=base)
        self.daemons = []
        self.daemon_count = 0
        self.processes = []
        self.seed = int(os.environ.get("INTERLOCK_SEED") or random.SystemRandom().randrange(1 << 32))
        self.random = random.Random(self.seed)
        limit = self.time_limit * SLOWNESS * (20 if FULL else 1)
        signal.signal(signal.SIGALRM, self.on_time_limit)
        signal.alarm(limit)
        self.addCleanup(self.clean_up)

    def on_time_limit(self, number, frame):
        stacks = "".join(backtraces(daemon.pid) for daemon in self.daemons if daemon.is_alive())
        raise TimeoutError(f"the test took too long (seed {self.seed})\n{stacks}")

    def clean_up(self):
        signal.alarm(30 * SLOWNESS)
        failed = self._outcome_failed()
        problems = []
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        for daemon in self.daemons:
            try:
                if failed and not daemon.ended:
                    sys.stderr.write(f"--- stderr of {shlex.join(daemon.command_line)}\n{daemon.stderr()[-6000:]}\n")
                daemon.stop()
            except (AssertionError, TimeoutError, OSError) as problem:
                problems.append(str(problem))
                if daemon.process.poll() is None:
                    daemon.process.kill()
                    daemon.process.wait()
        signal.alarm(0)
        if failed or problems:
            sys.stderr.write(f"--- seed {self.seed} (INTERLOCK_SEED repeats it)\n")
        if (failed or problems) and os.environ.get("INTERLOCK_KEEP"):
            sys.stderr.write(f"--- kept: {self.directory}\n")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)
        if problems:
            self.fail("\n".join(problems))

    def _outcome_failed(self):
        outcome = self._outcome
        result = getattr(outcome, "result", None)
        errors = list(getattr(outcome, "errors", []))  # Python before 3.11
        if any(error for _, error in errors):
            return True
        return result is not None and any(test is self for test, _ in [*result.errors, *result.failures])

    def daemon(self, *options, **more):
        self.daemon_count += 1
        daemon = Daemon(self.directory, *options, **{"name": f"d{self.daemon_count}", **more})
        self.daemons.append(daemon)
        return daemon

    def launch(self, *command, **more):
        """Another process, which does not outlive the test; its stderr is a pipe."""
        process = subprocess.Popen(command, **{"stderr": subprocess.PIPE, "preexec_fn": die_with_parent, **more})
        self.processes.append(process)
        return process

    def path(self, name):
        return os.path.join(self.directory, name)

    def create_image(self, name, size, *options, backing=None, backing_format="qcow2"):
        """A qcow2 image made by the peer; returns its path."""
        path = self.path(name)
        line = ["create", "-q", "-f", "qcow2"]
        if options:
            line += ["-o", ",".join(options)]
        if backing:
            line += ["-b", backing, "-F", backing_format]
        qemu_img(*line, path, *([str(size)] if size is not None else []))
        return path

    def create_chain(self, names, size, *options, pattern=True):
        """A chain of images from the base up, each with some data of its own; [(name, path), …]."""
        chain = []
        for position, name in enumerate(names):
            below = chain[-1][1] if chain else None
            path = self.create_image(f"{name}.qcow2", size, *options, backing=below)
            if pattern:
                commands = []
                for _ in range(8):
                    length = self.random.randrange(1, 16) * 4 * KIB
                    offset = self.random.randrange(0, (size - length) // 512) * 512
                    commands.append(f"write -q -P {position + 1} {offset} {length}")
                qemu_io(path, *commands)
            chain.append((name, path))
        return chain

    def assert_refused(self, pattern, function, *arguments, error_class="GenericError", **more):
        """The command is refused with a sentence that matches `pattern`; returns the error."""
        try:
            function(*arguments, **more)
        except QmpError as error:
            self.assertEqual(error.error_class, error_class, str(error))
            self.assertRegex(error.desc, pattern)
            return error
        self.fail(f"not refused: {arguments} {more}")
        return None


@contextlib.contextmanager
def nbd_handle(uri, **more):
    """A libnbd handle connected to `uri` for the length of a `with`; `more` are its setters."""
    import nbd  # pylint: disable=import-outside-toplevel

    handle = nbd.NBD()
    for name, value in more.items():
        getattr(handle, name)(value)
    handle.connect_uri(uri)
    try:
        yield handle
        handle.shutdown()
    finally:
        del handle


def nbd_served_again(handle):
    """Waits until requests are answered again by what a node of our client driver leads to."""
    import nbd  # pylint: disable=import-outside-toplevel
    deadline = time.monotonic() + 20 * SLOWNESS
    while True:
        try:
            handle.pread(4096, 0)
            return
        except nbd.Error:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
