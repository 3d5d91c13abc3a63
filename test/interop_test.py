# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 images go back and forth between Interlock and the peer; the field's NBD clients work with our export."""
import itertools
import json
import os

from harness import KIB, MIB, PEER, TestCase, image_check, nbd_handle, qemu_img, qemu_io, run, scale

CLUSTER_SIZES = [512 << i for i in range(13)]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]
COMPAT = ["0.10", "1.1"]
PREALLOCATION = ["off", "metadata", "falloc", "full"]
DEPTHS = list(range(7))
DIMENSIONS = [CLUSTER_SIZES, REFCOUNT_BITS, COMPAT, PREALLOCATION, DEPTHS]


def is_possible(case):
    _, refcount_bits, compat, _, _ = case
    return compat == "1.1" or refcount_bits == 16


def covering_cases(rng):
    """Cases such that every possible pair of values of any two dimensions stands in one of them."""
    missing = set()
    for first, second in itertools.combinations(range(len(DIMENSIONS)), 2):
        for pair in itertools.product(DIMENSIONS[first], DIMENSIONS[second]):
            missing.add((first, pair[0], second, pair[1]))
    missing -= {(1, bits, 2, "0.10") for bits in REFCOUNT_BITS if bits != 16}
    cases = []
    while missing:
        best, best_covered = None, -1
        seed = rng.choice(sorted(missing, key=str))
        for _ in range(40):
            case = [rng.choice(values) for values in DIMENSIONS]
            case[seed[0]], case[seed[2]] = seed[1], seed[3]
            if case[2] == "0.10":
                if seed[0] == 1 or seed[2] == 1:
                    case[2] = "1.1" if case[1] != 16 else case[2]
                else:
                    case[1] = 16
            if not is_possible(case):
                continue
            covered = sum((a, case[a], b, case[b]) in missing for a, b in itertools.combinations(range(5), 2))
            if covered > best_covered:
                best, best_covered = case, covered
        missing -= {(a, best[a], b, best[b]) for a, b in itertools.combinations(range(5), 2)}
        cases.append(tuple(best))
    return cases


