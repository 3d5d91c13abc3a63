/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IO_IO_H
#define INTERLOCK_TOOL_IO_IO_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "loop/sync.h"
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/*
 * `interlock io`, with the command line, the commands, their output and the exit statuses of qemu-io 10.0. A command is
 * a coroutine in a file of its family; command.c has the table of them. Everything runs on the one loop of the program,
 * with one graph, in which at most one image is open.
 */
struct backend;
struct graph;
struct node;

/* How an image is opened; strings are owned. */
struct io_opening {
    char *name;    /* NULL: none, `options` say all */
    char *format;  /* -f */
    char *options; /* DRIVER-OPTIONS of the image, or NULL */
    char *cache, *discard;
    json_t *changes; /* reopen -o: members of the options, or NULL */
    bool read_only, snapshot, copy_on_read, force_share;
};
void io_opening_clear(struct io_opening *opening);

struct io {
    struct graph *graph;
    struct backend *backend; /* of the open image, or NULL */
    struct node *nodes[3];   /* that are held for it, from the top down; NULL behind the last */
    struct io_opening how;   /* it was opened */
    const char *program;     /* as errors call it */
    bool misalign;           /* -m */
    bool quits;
    struct co_group requests; /* aio_read, aio_write: under way */
    unsigned request_count;   /* of them */
};

/* --- open.c --- */

/* Opens what it says, which becomes the open image and takes `how` over (also on an error). There is none open. Tells
 * why not. */
int coroutine_fn io_open(struct io *io, struct io_opening *how);
/* Waits for the requests under way (those that a breakpoint has stopped go on) and closes; nothing if none is open. */
void coroutine_fn io_close(struct io *io);
/* "threads", ... of -i; tells what is wrong. */
int io_check_aio(struct io *io, const char *mode);
int io_check_discard(struct io *io, const char *mode);
/* -t, -c: the same. */
int io_check_cache(struct io *io, const char *mode);
/* The node of the image itself, whatever -C and -s put over it. */
struct node *io_image_node(const struct io *io);

/* --- command.c --- */

enum io_command_flags {
    IO_WITHOUT_IMAGE = 1 << 0, /* may run when none is open */
    IO_WRITES = 1 << 1,        /* needs one that is open for writing */
};
/* argv[0] is the name. 0, or a negative number when it failed, which it has told. */
struct io_command {
    const char *name, *short_name;
    int coroutine_fn (*run)(struct io *io, int argc, char **argv);
    int least, most; /* arguments behind the name; most -1: no limit */
    unsigned flags;
    const char *arguments; /* of the usage */
    const char *summary;
    const char *help; /* more, or NULL */
};
const struct io_command *io_command_find(const char *name); /* by either name; NULL */
/* Runs one line. Returns as a command; an empty line is none, and good. */
int coroutine_fn io_command_run(struct io *io, const char *line);
/* Splits at spaces; NULL when it is empty; g_strfreev(). */
char **io_command_split(const char *line, int *ret_count);
/* Prints the command's usage; returns -EINVAL. */
int io_usage(const char *name);
int coroutine_fn io_help(struct io *io, int argc, char **argv);
int coroutine_fn io_quit(struct io *io, int argc, char **argv);

/* --- text.c --- */

enum { IO_LENGTH_MAX = INT32_MAX / 512 * 512 }; /* bytes of one request */

/* A number of bytes or an offset: decimal with a suffix, or 0x...; -EINVAL, -ERANGE. */
int io_number(const char *text, int64_t *ret);
/* The same, and tells what is wrong. */
int io_number_or_tell(const char *text, int64_t *ret);
/* -P: 0 to 255, also in octal and hexadecimal; tells what is wrong. */
int io_pattern(const char *text, uint8_t *ret);
/* "64 KiB", "1.500 KiB", "512 bytes". */
char *io_size(double bytes, char out[64]);
/* A transfer's two lines, or the one for programs (-C). `done` of `total` bytes, begun at `start_ns`. */
void io_report(const char *verb, int64_t start_ns, uint64_t offset, uint64_t total, uint64_t done, bool for_programs);
/* -v */
void io_dump(const void *data, uint64_t offset, uint64_t bytes);
/* "PROGRAM: message" and the hint to standard error; frees it. */
void io_tell_error(struct io *io, struct error *error);

