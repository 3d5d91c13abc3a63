/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * verify-client: writes, zeroes, trims, reads and flushes a region of an NBD export at full speed and checks every byte
 * that it reads against a ledger of what it wrote.
 *
 * 1. A block has at most one request under way, so what it must contain is known whenever it is read.
 * 2. A trim is followed by a write of the same blocks: what a trimmed block shows is nobody's promise.
 * 3. A flush promises what was acknowledged before it was sent; the ledger learns of it when the flush is answered.
 * 4. A block that was left under way by a broken connection is left alone until --settle.
 *
 * Ends with 0 (all was as it should be), 1 (wrong content), 2 (the server is gone), 3 (no answer for a long time),
 * 4 (wrong use), 5 (the server broke the protocol), 6 (the server answered with an error). One client is one process;
 * tests that want more start more, each with a region of its own.
 */
#include "connection.h"
#include "ledger.h"

#include <err.h>
#include <fcntl.h>
#include <glib.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ANSWER_LIMIT_MS 60000
#define VERIFY_CHUNK (256 * 1024)

struct slot {
    bool busy;
    bool then_write; /* a trim: the write of the same blocks comes next */
    unsigned command;
    bool fua;
    uint64_t block;
    unsigned count;
    uint32_t *versions; /* [count]: what becomes current */
    uint8_t *buffer;
    uint32_t *promise; /* a flush: the current version of every block when it was sent */
};

struct client {
    struct connection *connection;
    struct ledger ledger;
    struct slot *slots;
    unsigned depth, in_flight;
    bool flushing;
    bool *block_busy;
    unsigned since_flush;
    GRand *random;
};

static gchar *option_socket, *option_export, *option_ledger, *option_original, *option_file;
static gint option_depth = 16, option_max_blocks = 8, option_reads = 30, option_zeroes = 5, option_trims = 5;
static gint option_fua = 2, option_flush_every = 200;
static gint64 option_seed = 1, option_offset, option_length, option_block = 4096, option_requests = G_MAXINT64;
static gdouble option_seconds = 1e9;
static gboolean option_new, option_structured, option_abort, option_verify, option_settle, option_crash;
static volatile sig_atomic_t stopping;

static void on_signal(int number)
{
    stopping = 1;
}

static bool find_read(void *argument, uint64_t cookie, struct connection_read *ret)
{
    struct client *client = argument;
    if (cookie >= client->depth || !client->slots[cookie].busy) {
        errx(5, "the server answered a request that nobody sent");
    }
    struct slot *slot = &client->slots[cookie];
    const struct ledger_header *header = client->ledger.header;
    *ret = (struct connection_read){slot->buffer, header->offset + slot->block * header->block_size,
                                    slot->count * header->block_size};
    return slot->command == NBD_READ;
}

static void slot_send(struct client *client, struct slot *slot)
{
    const struct ledger_header *header = client->ledger.header;
    unsigned flags = slot->fua && slot->command != NBD_READ && slot->command != NBD_FLUSH ? NBD_FUA : 0;
    if (slot->command == NBD_WRITE) {
        for (unsigned i = 0; i < slot->count; i++) {
            ledger_fill(&client->ledger, slot->block + i, slot->versions[i], slot->buffer + i * header->block_size);
        }
    }
    uint64_t offset = slot->command == NBD_FLUSH ? 0 : header->offset + slot->block * header->block_size;
    uint32_t length = slot->command == NBD_FLUSH ? 0 : slot->count * header->block_size;
    connection_send(client->connection, slot->command, flags, slot - client->slots, offset, length, slot->buffer);
}

static bool blocks_free(const struct client *client, uint64_t block, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        const struct ledger_block *state = &client->ledger.blocks[block + i];
        if (client->block_busy[block + i] || state->issued != state->current) {
            return false;
        }
    }
    return true;
}

