/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The life of a queue: a coroutine on its loop, the runner, takes as many requests as the ring has, starts a coroutine
 * for each, and waits for a kick when there are no more. What has ended is in the ring at once; the guest is called at
 * the end of the loop's turn, once for all. Invariants:
 * 1. the ring, the call and error events and everything in flight belong to the queue's loop while it runs;
 * 2. the control loop touches them only between the end of a pause and the next start;
 * 3. a pause waits for every request inside: memory may be unmapped after it, and nothing is cancelled;
 * 4. a ring that is broken is left alone from then on: the front end is told by the error event, and may start the
 *    queue again with other settings after it has stopped it.
 */
#include "export/vhost_user/queue.h"
#include "loop/event.h"
#include <errno.h>
#include <glib.h>

/* Requests inside; the others wait in the ring. */
#define IN_FLIGHT_MAX 256

static struct vhost_block_request *request_take(struct vhost_queue *queue)
{
    struct vhost_block_request *request = queue->unused;

    if (request) {
        queue->unused = request->next_unused;
        return request;
    }
    request = g_try_malloc(sizeof(*request));
    if (request) {
        request->queue = queue;
    }
    return request;
}

static void request_give(struct vhost_block_request *request)
{
    request->next_unused = request->queue->unused;
    request->queue->unused = request;
}

static void queue_break(struct vhost_queue *queue, const char *reason)
{
    if (!atomic_load(&queue->broken)) {
        atomic_store(&queue->broken, reason);
        ring_break(&queue->ring, reason);
        g_message("vhost-user-blk export '%.*s': queue %u is broken: %s", VIRTIO_BLK_ID_BYTES, queue->device->name,
                  queue->index, reason);
        if (queue->error) {
            event_signal(queue->error);
        }
    }
}

static void notify_run(struct loop_task *task)
{
    struct vhost_queue *queue = container_of(task, struct vhost_queue, notify);

    if (queue->running && ring_wants_call(&queue->ring) && queue->call) {
        event_signal(queue->call);
    }
}

static void wake_runner(struct vhost_queue *queue)
{
    if (queue->sleeping) {
        queue->sleeping = false;
        coroutine_wake(queue->runner);
    }
}

static void request_run(void *argument)
{
    struct vhost_block_request *request = argument;
    struct vhost_queue *queue = request->queue;
    int written = vhost_block_run(queue->device, &request->chain);

    if (written < 0) {
        queue_break(queue, "a request without a header or without room for its status");
    } else {
        ring_push(&queue->ring, &request->chain, (uint32_t)written);
        loop_at_turn_end(&queue->notify);
    }
    request_give(request);
    queue->in_flight--;
    wake_runner(queue);
}

/* Starts all that the ring has, as far as there is room. True: somebody has to end before there is more. */
static bool take_requests(struct vhost_queue *queue)
{
    unsigned room = MIN(IN_FLIGHT_MAX, queue->config.size);

    while (queue->in_flight < room && !queue->stopping) {
        struct vhost_block_request *request = request_take(queue);
        int r = request ? ring_pop(&queue->ring, &request->chain) : -ENOMEM;

        if (r > 0) {
            queue->in_flight++;
            coroutine_enter(coroutine_create(request_run, request));
            continue;
        }
        if (request) {
            request_give(request);
        }
        if (r == -EPROTO) {
            queue_break(queue, queue->ring.broken);
        } else if (r < 0 && !queue->in_flight) {
            queue_break(queue, "there is no memory for a request");
        }
        return r < 0;
    }
    return true;
}

/* Until a request has ended, or the queue is to stop. */
static void coroutine_fn runner_sleep(struct vhost_queue *queue)
{
    queue->sleeping = true;
    coroutine_yield();
}

