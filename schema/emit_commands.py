# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands, events and claims as C: commands.h/.c, command_table.c, events.h/.c, claims.h/.c."""

from emit_types import BANNER, Types, c_string, comment, identifier, member_name, type_name
from language import ACTIONS, CONDITIONS


class Commands:
    """Argument structs, handler prototypes, dispatch functions and the command table."""

    def __init__(self, schema):
        self.schema, self.types = schema, Types(schema)

    def arguments(self, command):
        """The C identifier of what the handler takes, or None for no arguments."""
        if command.takes:
            return identifier(command.takes)
        return identifier(command.name) + '_args' if command.members else None

    def prototype(self, command):
        parameters = ['struct control *control']
        if self.arguments(command):
            parameters.append(f'struct {self.arguments(command)} *args')
        if command.returns == 'any':
            parameters.append('json_t **ret')
        elif command.returns:
            parameters.append(f'struct {type_name(command.returns)} **ret')
        parameters.append('struct error **err')
        return f'int coroutine_fn command_{identifier(command.name)}({", ".join(parameters)})'

    def check_prototype(self, command):
        """A command that takes claims has a second handler: its first half, up to the decision."""
        parameters = ['struct control *control']
        if self.arguments(command):
            parameters.append(f'struct {self.arguments(command)} *args')
        parameters += ['json_t **ret_claims', 'struct error **err']
        return f'int coroutine_fn command_{identifier(command.name)}_check({", ".join(parameters)})'

    def header(self):
        out = BANNER + '''#ifndef INTERLOCK_SCHEMA_COMMANDS_H
#define INTERLOCK_SCHEMA_COMMANDS_H

#include "schema/command.h"
#include "schema/types.h"

/*
 * The commands. A handler runs in a coroutine on the control loop, borrows its arguments, and returns 0 with a new
 * *ret (where it returns something), or a negative errno with an error. The _check() of a command that takes claims is
 * the dry run: struct command has its contract (schema/command.h).
 */
extern const struct command command_table[];
extern const unsigned command_table_count;

'''
        for command in self.schema.commands.values():
            out += comment(command.doc)
            if command.members:
                name = identifier(command.name) + '_args'
                out += f'struct {name} {{\n' + self.types.member_lines(command.members) + '};\n'
                out += self.types.face(name)
            if not command.session:
                out += self.prototype(command) + ';\n'
            if command.claims.clauses or command.claims.of_actions:
                out += self.check_prototype(command) + ';\n'
            out += '\n'
        return out + '#endif\n'

    def source(self):
        out = BANNER + '#include "schema/commands.h"\n\n#include <glib.h>\n\n'
        for command in self.schema.commands.values():
            if command.members:
                name = identifier(command.name) + '_args'
                out += self.types.object_description(command.name, name, command.members)
                out += self.types.object_functions(name)
        return out

    def dispatch(self, command):
        name, arguments = identifier(command.name), self.arguments(command)
        out = (f'static int coroutine_fn dispatch_{name}(struct control *control, json_t *arguments, json_t **ret, '
               f'struct error **err)\n{{\n')
        body, call, release = '', ['control'], ''
        if arguments:
            body += f'    struct {arguments} *args = NULL;\n'
            read = f'{arguments}_from_json(arguments, NULL, &args, err)'
            call.append('args')
            release = f'    {arguments}_free(args);\n'
        else:
            read = 'no_arguments(arguments, err)'
        if command.returns:
            kind = 'json_t' if command.returns == 'any' else f'struct {type_name(command.returns)}'
            body += f'    {kind} *value = NULL;\n'
            call.append('&value')
        call.append('err')
        body += f'    int result = {read};\n    if (result < 0) {{\n        return result;\n    }}\n'
        body += f'    result = command_{name}({", ".join(call)});\n{release}'
        body += '    if (result < 0) {\n        return result;\n    }\n'
        if command.returns == 'any':
            body += '    *ret = value;\n'
        elif command.returns:
            returned = type_name(command.returns)
            body += f'    *ret = {returned}_to_json(value);\n    {returned}_free(value);\n'
        else:
            body += '    *ret = json_object();\n'
        return out + body + '    return 0;\n}\n\n'

    def check(self, command):
        """The dry run: the arguments alone for a command that takes no claims."""
        name, arguments = identifier(command.name), self.arguments(command)
        out = (f'static int coroutine_fn check_{name}(struct control *control, json_t *arguments, json_t **ret_claims, '
               f'struct error **err)\n{{\n')
        claims = command.claims.clauses or command.claims.of_actions
        if not arguments and not claims:
            return out + '    return no_arguments(arguments, err);\n}\n\n'
        if not arguments:
            return out + (f'    int result = no_arguments(arguments, err);\n'
                          f'    return result < 0 ? result : command_{name}_check(control, ret_claims, err);\n}}\n\n')
        out += (f'    struct {arguments} *args = NULL;\n'
                f'    int result = {arguments}_from_json(arguments, NULL, &args, err);\n'
                f'    if (result < 0) {{\n        return result;\n    }}\n')
        if claims:
            out += f'    result = command_{name}_check(control, args, ret_claims, err);\n'
        return out + f'    {arguments}_free(args);\n    return result;\n}}\n\n'

    def table(self):
        """The table refers to every handler, so it is a file of its own: only whoever has them all links it."""
        out = BANNER + '''#include "schema/claims.h"
#include "schema/commands.h"

#include <errno.h>

static int no_arguments(json_t *arguments, struct error **err)
{
    const char *name;
    json_t *value;
    json_object_foreach(arguments, name, value)
    {
        return error_set(err, -EINVAL, "%s: there is no such parameter here", name);
    }
    return 0;
}

'''
        for command in self.schema.commands.values():
            if not command.session:
                out += self.dispatch(command)
            out += self.check(command)
        out += 'const struct command command_table[] = {\n'
        for command in sorted(self.schema.commands.values(), key=lambda c: c.name):
            fields = [f'.name = {c_string(command.name)}']
            if not command.session:
                fields.append(f'.dispatch = dispatch_{identifier(command.name)}')
            fields.append(f'.check = check_{identifier(command.name)}')
            if command.oob:
                fields.append('.allow_oob = true')
            if command.claims.clauses or command.claims.of_actions:
                fields.append('.access_options = true')
            if command.claims.clauses:
                fields.append(f'.claims = &{identifier(command.name)}_claims')
            else:
                fields.append(f'.no_claims_because = {c_string(command.claims.reason)}')
            out += '    {' + ', '.join(fields) + '},\n'
        return out + f'}};\nconst unsigned command_table_count = {len(self.schema.commands)};\n'


