#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Generates code and documents from the schema files.

generate.py --output DIRECTORY FILE...    C files into DIRECTORY
generate.py --manual OUT FILE...          the reference manual

Without FILE: every schema file beside this program.
"""

import argparse
import glob
import os
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from emit_commands import Claims, Commands, Events  # noqa: E402
from emit_text import Introspection, Reference  # noqa: E402
from emit_types import Types  # noqa: E402
from language import SchemaError, load  # noqa: E402

INTROSPECTION_HEADER = '''/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Generated from schema/ by generate.py: do not edit. */
#ifndef INTERLOCK_SCHEMA_INTROSPECTION_H
#define INTERLOCK_SCHEMA_INTROSPECTION_H

/* The answer of query-qmp-schema, as JSON text. */
extern const char schema_introspection[];

#endif
'''


def outputs(schema):
    """File name -> content of every generated C file."""
    types, commands, events, claims = Types(schema), Commands(schema), Events(schema), Claims(schema)
    return {
        'types.h': types.header(), 'types.c': types.source(),
        'commands.h': commands.header(), 'commands.c': commands.source(), 'command_table.c': commands.table(),
        'events.h': events.header(), 'events.c': events.source(),
        'claims.h': claims.header(), 'claims.c': claims.source(),
        'introspection.h': INTROSPECTION_HEADER, 'introspection.c': Introspection(schema).source(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', metavar='DIRECTORY')
    parser.add_argument('--manual', metavar='OUT')
    parser.add_argument('files', nargs='*', metavar='FILE')
    options = parser.parse_args()
    texts = []
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), '*.schema')
    for path in options.files or sorted(glob.glob(beside)):
        with open(path, encoding='utf-8') as stream:
            texts.append((os.path.relpath(path), stream.read()))
    try:
        schema = load(texts)
    except SchemaError as error:
        print(error, file=sys.stderr)
        return 1
    files = {}
    if options.output:
        files = {os.path.join(options.output, name): text for name, text in outputs(schema).items()}
    if options.manual:
        files[options.manual] = Reference(schema).text()
    for path, text in files.items():
        with open(path, 'w', encoding='utf-8') as stream:
            stream.write(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
