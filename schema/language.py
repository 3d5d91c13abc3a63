# SPDX-License-Identifier: LGPL-2.1-or-later
"""The schema language: tokens, parser, model and checks. doc/schema.md has the language by example.

A schema is a set of declarations (enum, struct, union, alternate, command, event). Parsing gives a `Schema`
whose names are all resolved; anything that is wrong raises `SchemaError` with file and line. Nothing here knows
what is generated.
"""

import re

BUILTINS = ('str', 'int', 'size', 'bool', 'number', 'any', 'null')
ACTIONS = ('read-data', 'read-metadata', 'write-data', 'write-beneath', 'write-metadata', 'attributes', 'graph')
# A modifier changes what the action before it means; it may follow that action only.
MODIFIERS = {'by-export': ('require', 'write-data'), 'except-exports': ('deny', 'write-data'),
             'except-inside': ('deny', 'write-metadata')}
CONDITIONS = ('active', 'writable', 'exclusive', 'shrink', 'replace', 'discard', 'shallow', 'relink', 'differ', 'demote', 'longer')
VARIABLES = ('node', 'top', 'base', 'target', 'bottom', 'overlay', 'data')
# Roles and how many variables they take.
ROLES = {'between': 2, 'overlays': 1, 'range': 2, 'below': 1, 'above': 1}
# The struct whose members every command with claims takes besides its own.
ACCESS_OPTIONS = 'access-options'
COMMAND_KEYS = ('takes', 'returns', 'oob', 'session', 'claims')
INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)


class SchemaError(Exception):
    def __init__(self, where, text):
        super().__init__(f'{where}: {text}')


class Node:
    """A declaration or a part of one; `where` is file:line."""

    def __init__(self, where, **fields):
        self.where = where
        self.__dict__.update(fields)


class ListOf:
    """The type [element]."""

    def __init__(self, element):
        self.element = element


TOKEN = re.compile(r'''
    (?P<space>[ \t]+) | (?P<newline>\n) | (?P<doc>\#\#[^\n]*) | (?P<comment>\#[^\n]*) |
    (?P<string>"[^"\n]*") | (?P<range>\.\.) | (?P<number>-?[0-9]+(?![A-Za-z0-9_-])) |
    (?P<word>[A-Za-z0-9_][A-Za-z0-9_-]*) | (?P<mark>->|[{}\[\]():;?=,])
''', re.VERBOSE)


class Token:
    def __init__(self, kind, text, where, own_line):
        self.kind, self.text, self.where, self.own_line = kind, text, where, own_line


def tokenize(text, name):
    """Tokens; a doc token knows whether it has the line for itself."""
    tokens, position, line, fresh = [], 0, 1, True
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise SchemaError(f'{name}:{line}', f'unexpected character {text[position]!r}')
        kind, position = match.lastgroup, match.end()
        if kind == 'newline':
            line, fresh = line + 1, True
        elif kind not in ('space', 'comment'):
            content = match.group()
            if kind == 'doc':
                content = content[2:].strip()
            elif kind == 'string':
                content = content[1:-1]
            tokens.append(Token(kind, content, f'{name}:{line}', fresh))
            fresh = False
    tokens.append(Token('end', 'the end of the file', f'{name}:{line}', True))
    return tokens


