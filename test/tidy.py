#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""House rules that a program can check: floors, sizes, names, formatting, leftovers.

`./dev tidy` runs this. Each rule is one function that yields findings for one file or for the whole tree; the tables
that they work from stand first. A finding that is right to keep stands in test/tidy-allow.txt as
`rule path: reason`; an entry there that no finding needs any more is itself a finding, so the list only shrinks.
"""
import argparse
import collections
import concurrent.futures
import os
import re
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The floors (doc/architecture.md): a file may include what lies on lower floors and in its own folder.
FLOORS = {
    "src/base": 0,
    "src/loop": 1,
    "src/access": 2,
    "src/crypto": 2,
    "src/block": 3,
    "src/copy": 4,
    "src/driver": 5,
    "src/job": 6,
    "src/export": 6,
    "src/control": 7,
    "src/tool": 8,
}
# Generated headers (schema/) carry types and claims as data: the floors from which they may be used.
GENERATED_FLOOR = 3

MAX_FILE_LINES = 1000
MAX_FUNCTION_LINES = 100
MAX_IN_TREE_HEADERS = 25

# Calls that can block, read a clock, draw randomness or make a thread belong to src/loop alone.
FORBIDDEN_CALLS = frozenset(
    """open openat creat read write pread pwrite readv writev preadv pwritev fsync fdatasync ftruncate fallocate
    lseek stat fstat lstat poll ppoll select epoll_wait accept accept4 connect recv recvmsg send sendmsg sleep usleep
    nanosleep clock_gettime gettimeofday time rand random srand srandom getrandom pthread_create pthread_mutex_lock
    pthread_cond_wait fork system popen g_usleep g_thread_new g_get_monotonic_time g_get_real_time g_random_int
    g_random_int_range g_file_get_contents g_file_set_contents ioctl copy_file_range sendfile mmap""".split()
)
# Programs: clients of a running daemon, and the daemon's own start and end. They may block.
BLOCKING_PROGRAMS = "src/tool/"

FORBIDDEN_ANYWHERE = {
    "strcpy": "use g_strlcpy or g_strdup",
    "strcat": "use g_strconcat or GString",
    "sprintf": "use g_strdup_printf",
    "vsprintf": "use g_strdup_vprintf",
    "gets": "never",
    "alloca": "a size from outside could overflow a pooled coroutine stack",
    "atoi": "use size.h or g_ascii_string_to_unsigned",
    "strtok": "use g_strsplit",
    "malloc": "use g_new / g_malloc / g_try_malloc (g_free must match)",
}

LEFTOVERS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|\bst" r"ub\b|\bfor " r"now\b|not yet imple" r"mented")
MACHINE_PATHS = re.compile(r"/(?:wor" r"k/(?:main|shared)|tmp/" r"wt|home/[a-z]+|root/)")

SPDX = "SPDX-License-Identifier: LGPL-2.1-or-later"
NEEDS_SPDX = (".c", ".h", ".py", ".sh", ".S", ".build")

Finding = collections.namedtuple("Finding", "rule path line text")


class Source:
    """One file of the tree, read once, with its comments and strings blanked out for the rules on code."""

    def __init__(self, path, text):
        self.path = path
        self.text = text
        self.lines = text.splitlines()
        self._code = None

    @property
    def code(self):
        if self._code is None:
            self._code = blank_comments_and_strings(self.text)
        return self._code

    def line_of(self, offset):
        return self.text.count("\n", 0, offset) + 1


TOKENS = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)


def blank_comments_and_strings(text):
    """The text with the same line numbers and offsets; the names in #include "..." stay."""
    includes = [match.span() for match in re.finditer(r"^[ \t]*#[ \t]*include[^\n]*", text, re.MULTILINE)]

    def blank(match):
        if match.group().startswith('"') and any(start <= match.start() < end for start, end in includes):
            return match.group()
        return re.sub(r"[^\n]", " ", match.group())

    return TOKENS.sub(blank, text)


def is_c(path):
    return path.endswith((".c", ".h"))


