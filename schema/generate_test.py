#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests of the schema language: what it refuses and says, and what comes out of small schemas."""

import os
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from emit_commands import Claims, Commands  # noqa: E402
from emit_text import Introspection, Reference  # noqa: E402
from emit_types import Types  # noqa: E402
from generate import outputs  # noqa: E402
from language import SchemaError, load  # noqa: E402

LOOKS = 'claims: none because "it only looks"'


def schema(text):
    return load([('test', text)])


class Refusals(unittest.TestCase):
    CASES = [
        ('## d\ncommand x { id: str }', 'test:2: command x has no claims clause'),
        ('## d\ncommand x { claims: none }', "expected 'because'"),
        ('## d\ncommand x { claims: none because "no" }', 'a reason, in words'),
        ('## d\ncommand x { claims { } }', 'claims with no clause'),
        ('## d\ncommand x { claims { tip: require graph } }', "'tip' is neither a variable"),
        ('## d\ncommand x { claims { top: require writing } }', 'require what?'),
        ('## d\ncommand x { claims { top: want graph } }', 'expected require or deny'),
        ('## d\ncommand x { claims { between(top): require graph } }', 'between takes 2 variables'),
        ('## d\ncommand x { claims { top: deny graph unless idle } }', "'idle' is not one of"),
        ('## d\ncommand x { claims { top: require write-data except-exports } }', 'except-exports must follow'),
        ('## d\ncommand x { claims { adopt chain(top, base) top: require graph } }', 'needs claims on top and base'),
        ('## d\ncommand x { claims { sources range top: require graph } }', 'sources range needs a range'),
        (f'## d\ncommand x {{ takes: y {LOOKS} }}', "there is no type 'y'"),
        (f'## d\ncommand x {{ a: str a: int {LOOKS} }}', 'member a stands here twice'),
        (f'## d\ncommand x {{ a?: int = yes {LOOKS} }}', "'yes' cannot be a default of type int"),
        (f'## d\ncommand x {{ a: int = 5 {LOOKS} }}', 'has a default but is not optional'),
        (f'## d\ncommand x {{ a: str in 0..4 {LOOKS} }}', 'only int and size have limits'),
        ('struct x { a: str }', 'struct x has no description'),
        ('## d\nstruct x { a: str', "expected a member, found 'the end of the file'"),
        ('## d\nstruct x { a: [[str]] }', 'lists of lists'),
        ('## d\nstruct x { a: % }', "unexpected character '%'"),
        ('## d\nenum x { a a }', 'value a stands here twice'),
        ('## d\nenum x { a }\n## d\nstruct x { }', 'x is declared twice'),
        ('## d\nalternate x { a: str b: str }', 'b and a are both a JSON string'),
        ('## d\nunion x { a: str by a { } }', 'must be a required enum member'),
        ('## d\nenum e { v }\n## d\nstruct s { t: str }\n## d\nunion x { t: e by t { v -> s } }', 'already'),
        ('## d\nenum e { v }\n## d\nstruct s { }\n## d\nunion x { t: e by t { w -> s } }', 'w is no value of e'),
        ('## d\nevent lower { }', 'upper case'),
        ('## d\nthing x { }', "expected a declaration, found 'thing'"),
    ]

    def test_every_case(self):
        for text, message in self.CASES:
            with self.subTest(text=text), self.assertRaises(SchemaError) as caught:
                schema(text)
            self.assertIn(message, str(caught.exception))


