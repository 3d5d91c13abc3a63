# SPDX-License-Identifier: LGPL-2.1-or-later
"""interlock img convert, compare, dd, bench, commit and rebase beside qemu-img: the same content, holes, messages and
exit statuses."""
import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import time

from harness import KIB, MIB, PROGRAM, SANITIZED, SANITIZER_OPTIONS, SLOWNESS, TestCase, image_check, qemu_img, qemu_io, run, scale

SIZE = 4 * MIB

# -o of the target
TARGETS = [
    ("raw", None),
    ("qcow2", None),
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "refcount_bits=1,cluster_size=512"),
    ("qcow2", "lazy_refcounts=on"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "preallocation=metadata"),
    ("qcow2", "preallocation=full"),
]
SPARSE = ["512", "12k", "64k", "100k", "0"]

# Lines that are wrong, and what both say of them.
MISTAKES = [
    ["convert"],
    ["convert", "a.raw"],
    ["convert", "-S", "513", "a.raw", "x"],
    ["convert", "-S", "17M", "a.raw", "x"],
    ["convert", "-S", "abc", "a.raw", "x"],
    ["convert", "-m", "0", "a.raw", "x"],
    ["convert", "-m", "17", "a.raw", "x"],
    ["convert", "-c", "-O", "raw", "a.raw", "x"],
    ["convert", "-C", "-S", "4k", "a.raw", "x"],
    ["convert", "-C", "-c", "-O", "qcow2", "a.raw", "x"],
    ["convert", "--salvage", "-C", "a.raw", "x"],
    ["convert", "-O", "nofmt", "a.raw", "x"],
    ["convert", "-f", "nofmt", "a.raw", "x"],
    ["convert", "--target-image-opts", "a.raw", "driver=raw,file.filename=x"],
    ["convert", "--target-is-zero", "a.raw", "x"],
    ["convert", "-n", "-o", "size=3", "a.raw", "b.raw"],
    ["convert", "-B", "a.qcow2", "a.raw", "x"],
    ["convert", "-B", "a.qcow2", "-O", "qcow2", "a.raw", "x"],
    ["convert", "-F", "qcow2", "a.raw", "x"],
    ["convert", "-r", "abc", "a.raw", "x"],
    ["convert", "-t", "foo", "a.raw", "x"],
    ["convert", "-T", "foo", "a.raw", "x"],
    ["convert", "--skip-broken-bitmaps", "a.qcow2", "x"],
    ["convert", "-f", "raw", "-n", "-O", "raw", "a.raw", "small.raw"],
    ["convert", "-O", "qcow2", "-c", "-o", "preallocation=metadata", "a.raw", "x"],
    ["convert", "-o", "foo=1", "a.raw", "x"],
    ["compare", "a.raw"],
    ["compare", "a", "b", "c"],
    ["compare", "-f", "foo", "a.raw", "b.raw"],
    ["compare", "-T", "foo", "a.raw", "b.raw"],
    ["compare", "--image-opts", "-f", "raw", "a", "b"],
    ["dd"],
    ["dd", "if=a.raw"],
    ["dd", "if=a.raw", "of=x", "foo=1"],
    ["dd", "a.raw", "x"],
    ["dd", "if=a.raw", "of=x", "bs=0"],
    ["dd", "if=a.raw", "of=x", "bs=abc"],
    ["dd", "if=a.raw", "of=x", "bs=4G"],
    ["dd", "if=a.raw", "of=x", "count=abc"],
    ["dd", "if=a.raw", "of=x", "skip=-1"],
    ["dd", "if=a.raw", "of=x", "isize=1"],
    ["bench"],
    ["bench", "a", "b"],
    ["bench", "-c", "0", "a.raw"],
    ["bench", "-d", "0", "a.raw"],
    ["bench", "-c", "-1", "a.raw"],
    ["bench", "-s", "0", "a.raw"],
    ["bench", "-S", "abc", "a.raw"],
    ["bench", "-i", "foo", "a.raw"],
    ["bench", "-t", "foo", "a.raw"],
    ["bench", "-w", "--pattern", "300", "a.raw"],
    ["bench", "-f", "raw", "--flush-interval", "10", "a.raw"],
    ["bench", "-f", "raw", "-w", "-d", "4", "--flush-interval", "2", "a.raw"],
    ["commit"],
    ["commit", "a", "b"],
    ["commit", "-f", "qcow2", "a.qcow2"],
    ["commit", "-b", "nope", "-f", "qcow2", "top.qcow2"],
    ["commit", "-r", "abc", "top.qcow2"],
    ["commit", "-t", "foo", "top.qcow2"],
    ["rebase"],
    ["rebase", "-b", "a.qcow2"],
    ["rebase", "top.qcow2"],
    ["rebase", "-f", "qcow2", "-b", "a.qcow2", "top.qcow2"],
    ["rebase", "-f", "qcow2", "-b", "nope", "-F", "qcow2", "top.qcow2"],
    ["rebase", "-f", "qcow2", "-b", "a.qcow2", "-F", "foo", "top.qcow2"],
    ["rebase", "-f", "raw", "-b", "a.qcow2", "-F", "qcow2", "a.raw"],
    ["rebase", "-t", "foo", "-b", "a.qcow2", "top.qcow2"],
    ["rebase", "-T", "foo", "-b", "a.qcow2", "top.qcow2"],
]


