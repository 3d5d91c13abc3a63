/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reopening a node: other options, other children. Owns the comparison of what is wanted with what is, and the order of
 * the steps; how a driver takes its options is the driver's (driver->reopen), how edges move is the transaction's.
 *
 *   compare everything | claim | edges, in one transaction | writable or read-only | flags, the driver | note them
 *
 * 1. What cannot be changed is refused before anything is claimed.
 * 2. A step that fails is taken back by itself, and reopen_revert() takes back those before it, in reverse.
 * 3. An edge to the same image by another way (through more or fewer filters) changes nobody's view: only the backing
 *    edge may lead to other data, for what a driver knows of its file it knows from there.
 * 4. Who made its container writable is a writer of the new child from before the edge moves, and of the old one until
 *    after.
 * 5. The claims are held while the changes are made. Then the new shape stands, and graph->lock keeps all others out
 *    until every action of the run is through or taken back: later entries may build on it.
 *
 * The backing string in the image's header stays as it is: change-backing-file changes that.
 */
#include "block/reopen.h"
#include "block/driver.h"
#include "block/private.h"
#include "schema/claims.h"
#include <errno.h>
#include <string.h>

struct edge_change {
    enum edge_role role;
    struct edge *edge;      /* NULL: there is none yet */
    struct node *from, *to; /* references; NULL: none */
    bool writes;            /* see 4. */
};

struct flags {
    bool direct, no_flush, discard, detect_zeroes, detect_zeroes_unmap;
};

struct reopen {
    const struct blockdev_options *options;
    struct graph *graph;
    struct node *node; /* a reference */
    struct edge_change changes[3];
    unsigned count;
    unsigned conditions;
    bool wants_writable, falls_back;
    bool was_wanted, was_never; /* node->wants_writable, node->never_writable */
    struct flags flags, old_flags;
    struct operation *operation;
    unsigned done; /* steps */
};

/* --- what is wanted; graph->lock is held --- */

static int refuse_option(const struct node *node, const char *option, struct error **err)
{
    return error_set(err, -ENOTSUP, "Cannot change the option '%s' of node '%s' while it is open", option, node->name);
}

/* Nested definitions were inlined when the node was opened; they have to be what they were. */
static bool same_definition(const struct node *node, const char *member, json_t *wanted)
{
    return json_equal(json_object_get(node->options, member), wanted);
}

static json_t *effective_value(const json_t *options, const struct marshal_member *member)
{
    json_t *value = json_object_get(options, member->name);
    if (value || !member->has_default) {
        return json_incref(value);
    }
    switch (member->type->kind) {
    case MARSHAL_BOOL:
        return json_boolean(member->default_value);
    case MARSHAL_ENUM:
        return json_string(member->type->values[member->default_value]);
    case MARSHAL_STR:
        return json_string(member->default_text);
    default:
        return json_integer(member->default_value);
    }
}

static bool is_child_option(const struct marshal_member *member)
{
    return member->type == &blockdev_ref_type || member->type == &blockdev_ref_or_null_type;
}

static int check_driver_options(const struct reopen *reopen, json_t *wanted, struct error **err)
{
    const struct node *node = reopen->node;
    const struct marshal_type *own = blockdev_options_type.branches[reopen->options->driver];
    for (unsigned i = 0; own && i < own->count; i++) {
        const struct marshal_member *member = &own->members[i];
        bool free_to_change = is_child_option(member);
        const char *const *known = node->driver->reopenable;
        for (; known && *known && !free_to_change; known++) {
            free_to_change = g_str_equal(*known, member->name);
        }
        json_t *before = effective_value(node->options, member), *after = effective_value(wanted, member);
        bool same = before == after || (before && after && json_equal(before, after));
        json_decref(before);
        json_decref(after);
        if (!same && !free_to_change) {
            return refuse_option(node, member->name, err);
        }
    }
    return 0;
}

static bool leads_to(struct node *from, const struct node *to, GHashTable *seen)
{
    if (from == to) {
        return true;
    }
    if (!g_hash_table_add(seen, from)) {
        return false;
    }
    list_for_each (link, &from->children) {
        if (leads_to(container_of(link, struct edge, parent_link)->child, to, seen)) {
            return true;
        }
    }
    return false;
}

