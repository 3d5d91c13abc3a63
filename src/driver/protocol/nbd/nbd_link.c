/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Commands on connections to an NBD server, and what happens when one is lost. libnbd has no thread of its own:
 * somebody has to tell it that its socket is ready. Of the commands that wait on a connection one watches the socket,
 * on its own loop, and so learns of the answers of all; when it has its own, it hands the watch over. An idle
 * connection is watched by nobody and costs nothing; that it is broken is seen by the next command.
 *
 *     down --dial--> up --lost--> (the watcher leaves) --> down
 *
 * 1. Calls on a handle that takes commands, and everything of a link, are made under link->guard, which nobody holds
 *    across a wait.
 * 2. Whoever yields stands in exactly one place: in `waiting` (an answer or the watch takes him out and wakes him), in
 *    `revival`, or he is the watcher. So each yield has one wake.
 * 3. When a handle is lost, libnbd has ended all its commands; it is closed when no coroutine watches its socket.
 * 4. A command that had no answer from a lost connection is issued anew on the next, whatever it is: all of them may be
 *    done twice. Before that, what had been acknowledged and not flushed is issued again (nbd_journal.c): so a server
 *    that was killed may have kept as much of it in its memory as it likes. Writes that the old server still holds in
 *    its hands (it was not killed, the network was) may be done after later ones; the protocol has no way to forbid
 *    that. A power cut of the server's host is the server's to promise about, by flushes.
 *    A command that one connection after the other is lost with is answered by -EIO: the server cannot bear it.
 * 5. Only the main link is waited for. Others (one per further loop, if the server offers multi-conn and there is no
 *    reconnect delay) are made in the
 *    background, and requests go over the main one while they are not up.
 *
 * Coroutines that dial run at home. Called by nbd.c.
 */
#include "driver/protocol/nbd/nbd_client.h"
#include "loop/descriptor.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>
#include <inttypes.h>

#define SECOND_NS INT64_C(1000000000)
#define ATTEMPT_NS (10 * SECOND_NS)     /* a server that says nothing for so long is not there */
#define FIRST_PAUSE_NS (SECOND_NS / 20) /* between attempts; doubled after each */
#define SETTLE_NS (5 * SECOND_NS)       /* for the last flush; the graph waits for it */
#define LAST_PAUSE_NS (4 * SECOND_NS)
#define LOSSES_MAX 8 /* connections that a command may be lost with, one after the other: perhaps it is why */
#define RETRY_EXTRA_NS (10 * SECOND_NS)    /* until another link than the main one is tried again */
#define IDLE_NS SECOND_NS                  /* after which it is worth a look whether the connection is there still */
#define SHUTDOWN_PAUSE_NS (SECOND_NS / 10) /* between attempts at a server that is about to end */

static void coroutine_fn dial_entry(void *argument);

/* --- losing a connection; under guard --- */

static void link_dial(struct nbd_link *link)
{
    if (!link->dialing && !atomic_load(&link->client->closing)) {
        link->dialing = true;
        co_group_enter(&link->client->dials);
        loop_spawn(link->client->home, dial_entry, link);
    }
}

/* The last coroutine has left the socket. */
static void link_bury(struct nbd_link *link)
{
    nbd_close(link->handle);
    link->handle = NULL;
    if (link->main) {
        link_dial(link);
    }
}

static void coroutine_fn wake_entry(void *argument)
{
    struct nbd_link *link = argument;
    co_mutex_lock(&link->guard);
    if (link->wait && link->watch_loop == loop_self()) {
        descriptor_wait_wake(link->wait);
    }
    co_mutex_unlock(&link->guard);
    co_group_leave(&link->client->wakes);
}

/* Lets the watcher look again. */
static void link_wake_watcher(struct nbd_link *link)
{
    if (link->wait && link->watch_loop == loop_self()) {
        descriptor_wait_wake(link->wait);
    } else if (link->wait) {
        co_group_enter(&link->client->wakes);
        loop_spawn(link->watch_loop, wake_entry, link);
    }
}

