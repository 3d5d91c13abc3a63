# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people and clients read: the answer of query-qmp-schema, and the reference manual (markdown)."""

import json

from emit_commands import subject_text
from emit_types import BANNER, c_string
from language import ACCESS_OPTIONS, ListOf

JSON_TYPES = {'str': 'string', 'int': 'int', 'number': 'number', 'bool': 'boolean', 'null': 'null', 'any': 'value'}


class Introspection:
    """Only what commands and events can reach is listed, as the peer does; types keep their own names."""

    def __init__(self, schema):
        self.schema, self.entries = schema, {}

    def reference(self, type_):
        """The name of a type, after making sure that it is listed."""
        if isinstance(type_, ListOf):
            element = self.reference(type_.element)
            name = f'[{element}]'
            self.entries.setdefault(name, {'name': name, 'meta-type': 'array', 'element-type': element})
            return name
        name = 'int' if type_ == 'size' else type_
        shown = f'{name}-type' if name in self.schema.commands else name  # a name stands for one thing
        if shown in self.entries:
            return shown
        if name in JSON_TYPES:
            self.entries[name] = {'name': name, 'meta-type': 'builtin', 'json-type': JSON_TYPES[name]}
        else:
            self.entries[shown] = {}
            entry = getattr(self, 'describe_' + self.schema.types[name].meta)(self.schema.types[name])
            self.entries[shown] = {**entry, 'name': shown}
        return shown

    def empty(self):
        self.entries.setdefault('empty', {'name': 'empty', 'meta-type': 'object', 'members': []})
        return 'empty'

    def members(self, members):
        out = []
        for member in members:
            entry = {'name': member.name, 'type': self.reference(member.type)}
            if member.optional:
                entry['default'] = None
            out.append(entry)
        return out

    def describe_enum(self, declaration):
        names = [value.name for value in declaration.values]
        return {'name': declaration.name, 'meta-type': 'enum', 'members': [{'name': name} for name in names],
                'values': names}

    def describe_struct(self, declaration):
        return {'name': declaration.name, 'meta-type': 'object', 'members': self.members(declaration.members)}

    def describe_union(self, declaration):
        entry = self.describe_struct(declaration)
        tag = next(m for m in declaration.members if m.name == declaration.tag)
        branches = {branch.name: branch.type for branch in declaration.branches}
        entry['tag'] = declaration.tag
        entry['variants'] = [
            {'case': value.name, 'type': self.reference(branches[value.name]) if value.name in branches else self.empty()}
            for value in self.schema.types[tag.type].values]
        return entry

    def describe_alternate(self, declaration):
        return {'name': declaration.name, 'meta-type': 'alternate',
                'members': [{'type': self.reference(choice.type)} for choice in declaration.members]}

    def arguments(self, holder, suffix, more=()):
        """The name of the object that a command or event carries; `more`: members besides its own."""
        takes = getattr(holder, 'takes', None)
        if takes and not more:
            return self.reference(takes)
        if not takes and not holder.members and not more:
            return self.empty()
        name = holder.name + suffix
        self.entries[name] = {}
        if takes:
            entry = getattr(self, 'describe_' + self.schema.types[takes].meta)(self.schema.types[takes])
        else:
            entry = {'meta-type': 'object', 'members': self.members(holder.members)}
        entry['members'] = entry['members'] + self.members(more)
        self.entries[name] = {**entry, 'name': name}
        return name

    def all(self):
        top = []
        for command in self.schema.commands.values():
            more = self.schema.access_members(command)
            entry = {'name': command.name, 'meta-type': 'command', 'arg-type': self.arguments(command, '-arguments', more),
                     'ret-type': self.reference(command.returns) if command.returns else self.empty()}
            if command.oob:
                entry['allow-oob'] = True
            top.append(entry)
        for event in self.schema.events.values():
            top.append({'name': event.name, 'meta-type': 'event', 'arg-type': self.arguments(event, '-data')})
        return top + list(self.entries.values())

    def source(self):
        out = BANNER + '''#include "schema/introspection.h"

const char schema_introspection[] =
    "["
'''
        entries = self.all()
        for i, entry in enumerate(entries):
            out += '    ' + c_string(json.dumps(entry) + (',' if i + 1 < len(entries) else '')) + '\n'
        return out + '    "]";\n'


