#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures `interlock img convert` and `compare` beside qemu-img, in one run, in tmpfs.

The two take turns (A B A B) within each row; a row shows the median of the rounds, with the least and the greatest. A
target is removed before each run and compared with its source after the last; before each run free memory is touched
(unless `--cold`). `floor` is the fastest of the ways that we know to fill a new file in memory (floor.c). `--one`
repeats the compressed rows on one processor.
The last rows are no race with the peer: what 4 KiB requests to qcow2 cost beside the same ones to raw, in our
program, once the tables are cached; each run stands between two on raw, the figure is the median of these ratios.
"""
import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from run import copying_floor, warm_memory

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, os.environ.get("INTERLOCK_BUILD", "build"), "interlock")
MIB = 1024 * 1024


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"bench: {' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")


def make_sources(directory, size):
    """Random bytes; text-like ones; zeroes with some data; holes with some data."""
    chance = random.Random(1)
    noise = chance.randbytes(MIB)
    words = [bytes(chance.choices(b"abcdefghijklmnop \n", k=chance.randrange(3, 12))) for _ in range(500)]
    text = b"".join(chance.choices(words, k=300000))[:MIB]
    with open(os.path.join(directory, "random.raw"), "wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    with open(os.path.join(directory, "text.raw"), "wb") as file:
        for _ in range(size // 4 // MIB):
            start = chance.randrange(MIB)
            file.write(text[start:] + text[:start])
    with open(os.path.join(directory, "zeroes.raw"), "wb") as file:
        for _ in range(size // MIB):
            block = bytearray(MIB)
            if chance.random() < 0.3:
                at = chance.randrange(16) * 65536
                block[at:at + 65536] = noise[:65536]
            file.write(block)
    with open(os.path.join(directory, "sparse.raw"), "wb") as file:
        file.truncate(8 * size)
        for _ in range(size // MIB * 2):
            file.seek(chance.randrange(8 * size // 65536) * 65536)
            file.write(noise[:65536])
    for name in ("random", "sparse"):
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{directory}/{name}.raw", f"{directory}/{name}.qcow2")


def measure(directory, arguments, rounds, warm, prefix=()):
    """Seconds of each program, by round; the target is `out`."""
    out = os.path.join(directory, "out")
    took = {"peer": [], "ours": []}
    for _ in range(rounds):
        for name, program in (("peer", ["qemu-img"]), ("ours", [PROGRAM, "img"])):
            if os.path.exists(out):
                os.unlink(out)
            warm_memory(warm)
            begin = time.perf_counter()
            run(*prefix, *program, *arguments)
            took[name].append(time.perf_counter() - begin)
    return took


def show(title, took):
    words = []
    for name in ("peer", "ours"):
        times = took[name]
        words.append(f"{statistics.median(times):7.3f} ({min(times):.3f}–{max(times):.3f})")
    ratio = statistics.median(took["peer"]) / statistics.median(took["ours"])
    print(f"{title:<34} {words[0]:>24} {words[1]:>24} {ratio:6.2f}", flush=True)


def cost_of_format(directory, rounds):
    def seconds(image_format, more):
        words = [PROGRAM, "img", "bench", "-f", image_format, "-c", "100000", "-d", "32", "-S", "1585152", *more,
                 f"{directory}/random.{image_format}"]
        return float(re.search(r"in ([\d.]+) seconds", subprocess.run(words, capture_output=True, text=True).stdout)[1])
    for title, more in (("read", []), ("write", ["-w"])):
        ratios = []
        for _ in range(rounds):
            before, ours, after = seconds("raw", more), seconds("qcow2", more), seconds("raw", more)
            ratios.append(2 * ours / (before + after))
        print(f"4 KiB {title}, depth 32, qcow2 : raw {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f}–{max(ratios):.3f})", flush=True)


def rows(directory):
    def convert(source, source_format, target_format, *more):
        return ["convert", "-f", source_format, "-O", target_format, *more,
                f"{directory}/{source}.{source_format}", f"{directory}/out"]
    yield "random, raw to qcow2", convert("random", "raw", "qcow2"), False
    yield "random, qcow2 to raw", convert("random", "qcow2", "raw"), False
    yield "mostly zero, raw to qcow2", convert("zeroes", "raw", "qcow2"), False
    yield "sparse, raw to qcow2", convert("sparse", "raw", "qcow2"), False
    yield "sparse, qcow2 to raw", convert("sparse", "qcow2", "raw"), False
    for kind in ("zlib", "zstd"):
        yield f"text, compressed ({kind})", convert("text", "raw", "qcow2", "-c", "-o", f"compression_type={kind}"), True
    yield "compare, random", ["compare", "-f", "raw", "-F", "qcow2", f"{directory}/random.raw",
                              f"{directory}/random.qcow2"], False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, help="MiB of data in the large sources")
    parser.add_argument("--directory", default="/dev/shm")
    parser.add_argument("--cold", action="store_true", help="take free memory as it is (run.py, warm_memory)")
    parser.add_argument("--one", action="store_true", help="the compressed rows on one processor too")
    parser.add_argument("words", nargs="*", help="only rows with one of these words")
    options = parser.parse_args()
    warm = 0 if options.cold else options.size * 3 // 2
    directory = tempfile.mkdtemp(prefix="interlock-convert-", dir=options.directory)
    try:
        make_sources(directory, options.size * MIB)
        warm_memory(warm)
        way, floor = copying_floor(directory, options.size, options.rounds)
        print(f"floor of {options.size} MiB: {floor:.3f} s ({way})")
        print(f"{'seconds':<34} {'qemu-img':>24} {'interlock':>24} {'ratio':>6}")
        for title, arguments, scales in rows(directory):
            if options.words and not any(word in title for word in options.words):
                continue
            show(title, measure(directory, arguments, options.rounds, warm))
            if arguments[0] == "convert":
                source, target = arguments[-2:]
                formats = arguments[2], arguments[4]
                run("qemu-img", "compare", "-f", formats[0], "-F", formats[1], source, target)
            if scales and options.one:
                show(f"{title}, 1 processor", measure(directory, arguments, options.rounds, warm,
                                                            ["taskset", "-c", "0"]))
        if not options.words or "4 KiB" in options.words:
            cost_of_format(directory, 4 * options.rounds)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
