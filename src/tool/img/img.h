/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_IMG_IMG_H
#define INTERLOCK_TOOL_IMG_IMG_H

#include "base/error.h"
#include "loop/coroutine.h"
#include "loop/loop.h"
#include "tool/image_open.h"
#include <getopt.h>
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * `interlock img`, with the command line, the output and the exit statuses of qemu-img 10.0. Each sub-command is a
 * coroutine of its own in a file of its name, run on the one loop of the program with a graph of its own; the table of
 * them is in img.c. It reads its options with getopt_long() from argv (argv[0]: its name), prints, and returns the exit
 * status. Nodes and backends that it opened are closed when it returns.
 */
struct graph;
struct node;

struct img {
    struct graph *graph;
    GPtrArray *made; /* char: paths of files that were not there before; NULL: none */
};

int coroutine_fn img_amend(struct img *img, int argc, char **argv);
int coroutine_fn img_bench(struct img *img, int argc, char **argv);
/* The engine that its options ask for; what is wrong with them, it says itself later. */
enum engine_kind img_bench_engine(int argc, char **argv);
int coroutine_fn img_bitmap(struct img *img, int argc, char **argv);
int coroutine_fn img_check(struct img *img, int argc, char **argv);
int coroutine_fn img_commit(struct img *img, int argc, char **argv);
int coroutine_fn img_compare(struct img *img, int argc, char **argv);
int coroutine_fn img_convert(struct img *img, int argc, char **argv);
int coroutine_fn img_create(struct img *img, int argc, char **argv);
int coroutine_fn img_dd(struct img *img, int argc, char **argv);
int coroutine_fn img_info(struct img *img, int argc, char **argv);
int coroutine_fn img_map(struct img *img, int argc, char **argv);
int coroutine_fn img_measure(struct img *img, int argc, char **argv);
int coroutine_fn img_rebase(struct img *img, int argc, char **argv);
int coroutine_fn img_resize(struct img *img, int argc, char **argv);
int coroutine_fn img_snapshot(struct img *img, int argc, char **argv);

/* Prints "interlock img: message" (called as qemu-img: "qemu-img: message") and the hint to standard error, frees the
 * error, returns 1. */
int img_fail(const char *command, struct error *error);
/* The same for what the options themselves are wrong about, with where to look; `format` NULL: getopt_long() has said
 * what it was. */
