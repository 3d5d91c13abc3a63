/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The rules of blkdebug and the file that they may come from.
 *
 * 1. The state begins with 1. All rules of an event see the state that was there before it.
 * 2. An event for which there is an error in the present state puts out the errors that were active, and makes its own
 *    active. They stay so, for requests of all kinds that they name, until another event with an error comes.
 * 3. An error that happens once, and a breakpoint, is gone when it has happened.
 * 4. Newer rules come before older ones.
 *
 * Pure functions of rules and text: who holds a request up, and where, is blkdebug.c's.
 */
#include "driver/filter/blkdebug_rules.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define SECTOR 512

enum rule_kind { RULE_ERROR, RULE_STATE, RULE_BREAK };

struct blkdebug_rule {
    struct list link;
    enum rule_kind kind;
    enum blkdebug_event event;
    int64_t state; /* 0: in every state */
    /* An error: */
    unsigned iotypes; /* 1 << enum blkdebug_iotype */
    int code;         /* negative, or 0 */
    int64_t sector;   /* -1: every one */
    bool once, immediately, active;
    int64_t new_state; /* a change of state */
    char *tag;         /* a breakpoint */
};

void blkdebug_rules_init(struct blkdebug_rules *rules)
{
    list_init(&rules->list);
    rules->state = 1;
    rules->count = 0;
}

static struct blkdebug_rule *rule_of(struct list *link)
{
    return container_of(link, struct blkdebug_rule, link);
}

static void rule_remove(struct blkdebug_rules *rules, struct blkdebug_rule *rule)
{
    list_remove(&rule->link);
    rules->count--;
    g_free(rule->tag);
    g_free(rule);
}

void blkdebug_rules_finish(struct blkdebug_rules *rules)
{
    list_for_each_safe (link, &rules->list) {
        rule_remove(rules, rule_of(link));
    }
    g_assert(rules->count == 0);
}

static int rule_add(struct blkdebug_rules *rules, const struct blkdebug_rule *from, struct error **err)
{
    if (rules->count >= BLKDEBUG_RULES_MAX) {
        return error_set(err, -E2BIG, "There are more than %d rules for blkdebug", BLKDEBUG_RULES_MAX);
    }
    struct blkdebug_rule *rule = g_new(struct blkdebug_rule, 1);
    *rule = *from;
    rules->count++;
    list_prepend(&rules->list, &rule->link);
    return 0;
}

int blkdebug_rules_add_error(struct blkdebug_rules *rules, const struct blkdebug_inject_error_options *options,
                             struct error **err)
{
    unsigned all = ((1U << BLKDEBUG_IOTYPE_COUNT) - 1) & ~(1U << BLKDEBUG_IOTYPE_BLOCK_STATUS);
    struct blkdebug_rule rule = {.kind = RULE_ERROR,
                                 .event = options->event,
                                 .state = options->has_state ? options->state : 0,
                                 .iotypes = options->has_iotype ? 1U << options->iotype : all,
                                 .code = -(int)options->errno_,
                                 .sector = options->has_sector ? options->sector : -1,
                                 .once = options->once,
                                 .immediately = options->immediately};
    return rule_add(rules, &rule, err);
}

int blkdebug_rules_add_state(struct blkdebug_rules *rules, const struct blkdebug_set_state_options *options,
                             struct error **err)
{
    struct blkdebug_rule rule = {.kind = RULE_STATE,
                                 .event = options->event,
                                 .state = options->has_state ? options->state : 0,
                                 .new_state = options->new_state};
    return rule_add(rules, &rule, err);
}

int blkdebug_rules_add_break(struct blkdebug_rules *rules, enum blkdebug_event event, const char *tag,
                             struct error **err)
{
    struct blkdebug_rule rule = {.kind = RULE_BREAK, .event = event, .tag = g_strdup(tag)};
    int code = rule_add(rules, &rule, err);
    if (code < 0) {
        g_free(rule.tag);
    }
    return code;
}

unsigned blkdebug_rules_remove_break(struct blkdebug_rules *rules, const char *tag)
{
    unsigned removed = 0;
    list_for_each_safe (link, &rules->list) {
        if (rule_of(link)->kind == RULE_BREAK && (!tag || g_str_equal(rule_of(link)->tag, tag))) {
            rule_remove(rules, rule_of(link));
            removed++;
        }
    }
    return removed;
}

