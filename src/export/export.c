/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of exports and the life of each: claims, backend, clients, end. What a client speaks is the business of
 * its type (export_type.h, the table `export_types` below). Invariants:
 * 1. an id is in the table from its adding to the `deleted` event, so it is never used twice;
 * 2. an export holds its claims before its backend is attached, and until its backend is gone;
 * 3. an export that is refused has changed nothing: what was begun is undone in reverse order;
 * 4. everything here happens on the control thread; the clients' threads only read (export_type.h).
 * It does not know monitors: events leave through exports_config.
 */
#include "export/export.h"
#include "access/queue.h"
#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "export/export_type.h"
#include "loop/loop.h"
#include "schema/claims.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

static const struct export_type *const export_types[] = {
    &nbd_export_type,
    &vhost_user_export_type,
#ifdef INTERLOCK_FUSE
    &fuse_export_type,
#endif
};

struct exports *exports_create(const struct exports_config *config)
{
    struct exports *exports = g_new0(struct exports, 1);

    exports->config = *config;
    exports->loop = loop_self();
    list_init(&exports->list);
    for (int type = 0; type < BLOCK_EXPORT_TYPE_COUNT; type++) {
        co_group_init(&exports->alive[type]);
    }
    co_group_init(&exports->servers);
    return exports;
}

void exports_destroy(struct exports *exports)
{
    if (!exports) {
        return;
    }
    g_assert(list_is_empty(&exports->list) && !exports->nbd_server);
    for (int type = 0; type < BLOCK_EXPORT_TYPE_COUNT; type++) {
        co_group_destroy(&exports->alive[type]);
    }
    co_group_destroy(&exports->servers);
    g_free(exports);
}

static struct export *exports_find(struct exports *exports, const char *id)
{
    list_for_each (position, &exports->list) {
        struct export *export = container_of(position, struct export, link);

        if (strcmp(export->id, id) == 0) {
            return export;
        }
    }
    return NULL;
}

