/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The plan of an exploration: which schedules are run, in which order, and what their results say about a move or a
 * pair. Modes and places rotate with the round, the seed follows from the exploration's seed, the moves and the round;
 * so a table is the same for the same seed, whatever runs at the same time.
 *
 * 1. An admitted pair must run without a violation in every schedule.
 * 2. A refused pair is justified by the first violation of a schedule in which the ledger let it pass. Only clients
 * that get along with both moves are there, so nobody else's quarrel is taken for theirs.
 */
#include "test/explore/exploration.h"
#include "base/seeded.h"
#include <glib.h>
#include <stdio.h>
#include <string.h>

#define CHANGES_GUESSED 40
#define FAILING_WITHIN 90
#define FAILURES_PRINTED 25
#define IN_FLIGHT 64
#define ROUNDS_PER_REFUSED 2

/* What a schedule's result is for. */
struct task {
    struct exploration *exploration;
    struct cell *cell;
    bool reversed;
};

/* --- the exploration --- */

struct exploration *exploration_create(const struct topology *topology, struct runner *runner, uint64_t seed,
                                       int mutation)
{
    struct exploration *exploration = g_new0(struct exploration, 1);
    exploration->topology = topology;
    exploration->runner = runner;
    exploration->seed = seed;
    exploration->mutation = mutation;
    exploration->moves = moves_on(topology, &exploration->count);
    exploration->singles = g_new0(struct cell, exploration->count);
    exploration->pairs = g_new0(struct cell, exploration->count * exploration->count);
    return exploration;
}

void exploration_free(struct exploration *exploration)
{
    for (unsigned i = 0; i < exploration->count; i++) {
        g_free(exploration->singles[i].finding);
    }
    for (unsigned i = 0; i < exploration->count * exploration->count; i++) {
        g_free(exploration->pairs[i].finding);
    }
    g_free(exploration->singles);
    g_free(exploration->pairs);
    g_free(exploration->first);
    g_free(exploration);
}

struct cell *exploration_pair(const struct exploration *exploration, unsigned first, unsigned second)
{
    return &exploration->pairs[MIN(first, second) * exploration->count + MAX(first, second)];
}

bool exploration_has_pair(const struct exploration *exploration, unsigned first, unsigned second)
{
    const struct move *one = &exploration->moves[first], *other = &exploration->moves[second];
    return exploration->singles[first].verdict == VERDICT_ADMITTED &&
           exploration->singles[second].verdict == VERDICT_ADMITTED &&
           (one->kind->sort != MOVE_COMMAND || other->kind->sort != MOVE_COMMAND);
}

/* The seed of one schedule; short enough to be typed. */
static uint64_t seed_of(const struct exploration *exploration, uint64_t first, uint64_t second, uint64_t round)
{
    return seeded_mix(seeded_mix(seeded_mix(exploration->seed + 1) + first * 1009 + second) + round * 65537) %
           1000000000;
}

static struct schedule schedule_of(const struct exploration *exploration)
{
    return (struct schedule){
        .topology = exploration->topology, .companions = ALL_COMPANIONS, .mutation = exploration->mutation};
}

static char *finding_of(const struct schedule *schedule, const struct result *result)
{
    g_autofree char *word = schedule_format(schedule);
    return g_strdup_printf("%s\n    explore --replay '%s'", result->text, word);
}

static void fail(struct exploration *exploration, const char *what, const char *finding)
{
    if (!exploration->first) {
        exploration->first = g_strdup(finding);
    }
    if (++exploration->failures <= FAILURES_PRINTED && !exploration->quiet) {
        printf("%s: %s\n", what, finding);
        fflush(stdout);
    }
}

static void submit(struct exploration *exploration, struct cell *cell, const struct schedule *schedule, bool reversed,
                   runner_done *done)
{
    struct task *task = g_new0(struct task, 1);
    *task = (struct task){exploration, cell, reversed};
    runner_submit(exploration->runner, schedule, done, task);
}

/* --- verdicts --- */

static void note_verdict(const struct schedule *schedule, const struct result *result, void *argument)
{
    g_autofree struct task *task = argument;
    enum verdict verdict = result->verdicts[schedule->count - 1];
    *(task->reversed ? &task->cell->reversed : &task->cell->verdict) = verdict;
    if (result->outcome == OUTCOME_VIOLATION) {
        g_autofree char *finding = finding_of(schedule, result);
        fail(task->exploration, "VIOLATION", finding);
    }
}