class Reference:
    def __init__(self, schema):
        self.schema = schema

    def type_text(self, type_):
        if isinstance(type_, ListOf):
            return f'[{self.type_text(type_.element)}]'
        return f'[{type_}](#{type_})' if type_ in self.schema.types else type_

    def member_table(self, members):
        if not members:
            return ''
        out = '| name | type | default | |\n|---|---|---|---|\n'
        for member in members:
            default = member.default if member.default is not None else ('-' if member.optional else 'required')
            limits = ''
            if member.minimum is not None:
                limits = f' {member.minimum}..{member.maximum if member.maximum is not None else ""}'
            out += f'| `{member.name}` | {self.type_text(member.type)}{limits} | {default} | {member.doc} |\n'
        return out + '\n'

    def claims_text(self, claims):
        if claims.reason:
            return f'Claims: {"its actions claim" if claims.of_actions else "none"}, because {claims.reason}.\n\n'
        out = '| claims on | requires | does not allow others |\n|---|---|---|\n'
        for clause in claims.clauses:
            cells = {'require': [], 'deny': []}
            for part in clause.parts:
                text = ', '.join(part.actions) if len(part.actions) < 7 else 'everything'
                text += ''.join(f' ({modifier})' for modifier in part.modifiers)
                text += ''.join(f' if {c}' for c in part.condition) + ''.join(f' unless {c}' for c in part.unless)
                cells[part.verb].append(text)
            out += f'| {subject_text(clause)} | {"; ".join(cells["require"]) or "-"} | {"; ".join(cells["deny"]) or "-"} |\n'
        if claims.adopt:
            out += '\nAdopts the backing edges from top down to base.\n'
        if claims.sources:
            out += '\nIts own writes of metadata take their data from the nodes of its range.\n'
        return out + '\n'

    def command(self, command):
        out = f'### {command.name}\n\n{command.doc}\n\n' + self.member_table(command.members)
        if command.takes:
            out += f'Takes {self.type_text(command.takes)}.\n\n'
        if self.schema.access_members(command):
            out += f'Takes also the members of {self.type_text(ACCESS_OPTIONS)}.\n\n'
        if command.returns:
            out += f'Returns {self.type_text(command.returns)}.\n\n'
        if command.oob:
            out += 'May be run out of band (`exec-oob`).\n\n'
        return out + self.claims_text(command.claims)

    def type(self, declaration):
        out = f'### {declaration.name}\n\n{declaration.doc}\n\n'
        if declaration.meta == 'enum':
            return out + ''.join(
                f'- `{value.name}`{": " + value.doc if value.doc else ""}\n' for value in declaration.values) + '\n'
        if declaration.meta == 'alternate':
            return out + ''.join(
                f'- {c.name}: {self.type_text(c.type)}\n' for c in declaration.members) + '\n'
        out += self.member_table(declaration.members)
        for branch in getattr(declaration, 'branches', []):
            out += f'- with `{declaration.tag}` = `{branch.name}` also the members of {self.type_text(branch.type)}\n'
        return out + '\n'

    def text(self):
        out = ('# Reference of the control language\n\nGenerated from `schema/` by `schema/generate.py`; the rules '
               'behind the claims are in `access.md`.\n\n## Commands\n\n')
        out += ''.join(self.command(c) for c in sorted(self.schema.commands.values(), key=lambda c: c.name))
        out += '## Events\n\n'
        for event in sorted(self.schema.events.values(), key=lambda e: e.name):
            out += f'### {event.name}\n\n{event.doc}\n\n' + self.member_table(event.members)
        out += '## Types\n\n' + ''.join(self.type(d) for d in sorted(self.schema.types.values(), key=lambda d: d.name))
        return out.rstrip() + '\n'