class Output(unittest.TestCase):
    def test_claims(self):
        source = Claims(schema('''
            ## d
            command block-x { claims {
                adopt chain(top, base)
                top: require read-data; deny graph attributes; deny write-data except-exports unless active exclusive
                between(top, base): deny all
                base: require write-data by-export if writable
            } }'''.replace('active exclusive', 'active unless exclusive'))).source()
        self.assertIn('.role = CLAIM_ROLE_NODE, .first = CLAIM_TOP, .require = ACCESS_READ_DATA, '
                      '.deny = ACCESS_GRAPH | ACCESS_ATTRIBUTES, .modifiers = 0, .condition = 0, .unless = 0, '
                      '.path = "top"', source)
        self.assertIn('.deny = ACCESS_WRITE_DATA, .modifiers = ACCESS_EXCEPT_EXPORTS, .condition = 0, '
                      '.unless = CLAIM_IF_ACTIVE | CLAIM_IF_EXCLUSIVE', source)
        self.assertIn('.first = CLAIM_TOP, .second = CLAIM_BASE, .require = 0, .deny = ACCESS_ALL', source)
        self.assertIn('.require = ACCESS_WRITE_DATA, .deny = 0, .modifiers = ACCESS_BY_EXPORT, '
                      '.condition = CLAIM_IF_WRITABLE', source)
        self.assertIn('.count = 4, .adopt = CLAIM_ADOPT_CHAIN', source)

    def test_c_names(self):
        header = Types(schema('''
            ## d
            enum a-b { unix x-y }
            ## d
            struct s-t { default?: int  l: [a-b]  o?: s-t  e?: a-b }''')).header()
        for line in ('enum a_b {', 'A_B_UNIX,', 'A_B_X_Y,', 'A_B_COUNT', 'bool has_default;', 'int64_t default_;',
                     'struct a_b_list l;', 'struct s_t *o;', 'enum a_b e;', 'bool has_e;'):
            self.assertIn(line, header)
        self.assertNotIn('has_o', header)

    def test_session_commands_have_no_handler(self):
        commands = Commands(schema(f'## d\ncommand x {{ session: yes {LOOKS} }}'))
        self.assertNotIn('command_x(', commands.header())
        self.assertIn('{.name = "x", .check = check_x, .no_claims_because = "it only looks"},', commands.table())

    def test_a_command_with_claims_needs_a_check(self):
        commands = Commands(schema('''
            ## d
            command x { a: str claims { top: require graph } }
            ## d
            command y { claims { top: require graph } }'''))
        self.assertIn('command_x_check(struct control *control, struct x_args *args, json_t **ret_claims, '
                      'struct error **err);', commands.header())
        self.assertIn('command_x_check(control, args, ret_claims, err);', commands.table())
        self.assertIn('command_y_check(control, ret_claims, err);', commands.table())

    def test_a_command_without_claims_is_checked_for_its_arguments(self):
        table = Commands(schema(f'## d\ncommand x {{ a: str {LOOKS} }}')).table()
        check = table[table.index('check_x('):table.index('const struct command command_table')]
        self.assertIn('x_args_from_json(arguments, NULL, &args, err)', check)
        self.assertNotIn('command_x', check)

    OPTIONS = """
        ## d
        struct access-options { on-conflict?: str }
        ## d
        enum kind { one two }
        ## d
        struct more { b?: int }
        ## d
        union options { type: kind  by type { two -> more } }
        """
    CLAIM = 'claims { node: require graph }'

    def test_commands_with_claims_take_the_access_options(self):
        declared = schema(f'''{self.OPTIONS}
            ## d
            command x {{ a: str {self.CLAIM} }}
            ## d
            command y {{ takes: options {self.CLAIM} }}
            ## d
            command z {{ a: str {LOOKS} }}
            ## d
            command v {{ a: [options]  claims: of-actions because "each takes its own" }}''')
        entries = {entry['name']: entry for entry in Introspection(declared).all()}
        names = lambda entry: [member['name'] for member in entries[entry]['members']]
        self.assertEqual(names(entries['x']['arg-type']), ['a', 'on-conflict'])
        self.assertEqual(names(entries['y']['arg-type']), ['type', 'on-conflict'])
        self.assertEqual([v['case'] for v in entries[entries['y']['arg-type']]['variants']], ['one', 'two'])
        self.assertEqual(names(entries['z']['arg-type']), ['a'])
        self.assertEqual(names(entries['v']['arg-type']), ['a', 'on-conflict'])
        self.assertNotIn('on_conflict', Commands(declared).header())  # handlers know nothing of them
        self.assertIn('command_v_check', Commands(declared).header())
        self.assertEqual(Commands(declared).table().count('.access_options = true'), 3)
        manual = Reference(declared).text()
        self.assertEqual(manual.count('Takes also the members of [access-options](#access-options)'), 3)

    def test_the_access_options_are_nobody_elses(self):
        for command, message in (
                (f'command x {{ on-conflict?: str {self.CLAIM} }}', 'already'),
                (f'command x {{ returns: more {self.CLAIM} }}', 'returns nothing')):
            with self.subTest(command=command), self.assertRaises(SchemaError) as caught:
                schema(f'{self.OPTIONS}\n## d\n{command}')
            self.assertIn(message, str(caught.exception))

    def test_introspection(self):
        entries = Introspection(schema(f'''
            ## d
            struct s {{ a?: size b: [str] }}
            ## d
            struct unused {{ a: str }}
            ## d
            command c {{ returns: [s] oob: yes {LOOKS} }}''')).all()
        by_name = {entry['name']: entry for entry in entries}
        self.assertEqual(by_name['c'], {'name': 'c', 'meta-type': 'command', 'arg-type': 'empty', 'ret-type': '[s]',
                                        'allow-oob': True})
        self.assertEqual(by_name['s']['members'], [{'name': 'a', 'type': 'int', 'default': None},
                                                   {'name': 'b', 'type': '[str]'}])
        self.assertNotIn('unused', by_name)

    def test_reference_says_why_none(self):
        self.assertIn('Claims: none, because it only looks.', Reference(schema(f'## d\ncommand c {{ {LOOKS} }}')).text())

    def test_the_real_schema_is_stable(self):
        folder = os.path.dirname(os.path.abspath(__file__))
        files = []
        for name in sorted(os.listdir(folder)):
            if name.endswith('.schema'):
                with open(os.path.join(folder, name), encoding='utf-8') as stream:
                    files.append((name, stream.read()))
        self.assertEqual(outputs(load(files)), outputs(load(files)))


if __name__ == '__main__':
    unittest.main()
