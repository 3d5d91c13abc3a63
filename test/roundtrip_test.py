# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 images in two hands: the peer's tools and ours take turns at one image, each of its features alone and in pairs.

A sequence makes an image with some features and then changes it in a few steps, each by a tool drawn by the seed. After
each step both tools must find the image clean, describe it alike (check, info, map, measure) and read the same content,
which is that of a model.
"""
import itertools
import json
import os
import subprocess

from harness import KIB, MIB, ROOT, TestCase, run, scale

SECTOR = 512
SECRET = "secret,id=key,data=interlock"
HANDS = {
    "peer": (["qemu-img"], ["qemu-io"]),
    "ours": ([os.path.join(ROOT, "build", "interlock"), "img"], [os.path.join(ROOT, "build", "interlock"), "io"]),
}

# What an image is made with: feature -> options of `create -o`.
CREATION = {
    "plain": {},
    "cluster-size": {"cluster_size": None},
    "version-2": {"compat": "0.10"},
    "refcount-bits": {"refcount_bits": None},
    "lazy": {"lazy_refcounts": "on"},
    "subclusters": {"extended_l2": "on"},
    "zstd": {"compression_type": "zstd"},
    "data-file": {"data_file": None},
    "data-file-raw": {"data_file": None, "data_file_raw": "on"},
    "metadata": {"preallocation": "metadata"},
    "falloc": {"preallocation": "falloc"},
    "full": {"preallocation": "full"},
    "luks": {"encrypt.format": "luks", "encrypt.key-secret": "key", "encrypt.iter-time": "10"},
    "aes": {"encrypt.format": "aes", "encrypt.key-secret": "key"},
    "backing": {},
}
# What is done with it: feature -> a method of Sequence.
DEEDS = ["compressed", "snapshots", "bitmaps", "resize", "amend", "rebase", "convert"]

VERSION_3 = {"refcount-bits", "lazy", "subclusters", "zstd", "data-file", "data-file-raw", "bitmaps"}
IMPOSSIBLE = {
    frozenset(pair)
    for pair in [
        *(("version-2", other) for other in VERSION_3),
        ("data-file", "data-file-raw"), ("data-file", "compressed"), ("data-file-raw", "compressed"),
        ("data-file", "snapshots"), ("data-file-raw", "snapshots"), ("data-file-raw", "backing"),
        ("data-file-raw", "rebase"), ("luks", "aes"), ("luks", "compressed"), ("aes", "compressed"),
        *itertools.combinations(["metadata", "falloc", "full"], 2),
        *itertools.product(["metadata", "falloc", "full"], ["compressed", "backing"]),
        # What was never written there is not zero: it is what the cipher makes of zeroes.
        *itertools.product(["metadata", "falloc", "full"], ["luks", "aes"]),
        # The format or the peer cannot:
        ("version-2", "luks"),
        ("data-file", "luks"), ("data-file-raw", "luks"), ("data-file", "aes"), ("data-file-raw", "aes"),
    ]
}
# Figures in which the two may differ: none of them is on disk.
IGNORED = {"actual-size", "dirty-flag"}


def possible(features):
    return not any(frozenset(pair) in IMPOSSIBLE for pair in itertools.combinations(features, 2))


def feature_sets():
    names = [*CREATION, *DEEDS]
    return [{name} for name in names] + [set(pair) for pair in itertools.combinations(names, 2) if possible(pair)]


def without(value):
    """The answer without what is ignored, at every depth."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if key not in IGNORED}
    return [without(inner) for inner in value] if isinstance(value, list) else value


