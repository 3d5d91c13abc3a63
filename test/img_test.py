# SPDX-License-Identifier: LGPL-2.1-or-later
"""`interlock img` beside qemu-img: the same answers about the same images, whoever made them; the same exit statuses;
and nothing opened that was not asked for. convert and its kin have suites of their own."""
import json
import os
import re
import signal
import struct
import subprocess
import time

from harness import FULL, IS_PEER, KIB, MIB, PROGRAM, REPORTS, SANITIZED, SANITIZER_OPTIONS, TestCase, qemu_io, run

# What our answers have beyond the peer's: (command, dotted path of the key). The only list of them.
EXTRAS = set()

SECRET = ("--object", "secret,id=k,data=swordfish")
ENCRYPTED = {
    "qcow2-luks": ("qcow2", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "encrypt.key-secret=k"),
    "qcow2-aes": ("qcow2", "encrypt.format=aes,encrypt.key-secret=k", "encrypt.key-secret=k"),
    "luks": ("luks", "key-secret=k,iter-time=10", "key-secret=k"),
}


class ImgTestCase(TestCase):
    builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer is compared with, not tested")

    def img(self, *words, status=0):
        """Runs `interlock img`; its output (standard error behind standard output)."""
        result = run(
            PROGRAM, "img", *words, check=False, cwd=self.directory, env={**SANITIZER_OPTIONS, **os.environ}, timeout=20
        )
        text = result.stdout + result.stderr
        self.assertIsNone(REPORTS.search(text.encode()), f"{words}: {text}")
        self.assertEqual(result.returncode, status, f"{words}: {text}")
        return text

    def peer(self, *words, status=0):
        result = run("qemu-img", *words, check=False, cwd=self.directory)
        self.assertEqual(result.returncode, status, f"qemu-img {words}: {result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    def without_extras(self, command, ours, theirs, path=""):
        """Our answer without what it may have beyond the peer's."""
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return {
                key: self.without_extras(command, value, theirs.get(key), f"{path}.{key}")
                for key, value in ours.items()
                if key in theirs or (command, f"{path}.{key}") not in EXTRAS
            }
        if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            return [self.without_extras(command, a, b, path) for a, b in zip(ours, theirs)]
        return ours

    def assert_same_json(self, command, *words, status=0):
        line = (command, "--output=json", *words)
        ours, theirs = json.loads(self.img(*line, status=status)), json.loads(self.peer(*line, status=status))
        self.assertEqual(self.without_extras(command, ours, theirs), theirs, f"{line} (seed {self.seed})")

    def assert_same_text(self, *words, status=0):
        self.assertEqual(self.img(*words, status=status), self.peer(*words, status=status), words)

    def fill(self, name, size, image_format="qcow2", share=3, unit=4 * KIB):
        """Random writes, zeroes and discards by the peer."""
        commands = []
        for _ in range(share):
            length = self.random.randrange(1, 24) * unit
            offset = self.random.randrange(0, max(1, (size - length) // unit)) * unit
            for what in self.random.sample(["write -q -P 7", "write -q -z", "write -q -z -u", "discard -q"], 2):
                commands.append(f"{what} {offset} {min(length, size - offset)}")
                offset = (offset + length // 2) // unit * unit
                length = min(length, size - offset)
        qemu_io(self.path(name), *commands, image_format=image_format, cwd=self.directory)


class Matrix(ImgTestCase):
    """info, map, measure and check of images with each feature, made by the peer and by us."""

    builds = ("release",)
    time_limit = 60
    size = 2 * MIB
    ROWS = {
        "plain": "",
        "small-clusters": "cluster_size=512",
        "large-clusters": "cluster_size=2M",
        "version-2": "compat=0.10",
        "narrow-refcounts": "refcount_bits=1",
        "wide-refcounts": "refcount_bits=64",
        "lazy": "lazy_refcounts=on",
        "preallocated": "preallocation=metadata",
        "reserved": "preallocation=falloc",
        "written": "preallocation=full,cluster_size=4k",
        "zstd": "compression_type=zstd",
        "subclusters": "extended_l2=on",
        "small-subclusters": "extended_l2=on,cluster_size=16k",
        "data-file": "data_file=NAME.data",
        "raw-data-file": "data_file=NAME.data,data_file_raw=on",
    }

    def make(self, name, options, maker, *more, image_format="qcow2"):
        line = ["create", "-q", "-f", image_format, *more, *(["-o", options] if options else []), name, str(self.size)]
        (self.peer if maker == "peer" else self.img)(*line)

    def makers(self):
        return ("peer", "ours") if FULL else (self.random.choice(("peer", "ours")),)

    def compare(self, name, image_format="qcow2"):
        self.assert_same_json("info", name)
        self.assert_same_text("info", name)
        self.assert_same_json("map", name)
        self.assert_same_json("measure", "-O", "qcow2", "-o", "cluster_size=4k", name)
        if image_format == "qcow2":
            self.assert_same_json("check", name)

    def test_features(self):
        for row, options in self.ROWS.items():
            for maker in self.makers():
                with self.subTest(row=row, maker=maker):
                    name = f"{row}-{maker}"
                    self.make(name, options.replace("NAME", name), maker)
                    self.fill(name, self.size)
                    self.compare(name)

    def test_compressed(self):
        self.make("source", "", "peer", image_format="raw")
        self.fill("source", self.size, "raw", share=8)
        for method in ("zlib", "zstd"):
            options = ("-c", "-O", "qcow2", "-o", f"compression_type={method}", "-f", "raw", "source")
            self.peer("convert", *options, method)
            self.fill(method, self.size)
            self.compare(method)
            self.assertEqual(*(tool("map", method, status=1).count("compressed clusters") for tool in (self.img, self.peer)))

    def test_encrypted(self):
        for row, (image_format, options, key) in ENCRYPTED.items():
            for maker in self.makers():
                with self.subTest(row=row, maker=maker):
                    name = f"{row}-{maker}"
                    self.make(name, options, maker, *SECRET, image_format=image_format)
                    for words in (("info", name), ("info", "-f", image_format, name)):
                        self.assert_same_json(*words)  # without the key
                        self.assert_same_text(*words)
                    self.img("map", name, status=1)
                    image = f"driver={image_format},file.filename={name},{key}"
                    run("qemu-io", *SECRET, "--image-opts", image, "-c", "write -q -P 7 64k 128k", cwd=self.directory)
                    for words in (("map",), ("measure", "-O", "qcow2")):
                        self.assert_same_json(*words, *SECRET, "--image-opts", image)
                    if image_format == "qcow2":
                        self.assert_same_json("check", *SECRET, "--image-opts", image)

    def test_a_header_without_payload_is_not_its_own_payload(self):
        image_format, options, key = ENCRYPTED["luks"]
        self.make("alone", options, "peer", *SECRET, image_format=image_format)
        with open(self.path("alone"), "r+b") as file:
            file.seek(104)
            file.write(bytes(4))  # payload offset
        image = f"driver=luks,file.filename=alone,{key}"
        self.img("convert", *SECRET, "--image-opts", image, "-O", "raw", "out", status=1)

    def test_snapshots_and_bitmaps(self):
        self.make("disk", "", "peer")
        for number in range(3):
            self.fill("disk", self.size)
            self.peer("snapshot", "-c", f"a snapshot with a name, number {number}" if number else "first", "disk")
            self.peer("bitmap", "--add", *(["-g", "4k", "--disable"] if number else []), "disk", f"bitmap-{number}")
        self.compare("disk")
        for name in ("first", "snapshot.name=first", "snapshot.id=2"):
            words = ("measure", "--output=json", "-O", "qcow2", "-l", name, "disk")
            ours, theirs = json.loads(self.img(*words)), json.loads(self.peer(*words))
            self.assertEqual(ours, {**theirs, "bitmaps": 0})  # they record changes of the active content
        self.img("measure", "-l", "nonsense", "disk", status=1)

    def test_amended(self):
        for options in ("compat=0.10", "compat=1.1,lazy_refcounts=on", "refcount_bits=64", "size=3M", "size=3M,refcount_bits=1"):
            for maker in ("peer", "ours"):
                self.make(maker, "", "peer")
                qemu_io(self.path(maker), "write -q -P 3 512k 256k")
                (self.peer if maker == "peer" else self.img)("amend", "-f", "qcow2", "-o", options, maker)
            ours, theirs = (json.loads(self.peer("info", "--output=json", maker)) for maker in ("ours", "peer"))
            for key in ("virtual-size", "format-specific", "dirty-flag"):
                self.assertEqual(ours[key], theirs[key], options)
            self.assert_same_json("check", "ours")
            self.peer("compare", "ours", "peer")

    def test_damaged(self):
        def damage(name, *changes):
            """Other refcounts for some clusters, in an image that has 16 bits for each."""
            with open(self.path(name), "r+b") as image:
                image.seek(48)
                image.seek(*struct.unpack(">Q", image.read(8)))
                (block,) = struct.unpack(">Q", image.read(8))
                for cluster, count in changes:
                    image.seek(block + 2 * cluster)
                    image.write(struct.pack(">H", count))

        for number, (changes, status) in enumerate(((((9, 2),), 2), (((9, 0),), 2), (((13, 1),), 3), (((13, 7), (8, 0)), 2))):
            name = f"damaged-{number}"
            self.make(name, "", "peer")
            qemu_io(self.path(name), "write -q -P 3 0 1M", "discard -q 512k 64k")  # cluster 13 is free now
            damage(name, *changes)
            before = open(self.path(name), "rb").read()
            ours, theirs = (json.loads(run(*tool, "check", "--output=json", self.path(name), check=False).stdout) for tool in
                            ((PROGRAM, "img"), ("qemu-img",)))
            self.assertEqual(ours, theirs)
            self.assertRegex(self.img("check", name, status=status), r"\d+ (errors|leaked clusters) were found on the image\.")
            self.assertEqual(open(self.path(name), "rb").read(), before, "a check changed the image")
            text = self.img("check", "-f", "qcow2", "-r", "all", name)
            self.assertRegex(text, r"The following inconsistencies were found and repaired:\n\n    \d+ leaked clusters\n")
            self.peer("check", name)
            self.assert_same_text("check", name)

    def test_raw(self):
        for maker in ("peer", "ours"):
            self.make(f"raw-{maker}", "preallocation=off", maker, image_format="raw")
            self.fill(f"raw-{maker}", self.size, "raw")
            self.compare(f"raw-{maker}", "raw")
        self.img("check", "raw-ours", status=63)
        self.peer("check", "raw-ours", status=63)

    def test_chain(self):
        self.make("base", "", "peer", image_format="raw")
        self.fill("base", self.size, "raw")
        self.make("mid", "", "ours", "-b", "base", "-F", "raw")
        self.fill("mid", self.size)
        self.peer("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", str(self.size + MIB))
        self.fill("top", self.size + MIB)
        for name in ("mid", "top"):
            self.compare(name)
        self.assert_same_json("info", "--backing-chain", "top")
        self.assert_same_text("info", "--backing-chain", "top")
        self.assert_same_text("map", "top")

    def test_random_maps(self):
        for turn in range(12 if FULL else 4):
            sizes = [self.random.randrange(1, 48) * 64 * KIB for _ in range(3)]
            backing = ()
            for layer, size in enumerate(sizes):
                options = self.random.choice(["cluster_size=64k", "cluster_size=4k", "cluster_size=512"])
                self.peer("create", "-q", "-f", "qcow2", "-o", options, *backing, f"layer-{layer}", str(size))
                self.fill(f"layer-{layer}", size, share=5, unit=512)
                backing = ("-b", f"layer-{layer}", "-F", "qcow2")
            self.assert_same_json("map", "layer-2")
            start, length = self.random.randrange(sizes[2] + 1000), self.random.randrange(1, sizes[2])
            self.assert_same_json("map", "-s", str(start), "-l", str(length), "layer-2")
            self.assert_same_text("map", f"--start-offset={start}", f"--max-length={length}", "layer-2")

    def test_measure_of_sizes(self):
        for size in ("0", "1", "512", "1G", "7T"):
            for target in ("raw", "qcow2"):
                self.assert_same_json("measure", "-O", target, "--size", size)
        for options in ("cluster_size=2M", "preallocation=metadata", "preallocation=full", "refcount_bits=64", "extended_l2=on"):
            self.assert_same_json("measure", "-O", "qcow2", "-o", options, "--size", "3G")
        self.assert_same_text("measure", "-O", "qcow2", "--size", "3G")


class CommandLine(ImgTestCase):
    """Exit statuses and words."""

    time_limit = 30

    def setUp(self):
        super().setUp()
        self.peer("create", "-q", "-f", "raw", "base", "1M")
        self.peer("create", "-q", "-f", "qcow2", "disk", "1M")
        self.peer("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")

    def both(self, line, status):
        """The same exit status, and an error begins with the program's name."""
        words = line.split()
        text = self.img(*words, status=status)
        self.peer(*words, status=status)
        if status == 1:
            self.assertRegex(text, r"(^|\n)interlock img(: | \w+: )", line)

    def test_mistakes(self):
        for line in (
            "", "nonsense", "--nonsense", "info", "info a b", "info --nonsense disk", "info missing", "info -f nonsense disk",
            "info --output=xml disk", "info --image-opts -f qcow2 disk", "info nonsense:disk", "info -f qcow2 base",
            "map", "map -s x disk", "map missing", "check missing", "check -r nonsense -f qcow2 disk", "check -T nonsense disk",
            "check -f qcow2 base", "measure", "measure --size 1G disk", "measure -O nonsense --size 1G", "measure --size x",
            "measure -f qcow2 --size 1G", "measure -O qcow2 -o nonsense=1 --size 1G", "measure -O qcow2 -o cluster_size=3 --size 1G",
            "resize", "resize disk", "resize -f qcow2 disk x", "resize -f qcow2 disk -512k", "resize -f qcow2 --shrink disk -2M",
            "resize -f qcow2 --preallocation=nonsense disk 2M", "resize -f qcow2 --shrink --preallocation=full disk 512k",
            "resize -f raw --preallocation=metadata base 2M", "resize -f qcow2 missing 2M", "resize -f qcow2 disk +9E",
            "create", "create -f qcow2", "create -f qcow2 new", "create -f qcow2 new x", "create -f qcow2 new 9E",
            "create -f nonsense new 1M", "create -f null-co new 1M", "create -f qcow2 new 1M more", "create -f qcow2 -o size=1M new 1M",
            "create -f qcow2 -o nonsense=1 new 1M", "create -f qcow2 -b base new", "create -f qcow2 -b missing -F raw new",
            "create -f qcow2 -b base -F nonsense new", "create -f qcow2 -b base -F qcow2 new", "create -f raw -b base -F raw new 1M",
            "create -f qcow2 -u -b missing -F raw new", "create -f qcow2 -F raw new 1M", "create -f qcow2 -b new -F qcow2 new",
            "create -f qcow2 missing/new 1M", "create -f qcow2 -o cluster_size=3 new 1M", "amend", "amend -f qcow2 disk",
            "amend -f raw -o size=1M base", "amend -f nonsense -o help",
        ):
            with self.subTest(line=line):
                self.both(line, 1)

    def test_what_is_printed(self):
        for line in (
            "create -f qcow2 new 1M", "create -q -f qcow2 new 1M", "create new 1M", "create -f raw -o preallocation=falloc new 513",
            "create -f qcow2 -b base -F raw new", "create -f qcow2 -b top -F qcow2 -o size=2M,lazy_refcounts=on new",
            "create -f qcow2 -o backing_file=a,,b,backing_fmt=raw,size=1M -u new",
            "create -f qcow2 -o compat=0.10 -o cluster_size=4k,preallocation=metadata new 1k",
            "resize -f qcow2 disk +1M", "resize -q -f qcow2 disk 3M", "resize -f raw base 1m", "resize -f qcow2 --shrink disk -1M",
            "resize --image-opts driver=qcow2,file.filename=disk 4M", "resize -f raw --preallocation=falloc base +1M",
            "resize -f qcow2 --preallocation=metadata disk +1M", "resize -f qcow2 --preallocation=full disk +1M",
            "check disk", "check -q disk", "map disk", "map top", "info top", "info file:top", "info -f raw disk",
            "measure --size 1G -O qcow2", "measure disk",
        ):
            with self.subTest(line=line):
                self.assert_same_text(*line.split())

    def test_writing_needs_a_format(self):
        for line in ("resize disk 2M", "amend -o lazy_refcounts=on disk", "check -r all disk"):
            text = self.img(*line.split(), status=1)
            self.assertIn("its content looks like qcow2", text)
        self.assertIn("driver=FORMAT", self.img("resize", "--image-opts", "file.filename=disk", "2M", status=1))
        with open(self.path("base"), "r+b") as base, open(self.path("disk"), "rb") as disk:
            base.write(disk.read(512))  # what a guest could write into a raw disk
        self.assertIn("looks like qcow2", self.img("resize", "base", "2M", status=1))
        self.img("resize", "-f", "raw", "base", "2M")
        self.assertEqual(os.path.getsize(self.path("base")), 2 * MIB)

    def test_names(self):
        for words in (
            ("json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "disk"}}),),
            ("json:" + json.dumps({"driver": "qcow2", "file.filename": "disk"}),),
            ("json:" + json.dumps({"file.filename": "disk"}),),
            ("--image-opts", "driver=qcow2,file.driver=file,file.filename=disk"),
            ("--image-opts", "driver=qcow2,file.filename=disk"),
            ("--image-opts", "file.filename=disk"),
            ("file:disk",),
            ("--image-opts", "driver=raw,offset=512,size=1024,file.filename=disk"),
        ):
            self.assert_same_json("map", *words)
        os.rename(self.path("disk"), self.path("ab:c"))
        self.assert_same_json("info", "./ab:c")
        for name in ("ab:c", "nbd://localhost/x", "nbd:unix:/x", "http://x/y", "ssh://x/y", 'json:{"driver":"nbd"}', "json:{", "json:[]"):
            self.img("info", name, status=1)
        self.assertRegex(self.img("info", "ssh://localhost/x", status=1), "Protocol 'ssh' is not supported")
        for words in ("driver=qcow2", "nonsense", "driver=nonsense,file.filename=x", "driver=qcow2,file.filename=x,nonsense=1"):
            self.img("info", "--image-opts", words, status=1)

    def test_formats_that_are_recognised_are_not_raw(self):
        for name, content in (("vmdk", b"KDMV"), ("vhdx", b"vhdxfile"), ("vdi", bytes(64) + bytes.fromhex("7f10dabe"))):
            with open(self.path(name), "wb") as image:
                image.write(content.ljust(1 * MIB, b"\0"))
            self.assertIn(f"'{name}', which is not supported", self.img("info", name, status=1))
            self.img("info", "-f", "raw", name)

    def test_personality(self):
        os.symlink(PROGRAM, self.path("qemu-img"))
        result = run(self.path("qemu-img"), "info", "missing", check=False, cwd=self.directory)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"^qemu-img: Could not open 'missing': ")
        version = run(self.path("qemu-img"), "--version").stdout
        self.assertRegex(version, r"^qemu-img version 10\.0\.\d+ \(Interlock ")
        theirs = set(re.findall(r"^  (\w+) - ", self.peer("--help"), re.MULTILINE))
        ours = set(re.findall(r"^  (\w+)  ", run(self.path("qemu-img"), "--help").stdout, re.MULTILINE))
        self.assertLessEqual(ours, theirs)
        for command in ours:
            self.assertIn(f"Usage: qemu-img {command} ", run(self.path("qemu-img"), command, "--help").stdout)

    def test_progress(self):
        line = self.img("amend", "-p", "-f", "qcow2", "-o", "refcount_bits=64", "disk")
        self.assertRegex(line, r"^(    \(\d+\.\d\d/100%\)\n)*    \(100\.00/100%\)\n$")
        with open(self.path("source"), "wb") as source:
            source.write(os.urandom(6 * MIB))
        words = [PROGRAM, "img", "convert", "-r", "3M", "-f", "raw", "-O", "raw", "source", "copy"]
        with subprocess.Popen(words, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 15
            while not (os.path.exists(self.path("copy")) and os.stat(self.path("copy")).st_blocks):
                self.assertLess(time.monotonic(), deadline, "nothing is copied")
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)
            output, errors = process.communicate(timeout=20)
        self.assertEqual((process.returncode, output), (0, b""))
        self.assertRegex(errors, rb"^    \(\d+\.\d\d/100%\)\n$")

    def test_output_that_cannot_be_written_is_an_error(self):
        with open("/dev/full", "w", encoding="utf-8") as full:
            line = [PROGRAM, "img", "info", self.path("disk")]
            self.assertEqual(subprocess.run(line, stdout=full, stderr=subprocess.DEVNULL, check=False).returncode, 1)

    def test_a_failed_creation_leaves_what_was_there(self):
        before = open(self.path("disk"), "rb").read()
        self.img("create", "-f", "qcow2", "-o", "cluster_size=3", "disk", "1M", status=1)
        self.img("create", "-f", "qcow2", "-b", "./disk", "-F", "qcow2", "disk", status=1)
        os.link(self.path("disk"), self.path("alias"))
        self.img("create", "-f", "qcow2", "-b", "alias", "-F", "qcow2", "disk", status=1)
        self.assertEqual(open(self.path("disk"), "rb").read(), before)


class Untrusted(ImgTestCase):
    """What is opened when somebody else's image is looked at."""

    time_limit = 30

    def traced(self, *words, status=0):
        """The files that were opened or looked for, and the sockets that were made."""
        log = self.path("trace")
        calls = "trace=%file,%network"
        result = run("strace", "-f", "-qq", "-e", calls, "-o", log, PROGRAM, "img", *words, check=False, cwd=self.directory)
        self.assertEqual(result.returncode, status, result.stdout + result.stderr)
        with open(log, encoding="utf-8", errors="replace") as lines:
            text = lines.read()
        self.assertIn("execve", text)
        self.assertNotRegex(text, r"\b(socket|connect)\(")
        return text

    def setUp(self):
        super().setUp()
        if SANITIZED:
            self.skipTest("a sanitizer opens files of its own, and does not run under strace")
        self.secret = self.path("private")
        with open(self.secret, "wb") as secret:
            secret.write(bytes(1 * MIB))

    def names(self):
        location = {"driver": "raw", "file": {"driver": "file", "filename": self.secret}}
        return [self.secret, "private", f"file:{self.secret}", "json:" + json.dumps(location), "nbd:unix:" + self.secret,
                f"nbd+unix:///?socket={self.secret}"]

    def test_info_opens_nothing_that_the_image_names(self):
        for number, name in enumerate(self.names()):
            image = f"image-{number}"
            self.peer("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", image, "1M")
            for words in (("info",), ("info", "-f", "qcow2"), ("info", "--output=json"), ("check",)):
                text = self.traced(*words, image)
                self.assertIn(f'"{image}"', text)
                self.assertNotIn("private", text.split("execve", 1)[1].split("\n", 1)[1])

    def test_info_opens_no_data_file(self):
        self.peer("create", "-q", "-f", "qcow2", "-o", f"data_file={self.secret}", "image", "1M")
        self.assertNotIn("private", self.traced("info", "image"))
        self.assert_same_json("info", "image")

    def test_chains_follow_paths_only(self):
        for number, name in enumerate(self.names()):
            image = f"image-{number}"
            self.peer("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", image, "1M")
            plain = number < 3
            text = self.traced("info", "--backing-chain", image, status=0 if plain else 1)
            self.assertEqual(plain, bool(re.search(r'open(at)?\([^\n]*private"', text)), name)

    def test_what_a_backing_file_holds_does_not_make_its_format(self):
        self.peer("create", "-q", "-f", "qcow2", "-u", "-b", self.secret, "-F", "raw", "guest", "1M")
        self.peer("create", "-q", "-f", "qcow2", "-u", "-b", "guest", "-F", "raw", "top", "1M")
        self.assertNotIn("private", self.traced("info", "--backing-chain", "top"))
        self.assertNotIn("private", self.traced("map", "top"))
