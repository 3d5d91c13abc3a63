# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random rounds of jobs on a chain of images while clients write and verify at full speed.

An epoch is the life of one daemon on one chain of 3 to 6 images. In it, rounds: each starts one or two jobs and does
to them and to the clients what an administrator, or an accident, might. The clients' ledgers outlive the epochs, so a
byte lost in any round is found at the latest when the epoch ends and everything is read again, from the export and,
at rest, by the peer's tools.

Rounds of many things have up to five operations at once on six images: besides jobs, images that grow, names in headers
that are rewritten, and read-only exports anywhere in the chain. What such an export of an image below the top shows
does not change for as long as it is there, whatever the others do.
"""
import contextlib
import hashlib
import json
import os
import time

from harness import FULL, IS_PEER, KIB, MIB, SANITIZED, SLOWNESS, QmpError, TestCase, image_check, nbd_handle, qemu_img, qemu_io
from verifying import Region

SIZE = 24 * MIB
CLIENT_SIZE = 6 * MIB  # of each of the two regions, which lie apart
LARGEST = SIZE + 8 * MIB  # images grow to this at most


class Round:
    """The jobs of one round, what has been done to them, and what may come of it."""

    def __init__(self, test, daemon, chain, paths, many):
        self.test = test
        self.random = test.random
        self.qmp = daemon.qmp
        self.daemon = daemon
        self.chain = chain  # node names from the base up, as last known
        self.log = []
        self.jobs = {}  # id -> kind
        self.gone = []  # nodes deleted or cut after a job had left them
        self.paths = paths
        self.speeds = [0, 64 * KIB, 64 * KIB, 256 * KIB] if many else [0, 0, 256 * KIB, 2 * MIB, 8 * MIB]
        self.shown = {}  # read-only exports and what they show
        self.admitted = 0

    def note(self, text):
        self.log.append(text)

    def start_job(self):
        """Starts a random job; a refusal is a fine answer when another job is there."""
        job = f"job{len(self.jobs)}-{self.random.randrange(10000)}"
        arguments = {"job-id": job, "speed": self.random.choice(self.speeds)}
        if self.random.random() < 0.5:
            kind = self.plan_commit(arguments)
        else:
            kind = self.plan_stream(arguments)
        self.note(f"{kind} {arguments}")
        try:
            self.qmp.execute("block-commit" if "commit" in kind else "block-stream", arguments)
        except QmpError as refusal:
            self.note(f"refused: {refusal.desc}")
            if not self.jobs and not self.shown and not IS_PEER:
                raise
            return None
        self.jobs[job] = kind
        return job

    def start_anything(self):
        """One of many: a job mostly."""
        start = self.random.choices([self.start_job, self.start_export, self.resize, self.rename_backing], [6, 3, 2, 1])[0]
        self.admitted += 1 if start() else 0

    def start_export(self):
        """A client that only reads, of any image. It is no client of the network disk, which others write."""
        node = self.random.choice(self.chain)
        export = f"reader{len(self.shown)}"
        self.note(f"{export} of {node}")
        try:
            self.daemon.export(node, writable=False, name=export, export_id=export)
        except QmpError as refusal:
            self.check_refusal(refusal)
            return None
        self.shown[export] = self.read_export(export) if node != self.chain[-1] else None
        return export

    def read_export(self, export):
        """A digest of what it shows. It may grow."""
        with nbd_handle(self.daemon.uri(export)) as handle:
            digest = hashlib.sha256()
            for offset in range(0, SIZE, 8 * MIB):
                digest.update(handle.pread(8 * MIB, offset))
            return digest.digest()

    def end_exports(self):
        for export, shown in self.shown.items():
            if shown:
                self.test.assertEqual(self.read_export(export), shown, f"what {export} shows has changed: {self.log}")
            self.qmp.execute("block-export-del", {"id": export, "mode": "hard"})
            self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=export)

    def resize(self):
        """An image may grow where no job has its eyes on its size. It never gets shorter below an overlay or a client."""
        node = self.random.choice(self.chain)
        nodes = {info["node-name"]: info for info in self.qmp.execute("query-named-block-nodes", {"flat": True})}
        size = nodes[node]["image"]["virtual-size"]
        wanted = min(LARGEST, size + self.random.randrange(1, 17) * 64 * KIB)
        if self.random.random() < 0.2 or wanted <= size:
            self.shrink(node, size - 64 * KIB)
            return None
        self.note(f"grow {node} from {size} to {wanted}")
        try:
            self.qmp.execute("block_resize", {"node-name": node, "size": wanted})
        except QmpError as refusal:
            self.check_refusal(refusal)
            return None
        return node

    def shrink(self, node, size):
        """Refused, unless a job has left the node to nobody; then it is no more in the chain."""
        self.note(f"shrink {node}")
        try:
            self.qmp.execute("block_resize", {"node-name": node, "size": size})
        except QmpError as refusal:
            self.check_refusal(refusal)
            return
        self.note(f"{node} is shorter")
        self.gone.append(node)

    def rename_backing(self):
        """The header of an image calls the image below by another of its names."""
        place = self.random.randrange(1, len(self.chain))
        node, below = self.chain[place], self.paths[self.chain[place - 1]]
        name = self.random.choice([below, os.path.basename(below), f"./{os.path.basename(below)}"])
        self.note(f"{node} calls its backing file {name}")
        try:
            arguments = {"device": self.chain[-1], "image-node-name": node, "backing-file": name}
            self.qmp.execute("change-backing-file", arguments)
        except QmpError as refusal:
            self.note(f"refused: {refusal.desc}")  # by a job, or because the image leans on another by now
            return None
        return node

    def check_refusal(self, refusal):
        """It says who is in the way."""
        self.note(f"refused: {refusal.desc}")
        self.test.assertTrue(refusal.data and refusal.data["conflicts"], refusal.desc)

    def plan_commit(self, arguments):
        top = self.random.randrange(1, len(self.chain))
        base = self.random.randrange(0, top)
        arguments.update({"device": self.chain[-1], "top-node": self.chain[top], "base-node": self.chain[base]})
        return "active commit" if top == len(self.chain) - 1 else "commit"

    def plan_stream(self, arguments):
        node = self.random.randrange(1, len(self.chain))
        arguments["device"] = self.chain[node]
        below = self.random.randrange(-1, node)
        if below >= 0 and self.random.random() < 0.3 and below + 1 < node:
            arguments["bottom"] = self.chain[below + 1]
        elif below >= 0:
            arguments["base-node"] = self.chain[below]
        return "stream"

    def job_state(self, job):
        return self.qmp.jobs().get(job, {}).get("status", "null")

    def disturb(self, job):
        """One random thing, as somebody with a hand on the keyboard would do it; the job may be over by now."""
        action = self.random.choice(["pause", "speed", "speed", "delete", "look", "wait", "cancel", "force-cancel"])
        self.note(f"{action} {job}")
        with contextlib.suppress(QmpError):
            if action == "pause":
                self.qmp.execute("job-pause", id=job)
                time.sleep(self.random.random() * 0.1)
                self.qmp.execute("job-resume", id=job)
            elif action == "speed":
                speed = self.random.choice([0, 64 * KIB, 4 * MIB])
                self.qmp.execute("block-job-set-speed", device=job, speed=speed)
            elif action == "delete":
                self.delete_a_node_in_use()
            elif action == "look":
                for command in ("query-block-jobs", "query-jobs", "query-named-block-nodes", "query-block-exports"):
                    self.qmp.execute(command)
            elif action == "wait":
                time.sleep(self.random.random() * 0.2)
            elif self.random.random() < 0.5:
                self.cancel(job, action == "force-cancel")

    def delete_a_node_in_use(self):
        """Refused, unless a job has ended just now and left the node to nobody; then it is no more in the chain."""
        node = self.random.choice(self.chain)
        try:
            self.qmp.execute("blockdev-del", node_name=node)
        except QmpError as refusal:
            self.test.assertIn(node, refusal.desc)
            return
        self.note(f"{node} is gone")
        self.gone.append(node)

    def cancel(self, job, force):
        if force or self.random.random() < 0.5:
            self.qmp.execute("block-job-cancel", {"device": job, "force": force})
        else:
            self.qmp.execute("job-cancel", id=job)

    def bring_to_an_end(self):
        """Every job runs to its end, at once and at full speed; an active commit is completed or left."""
        for job, kind in self.jobs.items():
            with contextlib.suppress(QmpError):
                self.qmp.execute("block-job-set-speed", device=job, speed=0)
        for job, kind in self.jobs.items():
            if kind == "active commit":
                self.end_active_commit(job)
        for job in self.jobs:
            deadline = time.monotonic() + 60 * SLOWNESS
            while (state := self.job_state(job)) != "null":
                self.test.assertLess(time.monotonic(), deadline, f"{job} is still {state}: {self.log}")
                time.sleep(0.01)

    def end_active_commit(self, job):
        deadline = time.monotonic() + 60 * SLOWNESS
        while (state := self.job_state(job)) not in ("ready", "null"):
            self.test.assertLess(time.monotonic(), deadline, f"{job} never gets ready but is {state}: {self.log}")
            time.sleep(0.01)
        if state == "null":
            return
        how = self.random.choices(["job-complete", "block-job-complete", "cancel", "force"], [5, 3, 2, 1])[0]
        self.note(f"{how} {job}")
        with contextlib.suppress(QmpError):
            if how == "job-complete":
                self.qmp.execute(how, id=job)
            elif how == "block-job-complete":
                self.qmp.execute(how, device=job)
            else:
                self.qmp.execute("block-job-cancel", {"device": job, "force": how == "force"})

    def check_events(self):
        """What the jobs said: no error but for a cancellation."""
        for event in self.qmp.drain_events(0.02):
            data = event.get("data", {})
            if event["event"] in ("BLOCK_JOB_ERROR", "BLOCK_IMAGE_CORRUPTED"):
                raise AssertionError(f"{event}: {self.log}")
            if event["event"] == "BLOCK_JOB_COMPLETED" and "error" in data:
                raise AssertionError(f"{event}: {self.log}")


class RoundsCase(TestCase):
    """What rounds are played with."""

    def start_daemon(self, chain, io_threads):
        options = []
        for number in range(io_threads):
            options += ["--object", f"iothread,id=io{number}"]
        daemon = self.daemon(*options)
        daemon.add_chain(chain, discard="unmap")
        daemon.nbd_server()
        top = chain[-1][0]
        for number in range(2):
            more = {"iothread": f"io{number % io_threads}"} if io_threads else {}
            if IS_PEER:
                more = {"iothread": "io0"} if io_threads else {}
            daemon.export(top, name=f"view{number}", export_id=f"view{number}", **more)
        return daemon

    def start_clients(self, daemon, regions):
        clients = []
        for number, region in enumerate(regions):
            options = ["--depth", str(self.random.choice([4, 16, 32])), "--max-blocks", str(self.random.choice([1, 8, 40]))]
            if self.random.random() < 0.5:
                options.append("--structured")
            clients.append(region.start(daemon.nbd_path, f"view{number}", *options))
        return clients

    def disturb_clients(self, daemon, regions, clients):
        """One client goes away, cleanly or torn off, and another comes."""
        number = self.random.randrange(len(clients))
        if self.random.random() < 0.5:
            clients[number].stop()
        else:
            clients[number].kill()
            # What it had sent may still be done: wait until the export has let go of it, then settle what is uncertain.
            time.sleep(0.3 * SLOWNESS)
            regions[number].settle(daemon.nbd_path, f"view{number}")
        clients[number] = regions[number].start(daemon.nbd_path, f"view{number}")

    def live_chain(self, daemon, names, round_):
        """Node names from the base up, as the daemon says it is now. Nodes that have dropped out are deleted, for an
        open image leans on those below it."""
        exports = {info["id"]: info["node-name"] for info in daemon.qmp.execute("query-block-exports")}
        self.assertEqual(exports["view0"], exports["view1"])
        nodes = {info["node-name"]: info for info in daemon.qmp.execute("query-named-block-nodes", {"flat": True})}
        by_file = {nodes[name]["file"]: name for name in names if name in nodes}
        chain = [exports["view0"]]
        self.assertIn(chain[0], by_file.values(), f"where the export is although no job runs: {round_.log}")
        while "backing_file" in nodes[chain[-1]]:
            chain.append(by_file[nodes[chain[-1]]["backing_file"]])
        for name in reversed(names):
            if name not in chain and name in nodes:
                daemon.qmp.execute("blockdev-del", node_name=name)
        for name in round_.gone:
            self.assertNotIn(name, chain, f"a node in use was deleted: {round_.log}")
        return chain[::-1]

    def epoch(self, chain, regions, rounds, io_threads, many):
        """One daemon's life; the chain that is left."""
        paths = dict(chain)
        daemon = self.start_daemon(chain, io_threads)
        clients = self.start_clients(daemon, regions)
        names = [name for name, _ in chain]
        done = 0
        while done < rounds and len(names) > 1:
            for client in clients:
                client.wait_progress(20)
            names = self.one_round(daemon, names, regions, clients, paths, many)
            done += 1
        for client in clients:
            client.stop()
        for number, region in enumerate(regions):
            region.verify(daemon.nbd_path, f"view{number}", "--structured")
        daemon.stop()
        self.daemons.remove(daemon)
        left = [(name, paths[name]) for name in names]
        self.check_at_rest(left, regions)
        return left, done

    def one_round(self, daemon, names, regions, clients, paths, many):
        round_ = Round(self, daemon, names, paths, many)
        if many:
            for _ in range(12):
                if round_.admitted < 5:
                    round_.start_anything()
        else:
            round_.start_job()
            if not IS_PEER and self.random.random() < 0.5:
                round_.start_job()
        for _ in range(self.random.randrange(0, 5)):
            if round_.jobs:
                round_.disturb(self.random.choice(list(round_.jobs)))
        if self.random.random() < 0.3:
            self.disturb_clients(daemon, regions, clients)
        round_.bring_to_an_end()
        round_.end_exports()
        round_.check_events()
        for client in clients:
            try:
                client.check_running()
            except AssertionError as problem:
                raise AssertionError(f"{problem}\nafter {round_.log}") from None
        return self.live_chain(daemon, names, round_)

    def check_at_rest(self, chain, regions):
        """The images hold what the clients know, each is clean, and the strings on disk say what the graph was."""
        for _, path in chain:
            image_check(path)
        infos = json.loads(qemu_img("info", "--output=json", "--backing-chain", "-f", "qcow2", chain[-1][1]))
        on_disk = [os.path.basename(info["filename"]) for info in infos]
        self.assertEqual(on_disk, [os.path.basename(path) for _, path in reversed(chain)], "the chain on disk")
        raw = self.path("rest.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", chain[-1][1], raw)
        for region in regions:
            region.verify_file(raw)
        with open(raw, "rb") as content, open(self.path("original.raw"), "rb") as original:
            for start in (CLIENT_SIZE, 3 * CLIENT_SIZE):  # where no client writes
                content.seek(start)
                original.seek(start)
                self.assertEqual(content.read(CLIENT_SIZE), original.read(CLIENT_SIZE), "data that nobody wrote")
        os.unlink(raw)

    def regrow(self, chain, count):
        """New overlays on what is left."""
        while len(chain) < count:
            name = f"n{self.serial}"
            self.serial += 1
            path = self.create_image(f"{name}.qcow2", None, backing=chain[-1][1])
            chain.append((name, path))
        return chain

    def create_disk(self, length):
        """A chain, and the regions of the clients' ledgers."""
        self.serial = 6
        chain = self.create_chain([f"n{i}" for i in range(length)], SIZE)
        for position, (_, path) in enumerate(chain):
            qemu_io(path, *(f"write -q -P {40 + position} {self.random.randrange(0, SIZE // MIB)}M 700k" for _ in range(3)))
        original = self.path("original.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", chain[-1][1], original)
        regions = [
            Region(self.directory, f"view{n}", self.seed + n, 2 * n * CLIENT_SIZE, CLIENT_SIZE, original=original,
                   block=self.random.choice([512, 4096, 4096]))
            for n in range(2)
        ]
        return chain, regions