class Events:
    """A builder per event."""

    def __init__(self, schema):
        self.schema, self.types = schema, Types(schema)

    def prototype(self, event):
        parameters = []
        for member in event.members:
            if self.types.has_flag(member):
                parameters.append(f'bool has_{identifier(member.name)}')
            kind = self.types.c_type(member.type)
            if kind.endswith('*') and kind != 'json_t *':
                kind = 'const ' + kind
            parameters.append(kind + member_name(member.name))
        return f'json_t *event_{identifier(event.name)}({", ".join(parameters) or "void"})'

    def header(self):
        out = BANNER + '''#ifndef INTERLOCK_SCHEMA_EVENTS_H
#define INTERLOCK_SCHEMA_EVENTS_H

#include "schema/types.h"

/*
 * Builders of events: {"event": NAME, "data": {...}}, without a time stamp (control_emit() adds it). A new reference;
 * arguments are borrowed; optional pointers may be NULL.
 */
'''
        for event in self.schema.events.values():
            out += comment(event.doc) + self.prototype(event) + ';\n'
        return out + '#endif\n'

    def source(self):
        out = BANNER + '#include "schema/events.h"\n\n'
        for event in self.schema.events.values():
            struct = f'{identifier(event.name)}_data'
            if event.members:
                out += f'struct {struct} {{\n' + self.types.member_lines(event.members) + '};\n'
                out += self.types.object_description(event.name, struct, event.members, storage='static ')
            out += self.prototype(event) + '\n{\n'
            if not event.members:
                out += f'    return json_pack("{{s:s}}", "event", {c_string(event.name)});\n}}\n\n'
                continue
            out += f'    struct {struct} data = {{\n'
            for member in event.members:
                if self.types.has_flag(member):
                    flag = f'has_{identifier(member.name)}'
                    out += f'        .{flag} = {flag},\n'
                name, kind = member_name(member.name), self.types.c_type(member.type)
                cast = f'({kind})' if kind.endswith('*') else ''
                out += f'        .{name} = {cast}{name},\n'
            out += f'    }};\n    const struct {struct} *pointer = &data;\n'
            out += (f'    return json_pack("{{s:s, s:o}}", "event", {c_string(event.name)}, "data", '
                    f'marshal_write(&{struct}_type, &pointer));\n}}\n\n')
        return out


