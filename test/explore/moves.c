/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The moves: one entry in the table per kind of operation. An entry says where the operation fits, starts it through
 * the function behind its command, sees it to its end, and then changes the model as a good end changes the truth:
 *
 *   commit T>B   B shows what T showed; what leant on T leans on B; T and the images between are stale
 *   stream X..Y  X leans on Y (or on what Y has been committed into); nobody shows anything else
 *   grow N       behind the old end N shows zeroes
 *   shrink N     what is cut off is gone
 *   export, cbf, bitmap-add
 *                nothing
 *
 * The names of kinds are those of test/data/access-scenarios.json: an export without "-sh" is exclusive.
 */
#include "test/explore/moves.h"
#include "block/graph.h"
#include "block/operation.h"
#include "job/commit.h"
#include "job/stream.h"
#include "schema/claims.h"
#include "test/explore/clients.h"
#include "test/explore/commands.h"
#include "test/explore/copies.h"
#include "test/explore/world.h"
#include <errno.h>
#include <string.h>

#define POLL_NS (15 * MICROSECOND)

/* --- jobs --- */

static enum job_status status_of(struct actor *actor)
{
    enum job_status status = JOB_STATUS_NULL;
    struct job_info_list *list = jobs_query(actor->world->jobs);
    for (size_t i = 0; i < list->count; i++) {
        if (strcmp(list->items[i]->id, actor->id) == 0) {
            status = list->items[i]->status;
        }
    }
    job_info_list_free(list);
    return status;
}

static void coroutine_fn job_rest(struct actor *actor)
{
    struct jobs *jobs = actor->world->jobs;
    struct job *job = jobs_find(jobs, actor->id);
    bool pauses = job && job_pause(job, NULL) == 0;
    world_sleep(actor->linger_ns[0]);
    job = pauses ? jobs_find(jobs, actor->id) : NULL;
    if (job) {
        job_resume(job, NULL);
    }
}

/* It is ready: it is to move its users, or to leave them where they are. */
static void job_answer(struct actor *actor, struct job *job)
{
    actor->asked = true;
    actor->since = view_clock();
    if (actor->stays) {
        job_cancel(job, false, NULL);
    } else {
        job_complete(job, NULL);
    }
}

/* Takes the job through what it asks for: an answer when it is ready, finalize when it is pending. */
static void coroutine_fn job_live(struct actor *actor)
{
    struct world *world = actor->world;
    if (actor->rests) {
        job_rest(actor);
    }
    for (enum job_status status; (status = status_of(actor)) != JOB_STATUS_NULL;) {
        bool ready = status == JOB_STATUS_READY && !actor->asked, pending = status == JOB_STATUS_PENDING;
        bool hold = world_in_turn(world) && !world_all_begun(world);
        if ((!ready && !pending) || hold) {
            world_sleep(POLL_NS);
            continue;
        }
        world_sleep(actor->linger_ns[pending]);
        struct job *job = jobs_find(world->jobs, actor->id);
        if (job && ready) {
            job_answer(actor, job);
        } else if (job) {
            job_finalize(job, NULL);
        }
    }
}

/* --- commit --- */

static bool commit_fits(const struct topology *topology, int upper, int lower)
{
    return lower != NO_IMAGE && topology_is_above(topology, upper, lower);
}

static int coroutine_fn commit_begin(struct actor *actor, struct error **err)
{
    struct world *world = actor->world;
    struct block_commit_args args = {
        .job_id = actor->id,
        .device = (char *)world->pictures[actor->move->upper].name,
        .base_node = (char *)world->pictures[actor->move->lower].name,
        .has_speed = true,
        .speed = world_speed(world),
        .has_switch_after = true,
        .switch_after = 1,
        .has_switch_ratio = true,
        .switch_ratio = 1 + (int64_t)world_below(world, 60), /* clients are faster than many a commit */
        .has_auto_finalize = true,
    };
    world->pictures[actor->move->lower].may_grow = true;
    world_forget_above(world, actor->move->lower);
    return commit_start(world->jobs, &args, err);
}