/* After each call on the handle: has it gone? */
static void link_check(struct nbd_link *link)
{
    if (!atomic_load(&link->up) || !nbd_handle_is_lost(link->handle)) {
        return;
    }
    g_free(link->reason);
    link->reason = g_strdup(nbd_get_error() ? nbd_get_error() : "it ended");
    atomic_store(&link->up, false);
    link->generation++;
    link->lost_ns = loop_now_ns();
    nbd_journal_lose(&link->client->journal);
    if (link->watcher) {
        link_wake_watcher(link);
    } else {
        link_bury(link);
    }
}

/* --- issuing a command and waiting for its answer --- */

static bool command_changes(const struct nbd_command *command)
{
    return command->kind == NBD_WRITE || command->kind == NBD_ZERO || command->kind == NBD_TRIM;
}

/* libnbd calls it, inside one of our calls: under guard. */
static int command_done(void *argument, int *error)
{
    struct nbd_command *command = argument;
    command->result = -*error;
    command->done = true;
    if (command->result == 0 && command->entry) {
        nbd_journal_add(command->journal, g_steal_pointer(&command->entry));
    } else if (command->result == 0 && command->journal && command->kind == NBD_FLUSH) {
        nbd_journal_forget(command->journal, command->sequence);
    } else if (command->result == 0 && command->journal && command_changes(command)) {
        nbd_journal_count(command->journal, command);
    }
    if (command->queued) {
        command->queued = false;
        list_remove(&command->link);
        coroutine_wake(command->waiter);
    }
    return 1; /* libnbd may forget the command */
}

/* Part of what is read has come. libnbd does not see that all of it did. */
static int command_chunk(void *argument, const void *data, size_t bytes, uint64_t offset, unsigned status, int *error)
{
    struct nbd_command *command = argument;
    command->read_bytes += bytes;
    return 0;
}

/* The extents of one context; the first of them is what we want. A hostile server's may be any numbers. */
static int command_extents(void *argument, const char *context, uint64_t offset, uint32_t *entries, size_t count,
                           int *error)
{
    struct nbd_command *command = argument;
    if (offset == command->offset && count >= 2 && g_str_equal(context, command->context)) {
        command->extent_bytes = entries[0];
        command->extent_flags = entries[1];
    }
    return 0;
}

int64_t nbd_command_issue(struct nbd_handle *handle, struct nbd_command *command)
{
    nbd_completion_callback done = {.callback = command_done, .user_data = command};
    nbd_chunk_callback chunks = {.callback = command_chunk, .user_data = command};
    nbd_extent_callback extents = {.callback = command_extents, .user_data = command};
    switch (command->kind) {
    case NBD_READ:
        return nbd_aio_pread_structured(handle, command->memory, command->bytes, command->offset, chunks, done,
                                        command->flags);
    case NBD_WRITE:
        return nbd_aio_pwrite(handle, command->memory, command->bytes, command->offset, done, command->flags);
    case NBD_ZERO:
        return nbd_aio_zero(handle, command->bytes, command->offset, done, command->flags);
    case NBD_TRIM:
        return nbd_aio_trim(handle, command->bytes, command->offset, done, command->flags);
    case NBD_FLUSH:
        return nbd_aio_flush(handle, done, command->flags);
    case NBD_STATUS:
        return nbd_aio_block_status(handle, command->bytes, command->offset, extents, done, command->flags);
    }
    g_assert_not_reached();
}

