# SPDX-License-Identifier: LGPL-2.1-or-later
"""tidy can fail: each of its rules finds the defect that it is there for, and finds nothing in clean code."""
import os
import subprocess
import tempfile

import tidy
from harness import TestCase

CLEAN_C = """/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Nouns: what a noun is and who owns it.
 *
 * 1. A noun has one owner.
 *
 * Does not do verbs.
 */
#include "loop/noun.h"

int noun_count(void)
{
    return 1; /* the word open("x") in a comment is no call */
}
"""
CLEAN_H = """/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_NOUN_H
#define INTERLOCK_LOOP_NOUN_H

/* How many there are. */
int noun_count(void);

#endif
"""


class Tidy(TestCase):
    def findings(self, files):
        """The set of rules with a finding in a repository made of the clean files and `files`."""
        with tempfile.TemporaryDirectory() as root:
            subprocess.run(["git", "init", "-q", root], check=True)
            tree = {"src/loop/noun.c": CLEAN_C, "src/loop/noun.h": CLEAN_H, **files}
            with open(os.path.join(tidy.ROOT, ".clang-format"), encoding="utf-8") as style:
                tree[".clang-format"] = style.read()
            for path, text in tree.items():
                full = os.path.join(root, path)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "w", encoding="utf-8") as out:
                    out.write(text)
            result = tidy.run(root)
            return {rule for rule, findings in result.items() if findings}

    def c_file(self, body, includes='#include "loop/noun.h"\n'):
        head = CLEAN_C.split("#include")[0]
        return head + includes + "\n" + body

    def test_clean_tree_has_no_finding(self):
        self.assertEqual(self.findings({}), set())

    def test_upward_include_is_found(self):
        header = CLEAN_H.replace("LOOP_NOUN", "BLOCK_NODE")
        bad = self.c_file("", '#include "block/node.h"\n')
        self.assertIn("floors", self.findings({"src/block/node.h": header, "src/loop/bad.c": bad}))

    def test_same_floor_include_is_found(self):
        header = CLEAN_H.replace("LOOP_NOUN", "JOB_JOB")
        bad = self.c_file("", '#include "job/job.h"\n')
        self.assertIn("floors", self.findings({"src/job/job.h": header, "src/export/bad.c": bad}))

    def test_driver_using_a_driver_is_found(self):
        header = CLEAN_H.replace("LOOP_NOUN", "DRIVER_FORMAT_RAW_RAW")
        bad = self.c_file("", '#include "driver/format/raw/raw.h"\n')
        files = {"src/driver/format/raw/raw.h": header, "src/driver/format/qcow2/bad.c": bad}
        self.assertIn("floors", self.findings(files))

    def test_long_function_is_found(self):
        body = "int noun_long(void)\n{\n" + "    noun_count();\n" * 120 + "    return 0;\n}\n"
        self.assertEqual(self.findings({"src/loop/long.c": self.c_file(body)}), {"function-size"})

    def test_long_file_is_found(self):
        functions = "\n".join(f"int noun_{i}(void)\n{{\n    return {i};\n}}\n" for i in range(220))
        self.assertEqual(self.findings({"src/loop/long.c": self.c_file(functions)}), {"file-size"})

    def test_missing_licence_is_found(self):
        self.assertEqual(self.findings({"test/x.py": '"""A file."""\n'}), {"licence"})

    def test_leftover_is_found(self):
        self.assertEqual(self.findings({"doc/x.md": "TO" "DO: more\n"}), {"leftovers"})

    def test_machine_path_is_found(self):
        self.assertEqual(self.findings({"doc/x.md": "see /home/" "somebody/notes\n"}), {"machine-paths"})

    def test_struct_typedef_is_found(self):
        bad = CLEAN_H.replace("LOOP_NOUN", "LOOP_BAD").replace("int noun_count(void);", "typedef struct noun noun;")
        self.assertEqual(self.findings({"src/loop/bad.h": bad}), {"typedefs"})

    def test_blocking_call_above_the_loop_is_found(self):
        body = "int noun_read(int fd, void *data)\n{\n    return pread(fd, data, 1, 0);\n}\n"
        self.assertEqual(self.findings({"src/block/bad.c": self.c_file(body)}), {"forbidden-calls"})
        self.assertEqual(self.findings({"src/loop/good.c": self.c_file(body)}), set())

    def test_call_through_a_pointer_is_no_finding(self):
        body = "int noun_read(struct noun *noun)\n{\n    return noun->ops->read(noun);\n}\n"
        self.assertEqual(self.findings({"src/block/good.c": self.c_file(body)}), set())

    def test_unformatted_file_is_found(self):
        self.assertEqual(self.findings({"src/loop/bad.c": self.c_file("int   noun_x( void );\n")}), {"format"})

    def test_missing_include_guard_is_found(self):
        bad = "/* SPDX-License-Identifier: LGPL-2.1-or-later */\nint noun_bad(void);\n"
        self.assertEqual(self.findings({"src/loop/bad.h": bad}), {"header-guard"})

    def test_header_that_leans_on_others_is_found(self):
        bad = CLEAN_H.replace("LOOP_NOUN", "LOOP_BAD").replace("int noun_count(void);", "uint64_t noun_size(void);")
        self.assertEqual(self.findings({"src/loop/bad.h": bad}), {"self-contained"})

    def test_silent_source_file_is_found(self):
        bad = "/* SPDX-License-Identifier: LGPL-2.1-or-later */\nint noun_bad;\n"
        self.assertEqual(self.findings({"src/loop/bad.c": bad}), {"opening-comment"})

    def test_allow_list_silences_and_must_be_needed(self):
        leftover = {"doc/x.md": "TO" "DO: more\n"}
        allow = {"test/tidy-allow.txt": "leftovers doc/x.md: a page about leftovers\n"}
        self.assertEqual(self.findings({**leftover, **allow}), set())
        self.assertEqual(self.findings(allow), {"allow-list"})
