/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an NBD server has acknowledged and not yet flushed, for the day when it is killed: a server of a format loses
 * metadata that it keeps in its memory, and with them writes that it had acknowledged. Before a new connection is used,
 * all of that is issued there again, in the order in which it was acknowledged.
 *
 * 1. An entry is made, with a copy of its data, before its command is issued, and added in the same step that takes in
 *    the answer: there is no moment at which an acknowledged write is in neither place.
 * 2. A flush that succeeds forgets what was acknowledged before it was issued, and nothing else.
 * 3. Writes with FUA are kept too: an older write that is issued again must not come out on top of them.
 * 4. Memory is bounded: who makes the journal longer than LIMIT flushes it before his own request is answered.
 *
 * There is one only with a reconnect delay, and then there is only one connection (another could be ahead of it). It
 * assumes that nobody else writes to the export. The list is under the main link's guard, or the dialling coroutine's
 * while there is no connection.
 */
#include "base/size.h"
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define LIMIT (16 * MiB)

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
    journal->active = active;
}

void nbd_journal_finish(struct nbd_journal *journal)
{
    nbd_journal_forget(journal, UINT64_MAX);
    co_mutex_destroy(&journal->flushing);
}

struct nbd_entry *nbd_journal_prepare(const struct nbd_command *command)
{
    struct nbd_entry *entry = g_try_malloc(entry_cost(command));
    if (entry) {
        entry->command = (struct nbd_command){
            .kind = command->kind, .flags = command->flags, .offset = command->offset, .bytes = command->bytes};
        if (command->kind == NBD_WRITE) {
            entry->command.memory = entry->data;
            memcpy(entry->data, command->memory, command->bytes);
        }
    }
    return entry;
}

void nbd_journal_add(struct nbd_journal *journal, struct nbd_entry *entry)
{
    entry->sequence = ++journal->sequence;
    list_append(&journal->entries, &entry->link);
    atomic_fetch_add(&journal->cost, entry_cost(&entry->command));
}

void nbd_journal_forget(struct nbd_journal *journal, uint64_t last)
{
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

/* Issues one command on a handle that nobody else uses, and waits for its answer. */
static int coroutine_fn replay(struct nbd_handle *handle, struct nbd_attempt *attempt, struct nbd_command *command)
{
    command->done = command->queued = false;
    if (nbd_command_issue(handle, command) < 0) {
        return -EIO;
    }
    while (!command->done) {
        int ready = descriptor_wait_ready(attempt->wait, nbd_handle_directions(handle));
        if (attempt->cancelled) {
            return -ECANCELED; /* the handle is closed, and forgets the command */
        }
        if (ready < 0 || nbd_handle_is_lost(handle)) {
            return -EIO;
        }
        nbd_handle_notify(handle, (unsigned)ready);
    }
    return command->result;
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
    list_for_each (position, &journal->entries) {
        r = r < 0 ? r : replay(handle, attempt, &container_of(position, struct nbd_entry, link)->command);
    }
    descriptor_wait_destroy(attempt->wait);
    attempt->wait = NULL;
    return r < 0 ? error_set_errno(err, r, "What the server had acknowledged before could not be written again") : 0;
}
