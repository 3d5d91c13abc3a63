/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The blkdebug filter: shows the node below it, and makes requests fail or wait by rules (blkdebug_rules.h). It may
 * have narrower limits than what it shows: alignment, longest requests.
 *
 * 1. What happens is told by edge_event() from the parents, and by this driver itself (pwritev, pwritev_zero,
 *    pwritev_done of its own requests).
 * 2. The rules and the list of stopped requests are under `guard`, which is never held while a request sleeps.
 * 3. A stopped request holds what its parent held when it told the event. It goes on by blkdebug_resume(); before the
 *    node is drained, its user calls blkdebug_release().
 * 4. It grows as far as its child does: the child refuses what it cannot take.
 *
 * What it does not do: take-child-perms and unshare-child-perms, which are about a model of access that is not this
 * one.
 */
#include "driver/filter/blkdebug.h"
#include "base/size.h"
#include "driver/drivers.h"
#include "driver/filter/blkdebug_rules.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

enum { CONFIG_BYTES_MAX = 1 << 20, ZERO_PIECE = 1 << 20 };

struct stopped {
    struct list link; /* blkdebug.stopped, newest first */
    char *tag;
    struct coroutine *sleeper;
    unsigned *left; /* breakpoints that the request still waits at; in its frame */
};

struct blkdebug {
    GMutex guard;
    struct blkdebug_rules rules;
    struct list stopped;
    void (*tell)(const char *tag, bool stopped);
    const char *awaited; /* the tag that blkdebug_wait() waits for, or NULL */
    struct coroutine *waiter;
    uint64_t zero_unit, zero_max; /* 0: none */
    uint64_t discard_unit, discard_max;
};

/* --- events --- */

/* guard is held. */
static void stop_at(struct blkdebug *debug, char *tag, unsigned *left)
{
    struct stopped *stopped = g_new0(struct stopped, 1);
    stopped->tag = tag;
    stopped->sleeper = coroutine_self();
    stopped->left = left;
    list_prepend(&debug->stopped, &stopped->link);
    if (debug->tell) {
        debug->tell(tag, true);
    }
    if (debug->awaited && g_str_equal(debug->awaited, tag)) {
        debug->awaited = NULL;
        coroutine_wake(debug->waiter);
    }
}

/* guard is held. */
static void go_on(struct blkdebug *debug, struct stopped *stopped)
{
    list_remove(&stopped->link);
    if (debug->tell) {
        debug->tell(stopped->tag, false);
    }
    if (--*stopped->left == 0) {
        coroutine_wake(stopped->sleeper);
    }
    g_free(stopped->tag);
    g_free(stopped);
}

static void coroutine_fn blkdebug_event(struct node *node, enum blkdebug_event event)
{
    struct blkdebug *debug = node->state;
    unsigned left = 0;
    g_mutex_lock(&debug->guard);
    char **tags = blkdebug_rules_event(&debug->rules, event);
    for (char **tag = tags; tag && *tag; tag++) {
        left++;
    }
    for (char **tag = tags; tag && *tag; tag++) {
        stop_at(debug, *tag, &left);
    }
    bool stops = left > 0;
    g_free(tags);
    g_mutex_unlock(&debug->guard);
    if (stops) {
        coroutine_yield();
    }
}

/* Does this request fail? 0 or what it fails with. */
static int coroutine_fn blkdebug_fails(struct node *node, enum blkdebug_iotype kind, uint64_t offset, uint64_t bytes)
{
    struct blkdebug *debug = node->state;
    bool immediately = true;
    g_mutex_lock(&debug->guard);
    int code = blkdebug_rules_request(&debug->rules, kind, offset, bytes, &immediately);
    g_mutex_unlock(&debug->guard);
    if (code < 0 && !immediately) {
        coroutine_pause();
    }
    return code;
}

/* --- requests --- */

static int coroutine_fn blkdebug_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                      unsigned flags)
{
    int code = blkdebug_fails(node, BLKDEBUG_IOTYPE_READ, offset, bytes);
    return code < 0 ? code : edge_read(node->filtered, offset, bytes, to, flags);
}