class Parser:
    def __init__(self, text, name):
        self.tokens = tokenize(text, name)
        self.at = 0

    # Reading tokens

    def peek(self):
        return self.tokens[self.at]

    def next(self):
        token = self.tokens[self.at]
        self.at += 1
        return token

    def fail(self, text, token=None):
        raise SchemaError((token or self.peek()).where, text)

    def take(self, text):
        """Takes the mark or word `text` if it is next."""
        if self.peek().kind in ('mark', 'word', 'range') and self.peek().text == text:
            self.at += 1
            return True
        return False

    def expect(self, text):
        if not self.take(text):
            self.fail(f'expected {text!r}, found {self.peek().text!r}')

    def word(self, what):
        token = self.next()
        if token.kind not in ('word', 'number'):
            self.fail(f'expected {what}, found {token.text!r}', token)
        return token.text

    def docs_above(self):
        lines = []
        while self.peek().kind == 'doc':
            lines.append(self.next().text)
        return ' '.join(line for line in lines if line)

    def doc_behind(self):
        if self.peek().kind == 'doc' and not self.peek().own_line:
            return self.next().text
        return ''

    # Declarations

    def parse(self):
        declarations = []
        while True:
            doc = self.docs_above()
            token = self.next()
            if token.kind == 'end':
                return declarations
            parse = getattr(self, 'parse_' + token.text, None) if token.kind == 'word' else None
            if not parse or token.text not in ('enum', 'struct', 'union', 'alternate', 'command', 'event'):
                self.fail(f'expected a declaration, found {token.text!r}', token)
            name = self.word('a name')
            if not doc:
                self.fail(f'{token.text} {name} has no description (## above it)', token)
            declaration = parse(name, token.where)
            declaration.name, declaration.doc, declaration.meta = name, doc, token.text
            declarations.append(declaration)

    def parse_enum(self, name, where):
        self.expect('{')
        values = []
        while not self.take('}'):
            doc = self.docs_above()
            values.append(Node(self.peek().where, name=self.word('a value'), doc=doc or self.doc_behind()))
        if not values:
            self.fail(f'enum {name} has no values')
        self.unique(values, 'value')
        return Node(where, values=values)

    def parse_struct(self, name, where):
        return Node(where, members=self.members())

    def parse_event(self, name, where):
        return Node(where, members=self.members())

    def parse_alternate(self, name, where):
        return Node(where, members=self.members())

    def parse_union(self, name, where):
        self.expect('{')
        members, tag, branches = [], None, []
        while not self.take('}'):
            doc = self.docs_above()
            if self.take('by'):
                tag = self.word('the discriminator')
                self.expect('{')
                while not self.take('}'):
                    self.docs_above()
                    start = self.peek().where
                    value = self.word('a value')
                    self.expect('->')
                    branches.append(Node(start, name=value, type=self.type(), doc=self.doc_behind()))
            else:
                members.append(self.member(doc))
        if not tag:
            raise SchemaError(where, f'union {name} has no "by" part')
        self.unique(members, 'member')
        self.unique(branches, 'branch')
        return Node(where, members=members, tag=tag, branches=branches)

    def parse_command(self, name, where):
        command = Node(where, members=[], takes=None, returns=None, oob=False, session=False, claims=None)
        self.expect('{')
        while not self.take('}'):
            doc = self.docs_above()
            key = self.peek().text
            if self.peek().kind == 'word' and key in COMMAND_KEYS:
                getattr(self, 'command_' + key)(command)
            else:
                command.members.append(self.member(doc))
        if command.claims is None:
            raise SchemaError(where, f'command {name} has no claims clause (say which, or why none)')
        if command.takes and command.members:
            raise SchemaError(where, f'command {name} both takes a type and has members')
        self.unique(command.members, 'member')
        return command

    def command_takes(self, command):
        self.expect('takes')
        self.expect(':')
        command.takes = self.type()

    def command_returns(self, command):
        self.expect('returns')
        self.expect(':')
        command.returns = self.type()

    def command_oob(self, command):
        self.expect('oob')
        self.expect(':')
        self.expect('yes')
        command.oob = True

    def command_session(self, command):
        self.expect('session')
        self.expect(':')
        self.expect('yes')
        command.session = True

    # Members and types

    def unique(self, nodes, what):
        seen = set()
        for node in nodes:
            if node.name in seen:
                raise SchemaError(node.where, f'{what} {node.name} stands here twice')
            seen.add(node.name)

    def members(self):
        self.expect('{')
        members = []
        while not self.take('}'):
            members.append(self.member(self.docs_above()))
        self.unique(members, 'member')
        return members

    def member(self, doc):
        where = self.peek().where
        member = Node(where, name=self.word('a member'), optional=self.take('?'), default=None,
                      minimum=None, maximum=None)
        self.expect(':')
        member.type = self.type()
        if self.take('in'):
            member.minimum = self.limit(member)
            self.expect('..')
            if self.peek().kind == 'number':
                member.maximum = self.limit(member)
        if self.take('='):
            token = self.next()
            if token.kind not in ('word', 'number', 'string'):
                self.fail('expected a default', token)
            if not member.optional:
                self.fail(f'member {member.name} has a default but is not optional', token)
            member.default = token.text
        member.doc = doc or self.doc_behind()
        return member

    def limit(self, member):
        token = self.next()
        if token.kind != 'number':
            self.fail('expected a number', token)
        if member.type not in ('int', 'size'):
            self.fail('only int and size have limits', token)
        return int(token.text)

    def type(self):
        if self.take('['):
            element = self.type()
            self.expect(']')
            return ListOf(element)
        return self.word('a type')

    # Claims

    def command_claims(self, command):
        where = self.peek().where
        self.expect('claims')
        if command.claims:
            raise SchemaError(where, 'a second claims clause')
        claims = Node(where, clauses=[], adopt=None, sources=False, reason=None, of_actions=False)
        if self.take(':'):
            claims.of_actions = self.take('of-actions')
            if not claims.of_actions:
                self.expect('none')
            self.expect('because')
            token = self.next()
            if token.kind != 'string' or len(token.text.split()) < 3:
                self.fail('claims: none because "a reason, in words"', token)
            claims.reason = token.text
        else:
            self.expect('{')
            while not self.take('}'):
                self.claim_line(claims)
            if not claims.clauses:
                raise SchemaError(where, 'claims with no clause')
        command.claims = claims

    def claim_line(self, claims):
        where = self.peek().where
        if self.take('adopt'):
            self.expect('chain')
            self.expect('(')
            self.expect('top')
            self.expect(',')
            self.expect('base')
            self.expect(')')
            claims.adopt = 'chain'
        elif self.take('sources'):
            self.expect('range')
            claims.sources = True
        else:
            role, variables = self.claim_subject()
            self.expect(':')
            parts = [self.claim_part()]
            while self.take(';'):
                parts.append(self.claim_part())
            claims.clauses.append(Node(where, role=role, variables=variables, parts=parts))

    def claim_subject(self):
        token = self.peek()
        name = self.word('a node or role')
        if name in VARIABLES:
            return 'node', [name]
        if name not in ROLES:
            self.fail(f'{name!r} is neither a variable ({", ".join(VARIABLES)}) nor a role ({", ".join(ROLES)})', token)
        self.expect('(')
        variables = [self.claim_variable()]
        while self.take(','):
            variables.append(self.claim_variable())
        self.expect(')')
        if len(variables) != ROLES[name]:
            self.fail(f'{name} takes {ROLES[name]} variables', token)
        return name, variables

    def claim_variable(self):
        token = self.peek()
        name = self.word('a variable')
        if name not in VARIABLES:
            self.fail(f'{name!r} is not one of {", ".join(VARIABLES)}', token)
        return name

    def claim_part(self):
        where = self.peek().where
        verb = self.word('require or deny')
        if verb not in ('require', 'deny'):
            raise SchemaError(where, f'expected require or deny, found {verb!r}')
        part = Node(where, verb=verb, actions=[], modifiers=[], condition=[], unless=[])
        if self.take('all'):
            part.actions = list(ACTIONS)
        while self.peek().text in ACTIONS or self.peek().text in MODIFIERS:
            token = self.next()
            if token.text in ACTIONS:
                part.actions.append(token.text)
            elif not part.actions or (verb, part.actions[-1]) != MODIFIERS[token.text]:
                self.fail(f'{token.text} must follow "{" ".join(MODIFIERS[token.text])}"', token)
            else:
                part.modifiers.append(token.text)
        if not part.actions:
            self.fail(f'{verb} what? Actions are {", ".join(ACTIONS)}')
        while self.peek().text in ('if', 'unless'):
            bits = part.condition if self.next().text == 'if' else part.unless
            token = self.next()
            if token.text not in CONDITIONS:
                self.fail(f'{token.text!r} is not one of {", ".join(CONDITIONS)}', token)
            bits.append(token.text)
        return part


