/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an NBD server has acknowledged and not yet flushed, for the day when it is killed: a server of a format loses
 * metadata that it keeps in its memory, and with them writes that it had acknowledged. Before a new connection is used,
 * all of that is issued there again.
 *
 * 1. An entry is made, with a copy of its data, before its command is issued, and added in the same step that takes in
 *    the answer: there is no moment at which an acknowledged write is in neither place. What is issued is the copy.
 * 2. A flush that succeeds forgets what was acknowledged before it was issued, and nothing else.
 * 3. Changes that overlap are not under way at the same time: so the order of the list is the order in which they were
 *    done, and what was read once is what is read after a replay.
 * 4. A replay writes each byte once, as it was last: nothing older comes on top of what is there, be it for a moment,
 * in which the next server may die. So changes with FUA are kept too, and the order of a replay is of no account.
 * 5. Memory is bounded: who finds LIMIT bytes here flushes them before his change is issued, or fails with the flush.
 *
 * 6. Where it is not active nothing is written again, and what a lost connection's server may have forgotten is only
 *    counted: the next flush fails then, and does not promise what it cannot know.
 *
 * It is active only with a reconnect delay, and then there is only one connection (another could be ahead of it). It
 * assumes that nobody else writes to the export. The list is under the main link's guard, or the dialling coroutine's
 * while there is no connection.
 */
#include "base/size.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

#define LIMIT (16 * MiB)
enum { WINDOW = 16 }; /* commands of a replay that are under way at once */

struct nbd_entry {
    struct list link;
    uint64_t sequence;
    struct nbd_command command;
    char data[];
};

static uint64_t entry_cost(const struct nbd_command *command)
{
    return sizeof(struct nbd_entry) + (command->kind == NBD_WRITE ? command->bytes : 0);
}

void nbd_journal_init(struct nbd_journal *journal, bool active)
{
    list_init(&journal->entries);
    co_mutex_init(&journal->flushing);
    range_lock_init(&journal->changing);
    journal->active = active;
}

void nbd_journal_finish(struct nbd_journal *journal)
{
    nbd_journal_forget(journal, UINT64_MAX);
    co_mutex_destroy(&journal->flushing);
    range_lock_destroy(&journal->changing);
}

struct nbd_entry *nbd_journal_prepare(struct nbd_command *command)
{
    struct nbd_entry *entry = g_try_malloc(entry_cost(command));
    if (entry) {
        entry->command = (struct nbd_command){.kind = command->kind,
                                              .flags = command->flags & ~LIBNBD_CMD_FLAG_FAST_ZERO,
                                              .offset = command->offset,
                                              .bytes = command->bytes};
        if (command->kind == NBD_WRITE) {
            memcpy(entry->data, command->memory, command->bytes);
            entry->command.memory = command->memory = entry->data;
        }
    }
    return entry;
}

void nbd_journal_add(struct nbd_journal *journal, struct nbd_entry *entry)
{
    entry->sequence = atomic_fetch_add(&journal->sequence, 1) + 1;
    list_append(&journal->entries, &entry->link);
    atomic_fetch_add(&journal->cost, entry_cost(&entry->command));
}

void nbd_journal_count(struct nbd_journal *journal, const struct nbd_command *command)
{
    if (!(command->flags & LIBNBD_CMD_FLAG_FUA)) {
        atomic_fetch_add(&journal->sequence, 1);
    }
}

void nbd_journal_lose(struct nbd_journal *journal)
{
    if (!journal->active && atomic_load(&journal->sequence) > atomic_load(&journal->flushed)) {
        atomic_store(&journal->forgotten, true);
    }
}

bool nbd_journal_take_loss(struct nbd_journal *journal)
{
    return atomic_load(&journal->forgotten) && atomic_exchange(&journal->forgotten, false);
}

