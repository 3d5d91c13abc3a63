# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation matrix: it says what the list of scenarios says, and its rows are consistent. access_check_test compares
it with a running daemon."""
import glob
import json
import os
import re
import sys

from harness import IS_PEER, PROGRAM, ROOT, TestCase, run

sys.path.insert(0, os.path.join(ROOT, "schema"))
import language  # noqa: E402
import scenes  # noqa: E402

with open(os.path.join(ROOT, "test", "data", "access-scenarios.json"), encoding="utf-8") as data:
    SCENARIOS = json.load(data)
GRAPHS = {"chain": "chain", "fork": "fork", "diamond": "crown"}  # the crown is the diamond without its join
OF_A_JOIN = {"export-rw l2"}  # refused for the join that leans on it
OPERATIONS = scenes.PLAYED - {"bitmap-add"}  # which claims nothing


def read_matrix(*words):
    return run(PROGRAM, "access", "matrix", *words).stdout


class AccessMatrix(TestCase):
    builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the matrix is ours")
        self.matrix = json.loads(read_matrix("--json"))
        self.alone = {(instance["graph"], instance["operation"]): row["admitted"]
                      for row in self.matrix["alone"] for instance in row["instances"]}
        self.pairs = {(instance["graph"], frozenset((instance["first"], instance["second"]))): row
                      for row in self.matrix["pairs"] for instance in row["instances"]}

    def scenarios(self, verdict):
        """Those that are about operations and nodes that there are: (graph, operations)."""
        found = []
        for scenario in SCENARIOS[verdict]:
            operations = [scenario[key] for key in ("a", "b") if key in scenario]
            graph = GRAPHS[scenario["topology"]]
            nodes = {node for operation in operations for node in re.split(r">|\.\.", operation.split(" ")[1])}
            kinds = {operation.split(" ")[0] for operation in operations}
            here = kinds <= OPERATIONS and nodes <= set(self.matrix["graphs"][graph]) | {"none"}
            if here and not set(operations) & OF_A_JOIN:
                found.append((graph, operations))
        self.assertGreater(len(found), 5, "scenarios are left out")
        return found

    def test_what_must_be_admitted_is(self):
        for graph, operations in self.scenarios("admit"):
            with self.subTest(graph=graph, operations=operations):
                row = self.pairs[graph, frozenset(operations)]
                self.assertTrue(row["admitted"], row["rules"])

    def test_what_must_be_refused_is(self):
        for graph, operations in self.scenarios("refuse"):
            with self.subTest(graph=graph, operations=operations):
                self.assertEqual([self.alone[graph, operation] for operation in operations], [True, True])
                self.assertFalse(self.pairs[graph, frozenset(operations)]["admitted"])

    def test_what_must_be_refused_alone_is(self):
        for graph, operations in self.scenarios("alone"):
            with self.subTest(graph=graph, operations=operations):
                self.assertFalse(self.alone[graph, operations[0]])

    def test_every_pair_stands_in_one_row(self):
        seen = set()
        for row in self.matrix["pairs"]:
            for instance in row["instances"]:
                pair = (instance["graph"], frozenset((instance["first"], instance["second"])))
                self.assertNotIn(pair, seen)
                seen.add(pair)
        for graph in self.matrix["graphs"]:
            possible = sorted(name for (where, name), admitted in self.alone.items() if where == graph and admitted)
            expected = {(graph, frozenset((one, other))) for one in possible for other in possible}
            self.assertEqual({pair for pair in seen if pair[0] == graph}, expected)
            self.assertGreater(len(possible), 10)

    def test_what_is_refused_has_a_reason_and_what_is_admitted_none(self):
        keys = {"action", "required-by", "required-as", "denied-by", "denied-as"}
        for row in self.matrix["pairs"] + self.matrix["alone"]:
            self.assertEqual(bool(row["rules"]), not row["admitted"], row)
            for rule in row["rules"]:
                self.assertTrue(rule == {"action": "adopt"} or set(rule) == keys, rule)
                self.assertNotEqual(rule.get("required-by", "A"), rule.get("denied-by", "B"))

    def test_every_command_with_claims_is_in_it(self):
        texts = []
        for path in glob.glob(os.path.join(ROOT, "schema", "*.schema")):
            with open(path, encoding="utf-8") as stream:
                texts.append((path, stream.read()))
        commands = [command.name for command in language.load(texts).commands.values() if command.claims.clauses]
        self.assertGreater(len(commands), 2)
        shown = {row["operation"].split(" ")[0] for row in self.matrix["alone"]}
        same = {name for row in self.matrix["alone"] for name in row["also"]}
        self.assertEqual(shown | same, set(commands))
        self.assertFalse(shown & same)

    def test_text_and_tables_have_the_same_rows(self):
        rows = self.matrix["pairs"] + self.matrix["alone"]
        text = read_matrix().splitlines()
        self.assertEqual(sum("  admitted e.g. " in line or "  REFUSED  e.g. " in line for line in text), len(rows))
        table = [line for line in read_matrix("--markdown").splitlines() if re.match(r"\|.*\| (admitted|refused) \|", line)]
        self.assertEqual(len(table), len(rows))
        for line in table:
            self.assertEqual(line.count("|"), 5, line)
