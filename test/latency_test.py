# SPDX-License-Identifier: LGPL-2.1-or-later
"""No control command waits for a job that is slow, and no guest does.

Jobs limited to 1 byte per second stand on a chain of images: each would need years. Beside them every command of the
monitor is given that may be given, and has to answer within LIMIT; jobs next to them on the same chain start, run and
take their last steps; and a guest reads and writes at the top of the chain without a stall.

A sweep is one life of a daemon in which all this is done once. Noise of the machine makes a sweep slow now and then, a
wait makes every sweep slow: each command is judged by the best of its sweeps, so another sweep is only made when it is
needed.
"""
import time

from guest import Guest
from harness import FULL, IS_PEER, KIB, MIB, SLOWNESS, QmpError, TestCase, nbd_handle

LIMIT = 0.05 * SLOWNESS  # seconds until an answer
GUEST_LIMIT = 0.2 * SLOWNESS  # the longest that a guest's request may take
GUEST_SHARE = 0.3  # of its requests per second without the jobs, that a guest has at least
SWEEPS = 5
WINDOW = 0.3
SIZE = 2 * MIB
NAMES = [f"n{number}" for number in range(7)]  # from the base up

# What stands there at 1 byte per second, and what runs beside it to its end.
JOBS = {
    "commit": ([("commit", "n2", "n1")], [("commit", "n5", "n4"), ("stream", "n6", "n3")]),
    "stream": ([("stream", "n4", "n2")], [("commit", "n1", "n0"), ("commit", "n3", "n2")]),
    "active commit": ([("commit", "n6", "n4")], [("commit", "n2", "n1"), ("stream", "n3", "n1")]),
    "a ready commit": ([("commit", "n6", "n4")], [("commit", "n2", "n1"), ("stream", "n3", "n1")]),
    "all together": ([("commit", "n1", "n0"), ("stream", "n4", "n2"), ("commit", "n6", "n5")], [("commit", "n3", "n2")]),
}


