/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_VERB_VERB_H
#define INTERLOCK_TOOL_VERB_VERB_H

#include "tool/client.h"
#include "tool/progress.h"
#include <glib.h>
#include <stdint.h>

/*
 * The live operations as verbs of the command line. A verb reads its options and makes a plan: the QMP commands that
 * do it, to be run as one, and the images that have to be made for them. What follows is the same for all verbs
 * (plan.c): --dry-run, --queue, --async, waiting, tidying up. Clients of the monitor, of one thread.
 */

/* All options of all verbs; which of them a verb takes, its table entry says. Strings are NULL when not given. */
struct verb_options {
    char *qmp;
    gboolean async, wait, dry_run, queue;
    double queue_timeout; /* seconds; 0: no limit */
    char *job_id, *speed, *on_error;
    char **arguments; /* KEY=VALUE, further arguments of the command */
    gboolean keep_ready;
    char *base, *backing_file;                                /* commit, stream */
    char *to, *format, *node_name, *backing, *backing_format; /* what is copied or written to */
    gboolean existing;
    char **create; /* KEY=VALUE, options of a new image */
    char *sync, *copy_mode, *bitmap, *bitmap_mode, *switch_after;
    gboolean replace, keep_backing, compress;
    char *replaces; /* NULL: what is mirrored */
    char *internal;
    gboolean delete, disabled, persistent, shrink, force;
    char *granularity, *from;
    char **words;
};

/* An image to be written to: a node that is there, or one to be opened over a file that is made (or only opened). */
struct target {
    char *node;
    char *path; /* absolute; NULL: the node is there */
    char *format;
    uint64_t size;
    char *backing_file, *backing_format; /* for the header, or NULL */
    char *backing_node;                  /* what it is opened over; NULL: nothing */
    json_t *create;                      /* further options of the new image */
    bool existing;                       /* the file is not made */
    bool file_only;                      /* a step makes the image, and it is not opened */
    bool made, opened;                   /* what has been done, and not been undone */
};

/* One command of a plan. */
struct step {
    const char *command;
    json_t *arguments;
    const char *foreseen_by; /* what a dry run asks about while the target is not there; NULL: the same */
    json_t *foreseen_arguments;
    char *job_id;    /* NULL: it begins no job */
    bool to_dismiss; /* the job stays when it has ended */
};

struct plan {
    const char *verb;
    const struct verb_options *options;
    struct client *client;
    bool interlock;     /* the daemon has access control: it is no QEMU */
    GPtrArray *steps;   /* struct step; none: there is nothing to do */
    GPtrArray *targets; /* struct target */
    enum progress_at_ready at_ready;
    bool endless;  /* the job does not end by itself: there is nothing to wait for */
    bool stays;    /* the targets stay open when the jobs have ended well */
    json_t *nodes; /* nodes_find()'s */
};

struct verb {
    const char *name, *parameters, *summary;
    const char *const *options; /* long names, NULL at the end */
    int (*make_plan)(struct plan *plan, struct error **err);
};
extern const struct verb verb_commit, verb_stream, verb_mirror, verb_backup, verb_snapshot, verb_bitmap, verb_create,
    verb_amend, verb_resize, verb_close;

/* options.c. Reads a command line; 0 or -EINVAL. options_clear() in any case. */
int options_read(const struct verb *verb, struct verb_options *options, int *argc, char ***argv, struct error **err);
void options_clear(struct verb_options *options);

/* plan.c. Adds a command to a plan, whose arguments it takes; those of --arg are added at the end. */
struct step *plan_add(struct plan *plan, const char *command, json_t *arguments);
/* The same for one that begins a job about `node`: gives it its "job-id" and the options of jobs. */
int plan_add_job(struct plan *plan, const char *command, const char *node, json_t *arguments, struct step **ret,
                 struct error **err);
/* An id that no job has, "PREFIX-NODE" or "PREFIX-NODE-2", in place of *ret. */
int plan_job_id(const struct plan *plan, const char *prefix, const char *node, char **ret, struct error **err);
/* Runs it as the options say. *ret_status is the exit status if 0 is returned. */
int plan_run(struct plan *plan, int *ret_status, struct error **err);
void plan_clear(struct plan *plan);

/* turn.c. Whose ids wait for claims now: an array of strings, a new reference. */
int turn_list(struct client *client, json_t **ret, struct error **err);
/* After `command` was answered with on-conflict=wait: waits until it has begun, telling whom it waits for. `part`: the
 * first command of a transaction, else the same; `job_id`: of the job that this begins, or NULL; `before`: who waited
 * before. -EINTR when the user does not want to wait any more; *ret_id is then what it waits as (g_free() it; else
 * NULL). */
int turn_await(struct client *client, const char *command, const char *part, const char *job_id, const json_t *before,
               char **ret_id, struct error **err);

/* target.c. What is meant by `word`: a node, or a file in which a node of the size of `source` is made. A file is
 * called by a path or has a dot in its name. Only the daemon's view of it counts for a running daemon; nothing is made
 * yet. The caller may set backing_* afterwards. Owned by the plan. */
int target_add(struct plan *plan, const char *word, const json_t *source, struct target **ret, struct error **err);
/* Makes them all, and says so; after a failure none is left. */
int targets_make(struct plan *plan, struct error **err);
/* Closes the nodes that were opened; `failed`: and removes the files that were made. What cannot be undone is told. */
void targets_close(struct plan *plan, bool failed);
/* For a dry run: would they be made? Says what they would be. Changes nothing. */
int targets_foresee(struct plan *plan, struct error **err);
void target_free(struct target *target);
/* What blockdev-create takes to make the image in the file, or a raw one. A new object. */
json_t *target_create_options(const struct target *target);

/* The same for a file alone: only an empty one is made (of raw not even that), and it is not opened. */
int target_add_new(struct plan *plan, const char *word, uint64_t size, struct target **ret, struct error **err);

/* nodes.c. What the daemon tells about a node (query-named-block-nodes); borrowed from the plan. */
int nodes_load(struct plan *plan, struct error **err);
int nodes_find(struct plan *plan, const char *name, const json_t **ret, struct error **err);
bool nodes_exists(struct plan *plan, const char *name);
uint64_t nodes_size(const json_t *node);
const char *nodes_driver(const json_t *node);
/* The name of the node that it leans on, or NULL. */
const char *nodes_backing(struct plan *plan, const json_t *node);
/* A path for another image's header: absolute, whatever folder the daemon was started in. */
int nodes_path(struct plan *plan, const json_t *node, char **ret, struct error **err);
/* A name for a new node over that file, which no node has yet. */
char *nodes_name_for(struct plan *plan, const char *path);

#endif