/* --- memory.c --- */

/* Memory for a transfer, filled; with -m, misaligned. NULL, and told, when there is none. */
struct io_memory {
    void *all;
    uint8_t *data;
};
int io_memory_take(struct io *io, struct io_memory *memory, uint64_t bytes, int fill);
/* The same, filled with the content of a file, again and again (-s); tells what is wrong. */
int io_memory_take_file(struct io *io, struct io_memory *memory, uint64_t bytes, const char *path);
void io_memory_release(struct io_memory *memory);

/* Several lengths as a vector over such memory. */
struct iovec;
struct io_vector {
    struct io_memory memory;
    struct iovec *iov;
    unsigned count;
    uint64_t bytes; /* in all */
};
int io_vector_take(struct io *io, struct io_vector *vector, char *const *lengths, unsigned count, int fill);
void io_vector_release(struct io_vector *vector);

/* The image's own errors: what lies behind its end is an I/O error. */
int io_check_range(struct io *io, int64_t offset, uint64_t bytes);

/* --- the commands, by family --- */

/* open.c */
int coroutine_fn io_command_open(struct io *io, int argc, char **argv);
int coroutine_fn io_command_close(struct io *io, int argc, char **argv);
int coroutine_fn io_command_reopen(struct io *io, int argc, char **argv);
/* read.c */
int coroutine_fn io_command_read(struct io *io, int argc, char **argv);
int coroutine_fn io_command_readv(struct io *io, int argc, char **argv);
/* Tells where `data` differ from `byte`, if they do: -EINVAL. */
int io_verify(const uint8_t *data, uint8_t byte, uint64_t offset, uint64_t bytes);
/* write.c */
int coroutine_fn io_command_write(struct io *io, int argc, char **argv);
int coroutine_fn io_command_writev(struct io *io, int argc, char **argv);
int coroutine_fn io_command_discard(struct io *io, int argc, char **argv);
/* async.c */
int coroutine_fn io_command_aio_read(struct io *io, int argc, char **argv);
int coroutine_fn io_command_aio_write(struct io *io, int argc, char **argv);
int coroutine_fn io_command_aio_flush(struct io *io, int argc, char **argv);
/* image.c */
int coroutine_fn io_command_alloc(struct io *io, int argc, char **argv);
int coroutine_fn io_command_map(struct io *io, int argc, char **argv);
int coroutine_fn io_command_length(struct io *io, int argc, char **argv);
int coroutine_fn io_command_info(struct io *io, int argc, char **argv);
int coroutine_fn io_command_truncate(struct io *io, int argc, char **argv);
int coroutine_fn io_command_flush(struct io *io, int argc, char **argv);
/* breakpoint.c */
int coroutine_fn io_command_break(struct io *io, int argc, char **argv);
int coroutine_fn io_command_remove_break(struct io *io, int argc, char **argv);
int coroutine_fn io_command_resume(struct io *io, int argc, char **argv);
int coroutine_fn io_command_wait_break(struct io *io, int argc, char **argv);
/* process.c */
int coroutine_fn io_command_sleep(struct io *io, int argc, char **argv);
int coroutine_fn io_command_sigraise(struct io *io, int argc, char **argv);
int coroutine_fn io_command_abort(struct io *io, int argc, char **argv);
/* zone.c */
int coroutine_fn io_command_zone(struct io *io, int argc, char **argv);
int coroutine_fn io_command_zone_append(struct io *io, int argc, char **argv);

#endif