void nbd_journal_forget(struct nbd_journal *journal, uint64_t last)
{
    uint64_t before = atomic_load(&journal->flushed);
    while (before < last && !atomic_compare_exchange_weak(&journal->flushed, &before, last)) {
    }
    list_for_each_safe (position, &journal->entries) {
        struct nbd_entry *entry = container_of(position, struct nbd_entry, link);
        if (entry->sequence > last) {
            break;
        }
        list_remove(&entry->link);
        atomic_fetch_sub(&journal->cost, entry_cost(&entry->command));
        g_free(entry);
    }
}

bool nbd_journal_is_full(const struct nbd_journal *journal)
{
    return atomic_load(&journal->cost) >= LIMIT;
}

bool nbd_journal_is_empty(const struct nbd_journal *journal)
{
    return list_is_empty(&journal->entries);
}

/* --- who is on top where --- */

/* The bytes from edges[i] to edges[i + 1] were last changed by on_top[i], or by nobody. */
struct painting {
    size_t count; /* of edges, which are in order */
    uint64_t *edges;
    struct nbd_entry **on_top;
    size_t *bare; /* the next place, from this one on, that nobody is known of; shortened as it is followed */
};

static void painting_clear(struct painting *painting)
{
    g_free(painting->edges);
    g_free(painting->on_top);
    g_free(painting->bare);
}

static int compare_edges(const void *a, const void *b)
{
    uint64_t first = *(const uint64_t *)a, second = *(const uint64_t *)b;
    return first < second ? -1 : first > second;
}

static size_t edge_of(const struct painting *painting, uint64_t offset)
{
    const uint64_t *edge = bsearch(&offset, painting->edges, painting->count, sizeof(offset), compare_edges);
    return (size_t)(edge - painting->edges);
}

static size_t bare_from(struct painting *painting, size_t at)
{
    while (painting->bare[at] != at) {
        at = painting->bare[at] = painting->bare[painting->bare[at]];
    }
    return at;
}

static int painting_init(struct painting *painting, const struct nbd_journal *journal)
{
    size_t room = 0;
    list_for_each (position, &journal->entries) {
        room += 2;
    }
    *painting = (struct painting){.edges = g_try_new(uint64_t, room),
                                  .on_top = g_try_new0(struct nbd_entry *, room),
                                  .bare = g_try_new(size_t, room)};
    if (!painting->edges || !painting->on_top || !painting->bare) {
        return -ENOMEM;
    }
    size_t all = 0;
    list_for_each (position, &journal->entries) {
        const struct nbd_command *command = &container_of(position, struct nbd_entry, link)->command;
        painting->edges[all++] = command->offset;
        painting->edges[all++] = command->offset + command->bytes;
    }
    qsort(painting->edges, all, sizeof(*painting->edges), compare_edges);
    for (size_t i = 0; i < all; i++) {
        if (!painting->count || painting->edges[painting->count - 1] != painting->edges[i]) {
            painting->bare[painting->count] = painting->count;
            painting->edges[painting->count++] = painting->edges[i];
        }
    }
    return 0;
}

/* From the newest to the oldest, each where nobody is yet. */
static void painting_paint(struct painting *painting, const struct nbd_journal *journal)
{
    for (struct list *position = journal->entries.prev; position != &journal->entries; position = position->prev) {
        struct nbd_entry *entry = container_of(position, struct nbd_entry, link);
        size_t end = edge_of(painting, entry->command.offset + entry->command.bytes);
        for (size_t at = bare_from(painting, edge_of(painting, entry->command.offset)); at < end;
             at = bare_from(painting, at)) {
            painting->on_top[at] = entry;
            painting->bare[at] = at + 1;
        }
    }
}

/* The next command of the replay, from place *at on, which moves; false: there is none. */
static bool painting_next(const struct painting *painting, size_t *at, struct nbd_command *ret)
{
    while (*at < painting->count && !painting->on_top[*at]) {
        ++*at;
    }
    if (*at == painting->count) {
        return false;
    }
    const struct nbd_entry *entry = painting->on_top[*at];
    uint64_t offset = painting->edges[*at];
    while (painting->on_top[*at] == entry) { /* nobody is on top of the last edge */
        ++*at;
    }
    *ret = entry->command;
    ret->offset = offset;
    ret->bytes = painting->edges[*at] - offset;
    ret->memory = ret->memory ? (char *)ret->memory + (offset - entry->command.offset) : NULL;
    return true;
}