class ImgTestCase(TestCase):
    def ours(self, *arguments, status=0, **more):
        """interlock img in the test's directory; its result."""
        result = run(PROGRAM, "img", *arguments, check=False, cwd=self.directory,
                     env={**os.environ, **SANITIZER_OPTIONS}, **more)
        if status is not None:
            self.assertEqual(result.returncode, status, f"{arguments}\n{result.stdout}{result.stderr}")
        return result

    def peer(self, *arguments, check=False):
        return run("qemu-img", *arguments, check=check, cwd=self.directory)

    def assert_same_content(self, first, second, first_format="qcow2", second_format="qcow2"):
        """In the eyes of both."""
        line = ["compare", "-f", first_format, "-F", second_format, first, second]
        for result in (self.peer(*line), self.ours(*line, status=None)):
            self.assertEqual((result.returncode, result.stdout), (0, "Images are identical.\n"), (line, result.stderr))

    def map(self, name, image_format, places=False):
        entries = json.loads(qemu_img("map", "--output=json", "-f", image_format, self.path(name)))
        if places:
            return [(entry["start"], entry["length"], entry.get("offset")) for entry in entries]
        # Where data lie in the file decides how runs are split, and what the file system says of holes in it.
        merged = []
        for entry in entries:
            kind = tuple(entry[key] for key in ("data", "present", "compressed", "depth"))
            if merged and merged[-1][2:] == kind:
                merged[-1] = (merged[-1][0], merged[-1][1] + entry["length"], *kind)
            else:
                merged.append((entry["start"], entry["length"], *kind))
        return merged

    def raw_image(self, name, size=SIZE):
        """Data, zeroes and holes of every size and alignment."""
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            offset = min(size, 4 * KIB)  # the peer allocates the first block of a new file
            file.write(self.random.randbytes(offset))
            while offset < size:
                length = min(self.random.choice([512, 4 * KIB, 12 * KIB, 64 * KIB, 200 * KIB, 512 * KIB])
                             * self.random.randrange(1, 4), size - offset)
                kind = self.random.randrange(4)
                if kind < 3:
                    file.seek(offset)
                    file.write(bytes(length) if kind == 0 else self.random.randbytes(length))
                offset += length
        return name

    def chain(self, names, size=SIZE, prefix="", commands=None):
        """Images from the base up; the commands, by which another chain becomes the same."""
        commands = commands or [
            ["write -q -P 1 0 4k", *(self.random_command(size) for _ in range(10))] for _ in names]
        for position, (name, lines) in enumerate(zip(names, commands)):
            below = ["-b", f"{prefix}{names[position - 1]}", "-F", "qcow2"] if position else []
            self.peer("create", "-q", "-f", "qcow2", *below, f"{prefix}{name}", str(size), check=True)
            qemu_io(self.path(f"{prefix}{name}"), *lines)
        return commands

    def random_command(self, size):
        length = self.random.choice([4, 64, 64, 128, 300]) * KIB
        offset = self.random.randrange((size - length) // (4 * KIB)) * 4 * KIB
        if self.random.randrange(4) == 0:
            return f"write -q -z {offset} {length}"
        return f"write -q -P {self.random.randrange(256)} {offset} {length}"


class ImgConvertTest(ImgTestCase):
    def test_content_and_holes_are_the_peers(self):
        self.raw_image("a.raw")
        self.chain(["base.qcow2", "top.qcow2"])
        for source, source_format in (("a.raw", "raw"), ("top.qcow2", "qcow2")):
            for number, (target_format, options) in enumerate(TARGETS):
                line = ["convert", "-f", source_format, "-O", target_format, *(["-o", options] if options else [])]
                with self.subTest(line=line):
                    self.peer(*line, source, "theirs")
                    self.ours(*line, source, "ours", *(["-W"] if number % 3 == 2 else []))
                    self.assert_same_content(source, "ours", source_format, target_format)
                    self.assertEqual(self.map("theirs", target_format), self.map("ours", target_format))
                    if target_format == "qcow2":
                        image_check(self.path("ours"))

    def test_sparse_sizes(self):
        self.raw_image("a.raw")
        for sparse in SPARSE:
            for image_format, options in (("raw", []), ("qcow2", []), ("qcow2", ["-o", "cluster_size=4k"])):
                line = ["convert", "-f", "raw", "-O", image_format, *options, "-S", sparse]
                with self.subTest(line=line):
                    self.peer(*line, "a.raw", "theirs")
                    self.ours(*line, "a.raw", "ours")
                    self.assert_same_content("a.raw", "ours", "raw", image_format)
                    self.assertEqual(self.map("theirs", image_format), self.map("ours", image_format))

    def test_a_layout_that_does_not_depend_on_chance(self):
        self.raw_image("a.raw", 16 * MIB)
        layouts = set()
        for _ in range(3):
            self.ours("convert", "-f", "raw", "-O", "qcow2", "a.raw", "ours")
            layouts.add(tuple(self.map("ours", "qcow2", places=True)))
        self.assertEqual(len(layouts), 1)
        places = [entry[-1] for entry in layouts.pop() if entry[-1] is not None]
        self.assertEqual(places, sorted(places))

    def test_several_sources(self):
        for name, size in (("a", MIB), ("b", 512), ("c", 3 * MIB + 512)):
            self.raw_image(f"{name}.raw", size)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", self.path("a.raw"), self.path("a.qcow2"))
        for line in (["-f", "raw", "-O", "qcow2", "a.raw", "b.raw", "c.raw"], ["-O", "raw", "a.qcow2", "b.raw", "a.qcow2"],
                     ["-f", "raw", "-c", "-O", "qcow2", "a.raw", "b.raw", "c.raw"]):
            with self.subTest(line=line):
                self.peer("convert", *line, "theirs")
                self.ours("convert", *line, "ours")
                image_format = line[line.index("-O") + 1]
                self.assert_same_content("theirs", "ours", image_format, image_format)

    def test_onto_what_exists(self):
        self.raw_image("a.raw")
        for image_format, more in (("raw", []), ("qcow2", []), ("qcow2", ["-S", "0"])):
            with self.subTest(image_format=image_format, more=more):
                qemu_img("create", "-q", "-f", image_format, self.path("t"), str(SIZE))
                qemu_io(self.path("t"), f"write -q -P 7 0 {SIZE}", image_format=image_format)
                self.ours("convert", "-n", "-f", "raw", "-O", image_format, *more, "a.raw", "t")
                self.assert_same_content("a.raw", "t", "raw", image_format)
        qemu_img("create", "-q", "-f", "qcow2", self.path("t"), str(SIZE))
        target = f"driver=qcow2,file.filename={self.path('t')}"
        self.ours("convert", "-n", "--target-is-zero", "-f", "raw", "--target-image-opts", "a.raw", target)
        self.assert_same_content("a.raw", "t", "raw", "qcow2")
        self.ours("convert", "--image-opts", "-O", "raw", target, "b.raw")
        self.assert_same_content("a.raw", "b.raw", "raw", "raw")

    def test_over_a_backing_file(self):
        self.chain(["base.qcow2", "top.qcow2"])
        shutil.copy(self.path("base.qcow2"), self.path("copy.qcow2"))
        for more in ([], ["-c"], ["-S", "0"], ["-o", "cluster_size=2M"]):
            line = ["convert", "-O", "qcow2", "-B", "copy.qcow2", "-F", "qcow2", *more, "top.qcow2"]
            with self.subTest(line=line):
                self.peer(*line, "theirs")
                self.ours(*line, "ours")
                self.assert_same_content("top.qcow2", "ours")
                image_check(self.path("ours"))
                ours, theirs = ([entry for entry in self.map(name, "qcow2") if entry[-1] == 0] for name in ("ours", "theirs"))
                self.assertEqual(sum(entry[1] for entry in theirs), sum(entry[1] for entry in ours))

    def test_compressed(self):
        with open(self.path("a.raw"), "wb") as file:
            for _ in range(60):
                length = self.random.randrange(1, 40) * 4096
                kind = self.random.randrange(3)
                file.write(self.random.randbytes(length) if kind == 0 else bytes([kind - 1]) * length)
            file.truncate((file.tell() + 511) // 512 * 512)
        for options in ([], ["-o", "compression_type=zstd"], ["-o", "cluster_size=4k"], ["-m", "1"], ["-W"]):
            line = ["convert", "-c", "-f", "raw", "-O", "qcow2", *options, "a.raw"]
            with self.subTest(line=line):
                self.peer(*line, "theirs")
                self.ours(*line, "ours")
                self.assert_same_content("a.raw", "ours", "raw", "qcow2")
                image_check(self.path("ours"))
                self.assertEqual(self.map("theirs", "qcow2"), self.map("ours", "qcow2"))
                self.ours("convert", "-O", "raw", "ours", "back.raw")
                self.assert_same_content("a.raw", "back.raw", "raw", "raw")

    def test_a_snapshot(self):
        self.peer("create", "-q", "-f", "qcow2", "a.qcow2", "1M", check=True)
        qemu_io(self.path("a.qcow2"), "write -q -P 1 0 1M")
        self.peer("snapshot", "-c", "one", "a.qcow2", check=True)
        qemu_io(self.path("a.qcow2"), "write -q -P 2 0 512k")
        for name in ("one", "1", "snapshot.name=one", "snapshot.id=1"):
            self.ours("convert", "-l", name, "-O", "raw", "a.qcow2", "ours")
            with open(self.path("ours"), "rb") as file:
                self.assertEqual(file.read(), b"\x01" * MIB, name)
        self.assertIn("Failed to load snapshot", self.ours("convert", "-l", "two", "a.qcow2", "x", status=1).stderr)

    def dirty(self, image, bitmap):
        """What the bitmap says, in the eyes of the peer."""
        path = self.path("socket")
        server = subprocess.Popen(["qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, "-k", path, self.path(image)])
        try:
            give_up = time.monotonic() + 20 * SLOWNESS
            while not os.path.exists(path) and server.poll() is None and time.monotonic() < give_up:
                time.sleep(0.005)
            options = f"driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
            entries = json.loads(qemu_img("map", "--output=json", "--image-opts", options))
            self.assertEqual(server.wait(20 * SLOWNESS), 0)
        finally:
            server.kill()
            server.wait()
        return [(entry["start"], entry["length"]) for entry in entries if not entry["data"]]

    def test_bitmaps(self):
        self.peer("create", "-q", "-f", "qcow2", "a.qcow2", "1M", check=True)
        for options in (["b0"], ["--disable", "-g", "4k", "b1"], ["b2"]):
            self.peer("bitmap", "--add", *options[:-1], "-f", "qcow2", "a.qcow2", options[-1], check=True)
        qemu_io(self.path("a.qcow2"), "write -q -P 1 0 128k", "write -q -P 2 512k 4k")
        for line in (["a.qcow2", "a.qcow2"], ["a.raw"]):
            self.raw_image("a.raw", MIB)
            theirs, ours = self.peer("convert", "--bitmaps", "-O", "qcow2", *line, "x"), self.ours(
                "convert", "--bitmaps", "-O", "qcow2", *line, "x", status=1)
            self.assertEqual(theirs.stderr, ours.stderr.replace("interlock img:", "qemu-img:"))
        self.assertIn("'raw' does not support bitmaps", self.ours("convert", "--bitmaps", "a.qcow2", "x", status=1).stderr)

        def bitmaps(name):
            found = json.loads(self.peer("info", "--output=json", name).stdout)["format-specific"]["data"].get("bitmaps", [])
            return sorted((bitmap["name"], bitmap["granularity"], bitmap["flags"]) for bitmap in found)

        self.ours("convert", "--bitmaps", "-O", "qcow2", "a.qcow2", "ours")
        self.assertEqual(bitmaps("a.qcow2"), bitmaps("ours"))
        image_check(self.path("ours"))
        for name in ("b0", "b1", "b2"):
            self.assertEqual(self.dirty("a.qcow2", name), self.dirty("ours", name))
        self.assertEqual(self.dirty("ours", "b0"), [(0, 128 * KIB), (512 * KIB, 64 * KIB)])
        run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", self.path("a.qcow2"), check=False)
        self.assertIn("inconsistent bitmap", self.ours("convert", "--bitmaps", "-O", "qcow2", "a.qcow2", "x", status=1).stderr)
        line = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "a.qcow2"]
        theirs, ours = self.peer(*line, "theirs"), self.ours(*line, "ours")
        self.assertEqual(sorted(theirs.stderr.splitlines()),
                         sorted(ours.stderr.replace("interlock img:", "qemu-img:").splitlines()))
        self.assertEqual(bitmaps("theirs"), bitmaps("ours"))

    def test_salvage(self):
        self.raw_image("a.raw", MIB)
        bad = [{"event": "none", "iotype": "read", "errno": 5, "sector": sector, "once": False} for sector in (3, 130, 131)]
        source = "json:" + json.dumps({"driver": "raw", "file": {
            "driver": "blkdebug", "image": {"driver": "file", "filename": "a.raw"}, "inject-error": bad}})
        theirs = self.peer("convert", "--salvage", source, "theirs")
        ours = self.ours("convert", "--salvage", source, "ours")
        self.assertEqual(sorted(theirs.stderr.splitlines()),
                         sorted(ours.stderr.replace("interlock img:", "qemu-img:").splitlines()))
        self.assert_same_content("theirs", "ours", "raw", "raw")
        self.assertEqual(self.ours("convert", "--salvage", "-q", source, "ours").stderr, "")
        self.assertEqual(self.ours("convert", source, "x", status=1).stderr,
                         "interlock img: error while reading at byte 0: Input/output error\n")

    def test_no_space(self):
        """The file may not become longer than 1 MiB."""
        with open(self.path("a.raw"), "wb") as file:
            file.write(self.random.randbytes(SIZE))

        def limit():
            import resource
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))

        for options in (["-O", "qcow2"], ["-c", "-O", "qcow2"]):
            result = self.ours("convert", "-f", "raw", *options, "a.raw", "x", status=1, preexec_fn=limit)
            self.assertRegex(result.stderr, r"error while writing at byte \d+: File too large")

    def test_what_could_not_be_made_whole_is_not_left(self):
        self.raw_image("a.raw")

        def limit():
            import resource
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 8, SIZE // 8))

        rows = [
            (["create", "-f", "qcow2", "-o", "preallocation=full", "x"], [str(SIZE)]),
            (["create", "-f", "qcow2", "-o", "preallocation=full,data_file=y", "x"], [str(SIZE)]),
            (["create", "-f", "raw", "-o", "preallocation=full", "x"], [str(SIZE)]),
            (["convert", "-f", "raw", "-O", "qcow2", "a.raw", "x"], []),
            (["dd", "-f", "raw", "-O", "qcow2", "if=a.raw", "of=x"], []),
        ]
        for words, more in rows:
            with self.subTest(words=words):
                result = self.ours(*words, *more, status=1, preexec_fn=limit)
                self.assertIn("File too large", result.stderr)
                self.assertEqual(sorted(os.listdir(self.directory)), ["a.raw"])
        with open(self.path("x"), "w", encoding="ascii") as mine:
            mine.write("mine")
        self.ours(*rows[3][0], status=1, preexec_fn=limit)
        self.assertTrue(os.path.exists(self.path("x")))  # it was there before

    def test_onto_itself(self):
        self.raw_image("a.raw")
        shutil.copy(self.path("a.raw"), self.path("before.raw"))
        os.link(self.path("a.raw"), self.path("b.raw"))
        for words in (["convert", "-f", "raw", "-O", "raw", "a.raw", "a.raw"],
                      ["convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.raw"],
                      ["convert", "-n", "-f", "raw", "-O", "raw", "a.raw", "b.raw"],
                      ["dd", "-f", "raw", "-O", "raw", "if=a.raw", "of=b.raw"]):
            self.assertIn('"write" lock', self.ours(*words, status=1).stderr)
            self.assertTrue(filecmp.cmp(self.path("a.raw"), self.path("before.raw"), shallow=False))

    def test_what_is_not_done_is_refused(self):
        self.raw_image("a.raw")
        result = self.ours("convert", "-C", "-f", "raw", "a.raw", "x", status=1)
        self.assertIn("Copy offloading (-C) is not supported", result.stderr)
        self.assertFalse(os.path.exists(self.path("x")))
        for words in (["-n"], ["-i", "native"]):
            self.assertIn("native", self.ours("bench", *words, "-f", "raw", "-c", "4", "a.raw", status=1).stderr)

    def test_bench_by_the_engine_that_was_asked_for(self):
        if SANITIZED:
            self.skipTest("leaks are not looked for under strace")
        self.raw_image("a.raw")
        for mode, rings in (("threads", False), ("io_uring", True)):
            line = ["strace", "-f", "-e", "trace=io_uring_setup", PROGRAM, "img", "bench", "-f", "raw", "-i", mode]
            result = run(*line, "-c", "4", "a.raw", cwd=self.directory, check=False)
            if result.returncode:  # strace may not trace here, or the kernel may have no rings
                self.skipTest(result.stderr)
            self.assertEqual("io_uring_setup(" in result.stderr, rings, result.stderr)

    def test_rate(self):
        self.raw_image("a.raw")
        with open(self.path("a.raw"), "wb") as file:
            file.write(self.random.randbytes(SIZE))
        clock = os.times()
        self.ours("convert", "-r", "8M", "-f", "raw", "-O", "raw", "a.raw", "x")
        self.assertGreater(os.times().elapsed - clock.elapsed, 0.3)

    def test_progress(self):
        self.raw_image("a.raw", MIB)
        shown = self.ours("convert", "-p", "-f", "raw", "a.raw", "x").stdout
        self.assertTrue(shown.startswith("    (0.00/100%)\n") and shown.endswith("    (100.00/100%)\n"), shown)
        self.assertEqual(self.ours("convert", "-p", "-q", "-f", "raw", "a.raw", "x").stdout, "")


class ImgMistakesTest(ImgTestCase):
    def test_mistakes(self):
        for name, size in (("a.raw", MIB), ("b.raw", MIB), ("small.raw", 64 * KIB)):
            self.raw_image(name, size)
        self.chain(["a.qcow2", "top.qcow2"], MIB)
        for line in MISTAKES:
            with self.subTest(line=line):
                theirs, ours = self.peer(*line), self.ours(*line, status=None)
                self.assertEqual(theirs.returncode, ours.returncode, ours.stderr)
                words = [line for line in theirs.stderr.splitlines() if not line.startswith(("WARNING", "     "))]
                said = ours.stderr.replace("interlock img", "qemu-img").splitlines()
                # A name may stand there once instead of twice.
                self.assertEqual(re.sub(r"(Could not open '\S+': )\1", r"\1", words[0]), said[0])

    def test_a_format_that_is_not_known(self):
        """is guessed for reading only."""
        self.chain(["a.qcow2", "top.qcow2"], MIB)
        before = self.map("top.qcow2", "qcow2")
        for line in (["commit", "top.qcow2"], ["rebase", "-b", "", "top.qcow2"], ["bench", "-w", "-c", "1", "top.qcow2"]):
            self.assertIn("Give -f FORMAT", self.ours(*line, status=1).stderr)
        self.assertEqual(self.map("top.qcow2", "qcow2"), before)


class ImgCompareTest(ImgTestCase):
    def test_compare_outcomes(self):
        self.raw_image("a.raw", MIB)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", self.path("a.raw"), self.path("a.qcow2"))
        with open(self.path("a.raw"), "rb") as file:
            content = bytearray(file.read())
        for name, change in (("first", 0), ("middle", 700001), ("last", MIB - 1)):
            changed = bytearray(content)
            changed[change] ^= 1
            with open(self.path(f"{name}.raw"), "wb") as file:
                file.write(changed)
        for name, tail in (("longer", bytes(65536)), ("other", bytes(65535) + b"x")):
            with open(self.path(f"{name}.raw"), "wb") as file:
                file.write(content + tail)
        with open(self.path("zero.raw"), "wb") as file:
            file.write(bytes(MIB))
        with open(self.path("hole.raw"), "wb") as file:
            file.truncate(MIB)
        qemu_img("create", "-q", "-f", "qcow2", self.path("empty.qcow2"), "1M")
        pairs = [("a.raw", "a.qcow2"), ("a.raw", "first.raw"), ("middle.raw", "a.qcow2"), ("a.raw", "last.raw"),
                 ("a.raw", "longer.raw"), ("longer.raw", "a.qcow2"), ("a.raw", "other.raw"), ("other.raw", "longer.raw"),
                 ("hole.raw", "zero.raw"), ("empty.qcow2", "zero.raw"), ("a.raw", "nope"), ("nope", "a.raw")]
        strict = [("hole.raw", "zero.raw"), ("empty.qcow2", "hole.raw"), ("empty.qcow2", "empty.qcow2"),
                  ("zero.raw", "zero.raw"), ("a.raw", "longer.raw")]
        for options, list_of in (([], pairs), (["-q"], pairs), (["-s"], strict)):
            for pair in list_of:
                with self.subTest(options=options, pair=pair):
                    theirs = self.peer("compare", *options, *pair)
                    ours = self.ours("compare", *options, *pair, status=None)
                    self.assertEqual((theirs.returncode, theirs.stdout), (ours.returncode, ours.stdout), ours.stderr)

    def test_compare_what_cannot_be_read(self):
        self.raw_image("a.raw", MIB)
        with open(self.path("a.raw"), "r+b") as file:
            file.write(self.random.randbytes(MIB))
        source = "json:" + json.dumps({"driver": "raw", "file": {
            "driver": "blkdebug", "image": {"driver": "file", "filename": "a.raw"},
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "once": False}]}})
        for pair in ((source, "a.raw"), ("a.raw", source)):
            self.assertIn("Error while reading data", self.ours("compare", *pair, status=4).stderr)