int img_usage(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Prints "interlock img: warning: message" to standard error. */
void img_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* "-h, --help": prints "Usage: interlock img COMMAND " and `text`, which goes on with the rest of that line, and the
 * options; 0. */
int img_help(const char *command, const char *text);
/* Options that most sub-commands have, in their tables of long options and behind their own cases in the loop. */
enum img_option { IMG_IMAGE_OPTS = 256, IMG_OUTPUT, IMG_OBJECT, IMG_OWN };
#define IMG_COMMON_OPTIONS                                                      \
    {"help", no_argument, NULL, 'h'}, {"format", required_argument, NULL, 'f'}, \
        {"image-opts", no_argument, NULL, IMG_IMAGE_OPTS},                      \
    {                                                                           \
        "object", required_argument, NULL, IMG_OBJECT                           \
    }
#define IMG_OUTPUT_OPTION                             \
    {                                                 \
        "output", required_argument, NULL, IMG_OUTPUT \
    }
#define IMG_SHARE_OPTION                      \
    {                                         \
        "force-share", no_argument, NULL, 'U' \
    }
#define IMG_QUIET_OPTION                \
    {                                   \
        "quiet", no_argument, NULL, 'q' \
    }
struct img_common {
    struct image_name name;
    bool json; /* --output */
    bool quiet;
};
/* One of them (f, U, q, and those above IMG_IMAGE_OPTS). The exit status when it is wrong, after having said why; 0. */
int img_common_option(const char *command, struct img_common *common, int option);
/* Takes FILENAME, the only argument that is left, and looks at what excludes each other; as img_common_option(). */
int img_common_name(const char *command, struct img_common *common, int argc, char **argv);
/* Some lines of their helps. */
#define IMG_HELP_SOURCE                                                                      \
    "  -f, --format FORMAT    the format of FILENAME\n"                                      \
    "  --image-opts           FILENAME is a list of options: driver=...,file.filename=...\n" \
    "  --object OBJECT        a key: secret,id=ID,...\n"                                     \
    "  -h, --help             show this help and exit\n"
#define IMG_HELP_OUTPUT "  --output FORMAT        human (the default) or json\n"
#define IMG_HELP_SHARE "  -U, --force-share      even if another program writes to it\n"
#define IMG_HELP_QUIET "  -q, --quiet            print nothing but errors\n"
/* Standard output is a person's if not JSON; writes `json` indented as qemu-img does, and frees it. */
void img_print_json(json_t *json);

/* A size as people are shown it: three digits and a unit, as qemu-img does; writes to `out` and returns it. */
char *img_human_size(uint64_t bytes, char out[32]);
/* The members of an object (format-specific data), a line each behind `indent` spaces. */
void img_print_members(json_t *object, unsigned indent);
/* The table of snapshots inside an image, each line behind `indent` spaces. */
struct snapshot_info_list;
void img_print_snapshots(const struct snapshot_info_list *list, unsigned indent);

/* -p, and SIGUSR1 without it: "    (12.34/100%)\r". `done` of `of`; img_progress_end() prints the last line. */
struct img_progress {
    bool shown;  /* -p */
    double last; /* per cent, as printed last */
    double now;
};
void img_progress_begin(struct img_progress *progress, bool shown);
void img_progress_report(uint64_t done, uint64_t of, void *progress); /* as image_progress.report */
void img_progress_end(struct img_progress *progress);
void img_progress_abandon(struct img_progress *progress); /* instead, of what failed: leaves the line as it is */

/* A number (with the suffixes of sizes) from `minimum` to `maximum`; -EINVAL names the option ("queue depth"). */
int img_number(const char *option, const char *text, uint64_t minimum, uint64_t maximum, uint64_t *ret,
               struct error **err);
/* "size" options: bytes with the suffixes b, k, M, G, T, P, E; -EINVAL names the option ("image size"). */
int img_size(const char *option, const char *text, uint64_t *ret, struct error **err);

/* `-o` of create, convert, measure, amend: the options of `format` as blockdev-create-options, by the driver's table
 * (block/image.h); `given` is a list of NAME=VALUE,... strings. `size` 0: from the options. The result lacks the
 * children (`file`, and the like), which the caller fills in: blockdev_create_options_free(). */
struct blockdev_create_options;
int img_create_options(const char *format, char *const *given, unsigned count, uint64_t size, bool amend,
                       struct blockdev_create_options **ret, struct error **err);
/* Can an image of this format be made, and one with a backing file? -EINVAL for an unknown one. */
int img_create_check(const char *format, bool with_backing, struct error **err);
/* Can options of images of this format be changed? -EINVAL for an unknown one. */
int img_amend_check(const char *format, struct error **err);
/* The id of the secret that an image made with these options is opened with, or NULL. */
const char *img_created_secret(const struct blockdev_create_options *options);
/* What `-o` of amend changes of the keys of an encrypted image; *ret stays as it is if nothing. The options were
 * accepted by img_create_options() before. */
struct blockdev_amend_options;
int img_amend_keys(const char *format, char *const *given, unsigned count, struct blockdev_amend_options **ret,
                   struct error **err);
/* Is "help" (or "?") among the options? Then img_print_options(). */
bool img_asks_for_help(const char *given);
void img_print_options(const char *format, bool amend);
/* -l: the node (read-only) shows the snapshot inside its image, "snapshot.id=ID", "snapshot.name=NAME" or either. */
int coroutine_fn img_load_snapshot(struct img *img, struct node *node, const char *snapshot, struct error **err);
/* The child `file`, or NULL when what is made needs none. */
struct blockdev_ref;
struct blockdev_ref **img_options_file(struct blockdev_create_options *options);
/* Makes a new image at `path` with options from img_create_options(): the file, and the format in it. What could not be
 * made is not there afterwards. */
int coroutine_fn img_make(struct img *img, const char *path, struct blockdev_create_options *options,
                          struct error **err);
/* The command has failed: removes the files that img_make() has made, which are closed. */
void coroutine_fn img_unmake(struct img *img);
/* It has not. */
void img_keep(struct img *img);

#endif