/* Picks blocks that have no request under way; false if a few throws found none. */
static bool pick_blocks(struct client *client, struct slot *slot)
{
    uint64_t total = client->ledger.header->block_count;
    for (int throw = 0; throw < 8; throw ++) {
        slot->count = g_rand_int_range(client->random, 1, option_max_blocks + 1);
        slot->count = MIN(slot->count, total);
        slot->block = (uint64_t)(g_rand_double(client->random) * (total - slot->count + 1));
        if (blocks_free(client, slot->block, slot->count)) {
            return true;
        }
    }
    return false;
}

static void start_flush(struct client *client, struct slot *slot)
{
    uint64_t total = client->ledger.header->block_count;
    slot->command = NBD_FLUSH;
    slot->count = 0;
    slot->promise = g_new(uint32_t, total);
    for (uint64_t i = 0; i < total; i++) {
        slot->promise[i] = client->ledger.blocks[i].current;
    }
    client->flushing = true;
    client->since_flush = 0;
}

/* Marks the blocks of a slot as under way and fixes the versions that its end will make current. */
static void start_change(struct client *client, struct slot *slot, bool zeroes)
{
    for (unsigned i = 0; i < slot->count; i++) {
        struct ledger_block *state = &client->ledger.blocks[slot->block + i];
        slot->versions[i] = state->issued = ledger_next_version(state, zeroes);
        if (slot->then_write) {
            state->trimmed = state->issued;
        }
    }
}

static unsigned choose_command(struct client *client)
{
    unsigned flags = connection_flags(client->connection);
    int dice = g_rand_int_range(client->random, 0, 100);
    if (flags & NBD_READ_ONLY || dice < option_reads) {
        return NBD_READ;
    }
    dice -= option_reads;
    if (dice < option_zeroes && flags & NBD_SEND_WRITE_ZEROES) {
        return NBD_WRITE_ZEROES;
    }
    dice -= option_zeroes;
    return dice >= 0 && dice < option_trims && flags & NBD_SEND_TRIM ? NBD_TRIM : NBD_WRITE;
}

/* Starts one request in a free slot; false when there is nothing to do until some are answered. */
static bool start_request(struct client *client)
{
    struct slot *slot = client->slots;
    while (slot->busy) {
        slot++;
    }
    slot->then_write = false;
    slot->fua = false;
    if (option_flush_every && client->since_flush >= (unsigned)option_flush_every && !client->flushing) {
        start_flush(client, slot);
    } else {
        if (!pick_blocks(client, slot)) {
            return false;
        }
        slot->command = choose_command(client);
        slot->then_write = slot->command == NBD_TRIM;
        slot->fua = connection_flags(client->connection) & NBD_SEND_FUA &&
                    g_rand_int_range(client->random, 0, 100) < option_fua;
        if (slot->command != NBD_READ) {
            start_change(client, slot, slot->command == NBD_WRITE_ZEROES);
        }
        for (unsigned i = 0; i < slot->count; i++) {
            client->block_busy[slot->block + i] = true;
        }
        client->since_flush++;
    }
    slot->busy = true;
    client->in_flight++;
    slot_send(client, slot);
    return true;
}

static void count_request(struct ledger_header *header, unsigned command)
{
    uint64_t *counter = command == NBD_READ           ? &header->reads
                        : command == NBD_WRITE        ? &header->writes
                        : command == NBD_WRITE_ZEROES ? &header->zeroes
                        : command == NBD_TRIM         ? &header->trims
                                                      : &header->flushes;
    __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED);
}

static void finish_flush(struct client *client, struct slot *slot)
{
    for (uint64_t i = 0; i < client->ledger.header->block_count; i++) {
        struct ledger_block *state = &client->ledger.blocks[i];
        state->flushed = MAX(state->flushed, slot->promise[i]);
    }
    g_free(slot->promise);
    slot->promise = NULL;
    client->flushing = false;
}