class Model:
    """What a disk must contain: bytes, and for each sector whether a discard left it open."""

    def __init__(self, size):
        self.size = size
        self.data = bytearray(size)
        self.open = bytearray(size // 512)

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data
        self.mark(offset, len(data), 0)

    def mark(self, offset, length, value):
        first, last = offset // 512, -(-(offset + length) // 512)
        self.open[first:last] = bytes([value]) * (last - first)

    def overlay(self, size):
        """The model of an image of another size on top of this one."""
        above = Model(size)
        common = min(size, self.size)
        above.data[:common] = self.data[:common]
        above.open[: common // 512] = self.open[: common // 512]
        return above

    def learn(self, content):
        """Takes for granted what a reader saw in places that a discard had left open."""
        for sector, is_open in enumerate(self.open):
            if is_open:
                self.data[sector * 512 : (sector + 1) * 512] = content[sector * 512 : (sector + 1) * 512]
        self.open = bytearray(self.size // 512)

    def difference(self, content):
        """None, or where and how `content` is not what the model says."""
        if len(content) != self.size:
            return f"{len(content)} bytes instead of {self.size}"
        for sector in range(self.size // 512):
            part = slice(sector * 512, (sector + 1) * 512)
            if not self.open[sector] and content[part] != self.data[part]:
                return f"offset {sector * 512}: {bytes(content[part][:16]).hex()} instead of {bytes(self.data[part][:16]).hex()}"
        return None


class Interop(TestCase):
    time_limit = 150
    builds = ("release",)
    long_builds = ("release", "asan")

    def sequence(self, handle, model, count, cluster):
        """Random writes, zeroes, discards and flushes through NBD, and the same on the model."""
        log = []
        for _ in range(count):
            unit = self.random.choice([512, 512, 4096, cluster])
            most = max(1, min(model.size // unit, max(64 * KIB // unit, 3)))
            length = min(self.random.randint(1, most) * unit, model.size)
            offset = self.random.randrange(0, (model.size - length) // 512 + 1) * 512
            if self.random.random() < 0.5:
                offset -= offset % unit
            kind = self.random.choices(["write", "zero", "zero-no-hole", "trim", "flush", "read"], [50, 12, 6, 15, 4, 13])[0]
            log.append((kind, offset, length))
            if kind == "write":
                data = self.random.randbytes(512) * (length // 512)
                handle.pwrite(data, offset)
                model.write(offset, data)
            elif kind in ("zero", "zero-no-hole"):
                handle.zero(length, offset, 0 if kind == "zero" else 2)
                model.write(offset, bytes(length))
            elif kind == "trim":
                handle.trim(length, offset)
                model.mark(offset, length, 1)
            elif kind == "flush":
                handle.flush()
            else:
                content = handle.pread(length, offset)
                for sector in range(length // 512):
                    at = offset + sector * 512
                    if not model.open[at // 512]:
                        want = model.data[at : at + 512]
                        self.assertEqual(content[sector * 512 : (sector + 1) * 512], want, f"read {at} after {log}")
        return log

    def read_all(self, handle, size):
        content = bytearray()
        while len(content) < size:
            content += handle.pread(min(MIB, size - len(content)), len(content))
        return content

    def session(self, program, chain, model, count, cluster, note):
        """One daemon on the chain: a sequence on its top, then all of it read back."""
        daemon = self.daemon(command=program)
        below = None
        for name, path in chain:
            more = {"discard": "unmap"} if name == chain[-1][0] else {}
            daemon.add_qcow2(name, path, below, **more)
            below = name
        daemon.nbd_server()
        daemon.export(below)
        with nbd_handle(daemon.uri(below)) as handle:
            before = self.read_all(handle, model.size)
            self.assertIsNone(model.difference(before), f"{note}: what {daemon.command_line[0]} reads at first")
            model.learn(before)
            log = self.sequence(handle, model, count, cluster)
            content = self.read_all(handle, model.size)
            handle.flush()
        self.assertIsNone(model.difference(content), f"{note}: {log}")
        model.learn(content)
        daemon.stop()
        self.daemons.remove(daemon)
        self.check_at_rest(chain, model, f"{note}: {log}")

    def check_at_rest(self, chain, model, note):
        """The peer's tools find every image clean, and in the top what the model says."""
        for _, path in chain:
            image_check(path)
        raw = self.path("rest.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", chain[-1][1], raw)
        with open(raw, "rb") as content:
            self.assertIsNone(model.difference(content.read()), note)

    def make_image(self, position, case, below, model):
        cluster, bits, compat, preallocation, _ = case
        size = max(3 * MIB, 6 * cluster) + self.random.randrange(0, 64) * 512
        if below and self.random.random() < 0.3:
            size = size // 2 // 512 * 512
        options = [f"cluster_size={cluster}", f"compat={compat}", f"refcount_bits={bits}"]
        if preallocation != "off" and not below:
            options.append(f"preallocation={preallocation}")
        path = self.create_image(f"i{position}.qcow2", size, *options, backing=below)
        return path, model.overlay(size) if model else Model(size)

    def one_case(self, case, count):
        cluster, _, _, _, depth = case
        chain, model, below = [], None, None
        for position in range(depth + 1):
            below, model = self.make_image(position, case, below, model)
            chain.append((f"n{position}", below))
            program = self.random.choice([None, [PEER]])
            if position < depth:
                self.session(program, chain, model, count // 3, cluster, f"{case}, layer {position}")
        writers = self.random.choice([[None], [[PEER], None], [None, [PEER], None]])
        for program in writers:
            self.session(program, chain, model, count, cluster, f"{case}")

    def test_random_sequences_agree_with_the_peer(self):
        cases = covering_cases(self.random)
        for case in self.random.sample(cases, 10) if not scale(0, 1) else (cases * 3)[: max(200, len(cases))]:
            self.one_case(case, 60)
            for name in os.listdir(self.directory):
                os.unlink(self.path(name))

    def test_every_cluster_size_round_trip(self):
        for cluster in CLUSTER_SIZES:
            self.one_case((cluster, 16, "1.1", "off", 1), 30)
            for name in os.listdir(self.directory):
                os.unlink(self.path(name))

    def test_every_refcount_width_round_trip(self):
        for bits in REFCOUNT_BITS:
            self.one_case((512, bits, "1.1", "off", 0), 60)
            for name in os.listdir(self.directory):
                os.unlink(self.path(name))


class Clients(TestCase):
    """Other people's NBD clients on our export."""

    SIZE = 32 * MIB

    def setUp(self):
        super().setUp()
        self.image = self.create_image("disk.qcow2", self.SIZE)
        qemu_io(self.image, "write -q -P 17 1M 3M", "write -q -P 18 20M 512k", "write -q -z 2M 64k")
        self.server = self.daemon()
        self.server.add_qcow2("disk", self.image, discard="unmap")
        self.server.nbd_server()
        self.server.export("disk")
        self.uri = self.server.uri("disk")

    def image_of_export(self):
        raw = self.path("export.raw")
        qemu_img("convert", "-f", "raw", "-O", "raw", self.uri, raw)
        return raw

    def assert_same_at_rest(self, raw):
        self.server.stop()
        image_check(self.image)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, self.image)

    def test_nbdinfo_describes_the_export(self):
        info = json.loads(run("nbdinfo", "--json", self.uri).stdout)
        export = info["exports"][0]
        self.assertEqual(export["export-name"], "disk")
        self.assertEqual(export["export-size"], self.SIZE)
        self.assertFalse(export["is_read_only"])
        for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache"):
            self.assertTrue(export[ability], ability)
        self.assertIn("base:allocation", export["contexts"])

    def test_nbdinfo_lists_the_exports(self):
        info = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={self.server.nbd_path}").stdout)
        self.assertEqual([export["export-name"] for export in info["exports"]], ["disk"])

    def test_nbdinfo_maps_the_allocation(self):
        extents = json.loads(run("nbdinfo", "--json", "--map", self.uri).stdout)
        zero_at = lambda offset: [e for e in extents if e["offset"] <= offset < e["offset"] + e["length"]][0]["type"] & 2
        self.assertTrue(zero_at(0))
        self.assertFalse(zero_at(1 * MIB))
        self.assertTrue(zero_at(2 * MIB))
        self.assertFalse(zero_at(20 * MIB))
        self.assertTrue(zero_at(21 * MIB))
        self.assertEqual(sum(extent["length"] for extent in extents), self.SIZE)

    def test_nbdcopy_reads_it(self):
        raw = self.path("copy.raw")
        run("nbdcopy", self.uri, raw)
        self.assert_same_at_rest(raw)

    def test_nbdcopy_writes_it_over_four_connections(self):
        raw = self.path("source.raw")
        with open(raw, "wb") as out:
            for _ in range(32):
                out.write(self.random.randbytes(MIB // 4) + bytes(MIB // 4) + self.random.randbytes(MIB // 2))
        run("nbdcopy", "--connections=4", "--requests=32", raw, self.uri)
        self.assert_same_at_rest(raw)

    def test_qemu_io_writes_and_reads(self):
        commands = ["write -P 5 0 1M", "read -P 5 0 1M", "write -z 512k 64k", "read -P 0 512k 64k", "discard 0 64k",
                    "aio_write -P 6 4M 2M", "aio_flush", "read -P 6 4M 2M", "read -P 17 1M 1M", "write -f -P 9 8M 4k", "flush"]
        qemu_io(self.uri, *commands, image_format="raw")
        self.assert_same_at_rest(self.image_of_export())

    def test_qemu_img_converts_both_ways(self):
        raw = self.image_of_export()
        with open(raw, "r+b") as out:
            out.seek(5 * MIB)
            out.write(self.random.randbytes(MIB))
        qemu_img("convert", "-n", "-f", "raw", "-O", "raw", "-W", raw, self.uri)
        self.assert_same_at_rest(raw)

    def test_fio_verifies_what_it_writes(self):
        job = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={self.uri}", "--rw=randrw", "--bsrange=4k-64k",
               "--iodepth=16", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
               "--output-format=json", "--output=fio.json"]
        run(*job, cwd=self.directory)
        with open(self.path("fio.json"), encoding="utf-8") as report:
            result = json.load(report)
        self.assertEqual(result["jobs"][0]["error"], 0)
        self.server.stop()
        image_check(self.image)

    def test_simple_and_structured_replies_agree(self):
        contents = []
        for structured in (True, False):
            with nbd_handle(self.uri, set_request_structured_replies=structured) as handle:
                self.assertEqual(handle.get_structured_replies_negotiated(), structured)
                contents.append(b"".join(handle.pread(MIB, i * MIB) for i in range(self.SIZE // MIB)))
        self.assertEqual(contents[0], contents[1])

    def test_tcp_socket_serves_the_same(self):
        self.server.qmp.execute("nbd-server-stop")
        port = self.random.randrange(20000, 60000)
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        self.server.qmp.execute("nbd-server-start", {"addr": address})
        self.server.export("disk", name="over-tcp")
        info = json.loads(run("nbdinfo", "--json", f"nbd://127.0.0.1:{port}/over-tcp").stdout)
        self.assertEqual(info["exports"][0]["export-size"], self.SIZE)

    def test_read_only_export_refuses_writes(self):
        self.server.qmp.execute("block-export-del", id="export-disk")
        self.server.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-disk")
        self.server.export("disk", writable=False, name="ro")
        with nbd_handle(self.server.uri("ro"), set_strict_mode=0) as handle:
            self.assertTrue(handle.is_read_only())
            for operation in (lambda: handle.pwrite(b"x" * 512, 0), lambda: handle.zero(512, 0), lambda: handle.trim(512, 0)):
                with self.assertRaises(Exception) as caught:
                    operation()
                self.assertIn(caught.exception.errno, ("EPERM", "EINVAL"))
            self.assertEqual(handle.pread(512, MIB), b"\x11" * 512)
