/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_CRASH_SCENE_H
#define INTERLOCK_TEST_CRASH_SCENE_H

#include "base/error.h"
#include "block/graph.h"
#include "block/image.h"
#include "block/user.h"
#include "job/job.h"
#include "loop/coroutine.h"
#include "loop/sync.h"
#include "test/crash/promise.h"
#include "test/crash/recording.h"

/*
 * What a workload acts in: a chain of qcow2 images on simulated disks, a guest at its top that writes and remembers
 * what it was promised, and the views that are looked at after each crash.
 */
#define LAYERS_MAX 4
#define VIEWS_MAX 8

/* How the images are made; drawn by the seed, within what the workload allows. */
struct traits {
    unsigned cluster_bits, refcount_bits;
    bool version2, lazy, extended_l2, data_file, data_file_raw, zstd;
};

/* A disk as somebody sees it: an image with what it leans on, or a snapshot in it. Looked at after crashes at the
 * points from `from` up to and with `until`. While several views of one group are looked at, one of them has to be
 * right: the disk is moving from one image to another. */
struct view {
    char *path;
    char *snapshot; /* NULL: the active content */
    unsigned group;
    struct promise *promise;
    uint64_t from, until;
};

/* Sizes that an image may have after a crash: the last one that was done, and those begun since. */
struct size_promise {
    uint64_t sectors, begun_point, done_point; /* UINT64_MAX: not done */
};

/* A persistent bitmap of the top image. From `from` up to `until` (points) it says, unless it is inconsistent or not
 * there, where the content is not as it was at `from`. */
struct watched_bitmap {
    const char *name; /* NULL: none */
    struct promise *content;
    uint64_t from, until;
};

struct scene {
    struct sim *sim;
    struct graph *graph;
    struct jobs *jobs;
    struct recording *recording; /* NULL: not yet */
    uint64_t random;
    struct traits traits;
    unsigned layers;               /* of the chain */
    bool target;                   /* one image more, of nothing, over nothing: what a mirror is made into */
    uint64_t sectors, sectors_max; /* of the guest's disk, now and at most */
    GArray *sizes;                 /* struct size_promise */
    struct backend *guest;
    struct operation *guest_operation; /* scene_guest_follows(), or NULL */
    struct promise *promise;           /* the guest's */
    struct range_lock ranges;
    struct drain drain;
    struct co_group workers;
    uint32_t serial; /* of the last change */
    bool discards;   /* the guest discards too */
    bool damaged;    /* the image is damaged before recording begins; nobody has it open: scene->guest is NULL */
    bool compressed; /* and writes compressed */
    bool job_failed;
    struct watched_bitmap bitmap;
    struct view views[VIEWS_MAX];
    unsigned view_count;
};

/* A failure of what a workload does is an error of the test: aborts, saying what. `err` may be NULL. */
void scene_must(int code, const struct error *err, const char *what);
uint64_t scene_below(struct scene *scene, uint64_t limit);
bool scene_chance(struct scene *scene, unsigned percent);
uint64_t scene_point(const struct scene *scene);

/* Makes the images (layer 0 is the base), each with some content, opens them as nodes "l0", "l1", ..., puts the guest
 * at the top, and begins to record. The target, if there is one, is the next after them. */
void coroutine_fn scene_begin(struct scene *scene, unsigned layers);
/* Closes everything, still recording; then recording is over. */
void coroutine_fn scene_end(struct scene *scene);

/* `workers` coroutines, `operations` each, and waits for them. */
void coroutine_fn scene_guest(struct scene *scene, unsigned workers, unsigned operations);
/* From here on it holds the claims of an export, and goes where a job moves its users. */
void coroutine_fn scene_guest_follows(struct scene *scene);
/* The same in the background: scene_guest_wait(). */
void scene_guest_start(struct scene *scene, unsigned workers, unsigned operations);
void coroutine_fn scene_guest_wait(struct scene *scene);
void coroutine_fn scene_flush(struct scene *scene);
/* For what needs the image at rest: the graph is locked, the top is drained. */
struct node *coroutine_fn scene_rest_begin(struct scene *scene);
void coroutine_fn scene_rest_end(struct scene *scene);
/* What the guest has done up to now is on stable storage (an operation on the image has just ended). */
void scene_all_stable(struct scene *scene);
void coroutine_fn scene_resize(struct scene *scene, uint64_t sectors);
/* A view more; `promise` becomes the scene's. */
struct view *scene_add_view(struct scene *scene, const char *path, const char *snapshot, struct promise *promise);

/* A QMP-like command's arguments as JSON text, for a job; waits until it is gone. Failing is an error of the test. */
void coroutine_fn scene_commit(struct scene *scene, const char *json);
void coroutine_fn scene_stream(struct scene *scene, const char *json);
/* blockdev-mirror. */
void coroutine_fn scene_mirror(struct scene *scene, const char *json);
/* The same until it is ready; then, with the guest at rest, one write to the image fails in its last step, if that
 * makes so many (`skip`) and one more. So it is done; or it ends badly, takes back what it had begun, and the target is
 * scribbled over. (Writes only: a file whose sync has failed once cannot be flushed any more.) */
void coroutine_fn scene_mirror_failing(struct scene *scene, const char *json, const char *path, unsigned skip);

/* Opens an image of these disks by the options of the traits. `file`: its path. */
json_t *scene_options(const struct traits *traits, const char *path, const char *node_name);
struct node *coroutine_fn scene_open(struct graph *graph, json_t *options, bool for_check, struct error **err);
/* Opens the image alone to be checked (and repaired). */
int coroutine_fn scene_check(struct graph *graph, const struct scene *scene, const char *path, enum image_fix fix,
                             struct image_check *ret, struct error **err);
unsigned scene_images(const struct scene *scene); /* layers and target */
const char *layer_path(unsigned layer);
const char *layer_data_path(unsigned layer);

#endif