class ImgDdTest(ImgTestCase):
    def test_dd_results(self):
        self.raw_image("a.raw", 2 * MIB)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", self.path("a.raw"), self.path("a.qcow2"))
        for operands in ([], ["bs=1000", "count=3"], ["bs=1M", "skip=2"], ["bs=64k", "count=5"], ["bs=64k", "skip=15"],
                         ["bs=64k", "count=0"], ["bs=1M", "skip=3"], ["bs=64k", "skip=1", "count=100"]):
            for source, image_format in (("a.raw", "qcow2"), ("a.qcow2", "raw")):
                line = ["dd", "-O", image_format, f"if={source}", *operands]
                with self.subTest(line=line):
                    theirs, ours = self.peer(*line, "of=theirs"), self.ours(*line, "of=ours")
                    self.assertEqual(theirs.returncode, ours.returncode)
                    self.assert_same_content("theirs", "ours", image_format, image_format)
                    self.assertEqual(self.map("theirs", image_format), self.map("ours", image_format))


    def test_dd_count_is_what_is_copied(self):
        """Behind `skip`, as in dd(1); the peer takes it from the beginning of the input."""
        self.raw_image("a.raw", MIB)
        self.ours("dd", "-f", "raw", "bs=64k", "skip=3", "count=5", "if=a.raw", "of=ours")
        with open(self.path("a.raw"), "rb") as whole, open(self.path("ours"), "rb") as part:
            self.assertEqual(whole.read()[3 * 65536:8 * 65536], part.read())


