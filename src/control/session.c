/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A client's QMP session: three coroutines on the control loop. The reader (whoever called session_run()) takes bytes
 * from the connection and queues messages; the executor runs them one after the other; the writer sends what they and
 * the events put out. So a long command stops neither out-of-band commands nor events.
 *
 * Invariants:
 * 1. Replies come in the order of their commands, but for those of out-of-band commands, which the reader runs itself;
 *    their handlers never yield.
 * 2. Nothing grows without limit: at SESSION_MAX_PENDING messages the reader stops, at SESSION_OUTPUT_PAUSE the
 *    executor, and at SESSION_OUTPUT_MAX (events alone can get there) the client is cut off.
 * 3. A client that ends its own direction gets the answers to all it had sent.
 * 4. Each of the coroutines sleeps in a gate of its own and looks at its condition again when woken; all are on one
 *    thread, so nothing is missed between looking and sleeping.
 *
 * It knows nothing of sockets, of addresses or of what commands do.
 */
#include "control/session.h"

#include "control/dispatch.h"
#include "control/json_stream.h"
#include "loop/loop.h"
#include "schema/commands.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

/* Where one coroutine waits to be told that something has changed. */
struct gate {
    struct coroutine *sleeper;
};

static void coroutine_fn gate_wait(struct gate *gate)
{
    g_assert(!gate->sleeper);
    gate->sleeper = coroutine_self();
    coroutine_yield();
}

static void gate_signal(struct gate *gate)
{
    struct coroutine *sleeper = gate->sleeper;
    if (sleeper) {
        gate->sleeper = NULL;
        coroutine_wake(sleeper);
    }
}

struct session {
    struct control *control;
    char *monitor_id;
    struct connection *connection;
    struct json_stream *stream;
    GQueue *pending; /* struct message: they wait for the executor */
    GString *output; /* not yet given to the connection */
    size_t sending;  /* bytes that the writer is giving to it */
    struct gate reader, executor, writer;
    struct loop_sleep flush; /* session_end() waits here for the output */
    unsigned workers;        /* executor and writer, as long as they live */
    unsigned enders;         /* calls of session_end() that are under way */
    bool pretty, negotiated, oob;
    bool input_ended;  /* nothing more will be queued */
    bool ending;       /* no more commands are begun */
    bool output_ended; /* nothing more will be put out by commands */
    bool broken;       /* the connection is dead: output is dropped */
};

/* What came in: a value, or what was wrong with it. */
struct message {
    json_t *json;
    struct error *error;
};

static void message_free(struct message *message)
{
    json_decref(message->json);
    error_free(message->error);
    g_free(message);
}

struct session *session_create(struct control *control, const char *monitor_id, struct connection *connection,
                               bool pretty)
{
    struct session *session = g_new0(struct session, 1);
    session->control = control;
    session->monitor_id = g_strdup(monitor_id);
    session->connection = connection;
    session->pretty = pretty;
    session->stream = json_stream_create();
    session->pending = g_queue_new();
    session->output = g_string_new(NULL);
    return session;
}

void session_destroy(struct session *session)
{
    if (!session) {
        return;
    }
    g_assert(session->workers == 0 && !session->reader.sleeper);
    g_queue_free_full(session->pending, (GDestroyNotify)message_free);
    g_string_free(session->output, TRUE);
    json_stream_destroy(session->stream);
    g_free(session->monitor_id);
    g_free(session);
}

bool session_is_negotiated(const struct session *session)
{
    return session->negotiated;
}

bool session_is_pretty(const struct session *session)
{
    return session->pretty;
}

/* Output */

static void session_break(struct session *session)
{
    if (!session->broken) {
        session->broken = true;
        connection_shutdown(session->connection);
        g_string_truncate(session->output, 0);
        gate_signal(&session->reader);
        gate_signal(&session->executor);
        gate_signal(&session->writer);
        loop_sleep_wake(&session->flush);
    }
}

void session_send_text(struct session *session, const char *text, size_t size)
{
    if (session->broken) {
        return;
    }
    if (session->output->len + session->sending + size > SESSION_OUTPUT_MAX) {
        g_message("monitor %s: the client does not read; it is cut off with %zu bytes unsent", session->monitor_id,
                  session->output->len + session->sending);
        session_break(session);
        return;
    }
    g_string_append_len(session->output, text, (gssize)size);
    gate_signal(&session->writer);
}

