/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Between JSON and the C types of the schema: an interpreter over the generated type descriptions.
 *
 * Invariants:
 * 1. A read that fails leaves nothing behind: every half-built object is cleared before the error goes up.
 * 2. Nothing in the input is ignored: a member that the type does not have is an error that names it.
 * 3. Paths cost nothing until there is an error: they are a chain of frames on the stack.
 * 4. Recursion is as deep as the JSON is; the parser of outside input bounds that (see control/json_stream.h).
 *
 * It knows no command and no node: what a value means is checked by whoever uses it.
 */
#include "schema/marshal.h"

#include "base/size.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

const struct marshal_type marshal_bool = {.name = "bool", .kind = MARSHAL_BOOL};
const struct marshal_type marshal_int = {.name = "int", .kind = MARSHAL_INT};
const struct marshal_type marshal_size = {.name = "size", .kind = MARSHAL_SIZE};
const struct marshal_type marshal_number = {.name = "number", .kind = MARSHAL_NUMBER};
const struct marshal_type marshal_str = {.name = "str", .kind = MARSHAL_STR};
const struct marshal_type marshal_any = {.name = "any", .kind = MARSHAL_ANY};
const struct marshal_type marshal_null = {.name = "null", .kind = MARSHAL_NULL};

/* Every list has this shape. */
struct any_slots {
    size_t count;
    char *items;
};

/* Where we are in the input. name NULL: item `index` of a list. */
struct place {
    const struct place *parent;
    const char *name;
    size_t index;
};

struct reader {
    enum marshal_mode mode;
    struct error **err;
};

static int read_slot(const struct reader *reader, const struct marshal_type *type, const struct marshal_member *member,
                     json_t *json, const struct place *place, void *slot);

static size_t slot_size(const struct marshal_type *type)
{
    switch (type->kind) {
    case MARSHAL_BOOL:
        return sizeof(bool);
    case MARSHAL_INT:
    case MARSHAL_SIZE:
        return sizeof(int64_t);
    case MARSHAL_NUMBER:
        return sizeof(double);
    case MARSHAL_ENUM:
        return sizeof(unsigned);
    case MARSHAL_LIST:
        return sizeof(struct any_slots);
    default:
        return sizeof(void *);
    }
}

static void place_append(const struct place *place, GString *out)
{
    if (!place) {
        return;
    }
    place_append(place->parent, out);
    if (!place->name) {
        g_string_append_printf(out, "[%zu]", place->index);
    } else {
        g_string_append_printf(out, "%s%s", out->len ? "." : "", place->name);
    }
}

static int fail(const struct reader *reader, const struct place *place, const char *format, ...)
    __attribute__((format(printf, 3, 4), noinline));
static int fail(const struct reader *reader, const struct place *place, const char *format, ...)
{
    g_autoptr(GString) path = g_string_new(NULL);
    place_append(place, path);
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *what = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    return error_set(reader->err, -EINVAL, "%s: %s", path->len ? path->str : "arguments", what);
}

static char *values_format(const struct marshal_type *type)
{
    GString *out = g_string_new(NULL);
    for (unsigned i = 0; i < type->count; i++) {
        g_string_append_printf(out, "%s%s", i ? ", " : "", type->values[i]);
    }
    return g_string_free(out, FALSE);
}

static bool enum_find(const struct marshal_type *type, const char *text, unsigned *ret)
{
    for (unsigned i = 0; i < type->count; i++) {
        if (strcmp(type->values[i], text) == 0) {
            *ret = i;
            return true;
        }
    }
    return false;
}

/* The text of a scalar on a command line, or NULL when the value is to be taken as JSON. */
static const char *scalar_text(const struct reader *reader, json_t *json)
{
    return reader->mode == MARSHAL_TEXT && json_is_string(json) ? json_string_value(json) : NULL;
}

static int read_bool(const struct reader *reader, json_t *json, const struct place *place, bool *slot)
{
    const char *text = scalar_text(reader, json);
    if (text) {
        static const char *const on[] = {"on", "yes", "true", "y", NULL}, *const off[] = {"off", "no", "false", "n",
                                                                                          NULL};
        bool is_on = g_strv_contains(on, text);
        if (!is_on && !g_strv_contains(off, text)) {
            return fail(reader, place, "expected on or off, not '%s'", text);
        }
        *slot = is_on;
        return 0;
    }
    if (!json_is_boolean(json)) {
        return fail(reader, place, "expected true or false");
    }
    *slot = json_is_true(json);
    return 0;
}

