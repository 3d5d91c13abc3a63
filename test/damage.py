# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 images to be damaged: made by the peer with many features, and seeded changes of their metadata."""
import struct

from harness import KIB, MIB, qemu_img, qemu_io

OFFSET_MASK = 0x00FFFFFFFFFFFE00
SIZE = 2 * MIB


class Image:
    """A qcow2 file in memory, with its metadata at hand."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = bytearray(file.read())
        (self.version,) = struct.unpack_from(">I", self.data, 4)
        (self.cluster_bits,) = struct.unpack_from(">I", self.data, 20)
        self.cluster_size = 1 << self.cluster_bits
        (self.size,) = struct.unpack_from(">Q", self.data, 24)
        self.l1_size, self.l1_offset, self.table_offset, self.table_clusters, self.snapshots, self.snapshots_offset = (
            struct.unpack_from(">IQQIIQ", self.data, 36)
        )
        incompatible = self.load(72) if self.version > 2 else 0
        self.entry_bytes = 16 if incompatible & 16 else 8
        self.refcount_order = struct.unpack_from(">I", self.data, 96)[0] if self.version > 2 else 4

    def load(self, offset):
        return struct.unpack_from(">Q", self.data, offset)[0]

    def store(self, offset, value):
        struct.pack_into(">Q", self.data, offset, value & (1 << 64) - 1)

    def write(self, path):
        with open(path, "wb") as file:
            file.write(self.data)

    def l1_tables(self):
        """Offset and length of the active one and those of snapshots."""
        tables = [(self.l1_offset, self.l1_size)]
        at = self.snapshots_offset
        for _ in range(self.snapshots):
            offset, size, id_size, name_size = struct.unpack_from(">QIHH", self.data, at)
            (extra,) = struct.unpack_from(">I", self.data, at + 36)
            tables.append((offset, size))
            at += (40 + extra + id_size + name_size + 7) // 8 * 8
        return tables

    def l1_entries(self):
        return [offset + i * 8 for offset, size in self.l1_tables() for i in range(size) if self.load(offset + i * 8)]

    def l2_entries(self, active_only=False):
        tables = self.l1_tables()[:1] if active_only else self.l1_tables()
        found = []
        for l1_offset, l1_size in tables:
            for i in range(l1_size):
                table = self.load(l1_offset + i * 8) & OFFSET_MASK
                if table:
                    found += [at for at in range(table, table + self.cluster_size, self.entry_bytes) if self.load(at)]
        return found

    def blocks(self):
        entries = range(self.table_offset, self.table_offset + self.table_clusters * self.cluster_size, 8)
        return [self.load(at) for at in entries if self.load(at)]

    def some_cluster(self, random):
        return random.randrange(len(self.data) // self.cluster_size) * self.cluster_size


def make(directory, seed, random):
    """An image with a mixture of features; a snapshot often, compressed clusters, a backing file, bitmaps seldom."""
    backing = f"{directory}/back{seed}.raw"
    path = f"{directory}/base{seed}.qcow2"
    version = random.choice([2, 3, 3, 3])
    extended = version == 3 and random.random() < 0.2
    cluster = random.choice([16 * KIB, 64 * KIB] if extended else [512, 4 * KIB, 4 * KIB, 16 * KIB, 64 * KIB])
    options = [f"cluster_size={cluster}", f"compat={'0.10' if version == 2 else '1.1'}"]
    if extended:
        options.append("extended_l2=on")
    if version == 3:
        options.append(f"refcount_bits={random.choice([8, 16, 16, 32, 64])}")
    line = ["create", "-q", "-f", "qcow2", "-o", ",".join(options)]
    if random.random() < 0.5:
        qemu_img("create", "-q", "-f", "raw", backing, str(SIZE))
        qemu_io(backing, f"write -q -P 119 0 {SIZE}", image_format="raw")
        line += ["-b", backing, "-F", "raw"]
    qemu_img(*line, path, str(SIZE))
    offset = random.randrange(SIZE // (64 * KIB)) * 64 * KIB
    qemu_io(path, f"write -q -c -P {random.randrange(1, 255)} {offset} 64k")
    writes(path, random, 6)
    for number in range(random.choice([0, 1, 1, 2])):
        qemu_img("snapshot", "-c", f"s{number}", path)
        writes(path, random, 4)
    return path


def writes(path, random, count):
    commands = []
    for _ in range(count):
        length = random.randrange(1, 32) * 2 * KIB
        offset = random.randrange((SIZE - length) // 512) * 512
        if random.random() < 0.2:
            commands.append(f"write -q -z {offset} {length}")
        else:
            commands.append(f"write -q -P {random.randrange(1, 255)} {offset} {length}")
    qemu_io(path, *commands)


def bad_word(image, word, random):
    """What a word of a table may have become."""
    return random.choice(
        [
            lambda: word ^ 1 << random.randrange(64),
            lambda: word ^ 1 << random.randrange(9, 24),
            lambda: word ^ 1 << 63,
            lambda: 0,
            lambda: image.some_cluster(random) | word & 1 << 63,
            lambda: image.some_cluster(random) | 1 << 63,
            lambda: word + image.cluster_size * random.randrange(1, 4),
            lambda: 1 << 63 | 1 << random.randrange(24, 55),
            lambda: random.getrandbits(64),
        ]
    )()


def damage_entry(image, random):
    entries = image.l2_entries()
    for _ in range(random.choice([1, 1, 1, 4])):
        if entries:
            at = random.choice(entries)
            image.store(at, bad_word(image, image.load(at), random))


def damage_subclusters(image, random):
    entries = image.l2_entries()
    if image.entry_bytes == 16 and entries:
        image.store(random.choice(entries) + 8, random.getrandbits(64))


def damage_l1(image, random):
    entries = image.l1_entries()
    if entries:
        at = random.choice(entries)
        image.store(at, bad_word(image, image.load(at), random))


def damage_refcounts(image, random):
    block = random.choice(image.blocks())
    for _ in range(random.choice([1, 1, 8, 64])):
        if block + image.cluster_size <= len(image.data):
            at = block + random.randrange(min(image.cluster_size, 256))
            image.data[at] = random.choice([0, 1, 2, random.randrange(256)])


def damage_refcount_table(image, random):
    at = image.table_offset + random.choice([0, 0, 8, 16, 8 * random.randrange(image.cluster_size // 8)])
    image.store(at, bad_word(image, image.load(at), random))


def damage_snapshots(image, random):
    if image.snapshots:
        at = image.snapshots_offset + random.randrange(56)
        image.data[at] ^= 1 << random.randrange(8)


def damage_table(image, random):
    """A whole table becomes something else."""
    tables = sorted({image.load(at) & OFFSET_MASK for at in image.l1_entries()} | set(image.blocks()))
    at = random.choice(tables)
    filling = random.choice([bytes(image.cluster_size), b"\xff" * image.cluster_size, random.randbytes(image.cluster_size)])
    image.data[at : at + image.cluster_size] = filling


def damage_header(image, random):
    """Fields whose change leaves an image that can be opened, sometimes."""
    offset, length = random.choice([(48, 8), (56, 4), (60, 4), (64, 8), (72 if image.version > 2 else 60, 1)])
    at = offset + random.randrange(length)
    image.data[at] ^= 1 << random.randrange(8)


def damage_length(image, random):
    del image.data[len(image.data) - random.randrange(1, 3 * image.cluster_size) :]


KINDS = [
    (8, damage_entry),
    (2, damage_subclusters),
    (4, damage_l1),
    (4, damage_refcounts),
    (3, damage_refcount_table),
    (2, damage_snapshots),
    (1, damage_table),
    (2, damage_header),
    (1, damage_length),
]


def damage(image, random, kinds=None):
    """Returns what was done, in words."""
    names = []
    for _ in range(random.choice([1, 1, 2, 3])):
        kind = random.choices([kind for _, kind in kinds or KINDS], [weight for weight, _ in kinds or KINDS])[0]
        try:
            kind(image, random)
        except (struct.error, IndexError):
            continue  # what was damaged before leads nowhere now
        names.append(kind.__name__)
    return ", ".join(names)
