/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Load on a vhost-user-blk back end, from a front end of our own with event index and indirect descriptors, as Linux'
 * driver has them: keeps so many requests in every queue, one thread to a queue, for so many seconds, and prints what
 * that was as JSON. Each block that is written says where it belongs; what is read is looked at, and with --verify
 * everything once more at the end.
 */
#include "base/seeded.h"
#include "export/vhost_user/front_testing.h"
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    char *path, *mode;
    gboolean random, packed, verify;
    int block, depth, queues;
    double seconds;
    gint64 seed;
} options = {.mode = "read", .block = 4096, .depth = 1, .queues = 1, .seconds = 1};

static const GOptionEntry entries[] = {
    {"unix", 0, 0, G_OPTION_ARG_FILENAME, &options.path, "the back end's socket", "PATH"},
    {"mode", 0, 0, G_OPTION_ARG_STRING, &options.mode, "read, write, or fill: write all once", "MODE"},
    {"random", 0, 0, G_OPTION_ARG_NONE, &options.random, "places, else one after the other", NULL},
    {"packed", 0, 0, G_OPTION_ARG_NONE, &options.packed, "rings", NULL},
    {"verify", 0, 0, G_OPTION_ARG_NONE, &options.verify, "read all at the end", NULL},
    {"block", 0, 0, G_OPTION_ARG_INT, &options.block, "bytes of a request", "N"},
    {"depth", 0, 0, G_OPTION_ARG_INT, &options.depth, "requests in a queue", "N"},
    {"queues", 0, 0, G_OPTION_ARG_INT, &options.queues, "of the device", "N"},
    {"seconds", 0, 0, G_OPTION_ARG_DOUBLE, &options.seconds, "to measure", "S"},
    {"seed", 0, 0, G_OPTION_ARG_INT64, &options.seed, "of the places", "N"},
    {NULL},
};

struct load {
    struct front_queue *queue;
    uint64_t blocks, requests, seed, next, end; /* next, end: places, one after the other */
    bool writes, timed;
    gint64 deadline_us;
    uint32_t *waits_us; /* how long requests took: counts, by microseconds */
    gint64 *begun_us;
    uint64_t *place;
};
#define WAITS 100000

static uint64_t stamp(uint64_t place)
{
    return seeded_mix(place + 12345);
}

static bool choose(struct load *load, uint64_t *ret)
{
    if (options.random && load->timed) {
        *ret = seeded_next(&load->seed) % load->blocks;
        return true;
    }
    if (load->next == load->end && load->timed) {
        load->next = 0;
    }
    *ret = load->next++;
    return *ret < load->end;
}

static bool begin(struct load *load, unsigned slot)
{
    uint64_t place;

    if (!choose(load, &place)) {
        return false;
    }
    if (load->writes) {
        for (int at = 0; at < options.block; at += 4096) {
            uint64_t value = stamp(place * (uint64_t)options.block + (uint64_t)at);
            memcpy(load->queue->slot[slot].buffer + at, &value, sizeof(value));
        }
    }
    load->place[slot] = place;
    load->begun_us[slot] = g_get_monotonic_time();
    front_submit(load->queue, slot, load->writes ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
                 place * (uint64_t)options.block / 512, (uint32_t)options.block);
    return true;
}

static void finish(struct load *load, unsigned slot)
{
    const struct front_slot *done = &load->queue->slot[slot];

    if (*done->status != VIRTIO_BLK_S_OK) {
        g_error("a request failed with status %u", *done->status);
    }
    for (int at = 0; at < options.block && !load->writes; at += 4096) {
        uint64_t value;
        memcpy(&value, done->buffer + at, sizeof(value));
        if (value != stamp(load->place[slot] * (uint64_t)options.block + (uint64_t)at)) {
            g_error("block %" G_GUINT64_FORMAT " has other data than were written", load->place[slot]);
        }
    }
    load->requests++;
    load->waits_us[MIN(g_get_monotonic_time() - load->begun_us[slot], WAITS - 1)]++;
}

static void *run(void *argument)
{
    struct load *load = argument;
    unsigned busy = 0;
    bool more = true;

    for (unsigned slot = 0; slot < load->queue->slots && more; slot++) {
        more = begin(load, slot);
        busy += more;
    }
    front_kick(load->queue);
    while (busy) {
        for (int slot = front_wait(load->queue); slot >= 0; slot = front_reap(load->queue)) {
            finish(load, (unsigned)slot);
            more = more && (!load->timed || g_get_monotonic_time() < load->deadline_us);
            if (!more || !begin(load, (unsigned)slot)) {
                busy--;
            }
        }
        front_kick(load->queue);
    }
    return NULL;
}