/* --- what happens --- */

/* An error of the present event; `first`: the others that are active belong to an earlier one. */
static void activate(struct blkdebug_rules *rules, struct blkdebug_rule *rule, bool first)
{
    if (first) {
        list_for_each (link, &rules->list) {
            rule_of(link)->active = false;
        }
    }
    rule->active = true;
}

char **blkdebug_rules_event(struct blkdebug_rules *rules, enum blkdebug_event event)
{
    int64_t new_state = rules->state;
    bool injected = false;
    GPtrArray *tags = NULL;
    list_for_each_safe (link, &rules->list) {
        struct blkdebug_rule *rule = rule_of(link);
        if (rule->event != event || (rule->state != 0 && rule->state != rules->state)) {
            continue;
        }
        switch (rule->kind) {
        case RULE_ERROR:
            activate(rules, rule, !injected);
            injected = true;
            break;
        case RULE_STATE:
            new_state = rule->new_state;
            break;
        case RULE_BREAK:
            tags = tags ? tags : g_ptr_array_new();
            g_ptr_array_add(tags, g_steal_pointer(&rule->tag));
            rule_remove(rules, rule);
            break;
        }
    }
    rules->state = new_state;
    if (!tags) {
        return NULL;
    }
    g_ptr_array_add(tags, NULL);
    return (char **)g_ptr_array_free(tags, FALSE);
}

static bool touches(const struct blkdebug_rule *rule, uint64_t offset, uint64_t bytes)
{
    if (rule->sector < 0) {
        return true;
    }
    uint64_t start = (uint64_t)rule->sector * SECTOR;
    return bytes > 0 && offset < start + SECTOR && offset + bytes > start;
}

int blkdebug_rules_request(struct blkdebug_rules *rules, enum blkdebug_iotype kind, uint64_t offset, uint64_t bytes,
                           bool *ret_immediately)
{
    list_for_each (link, &rules->list) {
        struct blkdebug_rule *rule = rule_of(link);
        if (rule->kind == RULE_ERROR && rule->active && rule->iotypes & (1U << kind) && touches(rule, offset, bytes)) {
            int code = rule->code;
            *ret_immediately = rule->immediately;
            if (code < 0 && rule->once) {
                rule_remove(rules, rule);
            }
            return code;
        }
    }
    return 0;
}

/* --- the file --- */

struct reader {
    const char *at, *end;
    unsigned line;
};

/* One section: its name, and the keys as JSON. */
struct section {
    char name[32];
    json_t *keys; /* NULL: none is open */
    unsigned line;
};

static int bad_line(const struct reader *reader, struct error **err, const char *what)
{
    return error_set(err, -EINVAL, "Line %u of the blkdebug rules: %s", reader->line, what);
}

static void skip_spaces(const char **at)
{
    while (**at == ' ' || **at == '\t' || **at == '\r') {
        (*at)++;
    }
}

static bool is_end_of_line(const char *at)
{
    skip_spaces(&at);
    return !*at || *at == '#';
}

/* The characters up to `stop`; false if there is none, or nothing before it, or too much. */
static bool take_until(const char **at, char stop, char *to, size_t size)
{
    const char *found = strchr(*at, stop);
    if (!found || found == *at || (size_t)(found - *at) >= size) {
        return false;
    }
    memcpy(to, *at, found - *at);
    to[found - *at] = 0;
    *at = found + 1;
    return true;
}

static int finish_section(struct blkdebug_rules *rules, struct section *section, struct error **err)
{
    int code = 0;
    if (!section->keys) {
        return 0;
    }
    if (g_str_equal(section->name, "inject-error")) {
        struct blkdebug_inject_error_options *options;
        code = blkdebug_inject_error_options_from_text(section->keys, NULL, &options, err);
        if (code == 0) {
            code = blkdebug_rules_add_error(rules, options, err);
            blkdebug_inject_error_options_free(options);
        }
    } else {
        struct blkdebug_set_state_options *options;
        code = blkdebug_set_state_options_from_text(section->keys, NULL, &options, err);
        if (code == 0) {
            code = blkdebug_rules_add_state(rules, options, err);
            blkdebug_set_state_options_free(options);
        }
    }
    json_decref(section->keys);
    section->keys = NULL;
    if (code < 0) {
        error_prepend(err, "The section in line %u of the blkdebug rules", section->line);
    }
    return code;
}