/* --- issuing --- */

/* Waits until a command on a handle that nobody else uses may have its answer. */
static int coroutine_fn await(struct nbd_handle *handle, struct nbd_attempt *attempt)
{
    if (attempt->cancelled) {
        return -ECANCELED;
    }
    if (nbd_handle_is_lost(handle)) {
        return -EIO;
    }
    int ready = descriptor_wait_ready(attempt->wait, nbd_handle_directions(handle));
    if (attempt->cancelled || ready < 0) {
        return attempt->cancelled ? -ECANCELED : ready; /* the handle is closed, and forgets the command */
    }
    nbd_handle_notify(handle, (unsigned)ready);
    return 0;
}

/* Takes the answers that have come: how many, or an error. The content of what was trimmed is anything: no error. */
static int collect(struct nbd_handle *handle, struct nbd_command *window, bool *busy)
{
    int count = 0, r = 0;
    for (unsigned i = 0; i < WINDOW; i++) {
        if (busy[i] && window[i].done) {
            busy[i] = false;
            count++;
            bool matters = window[i].kind != NBD_TRIM || nbd_handle_is_lost(handle);
            r = r == 0 && matters ? window[i].result : r;
        }
    }
    return r < 0 ? r : count;
}

static int coroutine_fn replay(const struct painting *painting, struct nbd_handle *handle, struct nbd_attempt *attempt,
                               struct nbd_command *window)
{
    bool busy[WINDOW] = {0}, more = true;
    unsigned under_way = 0;
    size_t at = 0;
    for (;;) {
        for (unsigned i = 0; i < WINDOW && more; i++) {
            more = busy[i] || painting_next(painting, &at, &window[i]);
            if (more && !busy[i]) {
                busy[i] = true;
                under_way++;
                if (nbd_command_issue(handle, &window[i]) < 0) {
                    return -EIO;
                }
            }
        }
        if (!under_way) {
            return 0;
        }
        int r = await(handle, attempt);
        r = r < 0 ? r : collect(handle, window, busy);
        if (r < 0) {
            return r;
        }
        if (r > 0) {
            under_way -= (unsigned)r;
            nbd_attempt_goes_on(attempt);
        }
    }
}

int coroutine_fn nbd_journal_replay(struct nbd_journal *journal, struct nbd_handle *handle, struct nbd_attempt *attempt,
                                    struct error **err)
{
    if (list_is_empty(&journal->entries)) {
        return 0;
    }
    int r = descriptor_wait_create(nbd_aio_get_fd(handle), &attempt->wait);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot wait for a socket");
    }
    struct painting painting;
    struct nbd_command *window = g_new0(struct nbd_command, WINDOW);
    r = painting_init(&painting, journal);
    if (r == 0) {
        painting_paint(&painting, journal);
        r = replay(&painting, handle, attempt, window);
    }
    painting_clear(&painting);
    g_free(window);
    descriptor_wait_destroy(attempt->wait);
    attempt->wait = NULL;
    return r < 0 ? error_set_errno(err, r, "What the server had acknowledged before could not be written again") : 0;
}

int coroutine_fn nbd_journal_settle(struct nbd_journal *journal, struct nbd_handle *handle, struct nbd_attempt *attempt)
{
    int r = descriptor_wait_create(nbd_aio_get_fd(handle), &attempt->wait);
    if (r < 0) {
        return r;
    }
    struct nbd_command flush = {.kind = NBD_FLUSH};
    r = nbd_command_issue(handle, &flush) < 0 ? -EIO : 0;
    while (r == 0 && !flush.done) {
        r = await(handle, attempt);
    }
    descriptor_wait_destroy(attempt->wait);
    attempt->wait = NULL;
    r = r < 0 ? r : flush.result;
    if (r == 0) {
        nbd_journal_forget(journal, UINT64_MAX);
    }
    return r;
}