def folder_of(path):
    """The folder that the floors know, or None: src/driver/format/qcow2/x.c -> src/driver."""
    parts = path.split("/")
    name = "/".join(parts[:2])
    return name if name in FLOORS else None


def driver_of(path):
    """What one driver owns under src/driver: a sub-folder, or a family of files by the first word of their name."""
    rest = path.split("/")[2:]
    if len(rest) > 1:
        return "/".join(rest[:-1])
    return re.split(r"[_.]", rest[0])[0]


INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def includes_of(source):
    for match in INCLUDE.finditer(source.code):
        yield match.group(1), source.line_of(match.start())


def rule_floors(source, tree):
    folder = folder_of(source.path)
    if folder is None or not is_c(source.path):
        return
    floor = FLOORS[folder]
    for include, line in includes_of(source):
        target = "src/" + include
        target_folder = folder_of(target)
        if target_folder is None:
            if not include.startswith("schema/"):
                yield line, f'includes "{include}", which no floor has'
            elif floor < GENERATED_FLOOR:
                yield line, f'includes generated "{include}" below floor {GENERATED_FLOOR}'
            continue
        if FLOORS[target_folder] > floor:
            yield line, f'{folder} (floor {floor}) includes "{include}" (floor {FLOORS[target_folder]}): upward'
        elif FLOORS[target_folder] == floor and target_folder != folder:
            yield line, f'{folder} includes "{include}": folders on the same floor do not use each other'
        elif folder == "src/driver" and target_folder == folder and os.path.basename(source.path) != "drivers.c":
            if driver_of(target) not in (driver_of(source.path), "drivers"):
                yield line, f'driver {driver_of(source.path)} includes "{include}": drivers never use each other'


def rule_include_style(source, tree):
    if not is_c(source.path) or not source.path.startswith("src/"):
        return
    count = 0
    for include, line in includes_of(source):
        count += 1
        beside = os.path.join(os.path.dirname(source.path), include)
        if "/" not in include and beside in tree:
            yield line, f'includes "{include}": write the path from src/'
    if count > MAX_IN_TREE_HEADERS:
        yield 1, f"includes {count} headers of the tree (at most {MAX_IN_TREE_HEADERS})"


def rule_file_size(source, tree):
    if is_c(source.path) or source.path.endswith(".py"):
        if len(source.lines) > MAX_FILE_LINES:
            yield 1, f"{len(source.lines)} lines (at most {MAX_FILE_LINES})"


FUNCTION_END = re.compile(r"^}", re.MULTILINE)
FUNCTION_START = re.compile(r"^\{", re.MULTILINE)


def functions_of(source):
    """(name, first line, number of lines) of every function: in this layout its braces stand in column 0."""
    code = source.code
    position = 0
    while True:
        start = FUNCTION_START.search(code, position)
        if not start:
            return
        end = FUNCTION_END.search(code, start.end())
        if not end:
            return
        position = end.end()
        head_start = max(code.rfind(mark, 0, start.start()) for mark in ";}#")
        head = code[head_start + 1 : start.start()]
        name = re.search(r"([A-Za-z_]\w*)\s*\(", head)
        if name:
            first = source.line_of(start.start())
            yield name.group(1), first, source.line_of(end.start()) - first + 1


def rule_function_size(source, tree):
    if not source.path.endswith((".c", ".h")):
        return
    for name, line, length in functions_of(source):
        if length > MAX_FUNCTION_LINES:
            yield line, f"{name}() has {length} lines (at most {MAX_FUNCTION_LINES})"


def rule_licence(source, tree):
    if source.path.endswith(NEEDS_SPDX) or source.path in ("dev", ".ci/run"):
        if not any(SPDX in line for line in source.lines[:3]):
            yield 1, f"no '{SPDX}' in its first lines"


def rule_leftovers(source, tree):
    if source.path == "LICENSE":
        return
    for number, line in enumerate(source.lines, 1):
        match = LEFTOVERS.search(line)
        if match:
            yield number, f"leftover '{match.group()}'"