class Sequence:
    def __init__(self, test, features, rng):
        self.test, self.features, self.rng = test, features, rng
        self.count = 0
        self.path = self.new_path()
        self.log = []
        self.cluster = 64 * KIB
        self.size = rng.choice([MIB, 2 * MIB, 3 * MIB + 64 * KIB])
        self.model = bytearray(self.size // SECTOR)  # the byte that fills each sector
        self.snapshots = {}
        self.bitmaps = set()
        self.encrypted = bool(features & {"luks", "aes"})
        self.raw_size = None

    def new_path(self, ending="qcow2"):
        self.count += 1
        return self.test.path(f"image-{self.count}.{ending}")

    def hand(self):
        return self.rng.choice(list(HANDS))

    # --- running the tools ---

    def image(self, path=None, read_only=False):
        """The arguments that name the image."""
        path = path or self.path
        if self.encrypted:
            return ["--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"]
        return ["-f", "qcow2", path]

    def secret(self):
        return ["--object", SECRET] if self.encrypted else []

    def img(self, hand, verb, *arguments, check=True):
        line = [*HANDS[hand][0], verb, *self.secret(), *arguments]
        self.log.append(" ".join(line))
        return run(*line, check=check)

    def io(self, hand, *commands):
        line = [*HANDS[hand][1], *self.secret()]
        for command in commands:
            line += ["-c", command]
        if self.encrypted:
            line += ["--image-opts", self.image()[1]]
        else:
            line += self.image()
        self.log.append(" ".join(f"'{word}'" if " " in word else word for word in line))
        result = run(*line)
        if "failed" in result.stdout + result.stderr or "rror" in result.stdout + result.stderr:
            raise AssertionError(f"{result.stdout}{result.stderr}")
        return result.stdout

    # --- making it ---

    def options(self):
        options = {}
        for feature in sorted(self.features & set(CREATION)):
            options.update(CREATION[feature])
        if "cluster_size" in options:
            options["cluster_size"] = 512 << self.rng.randrange(13)
            self.cluster = options["cluster_size"]
        if "extended_l2" in options and self.cluster < 16 * KIB:
            options["cluster_size"] = self.cluster = 16 * KIB
        if "refcount_bits" in options:
            options["refcount_bits"] = 1 << self.rng.randrange(7)
            if self.features & {"snapshots", "compressed"} and options["refcount_bits"] < 8:
                options["refcount_bits"] = 64
        if "data_file" in options:
            options["data_file"] = self.new_path("raw")
        return options

    def create(self):
        arguments = ["-q", "-f", "qcow2"]
        options = self.options()
        if options:
            arguments += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
        if "backing" in self.features:
            arguments += ["-b", self.make_base(self.model), "-F", "qcow2"]
        self.img(self.hand(), "create", *arguments, self.path, str(self.size))

    def make_base(self, model):
        """Another image of the same content as the model is to have below."""
        base = self.new_path()
        encrypted, self.encrypted = self.encrypted, False
        path, self.path = self.path, base
        self.img(self.hand(), "create", "-q", "-f", "qcow2", base, str(self.size))
        first = self.rng.randrange(len(model) // 2)
        count = self.rng.randrange(1, len(model) // 2)
        model[first : first + count] = bytes([7]) * count
        self.io(self.hand(), f"write -P 7 {first * SECTOR} {count * SECTOR}")
        self.encrypted, self.path = encrypted, path
        return base

    # --- steps ---

    def stretch(self, whole_clusters=False):
        per_cluster = max(self.cluster // SECTOR, 1)
        first = self.rng.randrange(len(self.model))
        count = self.rng.randrange(1, self.rng.choice([per_cluster, 3 * per_cluster, 700]) + 1)
        if whole_clusters:
            first -= first % per_cluster
            count += -count % per_cluster
        return first, min(count, len(self.model) - first)

    def write(self):
        commands = []
        for _ in range(self.rng.randrange(1, 6)):
            kind = self.rng.choice(["write", "write", "write", "zero", "unmap", "discard"])
            first, count = self.stretch(kind == "discard")
            where = f"{first * SECTOR} {count * SECTOR}"
            value = self.rng.randrange(1, 256) if kind == "write" else 0
            if kind == "discard" and "version-2" in self.features:
                kind = "zero"
            if kind == "discard" and count * SECTOR % self.cluster:
                continue
            self.model[first : first + count] = bytes([value]) * count
            commands.append(
                {"write": f"write -P {value} {where}", "zero": f"write -z {where}", "unmap": f"write -z -u {where}",
                 "discard": f"discard {where}"}[kind]
            )
        if commands:
            self.io(self.hand(), *commands)

    def compressed(self):
        """Into places that nothing was written to yet: what it replaces is replaced by a new image."""
        target = self.new_path()
        options = [f"{key}={value}" for key, value in self.options().items() if "data_file" not in key]
        arguments = ["-q", "-O", "qcow2", "-c"]
        if options:
            arguments += ["-o", ",".join(options)]
        self.img(self.hand(), "convert", *arguments, *self.image(), target)
        self.path = target
        self.features = self.features - {"backing"}
        self.snapshots, self.bitmaps = {}, set()

    def convert(self):
        if self.encrypted:
            return
        target = self.new_path()
        options = [f"{key}={value}" for key, value in self.options().items()]
        arguments = ["-q", "-O", "qcow2", *(["-W"] if self.rng.random() < 0.5 else [])]
        if options:
            arguments += ["-o", ",".join(options)]
        self.img(self.hand(), "convert", *arguments, *self.image(), target)
        self.path = target
        self.snapshots, self.bitmaps = {}, set()

    def snapshots_step(self):
        choice = self.rng.random()
        if choice < 0.5 or not self.snapshots:
            name = f"s{len(self.log)}"
            self.img(self.hand(), "snapshot", "-c", name, *self.image())
            self.snapshots[name] = bytes(self.model)
        elif choice < 0.75 and not self.bitmaps:  # with bitmaps none is applied
            name = self.rng.choice(sorted(self.snapshots))
            self.img(self.hand(), "snapshot", "-a", name, *self.image())
            self.model = bytearray(self.snapshots[name])
            self.size = len(self.model) * SECTOR
        else:
            name = self.rng.choice(sorted(self.snapshots))
            self.img(self.hand(), "snapshot", "-d", name, *self.image())
            del self.snapshots[name]

    def bitmaps_step(self):
        choice = self.rng.random()
        if self.encrypted:
            return
        if choice < 0.5 or not self.bitmaps:
            name = f"b{len(self.log)}"
            granularity = 512 << self.rng.randrange(10)
            self.img(self.hand(), "bitmap", "--add", "-g", str(granularity), *self.image(), name)
            self.bitmaps.add(name)
        else:
            name = self.rng.choice(sorted(self.bitmaps))
            verb = self.rng.choice(["--clear", "--enable", "--disable", "--remove"])
            self.img(self.hand(), "bitmap", verb, *self.image(), name)
            if verb == "--remove":
                self.bitmaps.discard(name)

    def resize(self):
        if self.snapshots or (self.features & {"data-file-raw"}):
            return
        sectors = self.rng.randrange(MIB // SECTOR, 4 * MIB // SECTOR)
        shrink = ["--shrink"] if sectors < len(self.model) else []
        if shrink and self.bitmaps:
            return
        hand = self.hand()
        self.img(hand, "resize", "-q", *shrink, *self.image(), str(sectors * SECTOR))
        end, self.size = len(self.model), sectors * SECTOR
        self.model = self.model[:sectors] + bytearray(max(0, sectors - end))
        if hand == "peer" and sectors > end:  # it shows what an earlier, larger size left behind in the last cluster
            raw = self.test.path("content.raw")
            self.img("peer", "convert", "-O", "raw", *self.image(), raw)
            with open(raw, "rb") as file:
                file.seek(end * SECTOR)
                left = file.read(-end * SECTOR % self.cluster)[::SECTOR]
            self.model[end : end + len(left)] = left
            os.unlink(raw)

    def amend(self):
        if self.snapshots or self.bitmaps or self.features & {"version-2", "data-file", "data-file-raw", "zstd"}:
            return
        options = self.rng.choice(["lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=16", "refcount_bits=64"])
        # The peer takes minutes to widen refcounts of clusters as large as that.
        widens = options == "refcount_bits=64" and self.cluster >= 256 * KIB
        self.img("ours" if widens else self.hand(), "amend", "-o", options, *self.image())

    def rebase(self):
        if self.encrypted or self.snapshots:  # what a snapshot shows of the backing file changes with it
            return
        base = self.make_base(bytearray(self.model))
        # Of an image of version 2 without a backing file the peer forgets what is zero.
        hand = "ours" if "version-2" in self.features else self.hand()
        self.img(hand, "rebase", "-b", base, "-F", "qcow2", *self.image())

    # --- looking ---

    def both(self, verb, *arguments, **more):
        answers = {}
        for hand in HANDS:
            result = self.img(hand, verb, "--output=json", *arguments, **more)
            answer = without(json.loads(result.stdout))
            if self.encrypted and verb == "info":  # the peer makes the options part of the name
                del answer["filename"]
            answers[hand] = (result.returncode, answer)
        if answers["peer"] != answers["ours"]:
            raise AssertionError(f"{verb}: the peer says {answers['peer']}\nwe say {answers['ours']}")
        return answers["ours"]

    def look(self, everything=False):
        status, checked = self.both("check", *self.image(), check=False)
        if status != 0:
            raise AssertionError(f"check: {checked}")
        if everything or self.rng.random() < 0.4:
            self.both("info", *self.image())
            self.both("map", *self.image())
        if everything or self.rng.random() < 0.2:
            self.both("measure", "-O", "qcow2", *self.image())
        for hand in HANDS if everything else [self.hand()]:
            self.compare(hand, self.model, [])
        if everything and not self.encrypted:
            for name, model in self.snapshots.items():
                self.compare(self.hand(), model, ["-l", f"snapshot.name={name}"])

    def compare(self, hand, model, arguments):
        raw = self.test.path("content.raw")
        self.img(hand, "convert", *arguments, "-O", "raw", *self.image(), raw)
        with open(raw, "rb") as file:
            content = file.read()
        os.unlink(raw)
        wanted = b"".join(bytes([value]) * (SECTOR * len(list(run_of))) for value, run_of in itertools.groupby(model))
        if content != wanted:
            place = next((i for i, (a, b) in enumerate(zip(content, wanted)) if a != b), min(len(content), len(wanted)))
            raise AssertionError(f"{hand} reads {len(content)} bytes, wanted {len(wanted)}; they differ at {place}")

    def run(self, steps):
        self.create()
        deeds = [getattr(self, {"snapshots": "snapshots_step", "bitmaps": "bitmaps_step"}.get(deed, deed))
                 for deed in sorted(self.features & set(DEEDS))]
        for _ in range(steps):
            self.write()
            for deed in deeds:
                if self.rng.random() < 0.7:
                    deed()
            self.look()
        self.look(everything=True)


class RoundTrip(TestCase):
    time_limit = 180

    def sequence(self, features, steps):
        sequence = Sequence(self, features, self.random)
        try:
            sequence.run(steps)
        except (AssertionError, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as problem:
            commands = "\n".join(sequence.log)
            raise AssertionError(f"features {sorted(features)}:\n{commands}\n{problem}") from problem
        for name in os.listdir(self.directory):
            os.unlink(self.path(name))

    def test_features_in_two_hands(self):
        sets = feature_sets()
        self.random.shuffle(sets)
        for number in range(scale(30, 1000)):
            self.sequence(sets[number % len(sets)], scale(2, 4))
