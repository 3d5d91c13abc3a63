/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Looks at what crashes leave. At every point of the recording the power goes in several ways (recording.h: loss);
 * then, as a user would after the power is back:
 *
 * 1. every image of the chain is checked: leaks are fine, anything else is not;
 * 2. the chain is opened as its headers say, for writing where it was (so a dirty image is repaired), and every sector
 * is compared with what the views' promises allow;
 * 3. after some crashes something is written and the image is checked once more, and the peer's tool has a look.
 *
 * It writes into the world's disks only, never into the recording.
 */
#include "test/crash/replay.h"
#include "base/seeded.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/driver.h"
#include <glib/gstdio.h>
#include <string.h>

struct look {
    struct scene *scene;
    struct sim *sim;
    struct replay_counts *counts;
    uint64_t random;
    uint64_t point;
    enum loss loss;
    uint64_t loss_seed;
    bool mutated; /* a breakage is being looked for */
    char *problem;
};

static const char *loss_name(enum loss loss)
{
    static const char *const names[] = {"nothing lost", "all lost", "only the last arrived", "the last lost", "mixed"};
    return names[loss];
}

static bool wrong(struct look *look, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool wrong(struct look *look, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    if (!look->problem) {
        look->problem = g_strdup_printf(
            "point %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT ", %s (seed %" G_GUINT64_FORMAT "): %s", look->point,
            recording_points(look->scene->recording), loss_name(look->loss), look->loss_seed, text);
    }
    return false;
}

/* The world's disks become what the crash leaves. */
static void set_disks(struct look *look)
{
    const struct recording *recording = look->scene->recording;
    for (unsigned i = 0; i < recording_disks(recording); i++) {
        GByteArray *left = recording_crash(recording, i, look->point, look->loss, look->loss_seed + i);
        sim_disk_set(look->sim, recording_path(recording, i), left->data, left->len);
        g_byte_array_unref(left);
    }
}

static const char *image_path(const struct scene *scene, unsigned layer)
{
    return layer_path(layer);
}

static bool coroutine_fn check_image(struct look *look, struct graph *graph, const char *path)
{
    auto_error error = NULL;
    struct image_check check = {0};
    if (look->scene->damaged && scene_check(graph, look->scene, path, IMAGE_FIX_ALL, &check, &error) < 0) {
        return wrong(look, "%s cannot be repaired: %s", path, error->message);
    }
    if (scene_check(graph, look->scene, path, IMAGE_FIX_NONE, &check, &error) < 0) {
        return wrong(look, "%s cannot be checked: %s", path, error->message);
    }
    look->counts->leaky += check.leaks > 0;
    /* A dirty image (lazy refcounts) may count wrongly: whoever opens it counts again. */
    if (check.check_errors || (check.corruptions && !look->scene->traits.lazy)) {
        return wrong(look, "%s has %d corruptions and %d errors", path, (int)check.corruptions,
                     (int)check.check_errors);
    }
    return true;
}

static bool coroutine_fn check_images(struct look *look)
{
    struct graph *graph = graph_create();
    bool good = true;
    for (unsigned i = 0; good && i < scene_images(look->scene); i++) {
        good = check_image(look, graph, image_path(look->scene, i));
    }
    graph_destroy(graph);
    return good;
}

/* --- what a view shows --- */

static bool size_allowed(const struct look *look, uint64_t sectors)
{
    const GArray *sizes = look->scene->sizes;
    bool settled = false;
    for (unsigned i = sizes->len; i-- > 0 && !settled;) {
        const struct size_promise *size = &g_array_index(sizes, struct size_promise, i);
        if (size->begun_point <= look->point && size->sectors == sectors) {
            return true;
        }
        settled = size->done_point <= look->point;
    }
    return false;
}

static bool compare(struct look *look, const struct view *view, const uint8_t *data, uint64_t sectors)
{
    promise_look(view->promise, look->point);
    look->counts->sectors += sectors;
    for (uint64_t i = 0; i < sectors; i++) {
        uint32_t number;
        if (!sector_number(data + i * SECTOR, i, &number)) {
            return wrong(look, "%s %s: sector %" G_GUINT64_FORMAT " holds what nobody wrote there", view->path,
                         view->snapshot ? view->snapshot : "", i);
        }
        if (!promise_allows(view->promise, i, number)) {
            return wrong(look, "%s %s: sector %" G_GUINT64_FORMAT " holds write %u, which it may not", view->path,
                         view->snapshot ? view->snapshot : "", i, number);
        }
    }
    return true;
}

/* Where the content is another than at the bitmap's beginning, the bitmap says so, or says that it does not know. */
static bool compare_bitmap(struct look *look, const struct node *node, const uint8_t *data, uint64_t sectors)
{
    const struct watched_bitmap *watched = &look->scene->bitmap;
    if (!watched->name || look->point < watched->from || look->point > watched->until) {
        return true;
    }
    const struct bitmap *bitmap = bitmap_find(node, watched->name);
    if (!bitmap) {
        return wrong(look, "the bitmap '%s' is gone", watched->name);
    }
    look->counts->bitmaps += !bitmap_is_inconsistent(bitmap);
    for (uint64_t i = 0; !bitmap_is_inconsistent(bitmap) && i < sectors; i++) {
        uint32_t number = 0;
        uint64_t offset, bytes;
        sector_number(data + i * SECTOR, i, &number);
        if (number != promise_now(watched->content, i) &&
            (!bitmap_next(bitmap, i * SECTOR, &offset, &bytes) || offset > i * SECTOR)) {
            return wrong(look, "the bitmap '%s' does not know of sector %" G_GUINT64_FORMAT ", which holds write %u",
                         watched->name, i, number);
        }
    }
    return true;
}

static bool coroutine_fn read_and_compare(struct look *look, const struct view *view, struct graph *graph,
                                          struct node *node)
{
    struct backend *backend = backend_create(graph, "look");
    auto_error error = NULL;
    bool good = true;
    if (backend_attach(backend, node, ACCESS_READ_DATA | ACCESS_READ_METADATA, &error) < 0) {
        g_error("%s", error->message);
    }
    uint64_t size = backend_size(backend);
    g_autofree uint8_t *data = g_malloc(size);
    struct iovec iov = {data, size};
    if (!view->snapshot && view->promise == look->scene->promise && !size_allowed(look, size / SECTOR)) {
        good = wrong(look, "%s has %" G_GUINT64_FORMAT " sectors, which nobody asked for", view->path, size / SECTOR);
    }
    int code = good ? backend_read(backend, 0, size, buffers_one(&iov), 0) : 0;
    if (code < 0) {
        good = wrong(look, "%s cannot be read: %s", view->path, g_strerror(-code));
    }
    if (good) {
        good = compare(look, view, data, size / SECTOR);
    }
    if (good && !view->snapshot) {
        good = compare_bitmap(look, node, data, size / SECTOR);
    }
    backend_destroy(backend);
    return good;
}

static bool coroutine_fn look_at_view(struct look *look, const struct view *view)
{
    struct graph *graph = graph_create();
    auto_error error = NULL;
    json_t *options = scene_options(&look->scene->traits, view->path, "view");
    if (view->snapshot) {
        json_object_set_new(options, "read-only", json_true());
    }
    struct node *node = scene_open(graph, options, false, &error);
    bool good = node ? true : wrong(look, "%s cannot be opened: %s", view->path, error->message);
    if (good && view->snapshot) {
        graph_lock(graph);
        int code = node->driver->image->snapshot_load(node, view->snapshot, &error);
        graph_unlock(graph);
        good = code == 0 || wrong(look, "%s: snapshot %s: %s", view->path, view->snapshot, error->message);
    }
    good = good && read_and_compare(look, view, graph, node);
    if (node) {
        graph_delete(graph, "view", NULL);
    }
    graph_destroy(graph);
    return good;
}

/* Of each group one view has to be right. */
static bool coroutine_fn look_at_views(struct look *look)
{
    const struct scene *scene = look->scene;
    for (unsigned group = 0; group < scene->view_count; group++) {
        bool any = false, good = false;
        g_autofree char *problem = NULL;
        for (unsigned i = 0; !good && i < scene->view_count; i++) {
            const struct view *view = &scene->views[i];
            if (view->group != group || look->point < view->from || look->point > view->until) {
                continue;
            }
            any = true;
            good = look_at_view(look, view);
            if (!good && !problem) {
                problem = g_steal_pointer(&look->problem);
            }
            g_clear_pointer(&look->problem, g_free);
        }
        if (any && !good) {
            look->problem = g_steal_pointer(&problem);
            return false;
        }
    }
    return true;
}

/* --- what comes after --- */

static bool coroutine_fn write_and_check(struct look *look)
{
    struct graph *graph = graph_create();
    auto_error error = NULL;
    const char *path = look->scene->views[0].path;
    struct node *node = scene_open(graph, scene_options(&look->scene->traits, path, "again"), false, &error);
    g_assert_nonnull(node); /* it was opened a moment ago */
    struct backend *backend = backend_create(graph, "again");
    int code = backend_attach(backend, node, ACCESS_ALL, &error);
    g_autofree uint8_t *data = g_malloc0(64 * SECTOR);
    struct iovec iov = {data, 64 * SECTOR};
    for (unsigned i = 0; code == 0 && i < 8; i++) {
        uint64_t room = backend_size(backend) / SECTOR - 64;
        code = backend_write(backend, seeded_next(&look->random) % room * SECTOR, 64 * SECTOR, buffers_one(&iov), 0);
    }
    if (code == 0) {
        code = backend_flush(backend);
    }
    backend_destroy(backend);
    graph_delete(graph, "again", NULL);
    graph_destroy(graph);
    if (code < 0) {
        return wrong(look, "%s cannot be written any more: %s", path, g_strerror(-code));
    }
    return check_images(look);
}

static bool peer_checks(struct look *look)
{
    for (unsigned i = 0; i < scene_images(look->scene) && !look->scene->traits.data_file; i++) {
        uint64_t size;
        g_autofree uint8_t *data = sim_disk_get(look->sim, image_path(look->scene, i), &size);
        g_autofree char *path = g_strdup_printf("%s/crash-%d.qcow2", g_get_tmp_dir(), (int)getpid());
        g_autofree char *command = g_strdup_printf("qemu-img check -q \"json:{\\\"driver\\\":\\\"qcow2\\\","
                                                   "\\\"backing\\\":null,\\\"file\\\":{\\\"driver\\\":\\\"file\\\","
                                                   "\\\"filename\\\":\\\"%s\\\"}}\"",
                                                   path);
        g_autofree char *errors = NULL;
        int status = 0;
        if (!g_file_set_contents(path, (char *)data, (gssize)size, NULL) ||
            !g_spawn_command_line_sync(command, NULL, &errors, &status, NULL)) {
            g_error("cannot run: %s", command);
        }
        g_unlink(path);
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        if (code != 0 && code != 3 && !look->scene->traits.lazy) {
            return wrong(look, "%s: the peer's check ends with %d: %s", image_path(look->scene, i), code, errors);
        }
    }
    return true;
}

/* --- crashes --- */

static bool coroutine_fn crash(struct look *look, enum loss loss, unsigned peer)
{
    look->loss = loss;
    look->loss_seed = loss == LOSS_MIXED ? seeded_next(&look->random) : 0;
    set_disks(look);
    look->counts->crashes++;
    bool good = check_images(look);
    if (good && peer && look->counts->crashes % peer == 0) {
        good = peer_checks(look);
    }
    good = good && look_at_views(look);
    if (good && look->counts->crashes % 16 == 0) {
        good = write_and_check(look);
    }
    return good;
}

static bool coroutine_fn crashes_at(struct look *look, const struct replay_config *config)
{
    const struct recording *recording = look->scene->recording;
    look->counts->points++;
    bool changed = look->point > 0 && !recording_is_settlement(recording, look->point);
    bool good = crash(look, LOSS_NOTHING, config->peer);
    if (good && !changed) {
        good = crash(look, LOSS_ALL, config->peer);
    }
    if (good && changed) {
        good = crash(look, LOSS_OLDER, config->peer) && crash(look, LOSS_LAST, config->peer);
    }
    for (unsigned i = 0; good && changed && i < config->mixed; i++) {
        good = crash(look, LOSS_MIXED, config->peer);
    }
    return good;
}

bool coroutine_fn replay_all(struct scene *scene, struct sim *sim, const struct replay_config *config,
                             struct replay_counts *counts, char **ret_problem)
{
    struct look look = {.scene = scene, .sim = sim, .counts = counts, .random = config->seed};
    uint64_t last = recording_points(scene->recording);
    bool good = true;
    for (look.point = seeded_next(&look.random) % config->every; good && look.point <= last;
         look.point += config->every) {
        good = crashes_at(&look, config);
    }
    *ret_problem = look.problem;
    return good;
}

/* --- deliberate breakages --- */

void coroutine_fn replay_moved(struct scene *scene, struct sim *sim, unsigned most, uint64_t seed,
                               struct replay_counts *counts)
{
    uint64_t random = seed;
    uint64_t last = recording_points(scene->recording);
    for (unsigned tries = 0, moved = 0; tries < 20 * most && moved < most; tries++) {
        uint64_t point = 1 + seeded_next(&random) % last, from;
        if (!recording_is_metadata(scene->recording, point) || !recording_move_early(scene->recording, point, &from)) {
            continue;
        }
        struct replay_counts ignored = {0};
        struct look look = {.scene = scene, .sim = sim, .counts = &ignored, .random = seed, .mutated = true};
        bool good = true;
        moved++;
        for (look.point = from; good && look.point < point; look.point++) {
            good = crash(&look, LOSS_ALL, 0);
        }
        counts->moved++;
        counts->caught += !good;
        g_free(look.problem);
        recording_move_back(scene->recording);
    }
}