/* Integers and sizes both: they differ in C type, limits and the texts that they accept. */
static int read_integer(const struct reader *reader, const struct marshal_type *type,
                        const struct marshal_member *member, json_t *json, const struct place *place, void *slot)
{
    bool is_size = type->kind == MARSHAL_SIZE;
    int64_t minimum = member ? member->minimum : is_size ? 0 : INT64_MIN;
    int64_t maximum = member ? member->maximum : INT64_MAX;
    int64_t value = 0;
    const char *text = scalar_text(reader, json);
    if (text && is_size) {
        uint64_t bytes;
        if (size_parse(text, &bytes) < 0 || bytes > INT64_MAX) {
            return fail(reader, place, "'%s' is not a size (such as 512, 64k or 1.5G)", text);
        }
        value = (int64_t)bytes;
    } else if (text) {
        if (!g_ascii_string_to_signed(text, 10, INT64_MIN, INT64_MAX, &value, NULL)) {
            return fail(reader, place, "'%s' is not an integer", text);
        }
    } else if (json_is_integer(json)) {
        value = json_integer_value(json);
    } else {
        return fail(reader, place, "expected an integer");
    }
    if (value < minimum || value > maximum) {
        if (maximum == INT64_MAX) {
            return fail(reader, place, "%" G_GINT64_FORMAT " is less than %" G_GINT64_FORMAT, value, minimum);
        }
        return fail(reader, place, "%" G_GINT64_FORMAT " is not between %" G_GINT64_FORMAT " and %" G_GINT64_FORMAT,
                    value, minimum, maximum);
    }
    memcpy(slot, &value, sizeof(value));
    return 0;
}

static int read_number(const struct reader *reader, json_t *json, const struct place *place, double *slot)
{
    const char *text = scalar_text(reader, json);
    if (text) {
        char *end;
        *slot = g_ascii_strtod(text, &end);
        return *text && !*end ? 0 : fail(reader, place, "'%s' is not a number", text);
    }
    if (!json_is_number(json)) {
        return fail(reader, place, "expected a number");
    }
    *slot = json_number_value(json);
    return 0;
}

static int read_enum(const struct reader *reader, const struct marshal_type *type, json_t *json,
                     const struct place *place, unsigned *slot)
{
    if (json_is_string(json) && enum_find(type, json_string_value(json), slot)) {
        return 0;
    }
    g_autofree char *allowed = values_format(type);
    if (!json_is_string(json)) {
        return fail(reader, place, "expected one of %s", allowed);
    }
    return fail(reader, place, "'%s' is not one of %s", json_string_value(json), allowed);
}

static const struct marshal_member *member_find(const struct marshal_type *type, const char *name)
{
    for (unsigned i = 0; type && i < type->count; i++) {
        if (strcmp(type->members[i].name, name) == 0) {
            return &type->members[i];
        }
    }
    return NULL;
}

static void apply_default(const struct marshal_member *member, char *object)
{
    void *slot = object + member->offset;
    switch (member->type->kind) {
    case MARSHAL_BOOL:
        *(bool *)slot = member->default_value != 0;
        break;
    case MARSHAL_INT:
    case MARSHAL_SIZE:
        memcpy(slot, &member->default_value, sizeof(member->default_value));
        break;
    case MARSHAL_ENUM:
        *(unsigned *)slot = (unsigned)member->default_value;
        break;
    case MARSHAL_STR:
        *(char **)slot = g_strdup(member->default_text);
        break;
    default:
        g_assert_not_reached();
    }
}

static int read_members(const struct reader *reader, const struct marshal_type *type, json_t *json,
                        const struct place *parent, char *object)
{
    for (unsigned i = 0; i < type->count; i++) {
        const struct marshal_member *member = &type->members[i];
        struct place place = {parent, member->name, 0};
        json_t *value = json_object_get(json, member->name);
        if (!value) {
            if (!member->optional) {
                return fail(reader, &place, "is required");
            }
            if (member->has_default) {
                apply_default(member, object);
            }
            continue;
        }
        int result = read_slot(reader, member->type, member, value, &place, object + member->offset);
        if (result < 0) {
            return result;
        }
        if (member->has_offset != MARSHAL_NO_OFFSET) {
            *(bool *)(object + member->has_offset) = true;
        }
    }
    return 0;
}

