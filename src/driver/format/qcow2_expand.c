/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Zero clusters made something that version 2 can say: nothing at all where there is no backing file, else data of
 * zeroes. All of those share one host cluster, or as few as the width of refcounts allows, so that the image does not
 * grow; a guest's write copies it, as it does with any shared cluster.
 *
 * 1. The tables are gone through twice, in one order: first to know how many such clusters there have to be and how
 *    often each is used, then, when these are on stable storage with their refcounts, to change the entries.
 * 2. So flags are right with the entry that they are in: no crash leaves more than leaks.
 */
#include "driver/format/qcow2_expand.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2_crypto.h"
#include <errno.h>

enum { USES_MAX = 32768 }; /* of one cluster of zeroes; more only by one table with more owners */

struct expansion {
    struct qcow2_repair *repair;
    GArray *clusters; /* uint64_t: of zeroes */
    unsigned next;    /* of them; the one before is in use */
    uint64_t room;    /* uses that it has left */
};

/* A cluster of zeroes for `uses` uses. In the first pass it is made. */
static int coroutine_fn take_zeroes(struct expansion *expansion, bool first_pass, uint64_t uses, uint64_t *ret_offset)
{
    struct qcow2_repair *repair = expansion->repair;
    unsigned bits = repair->image->cluster_bits;
    if (expansion->next == 0 || expansion->room < uses) {
        expansion->room = max_u64(USES_MAX, uses);
        expansion->next++;
        if (first_pass) {
            uint64_t made = repair->end++;
            const struct qcow2 *image = repair->image;
            struct edge *file = image->node->file;
            int code = image->crypto ? qcow2_crypto_write_zeroes(image->crypto, file, made << bits, image->cluster_size)
                                     : edge_write_zeroes(file, made << bits, image->cluster_size, 0);
            if (code < 0) {
                return code;
            }
            g_array_append_val(expansion->clusters, made);
        }
    }
    expansion->room -= uses;
    uint64_t cluster = g_array_index(expansion->clusters, uint64_t, expansion->next - 1);
    if (first_pass) {
        qcow2_tally_add(&repair->census->uses, cluster, uses);
    }
    *ret_offset = cluster << bits;
    return 0;
}

static int coroutine_fn expand_table(struct expansion *expansion, bool first_pass,
                                     const struct qcow2_census_table *table, void *entries, bool *ret_changed)
{
    struct qcow2 *image = expansion->repair->image;
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        uint64_t place = 0;
        if (entry.descriptor & QCOW2_COMPRESSED || !(entry.descriptor & QCOW2_ZERO)) {
            continue;
        }
        if (image->header.backing_file) {
            int code = take_zeroes(expansion, first_pass, table->uses, &place);
            if (code < 0) {
                return code;
            }
        }
        bool alone = place && qcow2_tally_get(&expansion->repair->census->uses, place >> image->cluster_bits) == 1;
        qcow2_entry_store(image, entries, i, (struct qcow2_entry){place | (alone ? QCOW2_COPIED : 0), 0});
        *ret_changed = true;
    }
    return 0;
}

static int coroutine_fn go_through(struct expansion *expansion, bool first_pass)
{
    struct qcow2_repair *repair = expansion->repair;
    struct qcow2 *image = repair->image;
    g_autofree void *entries = g_try_malloc(image->cluster_size);
    int code = entries ? 0 : -ENOMEM;
    expansion->next = 0;
    for (unsigned i = 0; code == 0 && i < repair->census->tables->len; i++) {
        const struct qcow2_census_table *table = &g_array_index(repair->census->tables, struct qcow2_census_table, i);
        bool changed = false;
        code = edge_read_memory(image->node->file, table->offset, entries, image->cluster_size);
        if (code == 0) {
            code = expand_table(expansion, first_pass, table, entries, &changed);
        }
        if (code == 0 && changed && !first_pass) {
            code = edge_write_memory(image->node->file, table->offset, entries, image->cluster_size, 0);
        }
    }
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    return code < 0 ? error_set_errno(repair->err, code, "Could not expand the zero clusters") : 0;
}

int coroutine_fn qcow2_expand_zeroes(struct qcow2_repair *repair)
{
    struct expansion expansion = {.repair = repair, .clusters = g_array_new(FALSE, FALSE, sizeof(uint64_t))};
    int code = go_through(&expansion, true);
    if (code == 0) {
        code = qcow2_repair_refcounts(repair, true);
    }
    if (code == 0) {
        code = go_through(&expansion, false);
    }
    g_array_free(expansion.clusters, TRUE);
    return code;
}
