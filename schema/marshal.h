/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_SCHEMA_MARSHAL_H
#define INTERLOCK_SCHEMA_MARSHAL_H

#include "base/error.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The one interpreter between JSON and the C types of the schema. The generator writes a description of each
 * type (const data); reading, writing, copying and freeing walk it. Users call the generated faces
 * (job_info_from_json() and so on) instead. Any thread; no state.
 *
 * How a type lies in its slot (a member of a struct, or an item of a list):
 *   bool bool | int int64_t | size uint64_t | number double | enum, 4 bytes | str char * | any json_t * |
 *   object and alternate: a pointer | list: struct { size_t count; T *items; } in place
 */
enum marshal_kind {
    MARSHAL_BOOL,
    MARSHAL_INT,
    MARSHAL_SIZE,
    MARSHAL_NUMBER,
    MARSHAL_ENUM,
    MARSHAL_STR,
    MARSHAL_ANY,
    MARSHAL_NULL,
    MARSHAL_OBJECT,
    MARSHAL_ALTERNATE,
    MARSHAL_LIST,
};

/* What scalars look like in the tree that is read. */
enum marshal_mode {
    MARSHAL_JSON, /* JSON's own types */
    MARSHAL_TEXT, /* a command line's key=value pairs: strings stand for every scalar ("10G", "on") as well */
};

struct marshal_type {
    const char *name;
    enum marshal_kind kind;
    size_t size;                                /* objects and alternates: of the C struct */
    const char *const *values;                  /* enums: names by value */
    const struct marshal_member *members;       /* objects: members; alternates: the choices, by kind */
    unsigned count;                             /* of values or members */
    const struct marshal_member *tag;           /* unions: the discriminator, one of members; else NULL */
    const struct marshal_type *const *branches; /* unions: an object per value of the tag, or NULL for no members */
    size_t branch_offset;                       /* unions and alternates: of the C union */
    const struct marshal_type *element;         /* lists */
};

#define MARSHAL_NO_OFFSET ((size_t)-1)
struct marshal_member {
    const char *name;
    const struct marshal_type *type;
    size_t offset;
    size_t has_offset; /* of the has_x flag, or MARSHAL_NO_OFFSET */
    bool optional;
    bool has_default;
    int64_t default_value;    /* bool, int, size and enum */
    const char *default_text; /* str */
    int64_t minimum, maximum; /* int and size */
};

extern const struct marshal_type marshal_bool, marshal_int, marshal_size, marshal_number, marshal_str, marshal_any,
    marshal_null;

/* Reads `json` (borrowed) into the slot. `path` (may be NULL) names the value in error texts. -EINVAL with a sentence
 * that begins with the path of what is wrong; then the slot is untouched. */
int marshal_read(const struct marshal_type *type, json_t *json, const char *path, enum marshal_mode mode, void *slot,
                 struct error **err);
/* A new reference. What is required must be there: it is an assertion. */
json_t *marshal_write(const struct marshal_type *type, const void *slot);
/* Frees what the slot owns and zeroes it. Zeroed and half-filled objects are accepted. */
void marshal_clear(const struct marshal_type *type, void *slot);
/* Deep copy (JSON of type any is shared) into a slot whose content is overwritten. */
void marshal_copy(const struct marshal_type *type, const void *from, void *to);

/* The name of an enum's value; an unknown one is an assertion. */
const char *marshal_enum_name(const struct marshal_type *type, unsigned value);
/* -EINVAL, naming what is allowed. */
int marshal_enum_parse(const struct marshal_type *type, const char *text, unsigned *ret, struct error **err);
/* Makes room for one more item and returns its (zeroed) slot. */
void *marshal_list_grow(const struct marshal_type *type, void *list);

#endif
