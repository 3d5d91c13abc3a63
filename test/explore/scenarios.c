/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The named scenarios: pairs of which it was written down, before there was code, whether they must be admitted. The
 * explorer's verdicts are held against them; an operation that does not exist yet is left out and counted.
 */
#include "test/explore/scenarios.h"
#include <jansson.h>
#include <stdio.h>
#include <string.h>

struct comparison {
    const struct exploration *exploration;
    unsigned same, different, unknown;
};

static void compare(struct comparison *comparison, json_t *scenario, enum verdict wanted)
{
    const struct exploration *exploration = comparison->exploration;
    const char *first_name = json_string_value(json_object_get(scenario, "a"));
    const char *second_name = json_string_value(json_object_get(scenario, "b"));
    const struct move *first = first_name ? move_find(exploration->topology, first_name) : NULL;
    const struct move *second = second_name ? move_find(exploration->topology, second_name) : NULL;
    if (!first || (second_name && !second) ||
        (second && !exploration_has_pair(exploration, first->index, second->index))) {
        comparison->unknown++;
        return;
    }
    enum verdict verdict = second ? exploration_pair(exploration, first->index, second->index)->verdict
                                  : exploration->singles[first->index].verdict;
    if (verdict == wanted) {
        comparison->same++;
        return;
    }
    comparison->different++;
    printf("  SCENARIO: %s%s%s is %s: %s\n", first_name, second ? " beside " : "", second ? second_name : "",
           wanted == VERDICT_ADMITTED ? "not admitted" : "not refused",
           json_string_value(json_object_get(scenario, "reason")));
}

unsigned scenarios_check(const struct exploration *exploration, const char *path)
{
    static const struct {
        const char *list;
        enum verdict wanted;
    } lists[] = {{"admit", VERDICT_ADMITTED}, {"refuse", VERDICT_REFUSED}, {"alone", VERDICT_REFUSED}};
    struct comparison comparison = {.exploration = exploration};
    json_error_t error;
    json_t *scenarios = json_load_file(path, 0, &error);
    if (!scenarios) {
        printf("  SCENARIO: %s: %s\n", path, error.text);
        return 1;
    }
    for (unsigned i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) {
        size_t index;
        json_t *scenario;
        json_array_foreach(json_object_get(scenarios, lists[i].list), index, scenario)
        {
            const char *topology = json_string_value(json_object_get(scenario, "topology"));
            if (topology && strcmp(topology, exploration->topology->name) == 0) {
                compare(&comparison, scenario, lists[i].wanted);
            }
        }
    }
    json_decref(scenarios);
    printf("  scenarios: %u as written, %u not, %u of operations that are not explored\n", comparison.same,
           comparison.different, comparison.unknown);
    return comparison.different;
}