class ImgBenchTest(ImgTestCase):
    def test_bench_lines(self):
        self.raw_image("a.raw")
        for options in (["-c", "100"], ["-c", "10", "-d", "1", "-s", "64k", "-S", "128k", "-o", "4096"],
                        ["-w", "-c", "50", "-d", "4", "--pattern", "7"],
                        ["-w", "-c", "50", "-d", "4", "--flush-interval", "10"],
                        ["-w", "-c", "50", "-d", "4", "--flush-interval", "10", "--no-drain"]):
            with self.subTest(options=options):
                theirs, ours = (command("bench", "-f", "raw", *options, "a.raw").stdout
                                for command in (self.peer, self.ours))
                time = re.compile(r"\d+\.\d{3} seconds")
                self.assertEqual(time.sub("T", theirs), time.sub("T", ours))
        with open(self.path("a.raw"), "rb") as file:
            self.assertEqual(file.read(50 * 4096)[:4096], bytes(4096))

    def test_bench_behind_the_end(self):
        self.raw_image("a.raw", MIB)
        self.assertIn("Failed request: Input/output error",
                      self.ours("bench", "-f", "raw", "-c", "3", "-s", "4M", "a.raw", status=1).stderr)


class ImgCommitTest(ImgTestCase):
    def test_commit_as_the_peer(self):
        names = ["base.qcow2", "mid.qcow2", "top.qcow2"]
        for options in ([], ["-d"], ["-b", "{}base.qcow2"], ["-t", "none"], ["-r", "64M"], ["-p"]):
            for _ in range(scale(1, 10)):
                commands = self.chain(names, prefix="t")
                self.chain(names, prefix="o", commands=commands)
                qemu_img("convert", "-O", "raw", self.path("otop.qcow2"), self.path("want.raw"))
                before = [entry for entry in self.map("otop.qcow2", "qcow2") if entry[-1] == 0]
                with self.subTest(options=options):
                    for side, command in (("t", self.peer), ("o", self.ours)):
                        line = [word.format(side) for word in options]
                        self.assertTrue(command("commit", "-f", "qcow2", *line, f"{side}top.qcow2").stdout
                                        .endswith("Image committed.\n"))
                    for name in names:
                        image_check(self.path(f"o{name}"))
                        if options[:1] != ["-b"] or name != "mid.qcow2":  # which is invalid now
                            self.assert_same_content(f"t{name}", f"o{name}")
                    self.assert_same_content("want.raw", "otop.qcow2", "raw", "qcow2")
                    own = [entry for entry in self.map("otop.qcow2", "qcow2") if entry[-1] == 0]
                    self.assertEqual(own, before if options[:1] in (["-d"], ["-b"]) else [])

    def test_commit_to_a_shorter_base_and_snapshots(self):
        self.peer("create", "-q", "-f", "qcow2", "base.qcow2", "1M", check=True)
        self.peer("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "2M", check=True)
        qemu_io(self.path("top.qcow2"), "write -q -P 3 512k 1M")
        self.peer("snapshot", "-c", "one", "top.qcow2", check=True)
        qemu_io(self.path("top.qcow2"), "write -q -P 4 0 64k")
        self.ours("commit", "-f", "qcow2", "top.qcow2")
        qemu_io(self.path("base.qcow2"), "read -q -P 4 0 64k", "read -q -P 3 512k 1M", "read -q -P 0 1536k 512k")
        for name in ("base.qcow2", "top.qcow2"):
            image_check(self.path(name))
        self.peer("snapshot", "-a", "one", "top.qcow2", check=True)
        qemu_io(self.path("top.qcow2"), "read -q -P 3 512k 1M", "read -q -P 4 0 64k")


class ImgRebaseTest(ImgTestCase):
    def test_rebase_as_the_peer(self):
        names = ["base.qcow2", "mid.qcow2", "top.qcow2"]
        self.chain(["new.qcow2"], SIZE)
        self.chain(["short.qcow2"], SIZE // 2)
        self.chain(["long.qcow2"], 2 * SIZE)
        self.raw_image("new.raw")
        wishes = [("new.qcow2", "qcow2"), ("short.qcow2", "qcow2"), ("long.qcow2", "qcow2"), ("new.raw", "raw"),
                  ("{}base.qcow2", "qcow2"), ("", None)]
        for number, (backing, backing_format) in enumerate(wishes * scale(1, 8)):
            options = [["-p"], ["-c"], []][number % 3]
            commands = self.chain(names, prefix="t")
            self.chain(names, prefix="o", commands=commands)
            qemu_img("convert", "-O", "raw", self.path("otop.qcow2"), self.path("want.raw"))
            with self.subTest(backing=backing, options=options):
                for side, command in (("t", self.peer), ("o", self.ours)):
                    line = ["rebase", "-f", "qcow2", *options, "-b", backing.format(side)]
                    result = command(*line, *(["-F", backing_format] if backing_format else []), f"{side}top.qcow2")
                    self.assertEqual(result.returncode, 0, result.stderr)
                self.assert_same_content("want.raw", "otop.qcow2", "raw", "qcow2")
                image_check(self.path("otop.qcow2"))
                theirs, ours = (
                    {key: value for key, value in json.loads(self.peer("info", "--output=json", f"{side}top.qcow2").stdout)
                     .items() if key.startswith("backing-filename-format")} for side in "to")
                self.assertEqual(theirs, ours)
                # Nothing that is the same below is written.
                theirs, ours = (sum(entry[1] for entry in self.map(f"{side}top.qcow2", "qcow2") if entry[-1] == 0)
                                for side in "to")
                self.assertLessEqual(ours, theirs)

    def test_unsafe_rebase(self):
        self.chain(["base.qcow2", "top.qcow2"])
        before = self.map("top.qcow2", "qcow2")
        os.rename(self.path("base.qcow2"), self.path("moved.qcow2"))
        self.assertIn("Could not open", self.ours("rebase", "-f", "qcow2", "-b", "moved.qcow2", "-F", "qcow2", "top.qcow2",
                                                  status=1).stderr)
        self.ours("rebase", "-u", "-f", "qcow2", "-b", "moved.qcow2", "-F", "qcow2", "top.qcow2")
        self.assertEqual(self.map("top.qcow2", "qcow2"), before)
        self.ours("rebase", "-u", "-f", "qcow2", "-b", "", "top.qcow2")
        self.assertNotIn("backing-filename", self.peer("info", "--output=json", "top.qcow2").stdout)
