#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the tests: one line for each, and at the end `N passed, N failed, N skipped`.

  run.py check [--quick] [NAME…]   everything that ./dev check runs; the builds are there already
  run.py long [NAME…]              the whole-program suites in full
  run.py fuzz [TARGET] [SECONDS]   fuzz targets
  run.py suite MODULE.CLASS        one class of tests in this process, as the above start it (a line for each test)

A whole-program test is a method of a harness.TestCase in test/*_test.py. Each class runs in a process of its own, two
at a time; those marked `exclusive` run alone.
"""
import argparse
import concurrent.futures
import glob
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FOLDERS = {"release": "build", "debug": "build-debug", "asan": "build-asan", "tsan": "build-tsan"}
FUZZ_BUILD = os.path.join(ROOT, "build-fuzz", "fuzz")
FUZZ_SLICE_SECONDS = 6
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True


class Results:
    """The one place that prints and counts results; used from several threads."""

    def __init__(self, names):
        self.names = names
        self.lock = threading.Lock()
        self.counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
        self.failed = []
        self.start = time.monotonic()

    def wants(self, name):
        return not self.names or any(wanted in name for wanted in self.names)

    def add(self, verdict, name, seconds=0.0, detail=""):
        if not self.wants(name):
            return
        with self.lock:
            self.counts[verdict] += 1
            line = f"{verdict} {name}"
            if verdict == "SKIP":
                line += f": {detail}"
            elif seconds >= 0.05:
                line += f" ({seconds:.1f} s)"
            print(line)
            if verdict == "FAIL":
                self.failed.append(name)
                print("\n".join("    " + text for text in detail.rstrip().splitlines()[-120:]))
            sys.stdout.flush()

    def finish(self):
        print(f"\n{time.monotonic() - self.start:.0f} seconds")
        for name in self.failed:
            print(f"failed: {name}")
        print("{PASS} passed, {FAIL} failed, {SKIP} skipped".format(**self.counts))
        return 1 if self.counts["FAIL"] else 0


def test_name(identity):
    """module_test.Class.test_method -> module-method."""
    module, _, method = identity.split(".", 2)
    return f"{module.removesuffix('_test')}-{method.removeprefix('test_')}".replace("_", "-")


# ---- tidy ----------------------------------------------------------------------------------------------------------


def run_tidy(results):
    import tidy

    start = time.monotonic()
    found = tidy.run(ROOT)
    seconds = (time.monotonic() - start) / len(found)
    for rule, findings in found.items():
        text = "\n".join(f"{finding.path}:{finding.line}: {finding.text}" for finding in findings)
        results.add("FAIL" if findings else "PASS", f"tidy-{rule}", seconds, text)


# ---- unit tests ----------------------------------------------------------------------------------------------------

TAP = re.compile(r"^(not )?ok \d+(?: -)? (\S+)(.*)$", re.MULTILINE)


def run_unit_tests(results, build):
    """meson's tests of one build, with a line for each case that their TAP output names."""
    folder = os.path.join(ROOT, FOLDERS[build])
    log_base = f"check-{os.getpid()}"  # several runs may share a build folder
    log = os.path.join(folder, "meson-logs", f"{log_base}.json")
    label = "" if build == "release" else f" [{build}]"
    command = ["meson", "test", "-C", folder, "--no-rebuild", "--quiet", "--logbase", log_base]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if not os.path.exists(log):
        if "No tests" not in result.stdout + result.stderr:
            results.add("FAIL", f"unit-tests{label}", 0, result.stdout + result.stderr)
        return
    with open(log, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            add_unit_record(results, record, label)
    for path in glob.glob(os.path.join(folder, "meson-logs", f"{log_base}*")):
        os.unlink(path)


def add_unit_record(results, record, label):
    output = record.get("stdout") or ""
    errors = record.get("stderr") or ""
    cases = TAP.findall(output)
    name = f"unit-{record['name'].split(':')[-1].strip()}"
    for failed, case, rest in cases:
        case_name = f"{name}{case if case.startswith('/') else '/' + case}{label}"
        if "# SKIP" in rest:
            results.add("SKIP", case_name, 0, rest.split("# SKIP")[1].strip() or "no reason given")
        else:
            results.add("FAIL" if failed else "PASS", case_name, 0, output[-4000:] + errors[-8000:])
    if record["result"] not in ("OK", "EXPECTEDFAIL", "SKIP") and not any(failed for failed, _, _ in cases):
        results.add("FAIL", f"{name}{label}", record["duration"], f"{record['result']}\n{output[-4000:]}{errors[-8000:]}")
    elif not cases:
        results.add("PASS", f"{name}{label}", record["duration"])


# ---- Python tests --------------------------------------------------------------------------------------------------


def generator_classes():
    """Tests of the schema's generator: plain unittest files beside it."""
    return sorted(glob.glob(os.path.join(ROOT, "schema", "*_test.py")))


def run_generator_tests(results):
    for path in generator_classes():
        module = os.path.basename(path).removesuffix(".py")
        command = [sys.executable, os.path.join(HERE, "run.py"), "suite", module]
        stream_suite(results, command, {**os.environ, "PYTHONPATH": os.path.dirname(path)}, "", module)


def suite_classes():
    """Every harness.TestCase of test/*_test.py."""
    import harness

    found = []
    for path in sorted(glob.glob(os.path.join(HERE, "*_test.py"))):
        module = importlib.import_module(os.path.basename(path).removesuffix(".py"))
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, harness.TestCase) and value.__module__ == module.__name__:
                methods = unittest.defaultTestLoader.getTestCaseNames(value)
                if methods:
                    found.append((value, [f"{module.__name__}.{name}.{method}" for method in methods]))
    return found


def stream_suite(results, command, environment, label, name):
    """Runs `run.py suite` and turns its JSON lines into results as they come."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT)
        with process.stdout:
            for line in process.stdout:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                results.add(record["verdict"], record["name"] + label, record["seconds"], record["detail"])
        if process.wait() not in (0, 1):
            errors.seek(0)
            results.add("FAIL", f"{name}{label}", 0, f"the test process ended with {process.returncode}\n{errors.read()[-4000:]}")


def run_suites(results, level, quick=False):
    work, alone = [], []
    for test_class, identities in suite_classes():
        wanted = [identity for identity in identities if results.wants(test_name(identity))]
        if not wanted:
            continue
        builds = test_class.long_builds if level == "full" else test_class.builds
        if quick:
            builds = ("release",)
        if "INTERLOCK_BUILD" in os.environ or "INTERLOCK_DAEMON" in os.environ:
            builds = [None]
        for build in builds:
            environment = {**os.environ, "INTERLOCK_LEVEL": level}
            label = "" if build in (None, "release") else f" [{build}]"
            if build:
                environment["INTERLOCK_BUILD"] = FOLDERS[build]
            command = [sys.executable, os.path.join(HERE, "run.py"), "suite", *wanted]
            job = (command, environment, label, test_class.__name__)
            (alone if test_class.exclusive else work).append((-test_class.time_limit, len(work), job))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(stream_suite, results, *job) for _, _, job in sorted(work)]:
            future.result()
    for _, _, job in alone:
        stream_suite(results, *job)


class Streamer(unittest.TestResult):
    """Prints a JSON line for each test as it ends."""

    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()
        self.verdict, self.detail = "PASS", ""
        self.capture = tempfile.TemporaryFile("w+")
        self.saved = os.dup(2)
        os.dup2(self.capture.fileno(), 2)

    def note(self, verdict, detail):
        if self.verdict != "FAIL":
            self.verdict = verdict
        self.detail += detail

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note("FAIL", "".join(traceback.format_exception(*err)))

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err:
            self.note("FAIL", f"{subtest}\n" + "".join(traceback.format_exception(*err)))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note("SKIP", reason)

    def stopTest(self, test):
        super().stopTest(test)
        sys.stderr.flush()
        os.dup2(self.saved, 2)
        os.close(self.saved)
        self.capture.seek(0)
        if self.verdict == "FAIL":
            self.detail += self.capture.read()[-8000:]
        self.capture.close()
        record = {"verdict": self.verdict, "name": test_name(test.id()), "detail": self.detail}
        print(json.dumps({**record, "seconds": time.monotonic() - self.began}), flush=True)


def run_suite(identities):
    result = Streamer()
    unittest.defaultTestLoader.loadTestsFromNames(identities).run(result)
    for test, text in [*result.errors, *result.failures]:
        if not hasattr(test, "_testMethodName"):  # the class or module could not be set up
            print(json.dumps({"verdict": "FAIL", "name": str(test), "detail": text, "seconds": 0.0}), flush=True)
    return 0 if result.wasSuccessful() else 1


# ---- the explorer (doc/exploration.md) ------------------------------------------------------------------------------

EXPLORE_SCENARIOS = os.path.join(HERE, "data", "access-scenarios.json")
EXPLORE_SLICE = "--slice --topology=chain --singles --pairs --schedules=2 --refused=0 --mutate --mutate-rounds=60"
EXPLORE_ASAN = "--slice --topology=fork --singles --pairs --schedules=1 --refused=0"
EXPLORE_FULL = "--singles --everywhere --pairs --schedules=60 --refused=400 --triples=5000 --mutate --mutate-rounds=120"
EXPLORE_LEAST = {"schedules": 2000, "mutations-caught": 12}  # what a slice is worth


def explore_shortfall(figures):
    """What a slice that found nothing has looked at too little of; empty: nothing."""
    caught = sum(part.get("mutations-caught", 0) for part in figures.values() if isinstance(part, dict))
    done = {"schedules": figures["schedules"], "mutations-caught": caught}
    return "".join(f"only {done[key]} {key}\n" for key, least in EXPLORE_LEAST.items() if done[key] < least)


def run_explorer(results, name, build, options, limit, is_slice=False):
    if not results.wants(name):
        return
    program = os.path.join(ROOT, FOLDERS[build], "test", "explore", "explore")
    command = [program, *options.split(), "--scenarios", EXPLORE_SCENARIOS, "--json"]
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    lines = result.stdout.strip().splitlines()
    text = result.stdout + result.stderr
    try:
        figures = json.loads(lines[-1])
    except (ValueError, IndexError):
        figures = {"schedules": 0, "failures": 1}
    shortfall = explore_shortfall(figures) if is_slice else ""
    failed = result.returncode != 0 or bool(shortfall)
    if results.names and not failed:
        print(text)
    label = "" if build == "release" else f" [{build}]"
    verdict = "FAIL" if failed else "PASS"
    results.add(verdict, f"{name} {figures['schedules']} schedules{label}", time.monotonic() - start, text + shortfall)


# ---- the crash engine (doc/crash.md) --------------------------------------------------------------------------------

CRASH_SLICE = "--workloads 45 --every 3 --mixed 1 --peer 80 --moved 10"
CRASH_FULL = "--workloads 320 --mixed 3 --peer 50 --moved 20"


def run_crashes(results, name, options, limit):
    if not results.wants(name):
        return
    program = os.path.join(ROOT, FOLDERS["release"], "test", "crash", "crash")
    start = time.monotonic()
    result = subprocess.run([program, *options.split()], capture_output=True, text=True, timeout=limit, check=False)
    text = result.stdout + result.stderr
    crashes = re.search(r"(\d+) crashes", text)
    caught = re.search(r"(\d+) of them caught", text)
    blind = "" if caught and int(caught.group(1)) else "no deliberate breakage was caught\n"
    compared = re.search(r"([1-9]\d*) sectors compared", text)
    failed = result.returncode != 0 or bool(blind) or not crashes or not compared
    if results.names and not failed:
        print(text)
    label = f"{name} {crashes.group(1)} crashes" if crashes else name
    results.add("FAIL" if failed else "PASS", label, time.monotonic() - start, text + blind)


# ---- fuzzing -------------------------------------------------------------------------------------------------------


def fuzz_targets():
    paths = glob.glob(os.path.join(FUZZ_BUILD, "fuzz-*"))
    return sorted(os.path.basename(p)[5:] for p in paths if os.path.isfile(p) and os.access(p, os.X_OK))


def fuzz_one(results, target, seconds):
    """One target for so many seconds; what it finds new is kept in build-fuzz/corpus, what fails in build-fuzz."""
    corpus = os.path.join(ROOT, "build-fuzz", "corpus", target)
    os.makedirs(corpus, exist_ok=True)
    command = [os.path.join(FUZZ_BUILD, f"fuzz-{target}"), f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048"]
    command += ["-print_final_stats=1", f"-artifact_prefix={ROOT}/build-fuzz/{target}-", corpus]
    seeds = os.path.join(ROOT, "fuzz", "corpus", target)
    if os.path.isdir(seeds):
        command.append(seeds)
    words = os.path.join(ROOT, "fuzz", f"{target}.dict")
    if os.path.exists(words):
        command.append(f"-dict={words}")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}
    start = time.monotonic()
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
            timeout=seconds + 120, check=False,
        )
        text, failed = result.stderr.decode("utf-8", "replace"), result.returncode != 0
    except subprocess.TimeoutExpired as problem:
        text, failed = f"the target did not end\n{(problem.stderr or b'')[-4000:].decode('utf-8', 'replace')}", True
    units = re.search(r"number_of_executed_units: (\d+)", text)
    name = f"fuzz-{target}" + (f" {units.group(1)} runs" if units else "")
    results.add("FAIL" if failed else "PASS", name, time.monotonic() - start, text)


def run_fuzz(results, targets, seconds):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda target: fuzz_one(results, target, seconds), targets))


# ---- commands ------------------------------------------------------------------------------------------------------


def check(arguments):
    results = Results(arguments.names)
    suites = [os.path.basename(path).removesuffix("_test.py") for path in glob.glob(os.path.join(HERE, "*_test.py"))]
    if not arguments.names or not all(name.startswith(tuple(suites)) for name in arguments.names):
        run_tidy(results)
        run_unit_tests(results, "release")
        if not arguments.quick:
            run_unit_tests(results, "asan")
        run_generator_tests(results)
    run_suites(results, "short", arguments.quick)
    run_explorer(results, "explore-slice", "release", EXPLORE_SLICE, 600, is_slice=True)
    run_crashes(results, "crash-slice", CRASH_SLICE, 600)
    if not arguments.quick:
        run_explorer(results, "explore-slice-asan", "asan", EXPLORE_ASAN, 600)
        run_fuzz(results, [target for target in fuzz_targets() if results.wants(f"fuzz-{target}")], FUZZ_SLICE_SECONDS)
    return results.finish()


def long(arguments):
    results = Results(arguments.names)
    run_explorer(results, "explore", "release", EXPLORE_FULL, 4 * 3600)
    run_crashes(results, "crash", CRASH_FULL, 4 * 3600)
    run_suites(results, "full")
    return results.finish()


def fuzz(arguments):
    words = list(arguments.words)
    seconds = int(words.pop()) if words and words[-1].isdigit() else 60
    known = fuzz_targets()
    if words == ["list"]:
        print("\n".join(known))
        return 0
    unknown = set(words) - set(known)
    if unknown:
        sys.exit(f"no such fuzz target: {', '.join(unknown)} (there are: {', '.join(known) or 'none'})")
    results = Results([])
    run_fuzz(results, words or known, seconds)
    return results.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check")
    command.add_argument("--quick", action="store_true")
    command.add_argument("names", nargs="*")
    command.set_defaults(function=check)
    command = commands.add_parser("long")
    command.add_argument("names", nargs="*")
    command.set_defaults(function=long)
    command = commands.add_parser("fuzz")
    command.add_argument("words", nargs="*")
    command.set_defaults(function=fuzz)
    command = commands.add_parser("suite")
    command.add_argument("identities", nargs="+")
    command.set_defaults(function=lambda arguments: run_suite(arguments.identities))
    arguments = parser.parse_args()
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