static const struct marshal_type *branch_of(const struct marshal_type *type, const char *object)
{
    if (!type->tag) {
        return NULL;
    }
    unsigned value = *(const unsigned *)(object + type->tag->offset);
    g_assert(value < type->tag->type->count);
    return type->branches[value];
}

static int check_names(const struct reader *reader, const struct marshal_type *type, const struct marshal_type *branch,
                       json_t *json, const struct place *parent)
{
    const char *name;
    json_t *value;
    json_object_foreach(json, name, value)
    {
        if (!member_find(type, name) && !member_find(branch, name)) {
            struct place place = {parent, name, 0};
            return fail(reader, &place, "there is no such parameter here");
        }
    }
    return 0;
}

static void clear_members(const struct marshal_type *type, char *object)
{
    const struct marshal_type *branch = branch_of(type, object);
    if (branch) {
        clear_members(branch, object + type->branch_offset);
    }
    for (unsigned i = 0; i < type->count; i++) {
        marshal_clear(type->members[i].type, object + type->members[i].offset);
    }
}

static int read_object(const struct reader *reader, const struct marshal_type *type, json_t *json,
                       const struct place *place, void **slot)
{
    if (!json_is_object(json)) {
        return fail(reader, place, "expected an object");
    }
    char *object = g_malloc0(MAX(type->size, 1));
    int result = read_members(reader, type, json, place, object);
    const struct marshal_type *branch = NULL;
    if (result == 0) {
        branch = branch_of(type, object);
        result = check_names(reader, type, branch, json, place);
    }
    if (result == 0 && branch) {
        result = read_members(reader, branch, json, place, object + type->branch_offset);
    }
    if (result < 0) {
        clear_members(type, object);
        g_free(object);
        return result;
    }
    *slot = object;
    return 0;
}

static bool choice_fits(const struct marshal_type *type, json_t *json)
{
    switch (type->kind) {
    case MARSHAL_OBJECT:
        return json_is_object(json);
    case MARSHAL_STR:
    case MARSHAL_ENUM:
        return json_is_string(json);
    case MARSHAL_NULL:
        return json_is_null(json);
    case MARSHAL_BOOL:
        return json_is_boolean(json);
    case MARSHAL_INT:
    case MARSHAL_SIZE:
        return json_is_integer(json);
    case MARSHAL_LIST:
        return json_is_array(json);
    default:
        return false;
    }
}

static const char *choice_name(const struct marshal_type *type)
{
    switch (type->kind) {
    case MARSHAL_OBJECT:
        return "an object";
    case MARSHAL_STR:
    case MARSHAL_ENUM:
        return "a string";
    case MARSHAL_NULL:
        return "null";
    case MARSHAL_BOOL:
        return "true or false";
    case MARSHAL_LIST:
        return "a list";
    default:
        return "an integer";
    }
}

static int read_alternate(const struct reader *reader, const struct marshal_type *type, json_t *json,
                          const struct place *place, void **slot)
{
    for (unsigned i = 0; i < type->count; i++) {
        if (choice_fits(type->members[i].type, json)) {
            char *alternate = g_malloc0(type->size);
            *(unsigned *)alternate = i;
            int result = read_slot(reader, type->members[i].type, NULL, json, place, alternate + type->branch_offset);
            if (result < 0) {
                g_free(alternate);
                return result;
            }
            *slot = alternate;
            return 0;
        }
    }
    g_autoptr(GString) choices = g_string_new(NULL);
    for (unsigned i = 0; i < type->count; i++) {
        g_string_append_printf(choices, "%s%s", i ? " or " : "", choice_name(type->members[i].type));
    }
    return fail(reader, place, "expected %s", choices->str);
}

static int read_list(const struct reader *reader, const struct marshal_type *type, json_t *json,
                     const struct place *parent, struct any_slots *slot)
{
    if (!json_is_array(json)) {
        return fail(reader, parent, "expected a list");
    }
    struct any_slots list = {0, NULL};
    size_t item_size = slot_size(type->element), count = json_array_size(json);
    list.items = g_malloc0_n(MAX(count, 1), item_size);
    for (; list.count < count; list.count++) {
        struct place place = {parent, NULL, list.count};
        int result = read_slot(reader, type->element, NULL, json_array_get(json, list.count), &place,
                               list.items + list.count * item_size);
        if (result < 0) {
            marshal_clear(type, &list);
            return result;
        }
    }
    *slot = list;
    return 0;
}

