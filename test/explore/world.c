/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The world of one schedule: what there is at the beginning (images, sizes, how the graph is opened), drawn from the
 * seed, and the few questions that everybody asks of it. Who acts in it is schedule.c's, what must be true is
 * checks.c's.
 */
#include "test/explore/world.h"
#include "base/seeded.h"
#include "block/graph.h"
#include "block/node.h"
#include "job/job.h"
#include "test/explore/image.h"
#include "test/explore/mutations.h"
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#define CLUSTERS_MIN 4
#define CLUSTERS_MAX 7
#define CLUSTERS_LARGE 50 /* of 4 KiB: three units of 64 KiB, and some */

/* --- ends --- */

void world_violation(struct world *world, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_vsnprintf(world->result->text, sizeof(world->result->text), format, arguments);
    va_end(arguments);
    world->result->outcome = OUTCOME_VIOLATION;
    _exit(0);
}

void world_good(struct world *world)
{
    world->result->outcome = OUTCOME_GOOD;
    _exit(0);
}

/* --- the seed --- */

uint64_t world_random(struct world *world)
{
    return seeded_next(&world->random);
}

uint64_t world_below(struct world *world, uint64_t limit)
{
    return world_random(world) % limit;
}

bool world_chance(struct world *world, unsigned percent)
{
    return world_below(world, 100) < percent;
}

void coroutine_fn world_sleep(int64_t duration_ns)
{
    struct loop_sleep sleep = {0};
    loop_sleep_ns(&sleep, duration_ns);
}

int64_t world_speed(struct world *world)
{
    return world_chance(world, 50) ? 0 : (int64_t)(world->cluster * (200 + world_below(world, 2000)));
}

/* --- images --- */

struct draft {
    enum image_cluster clusters[CLUSTERS_LARGE];
    unsigned char content[CLUSTERS_LARGE << 12];
};

static enum image_cluster draw_cluster(struct world *world, bool lowest)
{
    unsigned luck = (unsigned)world_below(world, 100);
    return luck < 12 ? IMAGE_ZERO : luck < (lowest ? 80 : 50) ? IMAGE_DATA : IMAGE_NONE;
}

/* What the image shows over what is below it. */
static unsigned char *compose(const struct world *world, const struct draft *draft, uint64_t size,
                              const struct picture *below)
{
    unsigned char *shown = g_malloc0(size + 1);
    for (uint64_t at = 0; at < size; at++) {
        enum image_cluster kind = draft->clusters[at / world->cluster];
        if (kind == IMAGE_DATA) {
            shown[at] = draft->content[at];
        } else if (kind == IMAGE_NONE && below && at < below->view->size) {
            shown[at] = below->view->initial[at];
        }
    }
    return shown;
}

static void make_image(struct world *world, unsigned index, unsigned cluster_bits, uint64_t size)
{
    struct picture *picture = &world->pictures[index];
    int below = world->topology->images[index].below;
    g_autofree struct draft *draft = g_new0(struct draft, 1);
    g_autofree char *backing =
        below == NO_IMAGE ? NULL : g_strdup_printf("%s.img", world->topology->images[below].name);
    for (unsigned i = 0; i < world->clusters_max; i++) {
        draft->clusters[i] = draw_cluster(world, below == NO_IMAGE);
        content_fill(draft->content + i * world->cluster, i * world->cluster, world->cluster,
                     content_image_tag(index, i));
    }
    struct image_plan plan = {.backing = backing,
                              .size = size,
                              .cluster_bits = cluster_bits,
                              .clusters = draft->clusters,
                              .content = draft->content};
    uint64_t bytes;
    g_autofree unsigned char *file = image_build(&plan, &bytes);
    picture->name = world->topology->images[index].name;
    picture->below = picture->named = below;
    picture->moved_to = NO_IMAGE;
    g_snprintf(picture->path, sizeof(picture->path), "/%s.img", picture->name);
    sim_disk_set(world->sim, picture->path, file, bytes);
    picture->view = view_create(compose(world, draft, size, below == NO_IMAGE ? NULL : &world->pictures[below]), size);
}

static bool wants_large(struct world *world)
{
    bool wanted = false;
    for (unsigned i = 0; i < world->schedule->count; i++) {
        wanted |= world->schedule->moves[i]->kind->large;
    }
    return wanted && world_chance(world, 50) && world->schedule->mode != MODE_VERDICT;
}

/* Mostly all of one size, whose last cluster is cut anywhere; sometimes each of its own, in whole sectors, since an
 * image is made longer by sectors only. Verdicts are not to depend on it. */