/* All queues at once; how many seconds it took. */
static double run_all(struct front *front, struct load *loads, bool writes, bool timed)
{
    uint64_t blocks = front->config.capacity * 512 / (uint64_t)options.block;
    gint64 begun = g_get_monotonic_time();
    GThread *threads[FRONT_QUEUES_MAX];

    for (int i = 0; i < options.queues; i++) {
        loads[i].blocks = blocks;
        loads[i].writes = writes;
        loads[i].timed = timed;
        loads[i].requests = 0;
        loads[i].next = blocks * (uint64_t)i / (uint64_t)options.queues;
        loads[i].end = blocks * (uint64_t)(i + 1) / (uint64_t)options.queues;
        loads[i].deadline_us = begun + (gint64)(options.seconds * 1e6);
        threads[i] = g_thread_new("queue", run, &loads[i]);
    }
    for (int i = 0; i < options.queues; i++) {
        g_thread_join(threads[i]);
    }
    return (double)(g_get_monotonic_time() - begun) / 1e6;
}

static uint64_t percentile(const struct load *loads, double part)
{
    uint64_t total = 0, seen = 0;

    for (int i = 0; i < options.queues; i++) {
        total += loads[i].requests;
    }
    for (unsigned us = 0; us < WAITS; us++) {
        for (int i = 0; i < options.queues; i++) {
            seen += loads[i].waits_us[us];
        }
        if ((double)seen >= part * (double)total) {
            return us;
        }
    }
    return WAITS;
}

static void print_result(const struct front *front, const struct load *loads, double seconds)
{
    uint64_t requests = 0, kicks = 0, calls = 0;

    for (int i = 0; i < options.queues; i++) {
        requests += loads[i].requests;
        kicks += front->queue[i].kicks;
        calls += front->queue[i].calls;
    }
    printf("{\"requests\": %" G_GUINT64_FORMAT ", \"per_second\": %.1f, \"mib_per_second\": %.1f, \"p50_us\": "
           "%" G_GUINT64_FORMAT ", \"p99_us\": %" G_GUINT64_FORMAT ", \"kicks\": %" G_GUINT64_FORMAT
           ", \"calls\": %" G_GUINT64_FORMAT "}\n",
           requests, (double)requests / seconds, (double)requests / seconds * options.block / 1048576,
           percentile(loads, 0.5), percentile(loads, 0.99), kicks, calls);
}

static int connect_patiently(void)
{
    for (int tries = 0; tries < 2000; tries++) {
        int fd = front_connect(options.path);

        if (fd >= 0) {
            return fd;
        }
        g_usleep(5000);
    }
    g_error("nobody listens on %s", options.path);
}

int main(int argc, char **argv)
{
    g_autoptr(GOptionContext) context = g_option_context_new("- load on a vhost-user-blk back end");
    g_autoptr(GError) error = NULL;
    struct load loads[FRONT_QUEUES_MAX] = {0};
    struct front front;
    bool fill, writes;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &error) || !options.path || options.queues < 1 ||
        options.queues > FRONT_QUEUES_MAX || options.depth < 1 || options.block < 4096 || options.block % 4096) {
        g_printerr("vhost_load: %s\n", error ? error->message : "wrong options");
        return 2;
    }
    fill = strcmp(options.mode, "fill") == 0;
    writes = fill || strcmp(options.mode, "write") == 0;
    struct front_options wanted = {.queues = (unsigned)options.queues,
                                   .size = 256,
                                   .slots = (unsigned)options.depth,
                                   .buffer = (size_t)options.block,
                                   .packed = options.packed,
                                   .one_region = true,
                                   .event_index = true,
                                   .indirect = true};
    front_init(&front, connect_patiently(), &wanted);
    fprintf(stderr, "connected\n");
    for (int i = 0; i < options.queues; i++) {
        loads[i].queue = &front.queue[i];
        loads[i].seed = (uint64_t)options.seed * 100 + (uint64_t)i;
        loads[i].waits_us = g_new0(uint32_t, WAITS);
        loads[i].begun_us = g_new0(gint64, (gsize)options.depth);
        loads[i].place = g_new0(uint64_t, (gsize)options.depth);
    }
    print_result(&front, loads, run_all(&front, loads, writes, !fill));
    if (options.verify) {
        run_all(&front, loads, false, false);
    }
    front_finish(&front);
    for (int i = 0; i < options.queues; i++) {
        g_free(loads[i].waits_us);
        g_free(loads[i].begun_us);
        g_free(loads[i].place);
    }
    return 0;
}