/* Ids as everywhere in QMP: a letter, then letters, digits, '-', '.', '_'. */
static bool export_id_is_valid(const char *id)
{
    if (!g_ascii_isalpha(id[0])) {
        return false;
    }
    return strspn(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") == strlen(id);
}

static const struct export_type *export_type_find(enum block_export_type id)
{
    for (size_t i = 0; i < G_N_ELEMENTS(export_types); i++) {
        if (export_types[i]->id == id) {
            return export_types[i];
        }
    }
    return NULL;
}

static struct export *export_create(struct exports *exports, const struct export_type *type,
                                    const struct block_export_options *options)
{
    struct export *export = g_new0(struct export, 1);

    export->exports = exports;
    export->type = type;
    export->id = g_strdup(options->id);
    export->node_name = g_strdup(options->node_name);
    export->writable = options->writable;
    export->writethrough = options->writethrough;
    export->loop = exports->loop;
    export->opening = true;
    export->references = 1;
    list_append(&exports->list, &export->link);
    co_group_enter(&exports->alive[type->id]);
    return export;
}

static void export_free(struct export *export)
{
    struct exports *exports = export->exports;
    enum block_export_type type = export->type->id;

    list_remove(&export->link);
    g_free(export->id);
    g_free(export->node_name);
    g_free(export);
    co_group_leave(&exports->alive[type]);
}

/* Ends what is there of an export, in reverse order of how it began. While its backend waits to be detached a job may
 * still move it: its claims follow until then, or they would hold on to a node that has become stale. */
static void coroutine_fn export_destroy(struct export *export)
{
    if (export->backend) {
        backend_set_changed(export->backend, NULL, NULL);
        backend_destroy(export->backend);
        export->backend = NULL; /* it is listed as long as operation_end() waits for the graph */
    }
    operation_end(export->operation);
    export_free(export);
}

static void export_end_run(void *argument)
{
    struct export *export = argument;
    struct exports *exports = export->exports;
    g_autofree char *id = g_strdup(export->id);
    bool was = !export->never_was;

    export->type->close(export);
    export_destroy(export);
    if (was && exports->config.deleted) {
        exports->config.deleted(exports->config.argument, id);
    }
}

void export_ref(struct export *export)
{
    g_assert(export->references > 0);
    export->references++;
}

void export_unref(struct export *export)
{
    g_assert(export->references > 0);
    if (--export->references == 0) {
        g_assert(export->shutting_down);
        loop_spawn(export->exports->loop, export_end_run, export);
    }
}

static void export_shut_down(struct export *export)
{
    export->condemned = true; /* also one that is not open yet, if it ever will be */
    if (export->opening || export->shutting_down) {
        return;
    }
    export->shutting_down = true;
    atomic_store(&export->ending, true);
    export->type->disconnect(export);
    export_unref(export);
}

static int exports_check(struct exports *exports, const struct block_export_options *options,
                         const struct export_type **ret_type, struct error **err)
{
    const struct export_type *type = export_type_find(options->type);

    if (!export_id_is_valid(options->id)) {
        error_set(err, -EINVAL, "Invalid block export id '%.64s'", options->id);
        error_hint(err, "An id begins with a letter and consists of letters, digits, '-', '.' and '_'");
        return -EINVAL;
    }
    if (access_id_waits(exports->config.graph->ledger, options->id)) {
        return error_set(err, -EEXIST, "Block export id '%s' is already in use by an operation that waits for its turn",
                         options->id);
    }
    if (exports_find(exports, options->id)) {
        return error_set(err, -EEXIST, "Block export id '%s' is already in use", options->id);
    }
    if (!type) {
        return error_set(err, -ENOTSUP, "Exports of type '%s' are not available",
                         block_export_type_name(options->type));
    }
    *ret_type = type;
    return type->check(exports, options, err);
}

static int loops_add(struct export_loops *loops, const struct exports_config *config, const char *name,
                     struct error **err)
{
    struct loop *found = config->find_iothread ? config->find_iothread(config->argument, name) : NULL;

    if (!found) {
        return error_set(err, -ENOENT, "iothread \"%s\" not found", name);
    }
    for (unsigned i = 0; i < loops->count; i++) {
        if (loops->items[i] == found) {
            return error_set(err, -EEXIST, "iothread \"%s\" is named twice", name);
        }
    }
    if (loops->count == EXPORT_LOOPS_MAX) {
        return error_set(err, -E2BIG, "An export has %u iothreads at most", EXPORT_LOOPS_MAX);
    }
    loops->items[loops->count++] = found;
    return 0;
}

static int exports_choose_loops(const struct exports *exports, const struct block_export_options *options,
                                struct export_loops *ret, struct error **err)
{
    const struct block_export_iothreads *wanted = options->iothread;
    const struct str_list *several = wanted && wanted->kind == BLOCK_EXPORT_IOTHREADS_MULTI ? &wanted->u.multi : NULL;
    int r = 0;

    *ret = (struct export_loops){0};
    if (several && several->count != 1 && !export_type_find(options->type)->several_loops) {
        return error_set(err, -EINVAL, "Exports of type '%s' are served by one iothread, not by %zu",
                         block_export_type_name(options->type), several->count);
    }
    if (several && !several->count) {
        return error_set(err, -EINVAL, "The list of iothreads of export '%s' is empty", options->id);
    }
    if (!wanted) {
        *ret = (struct export_loops){1, {exports->loop}};
    } else if (!several) {
        r = loops_add(ret, &exports->config, wanted->u.single, err);
    }
    for (size_t i = 0; several && i < several->count && r == 0; i++) {
        r = loops_add(ret, &exports->config, several->items[i], err);
    }
    return r;
}

/* A node that was opened read-only is not made writable for a client. */
static int exports_check_writable(const struct block_export_options *options, const struct node *node,
                                  struct error **err)
{
    if (!options->writable || (node->wants_writable && !node->never_writable)) {
        return 0;
    }
    error_set(err, -EROFS, "Export '%s' cannot be writable: block node '%s' is read-only", options->id,
              options->node_name);
    error_hint(err, "Open the node with \"read-only\": false, or export it with \"writable\": false");
    return -EROFS;
}

/* All that the options decide, up to the claims; graph->lock is held. */
static int exports_plan(struct exports *exports, const struct block_export_options *options,
                        struct operation_config *ret, struct export_loops *ret_loops, struct error **err)
{
    struct node *node = graph_find_or_error(exports->config.graph, options->node_name, err);
    int r;

    if (!node) {
        return -ENOENT;
    }
    const struct export_type *type = export_type_find(options->type);
    r = exports_choose_loops(exports, options, ret_loops, err);
    if (r == 0) {
        r = exports_check_writable(options, node, err);
    }
    if (r == 0 && type->plan) {
        r = type->plan(exports, options, node, err);
    }
    *ret = (struct operation_config){
        .kind = "export",
        .id = options->id,
        .table = &block_export_add_claims,
        .bound[CLAIM_NODE] = node,
        .conditions = (options->writable ? CLAIM_IF_WRITABLE : 0) | (options->exclusive ? CLAIM_IF_EXCLUSIVE : 0),
    };
    return r;
}

static void export_backend_changed(void *argument)
{
    struct export *export = argument;
    uint64_t size = backend_size(export->backend);

    if (atomic_exchange(&export->size, size) != size && export->state && export->type->resized) {
        export->type->resized(export);
    }
}

/* Takes the claims and attaches, in one step: the last step of a job sees neither or both. graph->lock is held. */
static int coroutine_fn export_attach(struct export *export, const struct block_export_options *options,
                                      struct error **err)
{
    struct graph *graph = export->exports->config.graph;
    struct operation_config operation;
    int r = exports_plan(export->exports, options, &operation, &export->loops, err);

    if (r == 0) {
        export->loop = export->loops.items[0];
        r = operation_begin(graph, &operation, &export->operation, err);
    }
    if (r < 0) {
        return r;
    }
    struct node *node = operation.bound[CLAIM_NODE];
    g_autofree char *owner = g_strdup_printf("export %s", export->id);
    export->backend = backend_create(graph, owner);
    backend_set_client(export->backend);
    r = backend_attach_locked(export->backend, node, operation_granted(export->operation, node), err);
    if (r == 0) {
        backend_follow(export->backend, export->operation, CLAIM_NODE);
        backend_set_changed(export->backend, export_backend_changed, export);
        export_backend_changed(export);
    }
    return r;
}

/* --- adding one, as an action --- */

struct export_adding {
    struct exports *exports;
    const struct block_export_options *options; /* borrowed */
    const struct export_type *type;
    struct operation_config operation;
    struct export *export; /* from apply to commit */
    struct drain drain;    /* its clients wait until everything is decided */
};

static int coroutine_fn adding_plan(struct action *action, struct error **err)
{
    struct export_adding *adding = action->state;
    struct export_loops loops;
    int r = exports_check(adding->exports, adding->options, &adding->type, err);

    return r < 0 ? r : exports_plan(adding->exports, adding->options, &adding->operation, &loops, err);
}

static int coroutine_fn adding_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    return operation_preview(action->graph, &((struct export_adding *)action->state)->operation, ret_claims, err);
}

