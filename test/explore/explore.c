/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The explorer: does the ledger admit nothing unsafe, and refuse little that is safe? It runs the real code over the
 * simulated engine and compares the verdicts with what happens. doc/exploration.md says what it finds and how to read
 * it; this file is its command line and the order of its stages.
 *
 * Exit status: 0 nothing found; 1 a finding; 2 the command line is wrong.
 */
#include "test/explore/exploration.h"
#include "test/explore/mutations.h"
#include "test/explore/report.h"
#include "test/explore/scenarios.h"
#include "tool/registry.h"
#include <glib.h>
#include <stdio.h>
#include <string.h>

struct options {
    char *topology, *replay, *scenarios;
    gboolean slice, singles, pairs, mutate, everywhere, json, verbose;
    gint64 triples, schedules, refused, mutate_rounds, seed, jobs;
};

static const struct topology *next_topology(const struct options *options, unsigned *position)
{
    while (*position < topology_count) {
        const struct topology *topology = &topologies[(*position)++];
        if (!options->topology || strcmp(options->topology, topology->name) == 0) {
            return topology;
        }
    }
    return NULL;
}

static void print_findings(const struct exploration *exploration)
{
    for (unsigned i = 0; i < exploration->count; i++) {
        for (unsigned j = i; j < exploration->count; j++) {
            const struct cell *cell = exploration_pair(exploration, i, j);
            if (cell->verdict == VERDICT_REFUSED && cell->finding) {
                printf("  refused: %s + %s: %s\n", exploration->moves[i].name, exploration->moves[j].name,
                       cell->finding);
            }
        }
    }
}

static unsigned explore_topology(const struct options *options, const struct topology *topology, struct runner *runner,
                                 json_t *figures)
{
    struct exploration *exploration = exploration_create(topology, runner, (uint64_t)options->seed, NO_MUTATION);
    explore_verdicts(exploration);
    if (options->singles) {
        explore_singles(exploration, (unsigned)options->schedules);
    }
    if (options->everywhere) {
        explore_everywhere(exploration);
    }
    if (options->pairs) {
        explore_admitted(exploration, (unsigned)options->schedules);
    }
    if (options->refused) {
        explore_refused(exploration, (unsigned)options->refused);
    }
    explore_triples(exploration, (uint64_t)options->triples);
    if (options->mutate) {
        unsigned caught = mutations_try(exploration, (unsigned)options->mutate_rounds, options->slice);
        json_object_set_new(figures, "mutations-caught", json_integer(caught));
    }
    unsigned different = options->scenarios ? scenarios_check(exploration, options->scenarios) : 0;
    unsigned failures = different + report_print(exploration, figures) + exploration->failures;
    if (options->verbose) {
        print_findings(exploration);
    }
    exploration_free(exploration);
    return failures;
}

static void show_replayed(const struct schedule *schedule, const struct result *result, void *argument)
{
    static const char *const verdicts[] = {"did not begin", "was admitted", "was refused", "was not possible"};
    for (unsigned i = 0; i < schedule->count; i++) {
        printf("%s %s%s%s\n", schedule->moves[i]->name, verdicts[result->verdicts[i]], *result->reasons[i] ? ": " : "",
               result->reasons[i]);
    }
    printf("%u requests of clients, %u changes of disks\n", (unsigned)result->requests, (unsigned)result->changes);
    printf("%s\n", result->outcome == OUTCOME_GOOD ? "all is as it must be" : result->text);
    *(bool *)argument = result->outcome == OUTCOME_GOOD;
}

static int replay(const struct options *options, struct runner *runner)
{
    struct schedule schedule;
    g_autofree char *problem = NULL;
    bool good = false;
    if (!schedule_parse(options->replay, &schedule, &problem)) {
        fprintf(stderr, "explore: %s\n", problem);
        return 2;
    }
    runner_submit(runner, &schedule, show_replayed, &good);
    runner_drain(runner);
    return good ? 0 : 1;
}