static int coroutine_fn blkdebug_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                       unsigned flags)
{
    blkdebug_event(node, BLKDEBUG_EVENT_PWRITEV);
    int code = blkdebug_fails(node, BLKDEBUG_IOTYPE_WRITE, offset, bytes);
    if (code == 0) {
        code = edge_write(node->filtered, offset, bytes, from, flags);
    }
    blkdebug_event(node, BLKDEBUG_EVENT_PWRITEV_DONE);
    return code;
}

/* Zeroes that are not aligned as opt-write-zero wants it. */
static int coroutine_fn write_as_data(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    g_autofree char *zeroes = bytes ? g_try_malloc0(MIN(bytes, ZERO_PIECE)) : NULL;
    int code = bytes && !zeroes ? -ENOMEM : 0;
    while (code == 0 && bytes) {
        struct iovec iov = {zeroes, MIN(bytes, ZERO_PIECE)};
        code = blkdebug_write(node, offset, iov.iov_len, buffers_one(&iov), flags);
        offset += iov.iov_len;
        bytes -= iov.iov_len;
    }
    return code;
}

static int coroutine_fn write_zero_pieces(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    const struct blkdebug *debug = node->state;
    int code = 0;
    while (code == 0 && bytes) {
        uint64_t piece = debug->zero_max ? min_u64(bytes, debug->zero_max) : bytes;
        code = blkdebug_fails(node, BLKDEBUG_IOTYPE_WRITE_ZEROES, offset, piece);
        if (code == 0) {
            code = edge_write_zeroes(node->filtered, offset, piece, flags);
        }
        offset += piece;
        bytes -= piece;
    }
    return code;
}

static int coroutine_fn blkdebug_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    const struct blkdebug *debug = node->state;
    uint64_t unit = max_u64(debug->zero_unit, 1), end = offset + bytes;
    uint64_t first = div_up(offset, unit) * unit, last = end / unit * unit;
    unsigned data_flags = flags & ~(unsigned)(REQUEST_MAY_UNMAP | REQUEST_NO_FALLBACK);
    if ((first > offset || last < end) && (first >= last || flags & REQUEST_NO_FALLBACK)) {
        return -ENOTSUP; /* the request path writes them as data, if it may */
    }
    blkdebug_event(node, BLKDEBUG_EVENT_PWRITEV_ZERO);
    int code = write_zero_pieces(node, first, last - first, flags);
    code = code < 0 ? code : write_as_data(node, offset, first - offset, data_flags);
    code = code < 0 ? code : write_as_data(node, last, end - last, data_flags);
    blkdebug_event(node, BLKDEBUG_EVENT_PWRITEV_DONE);
    return code;
}

static int coroutine_fn blkdebug_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    const struct blkdebug *debug = node->state;
    uint64_t unit = max_u64(debug->discard_unit, 1), end = offset + bytes;
    uint64_t at = div_up(offset, unit) * unit, last = end / unit * unit;
    int code = 0;
    while (code == 0 && at < last) {
        uint64_t piece = debug->discard_max ? min_u64(last - at, debug->discard_max) : last - at;
        code = blkdebug_fails(node, BLKDEBUG_IOTYPE_DISCARD, at, piece);
        code = code < 0 ? code : edge_discard(node->filtered, at, piece);
        at += piece;
    }
    return code;
}

static int coroutine_fn blkdebug_flush(struct node *node)
{
    int code = blkdebug_fails(node, BLKDEBUG_IOTYPE_FLUSH, 0, 0);
    return code < 0 ? code : edge_flush(node->filtered);
}

static int coroutine_fn blkdebug_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    int code = blkdebug_fails(node, BLKDEBUG_IOTYPE_BLOCK_STATUS, offset, bytes);
    return code < 0 ? code : edge_block_status(node->filtered, offset, bytes, ret);
}

/* --- opening --- */

static int check_limit(const char *name, bool given, uint64_t value, uint64_t unit, struct error **err)
{
    if (given && (value == 0 || value > INT32_MAX || value % unit)) {
        return error_set(err, -EINVAL, "Cannot meet constraints with %s %" G_GUINT64_FORMAT, name, value);
    }
    return 0;
}