/* Watches the socket until this command has its answer. Under guard, but while it waits. */
static void coroutine_fn link_watch(struct nbd_link *link, struct nbd_command *command)
{
    link->watcher = command;
    int r = descriptor_wait_create(nbd_aio_get_fd(link->handle), &link->wait);
    g_assert(r == 0); /* it was dialled by such a wait */
    link->watch_loop = loop_self();
    while (!command->done) {
        g_assert(atomic_load(&link->up)); /* else libnbd would have ended the command */
        link->watched = nbd_handle_directions(link->handle);
        struct descriptor_wait *wait = link->wait;
        co_mutex_unlock(&link->guard);
        int ready = descriptor_wait_ready(wait, link->watched);
        if (ready < 0) { /* the system has no room for a wait: now and then, then */
            loop_sleep_ns(NULL, FIRST_PAUSE_NS);
        }
        co_mutex_lock(&link->guard);
        if (atomic_load(&link->up)) {
            nbd_handle_notify(link->handle, ready < 0 ? DESCRIPTOR_READABLE | DESCRIPTOR_WRITABLE : (unsigned)ready);
            link_check(link);
        }
    }
    descriptor_wait_destroy(link->wait);
    link->wait = NULL;
}

/* The watcher has its answer: the next one watches. */
static void link_hand_over(struct nbd_link *link)
{
    link->watcher = NULL;
    if (!list_is_empty(&link->waiting)) {
        struct nbd_command *next = container_of(link->waiting.next, struct nbd_command, link);
        next->queued = false;
        list_remove(&next->link);
        link->watcher = next;
        coroutine_wake(next->waiter);
    } else if (!atomic_load(&link->up)) {
        link_bury(link);
    }
}

static void coroutine_fn link_await(struct nbd_link *link, struct nbd_command *command)
{
    while (!command->done) {
        if (!link->watcher || link->watcher == command) {
            link_watch(link, command);
            continue;
        }
        command->queued = true;
        list_append(&link->waiting, &command->link);
        co_mutex_unlock(&link->guard);
        coroutine_yield();
        co_mutex_lock(&link->guard);
    }
    if (link->watcher == command) {
        link_hand_over(link);
    }
}

/* A connection that was idle: a server that has gone meanwhile is found out before a command is entrusted to it. */
static void link_look(struct nbd_link *link, int64_t idle_ns)
{
    int64_t now_ns = loop_now_ns();
    if (atomic_load(&link->up) && !link->watcher && now_ns - link->used_ns >= idle_ns &&
        descriptor_is_ready(nbd_aio_get_fd(link->handle), DESCRIPTOR_READABLE)) {
        nbd_aio_notify_read(link->handle);
        link_check(link);
    }
    link->used_ns = now_ns;
}

/* 0, the server's refusal, or -ENOTCONN: without a connection, or it was lost before the answer came; -EIO: there was
 * none for too long. Under guard. */
static int coroutine_fn link_run(struct nbd_link *link, struct nbd_command *command)
{
    link_look(link, IDLE_NS);
    while (!atomic_load(&link->up)) {
        if (!link->main) {
            return -ENOTCONN;
        }
        if (link->failing) {
            return -EIO;
        }
        co_queue_wait(&link->revival, &link->guard);
    }
    unsigned generation = link->generation;
    command->waiter = coroutine_self();
    command->done = command->queued = false;
    command->extent_bytes = 0;
    command->read_bytes = 0;
    command->sequence = atomic_load(&link->client->journal.sequence);
    if (nbd_command_issue(link->handle, command) < 0) {
        int code = nbd_get_errno();
        link_check(link);
        return generation != link->generation ? -ENOTCONN : code > 0 ? -code : -EIO;
    }
    link_check(link);
    if (link->wait && (link->watcher->done || nbd_handle_directions(link->handle) & ~link->watched)) {
        link_wake_watcher(link);
    }
    link_await(link, command);
    if (command->result == 0 && command->kind == NBD_READ && command->read_bytes != command->bytes) {
        return -EIO; /* the server says that this was all: it is no use to ask again */
    }
    return command->result < 0 && generation != link->generation ? -ENOTCONN : command->result;
}

/* --- which connection --- */

