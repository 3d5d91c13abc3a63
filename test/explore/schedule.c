/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One run: builds the world, lets every actor make its move at its moment, and asks at the end whether all is as it
 * must be (checks.c). Everything is drawn from the seed in a fixed order, so a schedule is replayed by its word.
 *
 *   images -> graph -> actors: sleep, start, [live], end -> faults off -> check_graph -> close -> check_disks
 *                                                                                              -> check_reopened
 * With a power cut the world ends somewhere on that way, and after_cut() goes on in the next one.
 *
 * 1. Whoever was admitted and neither cancelled nor hit by a fault ends well. Whoever was refused said -EBUSY.
 * 2. With `override` the companions come first, then the first move by the rules, then the ledger is silenced and the
 *    next one comes while the first has not ended; only what these two do to each other is on trial.
 */
#include "test/explore/schedule.h"
#include "block/graph.h"
#include "block/operation.h"
#include "job/job.h"
#include "test/explore/checks.h"
#include "test/explore/clients.h"
#include "test/explore/world.h"
#include <errno.h>
#include <string.h>
#include <unistd.h>

#define WALL_CLOCK_SECONDS 20
#define START_WITHIN (1500 * MICROSECOND)
#define LINGER (1200 * MICROSECOND)
#define POLL_NS (15 * MICROSECOND)
#define SETTLE_NS (10000 * MICROSECOND)

/* --- ends of jobs --- */

static struct actor *actor_by_id(struct world *world, const char *id)
{
    for (unsigned i = 0; id && i < world->actor_count; i++) {
        if (strcmp(world->actors[i].id, id) == 0) {
            return &world->actors[i];
        }
    }
    return NULL;
}

static void actor_end(struct actor *actor, enum actor_end end, const char *error)
{
    const struct move_kind *kind = actor->move->kind;
    actor->end = end;
    actor->error = g_strdup(error);
    actor->world->result->ended_well += end == ACTOR_DONE;
    actor->world->result->cancelled += end == ACTOR_CANCELLED;
    actor->world->result->failed += end == ACTOR_FAILED && !actor->world->result->cut;
    void (*follow)(struct actor * actor) = end == ACTOR_DONE ? kind->done : kind->failed;
    if (follow) {
        follow(actor);
    }
}

static const char *member(json_t *event, const char *name)
{
    return json_string_value(json_object_get(json_object_get(event, "data"), name));
}

/* A job that aborts gives its claims back before it says that it has ended: what it leaves behind counts from there. */
static void on_event(json_t *event, void *argument)
{
    const char *name = json_string_value(json_object_get(event, "event")), *error = member(event, "error");
    struct actor *actor = actor_by_id(argument, member(event, "device"));
    struct actor *aborting = actor_by_id(argument, member(event, "id"));
    world_catch_up(argument);
    if (actor && strcmp(name, "BLOCK_JOB_COMPLETED") == 0) {
        actor_end(actor, error ? ACTOR_FAILED : ACTOR_DONE, error);
    } else if (actor && strcmp(name, "BLOCK_JOB_CANCELLED") == 0) {
        actor_end(actor, ACTOR_CANCELLED, NULL);
    } else if (aborting && g_strcmp0(member(event, "status"), "aborting") == 0) {
        aborting->aborts = true;
        if (aborting->move->kind->failed) {
            aborting->move->kind->failed(aborting);
        }
    }
    json_decref(event);
}

/* --- actors --- */

static bool always(const char *sentence, void *argument)
{
    return true;
}

static enum verdict verdict_of(struct actor *actor, int code, const struct error *error)
{
    if (code == 0 || code == -EBUSY) {
        return code == 0 ? VERDICT_ADMITTED : VERDICT_REFUSED;
    }
    bool usual = code == -ENOENT || code == -ENODEV || code == -EINVAL || code == -EROFS;
    if (!usual && !world_has_faults(actor->world)) {
        world_violation(actor->world, "%s does not begin: %s", actor->move->name, error->message);
    }
    return VERDICT_INVALID;
}

/* Begins the move. True: it lives. */
static bool coroutine_fn actor_start(struct actor *actor)
{
    struct world *world = actor->world;
    auto_error error = NULL;
    if (world->schedule->override && actor->number == world->schedule->count - 1) {
        access_set_override(world->graph->ledger, always, NULL);
    }
    actor->begun = true;
    int code = actor->move->kind->start(actor, &error);
    actor->verdict = verdict_of(actor, code, error);
    if (!actor->companion) {
        world->result->verdicts[actor->number] = actor->verdict;
        g_strlcpy(world->result->reasons[actor->number], error ? error->message : "",
                  sizeof(world->result->reasons[0]));
    }
    actor->started = true;
    world_catch_up(world);
    if (code < 0) {
        /* What failed rather than being refused may have got somewhere. */
        actor->end = ACTOR_FAILED;
        return false;
    }
    if (!actor->move->kind->live) {
        actor_end(actor, ACTOR_DONE, NULL);
    }
    return actor->move->kind->live != NULL;
}