class Sweep:
    """One life of a daemon; what took how long."""

    def __init__(self, test, which, io_thread):
        self.test = test
        self.slow, self.beside = JOBS[which]
        self.ready = which == "a ready commit"
        self.seconds = {}  # what -> the longest that it took
        self.answered = set()  # commands
        self.open(io_thread)

    def open(self, io_thread):
        options = ["--object", "iothread,id=io0"] if io_thread else []
        self.daemon = self.test.daemon(*options)
        self.chain = self.test.fresh_chain("n", NAMES)
        self.other = self.test.fresh_chain("o", ["o0", "o1", "o2"])
        self.daemon.add_chain(self.chain)
        self.daemon.add_chain(self.other)
        self.daemon.nbd_server()
        self.daemon.export("n6", name="guest", export_id="guest", **({"iothread": "io0"} if io_thread else {}))
        self.guest = Guest(self.daemon.uri("guest"), self.test.seed)

    def clock(self, what, seconds):
        self.seconds[what] = max(seconds, self.seconds.get(what, 0.0))

    def do(self, command, what=None, /, **arguments):
        """A command, with '_' for '-' in its arguments; any answer in time is a good one."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items() if value is not None}
        self.answered.add(command)
        start = time.monotonic()
        try:
            return self.daemon.qmp.execute(command, arguments)
        except QmpError as error:
            return error
        finally:
            self.clock(f"{command}{' ' + what if what else ''}", time.monotonic() - start)

    def must(self, command, what=None, /, **arguments):
        answer = self.do(command, what, **arguments)
        if isinstance(answer, QmpError):
            raise answer
        return answer

    def start(self, job, operation, **more):
        kind, node, other = operation
        if kind == "commit":
            top = "o2" if node.startswith("o") else "n6"
            self.must("block-commit", job_id=job, device=top, top_node=node, base_node=other, **more)
        else:
            self.must("block-stream", job_id=job, device=node, base_node=other, **more)

    def status(self, job):
        return self.daemon.qmp.jobs().get(job, {"status": "null"})["status"]

    def wait_status(self, job, *wanted):
        deadline = time.monotonic() + 10 * SLOWNESS
        while (status := self.status(job)) not in wanted:
            self.test.assertLess(time.monotonic(), deadline, f"{job} is {status}, not {wanted}")
            time.sleep(0.001)

    def until(self, what, job, wanted):
        """How long it takes until a job is there."""
        start = time.monotonic()
        self.wait_status(job, wanted)
        self.clock(what, time.monotonic() - start)

    # The parts of a sweep.

    def run(self):
        try:
            self.free = self.guest.window(WINDOW)
            for number, operation in enumerate(self.slow):
                self.start(f"slow{number}", operation, speed=0 if self.ready else 1)
            if self.ready:
                self.wait_status("slow0", "ready")
                self.must("block-job-set-speed", device="slow0", speed=1)
            self.limited = self.guest.window(WINDOW)
            self.look()
            self.talk_to_the_slow_ones()
            self.wait_behind_the_slow_ones()
            self.elsewhere()
            self.exports()
            self.bitmaps()
            self.last_steps_beside()
            self.unknown_commands()
            self.beside_all = self.guest.so_far()
            if self.ready:
                self.complete_the_ready_one()
            else:
                self.cancel_the_slow_ones()
        finally:
            self.guest.end()
        self.servers()
        self.quit()

    def look(self):
        known = [command["name"] for command in self.daemon.qmp.execute("query-commands")]
        for command in known:
            if command.startswith("query-"):
                self.must(command)

    def talk_to_the_slow_ones(self):
        for number in range(len(self.slow)):
            job = f"slow{number}"
            self.test.assertIn(self.status(job), ("running", "ready"))
            self.must("job-pause", id=job)
            self.until("a pause", job, "standby" if self.ready else "paused")
            self.must("job-resume", id=job)
            self.must("block-job-pause", device=job)
            self.must("block-job-resume", device=job)
            self.must("block-job-set-speed", device=job, speed=2)
            self.must("block-job-set-speed", device=job, speed=1)
            for command in ("job-finalize", "job-dismiss", "block-job-finalize", "block-job-dismiss"):
                self.do(command, "of a slow job", id=job)
            if not self.ready:
                self.do("job-complete", "of a slow job", id=job)
                self.do("block-job-complete", "of a slow job", device=job)

    def wait_behind_the_slow_ones(self):
        """Who has to wait is told so at once, and may give up."""
        for _, node, _ in self.slow:
            self.start("w", ("commit", node, NAMES[NAMES.index(node) - 1]), on_conflict="wait")
            self.test.assertEqual([entry["id"] for entry in self.must("query-access")["waiting"]], ["w"])
            self.must("access-cancel", id="w")
            start = time.monotonic()
            self.daemon.qmp.wait_event("ACCESS_WAIT_ENDED", id="w")
            self.clock("the end of waiting", time.monotonic() - start)

    def elsewhere(self):
        """Jobs on other images, and images that come and go."""
        self.start("s", ("stream", "o1", None), auto_finalize=False, auto_dismiss=False)
        self.wait_status("s", "pending")
        self.must("block-job-finalize", id="s")
        self.until("the last step of a stream elsewhere", "s", "concluded")
        self.must("block-job-dismiss", id="s")
        self.start("c", ("commit", "o2", "o1"), auto_finalize=False, auto_dismiss=False)
        self.wait_status("c", "ready")
        self.must("block-job-complete", device="c")
        self.wait_status("c", "pending")
        self.must("job-finalize", id="c")
        self.until("the last step of a commit elsewhere", "c", "concluded")
        self.must("job-dismiss", id="c")
        for name in ("o2", "o2-file"):
            self.must("blockdev-del", node_name=name)
        path = dict(self.other)["o2"]
        self.must("blockdev-add", driver="file", node_name="o2-file", filename=path)
        self.must("blockdev-add", driver="qcow2", node_name="o2", file="o2-file", backing="o1")
        self.must("object-add", qom_type="iothread", id="more")
        self.must("object-del", id="more")
        self.must("block_resize", node_name="o2", size=2 * SIZE)
        self.must("change-backing-file", device="o2", image_node_name="o2", backing_file=dict(self.other)["o1"])
        self.daemon.qmp.close()  # a monitor talks to one client at a time
        self.daemon.qmp = self.daemon.connect(negotiate=False)
        self.must("qmp_capabilities")

    def exports(self):
        """Exports of the chain that the slow jobs stand on."""
        for number in range(2):
            arguments = {"job-id": "q", "device": "n6", "base-node": "n0"}
            self.must("access-check", command="block-commit", arguments=arguments)
            self.do("block_resize", "of the chain", node_name="n6", size=(2 + number) * SIZE)
            self.must("block-export-add", type="nbd", id="x", node_name="n6", name="x", writable=number == 1)
            with nbd_handle(self.daemon.uri("x")) as handle:
                start = time.monotonic()
                handle.pread(4 * KIB, 0)
                self.clock("a first read", time.monotonic() - start)
            self.must("block-export-del", id="x", mode="hard")
            start = time.monotonic()
            self.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="x")
            self.clock("the end of an export", time.monotonic() - start)

    def bitmaps(self):
        """Bitmaps of the node that the guest writes to."""
        prefix = "block-dirty-bitmap-"
        for name, persistent in (("kept", True), ("temporary", False)):
            self.must(f"{prefix}add", node="n6", name=name, persistent=persistent)
        self.must(f"{prefix}merge", node="n6", target="kept", bitmaps=["temporary"])
        for verb in ("disable", "enable", "clear"):
            self.must(prefix + verb, node="n6", name="kept")
        self.must("x-debug-block-dirty-bitmap-sha256", node="n6", name="kept")
        for name in ("kept", "temporary"):
            self.must(f"{prefix}remove", node="n6", name=name)

    def last_steps_beside(self):
        """Jobs on the same chain run to their end beside the slow ones."""
        for number, operation in enumerate(self.beside):
            job = f"beside{number}"
            self.start(job, operation, auto_finalize=False)
            self.wait_status(job, "pending")
            self.must("job-finalize", id=job)
            self.until("a last step on the chain", job, "null")
        for event in self.daemon.qmp.drain_events(0.01):
            self.test.assertNotIn("error", event.get("data", {}), str(event))

    def unknown_commands(self):
        """What this sweep does not know is given without arguments."""
        later = {"job-cancel", "block-job-cancel", "nbd-server-start", "nbd-server-stop", "quit"}
        known = {command["name"] for command in self.daemon.qmp.execute("query-commands")}
        for command in sorted(known - self.answered - later):
            self.do(command)

    def cancel_the_slow_ones(self):
        for number in range(len(self.slow)):
            job = f"slow{number}"
            self.test.assertIn(self.status(job), ("running", "ready"), "what is slow is still there")
            if number % 2 == self.test.seed % 2:
                self.must("job-cancel", id=job)
            else:
                self.must("block-job-cancel", device=job)
            self.until("the end of a job that is cancelled", job, "null")

    def complete_the_ready_one(self):
        """What a guest wrote meanwhile has to be copied first, at 1 byte per second; the guest does not wait for that."""
        self.must("job-complete", id="slow0")
        rate, longest = self.guest.window(WINDOW)
        self.limited = (min(rate, self.limited[0]), max(longest, self.limited[1]))
        self.test.assertIn("slow0", self.daemon.qmp.jobs())
        self.must("block-job-set-speed", device="slow0", speed=0)
        self.wait_status("slow0", "null")

    def servers(self):
        """An NBD server that stops with its exports while jobs stand there."""
        self.start("slow", ("commit", "o2", "o1"), speed=1)
        self.must("nbd-server-stop")
        self.must("nbd-server-start", addr={"type": "unix", "data": {"path": self.daemon.nbd_path}})
        self.must("block-export-add", type="nbd", id="x", node_name="n4" if self.ready else "n6", name="x")

    def quit(self):
        """The daemon ends although a job would need years."""
        self.must("quit")
        start = time.monotonic()
        self.daemon.qmp.close()
        self.daemon.wait()
        self.clock("the daemon's end", (time.monotonic() - start) / 10)  # the limit is 10 times that of a command
        self.test.daemons.remove(self.daemon)


class Latency(TestCase):
    exclusive = True
    time_limit = 120
    builds = ("release",)
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer decides otherwise")
        self.templates = {}

    def fresh_chain(self, key, names):
        """The same images for each sweep."""
        if key not in self.templates:
            chain = self.create_chain(names, SIZE)
            contents = []
            for name, path in chain:
                with open(path, "rb") as image:
                    contents.append((name, path, image.read()))
            self.templates[key] = contents
        for _, path, content in self.templates[key]:
            with open(path, "wb") as image:
                image.write(content)
        return [(name, path) for name, path, _ in self.templates[key]]

    def test_beside_an_active_commit_to_a_slow_target(self):
        """Each request of the target takes long; nobody waits for that, not even while the commit takes its last step,
        unless a guest writes in this very moment."""
        late = {}
        for _ in range(SWEEPS):
            late = self.slow_target()
            if not late:
                return
        self.fail(f"with a slow target, in each of {SWEEPS} sweeps too slow: {late}")

    def slow_target(self):
        daemon = self.daemon()
        daemon.add_chain(self.fresh_chain("o", ["o0", "o1", "o2"]))
        latency = int(LIMIT * 6 * 1e9)
        slow = {"driver": "null-co", "node-name": "slow", "size": SIZE, "latency-ns": latency, "read-zeroes": True}
        daemon.qmp.execute("blockdev-add", slow)
        daemon.add_qcow2("top", self.fresh_chain("s", ["s0"])[0][1], "slow")
        daemon.nbd_server()
        daemon.export("top")
        late = {}

        def do(command, **arguments):
            start = time.monotonic()
            answer = daemon.qmp.execute(command, **arguments)
            if time.monotonic() - start > LIMIT:
                late[f"{command} {arguments}"] = round(time.monotonic() - start, 3)
            return answer

        def status():
            return {job["id"]: job["status"] for job in do("query-jobs")}.get("c", "null")

        do("block-commit", job_id="c", device="top", base_node="slow")
        asked, deadline = False, time.monotonic() + 60 * SLOWNESS
        while status() != "null":
            self.assertLess(time.monotonic(), deadline, f"the commit is {status()}")
            do("query-named-block-nodes")
            do("block-export-add", type="nbd", id="x", node_name="o2", name="x")
            do("block-export-del", id="x")
            daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="x")
            if status() == "ready" and not asked:
                with nbd_handle(daemon.uri("top")) as handle:
                    handle.pwrite(bytes(range(1, 65)) * 64, 0)
                do("job-complete", id="c")
                asked = True
            time.sleep(0.002)
        for event in daemon.qmp.drain_events(0.01):
            self.assertNotIn("error", event.get("data", {}), str(event))
        daemon.stop()
        self.daemons.remove(daemon)
        return late

    def sweeps(self, which, io_thread):
        best = {}
        free = limited = 0.0
        longest = beside_all = None
        for _ in range(SWEEPS):
            sweep = Sweep(self, which, io_thread)
            sweep.run()
            for what, seconds in sweep.seconds.items():
                best[what] = min(seconds, best.get(what, seconds))
            free, limited = max(free, sweep.free[0]), max(limited, sweep.limited[0])
            longest = min(sweep.limited[1], longest or sweep.limited[1])
            beside_all = min(sweep.beside_all[1], beside_all or sweep.beside_all[1])
            late = {what: round(seconds, 3) for what, seconds in best.items() if seconds > LIMIT}
            if limited < free * GUEST_SHARE:
                late["requests per second"] = f"{limited:.0f} of {free:.0f}"
            if longest > GUEST_LIMIT:
                late["a guest's request"] = round(longest, 3)
            if beside_all > GUEST_LIMIT:
                late["a guest's request while others give commands"] = round(beside_all, 3)
            if not late:
                return
        self.fail(f"with {which} at 1 byte per second, in each of {SWEEPS} sweeps too slow: {late}")

    def both(self, which):
        for io_thread in (False, True) if FULL else (self.random.random() < 0.5,):
            with self.subTest(io_thread=io_thread):
                self.sweeps(which, io_thread)

    def test_beside_a_commit(self):
        self.both("commit")

    def test_beside_a_stream(self):
        self.both("stream")

    def test_beside_an_active_commit(self):
        self.both("active commit")

    def test_beside_a_commit_that_is_ready(self):
        self.both("a ready commit")

    def test_beside_all_together(self):
        self.both("all together")