def access_bits(actions):
    if len(actions) == len(ACTIONS):
        return 'ACCESS_ALL'
    return ' | '.join('ACCESS_' + action.replace('-', '_').upper() for action in actions) or '0'


def claim_bits(prefix, names):
    return ' | '.join(prefix + name.replace('-', '_').upper() for name in names) or '0'


def subject_text(clause):
    if clause.role == 'node':
        return clause.variables[0]
    return f'{clause.role}({", ".join(clause.variables)})'


def claim_rows(clause):
    """The parts of a clause, grouped by their conditions: (condition, unless, require, deny, modifiers)."""
    rows = {}
    for part in clause.parts:
        row = rows.setdefault((tuple(part.condition), tuple(part.unless)), {'require': [], 'deny': [], 'modifiers': []})
        row[part.verb] += [action for action in part.actions if action not in row[part.verb]]
        row['modifiers'] += part.modifiers
    for (condition, unless), row in rows.items():
        yield condition, unless, row['require'], row['deny'], row['modifiers']


class Claims:
    """The claim table of each command that takes claims."""

    def __init__(self, schema):
        self.commands = [c for c in schema.commands.values() if c.claims.clauses]

    def header(self):
        out = BANNER + '''#ifndef INTERLOCK_SCHEMA_CLAIMS_H
#define INTERLOCK_SCHEMA_CLAIMS_H

#include "block/operation.h"

/* What each command claims (doc/reference.md prints the same as text). Commands that claim nothing have no table. */
'''
        for command in self.commands:
            out += f'extern const struct claim_table {identifier(command.name)}_claims;\n'
        return out + '''
/* All of them. */
extern const struct claim_table *const claim_tables[];
extern const unsigned claim_table_count;

/* How the schema calls each condition. */
struct claim_condition_word {
    unsigned condition; /* CLAIM_IF_ */
    const char *word;
};
extern const struct claim_condition_word claim_condition_words[];
extern const unsigned claim_condition_count;

#endif
'''

    def row(self, clause, condition, unless, require, deny, modifiers):
        variables = ['CLAIM_' + v.upper() for v in clause.variables]
        second = f', .second = {variables[1]}' if len(variables) > 1 else ''
        return (f'    {{.role = CLAIM_ROLE_{clause.role.upper()}, .first = {variables[0]}{second}, '
                f'.require = {access_bits(require)}, .deny = {access_bits(deny)}, '
                f'.modifiers = {claim_bits("ACCESS_", modifiers)}, .condition = {claim_bits("CLAIM_IF_", condition)}, '
                f'.unless = {claim_bits("CLAIM_IF_", unless)}, .path = {c_string(subject_text(clause))}}},\n')

    def source(self):
        out = BANNER + '#include "schema/claims.h"\n\n'
        for command in self.commands:
            name, count = identifier(command.name), 0
            out += f'static const struct claim_clause {name}_clauses[] = {{\n'
            for clause in command.claims.clauses:
                for row in claim_rows(clause):
                    out += self.row(clause, *row)
                    count += 1
            adopt = 'CLAIM_ADOPT_CHAIN' if command.claims.adopt else 'CLAIM_ADOPT_NONE'
            sources = 'true' if command.claims.sources else 'false'
            out += (f'}};\nconst struct claim_table {name}_claims = {{.operation = {c_string(command.name)}, '
                    f'.clauses = {name}_clauses, .count = {count}, .adopt = {adopt}, .sources = {sources}}};\n\n')
        names = ''.join(f'    &{identifier(command.name)}_claims,\n' for command in self.commands)
        words = ''.join(f'    {{CLAIM_IF_{word.upper()}, "{word}"}},\n' for word in CONDITIONS)
        return out + (f'const struct claim_table *const claim_tables[] = {{\n{names}}};\n'
                      f'const unsigned claim_table_count = {len(self.commands)};\n\n'
                      f'const struct claim_condition_word claim_condition_words[] = {{\n{words}}};\n'
                      f'const unsigned claim_condition_count = {len(CONDITIONS)};\n')