/* Where a pair is on trial that the rules refuse, one begins after the other. */
static void coroutine_fn await_turn(struct actor *actor)
{
    struct world *world = actor->world;
    for (unsigned i = 0; i < world->actor_count; i++) {
        const struct actor *other = &world->actors[i];
        bool earlier = !actor->companion && (other->companion || other->number < actor->number);
        while (earlier && !other->started) {
            world_sleep(POLL_NS);
        }
    }
}

static void cancel_entry(void *argument)
{
    struct actor *actor = argument;
    world_sleep(actor->cancel_ns);
    struct job *job = jobs_find(actor->world->jobs, actor->id);
    if (job && job_cancel(job, true, NULL) == 0) {
        actor->cancelled = true;
    }
    co_group_leave(&actor->world->alive);
}

static void actor_entry(void *argument)
{
    struct actor *actor = argument;
    struct world *world = actor->world;
    if (world_in_turn(world)) {
        await_turn(actor);
    }
    world_sleep(actor->start_ns);
    if (actor->cancel_ns) {
        co_group_enter(&world->alive);
        loop_spawn(world->control, cancel_entry, actor);
    }
    if (actor_start(actor)) {
        actor->move->kind->live(actor);
    }
    if (actor->end == ACTOR_FAILED && actor->verdict == VERDICT_ADMITTED && !actor->cancelled &&
        !world_has_faults(world)) {
        world_violation(world, "%s fails: %s", actor->move->name, actor->error);
    }
    co_group_leave(&world->alive);
}

static void add_actor(struct world *world, const struct move *move, bool companion)
{
    struct actor *actor = &world->actors[world->actor_count];
    *actor = (struct actor){.world = world, .move = move, .number = world->actor_count++, .companion = companion};
    g_snprintf(actor->id, sizeof(actor->id), "%s%u", companion ? "guest" : "op", actor->number);
    actor->target = actor->bottom = actor->subject = NO_IMAGE;
    actor->start_ns = (int64_t)world_below(world, START_WITHIN);
    for (unsigned i = 0; i < G_N_ELEMENTS(actor->linger_ns); i++) {
        actor->linger_ns[i] = world_chance(world, 40) ? 0 : (int64_t)world_below(world, LINGER);
    }
    actor->stays = world_chance(world, 12);
    actor->rests = world_chance(world, 20);
    actor->leave_ns = world_chance(world, 25) ? (int64_t)world_below(world, 4 * START_WITHIN) : 0;
}

static void draw_actors(struct world *world)
{
    const struct schedule *schedule = world->schedule;
    const struct move *companions[COMPANIONS_MAX];
    unsigned count = companion_moves(world->topology, companions);
    for (unsigned i = 0; i < schedule->count; i++) {
        add_actor(world, schedule->moves[i], false);
    }
    for (unsigned i = 0; i < count; i++) {
        bool wanted = world_chance(world, 60);
        if (wanted && schedule->mode != MODE_VERDICT && schedule->companions & 1u << i) {
            add_actor(world, companions[i], true);
        }
    }
    if (schedule->mode == MODE_CANCEL) {
        struct actor *actor = &world->actors[world_below(world, schedule->count)];
        actor->cancel_ns = 1 + (int64_t)world_below(world, 3 * START_WITHIN);
    }
}

/* --- faults and cuts --- */

static void draw_fault(struct world *world)
{
    static const unsigned accesses[] = {SIM_READ,
                                        SIM_WRITE,
                                        SIM_SYNC,
                                        SIM_ALLOCATE,
                                        SIM_WRITE | SIM_ALLOCATE,
                                        SIM_READ | SIM_WRITE | SIM_SYNC | SIM_ALLOCATE};
    struct sim_fault fault = {
        .access = accesses[world_below(world, G_N_ELEMENTS(accesses))],
        .skip = world->schedule->at,
        .count = 1 + world_below(world, 3),
        .error = -EIO,
    };
    if (!(fault.access & (SIM_READ | SIM_SYNC)) && world_chance(world, 50)) {
        fault.error = -ENOSPC;
    }
    sim_fault_add(world->sim, &fault);
}

static void draw_room(struct world *world)
{
    const struct picture *picture = &world->pictures[world_below(world, world->picture_count)];
    uint64_t bytes;
    g_free(sim_disk_get(world->sim, picture->path, &bytes));
    sim_disk_set_room(world->sim, picture->path, bytes + world_below(world, 4 * world->cluster));
}

static void draw_faults(struct world *world)
{
    if (world->schedule->mode == MODE_FAULT) {
        draw_fault(world);
    } else if (world->schedule->mode == MODE_ROOM) {
        draw_room(world);
    }
}

static void lift_faults(struct world *world)
{
    sim_faults_clear(world->sim);
    for (unsigned i = 0; i < world->picture_count; i++) {
        sim_disk_set_room(world->sim, world->pictures[i].path, UINT64_MAX);
    }
}

/* Who was on its way: has it moved its users? The memory of the world that ended tells. */
static void settle_moves(struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        if (actor->move->kind->sort == MOVE_CLIENT || !actor->begun || actor->end != ACTOR_RUNS) {
            continue;
        }
        bool moved = actor->move->kind->moved && actor->move->kind->moved(actor);
        actor_end(actor, moved ? ACTOR_DONE : ACTOR_FAILED, NULL);
    }
}