/* Images in the longest backing chain down to the node, itself not counted. */
static unsigned height_above(struct node *node, GHashTable *known)
{
    gpointer value;
    unsigned height = 0;
    if (g_hash_table_lookup_extended(known, node, NULL, &value)) {
        return GPOINTER_TO_UINT(value);
    }
    g_hash_table_insert(known, node,
                        GUINT_TO_POINTER(0)); /* who meets it again, by a filter's target, has come round */
    list_for_each (link, &node->parents) {
        const struct edge *edge = container_of(link, struct edge, child_link);
        if (edge->parent) {
            height = MAX(height, height_above(edge->parent, known) + (edge->role == EDGE_BACKING));
        }
    }
    g_hash_table_insert(known, node, GUINT_TO_POINTER(height));
    return height;
}

static int check_chain(struct reopen *reopen, enum edge_role role, struct node *to, struct error **err)
{
    struct node *node = reopen->node;
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    g_autoptr(GHashTable) heights = g_hash_table_new(NULL, NULL);
    if (leads_to(to, node, seen)) {
        return error_set(err, -ELOOP, "Making '%s' a %s child of '%s' would create a cycle", to->name,
                         edge_role_name(role), node->name);
    }
    if (height_above(node, heights) + 1 + node_backing_depth(to) > CHAIN_LIMIT) {
        return error_set(err, -ELOOP, "The backing chain would be more than %d images deep at '%s'", CHAIN_LIMIT,
                         node->name);
    }
    return 0;
}

static struct edge *edge_of_role(const struct node *node, enum edge_role role)
{
    struct edge *const edges[] = {
        [EDGE_FILE] = node->file,         [EDGE_DATA] = node->data,     [EDGE_BACKING] = node->backing,
        [EDGE_FILTERED] = node->filtered, [EDGE_TARGET] = node->target,
    };
    return edges[role];
}

static int check_new_child(struct reopen *reopen, const struct edge *edge, enum edge_role role, struct node *to,
                           bool differs, struct error **err)
{
    const struct node *node = reopen->node;
    if (role != EDGE_BACKING && (differs || role == EDGE_TARGET || node->driver->guards)) {
        error_set(err, -ENOTSUP, "Node '%s' cannot have '%s' in place of '%s' while it is open", node->name, to->name,
                  edge ? edge->child->name : "nothing");
        error_hint(err, "Only filters over the same image may come or go there");
        return -ENOTSUP;
    }
    if (to->stale) {
        return error_set(err, -EINVAL, "Node '%s' is stale: %s", to->name, to->stale);
    }
    if (role != EDGE_BACKING && node->writable && !to->writable) {
        return error_set(err, -EROFS, "Node '%s' is read-only, but '%s' is to write to it", to->name, node->name);
    }
    return check_chain(reopen, role, to, err);
}

/* The filters from `top` down to the image: can they come and go? */
static int check_filters(struct node *top, struct error **err)
{
    for (struct node *node = top; node->driver->kind == DRIVER_FILTER && node->filtered; node = node->filtered->child) {
        if (node->driver->truncate) {
            return error_set(err, -ENOTSUP,
                             "Filter '%s' keeps a size of its own (driver %s): it cannot come or go while '%s' is open",
                             node->name, node->driver->name, node_beneath_filters(node)->name);
        }
    }
    return 0;
}

static int want_child(struct reopen *reopen, enum edge_role role, struct node *to, struct error **err)
{
    struct edge *edge = edge_of_role(reopen->node, role);
    struct node *from = edge ? edge->child : NULL;
    if (from == to) {
        return 0;
    }
    bool differs = !from || !to || node_beneath_filters(from) != node_beneath_filters(to);
    int r = to ? check_new_child(reopen, edge, role, to, differs, err) : 0;
    if (r == 0 && !differs) {
        r = check_filters(from, err);
        r = r < 0 ? r : check_filters(to, err);
    }
    if (r < 0) {
        return r;
    }
    reopen->conditions |= CLAIM_IF_RELINK | (differs ? CLAIM_IF_DIFFER : 0);
    reopen->changes[reopen->count++] = (struct edge_change){
        .role = role,
        .edge = edge,
        .from = from ? node_ref(from) : NULL,
        .to = to ? node_ref(to) : NULL,
        .writes = role != EDGE_BACKING && reopen->node->made_files_writable,
    };
    return 0;
}

static int want_reference(struct reopen *reopen, enum edge_role role, const char *name, struct error **err)
{
    struct node *child = graph_find_or_error(reopen->graph, name, err);
    if (!child) {
        return -ENOENT;
    }
    return want_child(reopen, role, role == EDGE_BACKING ? node_head(child) : place_of_child(reopen->node, role, child),
                      err);
}