static void check_symmetry(struct exploration *exploration, unsigned first, unsigned second)
{
    const struct cell *cell = exploration_pair(exploration, first, second);
    if (cell->verdict != cell->reversed) {
        g_autofree char *text = g_strdup_printf("%s/%s/%s/mode=verdict", exploration->topology->name,
                                                exploration->moves[first].name, exploration->moves[second].name);
        fail(exploration, "ASYMMETRIC", text);
    }
}

static void submit_verdict(struct exploration *exploration, struct cell *cell, const struct move *first,
                           const struct move *second, bool reversed)
{
    struct schedule schedule = schedule_of(exploration);
    schedule.mode = MODE_VERDICT;
    schedule.seed = exploration->seed;
    schedule.moves[schedule.count++] = first;
    if (second) {
        schedule.moves[schedule.count++] = second;
    }
    submit(exploration, cell, &schedule, reversed, note_verdict);
}

void explore_verdicts(struct exploration *exploration)
{
    for (unsigned i = 0; i < exploration->count; i++) {
        submit_verdict(exploration, &exploration->singles[i], &exploration->moves[i], NULL, false);
    }
    runner_drain(exploration->runner);
    for (unsigned i = 0; i < exploration->count; i++) {
        for (unsigned j = i; j < exploration->count; j++) {
            const struct move *first = &exploration->moves[i], *second = &exploration->moves[j];
            struct cell *cell = exploration_pair(exploration, i, j);
            if (exploration_has_pair(exploration, i, j)) {
                submit_verdict(exploration, cell, first, second, false);
                submit_verdict(exploration, cell, second, first, true);
            }
        }
    }
    runner_drain(exploration->runner);
    for (unsigned i = 0; i < exploration->count; i++) {
        for (unsigned j = i; j < exploration->count; j++) {
            check_symmetry(exploration, i, j);
        }
    }
}

/* NULL: everybody's claims. */
static bool is_by(const struct move *move, const char *command)
{
    return !command || g_strcmp0(move->kind->command, command) == 0;
}

void explore_verdicts_again(struct exploration *exploration, const struct exploration *before, const char *command)
{
    const struct move *moves = exploration->moves;
    for (unsigned i = 0; i < exploration->count; i++) {
        if (before->singles[i].verdict == VERDICT_REFUSED && is_by(&moves[i], command)) {
            submit_verdict(exploration, &exploration->singles[i], &exploration->moves[i], NULL, false);
        }
        for (unsigned j = i; j < exploration->count; j++) {
            bool concerned = is_by(&moves[i], command) || is_by(&moves[j], command);
            if (exploration_pair(before, i, j)->verdict == VERDICT_REFUSED && concerned) {
                submit_verdict(exploration, exploration_pair(exploration, i, j), &moves[i], &moves[j], false);
            }
        }
    }
    runner_drain(exploration->runner);
}

/* --- what is admitted --- */

static void note_admitted(const struct schedule *schedule, const struct result *result, void *argument)
{
    g_autofree struct task *task = argument;
    struct cell *cell = task->cell;
    cell->runs++;
    cell->changes = MAX(cell->changes, result->changes);
    if (result->outcome == OUTCOME_VIOLATION) {
        g_autofree char *finding = finding_of(schedule, result);
        fail(task->exploration, "UNSAFE BUT ADMITTED", finding);
        if (!cell->finding) {
            cell->finding = g_steal_pointer(&finding);
        }
    }
}

/* Of a refused pair, by the rules: the second may come when the first has just ended, and then all must be well. */
static void note_after(const struct schedule *schedule, const struct result *result, void *argument)
{
    g_autofree struct task *task = argument;
    if (result->outcome == OUTCOME_VIOLATION) {
        g_autofree char *finding = finding_of(schedule, result);
        fail(task->exploration, "UNSAFE BUT ADMITTED", finding);
    }
}

/* How the round's schedule ends, if not well. */
static void set_mode(struct schedule *schedule, const struct cell *cell, unsigned round)
{
    static const enum mode modes[] = {MODE_PLAIN, MODE_CUT,   MODE_CANCEL, MODE_PLAIN, MODE_CUT,
                                      MODE_FAULT, MODE_PLAIN, MODE_CUT,    MODE_ROOM};
    uint64_t changes = cell->changes ? cell->changes : CHANGES_GUESSED;
    schedule->mode = modes[round % G_N_ELEMENTS(modes)];
    if (schedule->mode == MODE_CUT) {
        schedule->at = 1 + seeded_mix(schedule->seed) % changes;
    } else if (schedule->mode == MODE_FAULT) {
        schedule->at = seeded_mix(schedule->seed) % FAILING_WITHIN;
    }
}

