/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A schedule as one word, and back: what is printed for a finding is what `explore --replay` takes. */
#include "test/explore/mutations.h"
#include "test/explore/schedule.h"
#include <glib.h>
#include <string.h>

static const char *const mode_names[MODE_COUNT] = {
    [MODE_VERDICT] = "verdict", [MODE_PLAIN] = "plain", [MODE_CANCEL] = "cancel",
    [MODE_FAULT] = "fault",     [MODE_ROOM] = "room",   [MODE_CUT] = "cut",
};

const char *mode_name(enum mode mode)
{
    return mode_names[mode];
}

char *schedule_format(const struct schedule *schedule)
{
    GString *word = g_string_new(schedule->topology->name);
    for (unsigned i = 0; i < schedule->count; i++) {
        g_string_append_printf(word, "/%s", schedule->moves[i]->name);
    }
    g_string_append_printf(word, "/mode=%s", mode_name(schedule->mode));
    if (schedule->at) {
        g_string_append_printf(word, "/at=%" G_GUINT64_FORMAT, schedule->at);
    }
    if (schedule->override) {
        g_string_append(word, "/override=1");
    }
    if (schedule->companions != ALL_COMPANIONS) {
        g_string_append_printf(word, "/companions=%u", schedule->companions);
    }
    if (schedule->mutation != NO_MUTATION) {
        g_string_append_printf(word, "/mutation=%d", schedule->mutation);
    }
    g_string_append_printf(word, "/seed=%" G_GUINT64_FORMAT, schedule->seed);
    return g_string_free(word, FALSE);
}

static bool set_number(struct schedule *schedule, const char *key, const char *text)
{
    uint64_t value;
    if (!g_ascii_string_to_unsigned(text, 10, 0, UINT64_MAX, &value, NULL)) {
        return false;
    }
    if (strcmp(key, "seed") == 0) {
        schedule->seed = value;
    } else if (strcmp(key, "at") == 0) {
        schedule->at = value;
    } else if (strcmp(key, "override") == 0) {
        schedule->override = value != 0;
    } else if (strcmp(key, "companions") == 0) {
        schedule->companions = (unsigned)value;
    } else if (strcmp(key, "mutation") == 0 && value < mutation_count) {
        schedule->mutation = (int)value;
    } else {
        return false;
    }
    return true;
}

static bool set_mode(struct schedule *schedule, const char *name)
{
    for (unsigned mode = 0; mode < MODE_COUNT; mode++) {
        if (strcmp(mode_names[mode], name) == 0) {
            schedule->mode = mode;
            return true;
        }
    }
    return false;
}

static bool add_part(struct schedule *schedule, const char *part)
{
    g_auto(GStrv) halves = g_strsplit(part, "=", 2);
    if (halves[0] && halves[1]) {
        return strcmp(halves[0], "mode") == 0 ? set_mode(schedule, halves[1])
                                              : set_number(schedule, halves[0], halves[1]);
    }
    const struct move *move = move_find(schedule->topology, part);
    if (!move || schedule->count == SCHEDULE_MOVES_MAX) {
        return false;
    }
    schedule->moves[schedule->count++] = move;
    return true;
}

bool schedule_parse(const char *text, struct schedule *ret, char **ret_problem)
{
    g_auto(GStrv) parts = g_strsplit(text, "/", -1);
    struct schedule schedule = {.mode = MODE_PLAIN, .companions = ALL_COMPANIONS, .mutation = NO_MUTATION};
    schedule.topology = parts[0] ? topology_find(parts[0]) : NULL;
    if (!schedule.topology) {
        *ret_problem = g_strdup_printf("there is no topology '%s'", parts[0] ? parts[0] : "");
        return false;
    }
    for (unsigned i = 1; parts[i]; i++) {
        if (!add_part(&schedule, parts[i])) {
            *ret_problem = g_strdup_printf("'%s' does not mean anything on %s", parts[i], schedule.topology->name);
            return false;
        }
    }
    if (schedule.count == 0) {
        *ret_problem = g_strdup("there is no move in it");
        return false;
    }
    *ret = schedule;
    return true;
}
