/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How fast a file can be copied in a file system in memory, by each way that we know. Each writes a new file, from
 * memory that is in the cache (`hot`: nobody could have read anything faster) or from a source of the same length, by
 * one thread or by two.
 *
 *   floor DIRECTORY MIB ROUNDS     prints a line for each way: its name, a tab, the seconds of its fastest round
 *
 * The kernel lets one writer at a time into such a file, and a small page that is new has to be found, charged and
 * entered (when it is mapped: zeroed as well), which takes as long as the copying does. Huge pages (which need no mount
 * option to be made, only MADV_COLLAPSE) cost a zeroing, and nobody waits for anybody.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* of Linux 6.1 */
#endif
#define STEP (2L << 20)    /* what a thread takes at a time: a huge page */
#define WRITE (128L << 10) /* what one call writes */
#define THREADS_MAX 2

enum way { WRITE_HOT, WRITE_MAPPED, READ_WRITE, COPY_RANGE, MAP_HOT, MAP_POPULATED_HOT, READ_TO_MAP, READ_TO_HUGE };

static const struct row {
    const char *name;
    enum way way;
    int threads;
    bool allocated;
} rows[] = {
    {"hot, pwrite", WRITE_HOT, 1, false},
    {"hot, pwrite, 2 threads", WRITE_HOT, 2, false},
    {"hot, fallocate, pwrite", WRITE_HOT, 1, true},
    {"hot, to a mapping, 2 threads", MAP_HOT, 2, false},
    {"hot, fallocate, to a mapping, 2 threads", MAP_HOT, 2, true},
    {"hot, to a populated mapping, 2 threads", MAP_POPULATED_HOT, 2, false},
    {"pread, pwrite", READ_WRITE, 1, false},
    {"pread, pwrite, 2 threads", READ_WRITE, 2, false},
    {"pwrite from a mapping", WRITE_MAPPED, 1, false},
    {"pwrite from a mapping, 2 threads", WRITE_MAPPED, 2, false},
    {"pread to a populated mapping, 2 threads", READ_TO_MAP, 2, false},
    {"copy_file_range", COPY_RANGE, 1, false},
    {"pread to a huge page", READ_TO_HUGE, 1, false},
    {"pread to a huge page, 2 threads", READ_TO_HUGE, 2, false},
};

struct copying {
    const struct row *row;
    int from, to, number;
    char *from_map, *to_map;
    long size;
};

static void must(bool good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void write_all(const struct copying *copying, const char *memory, long at)
{
    for (long done = 0; done < STEP; done += WRITE) {
        must(pwrite(copying->to, memory + done, WRITE, at + done) == WRITE, "pwrite");
    }
}

static void copy_step(const struct copying *copying, char *memory, long at)
{
    off_t from = at, to = at;

    switch (copying->row->way) {
    case WRITE_HOT:
        write_all(copying, memory, at);
        return;
    case WRITE_MAPPED:
        write_all(copying, copying->from_map + at, at);
        return;
    case READ_WRITE:
        must(pread(copying->from, memory, STEP, at) == STEP, "pread");
        write_all(copying, memory, at);
        return;
    case COPY_RANGE:
        must(copy_file_range(copying->from, &from, copying->to, &to, STEP, 0) == STEP, "copy_file_range");
        return;
    case MAP_POPULATED_HOT:
        must(!madvise(copying->to_map + at, STEP, MADV_POPULATE_WRITE), "madvise");
        memcpy(copying->to_map + at, memory, STEP);
        return;
    case MAP_HOT:
        memcpy(copying->to_map + at, memory, STEP);
        return;
    case READ_TO_HUGE: /* what is empty cannot be collapsed */
        must(pwrite(copying->to, "", 1, at) == 1, "pwrite");
        madvise(copying->to_map + at, STEP, MADV_COLLAPSE); /* where it cannot be, it is a mapping like any other */
        must(pread(copying->from, copying->to_map + at, STEP, at) == STEP, "pread");
        return;
    case READ_TO_MAP:
        must(!madvise(copying->to_map + at, STEP, MADV_POPULATE_WRITE), "madvise");
        must(pread(copying->from, copying->to_map + at, STEP, at) == STEP, "pread");
        return;
    }
}

static void *thread_main(void *argument)
{
    const struct copying *copying = argument;
    char *memory = aligned_alloc(4096, STEP);

    must(memory != NULL, "memory");
    memset(memory, copying->number + 1, STEP);
    for (long at = copying->number * STEP; at < copying->size; at += copying->row->threads * STEP) {
        copy_step(copying, memory, at);
    }
    free(memory);
    return NULL;
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double measure(const struct row *row, const char *path, int from, char *from_map, long size)
{
    struct copying copying[THREADS_MAX];
    pthread_t threads[THREADS_MAX];
    int to = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

    must(to >= 0 && !ftruncate(to, size), path);
    char *room = mmap(NULL, (size_t)(size + STEP), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "mmap");
    char *to_map = mmap(room + (STEP - (long)room % STEP) % STEP, (size_t)size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED, to, 0);
    must(to_map != MAP_FAILED, "mmap");
    double begin = seconds();

    must(!row->allocated || !fallocate(to, 0, 0, size), "fallocate");
    for (int i = 0; i < row->threads; i++) {
        copying[i] = (struct copying){row, from, to, i, from_map, to_map, size};
        must(!pthread_create(&threads[i], NULL, thread_main, &copying[i]), "pthread_create");
    }
    for (int i = 0; i < row->threads; i++) {
        pthread_join(threads[i], NULL);
    }
    double took = seconds() - begin;

    munmap(room, (size_t)(size + STEP));
    close(to);
    unlink(path);
    return took;
}

int main(int argc, char **argv)
{
    char source[4096], target[4096];

    if (argc != 4) {
        fprintf(stderr, "Usage: %s DIRECTORY MIB ROUNDS\n", argv[0]);
        return 2;
    }
    long size = atol(argv[2]) * (1L << 20) / STEP * STEP;

    snprintf(source, sizeof(source), "%s/floor-source", argv[1]);
    snprintf(target, sizeof(target), "%s/floor-target", argv[1]);
    int from = open(source, O_RDWR | O_CREAT | O_EXCL, 0600);

    must(from >= 0 && !ftruncate(from, size), source);
    char *from_map = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, from, 0);

    must(from_map != MAP_FAILED, "mmap");
    memset(from_map, 7, (size_t)size);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        double fastest = 1e9;

        for (int round = atoi(argv[3]); round > 0; round--) {
            double took = measure(&rows[i], target, from, from_map, size);
            fastest = took < fastest ? took : fastest;
        }
        printf("%s\t%.3f\n", rows[i].name, fastest);
        fflush(stdout);
    }
    close(from);
    unlink(source);
    return 0;
}