/* `name` of the option: a definition is the child that is there already, or refused. */
static int want_definition(const struct reopen *reopen, const char *name, json_t *wanted, struct error **err)
{
    if (same_definition(reopen->node, name, json_object_get(wanted, name))) {
        return 0;
    }
    int r = refuse_option(reopen->node, name, err);
    error_hint(err, "Open the other node first, and give its node-name");
    return r;
}

static const char *name_of_child(const struct reopen *reopen, const struct blockdev_ref *ref, json_t *wanted)
{
    const struct marshal_type *own = blockdev_options_type.branches[reopen->options->driver];
    for (unsigned i = 0; i < own->count; i++) {
        const char *branch = (const char *)reopen->options + blockdev_options_type.branch_offset;
        if (is_child_option(&own->members[i])) {
            const void *slot = branch + own->members[i].offset;
            if (*(const struct blockdev_ref *const *)slot == ref) {
                return own->members[i].name;
            }
        }
    }
    g_assert_not_reached();
}

static int want_backing(struct reopen *reopen, json_t *wanted, struct error **err)
{
    const struct node *node = reopen->node;
    const struct blockdev_ref_or_null *backing = options_children(reopen->options).backing;
    if (!node->driver->backing) {
        return 0;
    }
    if (!backing) {
        bool named = node->header_backing && *node->header_backing;
        return node->backing || named ? error_set(err, -EINVAL, "backing is missing for '%s'", node->name) : 0;
    }
    switch (backing->kind) {
    case BLOCKDEV_REF_OR_NULL_NULL:
        return want_child(reopen, EDGE_BACKING, NULL, err);
    case BLOCKDEV_REF_OR_NULL_REFERENCE:
        return want_reference(reopen, EDGE_BACKING, backing->u.reference, err);
    default:
        return want_definition(reopen, "backing", wanted, err);
    }
}

static int want_children(struct reopen *reopen, json_t *wanted, struct error **err)
{
    struct option_children children = options_children(reopen->options);
    bool named[EDGE_ROOT] = {false};
    int r = 0;
    for (unsigned i = 0; i < children.count && r == 0; i++) {
        const struct option_child *child = &children.list[i];
        named[child->role] = true;
        r = child->ref->kind == BLOCKDEV_REF_REFERENCE
                ? want_reference(reopen, child->role, child->ref->u.reference, err)
                : want_definition(reopen, name_of_child(reopen, child->ref, wanted), wanted, err);
    }
    /* A second child that an option named, and no option names now. One that the header names stays. */
    if (r == 0 && reopen->node->data && !named[EDGE_DATA] && !reopen->node->header_data) {
        r = error_set(err, -EINVAL, "The option for node '%s', where '%s' keeps its data, is missing",
                      reopen->node->data->child->name, reopen->node->name);
    }
    return r < 0 ? r : want_backing(reopen, wanted, err);
}

static int want_flags(struct reopen *reopen, struct error **err)
{
    const struct blockdev_options *options = reopen->options;
    const struct node *node = reopen->node;
    const struct blockdev_cache_options *cache = options->cache;
    enum blockdev_detect_zeroes_options zeroes =
        options->has_detect_zeroes ? options->detect_zeroes : BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF;
    reopen->old_flags =
        (struct flags){node->direct, node->no_flush, node->discard, node->detect_zeroes, node->detect_zeroes_unmap};
    reopen->flags = (struct flags){
        .direct = cache && cache->has_direct && cache->direct,
        .no_flush = cache && cache->has_no_flush && cache->no_flush,
        .discard = options->has_discard && options->discard == BLOCKDEV_DISCARD_OPTIONS_UNMAP,
        .detect_zeroes = zeroes != BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF,
        .detect_zeroes_unmap = zeroes == BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP,
    };
    if (reopen->flags.detect_zeroes_unmap && !reopen->flags.discard) {
        return error_set(err, -EINVAL, "Node '%s': detect-zeroes=unmap is not allowed without discard=unmap",
                         node->name);
    }
    const struct node *file = node->file ? node->file->child : NULL;
    if (file && file->opened_for &&
        (reopen->flags.direct != node->direct || reopen->flags.no_flush != node->no_flush)) {
        refuse_option(node, "cache", err);
        error_hint(err, "Its file was opened with it: change the options of node '%s'", file->name);
        return -ENOTSUP;
    }
    if ((options->has_force_share && options->force_share) != node->force_share) {
        return refuse_option(node, "force-share", err);
    }
    reopen->wants_writable = !(options->has_read_only && options->read_only);
    reopen->falls_back = options->has_auto_read_only && options->auto_read_only;
    reopen->was_wanted = node->wants_writable;
    reopen->was_never = node->never_writable;
    if (!reopen->wants_writable && node->writable) {
        reopen->conditions |= CLAIM_IF_DEMOTE;
    }
    return 0;
}

