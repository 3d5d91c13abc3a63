# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 images made byte by byte, so that any field can be wrong. Offsets as in the qcow2 specification."""
import struct

CLUSTER = 64 * 1024
SIZE = 8 * 1024 * 1024
TABLE, BLOCK, L1, L2, DATA = (i * CLUSTER for i in range(1, 6))
COPIED = 1 << 63
COMPRESSED = 1 << 62

# field -> (offset in the header, struct format)
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "table_offset": (48, ">Q"),
    "table_clusters": (56, ">I"),
    "snapshot_count": (60, ">I"),
    "snapshot_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression": (104, ">I"),
}
GOOD = {
    "magic": 0x514649FB,
    "version": 3,
    "cluster_bits": 16,
    "size": SIZE,
    "l1_size": 1,
    "l1_offset": L1,
    "table_offset": TABLE,
    "table_clusters": 1,
    "refcount_order": 4,
    "header_length": 112,
}


def qcow2_bytes(extensions=b"", backing=None, words=None, refcounts=None, length=6 * CLUSTER, **fields):
    """A valid image with one allocated cluster, but for what the arguments say. `words` are {offset: 64-bit value}."""
    image = bytearray(6 * CLUSTER)
    values = {**GOOD, **fields}
    if backing is not None:
        start = values["header_length"] + len(extensions) + 8
        values.setdefault("backing_offset", start)
        values.setdefault("backing_size", len(backing))
        image[start : start + len(backing)] = backing
    for name, value in values.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, image, offset, value)
    if extensions:
        image[112 : 112 + len(extensions)] = extensions
    struct.pack_into(">Q", image, TABLE, BLOCK)
    struct.pack_into(">6H", image, BLOCK, *(refcounts or [1] * 6))
    struct.pack_into(">Q", image, L1, L2 | COPIED)
    struct.pack_into(">Q", image, L2, DATA | COPIED)
    image[DATA : DATA + CLUSTER] = b"\x5a" * CLUSTER
    for offset, value in (words or {}).items():
        struct.pack_into(">Q", image, offset, value)
    return bytes(image[:length])


def extension(kind, data, length=None):
    padded = data + bytes(-len(data) % 8)
    return struct.pack(">II", kind, len(data) if length is None else length) + padded


def feature_name(kind, bit, name):
    return extension(0x6803F857, struct.pack(">BB46s", kind, bit, name))