/* What was begun of an export that has never been open. */
static void coroutine_fn export_undo(struct export *export)
{
    if (export->backend) {
        backend_set_changed(export->backend, NULL, NULL);
        backend_destroy_locked(export->backend);
    }
    operation_end_locked(export->operation);
    export_free(export);
}

static int coroutine_fn adding_apply(struct action *action, struct error **err)
{
    struct export_adding *adding = action->state;
    struct export *export = export_create(adding->exports, adding->type, adding->options);
    int r = export_attach(export, adding->options, err);

    if (r == 0) {
        r = export->type->open(export, adding->options, err);
    }
    if (r < 0) {
        export_undo(export);
        return r;
    }
    struct node *node = backend_node(export->backend);

    graph_drain_begin(action->graph, &node, 1, NULL, &adding->drain);
    adding->export = export;
    return 0;
}

/* Clients that have come meanwhile find no medium, and are sent away; it ends when they are gone. */
static void coroutine_fn adding_revert(struct action *action)
{
    struct export_adding *adding = action->state;
    struct export *export = adding->export;

    backend_set_changed(export->backend, NULL, NULL);
    backend_detach_locked(export->backend);
    graph_drain_end(&adding->drain);
    operation_end_locked(g_steal_pointer(&export->operation));
    export->opening = false;
    export->never_was = true;
    export_shut_down(export);
}

static void coroutine_fn adding_commit(struct action *action)
{
    struct export_adding *adding = action->state;

    graph_drain_end(&adding->drain);
    adding->export->opening = false;
    if (adding->export->condemned) {
        export_shut_down(adding->export);
    }
}

static void coroutine_fn adding_clean(struct action *action)
{
    g_free(action->state);
}

static const struct action_kind adding_kind = {
    .name = "block-export-add",
    .plan = adding_plan,
    .apply = adding_apply,
    .revert = adding_revert,
    .commit = adding_commit,
    .clean = adding_clean,
    .preview = adding_preview,
};

void export_add_action(struct action *ret, struct exports *exports, const struct block_export_options *options)
{
    struct export_adding *adding = g_new0(struct export_adding, 1);

    adding->exports = exports;
    adding->options = options;
    *ret = (struct action){.kind = &adding_kind, .state = adding};
}

int coroutine_fn exports_add(struct exports *exports, const struct block_export_options *options, struct error **err)
{
    struct action action;

    export_add_action(&action, exports, options);
    return actions_run(exports->config.graph, &action, 1, err);
}