void world_make_images(struct world *world)
{
    bool large = wants_large(world);
    unsigned cluster_bits = world_chance(world, 75) && !large ? 9 : 12;
    uint64_t least = large ? CLUSTERS_LARGE / 2 : CLUSTERS_MIN;
    world->cluster = UINT64_C(1) << cluster_bits;
    world->clusters_max = large ? CLUSTERS_LARGE : CLUSTERS_MAX;
    uint64_t clusters = least + world_below(world, world->clusters_max - least);
    uint64_t usual = clusters * world->cluster - world_below(world, world->cluster - 1);
    bool same = world_chance(world, 65) || world->schedule->mode == MODE_VERDICT;
    world->cluster_bits = cluster_bits;
    world->picture_count = world->topology->count;
    for (unsigned i = 0; i < world->topology->count; i++) {
        uint64_t size = usual + world_below(world, 3 * world->cluster) - 2 * world->cluster;
        size = same ? usual : (size + SIM_SECTOR - 1) / SIM_SECTOR * SIM_SECTOR;
        make_image(world, i, cluster_bits, MIN(size, world->clusters_max * world->cluster));
    }
}

/* An empty image as long as what it is for. That of a snapshot names it in its header already. */
static void make_target(struct world *world, struct actor *actor)
{
    static const char *const names[] = {"t0", "t1", "t2", "t3"};
    static const enum image_cluster nothing[CLUSTERS_LARGE];
    enum move_target kind = actor->move->kind->target;
    const struct picture *subject = &world->pictures[actor->move->upper];
    actor->target = (int)world->picture_count++;
    struct picture *picture = &world->pictures[actor->target];
    *picture = (struct picture){.name = names[actor->number], .below = NO_IMAGE, .moved_to = NO_IMAGE, .idle = true};
    picture->named = kind == TARGET_OVERLAY ? actor->move->upper : NO_IMAGE;
    struct image_plan plan = {.backing = kind == TARGET_OVERLAY ? subject->path + 1 : NULL,
                              .size = subject->view->size,
                              .cluster_bits = world->cluster_bits,
                              .clusters = nothing};
    uint64_t bytes;
    g_autofree unsigned char *file = image_build(&plan, &bytes);
    g_snprintf(picture->path, sizeof(picture->path), "/%s.img", picture->name);
    sim_disk_set(world->sim, picture->path, file, bytes);
    picture->view = view_create(g_malloc0(plan.size + 1), plan.size);
    picture->view->unknown = true;
}

void world_make_targets(struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        if (world->actors[i].move->kind->target != TARGET_NONE) {
            make_target(world, &world->actors[i]);
        }
    }
}

/* --- the graph --- */

/* Options that describe the image, and those below it inline as far as they are not open yet. */
static json_t *describe_image(struct world *world, int image)
{
    const struct picture *picture = &world->pictures[image];
    json_t *backing = json_null();
    if (picture->below != NO_IMAGE) {
        const char *name = world->pictures[picture->below].name;
        backing = graph_find(world->graph, name) ? json_string(name) : describe_image(world, picture->below);
    }
    return json_pack("{s:s, s:s, s:{s:s, s:s}, s:o}", "driver", "qcow2", "node-name", picture->name, "file", "driver",
                     "file", "filename", picture->path, "backing", backing);
}

static void coroutine_fn add_image(struct world *world, int image)
{
    json_t *json = describe_image(world, image);
    struct blockdev_options *options = NULL;
    struct node *node;
    auto_error error = NULL;
    int code = blockdev_options_from_json(json, "", &options, &error);
    if (code == 0) {
        code = graph_add(world->graph, options, &node, &error);
    }
    json_decref(json);
    blockdev_options_free(options);
    if (code < 0) {
        world_violation(world, "cannot open image %s: %s", world->pictures[image].name, error->message);
    }
}

static const struct operation *operation_of(const struct actor *actor, bool ended)
{
    list_for_each (link, &actor->world->graph->operations) {
        const struct operation *operation = container_of(link, struct operation, link);
        if (operation->ended == ended && strcmp(access_holder_id(operation->holder), actor->id) == 0) {
            return operation;
        }
    }
    return NULL;
}

/* Every claim on its way into the ledger passes here: in a step of the graph, after its operations have ended. A step
 * that is taken back is seen again without them. */
static void see_claim(const struct access_holder *holder, struct access_claim *claim, void *argument)
{
    struct world *world = argument;
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        if (actor->move->kind->moved && !actor->settled && operation_of(actor, true)) {
            actor->moved_at = actor->moved_at ? actor->moved_at : ++world->moved_count;
        } else if (actor->moved_at && !actor->settled && operation_of(actor, false)) {
            actor->moved_at = 0;
        }
    }
    mutation_apply(world->schedule->mutation, holder, claim);
}

void coroutine_fn world_open_graph(struct world *world)
{
    world->graph = graph_create();
    access_set_filter(world->graph->ledger, see_claim, world);
    for (unsigned i = 0; i < world->topology->count; i++) {
        if (!world->nested || topology_is_leaf(world->topology, (int)i)) {
            add_image(world, (int)i);
        }
    }
    for (unsigned i = world->topology->count; i < world->picture_count; i++) {
        add_image(world, (int)i);
    }
}

