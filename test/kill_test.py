# SPDX-License-Identifier: LGPL-2.1-or-later
"""kill -9 under load: what was flushed is there afterwards, and no image is worse than leaky."""
import contextlib
import json
import os
import time

from harness import FULL, KIB, MIB, QmpError, SANITIZED, TestCase, image_check, qemu_img
from verifying import Region

SIZE = 24 * MIB
REGION = 8 * MIB


class Kill(TestCase):
    time_limit = 120
    builds = ("release",)
    long_builds = ("release", "asan")

    def start(self, chain):
        daemon = self.daemon()
        daemon.add_chain(chain, discard="unmap")
        daemon.nbd_server()
        for number in range(2):
            daemon.export(chain[-1][0], name=f"view{number}", export_id=f"view{number}")
        return daemon

    def start_a_job(self, daemon, chain):
        """Half of the times a job is cut down as well."""
        names = [name for name, _ in chain]
        speed = self.random.choice([0, 512 * KIB, 4 * MIB])
        choice = self.random.randrange(6)
        with contextlib.suppress(QmpError):
            if choice == 0:
                daemon.qmp.execute("block-stream", job_id="job", device=names[-1], speed=speed)
            elif choice == 1:
                daemon.qmp.execute("block-stream", job_id="job", device=names[1], speed=speed)
            elif choice == 2:
                daemon.qmp.execute("block-commit", job_id="job", device=names[-1], top_node=names[1], speed=speed)
            return choice
        return None

    def image_on_disk(self, chain):
        """The chain as the images themselves name it: a job may have been done just before the kill."""
        paths = {path: name for name, path in chain}
        left = [chain[-1][1]]
        while True:
            below = self.backing_of(left[-1])
            if not below:
                return [(paths[path], path) for path in reversed(left)]
            left.append(below)

    def backing_of(self, path):
        info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
        return info.get("full-backing-filename") or info.get("backing-filename")

    def one_life(self, chain, regions, note):
        daemon = self.start(chain)
        for number, region in enumerate(regions):
            if os.path.exists(region.ledger):
                region.settle(daemon.nbd_path, f"view{number}", "--crash")
        clients = [
            region.start(daemon.nbd_path, f"view{number}", "--flush-every", str(self.random.choice([10, 50, 300])))
            for number, region in enumerate(regions)
        ]
        for client in clients:
            client.wait_progress(1)
        job = self.start_a_job(daemon, chain)
        time.sleep(self.random.random() * 0.6)
        daemon.kill()
        self.daemons.remove(daemon)
        for client in clients:
            client.wait(status=2)
        chain = self.image_on_disk(chain)
        for _, path in chain:
            image_check(path, leaks_allowed=True)
        raw = self.path("rest.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", chain[-1][1], raw)
        for region in regions:
            try:
                region.verify_file(raw, "--crash")
            except AssertionError as problem:
                raise AssertionError(f"{note}, job {job}: {problem}") from None
        os.unlink(raw)
        return chain

    def lives(self, count, *options):
        chain = self.create_chain(["base", "middle", "top"], SIZE, *options)
        original = self.path("original.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", chain[-1][1], original)
        regions = [
            Region(self.directory, f"view{n}", self.seed + n, n * 2 * REGION, REGION, original=original, block=block)
            for n, block in enumerate((4096, 512))
        ]
        serial = 0
        for life in range(count):
            chain = self.one_life(chain, regions, f"life {life}")
            while len(chain) < 3:
                serial += 1
                path = self.create_image(f"more{serial}.qcow2", None, *options, backing=chain[-1][1])
                chain.append((f"more{serial}", path))

    def count(self, full):
        return full if FULL else 3 if SANITIZED else 6

    def test_flushed_bytes_survive(self):
        self.lives(self.count(60))

    def test_flushed_bytes_survive_with_small_clusters(self):
        self.lives(self.count(40), "cluster_size=512")

    def test_flushed_bytes_survive_with_one_bit_refcounts(self):
        self.lives(self.count(20) // 2, "refcount_bits=1,cluster_size=4096")

    def test_flushed_bytes_survive_in_a_version_2_image(self):
        self.lives(self.count(20) // 2, "compat=0.10")