int coroutine_fn exports_check_add(struct exports *exports, const struct block_export_options *options,
                                   json_t **ret_claims, struct error **err)
{
    struct action action;

    export_add_action(&action, exports, options);
    return actions_check(exports->config.graph, &action, 1, ret_claims, err);
}

/* --- deleting one --- */

/* NULL, with the reason, if it may not be deleted now. */
static struct export *exports_find_deletable(struct exports *exports, const char *id,
                                             enum block_export_remove_mode mode, struct error **err)
{
    struct export *export = exports_find(exports, id);

    if (!export || export->opening) {
        error_set(err, -ENOENT, "Export '%s' is not found", id);
        return NULL;
    }
    if (export->shutting_down) {
        error_set(err, -EALREADY, "Export '%s' is already shutting down", id);
        return NULL;
    }
    if (mode == BLOCK_EXPORT_REMOVE_MODE_SAFE && export->references > 1) {
        error_set(err, -EBUSY, "export '%s' still in use: %u client%s connected", id, export->references - 1,
                  export->references == 2 ? " is" : "s are");
        error_hint(err, "Use mode='hard' to force client disconnect");
        return NULL;
    }
    return export;
}

int exports_delete(struct exports *exports, const char *id, enum block_export_remove_mode mode, struct error **err)
{
    struct error *error = NULL;
    struct export *export = exports_find_deletable(exports, id, mode, &error);

    if (!export) {
        return error_move(err, error);
    }
    export_shut_down(export);
    return 0;
}

struct export_deleting {
    struct exports *exports;
    const struct block_export_del_args *args; /* borrowed */
    struct export *export;                    /* a reference, or NULL */
};

static int coroutine_fn deleting_apply(struct action *action, struct error **err)
{
    struct export_deleting *deleting = action->state;
    struct error *error = NULL;

    deleting->export = exports_find_deletable(deleting->exports, deleting->args->id, deleting->args->mode, &error);
    if (!deleting->export) {
        return error_move(err, error);
    }
    export_ref(deleting->export);
    return 0;
}

/* Nothing is to be taken back: it goes when all is decided. */
static void coroutine_fn deleting_commit(struct action *action)
{
    export_shut_down(((struct export_deleting *)action->state)->export);
}

static void coroutine_fn deleting_clean(struct action *action)
{
    struct export_deleting *deleting = action->state;

    if (deleting->export) {
        export_unref(deleting->export);
    }
    g_free(deleting);
}

static const struct action_kind deleting_kind = {
    .name = "block-export-del", .apply = deleting_apply, .commit = deleting_commit, .clean = deleting_clean};

void export_del_action(struct action *ret, struct exports *exports, const struct block_export_del_args *args)
{
    struct export_deleting *deleting = g_new0(struct export_deleting, 1);

    deleting->exports = exports;
    deleting->args = args;
    *ret = (struct action){.kind = &deleting_kind, .state = deleting};
}

void coroutine_fn exports_delete_type(struct exports *exports, const struct export_type *type)
{
    list_for_each_safe (position, &exports->list) {
        struct export *export = container_of(position, struct export, link);

        if (export->type == type) {
            export_shut_down(export);
        }
    }
    co_group_wait(&exports->alive[type->id]);
}

bool exports_use_loop(struct exports *exports, const struct loop *loop)
{
    list_for_each (position, &exports->list) {
        const struct export *export = container_of(position, struct export, link);

        for (unsigned i = 0; i < export->loops.count; i++) {
            if (export->loops.items[i] == loop) {
                return true;
            }
        }
    }
    return false;
}

const char *export_node_name(const struct export *export)
{
    struct node *node = export->backend ? backend_node(export->backend) : NULL;

    return node ? node_beneath_filters(node)->name : export->node_name;
}

json_t *exports_query(struct exports *exports)
{
    json_t *list = json_array();

    list_for_each (position, &exports->list) {
        struct export *export = container_of(position, struct export, link);

        if (!export->opening) {
            json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:b}", "id", export->id, "type", export->type->name,
                                                  "node-name", export_node_name(export), "shutting-down",
                                                  export->shutting_down));
        }
    }
    return list;
}

void coroutine_fn exports_shutdown(struct exports *exports)
{
    if (exports->nbd_server) {
        nbd_server_stop(exports, NULL);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(export_types); i++) {
        exports_delete_type(exports, export_types[i]);
    }
    /* One that somebody else is stopping. */
    co_group_wait(&exports->servers);
}