static int set_limits(struct node *node, const struct blockdev_options_blkdebug *own, struct error **err)
{
    struct blkdebug *debug = node->state;
    uint64_t align = own->has_align ? own->align : 1;
    int code = check_limit("align", own->has_align, align, 1, err);
    if (code == 0 && !is_power_of_two(align)) {
        code = error_set(err, -EINVAL, "Cannot meet constraints with align %" G_GUINT64_FORMAT, align);
    }
    if (code < 0) {
        return code;
    }
    align = max_u64(align, node->limits.alignment);
    uint64_t zero_unit = own->has_opt_write_zero ? own->opt_write_zero : 1;
    uint64_t discard_unit = own->has_opt_discard ? own->opt_discard : 1;
    if ((code = check_limit("max-transfer", own->has_max_transfer, own->max_transfer, align, err)) < 0 ||
        (code = check_limit("opt-write-zero", own->has_opt_write_zero, zero_unit, align, err)) < 0 ||
        (code = check_limit("max-write-zero", own->has_max_write_zero, own->max_write_zero, MAX(align, zero_unit),
                            err)) < 0 ||
        (code = check_limit("opt-discard", own->has_opt_discard, discard_unit, align, err)) < 0 ||
        (code = check_limit("max-discard", own->has_max_discard, own->max_discard, MAX(align, discard_unit), err)) <
            0) {
        return code;
    }
    if (!is_aligned(edge_size(node->filtered), align) && !node->filtered->child->driver->grows_on_write) {
        return error_set(err, -EINVAL, "Node '%s': the size of '%s' is not a multiple of the alignment", node->name,
                         node->filtered->child->name);
    }
    node->limits.alignment = align;
    if (own->has_max_transfer && (!node->limits.max_transfer || own->max_transfer < node->limits.max_transfer)) {
        node->limits.max_transfer = own->max_transfer;
    }
    debug->zero_unit = own->has_opt_write_zero ? zero_unit : 0;
    debug->zero_max = own->has_max_write_zero ? own->max_write_zero : 0;
    debug->discard_unit = own->has_opt_discard ? discard_unit : 0;
    debug->discard_max = own->has_max_discard ? own->max_discard : 0;
    return 0;
}

static int coroutine_fn read_config(struct blkdebug *debug, const char *path, struct error **err)
{
    g_autofree char *text = NULL;
    size_t bytes;
    int code = file_slurp(path, CONFIG_BYTES_MAX, &text, &bytes);
    if (code < 0) {
        return error_set_errno(err, code, "Could not read blkdebug config file '%s'", path);
    }
    code = blkdebug_rules_read(&debug->rules, text, bytes, err);
    if (code < 0) {
        error_prepend(err, "%s", path);
    }
    return code;
}

static int coroutine_fn read_rules(struct blkdebug *debug, const struct blockdev_options_blkdebug *own,
                                   struct error **err)
{
    int code = own->config ? read_config(debug, own->config, err) : 0;
    for (size_t i = 0; i < own->inject_error.count && code == 0; i++) {
        code = blkdebug_rules_add_error(&debug->rules, own->inject_error.items[i], err);
    }
    for (size_t i = 0; i < own->set_state.count && code == 0; i++) {
        code = blkdebug_rules_add_state(&debug->rules, own->set_state.items[i], err);
    }
    return code;
}

static int coroutine_fn blkdebug_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct blkdebug *debug = node->state;
    g_mutex_init(&debug->guard);
    blkdebug_rules_init(&debug->rules);
    list_init(&debug->stopped);
    int code = set_limits(node, &options->u.blkdebug, err);
    code = code < 0 ? code : read_rules(debug, &options->u.blkdebug, err);
    if (code < 0) {
        blkdebug_rules_finish(&debug->rules);
        g_mutex_clear(&debug->guard);
        return code;
    }
    node->filename = g_strdup(node->filtered->child->filename);
    blkdebug_event(node, BLKDEBUG_EVENT_NONE);
    return 0;
}