/* What leant on top leans on base; what nobody has open is nobody's. */
static void commit_relink(struct world *world, int top, int base)
{
    for (unsigned i = 0; i < world->picture_count; i++) {
        struct picture *picture = &world->pictures[i];
        bool leans = !picture->stale && picture->below != NO_IMAGE;
        if (leans && !world_node(world, (int)i)) {
            const struct picture *below = &world->pictures[picture->below];
            picture->forgotten |= below->stale || below->forgotten;
        } else if (leans && picture->below == top) {
            world_link(world, (int)i, base);
            picture->named = base;
        }
    }
}

static void commit_failed(struct actor *actor);

static void commit_done(struct actor *actor)
{
    struct world *world = actor->world;
    if (actor->stays && actor->asked) {
        commit_failed(actor);
        return;
    }
    if (actor->settled) {
        return;
    }
    actor->settled = true;
    world_forget_above(world, actor->move->lower); /* a stream may have let go of them since the commit began */
    struct picture *top = &world->pictures[actor->move->upper], *base = &world->pictures[actor->move->lower];
    uint64_t size = MAX(top->view->size, base->view->size);
    view_unref(base->view);
    base->view = view_ref(top->view);
    if (size > base->view->size) {
        view_resize(base->view, size);
    }
    for (int at = actor->move->upper; at != NO_IMAGE && at != actor->move->lower; at = world->pictures[at].below) {
        world->pictures[at].stale = true;
        world->pictures[at].moved_to = actor->move->lower;
    }
    commit_relink(world, actor->move->upper, actor->move->lower);
}

static bool commit_moved(const struct actor *actor)
{
    struct node *top = world_node(actor->world, actor->move->upper);
    return actor->verdict == VERDICT_ADMITTED && !(actor->stays && actor->asked) && (!top || top->stale);
}

/* What is in base, and what shows it, is a mixture from now on. */
static void commit_failed(struct actor *actor)
{
    struct world *world = actor->world;
    int at = world->pictures[actor->move->upper].below;
    world_forget_above(world, actor->move->lower);
    for (; at != NO_IMAGE; at = world->pictures[at].below) {
        world->pictures[at].view->unknown = true;
        if (at == actor->move->lower) {
            break;
        }
    }
}

/* --- stream --- */

static bool stream_fits(const struct topology *topology, int upper, int lower)
{
    int below = topology->images[upper].below;
    return below != NO_IMAGE && lower != below && topology_is_above(topology, upper, lower);
}

/* The role of its bottom follows the model as it follows the graph; world_link(). */
static void stream_bind(struct actor *actor)
{
    struct world *world = actor->world;
    const struct operation *operation = world_operation(actor);
    for (int i = 0; operation && i < (int)world->picture_count; i++) {
        if (world_node(world, i) == operation->bound[CLAIM_BOTTOM]) {
            actor->bottom = i;
        }
    }
    g_assert(actor->bottom != NO_IMAGE);
}

static int coroutine_fn stream_begin(struct actor *actor, struct error **err)
{
    struct world *world = actor->world;
    struct block_stream_args args = {
        .job_id = actor->id,
        .device = (char *)world->pictures[actor->move->upper].name,
        .base_node = actor->move->lower == NO_IMAGE ? NULL : (char *)world->pictures[actor->move->lower].name,
        .has_speed = true,
        .speed = world_speed(world),
        .has_auto_finalize = true,
    };
    int code = stream_start(world->jobs, &args, err);
    world_catch_up(world);
    if (code == 0) {
        stream_bind(actor);
    }
    return code;
}

static void stream_done(struct actor *actor)
{
    struct world *world = actor->world;
    if (actor->settled) {
        return;
    }
    actor->settled = true;
    int below = world->pictures[actor->bottom].below;
    while (below != NO_IMAGE && world->pictures[below].stale) { /* the bottom closed before the model saw it relinked */
        below = world->pictures[below].moved_to;
    }
    actor->bottom = NO_IMAGE;
    world_link(world, actor->move->upper, below);
    world->pictures[actor->move->upper].named = below;
}