/* The end of a request; false when what was read is wrong. */
static bool finish_request(struct client *client, struct slot *slot)
{
    struct ledger *ledger = &client->ledger;
    bool good = true;
    count_request(ledger->header, slot->command);
    if (slot->command == NBD_TRIM) {
        slot->command = NBD_WRITE;
        slot_send(client, slot);
        return true;
    }
    for (unsigned i = 0; i < slot->count; i++) {
        struct ledger_block *state = &ledger->blocks[slot->block + i];
        if (slot->command == NBD_READ) {
            good = good &&
                   ledger_matches(ledger, slot->block + i, slot->buffer + i * ledger->header->block_size, LEDGER_EXACT);
        } else {
            state->current = slot->versions[i];
            if (slot->fua) {
                state->flushed = state->current;
            }
        }
        client->block_busy[slot->block + i] = false;
    }
    if (slot->command == NBD_FLUSH) {
        finish_flush(client, slot);
    }
    slot->busy = false;
    client->in_flight--;
    return good;
}

/* Waits for one reply and handles it. 0, or the status to end with. */
static int handle_reply(struct client *client)
{
    uint64_t cookie = 0;
    uint32_t error = 0;
    gint64 deadline = g_get_monotonic_time() + ANSWER_LIMIT_MS * 1000LL;
    for (;;) {
        int result = connection_receive(client->connection, 1000, &cookie, &error, find_read, client);
        if (result < 0) {
            fprintf(stderr, "verify: the server closed the connection\n");
            return 2;
        }
        if (result > 0) {
            break;
        }
        if (g_get_monotonic_time() > deadline) {
            fprintf(stderr, "verify: no answer for %d s, %u requests under way\n", ANSWER_LIMIT_MS / 1000,
                    client->in_flight);
            return 3;
        }
    }
    if (cookie >= client->depth || !client->slots[cookie].busy) {
        errx(5, "the server answered a request that nobody sent");
    }
    struct slot *slot = &client->slots[cookie];
    if (error) {
        fprintf(stderr, "verify: command %u at block %llu (%u blocks) failed: %s\n", slot->command,
                (unsigned long long)slot->block, slot->count, g_strerror(error));
        return 6;
    }
    return finish_request(client, slot) ? 0 : 1;
}

static int run_requests(struct client *client)
{
    gint64 end = g_get_monotonic_time() + (gint64)(option_seconds * 1e6);
    gint64 left = option_requests;
    int status = 0;
    while (status == 0 && !stopping && left > 0 && g_get_monotonic_time() < end) {
        while (client->in_flight < client->depth && left > 0 && start_request(client)) {
            left--;
        }
        status = client->in_flight ? handle_reply(client) : 0;
    }
    if (option_abort) {
        return status;
    }
    while (status == 0 && client->in_flight > 0) {
        status = handle_reply(client);
    }
    if (status == 0 && connection_flags(client->connection) & NBD_SEND_FLUSH) {
        start_flush(client, client->slots);
        client->slots[0].busy = true;
        client->slots[0].fua = client->slots[0].then_write = false;
        client->in_flight++;
        slot_send(client, client->slots);
        status = handle_reply(client);
    }
    return status;
}

/* One request to its end, with nothing else under way: for --verify and --settle. */
static int run_alone(struct client *client, unsigned command, uint64_t block, unsigned count, uint8_t *buffer)
{
    struct slot *slot = client->slots;
    uint64_t cookie;
    uint32_t error = 0;
    *slot = (struct slot){.busy = true, .command = command, .block = block, .count = count, .buffer = buffer};
    const struct ledger_header *header = client->ledger.header;
    uint64_t offset = command == NBD_FLUSH ? 0 : header->offset + block * header->block_size;
    connection_send(client->connection, command, 0, 0, offset, count * header->block_size, buffer);
    for (int waited = 0; waited < ANSWER_LIMIT_MS; waited += 1000) {
        int result = connection_receive(client->connection, 1000, &cookie, &error, find_read, client);
        if (result != 0) {
            slot->busy = false;
            return result < 0 ? 2 : error ? 6 : 0;
        }
    }
    return 3;
}

static int read_blocks(struct client *client, int fd, uint64_t block, unsigned count, uint8_t *buffer)
{
    const struct ledger_header *header = client->ledger.header;
    if (fd < 0) {
        return run_alone(client, NBD_READ, block, count, buffer);
    }
    size_t size = count * header->block_size;
    ssize_t got = pread(fd, buffer, size, header->offset + block * header->block_size);
    if (got < 0) {
        err(4, "%s", option_file);
    }
    memset(buffer + got, 0, size - got);
    return 0;
}