/* Takes `json` over. */
static void session_send(struct session *session, json_t *json)
{
    char *text = json_dumps(json, session->pretty ? JSON_INDENT(4) : 0);
    json_decref(json);
    g_assert(text);
    session_send_text(session, text, strlen(text));
    session_send_text(session, "\r\n", 2);
    free(text);
}

static void coroutine_fn run_writer(void *argument)
{
    struct session *session = argument;
    while (true) {
        while (!session->output->len && !session->output_ended && !session->broken) {
            gate_wait(&session->writer);
        }
        if (!session->output->len || session->broken) {
            break;
        }
        GString *batch = session->output;
        session->output = g_string_new(NULL);
        session->sending = batch->len;
        struct iovec iov = {batch->str, batch->len};
        int result = connection_send(session->connection, buffers_one(&iov), batch->len);
        g_string_free(batch, TRUE);
        session->sending = 0;
        if (result < 0) {
            session_break(session);
        }
        gate_signal(&session->executor);
        if (!session->output->len) {
            loop_sleep_wake(&session->flush);
        }
    }
    session->workers--;
    gate_signal(&session->reader);
}

/* Replies */

/* Texts from outside (names in error sentences) may be anything. */
static json_t *text_json(const char *text)
{
    json_t *json = json_string(text);
    if (!json) {
        g_autofree char *valid = g_utf8_make_valid(text, -1);
        json = json_string(valid);
    }
    return json;
}

static json_t *error_json(const struct error *error)
{
    g_autofree char *sentence = error_format(error);
    json_t *json = json_pack("{s:s, s:o}", "class", error_class_name(error->class), "desc", text_json(sentence));
    if (error->data) {
        json_object_set(json, "data", error->data);
    }
    return json;
}

/* Takes `value` (of the member `kind`) over. */
static void reply(struct session *session, json_t *message, const char *kind, json_t *value)
{
    json_t *json = json_object();
    json_object_set_new(json, kind, value);
    json_t *id = json_is_object(message) ? json_object_get(message, "id") : NULL;
    if (id) {
        json_object_set(json, "id", id);
    }
    session_send(session, json);
}

/* Commands */

struct request {
    const char *name;
    json_t *arguments; /* borrowed; NULL for none */
    bool out_of_band;
};

/* The shape of a message; which command it is and whether it may run is checked later. */
static int request_parse(struct session *session, json_t *message, struct request *ret, struct error **err)
{
    if (!json_is_object(message)) {
        return error_set(err, -EINVAL, "a QMP message must be a JSON object");
    }
    json_t *execute = NULL, *oob = NULL, *arguments = NULL, *value;
    const char *name;
    json_object_foreach(message, name, value)
    {
        if (strcmp(name, "execute") == 0) {
            execute = value;
        } else if (strcmp(name, "exec-oob") == 0 && session->oob) {
            oob = value;
        } else if (strcmp(name, "arguments") == 0) {
            arguments = value;
        } else if (strcmp(name, "id") != 0) {
            return error_set(err, -EINVAL, "QMP message: member '%s' is unexpected", name);
        }
    }
    if (execute && oob) {
        return error_set(err, -EINVAL, "QMP message: 'execute' and 'exec-oob' exclude each other");
    }
    value = execute ? execute : oob;
    if (!value) {
        return error_set(err, -EINVAL, "QMP message: member 'execute' is missing");
    }
    if (!json_is_string(value)) {
        return error_set(err, -EINVAL, "QMP message: member '%s' must be a string", execute ? "execute" : "exec-oob");
    }
    if (arguments && !json_is_object(arguments)) {
        return error_set(err, -EINVAL, "QMP message: member 'arguments' must be an object");
    }
    *ret = (struct request){json_string_value(value), arguments, oob != NULL};
    return 0;
}

static int negotiate(struct session *session, json_t *arguments, struct error **err)
{
    struct qmp_capabilities_args *args;
    int result = qmp_capabilities_args_from_json(arguments, NULL, &args, err);
    if (result < 0) {
        return result;
    }
    for (size_t i = 0; i < args->enable.count; i++) {
        session->oob |= args->enable.items[i] == QMP_CAPABILITY_OOB;
    }
    qmp_capabilities_args_free(args);
    session->negotiated = true;
    return 0;
}