def rule_machine_paths(source, tree):
    for number, line in enumerate(source.lines, 1):
        match = MACHINE_PATHS.search(line)
        if match:
            yield number, f"a path of one machine: '{match.group()}'"


def rule_typedefs(source, tree):
    if not is_c(source.path):
        return
    for match in re.finditer(r"\btypedef\s+(struct|union|enum)\b", source.code):
        yield source.line_of(match.start()), f"typedef of a {match.group(1)}: write '{match.group(1)} name' where it is used"


CALL = re.compile(r"(?<![\w.>])([A-Za-z_]\w*)\s*\(")


def calls_of(source):
    for match in CALL.finditer(source.code):
        before = source.code[: match.start()].rstrip()
        if before.endswith("->") or before.endswith("."):
            continue
        yield match.group(1), source.line_of(match.start())


def rule_forbidden_calls(source, tree):
    if not source.path.startswith("src/") or not is_c(source.path):
        return
    folder = folder_of(source.path)
    may_block = folder in ("src/loop",) or source.path.startswith(BLOCKING_PROGRAMS)
    may_block = may_block or source.path.endswith(("_test.c", "_testing.c"))  # tests, and what they share
    for name, line in calls_of(source):
        if name in FORBIDDEN_CALLS and not may_block:
            yield line, f"calls {name}(): only src/loop may block, read a clock, draw randomness or make threads"
        if name in FORBIDDEN_ANYWHERE:
            yield line, f"calls {name}(): {FORBIDDEN_ANYWHERE[name]}"


def rule_header_guard(source, tree):
    if not source.path.endswith(".h"):
        return
    name = re.sub(r"^src/", "", source.path)
    guard = "INTERLOCK_" + re.sub(r"[^A-Za-z0-9]", "_", name).upper()
    if not re.search(rf"^#ifndef {guard}\n#define {guard}\b", source.text, re.MULTILINE):
        yield 1, f"no include guard {guard}"


def rule_opening_comment(source, tree):
    """Every .c of the daemon says first what it owns and what it does not do."""
    if not source.path.startswith("src/") or not source.path.endswith(".c") or source.path.endswith("_test.c"):
        return
    body = "\n".join(source.lines[1:])
    match = re.match(r"\s*/\*(.*?)\*/", body, re.DOTALL)
    wanted = 3 if len(source.lines) > 100 else 2
    if not match or len(match.group(1).strip().splitlines()) < wanted:
        yield 1, "does not open with a comment on what it owns"


def rule_mechanisms(source, tree):
    """doc/mechanisms.md names homes: each path that it names exists."""
    if source.path not in ("doc/mechanisms.md", "README.md", "doc/architecture.md"):
        return
    for match in re.finditer(r"`((?:src|schema|test|doc|fuzz|bench)/[\w./-]+\.\w+)`", source.text):
        if match.group(1) not in tree and not os.path.exists(os.path.join(ROOT, match.group(1))):
            yield source.line_of(match.start()), f"names {match.group(1)}, which is not there"


FILE_RULES = {
    "floors": rule_floors,
    "include-style": rule_include_style,
    "file-size": rule_file_size,
    "function-size": rule_function_size,
    "licence": rule_licence,
    "leftovers": rule_leftovers,
    "machine-paths": rule_machine_paths,
    "typedefs": rule_typedefs,
    "forbidden-calls": rule_forbidden_calls,
    "header-guard": rule_header_guard,
    "opening-comment": rule_opening_comment,
    "mechanisms": rule_mechanisms,
}


def check_file_rules(tree):
    for source in tree.values():
        for rule, function in FILE_RULES.items():
            for line, text in function(source, tree) or ():
                yield Finding(rule, source.path, line, text)