static void coroutine_fn serve(struct vhost_queue *queue)
{
    while (!queue->stopping) {
        ring_disable_kicks(&queue->ring);
        if (take_requests(queue)) {
            if (!queue->stopping) {
                runner_sleep(queue);
            }
            continue;
        }
        if (ring_enable_kicks(&queue->ring)) {
            continue;
        }
        if (vhost_memory_is_lost(queue->config.memory)) {
            queue_break(queue, "the front end has taken memory away");
            continue;
        }
        int r = event_wait(queue->kick);
        if (r < 0 && r != -ECANCELED) {
            queue_break(queue, "kicks cannot be waited for");
        }
    }
}

static void paused_run(void *argument)
{
    struct vhost_queue *queue = argument;

    queue->running = false;
    coroutine_wake(queue->pauser);
}

/* The queue's loop. */
static void runner_run(void *argument)
{
    struct vhost_queue *queue = argument;

    queue->runner = coroutine_self();
    serve(queue);
    while (queue->in_flight) {
        runner_sleep(queue);
    }
    while (queue->notify.queued) {
        coroutine_pause();
    }
    event_leave(queue->kick);
    loop_spawn(queue->control, paused_run, queue);
}

/* --- the control loop --- */

void vhost_queue_init(struct vhost_queue *queue, unsigned index, const struct vhost_device *device, struct loop *loop)
{
    *queue = (struct vhost_queue){
        .device = device, .index = index, .loop = loop, .control = loop_self(), .notify.run = notify_run};
}

void vhost_queue_finish(struct vhost_queue *queue)
{
    g_assert(!queue->running && !queue->in_flight);
    while (queue->unused) {
        struct vhost_block_request *request = queue->unused;

        queue->unused = request->next_unused;
        g_free(request);
    }
    event_close(queue->kick);
    event_close(queue->call);
    event_close(queue->error);
    queue->kick = queue->call = queue->error = NULL;
}

void vhost_queue_start(struct vhost_queue *queue)
{
    g_assert(!queue->running && queue->kick && queue->has_addresses);
    queue->stopping = queue->sleeping = false;
    atomic_store(&queue->broken, NULL);
    int r = ring_start(&queue->ring, &queue->config);
    if (r < 0) {
        queue_break(queue, r == -EFAULT ? "its rings are not in the guest's memory, or not aligned"
                                        : "its size, base or region makes no sense");
    }
    queue->running = true;
    loop_spawn(queue->loop, runner_run, queue);
}

static void stop_run(void *argument)
{
    struct vhost_queue *queue = argument;

    queue->stopping = true;
    event_interrupt(queue->kick);
    wake_runner(queue);
}

void coroutine_fn vhost_queue_pause(struct vhost_queue *queue)
{
    if (queue->running) {
        queue->pauser = coroutine_self();
        loop_spawn(queue->loop, stop_run, queue);
        coroutine_yield();
        queue->config.base = ring_base(&queue->ring);
        ring_stop(&queue->ring);
    }
}

struct exchange {
    struct vhost_queue *queue;
    struct event **place, *event;
    struct coroutine *waiter;
};

static void exchange_run(void *argument)
{
    struct exchange *exchange = argument;
    struct event *before = *exchange->place;

    *exchange->place = exchange->event;
    exchange->event = before;
    if (*exchange->place) {
        event_signal(*exchange->place); /* what came while there was none, or the other one */
    }
    coroutine_wake(exchange->waiter);
}

static void coroutine_fn exchange_event(struct vhost_queue *queue, struct event **place, struct event *event)
{
    struct exchange exchange = {queue, place, event, coroutine_self()};

    if (queue->running) {
        loop_spawn(queue->loop, exchange_run, &exchange);
        coroutine_yield();
        event_close(exchange.event);
    } else {
        event_close(*place);
        *place = event;
    }
}

void coroutine_fn vhost_queue_set_call(struct vhost_queue *queue, struct event *event)
{
    exchange_event(queue, &queue->call, event);
}

void coroutine_fn vhost_queue_set_error(struct vhost_queue *queue, struct event *event)
{
    exchange_event(queue, &queue->error, event);
}