static void singles_round(struct exploration *exploration, unsigned round)
{
    for (unsigned i = 0; i < exploration->count; i++) {
        struct cell *cell = &exploration->singles[i];
        struct schedule schedule = schedule_of(exploration);
        schedule.seed = seed_of(exploration, i, 10000, round);
        schedule.moves[schedule.count++] = &exploration->moves[i];
        set_mode(&schedule, cell, round);
        if (cell->verdict == VERDICT_ADMITTED) {
            submit(exploration, cell, &schedule, false, note_admitted);
        }
    }
    runner_drain(exploration->runner);
}

/* after: refused pairs too, where the second comes when the first has ended. */
static void admitted_round(struct exploration *exploration, unsigned round, bool after)
{
    for (unsigned i = 0; i < exploration->count; i++) {
        for (unsigned j = i; j < exploration->count; j++) {
            struct cell *cell = exploration_pair(exploration, i, j);
            bool reversed = round % 2;
            struct schedule schedule = schedule_of(exploration);
            schedule.seed = seed_of(exploration, i, j, round);
            schedule.moves[schedule.count++] = &exploration->moves[reversed ? j : i];
            schedule.moves[schedule.count++] = &exploration->moves[reversed ? i : j];
            set_mode(&schedule, cell, round);
            if (cell->verdict == VERDICT_ADMITTED) {
                submit(exploration, cell, &schedule, reversed, note_admitted);
            } else if (after && cell->verdict == VERDICT_REFUSED && round % ROUNDS_PER_REFUSED == 0) {
                submit(exploration, cell, &schedule, reversed, note_after);
            }
        }
    }
    runner_drain(exploration->runner);
}

void explore_singles(struct exploration *exploration, unsigned rounds)
{
    for (unsigned round = 0; round < rounds; round++) {
        singles_round(exploration, round);
    }
}

void explore_admitted(struct exploration *exploration, unsigned rounds)
{
    for (unsigned round = 0; round < rounds; round++) {
        admitted_round(exploration, round, true);
    }
}

void explore_until_failure(struct exploration *exploration, unsigned rounds)
{
    for (unsigned round = 0; round < rounds && !exploration->failures; round++) {
        singles_round(exploration, round);
        admitted_round(exploration, round, false);
    }
}

void explore_everywhere(struct exploration *exploration)
{
    explore_singles(exploration, 1); /* tells how many changes there are */
    for (unsigned i = 0; i < exploration->count; i++) {
        struct cell *cell = &exploration->singles[i];
        for (uint64_t at = 0; cell->verdict == VERDICT_ADMITTED && at < cell->changes + FAILING_WITHIN; at++) {
            struct schedule schedule = schedule_of(exploration);
            schedule.moves[schedule.count++] = &exploration->moves[i];
            schedule.at = at;
            schedule.mode = MODE_FAULT;
            schedule.seed = seed_of(exploration, i, 20000, at);
            submit(exploration, cell, &schedule, false, note_admitted);
            schedule.mode = MODE_CUT;
            schedule.seed = seed_of(exploration, i, 10000, 0);
            if (at > 0 && at <= cell->changes) {
                submit(exploration, cell, &schedule, false, note_admitted);
            }
        }
    }
    runner_drain(exploration->runner);
}

/* --- what is refused --- */

static void note_refused(const struct schedule *schedule, const struct result *result, void *argument)
{
    g_autofree struct task *task = argument;
    struct cell *cell = task->cell;
    cell->runs++;
    cell->changes = MAX(cell->changes, result->changes);
    if (result->outcome == OUTCOME_VIOLATION && !cell->finding) {
        cell->finding = finding_of(schedule, result);
    }
}

/* Bits of the companions that get along with the move. */
static unsigned companions_of(const struct exploration *exploration, unsigned move)
{
    const struct move *companions[COMPANIONS_MAX];
    unsigned count = companion_moves(exploration->topology, companions), bits = 0;
    for (unsigned i = 0; i < count; i++) {
        bits |= exploration_pair(exploration, move, companions[i]->index)->verdict == VERDICT_ADMITTED ? 1u << i : 0;
    }
    return bits;
}