static int settle_block(struct client *client, uint64_t block, uint8_t *buffer)
{
    struct ledger_block *state = &client->ledger.blocks[block];
    state->issued = ledger_next_version(state, false);
    ledger_fill(&client->ledger, block, state->issued, buffer);
    int status = run_alone(client, NBD_WRITE, block, 1, buffer);
    if (status == 0) {
        state->current = state->issued;
    }
    return status;
}

/* Reads the whole region, from the export or a raw file, and compares; with --settle, rewrites what is uncertain. */
static int verify_region(struct client *client, int fd)
{
    const struct ledger_header *header = client->ledger.header;
    unsigned chunk = MAX(1, VERIFY_CHUNK / header->block_size);
    g_autofree uint8_t *buffer = g_malloc(chunk * header->block_size);
    g_autofree uint8_t *scratch = g_malloc(header->block_size);
    unsigned wrong = 0;
    int status = 0;
    for (uint64_t block = 0; status == 0 && block < header->block_count; block += chunk) {
        unsigned count = MIN(chunk, header->block_count - block);
        status = read_blocks(client, fd, block, count, buffer);
        for (unsigned i = 0; status == 0 && i < count && wrong < 5; i++) {
            uint8_t *data = buffer + i * header->block_size;
            if (!ledger_matches(&client->ledger, block + i, data, option_crash ? LEDGER_CRASH : LEDGER_EXACT)) {
                wrong++;
            } else if (option_settle && !ledger_is_issued(&client->ledger, block + i, data)) {
                status = settle_block(client, block + i, scratch);
            } else if (option_settle) {
                client->ledger.blocks[block + i].current = client->ledger.blocks[block + i].issued;
            }
        }
    }
    if (status == 0 && option_settle && fd < 0) {
        status = run_alone(client, NBD_FLUSH, 0, 0, NULL);
        for (uint64_t i = 0; status == 0 && i < header->block_count; i++) {
            client->ledger.blocks[i].flushed = client->ledger.blocks[i].current;
        }
    }
    return status ? status : wrong ? 1 : 0;
}

static void parse_options(int *argc, char ***argv)
{
    const GOptionEntry entries[] = {
        {"socket", 0, 0, G_OPTION_ARG_FILENAME, &option_socket, "The NBD server's unix socket", "PATH"},
        {"export", 0, 0, G_OPTION_ARG_STRING, &option_export, "The export's name", "NAME"},
        {"structured", 0, 0, G_OPTION_ARG_NONE, &option_structured, "Negotiate structured replies", NULL},
        {"ledger", 0, 0, G_OPTION_ARG_FILENAME, &option_ledger, "The ledger", "PATH"},
        {"new", 0, 0, G_OPTION_ARG_NONE, &option_new, "Make a new ledger", NULL},
        {"seed", 0, 0, G_OPTION_ARG_INT64, &option_seed, "Seed of the content and of the choices", "N"},
        {"offset", 0, 0, G_OPTION_ARG_INT64, &option_offset, "New ledger: where the region begins", "BYTES"},
        {"length", 0, 0, G_OPTION_ARG_INT64, &option_length, "New ledger: its length", "BYTES"},
        {"block", 0, 0, G_OPTION_ARG_INT64, &option_block, "New ledger: the unit of writing", "BYTES"},
        {"original", 0, 0, G_OPTION_ARG_FILENAME, &option_original, "Raw image of the export before all", "PATH"},
        {"seconds", 0, 0, G_OPTION_ARG_DOUBLE, &option_seconds, "How long (SIGTERM ends it too)", "N"},
        {"requests", 0, 0, G_OPTION_ARG_INT64, &option_requests, "How many requests", "N"},
        {"depth", 0, 0, G_OPTION_ARG_INT, &option_depth, "Requests under way", "N"},
        {"max-blocks", 0, 0, G_OPTION_ARG_INT, &option_max_blocks, "Longest request", "N"},
        {"reads", 0, 0, G_OPTION_ARG_INT, &option_reads, "Share of reads", "PERCENT"},
        {"zeroes", 0, 0, G_OPTION_ARG_INT, &option_zeroes, "Share of write-zeroes", "PERCENT"},
        {"trims", 0, 0, G_OPTION_ARG_INT, &option_trims, "Share of trims", "PERCENT"},
        {"fua", 0, 0, G_OPTION_ARG_INT, &option_fua, "Share of changes with FUA", "PERCENT"},
        {"flush-every", 0, 0, G_OPTION_ARG_INT, &option_flush_every, "Requests between flushes, 0 for none", "N"},
        {"abort", 0, 0, G_OPTION_ARG_NONE, &option_abort, "End by closing the socket, requests under way", NULL},
        {"verify", 0, 0, G_OPTION_ARG_NONE, &option_verify, "Read and compare the whole region only", NULL},
        {"settle", 0, 0, G_OPTION_ARG_NONE, &option_settle, "The same, and rewrite what is uncertain", NULL},
        {"crash", 0, 0, G_OPTION_ARG_NONE, &option_crash, "Compare with what was flushed, not acknowledged", NULL},
        {"file", 0, 0, G_OPTION_ARG_FILENAME, &option_file, "Compare this raw image instead of an export", "PATH"},
        {NULL},
    };
    g_autoptr(GOptionContext) context = g_option_context_new("- an NBD client that checks what it reads");
    g_option_context_add_main_entries(context, entries, NULL);
    g_autoptr(GError) error = NULL;
    if (!g_option_context_parse(context, argc, argv, &error)) {
        errx(4, "%s", error->message);
    }
    if (!option_ledger || (!option_file && (!option_socket || !option_export)) || option_depth < 1) {
        errx(4, "--ledger is needed, and --socket with --export, or --file");
    }
}