def check_format(root, paths):
    """clang-format leaves every file as it is."""
    paths = [path for path in paths if is_c(path)]
    if not paths:
        return
    chunks = [paths[i::4] for i in range(4) if paths[i::4]]

    def run(chunk):
        return subprocess.run(["clang-format", "--dry-run", *chunk], cwd=root, capture_output=True, text=True).stderr

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = set()
        for output in pool.map(run, chunks):
            for match in re.finditer(r"^(\S+?):(\d+):\d+: (?:warning|error): code should be clang-formatted", output, re.MULTILINE):
                if match.group(1) not in seen:
                    seen.add(match.group(1))
                    yield Finding("format", match.group(1), int(match.group(2)), "not as clang-format writes it (./dev tidy --fix)")


def compile_flags(root):
    """Include paths and dependencies for a header on its own. Generated headers come from the build folder."""
    packages = ["glib-2.0", "jansson", "liburing"]
    flags = subprocess.run(["pkg-config", "--cflags", *packages], capture_output=True, text=True, check=True).stdout
    builds = ("build", "build-debug", "build-asan", "build-tsan", "build-fuzz")
    built = [f"-I{build}" for build in builds if os.path.isdir(os.path.join(root, build, "schema"))]
    return ["-std=gnu17", "-D_GNU_SOURCE", "-Isrc", "-I.", *built[:1], *shlex.split(flags)]


def check_headers(root, paths):
    """Each header compiles alone, so that the order of includes never matters."""
    headers = [path for path in paths if path.endswith(".h")]
    if not headers:
        return
    flags = compile_flags(root)

    def compile_one(path):
        name = re.sub(r"^src/", "", path)
        unit = f'#include "{name}"\n#include "{name}"\n' if path.startswith("src/") else f'#include "{path}"\n'
        command = ["gcc", "-x", "c", "-fsyntax-only", *flags, "-"]
        return path, subprocess.run(command, cwd=root, input=unit, capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, result in pool.map(compile_one, headers):
            if result.returncode != 0:
                first = next((l for l in result.stderr.splitlines() if "error" in l), result.stderr[:200])
                yield Finding("self-contained", path, 1, f"does not compile alone: {first}")


def read_allow_list(root):
    path = os.path.join(root, "test/tidy-allow.txt")
    allowed = {}
    if not os.path.exists(path):
        return allowed
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = re.fullmatch(r"(\S+) (\S+): (\S.{9,})", line)
            if not match:
                raise SystemExit(f"test/tidy-allow.txt:{number}: want 'rule path: reason', the reason in words")
            allowed[match.group(1), match.group(2)] = number
    return allowed


def load_tree(root):
    """Every tracked or new file that git does not ignore, but for binary ones."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=True
    ).stdout.decode()
    tree = {}
    for path in sorted(set(filter(None, listing.split("\0")))):
        full = os.path.join(root, path)
        if not os.path.isfile(full) or path.startswith("fuzz/corpus/"):
            continue
        with open(full, "rb") as data:
            raw = data.read()
        if b"\0" in raw[:8000]:
            continue
        tree[path] = Source(path, raw.decode("utf-8", "replace"))
    return tree


def apply_allow_list(findings, allowed):
    """What is left of the findings, and a finding for each entry of the list that nothing needs."""
    used = set()
    for finding in findings:
        key = (finding.rule, finding.path)
        if key in allowed:
            used.add(key)
        else:
            yield finding
    for (rule, path), number in allowed.items():
        if (rule, path) not in used:
            yield Finding("allow-list", "test/tidy-allow.txt", number, f"'{rule} {path}' is not needed any more: remove it")


def run(root):
    """Rule name -> findings, for every rule."""
    tree = load_tree(root)
    found = list(check_file_rules(tree))
    found += check_format(root, tree)
    found += check_headers(root, tree)
    result = {rule: [] for rule in [*FILE_RULES, "format", "self-contained", "allow-list"]}
    for finding in apply_allow_list(found, read_allow_list(root)):
        result[finding.rule].append(finding)
    return result


def main():
    parser = argparse.ArgumentParser(prog="./dev tidy", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result = run(arguments.root)
    total = sum(map(len, result.values()))
    for findings in result.values():
        for finding in findings:
            print(f"{finding.path}:{finding.line}: {finding.rule}: {finding.text}")
    print(f"tidy: {len(result)} rules, {total} findings")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