/* One more schedule for a refused pair (first == second + no second: a single), if nothing was found yet. */
static void submit_refused(struct exploration *exploration, struct cell *cell, unsigned first, const unsigned *second,
                           unsigned round)
{
    struct schedule schedule = schedule_of(exploration);
    const struct move *one = &exploration->moves[first];
    schedule.override = true;
    schedule.seed = seed_of(exploration, first, second ? *second : 30000, 1000 + round);
    schedule.moves[schedule.count++] = one;
    schedule.companions = second ? companions_of(exploration, first) & companions_of(exploration, *second) : 0;
    if (second) {
        const struct move *other = &exploration->moves[*second];
        /* A command lasts for a moment: it is the one that comes second. */
        bool reversed = other->kind->sort != MOVE_COMMAND && (one->kind->sort == MOVE_COMMAND || round % 2);
        schedule.moves[schedule.count++] = other;
        if (reversed) {
            schedule.moves[0] = other;
            schedule.moves[1] = one;
        }
    }
    set_mode(&schedule, cell, round / 2);
    submit(exploration, cell, &schedule, false, note_refused);
}

/* Submits what is still unexplained; how many there are. */
static unsigned refused_round(struct exploration *exploration, unsigned round)
{
    unsigned open = 0;
    for (unsigned i = 0; i < exploration->count; i++) {
        struct cell *single = &exploration->singles[i];
        if (single->verdict == VERDICT_REFUSED && !single->finding) {
            submit_refused(exploration, single, i, NULL, round);
            open++;
        }
        for (unsigned j = i; j < exploration->count; j++) {
            struct cell *cell = exploration_pair(exploration, i, j);
            if (cell->verdict == VERDICT_REFUSED && !cell->finding) {
                submit_refused(exploration, cell, i, &j, round);
                open++;
            }
        }
    }
    return open;
}

void explore_refused(struct exploration *exploration, unsigned rounds)
{
    for (unsigned round = 0, open = IN_FLIGHT; round < rounds && open;) {
        /* Few that are left share the processors by running ahead. */
        unsigned batch = MAX(1, IN_FLIGHT / MAX(open, 1));
        for (unsigned i = 0; i < batch && round < rounds; i++) {
            open = refused_round(exploration, round++);
        }
        runner_drain(exploration->runner);
    }
}

/* --- triples --- */

static void note_triple(const struct schedule *schedule, const struct result *result, void *argument)
{
    g_autofree struct task *task = argument;
    bool all = true;
    for (unsigned i = 0; i < schedule->count; i++) {
        all = all && result->verdicts[i] == VERDICT_ADMITTED;
    }
    task->exploration->triples_run++;
    task->exploration->triples_admitted += all;
    if (result->outcome == OUTCOME_VIOLATION) {
        g_autofree char *finding = finding_of(schedule, result);
        fail(task->exploration, "UNSAFE BUT ADMITTED", finding);
    }
}

static unsigned draw_move(const struct exploration *exploration, uint64_t *random)
{
    unsigned move;
    do {
        move = (unsigned)(seeded_mix(++*random) % exploration->count);
    } while (exploration->singles[move].verdict != VERDICT_ADMITTED);
    return move;
}

/* Mostly three that get along two by two: else one of them is only refused. */
static bool is_worth_it(const struct exploration *exploration, const unsigned moves[3], uint64_t *random)
{
    for (unsigned i = 0; i < 3; i++) {
        if (exploration_pair(exploration, moves[i], moves[(i + 1) % 3])->verdict == VERDICT_REFUSED) {
            return seeded_mix(++*random) % 10 == 0;
        }
    }
    return true;
}

void explore_triples(struct exploration *exploration, uint64_t count)
{
    static struct cell any; /* its places for cuts grow with the longest run */
    uint64_t random = seed_of(exploration, 7, 7, 7) << 20;
    for (uint64_t i = 0; i < count;) {
        unsigned moves[3];
        for (unsigned j = 0; j < 3; j++) {
            moves[j] = draw_move(exploration, &random);
        }
        if (!is_worth_it(exploration, moves, &random)) {
            continue;
        }
        struct schedule schedule = schedule_of(exploration);
        schedule.seed = seed_of(exploration, 40000, moves[0], i);
        for (unsigned j = 0; j < 3; j++) {
            schedule.moves[schedule.count++] = &exploration->moves[moves[j]];
        }
        any.changes = 2 * CHANGES_GUESSED;
        set_mode(&schedule, &any, (unsigned)i);
        submit(exploration, &any, &schedule, false, note_triple);
        i++;
    }
    runner_drain(exploration->runner);
}