/* The link of this loop, if it is up; made in the background otherwise. */
static struct nbd_link *coroutine_fn client_link(struct nbd_client *client)
{
    struct nbd_link *main_link = &client->links[0], *link = NULL;
    struct loop *self = loop_self();
    if (client->link_count == 1 || self == client->home) {
        return main_link;
    }
    for (unsigned i = 1; i < client->link_count && !link; i++) {
        struct loop *nobody = NULL;
        if (atomic_load(&client->links[i].loop) == self ||
            atomic_compare_exchange_strong(&client->links[i].loop, &nobody, self)) {
            link = &client->links[i];
        }
    }
    if (!link || atomic_load(&link->up)) {
        return link ? link : main_link;
    }
    if (co_mutex_try_lock(&link->guard)) {
        if (!link->handle && loop_now_ns() >= link->retry_ns) {
            link_dial(link);
        }
        co_mutex_unlock(&link->guard);
    }
    return main_link;
}

static int coroutine_fn client_run(struct nbd_client *client, struct nbd_command *command)
{
    int64_t patience_ns = 0;
    unsigned losses = 0;
    for (;;) {
        struct nbd_link *link = client_link(client);
        co_mutex_lock(&link->guard);
        int r = link_run(link, command);
        co_mutex_unlock(&link->guard);
        if (r == -ENOTCONN && link->main) {
            if (!client->reconnect_delay_ns || ++losses == LOSSES_MAX) {
                return -EIO;
            }
            if (losses > 1) { /* let others through that the server can bear */
                loop_sleep_ns(NULL, FIRST_PAUSE_NS << (losses - 2));
            }
        }
        if (r == -ESHUTDOWN && patience_ns < client->reconnect_delay_ns) {
            loop_sleep_ns(NULL, SHUTDOWN_PAUSE_NS);
            patience_ns += SHUTDOWN_PAUSE_NS;
        } else if (r != -ENOTCONN) {
            return r == -ESHUTDOWN ? -EIO : r;
        }
    }
}

/* The journal is not full any more, or the error of the flush. */
static int coroutine_fn client_make_room(struct nbd_client *client)
{
    struct nbd_journal *journal = &client->journal;
    struct nbd_command flush = {.kind = NBD_FLUSH, .journal = journal};
    co_mutex_lock(&journal->flushing);
    int r = nbd_journal_is_full(journal) ? client_run(client, &flush) : 0;
    co_mutex_unlock(&journal->flushing);
    return r;
}

/* A command that changes something, and is kept. */
static int coroutine_fn client_change(struct nbd_client *client, struct nbd_command *command)
{
    struct nbd_journal *journal = &client->journal;
    struct range_hold hold;
    int r = nbd_journal_is_full(journal) ? client_make_room(client) : 0;
    if (r < 0) {
        return r;
    }
    command->journal = journal;
    command->entry = nbd_journal_prepare(command);
    if (!command->entry) {
        return -ENOMEM;
    }
    range_lock_acquire(&journal->changing, &hold, command->offset, command->bytes, false);
    r = client_run(client, command);
    range_lock_release(&journal->changing, &hold);
    g_free(command->entry);
    return r;
}

/* Has another connection than the one that takes the flush gone, and with it what was written there? */
static void coroutine_fn client_look(struct nbd_client *client)
{
    for (unsigned i = 0; client->link_count > 1 && i < client->link_count; i++) {
        struct nbd_link *link = &client->links[i];
        if (atomic_load(&link->up)) {
            co_mutex_lock(&link->guard);
            link_look(link, 0);
            co_mutex_unlock(&link->guard);
        }
    }
}

int coroutine_fn nbd_client_run(struct nbd_client *client, struct nbd_command *command)
{
    command->journal = &client->journal;
    if (client->journal.active) {
        return command_changes(command) ? client_change(client, command) : client_run(client, command);
    }
    if (command->kind == NBD_FLUSH) {
        client_look(client);
    }
    int r = client_run(client, command);
    if (r == 0 && command->kind == NBD_FLUSH && nbd_journal_take_loss(&client->journal)) {
        g_message("Node '%s': what the NBD server had acknowledged and not flushed when its connection was lost may be "
                  "lost too (a reconnect-delay would prevent that)",
                  client->name);
        return -EIO;
    }
    return r;
}

/* --- dialling; home --- */

struct dial_timer {
    struct loop_timer timer; /* first */
    struct nbd_attempt *attempt;
};