void coroutine_fn world_close_graph(struct world *world)
{
    graph_delete_all(world->graph);
    graph_destroy(world->graph);
    world->graph = NULL;
}

struct node *world_node(struct world *world, int image)
{
    return image == NO_IMAGE ? NULL : graph_find(world->graph, world->pictures[image].name);
}

bool world_leans_on(const struct world *world, int upper, int lower)
{
    while (upper != NO_IMAGE && upper != lower) {
        upper = world->pictures[upper].below;
    }
    return upper == lower;
}

const struct operation *world_operation(const struct actor *actor)
{
    return operation_of(actor, false);
}

void world_link(struct world *world, int image, int below)
{
    bool within[ACTORS_MAX];
    for (unsigned i = 0; i < world->actor_count; i++) {
        const struct actor *actor = &world->actors[i];
        within[i] = actor->bottom != NO_IMAGE && world_leans_on(world, actor->move->upper, image) &&
                    world_leans_on(world, image, actor->bottom);
    }
    world->pictures[image].below = below;
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        if (within[i] && !world_leans_on(world, image, actor->bottom)) {
            bool same = below != NO_IMAGE && world->pictures[below].below == world->pictures[actor->bottom].below;
            actor->bottom = same ? below : image;
        }
    }
}

void world_forget_above(struct world *world, int image)
{
    for (int i = 0; i < (int)world->picture_count; i++) {
        world->pictures[i].forgotten |= i != image && world_leans_on(world, i, image) && !world_node(world, i);
    }
}

/* The first of those that the model has not followed yet, or NULL. */
static struct actor *next_moved(struct world *world)
{
    struct actor *next = NULL;
    for (unsigned i = 0; i < world->actor_count; i++) {
        struct actor *actor = &world->actors[i];
        const struct move_kind *kind = actor->move->kind;
        if (kind->moved && actor->begun && !actor->settled && actor->end == ACTOR_RUNS && kind->moved(actor)) {
            bool earlier = next && actor->moved_at && (!next->moved_at || actor->moved_at < next->moved_at);
            next = !next || earlier ? actor : next;
        }
    }
    return next;
}

void world_catch_up(struct world *world)
{
    for (struct actor *actor; (actor = next_moved(world));) {
        actor->move->kind->done(actor);
        actor->settled = true;
    }
}

/* --- questions --- */

bool world_has_faults(const struct world *world)
{
    return world->schedule->mode == MODE_FAULT || world->schedule->mode == MODE_ROOM;
}

bool world_is_quiet(const struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        const struct actor *actor = &world->actors[i];
        if (!actor->started || (actor->move->kind->sort != MOVE_CLIENT && actor->end == ACTOR_RUNS)) {
            return false;
        }
    }
    return true;
}

bool world_all_begun(const struct world *world)
{
    for (unsigned i = 0; i < world->actor_count; i++) {
        if (!world->actors[i].begun) {
            return false;
        }
    }
    return true;
}

bool world_in_turn(const struct world *world)
{
    return world->schedule->override || world->schedule->mutation != NO_MUTATION;
}

/* --- what a refusal must leave alone --- */

/* The ledger without its clocks. */
static void drop_times(json_t *ledger)
{
    size_t index;
    json_t *holder;
    json_array_foreach(json_object_get(ledger, "holders"), index, holder)
    {
        json_object_del(holder, "since");
        json_object_del(holder, "progress");
    }
}

char *world_fingerprint(struct world *world)
{
    GString *text = g_string_new(NULL);
    json_t *parts[] = {graph_describe(world->graph), access_describe(world->graph->ledger)};
    struct job_info_list *jobs = jobs_query(world->jobs);
    drop_times(parts[1]);
    for (unsigned i = 0; i < G_N_ELEMENTS(parts); i++) {
        char *dump = json_dumps(parts[i], JSON_SORT_KEYS);
        g_string_append_printf(text, "%s\n", dump);
        free(dump);
        json_decref(parts[i]);
    }
    for (size_t i = 0; i < jobs->count; i++) {
        g_string_append_printf(text, "job %s\n", jobs->items[i]->id);
    }
    job_info_list_free(jobs);
    for (unsigned i = 0; i < world->picture_count; i++) {
        uint64_t bytes;
        g_autofree unsigned char *disk = sim_disk_get(world->sim, world->pictures[i].path, &bytes);
        g_autofree char *digest = g_compute_checksum_for_data(G_CHECKSUM_SHA256, disk, bytes);
        g_string_append_printf(text, "%s %s\n", world->pictures[i].path, digest);
    }
    return g_string_free(text, FALSE);
}
