/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The children of an image that does not exist yet. Owns opening and letting go of them; what is written there is the
 * format's.
 *
 * 1. A node that was described inline lives as long as the place; one that was named stays.
 * 2. The backend takes all rights, so a node that anybody else uses is refused.
 */
#include "driver/format/image_place.h"
#include "block/graph.h"
#include "block/user.h"
#include <errno.h>

int coroutine_fn image_place_open(struct graph *graph, const struct blockdev_ref *ref, struct image_place *ret,
                                  struct error **err)
{
    int code = 0;
    if (ref->kind == BLOCKDEV_REF_REFERENCE) {
        struct node *found = graph_find_or_error(graph, ref->u.reference, err);
        code = found ? 0 : -ENOENT;
        ret->node = found ? node_ref(found) : NULL;
    } else {
        code = graph_open(graph, ref->u.definition, 0, &ret->node, err);
    }
    if (code == 0 && !ret->node->writable) {
        code = error_set(err, -EROFS, "Node '%s' is read-only: no image can be made in it", ret->node->name);
    }
    if (code == 0) {
        ret->backend = backend_create(graph, "creation of an image");
        code = backend_attach(ret->backend, ret->node, ACCESS_ALL, err);
    }
    return code;
}

void coroutine_fn image_place_close(struct image_place *place)
{
    backend_destroy(place->backend);
    node_release(place->node);
}

int coroutine_fn image_place_empty(struct edge *edge, struct error **err)
{
    int code = edge_size(edge) ? edge_truncate(edge, 0) : 0;
    return code < 0 && code != -ENOTSUP ? error_set_errno(err, code, "Could not empty node '%s'", edge->child->name)
                                        : 0;
}