static int find_node(struct reopen *reopen, struct error **err)
{
    const struct blockdev_options *options = reopen->options;
    if (!options->node_name) {
        return error_set(err, -EINVAL, "node-name not specified");
    }
    struct node *node = graph_find(reopen->graph, options->node_name);
    if (!node) {
        return error_set(err, -ENOENT, "Failed to find node with node-name='%s'", options->node_name);
    }
    if (!node->options || node->job_filter) {
        return error_set(err, -EBUSY, "Node '%s' is a job's own: its options are not yours to change", node->name);
    }
    if (node->driver->id != options->driver) {
        return refuse_option(node, "driver", err);
    }
    reopen->node = node_ref(node);
    return 0;
}

static int coroutine_fn reopen_plan(struct action *action, struct error **err)
{
    struct reopen *reopen = action->state;
    reopen->graph = action->graph;
    int r = find_node(reopen, err);
    if (r < 0) {
        return r;
    }
    json_t *wanted = blockdev_options_to_json(reopen->options);
    r = check_driver_options(reopen, wanted, err);
    r = r < 0 ? r : want_flags(reopen, err);
    r = r < 0 ? r : want_children(reopen, wanted, err);
    json_decref(wanted);
    action_drain(action, reopen->node);
    return r;
}

static struct operation_config reopen_config(const struct reopen *reopen)
{
    struct operation_config config = {
        .kind = "command",
        .id = reopen->node->name,
        .table = &blockdev_reopen_claims,
        .bound = {[CLAIM_NODE] = reopen->node},
        .conditions = reopen->conditions,
    };
    for (unsigned i = 0; i < reopen->count; i++) {
        if (reopen->changes[i].role == EDGE_BACKING || !config.bound[CLAIM_TARGET]) {
            config.bound[CLAIM_TARGET] = reopen->changes[i].to;
        }
    }
    return config;
}

static int coroutine_fn reopen_preview(struct action *action, json_t **ret_claims, struct error **err)
{
    struct operation_config config = reopen_config(action->state);
    return operation_preview(action->graph, &config, ret_claims, err);
}

/* --- doing, and taking back; all drained --- */

static int coroutine_fn change_edges(struct reopen *reopen, bool back, struct error **err)
{
    g_autofree char *subject = g_strdup_printf("blockdev-reopen %s", reopen->node->name);
    struct transaction *transaction = graph_begin(reopen->graph, subject);
    transaction_by(transaction, reopen->operation);
    if (back) {
        transaction_takes_back(transaction); /* what was claimed for it has been given back */
    }
    for (unsigned i = 0; i < reopen->count; i++) {
        const struct edge_change *change = &reopen->changes[i];
        struct edge *edge = edge_of_role(reopen->node, change->role);
        struct node *to = back ? change->from : change->to;
        if (!edge) {
            transaction_attach(transaction, reopen->node, change->role, to, NULL);
        } else if (to) {
            transaction_move_edge(transaction, edge, to);
        } else {
            transaction_detach(transaction, edge);
        }
    }
    return graph_commit(transaction, err);
}

static void coroutine_fn end_writers(struct reopen *reopen, unsigned count, bool of_old)
{
    for (unsigned i = 0; i < count; i++) {
        if (reopen->changes[i].writes) {
            node_writable_end_locked(of_old ? reopen->changes[i].from : reopen->changes[i].to);
        }
    }
}

static int coroutine_fn begin_writers(struct reopen *reopen, bool of_old, struct error **err)
{
    for (unsigned i = 0; i < reopen->count; i++) {
        const struct edge_change *change = &reopen->changes[i];
        int r = change->writes ? node_writable_begin_locked(of_old ? change->from : change->to, err) : 0;
        if (r < 0) {
            end_writers(reopen, i, of_old);
            return r;
        }
    }
    return 0;
}

static int coroutine_fn do_edges(struct reopen *reopen, struct error **err)
{
    int r = begin_writers(reopen, false, err);
    if (r == 0) {
        r = change_edges(reopen, false, err);
        end_writers(reopen, reopen->count, r == 0);
    }
    return r;
}