static int read_slot(const struct reader *reader, const struct marshal_type *type, const struct marshal_member *member,
                     json_t *json, const struct place *place, void *slot)
{
    switch (type->kind) {
    case MARSHAL_BOOL:
        return read_bool(reader, json, place, slot);
    case MARSHAL_INT:
    case MARSHAL_SIZE:
        return read_integer(reader, type, member, json, place, slot);
    case MARSHAL_NUMBER:
        return read_number(reader, json, place, slot);
    case MARSHAL_ENUM:
        return read_enum(reader, type, json, place, slot);
    case MARSHAL_STR:
        if (!json_is_string(json)) {
            return fail(reader, place, "expected a string");
        }
        *(char **)slot = g_strdup(json_string_value(json));
        return 0;
    case MARSHAL_ANY:
        *(json_t **)slot = json_incref(json);
        return 0;
    case MARSHAL_NULL:
        return json_is_null(json) ? 0 : fail(reader, place, "expected null");
    case MARSHAL_OBJECT:
        return read_object(reader, type, json, place, slot);
    case MARSHAL_ALTERNATE:
        return read_alternate(reader, type, json, place, slot);
    case MARSHAL_LIST:
        return read_list(reader, type, json, place, slot);
    }
    g_assert_not_reached();
}

int marshal_read(const struct marshal_type *type, json_t *json, const char *path, enum marshal_mode mode, void *slot,
                 struct error **err)
{
    struct reader reader = {mode, err};
    struct place place = {NULL, path, 0};
    return read_slot(&reader, type, NULL, json, path ? &place : NULL, slot);
}

static void write_members(const struct marshal_type *type, const char *object, json_t *out)
{
    for (unsigned i = 0; i < type->count; i++) {
        const struct marshal_member *member = &type->members[i];
        const void *slot = object + member->offset;
        if (member->has_offset != MARSHAL_NO_OFFSET) {
            if (!*(const bool *)(object + member->has_offset)) {
                continue;
            }
        } else if (member->optional && !*(void *const *)slot) {
            continue;
        }
        json_object_set_new(out, member->name, marshal_write(member->type, slot));
    }
}

/* File names may hold any bytes; what is not UTF-8 is shown as replacement characters. */
static json_t *write_text(const char *text)
{
    g_assert(text);
    json_t *out = json_string(text);
    if (!out) {
        g_autofree char *valid = g_utf8_make_valid(text, -1);
        out = json_string(valid);
    }
    return out;
}

static json_t *write_object(const struct marshal_type *type, const char *object)
{
    g_assert(object);
    json_t *out = json_object();
    write_members(type, object, out);
    const struct marshal_type *branch = branch_of(type, object);
    if (branch) {
        write_members(branch, object + type->branch_offset, out);
    }
    return out;
}

static json_t *write_list(const struct marshal_type *type, const struct any_slots *list)
{
    json_t *out = json_array();
    for (size_t i = 0; i < list->count; i++) {
        json_array_append_new(out, marshal_write(type->element, list->items + i * slot_size(type->element)));
    }
    return out;
}

json_t *marshal_write(const struct marshal_type *type, const void *slot)
{
    switch (type->kind) {
    case MARSHAL_BOOL:
        return json_boolean(*(const bool *)slot);
    case MARSHAL_INT:
        return json_integer(*(const int64_t *)slot);
    case MARSHAL_SIZE:
        return json_integer((int64_t)MIN(*(const uint64_t *)slot, (uint64_t)INT64_MAX));
    case MARSHAL_NUMBER:
        return json_real(*(const double *)slot);
    case MARSHAL_ENUM:
        return json_string(marshal_enum_name(type, *(const unsigned *)slot));
    case MARSHAL_STR:
        return write_text(*(char *const *)slot);
    case MARSHAL_ANY:
        g_assert(*(json_t *const *)slot);
        return json_incref(*(json_t *const *)slot);
    case MARSHAL_NULL:
        return json_null();
    case MARSHAL_OBJECT:
        return write_object(type, *(char *const *)slot);
    case MARSHAL_ALTERNATE: {
        const char *alternate = *(char *const *)slot;
        g_assert(alternate && *(const unsigned *)alternate < type->count);
        return marshal_write(type->members[*(const unsigned *)alternate].type, alternate + type->branch_offset);
    }
    case MARSHAL_LIST:
        return write_list(type, slot);
    }
    g_assert_not_reached();
}

