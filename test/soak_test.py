# SPDX-License-Identifier: LGPL-2.1-or-later
"""One daemon, for half an hour (in a check: for seconds), under everything at once.

Two clients write and verify their regions all the time; they go away, cleanly or torn off, their exports are taken
from under them, and they come back. Beside them come neighbours that send garbage, or nothing, or leave in the middle.
Rounds of jobs, growth, renames and readers (rounds_test.py) shorten the chain; snapshots, taken live, make it longer;
now and then all of it moves to a new image, or is backed up. At the end every byte is read again, by the clients from
the export and by the peer at rest, and the daemon has neither more memory nor more descriptors than it had.
"""
import contextlib
import os
import socket
import time

from harness import MIB, qemu_img, scale
from rounds_test import Round, RoundsCase

SECONDS = scale(10, 1800)
GROWTH = scale(24, 6) * MIB  # of resident memory, from the second quarter to the last
HELLO = b"NBDMAGIC" b"IHAVEOPT"


class Soak(RoundsCase):
    time_limit = 120
    builds = ("release",)
    long_builds = ("release",)

    def memory(self):
        with open(f"/proc/{self.main.pid}/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmRSS"].split()[0]) * 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.main.pid}/fd"))

    # ---- clients and neighbours

    def view(self, number):
        name = f"view{number}"
        self.main.export(self.names[-1], name=name, export_id=name, iothread=f"io{number}")

    def start_client(self, number):
        options = ["--depth", str(self.random.choice([4, 16, 32])), "--max-blocks", str(self.random.choice([1, 8, 40]))]
        self.clients[number] = self.regions[number].start(self.main.nbd_path, f"view{number}", *options)

    def eject(self):
        """An export goes while its client is at work; the client sees its connection end, nothing else."""
        number = self.random.randrange(2)
        self.main.qmp.execute("block-export-del", {"id": f"view{number}", "mode": "hard"})
        self.main.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"view{number}")
        self.assertNotEqual(self.clients[number].process.wait(30), 0)
        self.view(number)
        self.regions[number].settle(self.main.nbd_path, f"view{number}")
        self.start_client(number)

    def visit(self):
        """Somebody who does not keep to the protocol. Some stay until the next visit."""
        while len(self.visitors) > 20 or (self.visitors and self.random.random() < 0.5):
            self.visitors.pop(0).close()
        visitor = socket.socket(socket.AF_UNIX)
        self.visitors.append(visitor)
        visitor.settimeout(10)
        visitor.connect(self.main.nbd_path)
        kind = self.random.randrange(5)
        with contextlib.suppress(ConnectionError):
            if kind == 0:
                visitor.sendall(self.random.randbytes(self.random.randrange(1, 4000)))
            elif kind >= 2:
                self.assertEqual(visitor.recv(18)[:16], HELLO)
                visitor.sendall(b"\0\0\0\3")
            if kind == 3:  # an option that ends in the middle
                visitor.sendall(b"IHAVEOPT\0\0\0\7\0\0\1\0abc")
            elif kind == 4:  # into the transmission phase, and a header too short
                visitor.sendall(b"IHAVEOPT\0\0\0\1\0\0\0\5view0")
                visitor.recv(10)
                visitor.sendall(b"\x25\x60\x95\x13\0\0\0\0")

    # ---- the chain

    def settle_chain(self, names, round_):
        """What the chain is now; nodes and files of images that are no more in it go."""
        self.names = self.live_chain(self.main, names, round_)
        nodes = {info["node-name"] for info in self.main.qmp.execute("query-named-block-nodes", {"flat": True})}
        for name in nodes:
            if name.endswith("-file") and name.removesuffix("-file") not in nodes:
                self.main.qmp.execute("blockdev-del", node_name=name)
        for name in set(self.paths) - set(self.names):
            os.unlink(self.paths.pop(name))

    def fresh_name(self, letter):
        self.serial += 1
        name = f"{letter}{self.serial}"
        self.paths[name] = self.path(f"{name}.qcow2")
        return name

    def snapshot(self):
        name = self.fresh_name("s")
        arguments = {"node-name": self.names[-1], "snapshot-file": self.paths[name], "snapshot-node-name": name,
                     "format": "qcow2"}
        self.main.qmp.execute("blockdev-snapshot-sync", arguments)
        self.names.append(name)

    def copy(self, command, **more):
        """A job that copies all of the disk to a new image; its name, once the job is ready or over."""
        name = self.fresh_name("c")
        nodes = {info["node-name"]: info for info in self.main.qmp.execute("query-named-block-nodes", {"flat": True})}
        size = nodes[self.names[-1]]["image"]["virtual-size"]
        qemu_img("create", "-q", "-f", "qcow2", self.paths[name], str(size))
        self.main.add_qcow2(name, self.paths[name], discard="unmap")
        arguments = {"job-id": name, "device": self.names[-1], "target": name, "sync": "full", **more}
        self.main.qmp.execute(command, arguments)
        return name

    def move(self):
        """All of the disk becomes one image, and the clients go over to it."""
        name = self.copy("blockdev-mirror", **{"switch-after": 2})
        deadline = time.monotonic() + 60
        while (state := self.main.qmp.jobs()[name]["status"]) != "ready":
            self.assertLess(time.monotonic(), deadline, f"the mirror is {state}")
            time.sleep(0.01)
        self.main.qmp.execute("job-complete", id=name)
        self.assertIsNone(self.main.qmp.wait_job(name))
        self.settle_chain([*self.names, name], Round(self, self.main, self.names, self.paths, False))
        self.assertEqual(self.names, [name])

    def back_up(self):
        name = self.copy("blockdev-backup")
        self.assertIsNone(self.main.qmp.wait_job(name))
        self.settle_chain([*self.names, name], Round(self, self.main, self.names, self.paths, False))

    # ---- all of it

    def one_turn(self):
        """One of many things; then everybody has got on."""
        what = self.random.choices(["round", "move", "back up", "eject"], [10, 1, 1, 2])[0]
        self.visit()
        if what == "round":
            while len(self.names) < 3 or (len(self.names) < 6 and self.random.random() < 0.4):
                self.snapshot()
            rest = self.one_round(self.main, self.names, self.regions, self.clients, self.paths, self.random.random() < 0.5)
            self.settle_chain(rest, Round(self, self.main, rest, self.paths, False))
        else:
            {"move": self.move, "back up": self.back_up, "eject": self.eject}[what]()
        for client in self.clients:
            client.wait_progress(20)

    def check_memory(self, samples, began):
        def most(first, last):
            return max(memory for when, memory in samples if first <= (when - began) / SECONDS <= last)

        self.assertLess(most(0.75, 9), most(0.25, 0.5) + GROWTH, [memory // MIB for _, memory in samples])

    def end(self, idle):
        for client in self.clients:
            client.stop()
        for number, region in enumerate(self.regions):
            region.verify(self.main.nbd_path, f"view{number}", "--structured")
            self.main.qmp.execute("block-export-del", {"id": f"view{number}", "mode": "hard"})
            self.main.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"view{number}")
        for visitor in self.visitors:
            visitor.close()
        self.main.qmp.execute("nbd-server-stop")
        for name in reversed(self.names):
            self.main.qmp.execute("blockdev-del", node_name=name)
        for info in self.main.qmp.execute("query-named-block-nodes", {"flat": True}):
            self.main.qmp.execute("blockdev-del", node_name=info["node-name"])
        self.assertEqual(self.descriptors(), idle)
        self.main.stop()
        self.check_at_rest([(name, self.paths[name]) for name in self.names], self.regions)

    def test_everything_at_once_for_long(self):
        chain, self.regions = self.create_disk(4)
        self.paths, self.names = dict(chain), [name for name, _ in chain]
        self.main = self.daemon("--object", "iothread,id=io0", "--object", "iothread,id=io1")
        idle = self.descriptors()
        self.main.add_chain(chain, discard="unmap")
        self.main.nbd_server()
        self.visitors, self.clients = [], [None, None]
        for number in range(2):
            self.view(number)
            self.start_client(number)
        began, samples = time.monotonic(), []
        while time.monotonic() - began < SECONDS:
            self.one_turn()
            samples.append((time.monotonic(), self.memory()))
        self.check_memory(samples, began)
        self.end(idle)