static int coroutine_fn request_run(struct session *session, const struct request *request, json_t **ret,
                                    struct error **err)
{
    bool is_negotiation = strcmp(request->name, "qmp_capabilities") == 0;
    const struct command *command = control_find_command(session->control, request->name);
    if (!session->negotiated && !is_negotiation) {
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, -EINVAL,
                               "Expecting capabilities negotiation with 'qmp_capabilities'");
    }
    if (!command) {
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, -ENOENT, "there is no command '%s'", request->name);
    }
    if (request->out_of_band && !command->allow_oob) {
        return error_set(err, -EINVAL, "the command %s cannot be run out of band", request->name);
    }
    if (is_negotiation && session->negotiated) {
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, -EINVAL,
                               "Capabilities negotiation is already complete, command ignored");
    }
    json_t *none = json_object();
    json_t *arguments = request->arguments ? request->arguments : none;
    int result;
    if (is_negotiation) {
        result = negotiate(session, arguments, err);
        *ret = result == 0 ? json_object() : NULL;
    } else {
        g_assert(command->dispatch);
        result = dispatch_command(session->control, command, arguments, ret, err);
    }
    json_decref(none);
    return result;
}

static void coroutine_fn message_execute(struct session *session, struct message *message)
{
    struct request request = {NULL, NULL, false};
    json_t *value = NULL;
    struct error *error = g_steal_pointer(&message->error);
    if (!error && request_parse(session, message->json, &request, &error) == 0) {
        int result = request_run(session, &request, &value, &error);
        g_assert((result < 0) == (error != NULL));
    }
    if (error) {
        reply(session, message->json, "error", error_json(error));
        error_free(error);
    } else {
        g_assert(value);
        reply(session, message->json, "return", value);
    }
}

static bool executor_may_run(const struct session *session)
{
    return session->pending->length && session->output->len + session->sending <= SESSION_OUTPUT_PAUSE;
}

static void coroutine_fn run_executor(void *argument)
{
    struct session *session = argument;
    while (!session->ending && !session->broken) {
        if (executor_may_run(session)) {
            struct message *message = g_queue_pop_head(session->pending);
            gate_signal(&session->reader);
            message_execute(session, message);
            message_free(message);
        } else if (session->input_ended && !session->pending->length) {
            break;
        } else {
            gate_wait(&session->executor);
        }
    }
    session->output_ended = true;
    gate_signal(&session->writer);
    loop_sleep_wake(&session->flush);
    session->workers--;
    gate_signal(&session->reader);
}

/* Input */

static bool is_out_of_band(const struct session *session, const struct message *message)
{
    return session->oob && json_is_object(message->json) && json_object_get(message->json, "exec-oob");
}

/* Everything that the bytes complete is run or queued; waits while the queue is full. */
static void coroutine_fn take_input(struct session *session, const char *bytes, size_t size)
{
    json_stream_feed(session->stream, bytes, size);
    while (!session->broken && !session->ending) {
        struct message *message = g_new0(struct message, 1);
        if (json_stream_next(session->stream, &message->json, &message->error) == JSON_STREAM_MORE) {
            message_free(message);
            return;
        }
        if (is_out_of_band(session, message)) {
            message_execute(session, message);
            message_free(message);
            continue;
        }
        g_queue_push_tail(session->pending, message);
        gate_signal(&session->executor);
        while (session->pending->length >= SESSION_MAX_PENDING && !session->broken && !session->ending) {
            gate_wait(&session->reader);
        }
    }
}

void coroutine_fn session_run(struct session *session)
{
    session_send(session, json_pack("{s:{s:o, s:[s]}}", "QMP", "version", control_version(), "capabilities", "oob"));
    session->workers = 2;
    coroutine_enter(coroutine_create(run_writer, session));
    coroutine_enter(coroutine_create(run_executor, session));
    g_autofree char *bytes = g_malloc(16384);
    while (!session->broken && !session->ending) {
        ssize_t size = connection_receive(session->connection, bytes, 16384);
        if (size < 0) {
            session_break(session);
        }
        if (size <= 0) {
            break;
        }
        take_input(session, bytes, (size_t)size);
    }
    session->input_ended = true;
    gate_signal(&session->executor);
    while (session->workers || session->enders) {
        gate_wait(&session->reader);
    }
}

void coroutine_fn session_end(struct session *session, int64_t timeout_ns)
{
    session->enders++;
    session->ending = true;
    gate_signal(&session->executor);
    gate_signal(&session->reader);
    int64_t deadline_ns = loop_clock_ns() + timeout_ns;
    while (!session->broken && (!session->output_ended || session->output->len || session->sending)) {
        int64_t left_ns = deadline_ns - loop_clock_ns();
        if (left_ns <= 0 || loop_sleep_ns(&session->flush, left_ns)) {
            break;
        }
    }
    session_break(session);
    session->enders--;
    gate_signal(&session->reader);
}
