# SPDX-License-Identifier: LGPL-2.1-or-later
"""C types and their descriptions for the interpreter (marshal.c): types.h, types.c, and struct parts for others.

Naming: `block-job-info` is `struct block_job_info`; enum constants are ENUM_NAME_VALUE with ENUM_NAME_COUNT last;
a member whose name C does not allow gets a `_` behind it. Optional scalars and lists have a `has_x` flag beside
them, optional pointers are NULL when absent. Lists of objects hold pointers.
"""

from language import BUILTINS, INT64_MAX, INT64_MIN, ListOf

SCALARS = {'int': 'int64_t', 'size': 'uint64_t', 'bool': 'bool', 'number': 'double'}
RESERVED = set('''auto break case char const continue default do double else enum extern float for goto if inline int
long register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
bool true false unix linux errno asm typeof'''.split())
BANNER = '/* SPDX-License-Identifier: LGPL-2.1-or-later */\n/* Generated from schema/ by generate.py: do not edit. */\n'


def identifier(name):
    return name.replace('-', '_').lower()


def member_name(name):
    plain = name.replace('-', '_')
    return plain + '_' if plain in RESERVED else plain


def constant(enum, value):
    return f'{enum}_{value}'.replace('-', '_').upper()


def type_name(type_):
    """The C identifier that a type's functions carry."""
    return identifier(type_.element) + '_list' if isinstance(type_, ListOf) else identifier(type_)


def comment(text, indent=''):
    """A description as a C comment, wrapped."""
    text = text.replace('*/', '* /')
    lines, line = [], ''
    for word in text.split():
        if line and len(indent) + len(line) + len(word) + 8 > 116:
            lines.append(line)
            line = word
        else:
            line = f'{line} {word}' if line else word
    lines.append(line)
    if len(lines) == 1:
        return f'{indent}/* {lines[0]} */\n'
    return f'{indent}/*\n' + ''.join(f'{indent} * {line}\n' for line in lines) + f'{indent} */\n'


def c_string(text):
    return '"' + text.replace('\\', '\\\\').replace('"', '\\"').replace('\n', '\\n') + '"'