static const struct disk_rules cut_rules = {.flushed_only = true};

static void reopen_after_cut(void *argument)
{
    check_reopened(argument, &cut_rules);
}

static void after_cut(struct sim *sim, void *argument)
{
    struct world *world = argument;
    struct loop *loop;
    world->result->cut = true;
    settle_moves(world);
    world->sim = sim;
    check_disks(world, &cut_rules);
    g_assert(loop_create(ENGINE_SIM, &loop, NULL) == 0);
    loop_run_coroutine(loop, reopen_after_cut, world);
    world_good(world);
}

/* --- the run --- */

static void coroutine_fn run_moves(struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        co_group_enter(&world->alive);
        loop_spawn(world->control, actor_entry, &world->actors[i]);
    }
    co_group_wait(&world->alive);
}

/* The verdict alone: each move begins while those before it have got nowhere yet. */
static void coroutine_fn run_verdicts(struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        bool last = i == world->actor_count - 1;
        g_autofree char *before = world_fingerprint(world);
        if (actor->move->kind->claims && !last) {
            struct operation_config config = {.kind = "command",
                                              .id = actor->id,
                                              .table = actor->move->kind->claims,
                                              .bound = {[CLAIM_NODE] = world_node(world, actor->move->upper),
                                                        [CLAIM_OVERLAY] = world_node(world, actor->target)},
                                              .conditions = actor->move->kind->conditions};
            struct operation *held;
            int code = operation_begin(world->graph, &config, &held, NULL);
            world->result->verdicts[i] = code == 0 ? VERDICT_ADMITTED : VERDICT_REFUSED;
            continue;
        }
        actor_start(actor);
        struct job *job = jobs_find(world->jobs, actor->id);
        if (job) {
            job_pause(job, NULL);
            world_sleep(SETTLE_NS);
        }
        g_autofree char *after = world_fingerprint(world);
        if (actor->verdict == VERDICT_REFUSED && strcmp(before, after) != 0) {
            world_violation(world, "%s was refused and has changed something:\n%s\n%s", actor->move->name, before,
                            after);
        }
    }
    world_good(world);
}

static void conduct(void *argument)
{
    struct world *world = argument;
    bool faults = world_has_faults(world);
    struct disk_rules rules = {.flushed_only = faults, .links = !faults, .exact = !faults};
    world_open_graph(world);
    world->jobs = jobs_create(world->graph, on_event, world);
    if (world->schedule->mode == MODE_VERDICT) {
        run_verdicts(world);
    }
    draw_faults(world);
    run_moves(world);
    lift_faults(world);
    jobs_cancel_all_and_wait(world->jobs);
    check_graph(world);
    jobs_destroy(world->jobs);
    world_close_graph(world);
    check_disks(world, &rules);
    check_reopened(world, &rules);
}

static void make_loops(struct world *world)
{
    world->io_count = 1 + (unsigned)world_below(world, 2);
    g_assert(loop_create(ENGINE_SIM, &world->control, NULL) == 0);
    for (unsigned i = 0; i < world->io_count; i++) {
        g_assert(loop_thread_start("io", ENGINE_SIM, &world->io[i], NULL) == 0);
    }
}

static struct sim_config draw_config(struct world *world)
{
    static const int64_t latencies[][2] = {{0, 0}, {1000, 20000}, {50000, 400000}, {1000, 400000}};
    const int64_t *latency = latencies[world_below(world, G_N_ELEMENTS(latencies))];
    return (struct sim_config){
        .seed = world_random(world),
        .latency_min_ns = latency[0],
        .latency_max_ns = latency[1],
        .short_percent = world_chance(world, 30) ? 15 : 0,
        .preempt_percent = (unsigned)world_below(world, 60),
        .limit_ns = INT64_C(60) * 1000 * 1000 * 1000,
    };
}

void schedule_run(const struct schedule *schedule, struct result *result)
{
    static struct world world;
    world = (struct world){.schedule = schedule,
                           .topology = schedule->topology,
                           .result = result,
                           .random = schedule->seed * UINT64_C(0x2545f4914f6cdd1d)};
    alarm(WALL_CLOCK_SECONDS);
    co_group_init(&world.alive);
    struct sim_config config = draw_config(&world);
    world.nested = world_chance(&world, 40) && schedule->mode != MODE_VERDICT;
    world.sim = sim_create(&config);
    world_make_images(&world);
    make_loops(&world);
    draw_actors(&world);
    world_make_targets(&world);
    if (schedule->mode == MODE_CUT) {
        sim_cut_power(world.sim, schedule->at, after_cut, &world);
    }
    loop_run_coroutine(world.control, conduct, &world);
    result->changes = sim_changes(world.sim);
    for (unsigned i = 0; i < world.io_count; i++) {
        loop_thread_join(world.io[i]);
    }
    loop_destroy(world.control);
    sim_destroy(world.sim);
    world_good(&world);
}
