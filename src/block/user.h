/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_USER_H
#define INTERLOCK_BLOCK_USER_H

#include "base/buffers.h"
#include "base/error.h"
#include "block/request.h"

/*
 * For who does I/O. A backend is a user's handle on the root of a graph; it may be empty (no medium). Requests may be
 * submitted from any loop, in coroutines; they wait while the backend is drained.
 */
struct backend;
struct graph;
struct node;
struct operation;

/* Control thread, graph lock not held by the caller's other operations. Attaches at the head of `node` (over its job
 * filters). What it may do is what `operation` holds on `node` (ACCESS_ bits `granted` at most). `owner` is a
 * printable name ("export e0"). `node` NULL: empty. */
struct backend *backend_create(struct graph *graph, const char *owner);
int coroutine_fn backend_attach(struct backend *backend, struct node *node, unsigned granted, struct error **err);
/* The same for a caller who holds graph->lock, so that what was claimed there and then is what is attached to. */
int coroutine_fn backend_attach_locked(struct backend *backend, struct node *node, unsigned granted,
                                       struct error **err);
/* When a graph change moves the backend to another node, `variable` (an enum claim_variable) of `operation` follows in
 * the same step, and so do its claims: an export's CLAIM_NODE. `operation` NULL ends it; so does detaching. It ends
 * before operation_end(), but not sooner: claims that stay behind on a node that became stale refuse the change. */
void backend_follow(struct backend *backend, struct operation *operation, unsigned variable);
bool backend_follows(const struct backend *backend);
/* Does its owner's name end with the operation's id? */
bool backend_is_of(const struct backend *backend, const struct operation *operation);
/* Under a drain of its own; empty afterwards. */
void coroutine_fn backend_detach(struct backend *backend);
/* Waits for its requests, detaches, frees. Accepts NULL. */
void coroutine_fn backend_destroy(struct backend *backend);
/* The same for a caller who holds graph->lock; no drain has closed the backend. */
void coroutine_fn backend_detach_locked(struct backend *backend);
void coroutine_fn backend_destroy_locked(struct backend *backend);
/* Its requests are of clients, who wait for them: background work leaves them room while they come. */
void backend_set_client(struct backend *backend);
/* When one of those last came to any backend of the same graph, to a millisecond or so: loop_now_ns(). */
int64_t backend_client_ns(const struct backend *backend);
struct node *backend_node(const struct backend *backend); /* the root edge's child, or NULL */
struct edge *backend_edge(struct backend *backend);
/* Called on the control thread after the node's size or the attached node changed; may be NULL. */
void backend_set_changed(struct backend *backend, void (*changed)(void *argument), void *argument);

/* I/O. -ENOMEDIUM when empty, -EINVAL outside [0, backend_size()], -EPERM what was not granted, -EROFS. */
uint64_t backend_size(const struct backend *backend); /* 0 when empty */
int coroutine_fn backend_read(struct backend *backend, uint64_t offset, uint64_t bytes, struct buffers to,
                              unsigned flags);
int coroutine_fn backend_write(struct backend *backend, uint64_t offset, uint64_t bytes, struct buffers from,
                               unsigned flags);
/* edge_copy() between two backends, which may be one. -ENOTSUP also while the target is drained: somebody else may be
 * waiting for the source. */
int coroutine_fn backend_copy(struct backend *source, uint64_t offset, struct backend *target, uint64_t to,
                              uint64_t bytes, unsigned flags, const struct copy_aid *aid);
int coroutine_fn backend_write_zeroes(struct backend *backend, uint64_t offset, uint64_t bytes, unsigned flags);
int coroutine_fn backend_discard(struct backend *backend, uint64_t offset, uint64_t bytes);
int coroutine_fn backend_flush(struct backend *backend);
/* Of the whole chain below (base NULL), or down to, not including, `base`. */
int coroutine_fn backend_block_status(struct backend *backend, struct node *base, uint64_t offset, uint64_t bytes,
                                      struct extent *ret);
/* For who makes one request of several: from the one to the other he is inside, as a driver is during a request, and
 * does I/O on backend_edge() or on edges of nodes that it reaches. A drain waits for him. */
void coroutine_fn backend_enter(struct backend *backend);
void backend_leave(struct backend *backend);
/* Grows (needs `attributes`) or shrinks (needs `write-beneath` too) the node, under a drain of its own; what a growth
 * adds reads as zeroes. Filters above it and their backends follow. Control thread. */
int coroutine_fn backend_truncate(struct backend *backend, uint64_t size, struct error **err);
/* The same for a caller who holds graph->lock. */
int coroutine_fn backend_truncate_locked(struct backend *backend, uint64_t size, struct error **err);

#endif