class Types:
    def __init__(self, schema):
        self.schema = schema

    def c_type(self, type_):
        """How a member or item of this type is declared; ends with a space or a star."""
        meta = self.schema.meta(type_)
        if meta in SCALARS:
            return SCALARS[meta] + ' '
        if meta == 'enum':
            return f'enum {identifier(type_)} '
        if meta == 'str':
            return 'char *'
        if meta == 'any':
            return 'json_t *'
        return f'struct {type_name(type_)} ' + ('' if meta == 'list' else '*')

    def has_flag(self, member):
        meta = self.schema.meta(member.type)
        return member.optional and (meta in SCALARS or meta in ('enum', 'list'))

    def type_reference(self, type_):
        """The description of a type, as C."""
        if not isinstance(type_, ListOf) and type_ in BUILTINS:
            return f'&marshal_{type_}'
        return f'&{type_name(type_)}_type'

    def lists(self):
        """Every list type in use, by C name, in order."""
        found = {}
        holders = list(self.schema.types.values()) + list(self.schema.events.values())
        for command in self.schema.commands.values():
            holders.append(command)
            if isinstance(command.returns, ListOf):
                found[type_name(command.returns)] = command.returns
        for holder in holders:
            for member in getattr(holder, 'members', []):
                if isinstance(member.type, ListOf):
                    found[type_name(member.type)] = member.type
        return dict(sorted(found.items()))

    # Declarations

    def member_lines(self, members):
        out = ''
        for member in members:
            if member.doc:
                out += comment(member.doc, '    ')
            if self.has_flag(member):
                out += f'    bool has_{identifier(member.name)};\n'
            out += f'    {self.c_type(member.type)}{member_name(member.name)};\n'
        return out or '    char nothing;\n'

    def enum_declaration(self, declaration):
        out = comment(declaration.doc) + f'enum {identifier(declaration.name)} {{\n'
        for value in declaration.values:
            note = f' /* {value.doc} */' if value.doc else ''
            out += f'    {constant(declaration.name, value.name)},{note}\n'
        return out + f'    {constant(declaration.name, "count")}\n}};\n'

    def union_part(self, declaration):
        out = '    union {\n'
        for branch in declaration.branches:
            out += f'        struct {identifier(branch.type)} {member_name(branch.name)};\n'
        return out + '    } u;\n'

    def alternate_declaration(self, declaration):
        name = identifier(declaration.name)
        out = comment(declaration.doc) + f'enum {name}_kind {{\n'
        out += ''.join(f'    {constant(declaration.name, c.name)},\n' for c in declaration.members)
        out += f'}};\nstruct {name} {{\n    enum {name}_kind kind;\n    union {{\n'
        for choice in declaration.members:
            if choice.type != 'null':
                out += f'        {self.c_type(choice.type)}{member_name(choice.name)};\n'
        return out + '    } u;\n};\n'

    def declaration(self, declaration):
        if declaration.meta == 'alternate':
            return self.alternate_declaration(declaration)
        out = comment(declaration.doc) + f'struct {identifier(declaration.name)} {{\n'
        out += self.member_lines(declaration.members)
        if declaration.meta == 'union' and declaration.branches:
            out += self.union_part(declaration)
        return out + '};\n'

    def in_order(self):
        """Structs, unions and alternates; what a union holds by value comes before it."""
        done, order = set(), []

        def visit(declaration):
            if declaration.name in done:
                return
            done.add(declaration.name)
            for branch in getattr(declaration, 'branches', []):
                visit(self.schema.types[branch.type])
            order.append(declaration)

        for declaration in self.schema.types.values():
            if declaration.meta != 'enum':
                visit(declaration)
        return order

    def face(self, name):
        """Prototypes of one type's functions."""
        struct = f'struct {name}'
        return (f'extern const struct marshal_type {name}_type;\n'
                f'int {name}_from_json(json_t *json, const char *path, {struct} **ret, struct error **err);\n'
                f'int {name}_from_text(json_t *json, const char *path, {struct} **ret, struct error **err);\n'
                f'json_t *{name}_to_json(const {struct} *value);\n'
                f'{struct} *{name}_copy(const {struct} *value);\n'
                f'void {name}_free({struct} *value);\n')

    def list_declaration(self, name, type_):
        item = self.c_type(type_.element)
        return f'struct {name} {{\n    size_t count;\n    {item}*items;\n}};\n'

    def header(self):
        out = BANNER + '''#ifndef INTERLOCK_SCHEMA_TYPES_H
#define INTERLOCK_SCHEMA_TYPES_H

#include "schema/marshal.h"

/*
 * The types of the control language. For each type T:
 * T_from_json() reads JSON strictly: what T does not have is an error that names it. `path` (may be NULL) is where the
 * value stands, for error texts. T_from_text() does the same and lets strings stand for scalars ("10G", "on"), for
 * command lines. Both return 0 and a new *ret, or -EINVAL. T_copy() is deep; T_free() accepts NULL. T_name() gives the
 * text of an enum's value; T_parse() is its inverse. Lists: items belong to the list; T_list_append() takes its item
 * over. `str` members belong to their struct (g_malloc), and so do structs, lists and JSON values.
 */

'''
        enums = [d for d in self.schema.types.values() if d.meta == 'enum']
        for declaration in enums:
            name = identifier(declaration.name)
            out += self.enum_declaration(declaration)
            out += f'extern const struct marshal_type {name}_type;\n'
            out += f'const char *{name}_name(enum {name} value);\n'
            out += f'int {name}_parse(const char *text, enum {name} *ret, struct error **err);\n\n'
        order = self.in_order()
        out += ''.join(f'struct {identifier(d.name)};\n' for d in order) + '\n'
        for name, type_ in self.lists().items():
            out += self.list_declaration(name, type_)
        out += '\n'
        for declaration in order:
            out += self.declaration(declaration) + self.face(identifier(declaration.name)) + '\n'
        for name, type_ in self.lists().items():
            out += self.face(name)
            out += f'void {name}_append(struct {name} *list, {self.c_type(type_.element)}item);\n\n'
        return out + '#endif\n'

    # Descriptions

    def default_fields(self, member):
        if member.default is None:
            return ''
        meta = self.schema.meta(member.type)
        if meta == 'str':
            return f', .has_default = true, .default_text = {c_string(member.default)}'
        value = {'true': '1', 'false': '0'}.get(member.default, member.default) if meta == 'bool' else member.default
        if meta == 'enum':
            value = constant(member.type, member.default)
        return f', .has_default = true, .default_value = {value}'

    def limit_fields(self, member):
        if member.type not in ('int', 'size'):
            return ''
        minimum = member.minimum if member.minimum is not None else (0 if member.type == 'size' else INT64_MIN)
        maximum = member.maximum if member.maximum is not None else INT64_MAX
        text = {INT64_MIN: 'INT64_MIN', INT64_MAX: 'INT64_MAX'}
        return f', .minimum = {text.get(minimum, minimum)}, .maximum = {text.get(maximum, maximum)}'

    def member_table(self, struct, members):
        """The static array {struct}_members, or nothing for no members."""
        if not members:
            return ''
        out = f'static const struct marshal_member {struct}_members[] = {{\n'
        for member in members:
            has = 'MARSHAL_NO_OFFSET'
            if self.has_flag(member):
                has = f'offsetof(struct {struct}, has_{identifier(member.name)})'
            optional = ', .optional = true' if member.optional else ''
            out += (f'    {{.name = {c_string(member.name)}, .type = {self.type_reference(member.type)}, '
                    f'.offset = offsetof(struct {struct}, {member_name(member.name)}), .has_offset = {has}{optional}'
                    f'{self.default_fields(member)}{self.limit_fields(member)}}},\n')
        return out + '};\n'

    def object_description(self, name, struct, members, storage='', extra=''):
        table = f', .members = {struct}_members, .count = {len(members)}' if members else ''
        return (self.member_table(struct, members) +
                f'{storage}const struct marshal_type {struct}_type = {{.name = {c_string(name)}, '
                f'.kind = MARSHAL_OBJECT, .size = sizeof(struct {struct}){table}{extra}}};\n')

    def union_description(self, declaration):
        name = identifier(declaration.name)
        tag = next(i for i, m in enumerate(declaration.members) if m.name == declaration.tag)
        enum = declaration.members[tag].type
        out = f'static const struct marshal_type *const {name}_branches[{constant(enum, "count")}] = {{\n'
        for branch in declaration.branches:
            out += f'    [{constant(enum, branch.name)}] = &{identifier(branch.type)}_type,\n'
        offset = f', .branch_offset = offsetof(struct {name}, u)' if declaration.branches else ''
        extra = f', .tag = &{name}_members[{tag}], .branches = {name}_branches{offset}'
        return out + '};\n' + self.object_description(declaration.name, name, declaration.members, extra=extra)

    def alternate_description(self, declaration):
        name = identifier(declaration.name)
        out = f'static const struct marshal_member {name}_members[] = {{\n'
        for choice in declaration.members:
            out += f'    {{.name = {c_string(choice.name)}, .type = {self.type_reference(choice.type)}}},\n'
        return out + (f'}};\nconst struct marshal_type {name}_type = {{.name = {c_string(declaration.name)}, '
                      f'.kind = MARSHAL_ALTERNATE, .size = sizeof(struct {name}), .members = {name}_members, '
                      f'.count = {len(declaration.members)}, .branch_offset = offsetof(struct {name}, u)}};\n')

    def enum_source(self, declaration):
        name = identifier(declaration.name)
        values = ', '.join(c_string(value.name) for value in declaration.values)
        return f'''static const char *const {name}_values[] = {{{values}}};
const struct marshal_type {name}_type = {{.name = {c_string(declaration.name)}, .kind = MARSHAL_ENUM, .values = {name}_values, .count = {len(declaration.values)}}};
const char *{name}_name(enum {name} value)
{{
    return marshal_enum_name(&{name}_type, (unsigned)value);
}}
int {name}_parse(const char *text, enum {name} *ret, struct error **err)
{{
    unsigned value;
    int result = marshal_enum_parse(&{name}_type, text, &value, err);
    if (result == 0) {{
        *ret = (enum {name})value;
    }}
    return result;
}}

'''

    def object_functions(self, name):
        struct = f'struct {name}'
        return f'''int {name}_from_json(json_t *json, const char *path, {struct} **ret, struct error **err)
{{
    return marshal_read(&{name}_type, json, path, MARSHAL_JSON, ret, err);
}}
int {name}_from_text(json_t *json, const char *path, {struct} **ret, struct error **err)
{{
    return marshal_read(&{name}_type, json, path, MARSHAL_TEXT, ret, err);
}}
json_t *{name}_to_json(const {struct} *value)
{{
    return marshal_write(&{name}_type, &value);
}}
{struct} *{name}_copy(const {struct} *value)
{{
    {struct} *copy;
    marshal_copy(&{name}_type, &value, &copy);
    return copy;
}}
void {name}_free({struct} *value)
{{
    marshal_clear(&{name}_type, &value);
}}

'''

    def list_functions(self, name, type_):
        struct = f'struct {name}'
        read = ''
        for suffix, mode in (('json', 'JSON'), ('text', 'TEXT')):
            read += f'''int {name}_from_{suffix}(json_t *json, const char *path, {struct} **ret, struct error **err)
{{
    {struct} list;
    int result = marshal_read(&{name}_type, json, path, MARSHAL_{mode}, &list, err);
    if (result == 0) {{
        *ret = g_memdup2(&list, sizeof(list));
    }}
    return result;
}}
'''
        return read + f'''json_t *{name}_to_json(const {struct} *value)
{{
    return marshal_write(&{name}_type, value);
}}
{struct} *{name}_copy(const {struct} *value)
{{
    if (!value) {{
        return NULL;
    }}
    {struct} *copy = g_new0({struct}, 1);
    marshal_copy(&{name}_type, value, copy);
    return copy;
}}
void {name}_free({struct} *value)
{{
    if (value) {{
        marshal_clear(&{name}_type, value);
        g_free(value);
    }}
}}
void {name}_append({struct} *list, {self.c_type(type_.element)}item)
{{
    void *slot = marshal_list_grow(&{name}_type, list);
    memcpy(slot, &item, sizeof(item));
}}

'''

    def source(self):
        out = BANNER + '#include "schema/types.h"\n\n#include <glib.h>\n#include <string.h>\n\n'
        for name, type_ in self.lists().items():
            out += (f'const struct marshal_type {name}_type = {{.name = {c_string(name)}, .kind = MARSHAL_LIST, '
                    f'.element = {self.type_reference(type_.element)}}};\n')
        out += '\n'
        for declaration in self.schema.types.values():
            if declaration.meta == 'enum':
                out += self.enum_source(declaration)
        for declaration in self.in_order():
            name = identifier(declaration.name)
            if declaration.meta == 'struct':
                out += self.object_description(declaration.name, name, declaration.members)
            elif declaration.meta == 'union':
                out += self.union_description(declaration)
            else:
                out += self.alternate_description(declaration)
            out += self.object_functions(name)
        for name, type_ in self.lists().items():
            out += self.list_functions(name, type_)
        return out