class Schema:
    """All declarations, by name and in order, with every reference checked."""

    def __init__(self, declarations):
        self.types, self.commands, self.events = {}, {}, {}
        for declaration in declarations:
            group = {'command': self.commands, 'event': self.events}.get(declaration.meta, self.types)
            if declaration.name in group or declaration.name in BUILTINS:
                raise SchemaError(declaration.where, f'{declaration.name} is declared twice')
            group[declaration.name] = declaration
        for declaration in declarations:
            getattr(self, 'check_' + declaration.meta)(declaration)

    def meta(self, type_):
        """'list', a builtin's name, or the declaration's word."""
        if isinstance(type_, ListOf):
            return 'list'
        return type_ if type_ in BUILTINS else self.types[type_].meta

    def check_type(self, type_, where):
        if isinstance(type_, ListOf):
            if isinstance(type_.element, ListOf):
                raise SchemaError(where, 'lists of lists are not supported')
            self.check_type(type_.element, where)
        elif type_ not in self.types and type_ not in BUILTINS:
            raise SchemaError(where, f'there is no type {type_!r}')

    def check_members(self, members):
        for member in members:
            self.check_type(member.type, member.where)
            if member.type == 'null':
                raise SchemaError(member.where, 'null is for alternates only')
            if member.default is not None:
                self.check_default(member)

    def check_default(self, member):
        meta = self.meta(member.type)
        if meta == 'enum':
            good = member.default in [value.name for value in self.types[member.type].values]
        elif meta == 'bool':
            good = member.default in ('true', 'false')
        elif meta in ('int', 'size'):
            good = re.fullmatch(r'-?[0-9]+', member.default) is not None
        else:
            good = meta == 'str'
        if not good:
            raise SchemaError(member.where, f'{member.default!r} cannot be a default of type {meta}')

    def check_enum(self, declaration):
        pass

    def check_struct(self, declaration):
        self.check_members(declaration.members)

    def check_event(self, declaration):
        if not re.fullmatch(r'[A-Z][A-Z0-9_]*', declaration.name):
            raise SchemaError(declaration.where, 'events are written in upper case')
        self.check_members(declaration.members)

    def check_alternate(self, declaration):
        seen = {}
        for choice in declaration.members:
            self.check_type(choice.type, choice.where)
            meta = self.meta(choice.type)
            kind = {'struct': 'object', 'union': 'object', 'enum': 'string', 'str': 'string', 'size': 'int'}.get(meta, meta)
            if choice.optional or kind not in ('object', 'string', 'int', 'bool', 'list', 'null'):
                raise SchemaError(choice.where, f'{choice.name} cannot be a choice of an alternate')
            if kind in seen:
                raise SchemaError(choice.where, f'{choice.name} and {seen[kind]} are both a JSON {kind}')
            seen[kind] = choice.name

    def check_union(self, declaration):
        self.check_members(declaration.members)
        tag = next((m for m in declaration.members if m.name == declaration.tag), None)
        if not tag or self.meta(tag.type) != 'enum' or (tag.optional and tag.default is None):
            raise SchemaError(declaration.where, f'the discriminator {declaration.tag} must be a required enum member')
        values = [value.name for value in self.types[tag.type].values]
        base = {member.name for member in declaration.members}
        for branch in declaration.branches:
            self.check_type(branch.type, branch.where)
            if branch.name not in values:
                raise SchemaError(branch.where, f'{branch.name} is no value of {tag.type}')
            if self.meta(branch.type) != 'struct':
                raise SchemaError(branch.where, 'a branch is a struct')
            for member in self.types[branch.type].members:
                if member.name in base:
                    raise SchemaError(branch.where, f'{branch.type}.{member.name} is a member of the union already')

    def check_command(self, declaration):
        self.check_members(declaration.members)
        if declaration.takes:
            self.check_type(declaration.takes, declaration.where)
            if self.meta(declaration.takes) not in ('struct', 'union'):
                raise SchemaError(declaration.where, 'a command takes a struct or a union')
        if declaration.returns:
            self.check_type(declaration.returns, declaration.where)
            if self.meta(declaration.returns) not in ('struct', 'union', 'list', 'any'):
                raise SchemaError(declaration.where, 'a command returns a struct, a union, a list or any')
        self.check_access_options(declaration)
        claims = declaration.claims
        used = {v for clause in claims.clauses for v in clause.variables}
        if claims.adopt and not {'top', 'base'} <= used:
            raise SchemaError(claims.where, 'adopt chain(top, base) needs claims on top and base')
        if claims.sources and not any(clause.role == 'range' for clause in claims.clauses):
            raise SchemaError(claims.where, 'sources range needs a range')


    def access_members(self, command):
        """The members that a command takes because it, or one of its actions, claims something."""
        options = self.types.get(ACCESS_OPTIONS)
        return options.members if options and (command.claims.clauses or command.claims.of_actions) else []

    def check_access_options(self, declaration):
        members = self.access_members(declaration)
        if any(not member.optional for member in members):
            raise SchemaError(self.types[ACCESS_OPTIONS].where, f'members of {ACCESS_OPTIONS} are optional')
        if members and declaration.returns:
            raise SchemaError(declaration.where, 'a command with claims returns nothing: it may be answered before it begins')
        own = list(declaration.members)
        if declaration.takes:
            taken = self.types[declaration.takes]
            own += taken.members + [m for b in getattr(taken, 'branches', []) for m in self.types[b.type].members]
        taken_names = {member.name for member in own}
        for member in members:
            if member.name in taken_names:
                raise SchemaError(declaration.where, f'{member.name} is a member of {ACCESS_OPTIONS} already')


def load(files):
    """The schema in a list of (name, text)."""
    declarations = []
    for name, text in files:
        declarations += Parser(text, name).parse()
    return Schema(declarations)
