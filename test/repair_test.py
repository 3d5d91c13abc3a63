# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check and repair of damaged qcow2 images beside the peer: the same numbers, and never less left to read."""
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess

import damage
import hostile
from harness import BUILD, MIB, PROGRAM, SLOWNESS, TestCase, qemu_img, run, scale

REPAIR = os.path.join(BUILD, "test", "repair")
PIECE = 4096
NUMBERS = (
    "check-errors corruptions leaks image-end-offset total-clusters allocated-clusters fragmented-clusters "
    "compressed-clusters"
).split()


class Repair(TestCase):
    time_limit = 90
    builds = ("release", "asan")

    def ours(self, fix, path):
        """The members of the check's result, or why there is none. Bounded in memory, when that can be told."""

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (512 * MIB, 512 * MIB))

        more = {} if SLOWNESS > 1 else {"preexec_fn": limit}
        result = run(REPAIR, "check", fix, path, check=False, timeout=30 * SLOWNESS, errors="replace", **more)
        self.assertIn(result.returncode, (0, 1), f"{path}: {result.stdout}{result.stderr}")
        return json.loads(result.stdout) if result.returncode == 0 else result.stderr.strip()

    def peers(self, path, *options):
        try:
            line = ["qemu-img", "check", "--output=json", "-f", "qcow2", *options, path]
            result = run(*line, check=False, timeout=20, errors="replace")
        except subprocess.TimeoutExpired:
            return "no end"
        start = result.stdout.find("{")
        try:
            return json.loads(result.stdout[start:])
        except ValueError:
            return result.stderr.strip() or "no answer"

    def is_clean(self, result):
        return isinstance(result, dict) and not any(result.get(name) for name in NUMBERS[:3])

    def read_by_peer(self, path):
        """The content, a piece at a time; None: what cannot be read, or all of it if it cannot be opened."""
        raw = path + ".raw"
        line = ["qemu-img", "convert", "--salvage", "-f", "qcow2", "-O", "raw", path, raw]
        try:
            result = run(*line, check=False, timeout=20, errors="replace")
        except subprocess.TimeoutExpired:
            os.unlink(raw)
            return None
        if result.returncode != 0:
            return None
        with open(raw, "rb") as file:
            content = file.read()
        os.unlink(raw)
        unreadable = {int(at) // PIECE for at in re.findall(r"error while reading .*?offset (\d+)", result.stderr)}
        pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
        return [None if number in unreadable else piece for number, piece in enumerate(pieces)]

    def read_by_us(self, path):
        result = run(REPAIR, "read", path, check=False, timeout=30 * SLOWNESS)
        return result.stdout.split() if result.returncode == 0 else None

    def kept(self, original, now):
        return sum(a == b and b is not None for a, b in zip(original, now)) if now is not None else 0

    def bases(self, count):
        """Seeded images and how they read, made as they are needed and used several times."""
        for number in range(count):
            seed = self.random.randrange(1 << 32)
            path = damage.make(self.directory, number, random.Random(seed))
            yield f"base {seed}", path, self.read_by_peer(path), self.read_by_us(path)

    def numbers(self, result):
        return {name: result.get(name) for name in NUMBERS} if isinstance(result, dict) else result

    def test_the_numbers_of_good_images_are_the_peers(self):
        for seed, path, _, _ in self.bases(scale(4, 100)):
            self.assertEqual(self.numbers(self.ours("none", path)), self.numbers(self.peers(path)), seed)

    def test_the_numbers_of_damaged_images_are_the_peers(self):
        kinds = [(1, damage.damage_refcounts), (1, self.swap_places), (1, self.flip_flags), (1, self.beyond)]
        for seed, path, _, _ in self.bases(scale(4, 30)):
            for _ in range(scale(4, 10)):
                image = damage.Image(path)
                done = damage.damage(image, self.random, kinds)
                image.write(path + ".bad")
                ours, peers = self.ours("none", path + ".bad"), self.peers(path + ".bad")
                self.assertEqual(self.numbers(ours), self.numbers(peers), f"{seed}: {done}")

    def swap_places(self, image, chance):
        entries = image.l2_entries()
        image.store(chance.choice(entries), image.load(chance.choice(entries)))

    def flip_flags(self, image, chance):
        at = chance.choice(image.l2_entries(active_only=True) + image.l1_entries())
        if not image.load(at) & 1 << 62:
            image.store(at, image.load(at) ^ 1 << 63)

    def beyond(self, image, chance):
        image.store(chance.choice(image.l2_entries()), 1 << 63 | 1 << chance.randrange(30, 50))

    def test_no_snapshots_at_an_impossible_place_are_repaired(self):
        path = self.path("place.qcow2")
        qemu_img("create", "-f", "qcow2", path, "1M")
        for place in (1000, 1 << 63):
            image = damage.Image(path)
            image.store(64, place)  # snapshots_offset
            image.write(path + ".bad")
            self.assertFalse(self.is_clean(self.ours("none", path + ".bad")))
            self.ours("all", path + ".bad")
            self.assertTrue(self.is_clean(self.ours("none", path + ".bad")))
            self.assertTrue(self.is_clean(self.peers(path + ".bad")))

    def tiny_clusters(self, name, length, more=None, **fields):
        """An image with clusters of 512 bytes and one full refcount block, in a file with nothing in it from there on."""
        image = bytearray(hostile.qcow2_bytes(**{"cluster_bits": 9, "size": 1 << 15, "table_offset": 512,
                                                 "l1_offset": 3 * 512, **fields})[:2048])
        image[512:2048] = struct.pack(">Q", 1024) + bytes(504) + b"\xff" * 512 + bytes(512)
        path = self.path(name)
        with open(path, "wb") as file:
            file.write(image)
            for offset, data in (more or {}).items():
                file.seek(offset)
                file.write(data)
            file.truncate(length)
        return path

    def test_a_long_file_with_little_in_it_takes_little_time(self):
        for command in (["check", "-r", "all"], ["check", "-r", "leaks"], ["amend", "-o", "refcount_bits=1"]):
            path = self.tiny_clusters("long.qcow2", 1 << 40)
            result = run(PROGRAM, "img", *command, "-f", "qcow2", path, check=False, timeout=10 * SLOWNESS)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertTrue(self.is_clean(self.ours("none", path)), command)

    def test_a_repair_leaves_no_less_than_the_peers(self):
        per_base = 10
        for seed, path, by_peer, by_us in self.bases(scale(2, 50)):
            for _ in range(per_base):
                self.compare_repairs(path, by_peer, by_us, seed)

    def compare_repairs(self, path, by_peer, by_us, seed):
        image = damage.Image(path)
        damage_seed = self.random.randrange(1 << 32)
        what = f"{seed}, damage {damage_seed}: {damage.damage(image, random.Random(damage_seed))}"
        mine, theirs = path + ".ours", path + ".peers"
        image.write(mine)
        image.write(theirs)
        before = self.read_by_us(mine)
        found = self.ours("all", mine)
        self.peers(theirs, "-r", "all")
        left_by_peer = self.kept(by_peer, self.read_by_peer(theirs))
        self.assertGreaterEqual(self.kept(by_peer, self.read_by_peer(mine)), left_by_peer, what)
        now = self.read_by_us(mine)
        self.assertGreaterEqual(self.kept(by_us, now), left_by_peer, what)
        self.assertGreaterEqual(self.kept(by_us, now), self.kept(by_us, before), what)
        if isinstance(found, dict):
            self.assertTrue(self.is_clean(found), f"{what}: {found}")
            self.assertTrue(self.is_clean(self.ours("none", mine)), what)
            self.assertTrue(self.is_clean(self.peers(mine)), f"{what}: {self.peers(mine)}")
        else:
            self.assertEqual(left_by_peer, 0, f"{what}: {found}")
