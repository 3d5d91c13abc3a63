/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What convert, compare, dd and rebase share: running the copy engine for a command line, and images that are read as
 * one.
 *
 * 1. Nobody asks whether a failed piece is to be tried again: the first failure ends the command.
 * 2. A look at how far the copy is costs nothing when nobody wants to see it: a timer asks now and then.
 */
#include "tool/img/copying.h"
#include "base/size.h"
#include "block/graph.h"
#include "block/user.h"
#include "loop/loop.h"
#include "tool/image_open.h"
#include <errno.h>
#include <glib.h>

#define LOOK_NS ((int64_t)50 * 1000 * 1000)

/* --- running --- */

struct look {
    struct loop_timer timer;
    struct img_copying *copying;
    const struct copy *copy;
};

static void look_fire(struct loop_timer *timer)
{
    struct look *look = container_of(timer, struct look, timer);
    img_progress_report(look->copying->done_before + copy_done(look->copy), look->copying->of, look->copying->progress);
    loop_timer_arm(timer, loop_now_ns() + LOOK_NS);
}

static enum copy_verdict fail_always(void *argument, bool reading, int error)
{
    return COPY_FAIL;
}

int coroutine_fn img_copying_run(struct img_copying *copying, uint64_t bytes)
{
    copying->config.control = &copying->control;
    copying->config.failed = fail_always;
    copying->config.argument = copying;
    struct copy *copy = copy_create(&copying->config);
    struct look look = {.copying = copying, .copy = copy};
    loop_timer_init(&look.timer, look_fire);
    if (copying->progress) {
        loop_timer_arm(&look.timer, loop_now_ns() + LOOK_NS);
    }
    int result = copy_range(copy, 0, bytes, false);
    loop_timer_cancel(&look.timer);
    if (result < 0) {
        copy_failed_at(copy, &copying->failed_offset, &copying->failed_reading);
    }
    copy_destroy(copy);
    return result;
}

int coroutine_fn img_copying_run_or_error(struct img_copying *copying, uint64_t bytes, struct error **err)
{
    int result = img_copying_run(copying, bytes);
    return result < 0 ? error_set_errno(err, result, "error while %s at byte %" G_GUINT64_FORMAT,
                                        copying->failed_reading ? "reading" : "writing", copying->failed_offset)
                      : 0;
}

void img_copying_set_rate(struct img_copying *copying, uint64_t rate)
{
    speed_set(&copying->control.speed, rate, loop_now_ns());
}

/* --- several images as one --- */

int coroutine_fn img_sources_add(struct img *img, struct img_sources *sources, const struct image_name *name,
                                 struct error **err)
{
    struct img_source source = {.start = sources->size};
    int result = image_open(img->graph, name, &source.node, err);
    if (result < 0) {
        return result;
    }
    result = image_backend(img->graph, source.node, false, &source.backend, err);
    if (result < 0) {
        node_release(source.node);
        return result;
    }
    source.size = backend_size(source.backend);
    sources->list = g_renew(struct img_source, sources->list, sources->count + 1);
    sources->list[sources->count++] = source;
    if (source.size > INT64_MAX - sources->size) {
        return error_set(err, -EFBIG, "The images are too large together");
    }
    sources->size += source.size;
    return 0;
}

void coroutine_fn img_sources_clear(struct img_sources *sources)
{
    for (unsigned i = 0; i < sources->count; i++) {
        image_backend_destroy(sources->list[i].backend);
        node_release(sources->list[i].node);
    }
    g_free(sources->list);
    *sources = (struct img_sources){0};
}

const struct img_source *img_sources_at(const struct img_sources *sources, uint64_t offset)
{
    unsigned i = sources->count - 1;
    while (sources->list[i].start > offset) {
        i--;
    }
    return &sources->list[i];
}

int coroutine_fn img_sources_read(const struct img_sources *sources, uint64_t offset, uint64_t bytes, struct buffers to)
{
    while (bytes && offset < sources->size) {
        const struct img_source *source = img_sources_at(sources, offset);
        uint64_t some = min_u64(bytes, source->start + source->size - offset);
        int result = backend_read(source->backend, offset - source->start, some, to, 0);
        if (result < 0) {
            return result;
        }
        offset += some;
        bytes -= some;
        to = buffers_advance(to, some);
    }
    buffers_fill(to, 0, bytes);
    return 0;
}

int coroutine_fn img_sources_status(const struct img_sources *sources, uint64_t offset, uint64_t bytes,
                                    struct extent *ret)
{
    const struct img_source *source = img_sources_at(sources, offset);
    uint64_t at = offset - source->start;
    return backend_block_status(source->backend, NULL, at, min_u64(bytes, source->size - at), ret);
}