class Rounds(RoundsCase):
    time_limit = 150
    # Not tsan: there two writing clients outrun an active commit for minutes; it has no bounded way to ready yet.
    builds = ("release", "asan")
    long_builds = ("release", "asan", "tsan")

    def run_rounds(self, total, io_threads, many=False):
        chain, regions = self.create_disk(6 if many else self.random.randrange(3, 7))
        done = 0
        while done < total:
            chain, rounds = self.epoch(chain, regions, min(6, total - done), io_threads, many)
            done += rounds
            chain = self.regrow(chain, 6 if many else self.random.randrange(3, 7))

    def rounds(self, full):
        return full if FULL else 10 if SANITIZED else 24

    def test_clients_never_see_a_wrong_byte(self):
        self.run_rounds(self.rounds(200), 0)

    def test_with_two_io_threads(self):
        self.run_rounds(self.rounds(200) // 2, 2)

    def test_many_things_at_once(self):
        if IS_PEER:
            self.skipTest("the peer decides otherwise")
        self.run_rounds(self.rounds(300) // 2, 2, many=True)


class FirstWrites(TestCase):
    """A copy-up and the first write to the same cluster meet: the write must win, whatever the order."""

    time_limit = 90
    builds = ("release",)
    long_builds = ("release", "asan", "tsan")
    SIZE = 48 * MIB

    def race(self, start_job, *options):
        base = self.create_image("base.qcow2", self.SIZE, *options)
        qemu_io(base, f"write -q -P 200 0 {self.SIZE}")
        for attempt in range(40 if FULL else 3 if SANITIZED else 8):
            top = self.create_image(f"top{attempt}.qcow2", None, *options, backing=base)
            original = self.path("original.raw")
            qemu_img("convert", "-f", "qcow2", "-O", "raw", top, original)
            daemon = self.daemon("--object", "iothread,id=io0")
            daemon.add_chain([("base", base), ("top", top)], discard="unmap")
            daemon.nbd_server()
            daemon.export("top", iothread="io0")
            region = Region(self.directory, f"r{attempt}", self.seed + attempt, 0, self.SIZE, 512, original)
            client = region.start(daemon.nbd_path, "top", "--reads", "5", "--depth", "32", "--max-blocks", "4")
            client.wait_progress(1)
            start_job(daemon)
            client.stop()
            region.verify(daemon.nbd_path, "top")
            daemon.stop()
            self.daemons.remove(daemon)
            image_check(top)
            qemu_img("convert", "-f", "qcow2", "-O", "raw", top, original)
            region.verify_file(original)

    def stream(self, daemon):
        daemon.qmp.execute("block-stream", {"job-id": "up", "device": "top"})
        self.assertIsNone(daemon.qmp.wait_job("up"))

    def test_a_stream_never_overwrites_a_first_write(self):
        self.race(self.stream)

    def test_a_stream_never_overwrites_a_first_write_in_small_clusters(self):
        self.race(self.stream, "cluster_size=4096")

    def test_a_stream_that_follows_a_cancelled_one_does_not_either(self):
        """What the first has copied is there for the second to find, between trims and zeroes of the client."""

        def twice(daemon):
            daemon.qmp.execute("block-stream", {"job-id": "up", "device": "top", "speed": 64 * MIB})
            time.sleep(0.1)
            with contextlib.suppress(QmpError):
                daemon.qmp.execute("block-job-cancel", device="up")
            daemon.qmp.wait_job("up")
            self.stream(daemon)

        self.race(twice, "cluster_size=16384")