static bool stream_moved(const struct actor *actor)
{
    return actor->verdict == VERDICT_ADMITTED && actor->bottom != NO_IMAGE && !actor->aborts && !world_operation(actor);
}

static void stream_failed(struct actor *actor)
{
    actor->bottom = NO_IMAGE;
}

/* --- exports --- */

static bool any_image(const struct topology *topology, int upper, int lower)
{
    return true;
}

static int coroutine_fn export_ro_begin(struct actor *actor, struct error **err)
{
    return client_start(actor, false, true, err);
}

static int coroutine_fn export_ro_shared_begin(struct actor *actor, struct error **err)
{
    return client_start(actor, false, false, err);
}

static int coroutine_fn export_rw_begin(struct actor *actor, struct error **err)
{
    return client_start(actor, true, true, err);
}

static int coroutine_fn export_rw_shared_begin(struct actor *actor, struct error **err)
{
    return client_start(actor, true, false, err);
}

/* Stays until everybody else has come to an end, or goes at a moment of its own. */
static void coroutine_fn client_live(struct actor *actor)
{
    struct world *world = actor->world;
    while (!world_is_quiet(world) && (actor->leave_ns == 0 || sim_now_ns(world->sim) < actor->leave_ns)) {
        world_sleep(POLL_NS);
    }
    world_sleep(actor->linger_ns[0]);
    client_finish(actor);
}

/* --- the table --- */

static bool has_backing(const struct topology *topology, int upper, int lower)
{
    return topology->images[upper].below != NO_IMAGE;
}

static const struct move_kind kinds[] = {
    {.name = "commit",
     .command = "block-commit",
     .sort = MOVE_JOB,
     .fits = commit_fits,
     .pair = true,
     .separator = ">",
     .start = commit_begin,
     .live = job_live,
     .done = commit_done,
     .failed = commit_failed,
     .moved = commit_moved},
    {.name = "stream",
     .command = "block-stream",
     .sort = MOVE_JOB,
     .fits = stream_fits,
     .pair = true,
     .separator = "..",
     .start = stream_begin,
     .live = job_live,
     .done = stream_done,
     .failed = stream_failed,
     .moved = stream_moved},
    {.name = "mirror",
     .command = "blockdev-mirror",
     .sort = MOVE_JOB,
     .fits = any_image,
     .start = mirror_begin,
     .on_begin = mirror_on_begin,
     .live = job_live,
     .done = mirror_done,
     .moved = mirror_moved,
     .target = TARGET_EMPTY},
    {.name = "replace",
     .command = "blockdev-mirror",
     .sort = MOVE_JOB,
     .fits = any_image,
     .start = replace_begin,
     .on_begin = mirror_on_begin,
     .live = job_live,
     .done = mirror_done,
     .moved = mirror_moved,
     .target = TARGET_EMPTY,
     .replaces = true},
    {.name = "backup",
     .command = "blockdev-backup",
     .sort = MOVE_JOB,
     .fits = any_image,
     .start = backup_begin,
     .on_begin = backup_on_begin,
     .live = job_live,
     .done = backup_done,
     .target = TARGET_EMPTY,
     .large = true},
    {.name = "snapshot",
     .command = "blockdev-snapshot",
     .sort = MOVE_COMMAND,
     .fits = any_image,
     .start = snapshot_begin,
     .on_begin = snapshot_on_begin,
     .target = TARGET_OVERLAY,
     .claims = &blockdev_snapshot_claims},
    {.name = "export-ro",
     .command = "block-export-add",
     .sort = MOVE_CLIENT,
     .fits = any_image,
     .start = export_ro_begin,
     .live = client_live},
    {.name = "export-ro-sh",
     .command = "block-export-add",
     .sort = MOVE_CLIENT,
     .fits = any_image,
     .start = export_ro_shared_begin,
     .live = client_live},
    {.name = "export-rw",
     .command = "block-export-add",
     .sort = MOVE_CLIENT,
     .fits = any_image,
     .start = export_rw_begin,
     .live = client_live},
    {.name = "export-rw-sh",
     .command = "block-export-add",
     .sort = MOVE_CLIENT,
     .fits = any_image,
     .start = export_rw_shared_begin,
     .live = client_live},
    {.name = "resize",
     .command = "block_resize",
     .sort = MOVE_COMMAND,
     .fits = any_image,
     .start = grow_begin,
     .done = resize_done,
     .claims = &block_resize_claims},
    {.name = "shrink",
     .command = "block_resize",
     .sort = MOVE_COMMAND,
     .fits = any_image,
     .start = shrink_begin,
     .done = resize_done,
     .claims = &block_resize_claims,
     .conditions = CLAIM_IF_SHRINK},
    {.name = "cbf",
     .command = "change-backing-file",
     .sort = MOVE_COMMAND,
     .fits = has_backing,
     .start = change_backing_begin,
     .claims = &change_backing_file_claims},
    {.name = "bitmap-add",
     .sort = MOVE_COMMAND,
     .fits = any_image,
     .start = bitmap_add_begin,
     .check = bitmap_add_check},
};