void marshal_clear(const struct marshal_type *type, void *slot)
{
    switch (type->kind) {
    case MARSHAL_STR:
        g_free(*(char **)slot);
        break;
    case MARSHAL_ANY:
        json_decref(*(json_t **)slot);
        break;
    case MARSHAL_OBJECT:
        if (*(char **)slot) {
            clear_members(type, *(char **)slot);
            g_free(*(char **)slot);
        }
        break;
    case MARSHAL_ALTERNATE: {
        char *alternate = *(char **)slot;
        if (alternate) {
            marshal_clear(type->members[*(unsigned *)alternate].type, alternate + type->branch_offset);
            g_free(alternate);
        }
        break;
    }
    case MARSHAL_LIST: {
        struct any_slots *list = slot;
        for (size_t i = 0; i < list->count; i++) {
            marshal_clear(type->element, list->items + i * slot_size(type->element));
        }
        g_free(list->items);
        break;
    }
    case MARSHAL_NULL:
        return; /* has no slot */
    default:
        break;
    }
    memset(slot, 0, slot_size(type));
}

static void copy_members(const struct marshal_type *type, const char *from, char *to)
{
    for (unsigned i = 0; i < type->count; i++) {
        const struct marshal_member *member = &type->members[i];
        if (member->has_offset != MARSHAL_NO_OFFSET) {
            *(bool *)(to + member->has_offset) = *(const bool *)(from + member->has_offset);
        }
        marshal_copy(member->type, from + member->offset, to + member->offset);
    }
}

static char *copy_object(const struct marshal_type *type, const char *from)
{
    if (!from) {
        return NULL;
    }
    char *to = g_malloc0(MAX(type->size, 1));
    copy_members(type, from, to);
    const struct marshal_type *branch = branch_of(type, from);
    if (branch) {
        copy_members(branch, from + type->branch_offset, to + type->branch_offset);
    }
    return to;
}

void marshal_copy(const struct marshal_type *type, const void *from, void *to)
{
    switch (type->kind) {
    case MARSHAL_STR:
        *(char **)to = g_strdup(*(char *const *)from);
        break;
    case MARSHAL_ANY:
        *(json_t **)to = json_incref(*(json_t *const *)from);
        break;
    case MARSHAL_NULL:
        break;
    case MARSHAL_OBJECT:
        *(char **)to = copy_object(type, *(char *const *)from);
        break;
    case MARSHAL_ALTERNATE: {
        const char *alternate = *(char *const *)from;
        char *copy = alternate ? g_malloc0(type->size) : NULL;
        if (copy) {
            *(unsigned *)copy = *(const unsigned *)alternate;
            marshal_copy(type->members[*(const unsigned *)alternate].type, alternate + type->branch_offset,
                         copy + type->branch_offset);
        }
        *(char **)to = copy;
        break;
    }
    case MARSHAL_LIST: {
        const struct any_slots *source = from;
        size_t item_size = slot_size(type->element);
        struct any_slots list = {source->count, g_malloc0_n(MAX(source->count, 1), item_size)};
        for (size_t i = 0; i < list.count; i++) {
            marshal_copy(type->element, source->items + i * item_size, list.items + i * item_size);
        }
        memcpy(to, &list, sizeof(list));
        break;
    }
    default:
        memcpy(to, from, slot_size(type));
    }
}

const char *marshal_enum_name(const struct marshal_type *type, unsigned value)
{
    g_assert(type->kind == MARSHAL_ENUM && value < type->count);
    return type->values[value];
}

int marshal_enum_parse(const struct marshal_type *type, const char *text, unsigned *ret, struct error **err)
{
    if (enum_find(type, text, ret)) {
        return 0;
    }
    g_autofree char *allowed = values_format(type);
    return error_set(err, -EINVAL, "%s '%s' is not one of %s", type->name, text, allowed);
}

void *marshal_list_grow(const struct marshal_type *type, void *list_slot)
{
    struct any_slots *list = list_slot;
    size_t item_size = slot_size(type->element);
    list->items = g_realloc_n(list->items, list->count + 1, item_size);
    char *item = list->items + list->count++ * item_size;
    memset(item, 0, item_size);
    return item;
}