static void dial_is_late(struct loop_timer *timer)
{
    nbd_attempt_cancel(container_of(timer, struct dial_timer, timer)->attempt);
}

void nbd_attempt_goes_on(struct nbd_attempt *attempt)
{
    if (attempt->limit) {
        loop_timer_arm(attempt->limit, MAX(attempt->limit->deadline_ns, loop_clock_ns() + attempt->patience_ns));
    }
}

static int facts_agree(const struct nbd_facts *old, const struct nbd_facts *new, struct error **err)
{
    if (new->size != old->size) {
        return error_set(err, -EINVAL, "The export has %" PRIu64 " bytes now, and had %" PRIu64, new->size, old->size);
    }
    if (new->read_only && !old->read_only) {
        return error_set(err, -EROFS, "The export is read-only now");
    }
    if (new->minimum > old->minimum || new->maximum < old->maximum || new->context != old->context ||
        (old->flush && !new->flush) || (old->multi && !new->multi) || (old->fua && !new->fua) ||
        (old->trim && !new->trim) || (old->zero && !new->zero) || (old->fast_zero && !new->fast_zero)) {
        return error_set(err, -EINVAL, "The server cannot do any more what it could");
    }
    return 0;
}

/* One attempt, which ends at `limit_ns`, or later if it gets on. */
static int coroutine_fn link_attempt(struct nbd_link *link, int64_t limit_ns, struct nbd_handle **ret,
                                     struct error **err)
{
    struct nbd_client *client = link->client;
    struct nbd_attempt attempt = {0};
    struct dial_timer late = {.attempt = &attempt};
    attempt.limit = &late.timer;
    attempt.patience_ns = link->failing ? ATTEMPT_NS : MIN(ATTEMPT_NS, client->reconnect_delay_ns);
    struct nbd_facts facts;
    loop_timer_init(&late.timer, dial_is_late);
    loop_timer_arm(&late.timer, limit_ns);
    link->attempt = &attempt;
    int r = nbd_dial(&client->server, &attempt, ret, &facts, err);
    if (r == 0) {
        r = facts_agree(&client->facts, &facts, err);
        r = r < 0 ? r : nbd_journal_replay(&client->journal, *ret, &attempt, err);
        if (r < 0) {
            nbd_close(*ret);
        }
    }
    link->attempt = NULL;
    loop_timer_cancel(&late.timer);
    return r;
}

/* What became of an attempt. `true`: it is over with dialling. */
static bool coroutine_fn link_attempted(struct nbd_link *link, struct nbd_handle *handle, int64_t deadline_ns,
                                        const struct error *error)
{
    co_mutex_lock(&link->guard);
    if (handle) {
        link->handle = handle;
        link->failing = false;
        link->used_ns = loop_now_ns();
        atomic_store(&link->up, true);
    } else if (link->main && !link->failing && loop_clock_ns() >= deadline_ns) {
        g_message("Node '%s': there is no connection to the NBD server: %s", link->client->name, error->message);
        link->failing = true;
    }
    bool over = handle || !link->main || atomic_load(&link->client->closing);
    if (over) {
        link->dialing = false;
        link->retry_ns = loop_now_ns() + RETRY_EXTRA_NS;
    }
    if (handle || link->failing || over) {
        co_queue_wake_all(&link->revival);
    }
    co_mutex_unlock(&link->guard);
    return over;
}

static void coroutine_fn tell_of_loss(struct nbd_link *link)
{
    co_mutex_lock(&link->guard);
    g_autofree char *reason = g_steal_pointer(&link->reason);
    co_mutex_unlock(&link->guard);
    if (reason) {
        g_message("Node '%s': the connection to the NBD server is lost: %s", link->client->name, reason);
    }
}