static int explore(const struct options *options, struct runner *runner)
{
    unsigned failures = 0, position = 0;
    json_t *figures = json_object();
    for (const struct topology *topology; (topology = next_topology(options, &position));) {
        json_t *own = json_object();
        failures += explore_topology(options, topology, runner, own);
        json_object_set_new(figures, topology->name, own);
    }
    failures += options->mutate ? mutations_missed() : 0;
    const struct totals *totals = runner_totals(runner);
    json_object_set_new(figures, "schedules", json_integer((json_int_t)totals->schedules));
    json_object_set_new(figures, "failures", json_integer(failures));
    printf(
        "%u schedules, %u findings; operations: %u ended well, %u cancelled, %u failed; %u power cuts; %u requests\n",
        (unsigned)totals->schedules, failures, (unsigned)totals->ended_well, (unsigned)totals->cancelled,
        (unsigned)totals->failed, (unsigned)totals->cuts, (unsigned)totals->requests);
    if (options->json) {
        json_dumpf(figures, stdout, JSON_COMPACT);
        printf("\n");
    }
    json_decref(figures);
    return failures ? 1 : 0;
}

int main(int argc, char **argv)
{
    struct options options = {.schedules = 4, .refused = 40, .mutate_rounds = 20, .seed = 1, .jobs = 2};
    const GOptionEntry entries[] = {
        {"topology", 't', 0, G_OPTION_ARG_STRING, &options.topology, "only this one (chain, fork, deep)", "NAME"},
        {"slice", 0, 0, G_OPTION_ARG_NONE, &options.slice, "of the breakages, only those that must be noticed", NULL},
        {"singles", 0, 0, G_OPTION_ARG_NONE, &options.singles, "every operation alone", NULL},
        {"everywhere", 0, 0, G_OPTION_ARG_NONE, &options.everywhere, "alone, with every fault and every cut", NULL},
        {"pairs", 0, 0, G_OPTION_ARG_NONE, &options.pairs, "every pair that is admitted", NULL},
        {"triples", 0, 0, G_OPTION_ARG_INT64, &options.triples, "so many random triples", "N"},
        {"scenarios", 0, 0, G_OPTION_ARG_FILENAME, &options.scenarios, "compare the verdicts with this list", "FILE"},
        {"mutate", 0, 0, G_OPTION_ARG_NONE, &options.mutate, "break the rules, one bit at a time", NULL},
        {"mutate-rounds", 0, 0, G_OPTION_ARG_INT64, &options.mutate_rounds, "schedules of each pair let in", "N"},
        {"schedules", 0, 0, G_OPTION_ARG_INT64, &options.schedules, "of each that is admitted", "N"},
        {"refused", 0, 0, G_OPTION_ARG_INT64, &options.refused, "schedules of each that is refused, at most", "N"},
        {"seed", 0, 0, G_OPTION_ARG_INT64, &options.seed, "where all chance comes from", "N"},
        {"jobs", 'j', 0, G_OPTION_ARG_INT64, &options.jobs, "schedules at a time", "N"},
        {"replay", 0, 0, G_OPTION_ARG_STRING, &options.replay, "one schedule, as a finding prints it", "WORD"},
        {"verbose", 'v', 0, G_OPTION_ARG_NONE, &options.verbose, "show why each refusal is justified", NULL},
        {"json", 0, 0, G_OPTION_ARG_NONE, &options.json, "the figures, on the last line", NULL},
        {0},
    };
    g_autoptr(GOptionContext) context = g_option_context_new(NULL);
    g_autoptr(GError) error = NULL;
    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &error) || argc > 1 || options.jobs < 1) {
        fprintf(stderr, "explore: %s\n", error ? error->message : "what is that? (--help)");
        return 2;
    }
    register_all();
    struct runner *runner = runner_create((unsigned)options.jobs);
    int status = options.replay ? replay(&options, runner) : explore(&options, runner);
    runner_destroy(runner);
    g_free(options.topology);
    g_free(options.replay);
    g_free(options.scenarios);
    return status;
}
