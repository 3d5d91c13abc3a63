/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The preallocate filter: stands between a format and its file, and makes the file longer than was asked for, so that
 * a growing image costs the file system few and large allocations.
 *
 * 1. node->size is where the data end: what parents see. `end` is the file's true end, and [node->size, end) is
 *    allocated and reads as zeroes.
 * 2. Nobody writes behind `end`: whoever is going to, moves it first, under the lock. So the zeroes that move it never
 *    run into data.
 * 3. The surplus is cut off when the node stops writing, and when it is closed. After a crash it stays, as zeroes that
 *    no format refers to.
 * 4. Where the file cannot be lengthened quickly, the filter does nothing from then on.
 */
#include "base/size.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "loop/sync.h"
#include <errno.h>
#include <glib.h>

#define SECTOR 512

struct preallocate {
    uint64_t align, ahead;
    struct co_mutex lock;
    atomic_uint_fast64_t end;
    atomic_bool useless; /* see 4. */
};

static int coroutine_fn preallocate_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_preallocate *own = &options->u.preallocate;
    struct preallocate *state = node->state;
    if (own->prealloc_align == 0 || own->prealloc_align % SECTOR) {
        return error_set(err, -EINVAL, "Node '%s': prealloc-align must be a multiple of %d, and not 0", node->name,
                         SECTOR);
    }
    if (own->prealloc_align > INT64_MAX / 4 || own->prealloc_size > INT64_MAX / 4) {
        return error_set(err, -EINVAL, "Node '%s': prealloc-align or prealloc-size is too large", node->name);
    }
    state->align = own->prealloc_align;
    state->ahead = own->prealloc_size;
    co_mutex_init(&state->lock);
    atomic_init(&state->end, edge_size(node->filtered));
    node->filename = g_strdup(node->filtered->child->filename);
    return 0;
}

/* Takes the surplus off the file. Requests are over. */
static int coroutine_fn cut_surplus(struct node *node)
{
    struct preallocate *state = node->state;
    uint64_t size = atomic_load(&node->size);
    int code = 0;
    if (atomic_load(&state->end) > size) {
        code = edge_truncate(node->filtered, size);
        atomic_store(&state->end, edge_size(node->filtered));
    }
    return code;
}

static void coroutine_fn preallocate_close(struct node *node)
{
    struct preallocate *state = node->state;
    if (node->writable) {
        int code = cut_surplus(node);
        if (code < 0) {
            g_message("Node '%s': its file stays longer than its data: %s", node->name, g_strerror(-code));
        }
    }
    co_mutex_destroy(&state->lock);
}

static int coroutine_fn preallocate_set_writable(struct node *node, bool writable, struct error **err)
{
    struct preallocate *state = node->state;
    if (writable) { /* as others may have left it */
        atomic_store(&state->end, edge_size(node->filtered));
        atomic_store(&node->size, edge_size(node->filtered));
        return 0;
    }
    int code = cut_surplus(node);
    return code < 0 ? error_set_errno(err, code, "Node '%s': cannot cut its file to its data", node->name) : 0;
}

/* Moves `end` ahead of a change that ends at `wanted`. What cannot be had is gone without. */
static void coroutine_fn reserve(struct node *node, uint64_t wanted)
{
    struct preallocate *state = node->state;
    if (wanted <= atomic_load(&state->end) || atomic_load(&state->useless)) {
        return;
    }
    co_mutex_lock(&state->lock);
    uint64_t end = atomic_load(&state->end);
    uint64_t most = INT64_MAX - state->align - state->ahead;
    if (wanted > end && wanted < most && !atomic_load(&state->useless)) {
        uint64_t next = div_up(wanted + state->ahead, state->align) * state->align;
        int code = edge_write_zeroes(node->filtered, end, next - end, REQUEST_NO_FALLBACK);
        if (code == 0) {
            atomic_store(&state->end, next);
        } else {
            atomic_store(&state->useless, true);
        }
    }
    co_mutex_unlock(&state->lock);
}

/* Without help the change moved the end itself. */
static void note_end(struct node *node, uint64_t end)
{
    struct preallocate *state = node->state;
    uint64_t old = atomic_load(&state->end);
    while (old < end && !atomic_compare_exchange_weak(&state->end, &old, end)) {
    }
}

static int coroutine_fn preallocate_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                          unsigned flags)
{
    reserve(node, offset + bytes);
    int code = edge_write(node->filtered, offset, bytes, from, flags);
    if (code == 0) {
        note_end(node, offset + bytes);
    }
    return code;
}

static int coroutine_fn preallocate_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    reserve(node, offset + bytes);
    int code = edge_write_zeroes(node->filtered, offset, bytes, flags);
    if (code == 0) {
        note_end(node, offset + bytes);
    }
    return code;
}

/* Growth goes into the surplus as far as that reaches. */
static int coroutine_fn preallocate_truncate(struct node *node, uint64_t size, struct error **err)
{
    struct preallocate *state = node->state;
    if (size >= atomic_load(&node->size) && size <= atomic_load(&state->end)) {
        return 0;
    }
    int code = edge_truncate(node->filtered, size);
    if (code < 0) {
        return error_set_errno(err, code, "Node '%s': cannot set the size of its file", node->name);
    }
    atomic_store(&state->end, size);
    return 0;
}

static int coroutine_fn preallocate_grow(struct node *node, uint64_t size, enum preallocation_mode mode,
                                         struct error **err)
{
    struct preallocate *state = node->state;
    int code = cut_surplus(node);
    if (code < 0) {
        return error_set_errno(err, code, "Node '%s': cannot set the size of its file", node->name);
    }
    code = edge_grow(node->filtered, size, mode, err);
    if (code == 0) {
        atomic_store(&state->end, size);
    }
    return code;
}

static const struct image_driver preallocate_image = {
    .grow = preallocate_grow,
};

const struct driver driver_preallocate = {
    .name = "preallocate",
    .id = BLOCKDEV_DRIVER_PREALLOCATE,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct preallocate),
    .write_if_unallocated = true,
    .grows_on_write = true,
    .open = preallocate_open,
    .close = preallocate_close,
    .write = preallocate_write,
    .write_zeroes = preallocate_write_zeroes,
    .truncate = preallocate_truncate,
    .set_writable = preallocate_set_writable,
    .image = &preallocate_image,
};