static void coroutine_fn blkdebug_close(struct node *node)
{
    struct blkdebug *debug = node->state;
    g_assert(list_is_empty(&debug->stopped));
    blkdebug_rules_finish(&debug->rules);
    g_mutex_clear(&debug->guard);
}

/* --- breakpoints --- */

struct node *blkdebug_find(struct node *top)
{
    for (struct node *node = top; node;) {
        struct edge *below = node->filtered ? node->filtered : node->file;
        if (node->driver == &driver_blkdebug) {
            return node;
        }
        node = below ? below->child : NULL;
    }
    return NULL;
}

int blkdebug_break(struct node *node, const char *event_name, const char *tag,
                   void (*tell)(const char *tag, bool stopped), struct error **err)
{
    struct blkdebug *debug = node->state;
    enum blkdebug_event event;
    if (blkdebug_event_parse(event_name, &event, NULL) < 0) {
        return error_set(err, -ENOENT, "There is no event '%s'", event_name);
    }
    g_mutex_lock(&debug->guard);
    debug->tell = tell;
    int code = blkdebug_rules_add_break(&debug->rules, event, tag, err);
    g_mutex_unlock(&debug->guard);
    return code;
}

/* guard is held. */
static struct stopped *find_stopped(struct blkdebug *debug, const char *tag)
{
    list_for_each (link, &debug->stopped) {
        struct stopped *stopped = container_of(link, struct stopped, link);
        if (g_str_equal(stopped->tag, tag)) {
            return stopped;
        }
    }
    return NULL;
}

int blkdebug_resume(struct node *node, const char *tag)
{
    struct blkdebug *debug = node->state;
    g_mutex_lock(&debug->guard);
    struct stopped *stopped = find_stopped(debug, tag);
    if (stopped) {
        go_on(debug, stopped);
    }
    g_mutex_unlock(&debug->guard);
    return stopped ? 0 : -ENOENT;
}

int blkdebug_remove_break(struct node *node, const char *tag)
{
    struct blkdebug *debug = node->state;
    struct stopped *stopped;
    g_mutex_lock(&debug->guard);
    unsigned removed = blkdebug_rules_remove_break(&debug->rules, tag);
    while ((stopped = find_stopped(debug, tag))) {
        go_on(debug, stopped);
    }
    g_mutex_unlock(&debug->guard);
    return removed ? 0 : -ENOENT;
}

void blkdebug_release(struct node *node)
{
    struct blkdebug *debug = node->state;
    g_mutex_lock(&debug->guard);
    blkdebug_rules_remove_break(&debug->rules, NULL);
    list_for_each_safe (link, &debug->stopped) {
        go_on(debug, container_of(link, struct stopped, link));
    }
    g_mutex_unlock(&debug->guard);
}

bool blkdebug_is_stopped(struct node *node, const char *tag)
{
    struct blkdebug *debug = node->state;
    g_mutex_lock(&debug->guard);
    bool found = find_stopped(debug, tag);
    g_mutex_unlock(&debug->guard);
    return found;
}

void coroutine_fn blkdebug_wait(struct node *node, const char *tag)
{
    struct blkdebug *debug = node->state;
    g_mutex_lock(&debug->guard);
    bool found = find_stopped(debug, tag);
    if (!found) {
        g_assert(!debug->awaited);
        debug->awaited = tag;
        debug->waiter = coroutine_self();
    }
    g_mutex_unlock(&debug->guard);
    if (!found) {
        coroutine_yield();
    }
}

const struct driver driver_blkdebug = {
    .name = "blkdebug",
    .id = BLOCKDEV_DRIVER_BLKDEBUG,
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct blkdebug),
    .write_if_unallocated = true,
    .grows_on_write = true,
    .open = blkdebug_open,
    .close = blkdebug_close,
    .read = blkdebug_read,
    .write = blkdebug_write,
    .write_zeroes = blkdebug_write_zeroes,
    .discard = blkdebug_discard,
    .flush = blkdebug_flush,
    .block_status = blkdebug_block_status,
    .event = blkdebug_event,
};
