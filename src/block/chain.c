/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Walking chains: which image is below which, what stands over and beneath filters, and where in a chain a range of
 * data comes from. Owns no state. Everything here reads the graph: inside a request, or on the control thread while
 * nobody changes the shape.
 *
 * 1. An image is a node that is no filter; node_backing() steps from image to image.
 * 2. Layers end at their own size: what an overlay shows behind the end of a shorter layer is zero, decided by that
 *    layer, whatever lies further below.
 */
#include "base/size.h"
#include "block/private.h"
#include <errno.h>

struct node *node_beneath_filters(struct node *node)
{
    while (node->driver->kind == DRIVER_FILTER && node->filtered) {
        node = node->filtered->child;
    }
    return node;
}

struct node *node_beneath_job_filters(struct node *node)
{
    while (node->job_filter && node->filtered) {
        node = node->filtered->child;
    }
    return node;
}

struct node *node_head(struct node *node)
{
    for (bool found = true; found;) {
        found = false;
        list_for_each (link, &node->parents) {
            const struct edge *edge = container_of(link, struct edge, child_link);
            if (edge->role == EDGE_FILTERED && edge->parent->job_filter) {
                node = edge->parent;
                found = true;
                break;
            }
        }
    }
    return node;
}

struct node *node_backing(const struct node *node)
{
    const struct node *image = node_beneath_filters((struct node *)node);
    return image->backing ? node_beneath_filters(image->backing->child) : NULL;
}

bool node_is_above(const struct node *above, const struct node *below)
{
    const struct node *target = node_beneath_filters((struct node *)below);
    for (const struct node *node = node_backing(above); node; node = node_backing(node)) {
        if (node == target) {
            return true;
        }
    }
    return false;
}

/* Each node once: a mirror whose target leans on what is copied is a circle, of its filter's edge to the target. */
static bool reaches(const struct node *from, const struct node *to, GHashTable *seen)
{
    if (from == to) {
        return true;
    }
    if (!g_hash_table_add(seen, (void *)from)) {
        return false;
    }
    list_for_each (link, &from->children) {
        const struct edge *edge = container_of(link, struct edge, parent_link);
        if (reaches(edge->child, to, seen)) {
            return true;
        }
    }
    return false;
}

bool node_reaches(const struct node *from, const struct node *to)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    return reaches(from, to, seen);
}

unsigned node_backing_depth(const struct node *node)
{
    unsigned depth = 0;
    while ((node = node_backing(node))) {
        depth++;
    }
    return depth;
}

void chain_for_each_edge(struct node *top, struct node *base, void (*visit)(struct edge *edge, void *argument),
                         void *argument)
{
    for (struct node *node = top; node != base;) {
        struct edge *edge = node->filtered ? node->filtered : node->backing;
        if (!edge) {
            return;
        }
        visit(edge, argument);
        node = edge->child;
    }
}

/* An empty place that a layer keeps where it has nothing: it is told of if nobody below has anything either. */
static unsigned empty_place(const struct extent *extent)
{
    return extent->flags & (EXTENT_MAPPED | EXTENT_IN_DATA_FILE);
}

int coroutine_fn chain_block_status(struct node *node, struct node *base, uint64_t offset, uint64_t bytes,
                                    struct extent *ret)
{
    struct node *end = base ? node_beneath_filters(base) : NULL;
    struct extent extent = {.bytes = bytes}; /* of the layer above */
    unsigned layers = 0;
    for (node = node_beneath_filters(node); node && node != end; node = node_backing(node), layers++) {
        uint64_t size = atomic_load(&node->size);
        if (offset >= size) {
            *ret = (struct extent){.bytes = bytes,
                                   .host_offset = extent.host_offset,
                                   .flags = EXTENT_ZERO | EXTENT_ALLOCATED | empty_place(&extent),
                                   .depth = layers};
            return 0;
        }
        int r = node_block_status(node, offset, min_u64(bytes, size - offset), &extent);
        if (r < 0) {
            return r;
        }
        bytes = extent.bytes;
        if (extent.flags & EXTENT_ALLOCATED) {
            *ret = extent;
            ret->depth = layers;
            return 0;
        }
    }
    *ret = (struct extent){.bytes = bytes, .depth = layers + 1};
    if (!node) {
        ret->host_offset = extent.host_offset;
        ret->flags = EXTENT_ZERO | empty_place(&extent);
    }
    return 0;
}