static void open_ledger(struct client *client)
{
    if (option_new) {
        uint64_t length = option_length ? (uint64_t)option_length : connection_size(client->connection) - option_offset;
        ledger_create(&client->ledger, option_ledger, option_seed, option_offset, length, option_block);
    } else {
        ledger_open(&client->ledger, option_ledger);
    }
    if (option_original) {
        ledger_set_original(&client->ledger, option_original);
    }
    const struct ledger_header *header = client->ledger.header;
    if (client->connection && header->offset + ledger_length(&client->ledger) > connection_size(client->connection)) {
        errx(4, "the region is larger than the export");
    }
}

/* Who starts us may have blocked SIGTERM, so that one that comes before the handler stands is not lost and does not
 * kill. */
static void catch_term(void)
{
    sigset_t term;

    signal(SIGTERM, on_signal);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_UNBLOCK, &term, NULL);
}

int main(int argc, char **argv)
{
    struct client client = {0};
    int fd = -1;
    parse_options(&argc, &argv);
    catch_term();
    if (option_file) {
        fd = open(option_file, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            err(4, "%s", option_file);
        }
    } else {
        client.connection = connection_open(option_socket, option_export, option_structured);
        if (!client.connection) {
            return 2;
        }
    }
    open_ledger(&client);
    const struct ledger_header *header = client.ledger.header;
    client.depth = option_depth;
    client.slots = g_new0(struct slot, client.depth);
    client.random = g_rand_new_with_seed(option_seed);

    int status;
    if (option_verify || option_settle || option_file) {
        status = verify_region(&client, fd);
    } else {
        client.block_busy = g_new0(bool, header->block_count);
        for (unsigned i = 0; i < client.depth; i++) {
            client.slots[i].versions = g_new0(uint32_t, option_max_blocks);
            client.slots[i].buffer = g_malloc(option_max_blocks * header->block_size);
        }
        status = run_requests(&client);
    }
    if (client.connection && status != 2) {
        connection_close(client.connection, !option_abort);
    }
    printf("{\"reads\": %llu, \"writes\": %llu, \"zeroes\": %llu, \"trims\": %llu, \"flushes\": %llu}\n",
           (unsigned long long)header->reads, (unsigned long long)header->writes, (unsigned long long)header->zeroes,
           (unsigned long long)header->trims, (unsigned long long)header->flushes);
    return status;
}