static void coroutine_fn dial_entry(void *argument)
{
    struct nbd_link *link = argument;
    struct nbd_client *client = link->client;
    tell_of_loss(link);
    int64_t deadline_ns = link->lost_ns + client->reconnect_delay_ns, pause_ns = FIRST_PAUSE_NS;
    for (;;) {
        auto_error error = NULL;
        struct nbd_handle *handle = NULL;
        int64_t now_ns = loop_clock_ns(), limit_ns = now_ns + ATTEMPT_NS;
        if (now_ns < deadline_ns && deadline_ns < limit_ns) {
            limit_ns = deadline_ns;
        }
        if (atomic_load(&client->closing) || link_attempt(link, limit_ns, &handle, &error) < 0) {
            handle = NULL;
            if (!error) {
                error_set(&error, -ECANCELED, "The node is being closed");
            }
        }
        if (link_attempted(link, handle, deadline_ns, error)) {
            break;
        }
        now_ns = loop_clock_ns();
        loop_sleep_ns(&link->pause,
                      now_ns < deadline_ns ? MIN(pause_ns, deadline_ns - now_ns) : MAX(pause_ns, SECOND_NS));
        pause_ns = MIN(pause_ns * 2, LAST_PAUSE_NS);
    }
    co_group_leave(&client->dials);
}

/* --- life --- */

static void link_init(struct nbd_client *client, struct nbd_link *link)
{
    link->client = client;
    link->main = link == &client->links[0];
    co_mutex_init(&link->guard);
    list_init(&link->waiting);
    co_queue_init(&link->revival);
}

void nbd_links_init(struct nbd_client *client, struct nbd_handle *handle)
{
    struct nbd_link *main_link = &client->links[0];
    client->home = loop_self();
    bool remembers = client->reconnect_delay_ns && client->facts.flush && !client->facts.read_only;
    client->link_count = client->facts.multi && !remembers ? NBD_LINKS_MAX : 1;
    nbd_journal_init(&client->journal, remembers);
    co_group_init(&client->dials);
    co_group_init(&client->wakes);
    for (unsigned i = 0; i < client->link_count; i++) {
        link_init(client, &client->links[i]);
    }
    main_link->handle = handle;
    main_link->used_ns = loop_now_ns();
    atomic_store(&main_link->up, true);
}

/* Nothing is under way: what is only in the server's cache, and would be forgotten here. */
static void coroutine_fn client_settle(struct nbd_client *client)
{
    struct nbd_link *link = &client->links[0];
    struct nbd_attempt attempt = {0};
    struct dial_timer late = {.attempt = &attempt};
    if (nbd_journal_is_empty(&client->journal)) {
        return;
    }
    loop_timer_init(&late.timer, dial_is_late);
    loop_timer_arm(&late.timer, loop_clock_ns() + SETTLE_NS);
    int r = atomic_load(&link->up) ? nbd_journal_settle(&client->journal, link->handle, &attempt) : -ENOTCONN;
    loop_timer_cancel(&late.timer);
    if (r < 0) {
        g_message(
            "Node '%s' is closed, and the NBD server has not flushed what it was given: %s. If it was killed, some "
            "of that is lost",
            client->name, g_strerror(-r));
    }
}

void coroutine_fn nbd_links_close(struct nbd_client *client)
{
    g_assert(client->home == loop_self());
    atomic_store(&client->closing, true);
    client_settle(client);
    for (unsigned i = 0; i < client->link_count; i++) {
        struct nbd_link *link = &client->links[i];
        if (link->attempt) {
            nbd_attempt_cancel(link->attempt);
        }
        loop_sleep_wake(&link->pause);
    }
    co_group_wait(&client->dials);
    co_group_wait(&client->wakes);
    for (unsigned i = 0; i < client->link_count; i++) {
        struct nbd_link *link = &client->links[i];
        g_assert(!link->watcher && list_is_empty(&link->waiting));
        if (link->handle) {
            nbd_aio_disconnect(link->handle, 0);
            nbd_close(link->handle);
        }
        g_free(link->reason);
        co_mutex_destroy(&link->guard);
    }
    nbd_journal_finish(&client->journal);
    co_group_destroy(&client->dials);
    co_group_destroy(&client->wakes);
}