static int coroutine_fn undo_edges(struct reopen *reopen, struct error **err)
{
    int r = begin_writers(reopen, true, err);
    if (r == 0) {
        r = change_edges(reopen, true, err);
        end_writers(reopen, reopen->count, r < 0);
    }
    return r;
}

static int coroutine_fn do_writable(struct reopen *reopen, struct error **err)
{
    auto_error error = NULL;
    int r = node_want_writable_locked(reopen->node, reopen->wants_writable, &error);
    if (r < 0 && reopen->wants_writable && reopen->falls_back) {
        return 0;
    }
    if (r < 0) {
        return error_move(err, g_steal_pointer(&error));
    }
    reopen->node->never_writable = !reopen->wants_writable;
    return 0;
}

static int coroutine_fn undo_writable(struct reopen *reopen, struct error **err)
{
    int r = node_want_writable_locked(reopen->node, reopen->was_wanted, err);
    reopen->node->never_writable = reopen->was_never;
    return r;
}

static void set_flags(struct node *node, const struct flags *flags)
{
    node->direct = flags->direct;
    node->no_flush = flags->no_flush;
    node->discard = flags->discard;
    node->detect_zeroes = flags->detect_zeroes;
    node->detect_zeroes_unmap = flags->detect_zeroes_unmap;
}

static int coroutine_fn do_options(struct reopen *reopen, struct error **err)
{
    struct node *node = reopen->node;
    set_flags(node, &reopen->flags);
    int r = node->driver->reopen ? node->driver->reopen(node, reopen->options, err) : 0;
    if (r < 0) {
        set_flags(node, &reopen->old_flags);
    }
    return r;
}

static int coroutine_fn undo_options(struct reopen *reopen, struct error **err)
{
    struct node *node = reopen->node;
    struct blockdev_options *before = NULL;
    set_flags(node, &reopen->old_flags);
    int r = node->driver->reopen ? blockdev_options_from_json(node->options, NULL, &before, err) : 0;
    if (r == 0 && before) {
        r = node->driver->reopen(node, before, err);
    }
    blockdev_options_free(before);
    return r;
}

static const struct {
    int coroutine_fn (*apply)(struct reopen *reopen, struct error **err);
    int coroutine_fn (*undo)(struct reopen *reopen, struct error **err);
} steps[] = {
    {do_edges, undo_edges},
    {do_writable, undo_writable},
    {do_options, undo_options},
};

static void coroutine_fn reopen_revert(struct action *action)
{
    struct reopen *reopen = action->state;
    while (reopen->done > 0) {
        auto_error error = NULL;
        if (steps[--reopen->done].undo(reopen, &error) < 0) {
            g_warning("Node '%s' is not wholly as it was before blockdev-reopen: %s", reopen->node->name,
                      error ? error->message : "unknown error");
        }
    }
}

static int coroutine_fn reopen_apply(struct action *action, struct error **err)
{
    struct reopen *reopen = action->state;
    struct operation_config config = reopen_config(reopen);
    int r = operation_begin(action->graph, &config, &reopen->operation, err);
    if (r < 0) {
        return r;
    }
    while (r == 0 && reopen->done < G_N_ELEMENTS(steps)) {
        r = steps[reopen->done].apply(reopen, err);
        reopen->done += r == 0;
    }
    if (r < 0) {
        reopen_revert(action);
    }
    operation_end_locked(reopen->operation);
    return r;
}

static void coroutine_fn reopen_commit(struct action *action)
{
    struct reopen *reopen = action->state;
    json_decref(reopen->node->options);
    reopen->node->options = blockdev_options_to_json(reopen->options);
}

static void coroutine_fn reopen_clean(struct action *action)
{
    struct reopen *reopen = action->state;
    for (unsigned i = 0; i < reopen->count; i++) {
        node_release(reopen->changes[i].from);
        node_release(reopen->changes[i].to);
    }
    node_release(reopen->node);
    g_free(reopen);
}

static const struct action_kind reopen_kind = {
    .name = "blockdev-reopen",
    .plan = reopen_plan,
    .apply = reopen_apply,
    .revert = reopen_revert,
    .commit = reopen_commit,
    .clean = reopen_clean,
    .preview = reopen_preview,
};

void reopen_action(struct action *ret, const struct blockdev_options *options)
{
    struct reopen *reopen = g_new0(struct reopen, 1);
    reopen->options = options;
    *ret = (struct action){.kind = &reopen_kind, .state = reopen};
}