/* --- moves on a topology --- */

static void add_move(GArray *moves, const struct topology *topology, const struct move_kind *kind, int upper, int lower)
{
    struct move move = {.kind = kind, .upper = upper, .lower = lower, .index = moves->len};
    const char *lower_name = lower == NO_IMAGE ? (kind->pair ? "none" : "") : topology->images[lower].name;
    g_snprintf(move.name, sizeof(move.name), "%s %s%s%s", kind->name, topology->images[upper].name, kind->separator,
               lower_name);
    g_array_append_val(moves, move);
}

static GArray *make_moves(const struct topology *topology)
{
    GArray *moves = g_array_new(FALSE, FALSE, sizeof(struct move));
    for (unsigned i = 0; i < G_N_ELEMENTS(kinds); i++) {
        for (int upper = 0; upper < (int)topology->count; upper++) {
            for (int lower = NO_IMAGE; lower < (kinds[i].pair ? upper : 0); lower++) {
                if (kinds[i].fits(topology, upper, lower)) {
                    add_move(moves, topology, &kinds[i], upper, lower);
                }
            }
        }
    }
    return moves;
}

const struct move *moves_on(const struct topology *topology, unsigned *ret_count)
{
    static GHashTable *made; /* topology -> GArray, kept for good */
    if (!made) {
        made = g_hash_table_new(NULL, NULL);
    }
    GArray *moves = g_hash_table_lookup(made, topology);
    if (!moves) {
        moves = make_moves(topology);
        g_hash_table_insert(made, (void *)topology, moves);
    }
    *ret_count = moves->len;
    return (const struct move *)(void *)moves->data;
}

const struct move *move_find(const struct topology *topology, const char *name)
{
    unsigned count;
    const struct move *moves = moves_on(topology, &count);
    for (unsigned i = 0; i < count; i++) {
        if (strcmp(moves[i].name, name) == 0) {
            return &moves[i];
        }
    }
    return NULL;
}

unsigned companion_moves(const struct topology *topology, const struct move *ret[COMPANIONS_MAX])
{
    static const char *const sorts[] = {"export-rw-sh", "export-ro-sh"};
    unsigned count = 0;
    for (int image = (int)topology->count - 1; image >= 0; image--) {
        for (unsigned i = 0; topology_is_leaf(topology, image) && i < G_N_ELEMENTS(sorts); i++) {
            g_autofree char *name = g_strdup_printf("%s %s", sorts[i], topology->images[image].name);
            g_assert(count < COMPANIONS_MAX);
            ret[count++] = move_find(topology, name);
        }
    }
    return count;
}