static int begin_section(const struct reader *reader, const char *text, struct section *section, struct error **err)
{
    char name[64];
    text++;
    if (!take_until(&text, ']', name, sizeof(name)) || !is_end_of_line(text)) {
        return bad_line(reader, err, "a section is written [inject-error] or [set-state]");
    }
    size_t length = strcspn(name, " \t\"");
    const char *rest = name + length; /* "a name of the section", which means nothing */
    skip_spaces(&rest);
    size_t quoted = strlen(rest);
    bool named = quoted == 0 || (quoted > 2 && rest[0] == '"' && rest[quoted - 1] == '"');
    name[length] = 0;
    if (!named || (!g_str_equal(name, "inject-error") && !g_str_equal(name, "set-state"))) {
        return bad_line(reader, err, "there are the sections [inject-error] and [set-state], and no others");
    }
    g_strlcpy(section->name, name, sizeof(section->name));
    section->keys = json_object();
    section->line = reader->line;
    return 0;
}

static int read_key(const struct reader *reader, const char *text, struct section *section, struct error **err)
{
    char key[32], value[64];
    if (!section->keys) {
        return bad_line(reader, err, "a key stands before the first section");
    }
    size_t length = strcspn(text, " \t=");
    if (length == 0 || length >= sizeof(key)) {
        return bad_line(reader, err, "a key is written KEY = \"VALUE\"");
    }
    memcpy(key, text, length);
    key[length] = 0;
    text += length;
    skip_spaces(&text);
    if (*text++ != '=') {
        return bad_line(reader, err, "a key is written KEY = \"VALUE\"");
    }
    skip_spaces(&text);
    if (*text++ != '"' || !take_until(&text, '"', value, sizeof(value)) || !is_end_of_line(text)) {
        return bad_line(reader, err, "a value stands in double quotes");
    }
    if (json_object_get(section->keys, key)) {
        return bad_line(reader, err, "this key was given already");
    }
    if (json_object_set_new(section->keys, key, json_string(value)) < 0) {
        return bad_line(reader, err, "this is no text in UTF-8");
    }
    return 0;
}

/* The next line, with a 0 behind it; NULL at the end. g_free(). */
static char *next_line(struct reader *reader)
{
    if (reader->at == reader->end) {
        return NULL;
    }
    const char *stop = memchr(reader->at, '\n', reader->end - reader->at);
    size_t length = (stop ? stop : reader->end) - reader->at;
    char *line = g_strndup(reader->at, length);
    reader->at = stop ? stop + 1 : reader->end;
    reader->line++;
    return line;
}

static int read_into(struct blkdebug_rules *rules, struct reader *reader, struct section *section, struct error **err)
{
    int code = 0;
    char *line;
    while (code == 0 && (line = next_line(reader))) {
        const char *text = line;
        skip_spaces(&text);
        if (*text == '[') {
            code = finish_section(rules, section, err);
            code = code < 0 ? code : begin_section(reader, text, section, err);
        } else if (!is_end_of_line(text)) {
            code = read_key(reader, text, section, err);
        }
        g_free(line);
    }
    return code < 0 ? code : finish_section(rules, section, err);
}

int blkdebug_rules_read(struct blkdebug_rules *rules, const char *text, size_t bytes, struct error **err)
{
    struct blkdebug_rules own;
    struct section section = {0};
    struct reader reader = {text, text + bytes, 0};
    blkdebug_rules_init(&own);
    own.count = rules->count; /* the limit is for all */
    int code = read_into(&own, &reader, &section, err);
    if (section.keys) {
        json_decref(section.keys);
    }
    own.count -= rules->count;
    while (code == 0 && !list_is_empty(&own.list)) { /* the oldest first */
        struct list *oldest = own.list.prev;
        list_remove(oldest);
        list_prepend(&rules->list, oldest);
        own.count--;
        rules->count++;
    }
    blkdebug_rules_finish(&own);
    return code;
}
